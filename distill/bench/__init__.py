"""The bench of losses: each against the others at equal compute."""
