"""Score-based losses: one algebra, every first-order loss a config."""
