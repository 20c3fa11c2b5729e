"""The contract of every score model: noise schedule, predictions, samplers."""
