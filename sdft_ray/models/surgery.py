"""Depth surgery: stream a checkpoint to a smaller one without ever holding it.

The bytes of every kept tensor are copied as they are, whatever their dtype, through one small buffer; only
names, headers and config change. So memory does not grow with the model.
"""

from __future__ import annotations

import json
import shutil
import struct
from collections.abc import Sequence
from contextlib import ExitStack
from io import FileIO
from pathlib import Path
from typing import BinaryIO

from sdft_ray.errors import ModelError
from sdft_ray.models.checkpoint import DTYPE_BYTES, INDEX_FILE, SINGLE_FILE, Checkpoint, TensorInfo
from sdft_ray.models.config import check_keep_blocks, config_with_blocks
from sdft_ray.models.families import join_block, split_block

_BUFFER_BYTES = 256 * 2**10  # stays in the cache between reading and writing
_COMPANIONS = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "chat_template*",
    "generation_config.json", "LICENSE*", "NOTICE*", "USE_POLICY*",
)  # fmt: skip
"""Files of the source that belong to the pruned model as well: tokenizer, generation defaults, licence."""

Shard = list[tuple[str, TensorInfo]]
"""Tensors of one file to write, by their new names."""


def drop_blocks(source: Path, target: Path, keep_blocks: Sequence[int], *, max_shard_bytes: int = 5 * 2**30) -> None:
    """Write the model that consists of `keep_blocks` of the checkpoint `source` to the directory `target`.

    `keep_blocks` are 0-based and strictly increasing; block `keep_blocks[i]` becomes block `i`. Files hold at
    most `max_shard_bytes` of tensors each (a larger tensor gets a file of its own). Tokenizer, chat template,
    generation config and licence are copied along. Weights that an interrupted attempt left in `target` are
    replaced. Memory: a buffer of 256 KiB and the headers, independent of the size of the model.

    Raises `ModelError` for a checkpoint that is damaged or does not match its config, `PlanError` for blocks
    that it does not have, `OSError` when the disk is full.
    """
    source, target = Path(source), Path(target)
    checkpoint = Checkpoint.open(source)
    checkpoint.check_tensors()
    check_keep_blocks(keep_blocks, checkpoint.num_blocks)
    if target.resolve() == source.resolve():
        raise ModelError(f"{target} holds the model to prune", "write the pruned model elsewhere")
    target.mkdir(parents=True, exist_ok=True)
    _remove_weights(target)
    _write_shards(_shards(kept_tensors(checkpoint, keep_blocks), max_shard_bytes), target)
    config = config_with_blocks(checkpoint.config, keep_blocks)
    _write_json(target / "config.json", config)
    copy_companions(source, target)


def kept_tensors(checkpoint: Checkpoint, keep_blocks: Sequence[int]) -> dict[str, TensorInfo]:
    """New name and source of every tensor of the pruned model, in the order of the source's files."""
    renumbered = {old: new for new, old in enumerate(keep_blocks)}
    kept: dict[str, TensorInfo] = {}
    for name, info in sorted(checkpoint.tensors.items(), key=lambda item: (item[1].file, item[1].offset)):
        place = split_block(name)
        if place is None:
            kept[name] = info
        elif place[0] in renumbered:
            kept[join_block(renumbered[place[0]], place[1])] = info
    return kept


def _shards(tensors: dict[str, TensorInfo], max_shard_bytes: int) -> list[Shard]:
    """Cut the sequence of tensors into files of at most `max_shard_bytes`.

    Inside a file, wider dtypes come first: readers view the data in place, which needs every tensor aligned.
    """
    shards: list[Shard] = [[]]
    filled = 0
    for name, info in tensors.items():
        if shards[-1] and filled + info.nbytes > max_shard_bytes:
            shards.append([])
            filled = 0
        shards[-1].append((name, info))
        filled += info.nbytes
    return [sorted(shard, key=lambda item: -DTYPE_BYTES[item[1].dtype]) for shard in shards]


def _write_shards(shards: list[Shard], target: Path) -> None:
    if len(shards) == 1:
        _write_shard(target / SINGLE_FILE, shards[0])
        return
    weight_map: dict[str, str] = {}
    for number, shard in enumerate(shards, start=1):
        file_name = f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        _write_shard(target / file_name, shard)
        weight_map |= dict.fromkeys((name for name, _ in shard), file_name)
    total_size = sum(info.nbytes for shard in shards for _, info in shard)
    _write_json(target / INDEX_FILE, {"metadata": {"total_size": total_size}, "weight_map": weight_map})


def _write_shard(path: Path, shard: Shard) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, info in shard:
        header[name] = {"dtype": info.dtype, "shape": info.shape, "data_offsets": [end, end + info.nbytes]}
        end += info.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data starts at a multiple of 8
    buffer = memoryview(bytearray(_BUFFER_BYTES))
    with ExitStack() as stack:
        sources = {file: stack.enter_context(file.open("rb", buffering=0)) for file in {i.file for _, i in shard}}
        out = stack.enter_context(path.open("wb"))
        out.write(struct.pack("<Q", len(text)) + text)
        for _, info in shard:
            _copy_bytes(sources[info.file], out, info, buffer)


def _copy_bytes(source: FileIO, out: BinaryIO, info: TensorInfo, buffer: memoryview) -> None:
    source.seek(info.offset)
    left = info.nbytes
    while left:
        count = source.readinto(buffer[: min(left, len(buffer))])
        if not count:
            raise ModelError(f"{info.file} became shorter while it was read", "leave it alone until pruning is done")
        out.write(buffer[:count])
        left -= count


def _remove_weights(target: Path) -> None:
    for path in (*target.glob("model*.safetensors"), target / INDEX_FILE):
        path.unlink(missing_ok=True)


def copy_companions(source: Path, target: Path) -> None:
    """Copy what is neither weights nor config: tokenizer, chat templates, generation config."""
    for pattern in _COMPANIONS:
        for path in source.glob(pattern):
            if path.is_file():
                shutil.copyfile(path, target / path.name)
    if (source / "additional_chat_templates").is_dir():
        shutil.copytree(source / "additional_chat_templates", target / "additional_chat_templates", dirs_exist_ok=True)


def _write_json(path: Path, content: dict[str, object]) -> None:
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
