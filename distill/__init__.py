"""A teacher's scores, the losses made of them and the students they train. Knows nothing of 3D."""
