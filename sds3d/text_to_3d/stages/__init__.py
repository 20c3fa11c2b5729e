"""The stages of a text-to-3D run."""
