"""Rows of the shapes that public data sets have: what is asked, and what is answered."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdft_ray.data.messages import Prompt, row_prompt
from sdft_ray.data.reading import Reading
from sdft_ray.data.sources import read_tables
from sdft_ray.errors import DataError
from tests.support.real import needs_real_data, real
from tests.unit.data.turns import turns

Q, A = "Name a tree.", "Oak."
CALL = {
    "type": "function",
    "function": {"name": "weather", "arguments": {"city": "Oslo", "days": 2}},
    "id": "call00001",
}
CALLED = [
    {"role": "user", "content": "Weather in Oslo?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4 C", "tool_call_id": "call00001", "name": "weather"},
]


def read(folder: Path, *rows: dict[str, Any], name: str = "rows.jsonl", **options: Any) -> list[tuple[Prompt, str]]:
    path = folder / name
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(list(rows)), path)
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    tables = list(read_tables(str(path), **options))
    return [(row_prompt(row), row["reference_response"]) for table in tables for row in table.to_pylist()]


SHAPES: dict[str, tuple[dict[str, Any], Prompt]] = {
    "alpaca": ({"instruction": "Sum up.", "input": "A text.", "output": A}, "Sum up.\n\nA text."),
    "alpaca, no input": ({"instruction": Q, "input": "", "output": A}, Q),
    "alpaca, input alone": ({"instruction": "", "input": Q, "output": A}, Q),
    "alpaca with the whole prompt": ({"instruction": Q, "input": None, "output": A, "text": f"### {Q} {A}"}, Q),
    "dolly": ({"instruction": Q, "context": "A wood.", "response": A, "category": "qa"}, f"{Q}\n\nA wood."),
    "gsm8k": ({"question": Q, "answer": A}, Q),
    "metamath": ({"query": Q, "response": A, "type": "MATH", "original_question": "Another?"}, Q),
    "numina": ({"problem": Q, "solution": A, "messages": turns("user", Q, "assistant", A), "source": "x"}, Q),
    "orca": (
        {"id": "1", "system_prompt": "Be kind.", "question": Q, "response": A},
        turns("system", "Be kind.", "user", Q),
    ),
    "orca, no system": ({"id": "1", "system_prompt": "", "question": Q, "response": A}, Q),
    "flan": ({"inputs": Q, "targets": A, "task": "x"}, Q),
    "input and output": ({"input": Q, "output": A}, Q),
    "squad-like": ({"question": Q, "passage": "A wood.", "answer": A}, f"{Q}\n\nA wood."),
    "upper case": ({"Question": Q, "Answer": A}, Q),
    "prompt and completion": ({"prompt": Q, "completion": A}, Q),
    "lists": ({"prompt": turns("system", "Be kind.", "user", Q), "completion": turns("assistant", A)},
              turns("system", "Be kind.", "user", Q)),
    "list and text": ({"prompt": turns("user", Q), "completion": A}, Q),
    "llama-factory": (
        {"instruction": Q, "input": "", "output": A, "system": "Be kind.", "history": [["Hi", "Hello"]]},
        turns("system", "Be kind.", "user", "Hi", "assistant", "Hello", "user", Q),
    ),
    "openai": ({"messages": turns("user", Q, "assistant", A)}, Q),
    "developer": ({"messages": turns("developer", "Be kind.", "user", Q, "assistant", A)},
                  turns("system", "Be kind.", "user", Q)),
    "ultrachat": ({"prompt": Q, "prompt_id": "f0", "messages": turns("user", Q, "assistant", A)}, Q),
    "sharegpt": (
        {"conversations": [
            {"from": "system", "value": "Be kind."}, {"from": "human", "value": Q}, {"from": "gpt", "value": A}]},
        turns("system", "Be kind.", "user", Q),
    ),
    "sharegpt with a system column": (
        {"system": "Be kind.", "tools": "[]", "conversations": [
            {"from": "human", "value": Q, "weight": None}, {"from": "gpt", "value": A, "weight": 1}]},
        turns("system", "Be kind.", "user", Q),
    ),
    "lima": ({"conversations": ["Hi", "Hello", Q, A], "source": "x"},
             turns("user", "Hi", "assistant", "Hello", "user", Q)),
    "capybara": (
        {"source": "x", "conversation": [{"input": "Hi", "output": "Hello"}, {"input": Q, "output": A}]},
        turns("user", "Hi", "assistant", "Hello", "user", Q),
    ),
    "ultrachat, original": ({"id": "0", "data": [Q, A]}, Q),
    "json in a column": ({"messages": json.dumps(turns("user", Q, "assistant", A))}, Q),
    "text parts": (
        {"messages": [
            {"role": "user", "content": [{"type": "text", "text": "Name "}, {"type": "text", "text": "a tree."}]},
            {"role": "assistant", "content": [{"type": "text", "text": A}]}]},
        Q,
    ),
    "null columns": ({"instruction": None, "reference": None, "messages": turns("user", Q, "assistant", A)}, Q),
    "gemini": ({"contents": [{"role": "user", "parts": [{"text": Q}]}, {"role": "model", "parts": [{"text": A}]}]}, Q),
    "speakers": ({"human": Q, "assistant": A}, Q),
    "a prompt in json": ({"prompt": json.dumps(turns("system", "Be kind.", "user", Q)), "completion": A},
                         turns("system", "Be kind.", "user", Q)),
    "json that is text": ({"prompt": '[{"a": 1}] is what?', "completion": A}, '[{"a": 1}] is what?'),
    "a passage that the question holds": ({"instruction": f"{Q} In a wood.", "input": "In a wood.", "output": A},
                                          f"{Q} In a wood."),
    "a greeting first": ({"messages": turns("assistant", "Hi", "user", Q, "assistant", A)},
                         turns("assistant", "Hi", "user", Q)),
    "tools, openai": (
        {"messages": [
            CALLED[0],
            {"role": "assistant", "content": None, "tool_calls": [
                {"type": "function", "function": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}}]},
            {"role": "tool", "content": "4 C"}, {"role": "assistant", "content": A}], "tools": []},
        CALLED,
    ),
    "tools, openai of old": (
        {"messages": [
            CALLED[0],
            {"role": "assistant", "content": None,
             "function_call": {"name": "weather", "arguments": '{"city": "Oslo", "days": 2}'}},
            {"role": "function", "content": "4 C"}, {"role": "assistant", "content": A}]},
        CALLED,
    ),
    "tools, sharegpt": (
        {"conversations": [
            {"from": "human", "value": "Weather in Oslo?"},
            {"from": "function_call", "value": '{"name": "weather", "arguments": {"city": "Oslo", "days": 2}}'},
            {"from": "observation", "value": "4 C"}, {"from": "gpt", "value": A}]},
        CALLED,
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_the_shapes_of_public_sets_are_read(tmp_path: Path, shape: str, suffix: str) -> None:
    row, prompt = SHAPES[shape]
    assert read(tmp_path, row, name=f"rows.{suffix}") == [(prompt, A)]


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "two answers": (
        {"question": Q, "answer": "1", "solution": A},
        r"`answer` and `solution` could each be the reference → say which: `columns: \{reference: answer\}`",
    ),
    "two questions": (
        {"instruction": "Answer.", "question": Q, "output": A},
        r"`question` says something that `instruction` does not → .*\{instruction: instruction\}",
    ),
    "two additions": ({"instruction": Q, "input": "a", "context": "b", "output": A}, "could each be the context"),
    "another conversation": (
        {"problem": Q, "solution": "Elm.", "messages": turns("user", Q, "assistant", A)},
        r"`solution` says something that `messages` does not → .*\{messages: messages\}",
    ),
    "options": ({"question": Q, "choices": ["Oak", "Elm"], "answer": A}, "`choices` would be left out"),
    "preferences": ({"prompt": Q, "chosen": A, "rejected": "Elm."}, r"columns: \{reference: chosen\}"),
    "preferences in messages": ({"chosen": turns("user", Q, "assistant", A), "rejected": []}, r"\{messages: chosen\}"),
    "nested": (
        {"instruction": Q, "instances": [{"input": "", "output": A}]},
        r"no column 'reference' .*\{reference: instances\.0\.output, context: instances\.0\.input\}",
    ),
    "squad": ({"question": Q, "context": "A wood.", "answers": {"text": [A], "answer_start": [1]}},
              r"\{reference: answers\.text\.0\}"),
    "an answer in an object": (
        {"question": Q, "answer": {"value": A}}, r"not an object → .*\{reference: answer\.value\}"
    ),
    "several answers": ({"question": Q, "answer": [A, "Elm."]}, r"not a list → .*\{reference: answer\.0\}"),
    "an id that is none": ({"id": 1.5, "question": Q, "answer": A}, r"id must be text.* set `columns: \{id: ''\}`"),
    "a number": ({"question": Q, "answer": 4}, r"reference \(`answer`\) must be text, not a number"),
    "a list of questions": ({"instruction": ["a", "b"], "output": A}, r"instruction must be text, not a list"),
    "a message a row": ({"message_id": "1", "role": "prompter", "text": Q}, "no column 'instruction'"),
    "a dialogue as text": ({"dialogue": "A: hi\nB: hello", "summary": A}, "`dialogue` must be a list of messages"),
    "an unknown role": ({"messages": turns("user", Q, "narrator", A)}, r"message 2 of `messages` has the unknown role"),
    "no roles": ({"messages": [{"text": Q}]}, r"message 1 of `messages` has no role \(its fields: text\)"),
    "an image": (
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
        "message 1 of `messages` has a part of type 'image_url'",
    ),
    "a number as content": ({"messages": [{"role": "user", "content": 4}]}, "has a number as content"),
    "arguments": (
        {"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{x"}}]}]},
        "arguments of a tool call that are not valid JSON",
    ),
    "two systems": (
        {"system": "Be kind.", "messages": turns("system", "Be rude.", "user", Q, "assistant", A)},
        "`system` differs from the system message",
    ),
}  # fmt: skip


@pytest.mark.parametrize("shape", REFUSED)
def test_what_can_be_read_in_several_ways_or_in_none_is_refused_by_name(tmp_path: Path, shape: str) -> None:
    row, message = REFUSED[shape]
    with pytest.raises(DataError, match=f"rows.jsonl, line 1: .*{message}"):
        read(tmp_path, row)


def test_the_mapping_that_an_error_gives_works(tmp_path: Path) -> None:
    row = {"instruction": "Sum up.", "instances": [{"input": "A text.", "output": A}]}
    columns = {"reference": "instances.0.output", "context": "instances.0.input"}
    assert read(tmp_path, row, columns=columns) == [("Sum up.\n\nA text.", A)]
    row = {"question": Q, "answer": "1", "solution": A, "choices": ["a"]}
    assert read(tmp_path, row, columns={"reference": "solution", "context": ""}) == [(Q, A)]
    row = {"prompt": Q, "chosen": turns("user", Q, "assistant", A), "rejected": turns("user", Q, "assistant", "Elm.")}
    assert read(tmp_path, row, columns={"messages": "chosen"}) == [(Q, A)]


def test_a_mapping_of_the_question_does_not_lose_its_text(tmp_path: Path) -> None:
    row = {"instruction": "Sum up.", "context": "A text.", "response": A}
    assert read(tmp_path, row, columns={"instruction": "instruction", "reference": "response"}) == [
        ("Sum up.\n\nA text.", A)
    ]


def test_what_was_read_as_what_is_told(tmp_path: Path) -> None:
    reading = Reading()
    first = {"instruction": Q, "input": "", "output": A, "topic": "trees"}
    read(tmp_path, first, {**first, "input": "In a wood."}, {**first, "output": ""}, first, reading=reading)
    assert reading.sentences() == [
        "4 rows read: `instruction` asks, `output` answers (3 rows); "
        "`instruction` and `input` ask, `output` answers (1 row).",
        "Not read: `topic`.",
        "Left out: 1 because the answer is empty; 1 because an earlier row has the same prompt and answer.",
    ]
    assert Reading.of(json.loads(json.dumps(reading.summary()))) == reading
    own = Reading()
    read(tmp_path, {"instruction": Q, "reference": A}, reading=own)
    assert own.sentences() == []


LEFT_OUT: dict[str, tuple[dict[str, Any], str]] = {
    "the user last": ({"messages": turns("user", Q, "assistant", A, "user", "And?")}, "ends with a user message"),
    "a tool last": ({"messages": CALLED}, "ends with a tool message"),
    "a call last": ({"messages": CALLED[:2]}, "the answer calls a tool"),
    "no answer": ({"messages": turns("user", Q, "assistant", " ")}, "the answer is empty"),
    "no question": ({"messages": turns("system", Q, "assistant", A)}, "there is no question"),
    "none": ({"messages": []}, "the conversation is empty"),
    "null": ({"messages": None}, "the conversation is empty"),
    "weight": ({"messages": [*turns("user", Q), {"role": "assistant", "content": A, "weight": 0}]}, "has weight 0"),
    "thoughts": (
        {"messages": [*turns("user", Q), {"role": "assistant", "content": A, "reasoning_content": "Hm."}]},
        "the answer has thoughts",
    ),
    "tools": ({"messages": turns("user", Q, "assistant", A), "tools": [{"name": "f"}]}, "the row offers tools"),
    "tools as text": ({"messages": turns("user", Q, "assistant", A), "tools": '[{"name": "f"}]'}, "offers tools"),
}  # fmt: skip


@pytest.mark.parametrize("case", LEFT_OUT)
def test_rows_without_an_answer_to_train_on_are_left_out_by_reason(tmp_path: Path, case: str) -> None:
    row, reason = LEFT_OUT[case]
    reading = Reading()
    assert read(tmp_path, row, {"instruction": Q, "reference": A}, reading=reading) == [(Q, A)]
    ((told, number),) = reading.left_out.items()
    assert reason in told
    assert number == 1
    with pytest.raises(DataError, match=f"none of its 1 rows can be trained on .*{reason}"):
        read(tmp_path, row)


def test_all_turns_are_rows_of_their_own(tmp_path: Path) -> None:
    messages = turns(
        "system", "Be kind.", "user", "Hi", "assistant", "Hello", "user", Q, "assistant", A, "user", "And?"
    )
    path = tmp_path / "rows.jsonl"
    rows = [{"id": "c", "messages": messages}, {"id": "d", "messages": turns("user", Q, "assistant", A)}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    reading = Reading()
    found = [row for table in read_tables(str(path), turns="all", reading=reading) for row in table.to_pylist()]
    assert [(row["example_id"], row_prompt(row), row["reference_response"]) for row in found] == [
        ("c#1", messages[:2], "Hello"),
        ("c#2", messages[:4], A),
        ("d", Q, A),
    ]
    assert reading.left_out == {"the conversation ends with a user message": 1}


def test_earlier_answers_are_counted(tmp_path: Path) -> None:
    reading = Reading()
    row = {"messages": turns("user", "Hi", "assistant", "Hello", "user", Q, "assistant", A)}
    assert len(read(tmp_path, row, reading=reading)) == 1
    assert reading.num_earlier == 1
    assert "1 earlier answers of conversations are read but not trained on" in reading.sentences()[-1]
    both = Reading()
    assert [answer for _, answer in read(tmp_path, row, turns="all", reading=both)] == ["Hello", A]
    assert both.num_earlier == 0


def test_an_answer_keeps_its_first_indentation(tmp_path: Path) -> None:
    code = "    y = x + 1\n    return y"
    rows = [{"instruction": Q, "reference": code}, {"messages": turns("user", "And?", "assistant", code)}]
    assert [answer for _, answer in read(tmp_path, *rows)] == [code, code]


def test_a_json_array_is_read(tmp_path: Path) -> None:
    rows = [{"instruction": Q, "output": A}, {"instruction": "And?", "output": A}]
    for name, text in (("a.json", json.dumps(rows)), ("b.json", "\n" + json.dumps(rows, indent=2))):
        (tmp_path / name).write_text(text, encoding="utf-8")
        (table,) = read_tables(str(tmp_path / name))
        assert table["instruction"].to_pylist() == [Q, "And?"]
    (tmp_path / "c.json").write_text(json.dumps([*rows, 3]), encoding="utf-8")
    with pytest.raises(DataError, match=r"c\.json, item 3: must be a JSON object, not a number"):
        list(read_tables(str(tmp_path / "c.json")))
    (tmp_path / "d.json").write_text('[{"a": 1},\n {"a": }]', encoding="utf-8")
    with pytest.raises(DataError, match=r"d\.json, line 2: not valid JSON"):
        list(read_tables(str(tmp_path / "d.json")))


def test_large_columns_of_parquet_are_not_read(tmp_path: Path) -> None:
    table = pa.table({
        "question": [Q], "answer": [A], "image": [{"bytes": b"x", "path": "y"}], "embedding": [[0.5, 1.5]],
    })  # fmt: skip
    pq.write_table(table, tmp_path / "rows.parquet")
    (found,) = read_tables(str(tmp_path / "rows.parquet"))
    assert found["instruction"].to_pylist() == [Q]


def test_plain_text_of_a_calibration_set(tmp_path: Path) -> None:
    path = tmp_path / "text.jsonl"
    rows = [{"text": "  once upon"}, {"question": Q, "answer": A}, {"messages": turns("user", Q, "assistant", "Elm.")}]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    (table,) = read_tables(str(path), plain_text=True)
    assert table["instruction"].to_pylist() == ["", Q, Q]
    assert table["reference_response"].to_pylist() == ["  once upon", A, "Elm."]


@needs_real_data
def test_the_cases_are_read() -> None:
    for path in sorted(real("cases", "rows").iterdir()):
        reading = Reading()
        num_rows = sum(table.num_rows for table in read_tables(str(path), reading=reading))
        assert num_rows == len(path.read_text(encoding="utf-8").splitlines()), path
        assert not reading.left_out


@needs_real_data
def test_real_sets_are_read_whole() -> None:
    dolly = Reading()
    rows = [r for t in read_tables(str(real("dolly15k", "train.jsonl.gz")), reading=dolly) for r in t.to_pylist()]
    assert (dolly.num_read, len(rows), dolly.left_out.total()) == (15_011, 14_996, 15)
    assert sum("\n\n" in row["instruction"] for row in rows) >= dolly.layouts.most_common()[1][1] > 4_000
    gsm8k = list(read_tables(str(real("gsm8k", "train.jsonl")), answer_kind="number"))
    assert sum(table.num_rows for table in gsm8k) == 7_473
    for name in ("seed_tasks.jsonl", "user_oriented_instructions.jsonl"):
        path = str(real("self_instruct", name))
        with pytest.raises(DataError, match=r"reference: instances\.0\.output, context: instances\.0\.input"):
            list(read_tables(path))
        columns = {"reference": "instances.0.output", "context": "instances.0.input"}
        assert sum(table.num_rows for table in read_tables(path, columns=columns)) >= 174
