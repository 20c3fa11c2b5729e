"""Meshes, textures, turntables and the files they are written to."""
