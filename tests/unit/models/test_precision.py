"""The choice of an engine's data type, a table over described hardware; the test of a CPU, in a real subprocess."""

from __future__ import annotations

import json
import os
import platform
import signal
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import ResourceError
from sdft_ray.models import bfloat16, precision
from sdft_ray.models.bfloat16 import ABSENT, FASTER, SLOWER, UNTESTED, bfloat16_state, outcome
from sdft_ray.models.precision import (
    AUTO,
    EngineUse,
    Hardware,
    Precision,
    choose,
    expected_precision,
    is_exact_enough,
    precision_of,
    stored_dtype,
)
from tests.support.tiny import make_model

GIB = 2**30
ROOM, FULL = 64 * GIB, 2 * GIB
LARGE = 8 * GIB
"""Of weights and keys and values in float32: fits the first, not the second."""


def cpu(state: str = ABSENT, free: int | None = ROOM) -> Hardware:
    return Hardware("cpu", free, state)


def gpu(major: int, minor: int = 0, free: int = ROOM) -> Hardware:
    return Hardware("gpu", free, capability=(major, minor))


@pytest.mark.parametrize(
    ("asked", "wanted", "hardware", "expected"),
    [
        (AUTO, "bfloat16", cpu(), "float32"),
        (AUTO, "bfloat16", cpu(free=None), "float32"),
        (AUTO, "bfloat16", cpu(FASTER), "bfloat16"),
        (AUTO, "bfloat16", cpu(SLOWER), "float32"),
        (AUTO, "bfloat16", cpu(SLOWER, FULL), "bfloat16"),
        (AUTO, "bfloat16", cpu("SIGILL"), "float32"),
        (AUTO, "bfloat16", cpu("wrong products"), "float32"),
        (AUTO, "bfloat16", cpu(UNTESTED), AUTO),
        (AUTO, "bfloat16", cpu(free=FULL), "bfloat16"),
        (AUTO, "float16", cpu(), "float32"),
        (AUTO, "float16", cpu(FASTER), "float32"),
        (AUTO, "float16", cpu(free=FULL), "float16"),
        (AUTO, "float32", cpu(FASTER), "float32"),
        (AUTO, "float32", cpu(free=FULL), "float32"),
        (AUTO, "bfloat16", gpu(8), "bfloat16"),
        (AUTO, "bfloat16", gpu(9), "bfloat16"),
        (AUTO, "bfloat16", gpu(7, 5), "float32"),
        (AUTO, "bfloat16", gpu(7, 5, FULL), "float16"),
        (AUTO, "float16", gpu(7, 5), "float16"),
        (AUTO, "float16", gpu(9), "float16"),
        (AUTO, "float32", gpu(9), "float32"),
        ("float32", "bfloat16", cpu(FASTER), "float32"),
        ("bfloat16", "float32", cpu(), "bfloat16"),
        ("bfloat16", "bfloat16", cpu(free=FULL), "bfloat16"),
        ("float16", "bfloat16", gpu(7, 5), "float16"),
    ],
)
def test_the_faster_type_that_is_no_less_exact(asked: str, wanted: str, hardware: Hardware, expected: str) -> None:
    dtype, why = choose(asked, wanted, hardware, float32_bytes=LARGE)
    assert dtype == expected
    assert why


def test_auto_is_less_exact_only_where_nothing_else_runs_and_says_so() -> None:
    kinds = ("float32", "bfloat16", "float16")
    machines = [cpu(state, free) for state in (ABSENT, FASTER, SLOWER, "SIGILL") for free in (None, ROOM)]
    machines += [gpu(major, 5, free) for major in (7, 8, 9) for free in (ROOM, 10 * GIB)]
    for hardware in machines:
        for wanted in kinds:
            assert is_exact_enough(choose(AUTO, wanted, hardware, float32_bytes=LARGE)[0], wanted)
    dtype, why = choose(AUTO, "bfloat16", gpu(7, 5, FULL), float32_bytes=LARGE)
    assert not is_exact_enough(dtype, "bfloat16")
    assert "overflow" in why


def test_what_would_die_is_refused() -> None:
    with pytest.raises(ResourceError, match=r"ended with SIGILL.*set dtype: float32"):
        choose("bfloat16", "bfloat16", cpu("SIGILL"), float32_bytes=LARGE)
    with pytest.raises(ResourceError, match=r"SIGILL, and float32 needs 9.0 GiB and 2.0 are free"):
        choose(AUTO, "bfloat16", cpu("SIGILL", FULL), float32_bytes=LARGE)


def test_words() -> None:
    use = EngineUse("vllm", Precision("float32", "bfloat16", "this CPU has no AMX"))
    assert use.words == "vLLM, float32 (checkpoint bfloat16)"
    assert EngineUse("transformers", Precision("float32", "float32")).words == "transformers, float32"
    assert EngineUse.from_json(json.loads(json.dumps(use.to_json()))) == use


