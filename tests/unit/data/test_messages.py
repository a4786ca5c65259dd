"""A prompt as two columns, and what a template makes of its messages."""

from __future__ import annotations

from typing import Any

from hypothesis import given
from hypothesis import strategies as st

from sdft_ray.data.example import example_id
from sdft_ray.data.messages import (
    context_texts,
    left_out_of,
    messages_of,
    prompt_of,
    row_prompt,
    shape_of,
    split_prompt,
)
from tests.unit.data.turns import turns

CALL = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}, "id": "call00001"}
CALLED = [
    *turns("system", "Be kind.", "user", "Weather?"),
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4 C", "tool_call_id": "call00001", "name": "weather"},
]

messages = st.lists(
    st.tuples(st.sampled_from(["system", "user", "assistant"]), st.text(st.characters(exclude_categories=["Cs"]))),
).map(lambda pairs: [{"role": role, "content": text} for role, text in pairs])


@given(messages, st.text(), messages.map(lambda rest: [m for m in rest if m["role"] != "user"]))
def test_columns_hold_the_prompt(before: list[dict[str, Any]], question: str, after: list[dict[str, Any]]) -> None:
    prompt = [*before, {"role": "user", "content": question}, *after]
    instruction, context = split_prompt(prompt)
    assert instruction == question
    assert messages_of(prompt_of(instruction, context)) == prompt
    assert (context == "") == (len(prompt) == 1)


def test_a_rewriting_prompt_takes_the_place_of_the_question_alone() -> None:
    instruction, context = split_prompt(CALLED)
    wrapped = prompt_of(f"<{instruction}>", context)
    assert wrapped == [CALLED[0], {"role": "user", "content": "<Weather?>"}, *CALLED[2:]]
    assert row_prompt({"instruction": instruction, "context": context}) == CALLED
    assert prompt_of("Why?", "") == "Why?"


def test_texts_and_shape_of_a_context() -> None:
    _, context = split_prompt(CALLED)
    assert context_texts(context) == ["Be kind.", '{"city": "Oslo"}', "4 C"]
    assert shape_of(context) == (("system", False), ("user", False), ("assistant", True), ("tool", False))
    assert context_texts("") == []
    assert shape_of("") == ()


def test_a_context_is_part_of_the_default_id() -> None:
    _, context = split_prompt(CALLED)
    assert example_id("q", "a", "") == example_id("q", "a")
    assert example_id("q", "a", context) != example_id("q", "a")
    assert example_id("q", "a", "1:xy") != example_id("xq", "a", "y")


def test_what_a_template_leaves_out_is_named() -> None:
    whole = "Be   kind. Weather? weather(Oslo) 4\nC"
    assert left_out_of(CALLED, whole) == ""
    assert left_out_of(CALLED, whole.replace("kind", "")) == "the system message 'Be kind.'"
    assert left_out_of(CALLED, whole.replace("weather", "")) == "the call of the tool 'weather'"
    assert left_out_of(CALLED, whole.replace("4\nC", "")) == "the tool message '4 C'"
    quoted = [{"role": "user", "content": 'Say "é"'}]
    assert left_out_of(quoted, r'"Say \"\u00e9\""') == left_out_of(quoted, r'"Say \"é\""') == ""
