"""Copies a checkpoint and replaces the values of some tensors."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch

from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.surgery import drop_blocks


def write_with(
    source: Path, target: Path, tensors: Mapping[str, torch.Tensor], *, max_shard_bytes: int = 5 * 2**30
) -> None:
    """Write the checkpoint `source` to the directory `target`, with `tensors` in place of those with the same names.

    A tensor must have the shape of the tensor that it replaces and is converted to its dtype; all others are copied
    byte for byte, and so are tokenizer, chat template, generation config and licence. Files hold at most
    `max_shard_bytes` of tensors each. Memory: a few times the largest of `tensors`. Raises `ModelError` for a damaged
    checkpoint, or a `target` that is `source`; `OSError` if the disk is full.
    """
    checkpoint = Checkpoint.open(source)
    for name, tensor in tensors.items():
        assert name in checkpoint.tensors, f"{source} has no tensor {name}"
        assert checkpoint.tensors[name].shape == tuple(tensor.shape), f"{name} has another shape"
    drop_blocks(checkpoint.directory, target, range(checkpoint.num_blocks), max_shard_bytes=max_shard_bytes)
    written = Checkpoint.open(target)
    for name, tensor in tensors.items():
        info, dtype = written.tensors[name], written.read(name).dtype
        content = tensor.detach().cpu().to(dtype).contiguous().view(torch.uint8).numpy().tobytes()
        with info.file.open("r+b") as file:
            file.seek(info.offset)
            file.write(content)
