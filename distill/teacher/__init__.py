"""The latent diffusion teacher: its parts, how each is trained, and the frozen whole."""
