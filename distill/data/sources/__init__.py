"""Public data sets and a user's own files as captioned image folders, one file a format."""
