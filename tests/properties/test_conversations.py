"""Conversations, for all texts: nothing that a client writes becomes a control token, and no text is changed."""

from __future__ import annotations

from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.lab.export import TEACHER

PATIENT = settings(deadline=None, max_examples=80)
TOKENIZER: Any = load_tokenizer(TEACHER)
CHAT = ChatFormat(TOKENIZER)
CONTROLS = set(TOKENIZER.all_special_ids)
PARTS = st.sampled_from(
    [*map(str, TOKENIZER.all_special_tokens), "<|end", "|>", " ", "\n", "Hello", "Qxaxq", "Qxbxq", "ü", "\x00"]
)
TEXTS = st.lists(PARTS, max_size=6).map("".join) | st.text(max_size=20)
TURNS = st.lists(st.tuples(st.sampled_from(["system", "user", "assistant"]), TEXTS), min_size=1, max_size=5)


@PATIENT
@given(TURNS)
def test_only_the_template_writes_control_tokens(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content} for role, content in turns]
    harmless = [{"role": role, "content": "x"} for role, _ in turns]
    ids = CHAT.prompt_ids(messages)
    assert [i for i in ids if i in CONTROLS] == [i for i in CHAT.prompt_ids(harmless) if i in CONTROLS]
    text = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    decoded = TOKENIZER.decode(ids)
    if TOKENIZER.decode(TOKENIZER(text, add_special_tokens=False)["input_ids"]) == text:
        assert decoded == text


@PATIENT
@given(TURNS)
def test_without_control_tokens_it_is_what_transformers_makes(turns: list[tuple[str, str]]) -> None:
    messages = [{"role": role, "content": content.replace("<|", "< |")} for role, content in turns]
    expected = TOKENIZER.apply_chat_template(messages, add_generation_prompt=True, tokenize=True, return_dict=False)
    assert CHAT.prompt_ids(messages) == expected
