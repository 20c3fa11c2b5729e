"""Text to 3D: the trainer and its stages."""
