"""Captioned image folders, image files, augmentation and cached latents."""
