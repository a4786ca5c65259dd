"""Training rows that do not fit a packed row: refused, left out, or cut, but never their answers."""

from __future__ import annotations

import pytest

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.data.documents import fits_surely, training_documents
from sdft_ray.data.messages import split_prompt
from sdft_ray.data.packing import pack
from sdft_ray.errors import DataError
from tests.support.tiny import make_model
from tests.unit.data.turns import turns

LONG = " ".join(f"w{i}" for i in range(200))


@pytest.fixture(scope="module")
def chat(tmp_path_factory: pytest.TempPathFactory) -> ChatFormat:
    folder = tmp_path_factory.mktemp("model")
    make_model(folder, "llama", num_blocks=1)
    return ChatFormat(load_tokenizer(folder))


def test_what_fits_is_encoded_as_it_is(chat: ChatFormat) -> None:
    pairs = [("what is one", "1"), ("and two", "2")]
    made = training_documents(chat, pairs, 512, "refuse")
    assert made.documents == [chat.encode(*pair) for pair in pairs]
    assert (made.dropped, made.cut) == ([], [])


def test_a_long_row_is_refused_by_its_place(chat: ChatFormat) -> None:
    with pytest.raises(DataError, match=r"row 1 has \d+ tokens and train.max_seq_len is 64.*drop or truncate_prompt"):
        training_documents(chat, [("a", "b"), (LONG, "c")], 64, "refuse")


def test_a_long_row_is_left_out_and_the_others_keep_their_places(chat: ChatFormat) -> None:
    made = training_documents(chat, [(LONG, "c"), ("a", "b")], 64, "drop")
    assert (made.dropped, made.cut) == ([0], [])
    assert made.documents[0] is None
    assert set(pack(made.documents, 64).document_ids_NT.ravel()) == {1, -1}


@pytest.mark.parametrize("row_tokens", [48, 64, 100, 333])
def test_the_beginning_of_a_long_prompt_is_cut_and_its_answer_kept(chat: ChatFormat, row_tokens: int) -> None:
    made = training_documents(chat, [(LONG, "the answer")], row_tokens, "truncate_prompt")
    (document,) = made.documents
    assert document is not None
    assert made.cut == [0]
    assert row_tokens * 0.8 <= len(document.ids) <= row_tokens
    whole = chat.encode(LONG, "the answer")
    answer = [token for token, counts in zip(whole.ids, whole.loss_mask, strict=True) if counts]
    assert [token for token, counts in zip(document.ids, document.loss_mask, strict=True) if counts] == answer
    kept = len(document.ids) - len(answer)
    start = next(i for i in range(kept) if document.ids[i:kept] == whole.ids[-len(answer) - (kept - i) : -len(answer)])
    assert start < 16, "but for the template's first tokens it is the end of the prompt"


def test_the_oldest_turns_of_a_long_conversation_go_first(chat: ChatFormat) -> None:
    system, last = turns("system", "Be kind."), turns("user", "And two?")
    first, second = turns("user", LONG, "assistant", "1"), turns("user", "What is one?", "assistant", "1")
    room = len(chat.encode([*system, *second, *last], "2").ids)
    made = training_documents(chat, [([*system, *first, *second, *last], "2")], room, "truncate_prompt")
    assert made.documents == [chat.encode([*system, *second, *last], "2")]
    made = training_documents(chat, [([*system, *first, *second, *last], "2")], room - 1, "truncate_prompt")
    assert made.documents == [chat.encode([*system, *last], "2")]
    longer = turns("user", f"{LONG} And two?")
    made = training_documents(chat, [([*system, *first, *longer], "2")], 64, "truncate_prompt")
    (document,) = made.documents
    assert document is not None
    assert document.ids[:8] == chat.encode([*system, *last], "2").ids[:8], "the system message stays"
    assert made.cut == [0]


def test_what_surely_fits_does(chat: ChatFormat) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"é": "é" * 9}}, "id": "call00001"}
    prompt = [*turns("system", "é", "user", "Why?"), {"role": "assistant", "content": "", "tool_calls": [call]}]
    instruction, context = split_prompt(prompt)
    row = {"instruction": instruction, "context": context}
    num_tokens = len(chat.encode(prompt, "So.").ids)
    assert not fits_surely(chat, row, ("So.",), num_tokens - 1)
    assert fits_surely(chat, row, ("So.",), 2_000)


def test_an_answer_that_does_not_fit_alone_is_left_out_not_cut(chat: ChatFormat) -> None:
    made = training_documents(chat, [("question", LONG), ("a", "b")], 64, "truncate_prompt")
    assert (made.dropped, made.cut) == ([0], [])


def test_nothing_left_is_told(chat: ChatFormat) -> None:
    with pytest.raises(DataError, match="no documents to pack"):
        pack(training_documents(chat, [("question", LONG)], 64, "drop").documents, 64)
