"""Adapters (ControlNet): a frozen teacher or student conditioned on images."""
