"""Evaluation: lm-eval's scores of a checkpoint, recovery with error bars, the distribution gap, and measured speed."""
