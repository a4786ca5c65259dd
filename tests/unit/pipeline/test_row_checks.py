"""Rows against the chat template and the context of the teacher, before any worker starts."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from sdft_ray.errors import DataError, ModelError
from sdft_ray.models.source import ModelSource
from sdft_ray.pipeline.preflight import check_rows
from sdft_ray.pipeline.row_checks import check_calibration, check_prompts
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.teacher import TeacherModel
from tests.support.recipes import recipe_data
from tests.support.tiny import CHAT_TEMPLATE, make_model
from tests.unit.data.turns import turns

PLAIN = {"instruction": "What is one?", "reference": "1"}
SYSTEM = {"messages": turns("system", "Be kind.", "user", "What is one?", "assistant", "1")}
CALL = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "weather", "arguments": "{}"}}]}
TOOL = {"messages": [*turns("user", "Weather?"), CALL, *turns("tool", "4 C", "assistant", "Cold.")]}
NO_SYSTEM = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}" + CHAT_TEMPLATE
SKIPS_SYSTEM = CHAT_TEMPLATE.replace("in messages %}", "in messages if message['role'] != 'system' %}")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    make_model(tmp_path / "teacher", "llama", num_blocks=1)
    return tmp_path


def write(folder: Path, *rows: dict[str, Any], name: str = "seed") -> None:
    (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def check(folder: Path, *rows: dict[str, Any], template: str = CHAT_TEMPLATE, **train: Any) -> None:
    """Of a set that begins with more plain rows than are all tokenized."""
    plain = [{"instruction": f"What is {i}?", "reference": str(i)} for i in range(9_000)] if len(rows) == 1 else []
    write(folder, *plain, *rows)
    write(folder, PLAIN, name="calibration")
    teacher, recipe = of(folder, template, **train)
    check_prompts(recipe, Resources(), teacher)


def of(folder: Path, template: str = CHAT_TEMPLATE, **train: Any) -> tuple[TeacherModel, Recipe]:
    path = folder / "teacher/tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**config, "chat_template": template}), encoding="utf-8")
    (folder / "teacher/chat_template.jinja").write_text(template, encoding="utf-8")
    data = recipe_data(folder, folder / "teacher")
    recipe = Recipe.parse({**data, "train": {**data["train"], **train}})
    source = ModelSource(directory=str(folder / "teacher"))
    return TeacherModel(str(folder / "teacher"), source, recipe.teacher.dtype), recipe


def test_messages_that_the_template_renders_pass(folder: Path) -> None:
    check(folder, SYSTEM)


def test_a_template_that_fails_for_a_system_turn_alone_is_told_the_row(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"row \w{16}: the chat template cannot be rendered.* no system"):
        check(folder, SYSTEM, template=NO_SYSTEM)


def test_a_template_that_leaves_out_a_message_is_refused(folder: Path) -> None:
    with pytest.raises(ModelError, match=r"row \w{16}: the chat template leaves out the system message 'Be kind\.'"):
        check(folder, SYSTEM, template=SKIPS_SYSTEM)
    with pytest.raises(ModelError, match=r"row \w{16}: the chat template leaves out the call of the tool 'weather'"):
        check(folder, TOOL)


def test_rows_that_are_all_dropped_are_an_error(folder: Path) -> None:
    long = [{"instruction": f"What is {i}?", "reference": "y " * 40} for i in range(2)]
    for policy in ("drop", "truncate_prompt"):
        with pytest.raises(DataError, match=f"no row of the seed set fits train.max_seq_len 64, .*{policy}"):
            check(folder, *long, long_examples=policy, max_seq_len=64)
        check(folder, *long, PLAIN, long_examples=policy, max_seq_len=64)
    with pytest.raises(DataError, match=r"row \w{16} has \d+ tokens and train.max_seq_len is 64"):
        check(folder, *long, PLAIN, max_seq_len=64)


def test_calibration_rows_of_each_form_are_encoded(folder: Path) -> None:
    teacher, recipe = of(folder, NO_SYSTEM)
    write(folder, {"reference": "once upon"}, PLAIN, name="calibration")
    check_calibration(recipe, teacher)
    write(folder, {"reference": "once upon"}, PLAIN, SYSTEM, name="calibration")
    with pytest.raises(ModelError, match="no system"):
        check_calibration(recipe, teacher)


def test_what_was_read_is_told(folder: Path) -> None:
    write(folder, {"question": "What is one?", "answer": "1"}, SYSTEM, {"messages": turns("user", "And two?")})
    write(folder, PLAIN, name="calibration")
    _, recipe = of(folder)
    told: list[str] = []
    assert check_rows(recipe, tell=told.append) == 2
    assert told == [
        "seed set: 3 rows read: `messages` holds the conversation (2 rows); "
        "`question` asks, `answer` answers (1 row). "
        "Left out: 1 because the conversation ends with a user message."
    ]
