"""Infrastructure of every experiment: runs, checkpoints, options, files, processes, optimisation, media."""
