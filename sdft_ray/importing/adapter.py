"""A LoRA adapter and its base model, merged by peft."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors import SafetensorError, safe_open
from transformers import AutoConfig, AutoModelForCausalLM

from sdft_ray.errors import ModelError
from sdft_ray.importing.pickled import PickledSource, load_plain, read_shapes, weight_files
from sdft_ray.importing.source import Origin, licence_in, linked, widest
from sdft_ray.models.checkpoint import INDEX_FILE, SINGLE_FILE, Checkpoint
from sdft_ray.models.companions import copy_companions
from sdft_ray.models.json_file import read_json_object
from sdft_ray.models.vocabulary import check_vocabulary

CONFIG, WEIGHTS, PICKLED_WEIGHTS = "adapter_config.json", "adapter_model.safetensors", "adapter_model.bin"
_TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.model",
              "*.tiktoken", "tekken.json", "chat_template*")  # fmt: skip
_CACHED = re.compile(r".*/models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]{40}/?")
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_EMBEDDINGS = ("embed_tokens", "lm_head")


@dataclass(frozen=True)
class AdapterSource:
    """A checked adapter and its base; see `Source`. Constructed by `open`."""

    folder: Path
    base: Path
    config: dict[str, Any]
    dtype: str
    origin: Origin
    notes: tuple[str, ...]
    end_ids: tuple[int, ...] = ()

    @classmethod
    def open(cls, folder: Path, base: Path) -> AdapterSource:
        """Compare names and shapes of the adapter's tensors with those that peft would create on the base.

        `base` may be `folder` itself. Raises `ModelError`: another base, no LoRA, weights missing or not finite.
        """
        settings = _settings(folder)
        named, notes = _check_name(folder, base, settings.base_model_name_or_path or "")
        config, dtype, files = _open_base(base)
        shapes = _shapes(folder)
        num_rows = next((shape[0] for name, shape in shapes.items() if _is_table(name)), config["vocab_size"])
        config = {**config, "vocab_size": num_rows}
        trained = _check_shapes(folder, base, settings, config, shapes)
        if any(part in name for name in trained for part in _EMBEDDINGS) and not settings.ensure_weight_tying:
            config["tie_word_embeddings"] = False  # embeddings and head become two
        check_vocabulary(_tokenizer_folder(folder, base), num_rows)
        origin = Origin(
            "a base model and a LoRA adapter", (*files, _weights(folder)), base_model=named,
            licence=licence_in(folder, base),
        )  # fmt: skip
        return cls(folder, base, config, dtype, origin, tuple(notes))

    def load(self, dtype: str) -> Any:
        with linked(self.base, without=(CONFIG,)) as plain:
            model = load_plain(plain, dtype)
        if model.config.vocab_size != self.config["vocab_size"]:
            model.resize_token_embeddings(self.config["vocab_size"], mean_resizing=False)
        if model.config.tie_word_embeddings and not self.config.get("tie_word_embeddings", True):
            # peft would add what was trained of one of them to both: they share their memory.
            model.config.tie_word_embeddings = False
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        with warnings.catch_warnings(action="ignore"):
            adapted = PeftModel.from_pretrained(model, str(self.folder), torch_device="cpu")
            return adapted.merge_and_unload()

    def write_companions(self, directory: Path) -> None:
        copy_companions(self.base, directory)
        if _tokenizer_folder(self.folder, self.base) != self.base:
            for pattern in _TOKENIZER:
                for path in directory.glob(pattern):
                    path.unlink()
            copy_companions(self.folder, directory)


def _settings(folder: Path) -> LoraConfig:
    """Raises `ModelError` unless it is an adapter that can be added to the weights."""
    kind = read_json_object(folder / CONFIG).get("peft_type")
    if kind != "LORA":
        raise ModelError(f"{folder} holds an adapter of the kind {kind!r}; only LoRA is merged", "merge it with peft")
    if not (folder / WEIGHTS).is_file() and not (folder / PICKLED_WEIGHTS).is_file():
        raise ModelError(f"{folder} holds {CONFIG} but no {WEIGHTS}", "download them as well")
    try:
        settings = PeftConfig.from_pretrained(str(folder))
    except (TypeError, ValueError, KeyError) as reason:
        raise ModelError(f"{folder / CONFIG} cannot be read by peft: {reason}", "save the adapter again") from None
    assert isinstance(settings, LoraConfig)
    return settings


def _check_name(folder: Path, base: Path, trained_on: str) -> tuple[str, list[str]]:
    """The hub name of the base if it is known, and a note if nothing tells whether it is the one trained on.

    Raises `ModelError` if `trained_on` is known to be another model than `base`.
    """
    if base == folder:
        return trained_on if trained_on.count("/") == 1 else "", []
    hint = f"give the base that it was trained on, or correct base_model_name_or_path in {CONFIG} if it is the same"
    path = Path(trained_on)
    if trained_on and path.is_absolute() and path.is_dir():
        if path.resolve() != base.resolve():
            raise ModelError(f"the adapter {folder} was trained on {trained_on}, not on {base}", hint)
        return "", []
    cached = _CACHED.fullmatch(str(base.resolve()))
    hub = f"{cached[1]}/{cached[2]}" if cached else str(read_json_object(base / "config.json").get("_name_or_path", ""))
    is_hub = hub.count("/") == 1 and not hub.startswith((".", "/"))
    if is_hub and trained_on.count("/") == 1 and hub.lower() != trained_on.lower():
        raise ModelError(f"the adapter {folder} was trained on {trained_on}, and {base} is {hub}", hint)
    if is_hub and hub.lower() == trained_on.lower():
        return hub, []
    note = (
        f"the adapter names {trained_on or 'no base'}: that {base.name} is that model is known only by names and shapes"
    )
    return trained_on if trained_on.count("/") == 1 and not path.is_absolute() else "", [note]


def _open_base(base: Path) -> tuple[dict[str, Any], str, tuple[Path, ...]]:
    """Config, dtype and weight files of a base in safetensors or pickles."""
    if not any((base / name).is_file() for name in (SINGLE_FILE, INDEX_FILE)) and any(base.glob("pytorch_model.bin*")):
        source = PickledSource.open(base)
        return source.config, source.dtype, weight_files(base)
    checkpoint = Checkpoint.open(base, ignore_adapter=True)
    checkpoint.check_tensors()
    dtypes = {_FLOATS.get(info.dtype, "float32") for info in checkpoint.tensors.values()}
    files = tuple(sorted({info.file for info in checkpoint.tensors.values()}))
    return dict(checkpoint.config), widest(dtypes), files


def _shapes(folder: Path) -> dict[str, tuple[int, ...]]:
    """Of the adapter's tensors, all of which are finite. Raises `ModelError`."""
    path = _weights(folder)
    if path.suffix == ".bin":
        return {name: tuple(tensor.shape) for name, tensor in read_shapes(path).items()}
    shapes = {}
    try:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                tensor = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if not bool(torch.isfinite(tensor).all()):
                    raise ModelError(f"{path}: {name} holds values that are not finite", "train the adapter again")
    except (OSError, SafetensorError) as reason:
        raise ModelError(f"{path} is truncated or damaged: {reason}", "download or copy that file again") from None
    return shapes


