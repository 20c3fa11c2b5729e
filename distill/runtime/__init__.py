"""Running an experiment: one run, checkpoints, configuration, files, processes."""
