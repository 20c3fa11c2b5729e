"""Captioned image folders and what is computed from them."""
