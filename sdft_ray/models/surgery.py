"""Model surgery: streams a checkpoint to one with fewer blocks and narrower channel spaces.

The kept bytes are copied unchanged, in any dtype, through small buffers, so memory use does not depend on the size of
the model. Only norms change their values, if the hidden size changes (`_factor`). `safetensors.safe_open` and
`save_file` would need memory for a whole output file, because `save_file` takes all tensors of a file at once.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from io import FileIO
from itertools import accumulate
from math import prod, sqrt
from pathlib import Path
from typing import BinaryIO

import numpy as np

from sdft_ray.errors import ModelError
from sdft_ray.models.channels import (
    WHOLE,
    Channels,
    axis_index,
    check_channels,
    config_with_channels,
    narrowed_sizes,
)
from sdft_ray.models.checkpoint import DTYPE_BYTES, INDEX_FILE, SINGLE_FILE, Checkpoint, TensorInfo
from sdft_ray.models.companions import copy_companions
from sdft_ray.models.config import check_keep_blocks, config_with_blocks
from sdft_ray.models.families import Family, TensorTemplate, join_block, split_block
from sdft_ray.models.tied_head import is_tied

_BUFFER_BYTES = 256 * 2**10  # fits the CPU cache between reading and writing
_NUM_THREADS = 2  # one reads and slices while the other writes
_FLOATS = {"F16": "<f2", "F32": "<f4", "F64": "<f8"}


@dataclass(frozen=True)
class Cut:
    """How one tensor is pruned: the kept indices along each axis (None: all), and a factor on the kept values.

    With `adds_one` the factor applies to 1 + value.
    """

    info: TensorInfo
    index: tuple[np.ndarray | None, ...]
    factor: float = 1.0
    adds_one: bool = False

    @property
    def is_whole(self) -> bool:
        return self.factor == 1 and all(places is None for places in self.index)

    @property
    def shape(self) -> tuple[int, ...]:
        sizes = zip(self.info.shape, self.index, strict=True)
        return tuple(size if places is None else len(places) for size, places in sizes)

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * DTYPE_BYTES[self.info.dtype]


Shard = list[tuple[str, Cut]]
"""Tensors of one output file, with their new names."""


def drop_blocks(source: Path, target: Path, keep_blocks: Sequence[int], *, max_shard_bytes: int = 5 * 2**30) -> None:
    """`prune_checkpoint` with depth pruning only."""
    prune_checkpoint(source, target, keep_blocks, max_shard_bytes=max_shard_bytes)


def prune_checkpoint(
    source: Path,
    target: Path,
    keep_blocks: Sequence[int],
    channels: Channels = WHOLE,
    *,
    max_shard_bytes: int = 5 * 2**30,
) -> None:
    """Write the model with `keep_blocks` and `channels` of the checkpoint `source` to the directory `target`.

    `keep_blocks` are 0-based and strictly increasing; block `keep_blocks[i]` becomes block `i`. The narrower model
    computes the same as the source with the other channels set to zero. Files hold at most `max_shard_bytes` of tensors
    each (a larger tensor gets a file of its own). Tokenizer, chat template, generation config and licences are
    copied (`models.companions`). Weights of an interrupted attempt in `target` are replaced. Memory: some buffers of
    256 KiB (of a row of a tensor, where that is more) and the headers, independent of the size of the model.

    Raises `ModelError` for a checkpoint that is damaged or does not match its config, `PlanError` for blocks or
    channels that do not exist or would give a model that cannot be loaded, `OSError` if the disk is full.
    """
    source, target = Path(source), Path(target)
    checkpoint = Checkpoint.open(source)
    checkpoint.check_tensors()
    check_keep_blocks(keep_blocks, checkpoint.num_blocks)
    check_channels(channels, checkpoint.config, len(keep_blocks))
    if target.resolve() == source.resolve():
        raise ModelError(f"{target} is the model to prune", "write the pruned model to another directory")
    target.mkdir(parents=True, exist_ok=True)
    _remove_weights(target)
    _write_shards(_shards(pruned_tensors(checkpoint, keep_blocks, channels), max_shard_bytes), target)
    config = config_with_channels(config_with_blocks(checkpoint.config, keep_blocks), channels)
    _write_json(target / "config.json", config)
    copy_companions(source, target)


def pruned_tensors(checkpoint: Checkpoint, keep_blocks: Sequence[int], channels: Channels) -> dict[str, Cut]:
    """New name and `Cut` of every tensor of the pruned model, in file order of the source."""
    renumbered = {old: new for new, old in enumerate(keep_blocks)}
    templates = {template.name: template for template in checkpoint.family.tensors}
    cuts: dict[str, Cut] = {}
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        place = split_block(name)
        if place is None:
            cuts[name] = _cut(checkpoint, info, templates.get(name), None, channels)
        elif place[0] in renumbered:
            block = renumbered[place[0]]
            template = templates.get(f"model.layers.{{block}}.{place[1]}")
            cuts[join_block(block, place[1])] = _cut(checkpoint, info, template, block, channels)
    return cuts


def _cut(
    checkpoint: Checkpoint, info: TensorInfo, template: TensorTemplate | None, block: int | None, channels: Channels
) -> Cut:
    """Of a tensor outside the table (rotary frequencies) everything stays."""
    family, config = checkpoint.family, checkpoint.config
    if template is None:
        return Cut(info, (None,) * len(info.shape))
    sizes = family.space_sizes(config)
    kept = channels.of_block(block, sizes)
    factor = _factor(family, template, sizes, narrowed_sizes(channels, sizes), tied=is_tied(config))
    index = tuple(axis_index(axis, sizes, kept) for axis in template.axes)
    return Cut(info, index, factor, adds_one=family.norm_adds_one and template.role == "norm")


def _factor(
    family: Family, template: TensorTemplate, sizes: Mapping[str, int], narrow: Mapping[str, int], *, tied: bool
) -> float:
    """The factor on a tensor that preserves the scale of the kept hidden channels.

    A norm divides by the root of a mean over all channels. Without the channels that are zero, the mean is larger by
    the ratio of the sizes, which is compensated in the weight of the norm (up to `rms_norm_eps`). If a model
    multiplies embeddings by the square root of the hidden size, that is compensated in the embeddings; the logits of a
    tied head then grow by the same factor that the last norm would need, so that norm is not changed.
    """
    wider = sqrt(sizes["hidden"] / narrow["hidden"])
    if template.role == "embedding" or (template.role == "head" and tied):
        return wider if family.embedding_scaled else 1.0
    if template.role != "norm" or template.axes != (("hidden",),):
        return 1.0
    is_last = not template.per_block
    return 1.0 if is_last and tied and family.embedding_scaled else wider


def _shards(tensors: dict[str, Cut], max_shard_bytes: int) -> list[Shard]:
    """Divide the sequence of tensors into files of at most `max_shard_bytes`.

    Within a file, wider dtypes come first: readers map the data, which requires aligned tensors.
    """
    shards: list[Shard] = [[]]
    filled = 0
    for name, cut in tensors.items():
        if shards[-1] and filled + cut.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, cut))
        filled += cut.nbytes
    return [sorted(shard, key=lambda item: -DTYPE_BYTES[item[1].info.dtype]) for shard in shards]


def _write_shards(shards: list[Shard], target: Path) -> None:
    if len(shards) == 1:
        _write_shard(target / SINGLE_FILE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(target / file_name, shard)
        weight_map |= dict.fromkeys((name for name, _ in shard), file_name)
    total_size = sum(cut.nbytes for shard in shards for _, cut in shard)
    _write_json(target / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_shard(path: Path, shard: Shard) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, cut in shard:
        header[name] = {"dtype": cut.info.dtype, "shape": cut.shape, "data_offsets": [end, end + cut.nbytes]}
        end += cut.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    with path.open("wb") as out:
        out.write(struct.pack("<Q", len(text)) + text)
    start = 8 + len(text)
    pool = ThreadPoolExecutor(_NUM_THREADS)
    try:
        places = accumulate((cut.nbytes for _, cut in shard), initial=start)
        copies = [pool.submit(_copy, cut, path, place) for (_, cut), place in zip(shard, places, strict=False)]
        for copy in copies:
            copy.result()
    finally:
        pool.shutdown(cancel_futures=True)


def _copy(cut: Cut, path: Path, place: int) -> None:
    """Write the kept part of one tensor to `path`, from byte `place` on."""
    with cut.info.file.open("rb", buffering=0) as source, path.open("r+b") as out:
        out.seek(place)
        if cut.is_whole:
            _copy_bytes(source, out, cut.info)
        else:
            _copy_cut(source, out, cut)


def _copy_cut(source: FileIO, out: BinaryIO, cut: Cut) -> None:
    """Copy the kept part of a tensor, a few rows at a time."""
    info = cut.info
    kind = np.dtype(f"<u{DTYPE_BYTES[info.dtype]}")
    num_rows, row_items = info.shape[0], prod(info.shape[1:])
    places, columns = cut.index[0], cut.index[1] if len(cut.index) > 1 else None
    places = np.arange(num_rows) if places is None else places
    step = max(1, _BUFFER_BYTES // (row_items * kind.itemsize))
    buffer = np.empty((min(step, num_rows), row_items), dtype=kind)
    for first in range(0, num_rows, step):
        rows = buffer[: min(step, num_rows - first)]
        here = places[np.searchsorted(places, first) : np.searchsorted(places, first + len(rows))] - first
        if len(here):
            _read_whole(source, info, info.offset + first * row_items * kind.itemsize, rows.data.cast("B"))
            part = rows if len(here) == len(rows) else rows.take(here, axis=0, mode="clip")
            if columns is not None:
                part = part.take(columns, axis=1, mode="clip")  # validated already: clip skips the check
            out.write(_scaled(part, cut).data.cast("B"))


def _scaled(part: np.ndarray, cut: Cut) -> np.ndarray:
    """Bit patterns of the scaled values, without torch, whose import needs more memory than surgery."""
    if cut.factor == 1:
        return np.ascontiguousarray(part)
    shift = 1.0 if cut.adds_one else 0.0

    def scaled(values: np.ndarray) -> np.ndarray:
        return (values.astype(np.float64) + shift) * cut.factor - shift

    if cut.info.dtype != "BF16":
        kind = _FLOATS[cut.info.dtype]
        return scaled(part.view(kind)).astype(kind)
    bits = scaled((part.astype(np.uint32) << 16).view(np.float32)).astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2")  # to nearest, ties to even


def _copy_bytes(source: FileIO, out: BinaryIO, info: TensorInfo) -> None:
    buffer = memoryview(bytearray(min(_BUFFER_BYTES, info.nbytes)))
    for start in range(0, info.nbytes, len(buffer)):
        part = buffer[: min(len(buffer), info.nbytes - start)]
        _read_whole(source, info, info.offset + start, part)
        out.write(part)


def _read_whole(source: FileIO, info: TensorInfo, offset: int, into: memoryview) -> None:
    source.seek(offset)
    filled = 0
    while filled < len(into):
        count = source.readinto(into[filled:])
        if not count:
            raise ModelError(f"{info.file} became shorter while it was read", "do not modify it during pruning")
        filled += count


def _remove_weights(target: Path) -> None:
    for path in (*target.glob("model*.safetensors"), target / INDEX_FILE):
        path.unlink(missing_ok=True)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
