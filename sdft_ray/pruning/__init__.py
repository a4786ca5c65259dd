"""Pruning plans: the blocks and channels to keep, chosen from importance scores for a target size."""