def test_the_type_of_a_checkpoint() -> None:
    assert stored_dtype({"dtype": "bfloat16"}) == "bfloat16"
    assert stored_dtype({"torch_dtype": "float16"}) == "float16"
    assert stored_dtype({"text_config": {"dtype": "bfloat16"}}) == "bfloat16"
    assert stored_dtype({}) == "float32"


def test_on_this_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A checkpoint in bfloat16 where AMX is shown or not; the recipe may want more than the checkpoint holds."""
    model = make_model(tmp_path, "llama", dtype="bfloat16")
    config: dict[str, Any] = json.loads((model / "config.json").read_text(encoding="utf-8"))
    for state, expected in ((ABSENT, "float32"), (FASTER, "bfloat16"), (SLOWER, "float32"), ("SIGILL", "float32")):
        monkeypatch.setattr(precision, "bfloat16_state", lambda *, test=True, state=state: state)
        assert precision_of(AUTO, model) == expected_precision(AUTO, config, "bfloat16", kv_cache_bytes=0, gpus=0)
        assert (precision_of(AUTO, model).dtype, precision_of(AUTO, model).checkpoint) == (expected, "bfloat16")
        assert precision_of(AUTO, model, wanted="float32").dtype == "float32"
    monkeypatch.setattr(precision, "free_memory", lambda: 2 * GIB)
    monkeypatch.setattr(precision, "bfloat16_state", lambda *, test=True: ABSENT)
    assert precision_of(AUTO, model, kv_cache_bytes=2 * GIB).dtype == "bfloat16"


# -- the test of a CPU -----------------------------------------------------------------------------------------

FLAGS = "processor : 0\nflags\t\t: fpu sse avx512f {}\n"


def test_how_a_process_ended() -> None:
    assert outcome([sys.executable, "-c", "print(1); print('faster')"]) == FASTER
    assert outcome([sys.executable, "-c", "assert False, 'wrong products'"]) == "AssertionError: wrong products"
    for number in (signal.SIGILL, signal.SIGKILL):
        assert outcome([sys.executable, "-c", f"import os; os.kill(os.getpid(), {int(number)})"]) == number.name
    assert outcome([sys.executable, "-c", "import time; time.sleep(60)"], timeout_s=0.1) == "no answer within 0.1 s"
    assert "no-such-program" in outcome(["no-such-program"])


def test_only_a_cpu_that_shows_bfloat16_is_tested_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[int] = []

    def tested() -> str:
        asked.append(os.getpid())
        return "SIGILL"

    monkeypatch.setattr(bfloat16, "_tested", tested)
    cpuinfo, cache = tmp_path / "cpuinfo", tmp_path / "cache"
    for flags in ("", "amx_tile amx_int8", "avx512_vnni"):
        cpuinfo.write_text(FLAGS.format(flags), encoding="utf-8")
        assert bfloat16_state(cpuinfo=cpuinfo, cache=cache) == ABSENT
    assert bfloat16_state(cpuinfo=tmp_path / "missing", cache=cache) == ABSENT
    cpuinfo.write_text(FLAGS.format("amx_tile amx_bf16"), encoding="utf-8")
    assert bfloat16_state(test=False, cpuinfo=cpuinfo, cache=cache) == UNTESTED
    assert not asked
    assert [bfloat16_state(cpuinfo=cpuinfo, cache=cache) for _ in range(2)] == ["SIGILL", "SIGILL"]
    assert bfloat16_state(test=False, cpuinfo=cpuinfo, cache=cache) == "SIGILL"
    assert len(asked) == 1
    cpuinfo.write_text(FLAGS.format("amx_tile amx_bf16 amx_fp16"), encoding="utf-8")
    assert bfloat16_state(test=False, cpuinfo=cpuinfo, cache=cache) == UNTESTED, "another CPU"


VLLM = find_spec("vllm")
KERNELS = Path(VLLM.origin).parent / "_C.abi3.so" if VLLM and VLLM.origin else None


@pytest.mark.slow
@pytest.mark.skipif(
    platform.machine() != "x86_64" or KERNELS is None or not KERNELS.exists(), reason="vLLM's build for x86 CPUs"
)
def test_the_kernels_themselves() -> None:
    """Where the CPU shows no AMX, vLLM's kernel for it dies of SIGILL, as it does where AMX is shown in vain."""
    found = outcome([sys.executable, "-c", "from sdft_ray.models.bfloat16 import use_amx; use_amx(); print('works')"])
    shows_amx = "amx_bf16" in Path("/proc/cpuinfo").read_text(encoding="utf-8")
    assert found in (("works", "SIGILL") if shows_amx else ("SIGILL",))


@pytest.mark.slow
def test_what_is_measured_here(tmp_path: Path) -> None:
    """Whatever this CPU is, the test ends, and its word agrees with times taken here."""
    state = bfloat16_state(cache=tmp_path)
    assert state in (ABSENT, FASTER, SLOWER, "SIGILL")
    assert bfloat16_state(cache=tmp_path, test=False) == state
    if state in (FASTER, SLOWER):
        code = "from sdft_ray.models.bfloat16 import speedup; print(speedup())"
        again = float(outcome([sys.executable, "-c", code]))
        assert again > 1 if state == FASTER else again < 1.5
