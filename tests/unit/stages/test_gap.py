"""Stage `gap` in this process: which rows are scored, what is written, and a set without rewrites."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.example import SELECTED_SCHEMA
from sdft_ray.data.held_out import is_held_out
from sdft_ray.evaluation.shift import mean_nll, paired_gap, response_nll
from sdft_ray.models.loading import load_model
from sdft_ray.models.source import ModelSource
from sdft_ray.stages.gap import _gap
from sdft_ray.stages.job import StageContext
from sdft_ray.store import files
from sdft_ray.store.store import MANIFEST, Store
from tests.support.jobs import make_job
from tests.support.pruned_store import make_pruned_store, selected_row
from tests.support.recipes import make_recipe
from tests.support.staged import output_of
from tests.support.tiny import make_model
from tests.support.worlds import RESOURCES

KD = {"data": "reference", "objective": {"forward_kl": 1.0}}
SELECT, PRUNE, GAP, MEASURED = "select/" + "5" * 16, "prune/" + "6" * 16, "gap/" + "7" * 16, "gap/" + "8" * 16


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds a pruned model, and its teacher beside it."""
    return make_pruned_store(tmp_path_factory.mktemp("world"), PRUNE)


def _job(root: Path, rows: list[dict[str, Any]], step: str = "gap", **changes: Any) -> StageContext:
    store = Store(str(root / "store"))
    store.check_writable()
    folder = root / "store" / SELECT
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.Table.from_pylist(rows, schema=SELECTED_SCHEMA), folder / files.DISTILLED)
    (folder / MANIFEST).write_text("{}", encoding="utf-8")
    return make_job(
        step, GAP, store.url, make_recipe(root, root / "teacher", **changes), RESOURCES,
        ModelSource(directory=str(root / "teacher")), {"data": SELECT},
        lambda done, total, unit: told.append((done, total, unit)),
    )  # fmt: skip


told: list[tuple[int, int, str]] = []


def _written(job: StageContext) -> dict[str, Any]:
    return json.loads((output_of(job) / files.GAP).read_text(encoding="utf-8"))


def test_both_texts_of_kept_rows_are_scored_by_the_teacher_and_then_by_the_pruned_model(root: Path) -> None:
    rows = [selected_row(i, kept=i % 3 != 0) for i in range(30)]
    told.clear()
    job = _job(root, rows, gap={"num_rows": 8})
    made = _gap(job)
    assert made.summary["num_kept"] == 20
    assert made.summary["num_rows"] == 8
    assert "two standard errors" in made.summary["verdict"]
    assert told[-1] == (16, 16, "responses")
    (root / "store" / MEASURED).mkdir(parents=True)
    (output_of(job) / files.GAP).rename(root / "store" / MEASURED / files.GAP)
    (root / "store" / MEASURED / MANIFEST).write_text("{}", encoding="utf-8")
    told.clear()
    second = _job(root, rows, "gap:pruned")
    of_pruned = _gap(replace(second, inputs={"data": SELECT, "pruned": PRUNE, "gap": MEASURED}))
    assert "verdict" not in of_pruned.summary
    assert told[-1] == (16, 16, "responses")
    written = json.loads((root / "store" / MEASURED / files.GAP).read_text(encoding="utf-8"))
    assert {name: written[name] for name in made.summary} == made.summary
    names = [row["example_id"] for row in written["rows"]]
    by_name = {row["example_id"]: row for row in rows}
    chosen = [by_name[name] for name in names]
    assert len(set(names)) == 8
    assert {row["source"] for row in chosen} == {"distilled"}
    assert [row["example_id"] for row in _written(second)["rows"]] == names
    chat = ChatFormat(load_tokenizer(root / "teacher"))
    for model, directory, summary, parts in (
        ("teacher", root / "teacher", made.summary, written["rows"]),
        ("pruned", root / "store" / PRUNE, of_pruned.summary, _written(second)["rows"]),
    ):
        assert set(summary["nll"]) == set(summary["gaps"]) == {model}
        for text, column in (("reference", "reference_response"), ("distilled", "distilled_response")):
            documents = [chat.encode(row["instruction"], row[column]) for row in chosen]
            alone = response_nll(load_model(directory, "float32"), documents, batch_tokens=1)
            figure = summary["nll"][model][text]
            assert figure["value"] == pytest.approx(mean_nll(alone).value, rel=1e-5)
            assert figure["stderr"] == pytest.approx(mean_nll(alone).stderr, rel=1e-4)
            assert [part[model][text]["nats"] for part in parts] == pytest.approx([r.nats for r in alone], rel=1e-5)
    assert made.usage.num_tokens > 0


