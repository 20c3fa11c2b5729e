"""Super-resolution of small images: SRResNet, its training and its use."""
