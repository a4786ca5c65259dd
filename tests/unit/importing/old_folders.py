"""Model folders as they were written before safetensors."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from tests.support.tiny import build_model, make_model


def pickled(folder: Path, *, shards: int = 1, dtype: str = "bfloat16", **settings: Any) -> Path:
    """A tiny model with its weights in `pytorch_model.bin`, or in shards with an index."""
    make_model(folder, dtype=dtype, **settings)
    state = build_model(dtype=dtype, **settings).state_dict()
    (folder / "model.safetensors").unlink()
    names = list(state)
    files = [f"pytorch_model-{shard + 1:05d}-of-{shards:05d}.bin" for shard in range(shards)]
    files = ["pytorch_model.bin"] if shards == 1 else files
    parts = [names[shard::shards] for shard in range(shards)]
    for file, part in zip(files, parts, strict=True):
        torch.save({name: state[name] for name in part}, folder / file)
    if shards > 1:
        places = {name: file for file, part in zip(files, parts, strict=True) for name in part}
        (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return folder