def test_rows_are_drawn_until_the_gap_is_known_well_enough(root: Path) -> None:
    rows = [selected_row(i, kept=True) for i in range(150)]
    told.clear()
    every = _gap(_job(root, rows, gap={"max_stderr": 1e-9})).summary
    assert every["num_rows"] == 150
    assert [done for done, _, _ in told] == sorted(done for done, _, _ in told)
    assert told[-1] == (300, 300, "responses")
    few = _gap(few_job := _job(root, rows, gap={"max_stderr": 1e9})).summary
    assert few["num_rows"] == 64, "fewer give no error to rely on"
    error = few["gaps"]["teacher"]["stderr"]
    assert every["gaps"]["teacher"]["stderr"] < 0.99 * error
    drawn = [row["example_id"] for row in _written(few_job)["rows"]]
    assert drawn != sorted(drawn)
    more = _gap(_job(root, rows, gap={"max_stderr": 0.99 * error})).summary
    assert more["num_rows"] in (128, 150)
    other = _gap(_job(root, rows[::-1], gap={"max_stderr": 1e9})).summary
    assert other["gaps"]["teacher"]["value"] == pytest.approx(few["gaps"]["teacher"]["value"], rel=1e-5)


def test_a_set_without_rewrites_loads_no_model_and_says_so(root: Path) -> None:
    made = _gap(_job(root, [selected_row(i, kept=False) for i in range(4)]))
    assert made.summary["num_kept"] == made.summary["num_rows"] == 0
    assert made.summary["nll"] == made.summary["gaps"] == {}
    assert "No rewrite was kept" in made.summary["verdict"]
    assert made.usage.num_tokens == 0


def test_a_corrected_teacher_is_measured_on_held_out_rows(root: Path) -> None:
    rows = [selected_row(i, kept=i % 3 != 0) for i in range(30)]
    train = {"num_steps": 1, "validation_fraction": 0.4, "arms": {"kd": {**KD, "learning_rate": 1e-3}}}
    correction = {"data": "reference", "learning_rate": 1e-3, "num_steps": 1}
    job = _job(root, rows, "gap:corrected", train=train, teacher_correction=correction)
    corrected = "correct/" + "8" * 16
    make_model(root / "store" / corrected, seed=5)
    (root / "store" / corrected / MANIFEST).write_text("{}", encoding="utf-8")
    made = _gap(replace(job, inputs={"data": SELECT, "corrected": corrected}))
    chosen = [row for row in rows if row["source"] == "distilled" and is_held_out(row["example_id"], 0.4)]
    assert made.summary["num_rows"] == made.summary["num_kept"] == len(chosen) > 2
    chat = ChatFormat(load_tokenizer(root / "teacher"))
    for text, column in (("reference", "reference_response"), ("distilled", "distilled_response")):
        documents = [chat.encode(row["instruction"], row[column]) for row in chosen]  # their order does not matter
        before, after = (
            response_nll(load_model(directory, "float32"), documents)
            for directory in (root / "teacher", root / "store" / corrected)
        )
        change = made.summary["changes"][text]
        assert change["value"] == pytest.approx((mean_nll(after).value or 0) - (mean_nll(before).value or 0), rel=1e-4)
        assert change["stderr"] == pytest.approx(paired_gap(after, before).stderr, rel=1e-4)
    assert made.summary["verdict"].startswith("Correction moved the teacher")
