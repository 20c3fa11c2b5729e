"""Training methods of one-step students, one file a family."""
