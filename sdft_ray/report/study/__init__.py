"""A study: many runs, their curves and comparisons."""
