"""Statistical inference over items, seeds and data-set sizes: paired and crossed intervals, learning curves."""
