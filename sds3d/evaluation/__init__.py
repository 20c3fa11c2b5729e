"""Text to 3D compared with the true mesh."""
