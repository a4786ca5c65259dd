"""Self-data distillation: the rewriting prompt, the samplers, and the selection of training responses."""
