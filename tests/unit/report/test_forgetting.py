"""From the artifacts of `forget` and `likeness` to the report, its JSON, and the lines of the table."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.evaluation.divergence import TeacherKl
from sdft_ray.evaluation.forgetting import Likeness
from sdft_ray.evaluation.shift import ResponseNll, mean_nll, paired_gap
from sdft_ray.report.run.gather import gather, read_forgetting
from sdft_ray.report.run.model import ReportData
from sdft_ray.report.run.page import render
from sdft_ray.report.run.tables import forgetting_table
from sdft_ray.report.run.terminal import divergence_line
from sdft_ray.report.run.words import similarity
from sdft_ray.report.toolbox.table import Cell
from sdft_ray.statistics.estimate import Estimate, Interval, plain
from sdft_ray.store import files
from sdft_ray.store.fingerprint import fingerprint
from sdft_ray.store.manifest import Manifest, Usage
from sdft_ray.store.store import Store, address_of
from tests.support.recipes import make_recipe
from tests.unit.report.made_up_costs import FORGETTING

LEVELS = {"teacher": 1.0, "pruned": 2.0, "sft": 1.4}


def rows(level: float) -> dict[str, dict[str, ResponseNll]]:
    """Rows in another order for every level; rewrites are missing, as where none was kept."""
    names = sorted(range(12), key=lambda i: (i * int(7 * level)) % 13)
    return {"text": {f"t{i}": ResponseNll((level + 0.1 * (i % 3)) * (i + 4) + 0.01 * i * level, i + 4) for i in names}}


def committed(store: Store, step: str, file: str, content: dict[str, Any], summary: dict[str, Any]) -> Manifest:
    stage = step.partition(":")[0]
    digest = fingerprint({"step": step})
    address = address_of(stage, digest)
    output = store.work(address) / "output"
    output.mkdir(parents=True)
    (output / file).write_text(json.dumps(content), encoding="utf-8")
    manifest = Manifest(step, stage, address, digest, "{}", {}, store.place(address, output), Usage(), summary)
    store.commit(manifest)
    return manifest


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return Store(str(tmp_path_factory.mktemp("store")))


@pytest.fixture(scope="module")
def manifests(store: Store) -> dict[str, Manifest]:
    found = {}
    for model, level in LEVELS.items():
        content = {text: {name: row._asdict() for name, row in part.items()} for text, part in rows(level).items()}
        found[f"forget:{model}"] = committed(
            store, f"forget:{model}", files.FORGET, {"rows": content}, {"held_out": False}
        )
    alike = {"num_answers": 3, "mean": {"value": 0.5, "stderr": 0.1}, "low": 0.2, "num_empty": 0, "num_cut": 1}
    found["likeness:sft"] = committed(store, "likeness:sft", files.LIKENESS, {}, alike)
    return found


def test_rows_of_all_models_become_differences(store: Store, manifests: dict[str, Manifest]) -> None:
    found = read_forgetting(store, manifests)
    assert found is not None
    own = {model: [rows(level)["text"][f"t{i}"] for i in range(12)] for model, level in LEVELS.items()}
    for model in LEVELS:
        assert found.nll[model]["text"].value == pytest.approx(mean_nll(own[model]).value)
    for told, model, base in (
        (found.to_teacher, "pruned", "teacher"),
        (found.to_teacher, "sft", "teacher"),
        (found.to_pruned, "sft", "pruned"),
    ):
        expected = paired_gap(own[model], own[base])
        assert told[model]["text"].value == pytest.approx(expected.value)
        assert told[model]["text"].stderr == pytest.approx(expected.stderr)
    assert set(found.verdicts) == {"text"}
    assert found.verdicts["text"].startswith("Pruning made held-out text")
    assert found.likeness == {"sft": Likeness(3, Estimate(0.5, 0.1), 0.2, num_cut=1)}
    assert found.held_out is False


def test_nothing_is_said_where_nobody_asked(store: Store, manifests: dict[str, Manifest]) -> None:
    assert read_forgetting(store, {}) is None
    students = {step: manifest for step, manifest in manifests.items() if step != "forget:teacher"}
    assert read_forgetting(store, students) is None


def test_the_report_holds_it_and_names_no_folder_of_this_machine(
    store: Store, manifests: dict[str, Manifest], tmp_path: Path
) -> None:
    asked = {"source": str(tmp_path / "texts.jsonl"), "embedding": str(tmp_path / "embedder")}
    data = gather(make_recipe(tmp_path, tmp_path / "teacher", forgetting=asked), store, "run", manifests)
    assert data.forgetting == read_forgetting(store, manifests)
    assert ReportData.from_json(data.to_json()) == data
    assert "./embedder" in data.recipe_yaml
    assert str(tmp_path) not in data.recipe_yaml
    recipe = make_recipe(tmp_path, tmp_path / "teacher", forgetting=asked)
    local = recipe.evaluate.model_copy(update={"data": str(tmp_path)})
    same = gather(recipe.model_copy(update={"evaluate": local}), store, "run", manifests)
    assert "data: ." in same.recipe_yaml
    assert str(tmp_path) not in same.recipe_yaml
    page = render(data)
    assert "in rows that students were tuned on" in page
    assert "Forgetting and shift" in page


def test_without_an_embedding_model_there_is_no_column_for_answers() -> None:
    data = ReportData(name="x", forgetting=replace(FORGETTING, likeness={}))
    found = forgetting_table(data, {})
    assert found is not None
    assert [column.text for column in found.columns[1:]] == ["held-out text", "perplexity", "references", "rewrites"]
    assert {len(row.cells) for row in found.groups[0].rows} == {4}
    assert similarity(data) == similarity(ReportData(name="x")) == ""
    assert forgetting_table(ReportData(name="x"), {}) is None


def test_large_ratios_and_missing_figures_are_written_shortly() -> None:
    ratios = {"pruned": Estimate(1.5e7, 1e5), "sft": Estimate(None)}
    silent = {"sft": Likeness(0, Estimate(None), None)}
    data = ReportData(name="x", forgetting=replace(FORGETTING, perplexity_ratio=ratios, likeness=silent))
    found = forgetting_table(data, {})
    assert found is not None
    cells = {row.head.text: row.cells for row in found.groups[0].rows}
    assert cells["pruned"][1] == Cell("15.0\u202fM")
    assert cells["sft"][1] == Cell("–")
    assert cells["sft"][-1] == Cell("–")
    assert "No task asked for a written answer" in similarity(data)


def test_the_divergence_from_the_teacher_has_columns_and_a_line(store: Store, manifests: dict[str, Manifest]) -> None:
    kl = plain(TeacherKl(8, 120, Estimate(0.2514, 0.0123), Interval(3.456, 2.9, 4.1)))
    summary = {**manifests["forget:sft"].summary, "kl": kl}
    found = read_forgetting(store, {**manifests, "forget:sft": replace(manifests["forget:sft"], summary=summary)})
    assert found is not None
    assert list(found.kl) == ["sft"]
    data = ReportData(name="x", forgetting=found)
    assert ReportData.from_json(data.to_json()).forgetting == found
    table = forgetting_table(data, {})
    assert table is not None
    (mean, high) = (i for i, column in enumerate(table.columns) if "KL" in column.text + column.note)
    by_model = {row.head.text: (row.cells[mean - 1], row.cells[high - 1]) for row in table.groups[0].rows}
    assert by_model["sft"] == (Cell("0.251 ± 0.012"), Cell("3.46", "2.90 to 4.10"))
    assert [cell.text for cell in by_model["teacher"]] == ["–", "–"]
    line = str(divergence_line(data))
    assert line == (
        "KL to the teacher on its own answers, nats per token: sft 0.251 ± 0.012 (99 % of tokens below 3.456)"
    )
    assert str(divergence_line(ReportData(name="x"))) == ""
