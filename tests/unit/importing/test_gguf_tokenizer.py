"""Real tokenizers that went through GGUF give the ids that they gave before."""

from __future__ import annotations

from pathlib import Path

import pytest
from transformers import AutoTokenizer

from sdft_ray.importing.gguf_tokenizer import rebuilt
from tests.support.gguf_files import write_vocabulary
from tests.support.real import needs_real_data, unpacked

TEXTS = (
    "What is the capital of France?",
    "  if x == 12345:\n\t\treturn 'ok'  # 3.14, 1,000\r\n\n\n",
    "I'm sure they'LL say it's naïve; 日本語のテキスト, Привет, مرحبا",
    "CamelCaseWords and snake_case_words!!! ... ([{<>}])",
    "🙂👍🏽 e\u0301 \u00a0 \u200b",
)


@needs_real_data
@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pre"),
    [
        pytest.param("mistral-nemo-tekken-hf", "tekken", marks=pytest.mark.nightly),
        ("smollm2-135m-instruct", "smollm"),
    ],
)
def test_ids_are_those_of_the_original(name: str, pre: str, tmp_path: Path) -> None:
    original = unpacked(name, tmp_path / "original")
    write_vocabulary(original, tmp_path / "vocabulary.gguf", pre=pre)
    fields = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.pre": pre}
    back, before = rebuilt(tmp_path, "vocabulary.gguf", fields, 2048), AutoTokenizer.from_pretrained(original)
    for text in TEXTS:
        ids = before(text, add_special_tokens=False)["input_ids"]
        assert back(text, add_special_tokens=False)["input_ids"] == ids
        assert back.decode(ids) == before.decode(ids)
