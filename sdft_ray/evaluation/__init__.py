"""Evaluation: lm-eval's scores of a checkpoint, recovery with error bars, and measured speed."""
