"""Work, time and memory of a run, predicted from its own steps on a device without data."""
