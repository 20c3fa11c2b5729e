"""Losses compared at equal compute."""
