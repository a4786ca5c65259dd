"""Checkpoints on disk: config, safetensors headers and tokenizer, validated before any computation.

Opening reads headers only. Format of a safetensors file: 8 bytes little-endian length of the header, the
header as JSON (per tensor: dtype, shape, data_offsets relative to the end of the header), then the data
without gaps. torch and transformers are imported only when tensors are read.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeGuard

from sdft_ray.errors import ModelError
from sdft_ray.models.families import Family, family_of, num_blocks_of
from sdft_ray.models.json_file import read_json_object
from sdft_ray.models.tied_head import HEAD, is_tied, resolve_tied_head
from sdft_ray.models.vocabulary import check_vocabulary

if TYPE_CHECKING:
    import torch

SINGLE_FILE = "model.safetensors"
INDEX_FILE = "model.safetensors.index.json"

DTYPE_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1,
    "I16": 2, "U16": 2, "F16": 2, "BF16": 2,
    "I32": 4, "U32": 4, "F32": 4,
    "I64": 8, "U64": 8, "F64": 8,
}  # fmt: skip
"""Bytes per element of the dtypes that safetensors names."""

_TORCH_NAMES = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64"}
_MAX_HEADER_BYTES = 100_000_000  # the same limit as in the safetensors library
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_DOWNLOAD_AGAIN = "download or copy that file again"


@dataclass(frozen=True)
class TensorInfo:
    """Location of a tensor: `nbytes` bytes from byte `offset` of `file`. `dtype` as in safetensors (`BF16`)."""

    file: Path
    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """A Hugging Face checkpoint directory of a supported family with complete files. Constructed by `open`.

    `config` is that of config.json, except that a head which is stored apart is not tied (`models.tied_head`).
    """

    directory: Path
    config: Mapping[str, Any]
    tensors: Mapping[str, TensorInfo]

    @classmethod
    def open(cls, directory: str | Path, *, ignore_adapter: bool = False) -> Checkpoint:
        """Read config and headers, and compare the length of every file with its header.

        Raises `ModelError`: no such directory, config.json missing, malformed or of an unsupported model,
        weights only as pickle files, a shard that is missing, truncated or corrupt (with its name), or an adapter
        beside the model (unless `ignore_adapter`): transformers would add it, and nothing else would.
        """
        directory = Path(directory)
        config = read_config_file(directory, ignore_adapter=ignore_adapter)
        family_of(config)
        num_blocks_of(config)
        return cls(directory, *resolve_tied_head(config, _read_tensors(directory, tied=is_tied(config))))

    @property
    def family(self) -> Family:
        return family_of(self.config)

    @property
    def num_blocks(self) -> int:
        return num_blocks_of(self.config)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    def read(self, name: str) -> torch.Tensor:
        """Read one tensor into memory, in its stored dtype; the rest of the file is not loaded."""
        import torch

        info = self.tensors[name]
        if info.dtype not in _TORCH_NAMES:
            raise ModelError(f"{name} has dtype {info.dtype}", f"supported: {', '.join(_TORCH_NAMES)}")
        data = bytearray(info.nbytes)
        with info.file.open("rb") as file:
            file.seek(info.offset)
            if file.readinto(data) != info.nbytes:
                raise ModelError(f"{info.file.name} ends inside {name}", _DOWNLOAD_AGAIN)
        flat = torch.frombuffer(data, dtype=getattr(torch, _TORCH_NAMES[info.dtype]))
        return flat.reshape(info.shape)

    def check_expected(self) -> None:
        """Check tensors and tokenizer. Raises `ModelError`."""
        self.check_tensors()
        self.check_tokenizer()

    def check_tensors(self) -> None:
        """Compare names and shapes with the table of the family: none missing, and none that would be unused.

        A copy of a tied output head may be stored or not. Raises `ModelError`.
        """
        expected = self.family.tensor_shapes(self.config)
        for name, shape in expected.items():
            info = self.tensors.get(name)
            if info is None:
                raise ModelError(f"{self.directory} lacks the tensor {name}", "download or export the model again")
            if info.shape != shape:
                raise ModelError(
                    f"{name} has shape {list(info.shape)}, config.json says {list(shape)}",
                    "config.json and weights must come from the same model",
                )
        stray = [name for name in self.tensors if name not in expected and not _is_redundant(name)]
        if stray:
            more = f" (and {len(stray) - 1} more)" if len(stray) > 1 else ""
            raise ModelError(
                f"{stray[0]} is not a tensor of {self.family.architecture} with this config.json{more}",
                "merge adapters, undo quantization, and take config.json and weights from the same model",
            )

    def check_tokenizer(self) -> None:
        """Check that every id of the tokenizer has a row in the embedding table. Raises `ModelError`."""
        check_vocabulary(self.directory, self.family.space_sizes(self.config)["vocab"])


def _is_redundant(name: str) -> bool:
    """A stored tied head, or rotary frequencies as in old exports: both are computed on loading."""
    return name == HEAD or name.endswith(".rotary_emb.inv_freq")


def read_config_file(directory: Path, *, ignore_adapter: bool = False) -> dict[str, Any]:
    """config.json of a model directory. Raises `ModelError`, also for an adapter in it unless `ignore_adapter`."""
    if not directory.is_dir():
        raise ModelError(f"no model directory {directory}", "check the path")
    path = directory / "config.json"
    if (directory / "adapter_config.json").is_file() and not ignore_adapter:
        if not path.is_file():
            raise ModelError(
                f"{directory} holds an adapter, not a model", f"merge it: sdft import {directory} NEW --base BASE"
            )
        raise ModelError(
            f"{directory} holds a model and an adapter",
            f"merge them with `sdft import {directory} NEW`, or remove adapter_config.json to go without it",
        )
    if not path.is_file():
        raise ModelError(f"{directory} holds no config.json", "give a Hugging Face model directory")
    return read_json_object(path)


def _read_tensors(directory: Path, *, tied: bool) -> dict[str, TensorInfo]:
    """Every tensor that Hugging Face would load: of the single file if it exists, else of the shards in the index.

    The index may name tensors that no shard holds where they are computed on loading: a tied head, rotary frequencies.
    """
    if (directory / SINGLE_FILE).is_file():
        return read_header(directory / SINGLE_FILE)
    if not (directory / INDEX_FILE).is_file():
        raise _no_weights(directory)
    weight_map = read_json_object(directory / INDEX_FILE).get("weight_map")
    if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
        raise ModelError(f"{directory / INDEX_FILE} holds no weight_map", _DOWNLOAD_AGAIN)
    headers = {name: read_header(_shard(directory, name)) for name in sorted(set(weight_map.values()))}
    tensors = {tensor: info for header in headers.values() for tensor, info in header.items()}
    for tensor, file in weight_map.items():
        if tensor in headers[file]:
            tensors[tensor] = headers[file][tensor]
        elif tensor not in tensors and not (_is_redundant(tensor) and (tied or tensor != HEAD)):
            raise ModelError(f"{INDEX_FILE} places {tensor} in {file}, which lacks it", "download the model again")
    return tensors


def _shard(directory: Path, name: str) -> Path:
    path = directory / name
    if path.parent != directory or not name.endswith(".safetensors"):
        raise ModelError(f"{INDEX_FILE} names {name!r}, not a safetensors file in that directory", _DOWNLOAD_AGAIN)
    if not path.is_file():
        raise ModelError(f"{INDEX_FILE} names {name}, which is missing", "download that file")
    return path


def _no_weights(directory: Path) -> ModelError:
    if any(next(directory.glob(pattern), None) for pattern in _PICKLES):
        return ModelError(
            f"{directory} holds weights as pickle files only; only safetensors are read",
            f"convert them: sdft import {directory} NEW",
        )
    if next(directory.glob("*.gguf"), None):
        return ModelError(f"{directory} holds GGUF files; only safetensors are read", "convert one with `sdft import`")
    if next(directory.glob("*.safetensors"), None):
        return ModelError(f"{directory} holds neither {SINGLE_FILE} nor {INDEX_FILE}", "download the index as well")
    return ModelError(f"{directory} holds no safetensors weights", "give a complete Hugging Face model directory")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Tensors of one safetensors file, in file order, after checking that the file is complete.

    Raises `ModelError` naming the file: shorter or longer than its header says, header unreadable, tensors
    that overlap or leave gaps, or whose bytes do not fit their shape.
    """
    file_bytes = path.stat().st_size
    with path.open("rb") as file:
        prefix = file.read(8)
        if len(prefix) < 8:
            raise ModelError(f"{path} is truncated: {file_bytes} bytes", _DOWNLOAD_AGAIN)
        (header_bytes,) = struct.unpack("<Q", prefix)
        if header_bytes > _MAX_HEADER_BYTES:
            raise _corrupt(path, "its header cannot be that long")
        text = file.read(header_bytes)
    if len(text) < header_bytes:
        raise ModelError(f"{path} is truncated inside its header", _DOWNLOAD_AGAIN)
    try:
        header = json.loads(text)
    except ValueError:
        raise _corrupt(path, "its header is not JSON") from None
    if not isinstance(header, dict):
        raise _corrupt(path, "its header is not a JSON object")
    start = 8 + header_bytes
    infos = {name: _parse_entry(path, name, entry, start) for name, entry in header.items() if name != "__metadata__"}
    ordered = dict(sorted(infos.items(), key=lambda item: item[1].offset))
    end = start
    for name, info in ordered.items():
        if info.offset != end:
            raise _corrupt(path, f"{name} overlaps its neighbour or leaves a gap")
        end += info.nbytes
    if file_bytes < end:
        raise ModelError(f"{path} is truncated: {file_bytes} of {end} bytes", _DOWNLOAD_AGAIN)
    if file_bytes > end:
        raise _corrupt(path, f"{file_bytes - end} bytes follow its last tensor")
    return ordered


def _parse_entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    malformed = _corrupt(path, f"the entry of {name} is malformed")
    if not isinstance(entry, dict):
        raise malformed
    dtype, shape, offsets = (entry.get(key) for key in ("dtype", "shape", "data_offsets"))
    if not isinstance(dtype, str) or not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise malformed
    if dtype not in DTYPE_BYTES:
        raise _corrupt(path, f"{name} has the unknown dtype {dtype!r}")
    nbytes = offsets[1] - offsets[0]
    if nbytes != prod(shape) * DTYPE_BYTES[dtype]:
        raise _corrupt(path, f"{name} has {nbytes} bytes for {dtype} of shape {shape}")
    return TensorInfo(path, dtype, tuple(shape), start + offsets[0], nbytes)


def _are_sizes(value: object) -> TypeGuard[list[int]]:
    return isinstance(value, list) and all(type(size) is int and size >= 0 for size in value)


def _corrupt(path: Path, why: str) -> ModelError:
    return ModelError(f"{path} is corrupt: {why}", _DOWNLOAD_AGAIN)
