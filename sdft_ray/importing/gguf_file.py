"""A GGUF file, opened by the reader of the gguf package and loaded by transformers."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFReader, dequantize
from transformers import AutoConfig, AutoModelForCausalLM

from sdft_ray.errors import ModelError
from sdft_ray.importing.gguf_config import ROPE_TENSORS, completed
from sdft_ray.importing.gguf_tokenizer import rebuilt, splitting_note
from sdft_ray.importing.source import TORCH_DTYPES, Origin, bars_on_terminals, licence_in, linked
from sdft_ray.models.families import family_of
from sdft_ray.models.licence import Licence
from sdft_ray.models.size import size_of

_LICENCES = ("LICEN[CS]E*", "licen[cs]e*", "NOTICE*", "USE_POLICY*", "*TERMS*")
_FLOATS = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
_LISTS = ("tokens", "scores", "token_type", "merges")
_AGAIN = "download or copy that file again"


@dataclass(frozen=True)
class GgufHeader:
    """Metadata without the vocabulary, tensors by type, and the small tensors that hold rotary frequencies."""

    path: Path
    fields: Mapping[str, Any]
    types: Mapping[str, int]
    num_values: int
    rope: Mapping[str, np.ndarray]

    @classmethod
    def read(cls, path: Path) -> GgufHeader:
        """Read everything but the weights. Raises `ModelError` for a file that is damaged, split or not GGUF."""
        reader = _open(path)
        fields = {
            name: field.contents()
            for name, field in reader.fields.items()
            if name.rpartition(".")[2] not in _LISTS or not name.startswith("tokenizer.ggml.")
        }
        if fields.get("split.count", 1) > 1:
            raise ModelError(
                f"{path} is one of {fields['split.count']} parts of a model",
                "join them with `llama-gguf-split --merge`, and give the whole file",
            )
        for tensor in {tensor.tensor_type: tensor for tensor in reader.tensors}.values():
            try:
                dequantize(tensor.data[:1], tensor.tensor_type)
            except NotImplementedError:
                raise ModelError(
                    f"{path}: {tensor.name} has the type {tensor.tensor_type.name}, which gguf cannot dequantize",
                    "take the model in another quantization, such as Q8_0 or F16",
                ) from None
        return cls(
            path,
            fields,
            Counter(tensor.tensor_type.name for tensor in reader.tensors),
            sum(int(tensor.n_elements) for tensor in reader.tensors if tensor.name not in ROPE_TENSORS),
            {tensor.name: np.array(tensor.data) for tensor in reader.tensors if tensor.name in ROPE_TENSORS},
        )

    @property
    def dtype(self) -> str:
        """Norms are float32 in every GGUF file, so that a half type decides. Dequantized values are float32."""
        if not set(self.types) <= set(_FLOATS):
            return "float32"
        return next(_FLOATS[name] for name in ("BF16", "F16", "F32") if name in self.types)


@dataclass(frozen=True)
class GgufSource:
    """A checked GGUF file; see `Source`. Constructed by `open`."""

    header: GgufHeader
    config: dict[str, Any]
    notes: tuple[str, ...]
    origin: Origin

    @classmethod
    def open(cls, path: Path) -> GgufSource:
        """Read the header, and compare what transformers makes of it with the file.

        Raises `ModelError`: damaged or split, an architecture that transformers or this package cannot read, without
        a tokenizer, or with weights or settings that transformers would drop.
        """
        header = GgufHeader.read(path)
        if "tokenizer.ggml.model" not in header.fields:
            raise ModelError(f"{path} holds no tokenizer", "convert the model to GGUF together with its tokenizer")
        config, unread = completed(_transformers_config(header), header.fields, header.rope)
        num_parameters = size_of(config).num_parameters
        if num_parameters != header.num_values:
            raise ModelError(
                f"{path} holds {header.num_values:,} weights, but a {config['model_type']} with its sizes has "
                f"{num_parameters:,}",
                "import the original checkpoint instead: transformers would drop or miss the rest",
            )
        notes = (*_lost(header), *splitting_note(header.fields), *unread)
        name = str(header.fields.get("general.name", ""))
        return cls(header, config, notes, Origin("a GGUF file", (path,), name, _base(header), _licence(header)))

    @property
    def dtype(self) -> str:
        return self.header.dtype

    @property
    def end_ids(self) -> tuple[int, ...]:
        names = ("eos_token_id", "eot_token_id", "eom_token_id")
        found = (self.header.fields.get(f"tokenizer.ggml.{name}") for name in names)
        return tuple(int(value) for value in found if value is not None)

    def load(self, dtype: str) -> Any:
        path = self.header.path
        config = AutoConfig.for_model(**self.config)
        with bars_on_terminals(), linked(path.parent, only=path.name) as folder:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                str(folder), gguf_file=path.name, config=config, dtype=TORCH_DTYPES[dtype],
                local_files_only=True, trust_remote_code=False, output_loading_info=True,
            )  # fmt: skip
        model, report = loaded
        unset = [*report["missing_keys"], *report["mismatched_keys"], *report["unexpected_keys"]]
        if unset:
            raise ModelError(f"{path}: transformers could not load {unset[0]}", "import the original checkpoint")
        model.hf_quantizer = None  # the weights are plain tensors, but transformers refuses to save while it is there
        del model.config.quantization_config
        return model

    def write_companions(self, directory: Path) -> None:
        path = self.header.path
        with linked(path.parent, only=path.name) as folder:
            tokenizer = rebuilt(folder, path.name, self.header.fields, self.config["max_position_embeddings"])
            tokenizer.save_pretrained(str(directory))
        for pattern in _LICENCES:
            for file in path.parent.glob(pattern):
                if file.is_file():
                    shutil.copyfile(file, directory / file.name)


def _open(path: Path) -> GGUFReader:
    try:
        return GGUFReader(path)
    except FileNotFoundError:
        raise ModelError(f"there is no file {path}", "check the path") from None
    except OSError as reason:
        raise ModelError(f"cannot read {path}: {reason.strerror}", "check the path and its permissions") from None
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError) as reason:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
        if not is_gguf:
            raise ModelError(f"{path} is not a GGUF file", "give a file that llama.cpp reads") from None
        raise ModelError(
            f"{path} is truncated or damaged: {path.stat().st_size:,} bytes cannot hold what its header names "
            f"({str(reason).splitlines()[0] if str(reason) else type(reason).__name__})",
            _AGAIN,
        ) from None


def _transformers_config(header: GgufHeader) -> dict[str, Any]:
    """What transformers makes of the metadata, of a family that is supported."""
    path = header.path
    try:
        config = AutoConfig.from_pretrained(str(path.parent), gguf_file=path.name, local_files_only=True)
    except (ValueError, KeyError) as error:
        architecture = header.fields.get("general.architecture")
        raise ModelError(
            f"{path}: transformers cannot read GGUF files of the architecture {architecture!r} "
            f"({str(error).splitlines()[0]})",
            "import the original checkpoint instead",
        ) from None
    found = config.to_dict()
    family = family_of(found)
    found.pop("_model_name_or_path", None)
    return {**found, "architectures": [family.architecture]}


def _lost(header: GgufHeader) -> list[str]:
    """What is no longer as in the model that the file was made from."""
    types = Counter(header.types)
    quantized = [f"{name} ({num} tensors)" for name, num in types.most_common() if name not in _FLOATS]
    lost = []
    if quantized:
        lost.append(
            f"the weights were quantized to {', '.join(quantized)} before the import: they are what quantization has "
            "left, not the values of the original model"
        )
    templates = [name for name in header.fields if name.startswith("tokenizer.chat_template.")]
    if templates:
        lost.append(f"left out: {len(templates)} more chat templates of the file ({', '.join(sorted(templates))})")
    return lost


def _base(header: GgufHeader) -> str:
    """OWNER/NAME on the hub of what the file was converted from, or ""."""
    for name in ("general.source.huggingface.repository", "general.source.repo_url", "general.base_model.0.repo_url"):
        value = str(header.fields.get(name, "")).removeprefix("https://huggingface.co/").strip("/")
        if value.count("/") == 1 and "://" not in value:
            return value
    return ""


def _licence(header: GgufHeader) -> Licence | None:
    known = header.fields.get("general.license")
    if isinstance(known, str) and known and " " not in known:
        return Licence(known.lower(), origin="the metadata of the GGUF file")
    return licence_in(header.path.parent)
