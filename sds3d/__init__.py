"""Text-to-3D on a frozen image teacher: a world of known meshes, a NeRF, its optimisation and what leaves it."""
