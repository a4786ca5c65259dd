"""Tokenizers against the rows of an embedding table."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sdft_ray.errors import ModelError
from sdft_ray.models.checkpoint import Checkpoint
from sdft_ray.models.vocabulary import check_same_tokenizer, check_vocabulary
from tests.support import tiny


@pytest.fixture
def tokenizer(tmp_path) -> Path:
    return tiny.make_tokenizer(tmp_path, 128)


def add_token(directory: Path, content: str, *, special: bool) -> int:
    loaded = AutoTokenizer.from_pretrained(directory)
    loaded.add_tokens([content], special_tokens=special)
    loaded.save_pretrained(str(directory))
    return loaded.convert_tokens_to_ids(content)


def test_enough_rows(tokenizer):
    check_vocabulary(tokenizer, 128)
    check_vocabulary(tokenizer, 160)


def test_too_few_rows(tokenizer):
    with pytest.raises(ModelError, match="the tokenizer"):
        check_vocabulary(tokenizer, 127)
    with pytest.raises(ModelError, match=r"entries, the embedding table 90 rows → use the model's own tokenizer"):
        check_vocabulary(tokenizer, 90)


def test_checkpoint_with_another_models_tokenizer(tmp_path):
    tiny.make_model(tmp_path, vocab_size=112, tokenizer=False)
    checkpoint = Checkpoint.open(tmp_path)
    with pytest.raises(ModelError, match="holds no tokenizer"):
        checkpoint.check_expected()
    tiny.make_tokenizer(tmp_path, 128)
    with pytest.raises(ModelError, match="112 rows"):
        checkpoint.check_expected()


def test_word_added_without_a_row(tokenizer):
    assert add_token(tokenizer, "kilowatt", special=False) == 128
    with pytest.raises(ModelError, match="'kilowatt' has id 128, but the embedding table has 128 rows"):
        check_vocabulary(tokenizer, 128)
    check_vocabulary(tokenizer, 129)


def test_special_token_that_nothing_uses(tokenizer):
    """As Gemma 3 1B ships it: <image_soft_token> is one past the last row."""
    assert add_token(tokenizer, "<image_soft_token>", special=True) == 128
    check_vocabulary(tokenizer, 128)


def test_padding_token_without_a_row(tokenizer):
    loaded = AutoTokenizer.from_pretrained(tokenizer)
    loaded.add_special_tokens({"pad_token": "[PAD]"})
    loaded.save_pretrained(str(tokenizer))
    with pytest.raises(ModelError, match=r"'\[PAD\]' has id 128"):
        check_vocabulary(tokenizer, 128)


@pytest.mark.parametrize("place", ["chat_template.jinja", "tokenizer_config.json"])
def test_template_token_without_a_row(tokenizer, place):
    add_token(tokenizer, "<|tool|>", special=True)
    if place == "chat_template.jinja":
        (tokenizer / place).write_text("{{ '<|tool|>' }}")
    else:
        (tokenizer / "chat_template.jinja").unlink()
        settings = json.loads((tokenizer / place).read_text())
        (tokenizer / place).write_text(json.dumps({**settings, "chat_template": "{{ '<|tool|>' }}"}))
    with pytest.raises(ModelError, match="tool"):
        check_vocabulary(tokenizer, 128)


def test_unigram_vocabulary_is_a_list(tmp_path):
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["a", -1.0]] * 50}}))
    check_vocabulary(tmp_path, 50)
    with pytest.raises(ModelError, match="50 entries, the embedding table 49"):
        check_vocabulary(tmp_path, 49)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"model": {"vocab": {}}}'])
def test_damaged_tokenizer(tmp_path, text):
    (tmp_path / "tokenizer.json").write_text(text)
    with pytest.raises(ModelError, match=r"tokenizer\.json"):
        check_vocabulary(tmp_path, 128)


def test_tokenizer_without_the_fast_file(tokenizer):
    (tokenizer / "tokenizer.json").unlink()
    with pytest.raises(ModelError, match="cannot load the tokenizer"):
        check_vocabulary(tokenizer, 128)


def test_models_share_a_tokenizer_whatever_the_padding_of_their_tables(tmp_path):
    first = tiny.make_model(tmp_path / "first", vocab_size=128)
    second = tiny.make_model(tmp_path / "second", vocab_size=160, tokenizer=False)
    tiny.make_tokenizer(second, 128)
    check_same_tokenizer(first, second, "")
    path = second / "tokenizer.json"
    path.write_text(path.read_text(encoding="utf-8").replace("<|user|>", "<|human|>"), encoding="utf-8")
    with pytest.raises(ModelError, match=r"different tokenizers: tokenizer\.json differs → take the other"):
        check_same_tokenizer(first, second, "take the other")
    path.unlink()
    with pytest.raises(ModelError, match="different tokenizers"):
        check_same_tokenizer(first, second, "")
