"""The result in a terminal."""

from __future__ import annotations

import io
import subprocess
import sys

from rich.console import Console

from sdft_ray.report.run.model import Gap, ReportData
from sdft_ray.report.run.terminal import gap_line, grid_line, result_table, size_line
from sdft_ray.statistics.estimate import Estimate
from tests.unit.report.made_up import FAMILIES, GRID, report_data


def printed(data: ReportData, width: int = 80) -> list[str]:
    out = io.StringIO()
    Console(file=out, width=width).print(result_table(data))
    return out.getvalue().splitlines()


def cells(lines: list[str], name: str) -> list[str]:
    (line,) = (line for line in lines if line.split("  ")[0] == name)
    return [cell.strip() for cell in line.split("  ")[1:] if cell.strip()]


def five_models() -> ReportData:
    data = report_data()
    scores = {**data.scores, "sdft_kd": data.scores["sdft"]}
    long = {model: {f"lab_{task}": score for task, score in part.items()} for model, part in scores.items()}
    return data.model_copy(update={"scores": long, "tuned_families": ("lab_lists",)})


def test_families_means_and_recovery() -> None:
    lines = printed(report_data())
    assert cells(lines, "lists") == ["92.5 ± 1.9", "34.0 ± 3.3", "44.5 ± 3.5", "81.5 ± 2.7"]
    assert cells(lines, "mean, off-domain") == ["96.6 ± 0.6", "88.9 ± 1.1", "85.6 ± 1.2", "91.0 ± 1.0"]
    assert cells(lines, "mean") == ["95.9 ± 0.5", "64.5 ± 0.9", "71.6 ± 1.1", "88.6 ± 0.8"]
    assert cells(lines, "recovery") == ["–", "67.2 ± 1.0", "74.6 ± 1.2", "92.3 ± 0.9"]


def test_no_group_means_where_all_families_are_of_one_kind() -> None:
    lines = printed(report_data().model_copy(update={"tuned_families": FAMILIES}))
    assert [line for line in lines if line.startswith("mean,")] == []


def test_five_models_fit_eighty_columns_with_their_errors() -> None:
    lines = printed(five_models())
    assert max(map(len, lines)) <= 80
    assert cells(lines, "lab_word_problems") == ["97.5 ± 1.1", "1.0 ± 0.7", "48.0 ± 3.5", "88.0 ± 2.3", "88.0 ± 2.3"]


def test_a_narrow_terminal_leaves_out_the_errors_not_the_figures() -> None:
    lines = printed(five_models(), width=60)
    assert max(map(len, lines)) <= 60
    assert cells(lines, "lab_word_problems") == ["97.5", "1.0", "48.0", "88.0", "88.0"]


def test_many_arms_become_rows() -> None:
    data = report_data()
    arms = {f"sdft_rate_{i}": data.scores["sdft"] for i in range(8)}
    lines = printed(data.model_copy(update={"scores": {**data.scores, **arms}}))
    assert max(map(len, lines)) <= 80
    assert cells(lines, "sdft") == ["88.6 ± 0.8", "92.3 ± 0.9"]
    assert len([line for line in lines if line.startswith("sdft_rate_")]) == 8
    assert "report" in lines[-1]


def test_nothing_is_printed_without_models() -> None:
    empty = ReportData(name="x")
    assert printed(empty) == []
    assert size_line(empty).plain == ""


def test_size_line() -> None:
    lines = size_line(report_data()).plain.splitlines()
    assert lines == [
        "2.42 M → 1.67 M parameters (−31.1 %), matmul FLOPs ÷ 1.45, KV cache ÷ 1.50",
        "Measured with 1, 16 sequences: decoding 1.38, 1.44 ×, first token 1.44, 1.47 ×",
    ]
    assert max(map(len, lines)) <= 80
    assert size_line(report_data().model_copy(update={"speed": None})).plain == lines[0]
    assert size_line(report_data().model_copy(update={"sizes": None})).plain == lines[1]


def test_gap_line() -> None:
    text = gap_line(report_data()).plain
    assert text == "Teacher: references 0.413, its rewrites 0.013 nats per token, gap 0.400 ± 0.012"
    assert len(text) <= 80
    assert "No rewrite was kept" in gap_line(ReportData(name="x", gap=Gap(num_rows=0, nll={}, gaps={}))).plain
    assert gap_line(ReportData(name="x")).plain == ""


def test_grid_line() -> None:
    assert grid_line("sdft", GRID).plain == (
        "sdft: learning rate 1e−3, seed 1 of 6 trials, held-out loss 0.213 nats per token; 1 diverged"
    )


def test_the_terminal_views_load_nothing_heavy() -> None:
    heavy = ["torch", "transformers", "ray", "jinja2", "matplotlib", "numpy"]
    imports = "import sys, sdft_ray.report.run.terminal, sdft_ray.progress"
    code = f"{imports}; print([name for name in {heavy!r} if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_what_is_in_no_mean_is_said_and_shown_as_it_is() -> None:
    scores = {"teacher": {"sums": Estimate(0.8), "ppl": Estimate(35.0), "chrf": Estimate(0.6)}}
    left_out = {"ppl": "lower is better for word_perplexity"}
    data = ReportData(name="r", scores=scores, not_averaged=left_out, scales={"chrf": ("chrf", 100.0)})
    text = " ".join(" ".join(printed(data, 200)).split())
    assert "ppl 35" in text
    assert "mean 70.0" in text
    assert "Not in the means: ppl (lower is better for word_perplexity)." in text
    assert "chrf of chrf is shown as a share of 100." in text
