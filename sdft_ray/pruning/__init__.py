"""Pruning plans: which blocks stay, chosen from measured scores within a budget."""