def _check_shapes(
    folder: Path, base: Path, settings: LoraConfig, config: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]
) -> set[str]:
    """Build base and adapter on the meta device, and compare what peft would save with what the folder has.

    Returns the names of the tensors that were trained.
    """
    hint = "give the base that it was trained on"
    try:
        with torch.device("meta"), warnings.catch_warnings(action="ignore"):
            plain = AutoModelForCausalLM.from_config(AutoConfig.for_model(**config), dtype=torch.float32)
            model = get_peft_model(plain, settings, low_cpu_mem_usage=True)
            expected = get_peft_model_state_dict(model, save_embedding_layers=False)
    except ValueError as reason:
        raise ModelError(
            f"the adapter {folder} does not fit {base}: {' '.join(str(reason).split())[:160]}", hint
        ) from None
    embeddings = {name for name in shapes if _is_table(name)}  # saved whole where tokens were added
    missing = sorted(expected.keys() - shapes.keys())
    strange = sorted(shapes.keys() - expected.keys() - embeddings)
    if missing or strange:
        name, where = (missing[0], f"{folder} lacks") if missing else (strange[0], f"{base} has no place for")
        raise ModelError(f"the adapter {folder} does not fit {base}: {where} {name}", hint)
    for name, tensor in expected.items():
        if tuple(tensor.shape) != shapes[name]:
            raise ModelError(
                f"the adapter {folder} does not fit {base}: {name} has shape {list(shapes[name])}, the base asks for "
                f"{list(tensor.shape)}",
                hint,
            )
    return set(expected)


def _is_table(name: str) -> bool:
    """Whether a tensor is a whole embedding table or head."""
    return any(part in name for part in _EMBEDDINGS) and "lora_" not in name and name.endswith(".weight")


def _weights(folder: Path) -> Path:
    """The file that peft reads."""
    return folder / WEIGHTS if (folder / WEIGHTS).is_file() else folder / PICKLED_WEIGHTS


def _tokenizer_folder(folder: Path, base: Path) -> Path:
    """The adapter's own tokenizer, with which it was trained, or else the base's."""
    return folder if (folder / "tokenizer_config.json").is_file() else base
