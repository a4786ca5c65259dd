"""How long the rows of a seed set are, in tokens of the teacher: what an engine's context and a pass are sized by."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sdft_ray.recipe.recipe import Recipe
from sdft_ray.stages.teacher import TeacherModel

_MOST_TOKENIZED = 20_000
"""Rows that are tokenized to find the longest; beyond, the bytes of a row are its bound."""
_BYTES_PER_TOKEN = 4
"""Of ordinary English text, for an estimate."""
_FRAME_TOKENS = 64
"""What a chat template is taken to add to a prompt, where it is not rendered."""


@dataclass(frozen=True)
class Lengths:
    """`prompt_tokens` bounds every rewriting prompt, exactly where it was tokenized. `document_tokens` are those of a
    long training document, as nine in ten are shorter, estimated from bytes. None where rows cannot be read here.
    """

    num_rows: int | None = None
    prompt_tokens: int | None = None
    document_tokens: int | None = None


def row_lengths(recipe: Recipe, teacher: TeacherModel) -> Lengths:
    """Read the seed set once, with the teacher's tokenizer and chat template. Raises as `check_prompts`."""
    from sdft_ray.data.messages import prompt_of

    chat = teacher.chat

    def count(row: dict[str, Any], asked: str) -> int:
        return len(chat.prompt_ids(prompt_of(asked, row["context"])))

    return _lengths(recipe, count, chat.frame_tokens)


def estimated_lengths(recipe: Recipe, directory: Path) -> Lengths:
    """The same without the chat template, and without transformers and torch: a frame of 64 tokens stands for it.

    A teacher without tokenizer.json gives no lengths. Raises `DataError` for rows that cannot be read.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        return Lengths()
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))

    def count(row: dict[str, Any], asked: str) -> int:
        return len(tokenizer.encode(asked + row["context"], add_special_tokens=False).ids) + _FRAME_TOKENS

    return _lengths(recipe, count, _FRAME_TOKENS)


def _lengths(recipe: Recipe, count: Callable[[dict[str, Any], str], int], frame_tokens: int) -> Lengths:
    """No tokenizer makes more tokens than there are bytes, so a row is tokenized only if it has more bytes than the
    longest prompt so far has tokens. A template may escape tool calls, and frames each message (`fits_surely`).
    """
    from sdft_ray.data.rows import read_source
    from sdft_ray.generation.prompts import render_rewrite

    template = recipe.generate.template
    frame = len(render_rewrite(template, "", "").encode()) + frame_tokens
    longest = num_tokenized = 0
    sizes: list[int] = []
    for table in read_source(recipe.seed_set, lambda kind, check: "", turns=recipe.train.turns):
        for row in table.to_pylist():
            texts = sum(len(row[name].encode()) for name in ("instruction", "reference_response"))
            context = len(row["context"].encode())
            sizes.append(texts + context)
            most = frame + texts + 3 * context + frame_tokens * row["context"].count('"role"')
            if most <= longest:
                continue
            if num_tokenized == _MOST_TOKENIZED:
                longest = most
                continue
            num_tokenized += 1
            longest = max(longest, count(row, render_rewrite(template, row["instruction"], row["reference_response"])))
    sizes.sort()
    long = sizes[int(0.9 * (len(sizes) - 1))] // _BYTES_PER_TOKEN if sizes else 0
    return Lengths(len(sizes), longest, max(16, min(long, recipe.train.max_seq_len)))
