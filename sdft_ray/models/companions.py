"""The files of a model folder that also belong to a model made from it: tokenizer, chat templates, generation config,
licences. They have too many names to list, so everything is a companion but

    weights        in any format, with their indices, states of optimizers and logs of training
    descriptions   of this very model: config.json and its kin, model cards, our own manifests and records
    code           Python and shared libraries: custom code is not run
    data           rows, tables, notebooks, scripts and logs, and the pictures of a model card
    hidden files
    subfolders     except `additional_chat_templates`, and those of licences: `legal`, `LICENSES`, `third-party-notices`
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from pathlib import Path, PurePosixPath

_TEMPLATES = "additional_chat_templates"
_LICENCE = re.compile(r"licen[cs]e|copying|notice|copyright|use[-_]policy|\blegal|_legal|terms", re.IGNORECASE)
_CODE_SUFFIXES = (".py", ".pyc", ".so", ".dll", ".dylib")
_WEIGHT_SUFFIXES = (
    ".safetensors", ".index.json", ".bin", ".pt", ".pt2", ".pth", ".ckpt", ".pkl", ".pickle", ".gguf", ".ggml",
    ".llamafile", ".onnx", ".onnx_data", ".onnx.data", ".h5", ".hdf5", ".keras", ".msgpack", ".npy", ".npz", ".ot",
    ".tflite", ".task", ".litertlm", ".pb", ".nemo", ".mlmodel", ".engine", ".plan", ".mar", ".tar", ".tgz", ".gz",
    ".zip", ".7z", ".zst",
)  # fmt: skip
"""Archives count as weights: nothing that reads a tokenizer unpacks one."""
_DATA_SUFFIXES = (
    ".jsonl", ".parquet", ".arrow", ".csv", ".log", ".ipynb", ".sh", ".bat",
    ".png", ".jpg", ".jpeg", ".gif", ".svg", ".webp", ".mp4", ".pdf",
)  # fmt: skip
_OTHERS = re.compile(
    r"config([-_.].*)?\.json|params\.json|adapter_.*|(hf_)?quant(ize)?_config\.json"  # of this shape and these weights
    r"|trainer_state\.json|training_(args|record)\..*|(all|train|eval)_results\.json|latest|.*\.tfevents\..*"
    r"|read_?me.*|model[-_]?card.*"
    r"|manifest\.json|history\.jsonl|sdft_.*",
    re.IGNORECASE,
)

SKIPPED_ON_DOWNLOAD = (
    *(f"*{suffix}" for suffix in (*_CODE_SUFFIXES, *_WEIGHT_SUFFIXES) if suffix not in (".safetensors", ".index.json")),
    ".*", "*/*.safetensors", "consolidated*", "original/*", "onnx/*", "runs/*", "checkpoint-*/*",
)  # fmt: skip
"""Patterns of `huggingface_hub`: what neither the model in safetensors nor its companions need."""


def is_companion(name: str) -> bool:
    """Whether the file of this name, relative to its model folder with `/` between folders, goes with the model."""
    path = PurePosixPath(name)
    if any(part.startswith(".") for part in path.parts) or path.name.lower().endswith(_CODE_SUFFIXES):
        return False
    if len(path.parts) > 1 and not (path.parts[0] == _TEMPLATES or _LICENCE.search(path.parts[0])):
        return False
    if path.name.lower().endswith(_WEIGHT_SUFFIXES):
        return False
    return is_licence(name) or not (path.name.lower().endswith(_DATA_SUFFIXES) or _OTHERS.fullmatch(path.name))


def is_licence(name: str) -> bool:
    """Whether the name, or the folder, says that the file is a licence, a notice or a policy of use."""
    path = PurePosixPath(name)
    return any(_LICENCE.search(part) for part in path.parts) and not path.name.lower().startswith("readme")


def companions(directory: Path) -> Iterator[str]:
    """Names of the companions in a model folder, sorted; relative, with `/` between folders."""
    found = (path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file())
    yield from sorted(name for name in found if is_companion(name))


def copy_companions(source: Path, target: Path) -> None:
    """Copy the companions of the model folder `source` to the folder `target`, over those of the same names."""
    for name in companions(source):
        place = target / name
        place.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source / name, place)
