"""One model out of two of the same shape: spherical or straight interpolation of their weights.

Two students recovered from one pruned model on different data lie near each other, so points between them are
models too; merging students of two self-distilled sets raised recovery further in arXiv:2410.09982.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Literal

import torch

from sdft_ray.errors import ModelError
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.surgery import drop_blocks
from sdft_ray.models.vocabulary import check_same_tokenizer
from sdft_ray.training.sums import dot, l2_norm

MergeKind = Literal["slerp", "linear"]

NEARLY_PARALLEL = 0.9995
"""Above this cosine the arc is a straight line to float32 precision, and dividing by its sine is not safe."""
_COSMETIC = {"_name_or_path", "transformers_version", "dtype", "torch_dtype"}


def slerp(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    """The point at share `t` in [0, 1] of the arc from `first` to `second`, float32, of their shape.

    The angle is that between the flattened tensors; lengths are not normalised, so they are interpolated too
    (Shoemake, SIGGRAPH 1985). Straight where the two are nearly parallel or opposite, or one of them is 0.
    """
    a, b = first.float(), second.float()
    lengths = l2_norm(a) * l2_norm(b)
    cosine = float(dot(a, b) / lengths) if lengths > 0 else 1.0
    if abs(cosine) > NEARLY_PARALLEL:
        return linear(a, b, t)
    angle = torch.arccos(torch.tensor(cosine, dtype=torch.float64))
    shares = torch.sin(torch.tensor([1 - t, t], dtype=torch.float64) * angle) / torch.sin(angle)
    return a * float(shares[0]) + b * float(shares[1])


def linear(first: torch.Tensor, second: torch.Tensor, t: float) -> torch.Tensor:
    """The point at share `t` of the straight line from `first` to `second`, float32."""
    return first.float() * (1 - t) + second.float() * t


_WAYS: Mapping[MergeKind, Callable[[torch.Tensor, torch.Tensor, float], torch.Tensor]] = {
    "slerp": slerp,
    "linear": linear,
}


def merge_checkpoints(first: Path, second: Path, target: Path, t: float, kind: MergeKind = "slerp") -> None:
    """Write the model at share `t` between two checkpoints to `target`, with the dtypes and companions of `first`.

    Tensor by tensor: memory is a few times the largest one, whatever the size of the model. At t = 0 and t = 1 the
    weights are those of `first` and `second`. Raises `ModelError` for models of different shape or tokenizer, and
    for a damaged checkpoint.
    """
    assert 0 <= t <= 1, "t is in [0, 1]"
    source, other = Checkpoint.open(first), Checkpoint.open(second)
    _check_alike(source, other)
    drop_blocks(source.directory, target, range(source.num_blocks))
    for name, info in Checkpoint.open(target).tensors.items():
        tensor = source.read(name)
        merged = _WAYS[kind](tensor, other.read(name), t).to(tensor.dtype)
        content = merged.contiguous().view(torch.uint8).numpy().tobytes()
        with info.file.open("r+b") as file:
            file.seek(info.offset)
            file.write(content)


def _check_alike(first: Checkpoint, second: Checkpoint) -> None:
    """Raises `ModelError` naming the first difference that matters."""
    configs: list[Mapping[str, Any]] = [first.config, second.config]
    fields = sorted(set().union(*configs) - _COSMETIC)
    differing = [field for field in fields if configs[0].get(field) != configs[1].get(field)]
    if differing:
        field = differing[0]
        raise ModelError(
            f"cannot merge {first.directory} and {second.directory}: {field} is {configs[0].get(field)!r} in one and "
            f"{configs[1].get(field)!r} in the other",
            "merge students of the same pruned model",
        )
    if first.tensors.keys() != second.tensors.keys():
        name = sorted(first.tensors.keys() ^ second.tensors.keys())[0]
        raise ModelError(f"only one of {first.directory} and {second.directory} holds {name}", "export both alike")
    check_same_tokenizer(first.directory, second.directory, "merge students of the same pruned model")
