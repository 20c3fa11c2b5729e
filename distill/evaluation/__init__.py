"""Everything that grades: judge, probe, features, metrics, ablations."""
