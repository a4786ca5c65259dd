"""Public chat templates with a real tokenizer: what is rendered elsewhere is what is trained here."""

from __future__ import annotations

import copy
import datetime
import json
import re
from functools import cache
from typing import Any

import pytest
from tokenizers import AddedToken

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.messages import ChatSettings
from sdft_ray.errors import ModelError
from tests.support.real import REAL, needs_real_data, real, real_rows, unpacked

pytestmark = needs_real_data

DAY = datetime.date(2026, 1, 2)
NO_PLAIN_CHAT = {
    "firefunction-v1": "wants functions",
    "firefunction-v2": "wants functions",
    "Hermes-2-Pro-Llama-3-8B-hfjs": "wants tools",
    "MiroThinker": "fails on an answered conversation",
}
"""Templates that cannot render a question and its answer."""
NEXT_HEADER_IN_TEXT = {"nemotron-mini-4b": "\n<extra_id_1>"}
"""Templates that print the header of the next answer after each, and what of it ends an answer here."""
NOT_KNOWN = (None, "unknown")
QUESTION, ANSWER = {"role": "user", "content": "What is 2+2?"}, "It is 4."
PROMPTS = {
    "user_assistant": ([QUESTION], ANSWER),
    "user_assistant_user_assistant": (
        [QUESTION, {"role": "assistant", "content": ANSWER}, {"role": "user", "content": "And 3+3?"}],
        "It is 6.",
    ),
}
"""Expected rendering -> what it consists of."""
SYSTEM = {"role": "system", "content": "You are a terse assistant."}
ASKED = {
    "user": [QUESTION],
    "system_user": [SYSTEM, QUESTION],
    "system_user_assistant_user": [SYSTEM, *PROMPTS["user_assistant_user_assistant"][0]],
}
"""Expected rendering with generation prompt -> its messages."""
_LOOKS_LIKE_CONTROL = re.compile(
    r"<\|[^|<>\s]+\|>|<｜[^｜]+｜>|</?think>|\[/?[A-Z_]+\]|<(?:start|end)_of_\w+>|\[\|\w+\|\]|<\w+_\w+>|<step>|<sep>|\[e~\[|\]~b\]|<(?:turn|channel)\||\|(?:turn|channel)>"
)


def _index() -> list[dict[str, Any]]:
    return real_rows("chat_templates", "index.jsonl") if REAL.is_dir() else []


@cache
def _expected(name: str) -> dict[str, Any]:
    return json.loads(real("chat_templates", "expected", f"{name}.json").read_text())


def _text(name: str, case: str, *, prompt: bool = False) -> str | None:
    """An expected rendering; None where the template raised an error."""
    cases = _expected(name)["cases"]
    return next(c.get("text") for c in cases if c["case"] == case and c["add_generation_prompt"] == prompt)


@pytest.fixture(
    scope="module",
    params=["smollm2-135m-instruct", pytest.param("mistral-nemo-tekken-hf", marks=pytest.mark.nightly)],
)
def real_tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Any:
    return load_tokenizer(unpacked(request.param, tmp_path_factory.mktemp("tokenizer") / request.param))


def _chat(real_tokenizer: Any, entry: dict[str, Any]) -> tuple[Any, ChatFormat]:
    """The real tokenizer with the control tokens that the model of a template has, and the chat format."""
    tokenizer: Any = copy.deepcopy(real_tokenizer)
    given = dict(_expected(entry["name"])["kwargs"])
    named = {key: given.pop(key) for key in ("bos_token", "eos_token") if key in given}
    tokenizer.bos_token = named.get("bos_token")
    tokenizer.eos_token = named.get("eos_token", tokenizer.eos_token)
    template = real("chat_templates", entry["file"]).read_text()
    special = sorted({*named.values(), *([entry["end_of_turn"]] if entry["end_of_turn"] not in NOT_KNOWN else [])})
    tokenizer.add_tokens(
        [AddedToken(str(token), special=True, normalized=False) for token in special], special_tokens=True
    )
    others: list[str] = sorted({str(token) for token in _LOOKS_LIKE_CONTROL.findall(template)} - {*special})
    tokenizer.add_tokens([AddedToken(str(token), special=False, normalized=False) for token in others])
    tokenizer.chat_template = template
    return tokenizer, ChatFormat(tokenizer, ChatSettings(arguments=given, date=DAY))


def _ends(tail: str, entry: dict[str, Any], eos: str) -> list[str]:
    """What may end an answer, given the text after it, by the facts that were gathered with the template."""
    end = entry["end_of_turn"]
    if end in NOT_KNOWN:
        return [tail + eos, tail.rstrip(), tail.rstrip().removesuffix(eos)]
    if end in tail:
        return [tail.partition(end)[0] + end]
    # Printed after earlier answers alone, or never.
    earlier = entry["text_after_earlier_assistant"] or ""
    return [earlier.partition(end)[0] + end if end in earlier else tail + eos]


@pytest.mark.slow
@pytest.mark.parametrize("entry", _index(), ids=lambda entry: entry["name"])
def test_a_document_is_the_expected_prompt_answer_and_end_of_turn(real_tokenizer: Any, entry: dict[str, Any]) -> None:
    if entry["name"] in NO_PLAIN_CHAT:
        with pytest.raises(ModelError, match="chat template cannot be rendered"):
            _chat(real_tokenizer, entry)
        return
    tokenizer, chat = _chat(real_tokenizer, entry)
    for case, messages in ASKED.items():
        expected = _text(entry["name"], case, prompt=True)
        if expected is None:
            with pytest.raises(ModelError, match="chat template cannot be rendered"):
                chat.prompt_ids(messages)
        else:
            assert chat.prompt_text(messages) == expected
            assert tokenizer.decode(chat.prompt_ids(messages)) == expected
    for case in PROMPTS:
        _check_document(tokenizer, chat, entry, case)


def _check_document(tokenizer: Any, chat: ChatFormat, entry: dict[str, Any], case: str) -> None:
    messages, answer = PROMPTS[case]
    full = _text(entry["name"], case)
    if full is None:  # fails on longer conversations alone
        with pytest.raises(ModelError, match="chat template cannot be rendered"):
            chat.encode(messages, answer)
        return
    before, _, tail = full.rpartition(answer)
    document, ids, prompt = chat.encode(messages, answer), chat.prompt_ids(messages), chat.prompt_text(messages)
    assert document.ids[: len(ids)] == ids
    assert document.loss_mask == [i >= len(ids) for i in range(len(document.ids))]
    written = tokenizer.decode(document.ids[len(ids) :])
    lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
    if entry["name"] in NEXT_HEADER_IN_TEXT:
        assert written.removesuffix(tokenizer.eos_token) == lead + answer + NEXT_HEADER_IN_TEXT[entry["name"]]
    else:
        assert written in [lead + answer + end for end in _ends(tail, entry, tokenizer.eos_token)]
    assert document.ids[-1] in chat.stop_ids


@pytest.mark.parametrize("name", ["DeepSeek-V3", "Qwen2.5-7B-Instruct"])
def test_tool_calls_are_rendered_whether_a_template_wants_arguments_as_text_or_not(
    real_tokenizer: Any, name: str
) -> None:
    entry = next(entry for entry in _index() if entry["name"] == name)
    call = {"type": "function", "function": {"name": "weather", "arguments": {"city": "Oslo"}}}
    messages: list[dict[str, Any]] = [
        QUESTION,
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "name": "weather", "content": "-3 degrees"},
    ]
    text = _chat(real_tokenizer, entry)[1].prompt_text(messages)
    assert all(part in text for part in ("weather", "Oslo", "-3 degrees"))
