"""Diffusion teachers, score-based losses and the students they train. Independent of 3D."""
