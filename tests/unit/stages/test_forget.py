"""Stages `texts`, `forget` and `likeness` in this process: which rows are scored, what is written, who is refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdft_ray.data.calibration import row_documents
from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.example import SELECTED_SCHEMA
from sdft_ray.data.held_out import is_held_out
from sdft_ray.data.rows import read_source, read_spread
from sdft_ray.data.subset import spread
from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.divergence import teacher_kl, token_kl
from sdft_ray.evaluation.items import ITEMS
from sdft_ray.evaluation.shift import mean_nll, response_nll
from sdft_ray.evaluation.similarity import embed, load_embedder
from sdft_ray.generation.checks import check_error
from sdft_ray.models.loading import load_model
from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages.forget import _forget
from sdft_ray.stages.job import StageContext
from sdft_ray.stages.likeness import _likeness
from sdft_ray.stages.rows import make
from sdft_ray.store import files
from sdft_ray.store.store import MANIFEST, Store
from tests.support.embedder import make_embedder
from tests.support.jobs import make_job
from tests.support.pruned_store import make_pruned_store, selected_row
from tests.support.recipes import make_recipe
from tests.support.staged import commit_output, output_of
from tests.support.worlds import RESOURCES

SELECT, PRUNE, TEXTS, FORGET = (f"{stage}/" + "5" * 16 for stage in ("select", "prune", "texts", "forget"))
THEIRS, OWN, LIKENESS = "evaluate/" + "6" * 16, "evaluate/" + "7" * 16, "likeness/" + "8" * 16
NUM_TEXTS = 40


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A store that holds a pruned model; beside it its teacher, held-out rows of both kinds, and an embedding model."""
    root = make_pruned_store(tmp_path_factory.mktemp("world"), PRUNE)
    make_embedder(root / "embedder")
    rows = [
        {"id": f"t{i}", "reference": f"Tom has {i} apples."}
        | ({"instruction": f"what is {i}"} if i % 4 == 0 else {"instruction": ""})
        for i in range(NUM_TEXTS)
    ]
    (root / "texts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    selected = pa.Table.from_pylist([_selected(i) for i in range(30)], schema=SELECTED_SCHEMA)
    _put(root, SELECT, files.DISTILLED, selected)
    return root


def _selected(i: int) -> dict[str, Any]:
    return selected_row(i, kept=i % 3 != 0)


def _put(root: Path, address: str, name: str, table: pa.Table) -> None:
    folder = root / "store" / address
    folder.mkdir(parents=True, exist_ok=True)
    pq.write_table(table, folder / name)
    (folder / MANIFEST).write_text("{}", encoding="utf-8")


told: list[tuple[int, int, str]] = []


def _recipe(root: Path, **changes: Any) -> Recipe:
    forgetting = {"source": str(root / "texts.jsonl"), "num_rows": 9, "max_tokens": 12, **changes.pop("asked", {})}
    return make_recipe(root, root / "teacher", forgetting=forgetting, **changes)


def _job(root: Path, step: str, address: str, inputs: dict[str, str], **changes: Any) -> StageContext:
    store, recipe = Store(str(root / "store")), _recipe(root, **changes)
    return make_job(
        step, address, store.url, recipe, RESOURCES, ModelSource(directory=str(root / "teacher")), inputs,
        lambda done, total, unit: told.append((done, total, unit)),
    )  # fmt: skip


def _texts(root: Path) -> pa.Table:
    """What stage `texts` makes, committed."""
    folder = root / "store" / TEXTS
    if not folder.exists():
        job = _job(root, "texts", TEXTS, {})
        commit_output(job, make(job))
    return pq.read_table(folder / files.ROWS)


def test_texts_are_spread_over_the_source(root: Path) -> None:
    assert _texts(root)["example_id"].to_pylist() == [f"t{i}" for i in spread(NUM_TEXTS, 9)]


def test_a_source_of_several_tables_is_spread_alike(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = _recipe(root).forgetting
    assert asked is not None
    monkeypatch.setattr(
        "sdft_ray.data.rows.read_source",
        lambda *asked, **more: (part for t in read_source(*asked, **more) for part in _cut_up(t, 7)),
    )
    names = [name for table in read_spread(asked, check_error) for name in table["example_id"].to_pylist()]
    assert names == [f"t{i}" for i in spread(NUM_TEXTS, 9)]


def _cut_up(table: pa.Table, num_rows: int) -> list[pa.Table]:
    return [table.slice(start, num_rows) for start in range(0, table.num_rows, num_rows)]


@pytest.mark.parametrize("model", ["teacher", "pruned"])
def test_three_kinds_of_text_are_scored_under_one_model(root: Path, model: str) -> None:
    table = _texts(root)
    told.clear()
    inputs = {"texts": TEXTS, "data": SELECT} | ({"model": PRUNE} if model == "pruned" else {})
    job = _job(root, f"forget:{model}", FORGET, inputs, gap={"num_rows": 8})
    made = _forget(job)
    written = json.loads((output_of(job) / files.FORGET).read_text(encoding="utf-8"))
    assert {name: written[name] for name in made.summary} == made.summary
    assert made.summary["num_kept"] == 20
    assert made.summary["num_rows"] == {"text": 9, "reference": 8, "distilled": 8}
    assert made.summary["held_out"] is False
    directory = root / "store" / PRUNE if model == "pruned" else root / "teacher"
    loaded, tokenizer = load_model(directory, "float32"), load_tokenizer(root / "teacher")
    kept = [row for row in map(_selected, range(30)) if row["source"] == "distilled"]
    chosen = [kept[i] for i in spread(20, 8)]
    chat = ChatFormat(tokenizer)
    expected = {
        "text": row_documents(table, tokenizer, 12),
        "reference": [chat.encode(row["instruction"], row["reference_response"]) for row in chosen],
        "distilled": [chat.encode(row["instruction"], row["distilled_response"]) for row in chosen],
    }
    for text, documents in expected.items():
        alone = response_nll(loaded, documents, batch_tokens=1)
        assert [row["nats"] for row in written["rows"][text].values()] == pytest.approx(
            [row.nats for row in alone], rel=1e-5
        )
        assert made.summary["num_tokens"][text] == sum(row.num_tokens for row in alone)
        assert made.summary["nll"][text]["value"] == pytest.approx(mean_nll(alone).value, rel=1e-5)
        assert made.summary["nll"][text]["stderr"] == pytest.approx(mean_nll(alone).stderr, rel=1e-4)
    assert list(written["rows"]["text"]) == table["example_id"].to_pylist()
    assert list(written["rows"]["reference"]) == [row["example_id"] for row in chosen]
    assert told[-1] == ((8, 8, "answers") if model == "pruned" else (25, 25, "texts"))
    if model == "teacher":
        assert "kl" not in made.summary
    else:
        apart = teacher_kl(token_kl(load_model(root / "teacher", "float32"), loaded, expected["distilled"]))
        assert apart is not None
        assert made.summary["kl"]["mean"]["value"] == pytest.approx(apart.mean.value, rel=1e-4)
        assert made.summary["kl"]["p99"]["value"] == pytest.approx(apart.p99.value, rel=1e-4)
        assert made.summary["kl"]["num_tokens"] == made.summary["num_tokens"]["distilled"]
    assert made.usage.num_tokens == sum(len(d.ids) for documents in expected.values() for d in documents)


def test_rows_that_are_held_out_come_first(root: Path) -> None:
    _texts(root)
    train = {"num_steps": 1, "validation_fraction": 0.4, "arms": {"sft": {"data": "reference", "learning_rate": 1e-3}}}
    job = _job(root, "forget:teacher", FORGET, {"texts": TEXTS, "data": SELECT}, train=train)
    made = _forget(job)
    rows = json.loads((output_of(job) / files.FORGET).read_text(encoding="utf-8"))["rows"]
    held = [f"r{i}" for i in range(30) if i % 3 and is_held_out(f"r{i}", 0.4)]
    assert list(rows["distilled"]) == held
    assert made.summary["held_out"] is True
    assert made.summary["num_kept"] == len(held) > 2


def test_without_rewrites_the_held_out_texts_remain(root: Path) -> None:
    _texts(root)
    none = "select/" + "a" * 16
    rows = [_selected(i) for i in range(0, 30, 3)]
    _put(root, none, files.DISTILLED, pa.Table.from_pylist(rows, schema=SELECTED_SCHEMA))
    made = _forget(_job(root, "forget:teacher", FORGET, {"texts": TEXTS, "data": none}))
    assert set(made.summary["nll"]) == {"text"}
    assert made.summary["num_kept"] == 0


def _embedded(root: Path) -> dict[str, str]:
    return {"embedding": str(root / "embedder")}


ANSWERS = {THEIRS: ["it is 4", "fig, pear", "", "7"], OWN: ["it is 5", "fig, pear", "", "Ann"]}


def _put_items(root: Path, address: str, answers: list[str]) -> None:
    """Written answers, and between them one that was chosen."""
    rows: list[dict[str, Any]] = []
    for i, text in enumerate(answers):
        blank: dict[str, Any] = dict.fromkeys(ITEMS.names)
        rows.append({**blank, "task": "sums", "item": str(i), "response": text, "num_tokens": len(text.split())})
        rows.append({**blank, "task": "choices", "item": str(i), "response": f"option of {address}"})
    rows = rows if address == THEIRS else rows[::-1]
    _put(root, address, files.ITEMS, pa.Table.from_pylist(rows, schema=ITEMS))


def test_written_answers_are_compared_item_by_item(root: Path) -> None:
    for address, answers in ANSWERS.items():
        _put_items(root, address, answers)
    told.clear()
    inputs = {"teacher_answers": THEIRS, "answers": OWN}
    job = _job(root, "likeness:sft", LIKENESS, inputs, asked=_embedded(root))
    made = _likeness(job)
    written = json.loads((output_of(job) / files.LIKENESS).read_text(encoding="utf-8"))
    assert {name: written[name] for name in made.summary} == made.summary
    embedder = load_embedder(root / "embedder")
    first_ND, second_ND = (embed(embedder, ANSWERS[address], batch_tokens=1)[0].numpy() for address in (THEIRS, OWN))
    expected = (first_ND * second_ND).sum(1)
    assert [item["similarity"] for item in written["items"]] == pytest.approx(expected.tolist(), abs=1e-5)
    assert [(item["task"], item["item"]) for item in written["items"]] == [("sums", str(i)) for i in range(4)]
    assert made.summary["mean"]["value"] == pytest.approx(expected.mean(), abs=1e-5)
    assert made.summary["mean"]["stderr"] == pytest.approx(expected.std(ddof=1) / 2, abs=1e-5)
    assert made.summary["low"] == pytest.approx(np.quantile(expected, 0.05), abs=1e-5)
    assert (made.summary["num_answers"], made.summary["num_empty"]) == (4, 1)
    assert told[-1] == (6, 6, "answers"), "each text once: of eight two are the same"


def test_an_item_that_one_model_lacks_is_an_error(root: Path) -> None:
    _put_items(root, THEIRS, ANSWERS[THEIRS])
    _put_items(root, OWN, ANSWERS[OWN][:3])
    job = _job(root, "likeness:sft", LIKENESS, {"teacher_answers": THEIRS, "answers": OWN}, asked=_embedded(root))
    with pytest.raises(EvaluationError, match="item 3 of sums"):
        _likeness(job)


def test_evaluations_of_before_keep_no_answers(root: Path) -> None:
    _put_items(root, THEIRS, ANSWERS[THEIRS])
    (root / "store" / THEIRS / files.ITEMS).unlink()
    job = _job(root, "likeness:sft", LIKENESS, {"teacher_answers": THEIRS, "answers": THEIRS}, asked=_embedded(root))
    with pytest.raises(EvaluationError, match=r"has no stored answers.*run again"):
        _likeness(job)
