"""The data type in which an engine computes: what is faster on the hardware, and no less exact than what was asked.

`teacher.dtype` in the recipe says how exact a run has to be. An engine may be more exact: every bfloat16 and every
float16 number is a float32 number. It may not be less. On many CPUs float32 is also the faster one, because bfloat16
products are converted to float32 and back. So the type of an engine belongs to the resources: it changes results by
rounding alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from sdft_ray.errors import ResourceError
from sdft_ray.models.bfloat16 import ABSENT, FASTER, SLOWER, UNTESTED, bfloat16_state
from sdft_ray.models.description import ModelDescription
from sdft_ray.models.families import Config
from sdft_ray.models.machine import free_memory

AUTO = "auto"
_BFLOAT16_FROM = (8, 0)
"""Compute capability of the first NVIDIA GPUs with bfloat16 (Ampere)."""
_BESIDE_BYTES = 2**30
"""What an engine takes beside its weights and its KV cache: libraries and activations."""


@dataclass(frozen=True)
class Hardware:
    """What the choice depends on.

    `free_bytes` is the memory for an engine, None if unknown. `bfloat16` is what `bfloat16_state` says, of a CPU.
    `capability` is the compute capability of a GPU.
    """

    kind: Literal["cpu", "gpu"] = "cpu"
    free_bytes: int | None = None
    bfloat16: str = ABSENT
    capability: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class Precision:
    """The type of an engine's weights and activations, that of the checkpoint, and why they differ or not.

    `dtype` is `auto` while it is not known, because it depends on the machine where the engine starts.
    """

    dtype: str
    checkpoint: str
    why: str = ""

    @property
    def words(self) -> str:
        """float32 (checkpoint bfloat16)"""
        return self.dtype if self.dtype == self.checkpoint else f"{self.dtype} (checkpoint {self.checkpoint})"


_NAMES = {"vllm": "vLLM"}


@dataclass(frozen=True)
class EngineUse:
    """An engine, by its name in the resources, and the type in which it computes."""

    kind: str
    precision: Precision

    @property
    def name(self) -> str:
        return _NAMES.get(self.kind, self.kind)

    @property
    def words(self) -> str:
        """vLLM, float32 (checkpoint bfloat16)"""
        return f"{self.name}, {self.precision.words}"

    def to_json(self) -> dict[str, str]:
        return {"kind": self.kind, **asdict(self.precision)}

    @classmethod
    def from_json(cls, data: Mapping[str, str]) -> EngineUse:
        """The inverse of `to_json`."""
        return cls(data["kind"], Precision(data["dtype"], data["checkpoint"], data["why"]))


def choose(asked: str, wanted: str, hardware: Hardware, *, float32_bytes: int) -> tuple[str, str]:
    """The type for an engine, and why.

    `asked` is the `dtype` of its settings; with `auto` the result is no less exact than `wanted` unless the words say
    so. `float32_bytes` are those of weights and KV cache in float32. Raises `ResourceError` for a type that would end
    the engine, and where no type fits.
    """
    fails = hardware.kind == "cpu" and hardware.bfloat16 not in (ABSENT, FASTER, SLOWER, UNTESTED)
    if asked != AUTO:
        if asked == "bfloat16" and fails:
            raise ResourceError(_FAILS.format(hardware.bfloat16), "set dtype: float32, or leave it out")
        return asked, "as the settings ask"
    if wanted == "float32":
        return wanted, "as exact as asked"
    too_large = hardware.free_bytes is not None and float32_bytes + _BESIDE_BYTES > hardware.free_bytes
    room = f"float32 needs {_gib(float32_bytes + _BESIDE_BYTES)} GiB and {_gib(hardware.free_bytes or 0)} are free"
    if hardware.kind == "gpu":
        return _on_gpu(wanted, hardware, room if too_large else "")
    if wanted == "bfloat16" and hardware.bfloat16 == FASTER:
        return wanted, "it is faster than float32 on this CPU, as a test measured"
    if wanted == "bfloat16" and hardware.bfloat16 == UNTESTED:
        return (
            AUTO,
            "bfloat16 if it works and is faster on this CPU, which is tested when an engine starts, else float32",
        )
    if too_large and wanted == "bfloat16" and fails:
        raise ResourceError(
            f"{_FAILS.format(hardware.bfloat16)}, and {room}", "give the machine more memory, or take a smaller model"
        )
    if too_large:
        return wanted, f"slower than float32, but {room}"
    if wanted == "float16":
        return "float32", "float16 is slow on CPUs"
    if fails:
        return "float32", f"a test of bfloat16 on this CPU ended with {hardware.bfloat16}"
    measured = ", as a test measured" if hardware.bfloat16 == SLOWER else ", which has no instructions for bfloat16"
    return "float32", f"it is faster than bfloat16 on this CPU{measured}"


def _on_gpu(wanted: str, hardware: Hardware, no_room: str) -> tuple[str, str]:
    major, minor = hardware.capability
    if wanted == "float16" or hardware.capability >= _BFLOAT16_FROM:
        return wanted, "as exact as asked"
    lacks = f"compute capability {major}.{minor} has no bfloat16"
    if no_room:
        return "float16", f"{lacks}, and {no_room}: numbers beyond 65504 overflow"
    return "float32", lacks


_FAILS = "bfloat16 does not run on this CPU: a test of it ended with {}"


def precision_of(
    asked: str, model_dir: Path, *, wanted: str | None = None, kv_cache_bytes: int = 0, draft: Path | None = None
) -> Precision:
    """For an engine over the checkpoint in `model_dir`, in this process; see `choose`.

    `wanted` is how exact it has to be, None: as the checkpoint. `kv_cache_bytes` is the size of the KV cache, whatever
    the type.
    """
    described = ModelDescription.of(model_dir)
    stored = stored_dtype(described.config)
    num_weights = described.size.num_parameters
    if draft is not None:
        num_weights += ModelDescription.of(draft).size.num_parameters
    wanted = wanted or stored
    matters = asked == "bfloat16" or (asked == AUTO and wanted != "float32")
    hardware = this_machine(tests_bfloat16="bfloat16" in (asked, wanted)) if matters else Hardware()
    dtype, why = choose(asked, wanted, hardware, float32_bytes=4 * num_weights + kv_cache_bytes)
    return Precision(dtype, stored, why)


def expected_precision(asked: str, config: Config, wanted: str, *, kv_cache_bytes: int, gpus: float) -> Precision:
    """What `precision_of` will say on this machine, as far as that is known without torch and without a test."""
    stored, size = stored_dtype(config), ModelDescription(config).size
    if gpus and asked == AUTO and wanted == "bfloat16":
        return Precision(AUTO, stored, "bfloat16 on GPUs of compute capability 8.0 and up, else float32 or float16")
    hardware = Hardware("gpu") if gpus else Hardware("cpu", free_memory(), bfloat16_state(test=False))
    dtype, why = choose(asked, wanted, hardware, float32_bytes=4 * size.num_parameters + kv_cache_bytes)
    return Precision(dtype, stored, why)


def is_exact_enough(asked: str, wanted: str) -> bool:
    """Whether an engine with this `dtype` is no less exact than `wanted`."""
    return asked in (AUTO, "float32", wanted)


def stored_dtype(config: Config) -> str:
    """That of the weights, as the config says; a config without one counts as float32, as in `models.size`."""
    text: Any = config.get("text_config") or {}
    named = (part.get(name) for part in (config, text) for name in ("dtype", "torch_dtype"))
    return next((str(dtype) for dtype in named if dtype), "float32")


def this_machine(*, tests_bfloat16: bool) -> Hardware:
    """The hardware that engines of this process get. Imports torch."""
    import torch

    if torch.cuda.is_available():
        free, _ = torch.cuda.mem_get_info()
        return Hardware("gpu", free, capability=torch.cuda.get_device_capability())
    return Hardware("cpu", free_memory(), bfloat16_state() if tests_bfloat16 else ABSENT)


def _gib(num_bytes: int) -> str:
    return f"{num_bytes / 2**30:.1f}"
