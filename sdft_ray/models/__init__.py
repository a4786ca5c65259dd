"""Checkpoints: architectures as data, sizes from a config, streaming reads, surgery, loading."""
