"""Which engines answered: from manifests to a sentence on the page and in the terminal, and a warning."""

from __future__ import annotations

from typing import Any

import pytest

from sdft_ray.models.precision import EngineUse, Precision
from sdft_ray.report.run.engines import engines_line, engines_warnings, read_engines
from sdft_ray.report.run.model import ReportData, Stage
from sdft_ray.report.run.page import render
from sdft_ray.report.run.terminal import release_lines
from sdft_ray.store.manifest import Manifest, Usage


def use(dtype: str, checkpoint: str = "bfloat16", kind: str = "vllm") -> EngineUse:
    return EngineUse(kind, Precision(dtype, checkpoint, "because"))


def manifest(step: str, summary: dict[str, Any]) -> Manifest:
    return Manifest(step, step.partition(":")[0], "", "", "{}", {}, {}, Usage(), summary)


SAME = {
    "generate": (use("float32"),),
    "evaluate:teacher": (use("float32"),),
    "evaluate:sft": (use("float32"),),
}


@pytest.mark.parametrize(
    ("engines", "expected"),
    [
        ({}, ""),
        (SAME, "Engine of generation and evaluation: vLLM, float32 (checkpoint bfloat16)."),
        ({"generate": (use("float32", "float32"),)}, "Engine of generation: vLLM, float32."),
        (
            {"generate": (use("float32"), use("bfloat16")), "evaluate:teacher": (use("float32", kind="transformers"),)},
            "Engine of generation: vLLM, float32 (checkpoint bfloat16) and vLLM, bfloat16; "
            "of evaluation: transformers, float32 (checkpoint bfloat16).",
        ),
        (
            {"evaluate:teacher": (use("float32", "float16"),), "evaluate:sft": (use("float32"),)},
            "Engine of evaluation: vLLM, float32 (checkpoint bfloat16 and float16).",
        ),
    ],
)
def test_the_sentence(engines: dict[str, tuple[EngineUse, ...]], expected: str) -> None:
    assert engines_line(ReportData(name="x", engines=engines)) == expected


def test_from_manifests_to_the_page() -> None:
    manifests = {
        "generate": manifest("generate", {"engines": [use("float32").to_json()]}),
        "evaluate:teacher": manifest("evaluate:teacher", {"engines": []}),
        "evaluate:sft": manifest("evaluate:sft", {}),
    }
    found = read_engines(manifests)
    assert found == {"generate": (use("float32"),)}
    data = ReportData(name="x", engines=found, stages=(Stage(name="generate"),))
    assert ReportData.from_json(data.to_json()) == data
    assert "Engine of generation: vLLM, float32 (checkpoint bfloat16)." in render(data)


def test_a_warning_where_models_were_evaluated_in_different_types() -> None:
    assert engines_warnings(ReportData(name="x", engines=SAME)) == []
    assert engines_warnings(ReportData(name="x", engines={**SAME, "generate": (use("bfloat16"),)})) == []
    data = ReportData(name="x", engines={**SAME, "evaluate:sft": (use("bfloat16"),)})
    (warning,) = engines_warnings(data)
    assert "teacher in float32 and sft in bfloat16" in warning
    assert warning in render(data)
    assert any(warning in str(line) for line in release_lines(data))
