"""Which parts of a model matter: one forward pass over a calibration set, summed and turned into scores."""
