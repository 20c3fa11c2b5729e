"""Adapters: a frozen teacher told where things are by a picture, through zero convolutions."""
