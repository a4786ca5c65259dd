"""Selection without Ray: nothing kept is an error, and conversations are selected like questions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdft_ray.data.example import GENERATED_SCHEMA, SEED_SCHEMA
from sdft_ray.data.messages import row_prompt, split_prompt
from sdft_ray.errors import DataError
from sdft_ray.models.source import ModelSource
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.select import _select
from sdft_ray.store import files
from sdft_ray.store.store import MANIFEST, Store
from tests.support.jobs import make_job
from tests.support.recipes import make_recipe, recipe_data
from tests.support.staged import output_of
from tests.support.tiny import make_model
from tests.unit.data.turns import turns

SEED, GENERATE = "seed/" + "1" * 16, "generate/" + "2" * 16


def select(
    folder: Path, rows: list[dict[str, Any]], answers: list[tuple[str, str]], **train: Any
) -> list[dict[str, Any]]:
    make_model(folder / "teacher", "llama", num_blocks=1)
    asked = {**recipe_data(folder, folder / "teacher")["train"], **train}
    recipe = make_recipe(folder, folder / "teacher", train=asked)
    store = Store(str(folder / "store"))
    seed = [
        {"example_id": f"r{i}", "context": "", "answer_kind": "number", "check": "", "family": "", **row}
        for i, row in enumerate(rows)
    ]
    generated = [
        {
            "example_id": f"r{i}", "row_key": b"0" * 16, "sample_index": 0, "prompt_tokens": 1, "response": text,
            "response_tokens": 1, "finish_reason": reason, "status": "ok", "error": "",
        }
        for i, (text, reason) in enumerate(answers)
    ]  # fmt: skip
    for address, name, table, schema in (
        (SEED, files.ROWS, seed, SEED_SCHEMA),
        (GENERATE, files.GENERATED, generated, GENERATED_SCHEMA),
        (GENERATE, files.FAILED, [], GENERATED_SCHEMA),
    ):
        (folder / "store" / address).mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(table, schema=schema), folder / "store" / address / name)
        (folder / "store" / address / MANIFEST).write_text("{}", encoding="utf-8")
    job = make_job(
        step="select",
        address="select/" + "3" * 16,
        store_url=store.url,
        recipe=recipe,
        resources=Resources(),
        teacher=ModelSource(directory=str(folder / "teacher")),
        inputs={"seed": SEED, "generate": GENERATE},
    )
    _select(job)
    return pq.read_table(output_of(job) / files.DISTILLED).to_pylist()


def test_nothing_kept_is_no_error_where_nothing_is_trained_on_it(tmp_path: Path) -> None:
    arms = {"sft": {"data": "reference", "learning_rate": 1e-3}}
    (found,) = select(tmp_path, [ROW], [("#### 2", "stop")], arms=arms)
    assert found["source"] == "reference"


ROW = {"instruction": "What is one?", "reference_response": "#### 1"}


def test_nothing_kept_is_an_error_with_the_reasons(tmp_path: Path) -> None:
    answers = [("#### 1 and so on", "length"), ("#### 1 and", "length"), ("#### 2", "stop")]
    with pytest.raises(DataError, match=r"none of the 3 rewrites was kept \(2 truncated, 1 mismatch\).*max_tokens"):
        select(tmp_path, [ROW] * 3, answers)


def test_a_conversation_keeps_its_context_and_an_answer_its_indentation(tmp_path: Path) -> None:
    prompt = turns("system", "Be kind.", "user", "Hi", "assistant", "Hello", "user", "What is one?")
    instruction, context = split_prompt(prompt)
    row = {"instruction": instruction, "context": context, "reference_response": "#### 1"}
    (found,) = select(tmp_path, [row], [("    it is so\n#### 1 \n", "stop")])
    assert row_prompt(found) == prompt
    assert (found["source"], found["response"]) == ("distilled", "    it is so\n#### 1")
