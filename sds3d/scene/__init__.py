"""Scene representations and how they are rendered."""
