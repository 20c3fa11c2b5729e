"""Text-to-3D on a frozen image teacher: known meshes, scenes, their optimisation, export and evaluation."""
