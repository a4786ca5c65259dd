"""The laboratory's tokenizer: numbers, round trip, one BOS, and the files that it saves."""

from __future__ import annotations

from itertools import islice
from pathlib import Path

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from sdft_ray.lab.accuracy import chat_prompt
from sdft_ray.lab.families.words import NAMES
from sdft_ray.lab.mixture import samples, tokenizer_texts
from sdft_ray.lab.tokenizer import VOCAB_SIZE, build_tokenizer


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(tokenizer_texts(4000), context=512)


def test_vocabulary_is_full(tokenizer: PreTrainedTokenizerFast) -> None:
    assert len(tokenizer) == VOCAB_SIZE


@pytest.mark.parametrize("number", [0, 7, 10, 42, 73, 99])
def test_a_number_is_the_same_token_after_any_neighbour(tokenizer: PreTrainedTokenizerFast, number: int) -> None:
    (alone,) = tokenizer.encode(str(number), add_special_tokens=False)
    for text in (f"has {number} eggs", f"= {number}.", f"({number})", f"\n{number}"):
        assert alone in tokenizer.encode(text, add_special_tokens=False), text


def test_no_token_holds_three_digits_or_a_space_before_a_digit(tokenizer: PreTrainedTokenizerFast) -> None:
    for token in tokenizer.get_vocab():
        digits = sum(char.isdigit() and char.isascii() for char in token)
        assert digits <= 2
        assert digits == 0 or digits == len(token), token


def test_names_are_whole_with_and_without_a_space(tokenizer: PreTrainedTokenizerFast) -> None:
    for name in NAMES:
        assert len(tokenizer.encode(name, add_special_tokens=False)) == 1
        assert len(tokenizer.encode(f" {name}", add_special_tokens=False)) == 1


@pytest.mark.parametrize("text", ["", "  two  spaces\n\n", "naïve Ørsted 東京 🙂", "a\tb\r\nc", "1234567 = 12+3"])
def test_any_text_comes_back(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer.encode(text, add_special_tokens=False)
    assert tokenizer.decode(ids) == text


def test_the_chat_template_opens_with_the_only_begin_token(tokenizer: PreTrainedTokenizerFast) -> None:
    turns = [{"role": "user", "content": "How many?"}]
    text = tokenizer.apply_chat_template(turns, tokenize=False, add_generation_prompt=True)
    assert text == chat_prompt("How many?")
    ids = tokenizer.encode(str(text), add_special_tokens=False)
    begin = tokenizer.convert_tokens_to_ids("<|begin|>")
    assert [place for place, token in enumerate(ids) if token == begin] == [0]
    assert tokenizer.encode("How many?")[0] == tokenizer.bos_token_id == begin


def test_saved_files_load_as_any_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for sample in islice(samples("test", frozenset()), 50):
        text = f"{sample.prompt} {sample.response}"
        assert loaded.encode(text) == tokenizer.encode(text)
    turns = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    assert loaded.apply_chat_template(turns, tokenize=False) == "<|begin|><|user|>a<|end|><|assistant|>b<|end|>"
    assert loaded.eos_token == "<|end|>"
