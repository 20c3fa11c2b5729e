"""The world of known meshes: shapes, renders, captions."""
