"""A sharded training state: which process holds which rows of each tensor, and how they are read from disk.

Each of several processes writes `state-00002-of-00004.safetensors` with its own rows, and then
`state-00002-of-00004.json` with the shape of each whole tensor and the first row. An unsharded state is
`state.safetensors` and `state.json`.

The distributed checkpoints of torch with safetensors storage were tried and refused (docs/libraries.md): that storage
does not detect a damaged or a missing file, and stores tensors only. Its default storage needs a pickled index.

A key is `<kind>|<parameter>` or `<kind>|<parameter>|<name>`. Tensors of the parameter's own shape are cut along their
first axis, others (the optimizer's step count) are whole in every piece.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

Shape = tuple[int, ...]
Index = dict[str, Any]
"""The JSON beside a file of tensors."""


@dataclass(frozen=True)
class Shard:
    """What process `rank` of `world_size` holds: rows of parameters whose `shapes` are those of the whole."""

    rank: int
    world_size: int
    shapes: Mapping[str, Shape]

    def rows(self, name: str) -> slice:
        """Its rows of a parameter, perhaps none."""
        return rows_of(self.shapes[name][0], self.rank, self.world_size)


def rows_of(num_rows: int, rank: int, world_size: int) -> slice:
    """Rows cut as `torch.chunk` cuts them: equal shares rounded up, so that the last processes may get fewer or none.

    >>> [rows_of(5, rank, 4) for rank in range(4)]
    [slice(0, 2, None), slice(2, 4, None), slice(4, 5, None), slice(5, 5, None)]
    """
    share = -(-num_rows // world_size)
    return slice(min(rank * share, num_rows), min((rank + 1) * share, num_rows))


def file_stem(part: Shard | None) -> str:
    """Name without suffix of the files that hold a part; None is the whole.

    >>> file_stem(Part(1, 4, {}))
    'state-00002-of-00004'
    """
    return "state" if part is None or part.world_size == 1 else _stem(part.rank, part.world_size)


def _stem(rank: int, world_size: int) -> str:
    return f"state-{rank + 1:05d}-of-{world_size:05d}"


def placements(shapes: Mapping[str, Shape], part: Shard) -> dict[str, dict[str, Any]]:
    """For each key of a cut tensor, the shape of the whole and the first row held. `shapes` are of what is held."""
    places: dict[str, dict[str, Any]] = {}
    for key, shape in shapes.items():
        name = key.split("|")[1]
        if tuple(shape) == tuple(shapes[f"weights|{name}"]):
            places[key] = {"shape": list(part.shapes[name]), "offset": part.rows(name).start}
    return places


def read_indices(directory: Path) -> dict[Path, Index]:
    """The index of every file of tensors in `directory`, in the order of their rows.

    Raises `OSError` where one is missing, `ValueError` where one is damaged or they do not belong together.
    """
    paths = sorted(directory.glob("state-*-of-*.json"))
    if not paths:
        return {directory / "state.safetensors": _index(directory / "state.json")}
    world_size = int(paths[0].stem.rsplit("-", 1)[1])
    expected = [directory / f"{_stem(rank, world_size)}.json" for rank in range(world_size)]
    indices = {path.with_suffix(".safetensors"): _index(path) for path in expected}
    if paths != expected or (directory / "state.json").exists():
        raise ValueError("the directory holds pieces of more than one state")
    if any(index["step"] != indices[first]["step"] for first in list(indices)[:1] for index in indices.values()):
        raise ValueError("its pieces are of different steps")
    return indices


def _index(path: Path) -> Index:
    index = json.loads(path.read_text(encoding="utf-8"))
    if not isinstance(index, dict):
        raise ValueError(f"{path.name} holds no object")
    return index


def read_part(indices: Mapping[Path, Index], rank: int, world_size: int) -> dict[str, torch.Tensor]:
    """Every tensor by its key: of cut ones the rows of process `rank`, wherever they lie; nothing else is read.

    Raises `ValueError` where rows are missing.
    """
    pieces: dict[str, list[torch.Tensor]] = {}
    rows_read: dict[str, int] = {}
    places: dict[str, dict[str, Any]] = {}
    for path, index in indices.items():
        with safe_open(path, framework="pt") as file:
            slices = _slices(file, index)
            for key in file.keys():  # noqa: SIM118  (no mapping)
                if key not in slices:
                    pieces.setdefault(key, [file.get_tensor(key)])
                    continue
                stored, place = file.get_slice(key), slices[key]
                num_stored, first = stored.get_shape()[0], place["offset"]
                if first != rows_read.get(key, 0):
                    raise ValueError(f"{path.name}: rows of {key} are missing")
                rows_read[key], places[key] = first + num_stored, place
                wanted = rows_of(place["shape"][0], rank, world_size)
                start = min(max(wanted.start - first, 0), num_stored)
                stop = max(start, min(wanted.stop - first, num_stored))
                pieces.setdefault(key, []).append(stored[start:stop])
    short = [key for key, place in places.items() if rows_read[key] != place["shape"][0]]
    if short:
        raise ValueError(f"rows of {short[0]} are missing")
    return {key: parts[0] if len(parts) == 1 else torch.cat(parts) for key, parts in pieces.items()}


def whole_shapes(indices: Mapping[Path, Index]) -> dict[str, Shape]:
    """Shape of every whole parameter by its name."""
    path, index = next(iter(indices.items()))
    with safe_open(path, framework="pt") as file:
        slices = _slices(file, index)
    return {key.split("|")[1]: tuple(place["shape"]) for key, place in slices.items() if key.startswith("weights|")}


def _slices(file: Any, index: Index) -> dict[str, dict[str, Any]]:
    """Where the tensors of a file belong; a state in one piece is one that starts at row 0."""
    if "slices" in index:
        return index["slices"]
    shapes = {key: tuple(file.get_slice(key).get_shape()) for key in file.keys()}  # noqa: SIM118
    names = {key.split("|")[1]: shape for key, shape in shapes.items() if key.startswith("weights|")}
    return placements(shapes, Shard(0, 1, names))
