"""A folder with `pytorch_model.bin`, whole or in shards. Tensors are read and nothing in the files is run."""

from __future__ import annotations

import pickle
import re
import warnings
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from sdft_ray.errors import ModelError
from sdft_ray.importing.source import TORCH_DTYPES, Origin, bars_on_terminals, licence_in, widest
from sdft_ray.models.checkpoint import Checkpoint, TensorInfo, read_config_file
from sdft_ray.models.companions import copy_companions
from sdft_ray.models.families import family_of
from sdft_ray.models.json_file import read_json_object

SINGLE_FILE, INDEX_FILE = "pytorch_model.bin", "pytorch_model.bin.index.json"

_AGAIN = "download or copy that file again"
_GLOBAL = re.compile(r"GLOBAL ([\w.]+)|(?:Unsupported|Blocked) \S+: \w+ ([\w.]+)")
_NAMES = {"float32": "F32", "float16": "F16", "bfloat16": "BF16", "float64": "F64"}


@dataclass(frozen=True)
class PickledSource:
    """A checked folder; see `Source`. Constructed by `open`."""

    folder: Path
    config: dict[str, Any]
    dtype: str
    origin: Origin
    notes: tuple[str, ...] = ()
    end_ids: tuple[int, ...] = ()

    @classmethod
    def open(cls, folder: Path) -> PickledSource:
        """Read names, shapes and dtypes, and compare them with config.json.

        Raises `ModelError`: a file that is no state dict, holds Python objects or is damaged, tensors that do not fit
        config.json, no tokenizer.
        """
        config = read_config_file(folder, ignore_adapter=True)
        family_of(config)
        files = weight_files(folder)
        tensors: dict[str, torch.Tensor] = {}
        for file in files:
            tensors |= read_shapes(file)
        described = {name: _described(folder, tensor) for name, tensor in tensors.items()}
        checkpoint = Checkpoint(folder, config, described)
        checkpoint.check_tensors()
        checkpoint.check_tokenizer()
        dtypes = {str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()}
        notes = [] if len(dtypes) <= 1 else [f"the weights have several dtypes ({', '.join(sorted(dtypes))})"]
        if "float64" in dtypes:
            notes.append("weights in float64 were rounded to float32")
        origin = Origin("PyTorch pickles", files, licence=licence_in(folder))
        return cls(folder, config, widest(dtypes), origin, tuple(notes))

    def load(self, dtype: str) -> Any:
        return load_plain(self.folder, dtype)

    def write_companions(self, directory: Path) -> None:
        copy_companions(self.folder, directory)


def load_plain(folder: Path, dtype: str) -> Any:
    """A model folder without its adapter, from safetensors or pickles, on the CPU. Raises `ModelError`."""
    with bars_on_terminals():
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            str(folder), dtype=TORCH_DTYPES[dtype], local_files_only=True, trust_remote_code=False, weights_only=True,
            output_loading_info=True,
        )  # fmt: skip
    model, report = loaded
    unset = [*report["missing_keys"], *report["mismatched_keys"]]
    if unset:
        raise ModelError(f"{folder}: {unset[0]} was not loaded", "config.json and weights must fit each other")
    return model


def weight_files(folder: Path) -> tuple[Path, ...]:
    """The single file, or the shards of the index, all of which exist. Raises `ModelError`."""
    if (folder / SINGLE_FILE).is_file():
        return (folder / SINGLE_FILE,)
    weight_map = read_json_object(folder / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(name, str) for name in weight_map.values()):
        raise ModelError(f"{folder / INDEX_FILE} holds no weight_map", _AGAIN)
    names = sorted(set(weight_map.values()))
    for name in names:
        if (folder / name).parent != folder or not (folder / name).is_file():
            raise ModelError(f"{INDEX_FILE} names {name}, which is missing", "download that file")
    return tuple(folder / name for name in names)


def read_shapes(path: Path) -> Mapping[str, torch.Tensor]:
    """The tensors of a state dict on the meta device: names, shapes, dtypes. Raises `ModelError`."""
    try:
        with warnings.catch_warnings(action="ignore"):  # of torch, about old protocols of pickle
            found = torch.load(path, map_location="meta", weights_only=True, mmap=zipfile.is_zipfile(path))
    except pickle.UnpicklingError as reason:
        text = " ".join(str(reason).split())
        named = _GLOBAL.search(text)
        what = f" ({named[1] or named[2]})" if named else ""
        raise ModelError(
            f"{path} holds something other than tensors{what}; nothing in it was run",
            "save the state dict alone: torch.save(model.state_dict(), ...), in a place where you trust that file",
        ) from None
    except (RuntimeError, EOFError, KeyError, ValueError, OSError, AttributeError, IndexError, TypeError) as reason:
        text = str(reason).splitlines()[0][:120] if str(reason) else type(reason).__name__
        raise ModelError(f"{path} is truncated or no PyTorch file: {text}", _AGAIN) from None
    if not isinstance(found, Mapping) or not found:
        raise ModelError(f"{path} is no state dict but {type(found).__name__}", "save model.state_dict() to that file")
    for name, value in found.items():
        if not isinstance(name, str) or not isinstance(value, torch.Tensor):
            raise ModelError(
                f"{path} is no state dict: its entry {name!r} is no tensor but {type(value).__name__}",
                "save model.state_dict() to that file",
            )
    return found


def _described(folder: Path, tensor: torch.Tensor) -> TensorInfo:
    dtype = str(tensor.dtype).removeprefix("torch.")
    if dtype not in _NAMES:
        raise ModelError(f"{folder} has weights of dtype {dtype}", f"give them in one of {', '.join(_NAMES)}")
    return TensorInfo(folder, _NAMES[dtype], tuple(tensor.shape), 0, tensor.nbytes)
