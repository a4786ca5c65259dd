"""Typed answers: how the final answer is extracted from a response, and when two answers are equal.

Five kinds: a number or mathematical expression (exact), a choice of letters A to Z, a text, a list of items, or none
(nothing to check). An explicit answer (`#### ...`, `\\boxed{...}`, "the answer is ...", "Answer: ...") has precedence
over a guessed one, and a later explicit answer over an earlier one. An answer that is ambiguous, denied, bounded,
asked, taken back or cut off counts as no answer. A missing answer is equal to nothing, not even to another missing one.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from sdft_ray.errors import DataError
from sdft_ray.generation.choices import read_choice
from sdft_ray.generation.expressions import Expression, is_value, same_expressions
from sdft_ray.generation.number_answers import read_number
from sdft_ray.generation.numbers import Number, equal_numbers
from sdft_ray.generation.texts import Items, read_list, read_text

Value = Number | Expression | str | Items


@dataclass(frozen=True)
class Answer:
    """`value` is a `Number` or `Expression`, the letters of a choice, a normalised text, or normalised items."""

    kind: str
    value: Value


def extract(kind: str, text: str) -> Answer | None:
    """The answer in a response, or None.

    `kind` is "number", "choice", "text", "list" or "none" (always None). Raises `DataError` for another kind.
    """
    if kind == "none":
        return None
    if kind not in _READERS:
        raise DataError(f"unknown answer kind {kind!r}", f"use one of {', '.join([*_READERS, 'none'])}")
    value = _READERS[kind](text)
    return None if value is None else Answer(kind, value)


def equal(kind: str, a: Answer | None, b: Answer | None) -> bool:
    """Whether two answers of this kind are equal. False if either is missing or of another kind."""
    if a is None or b is None or a.kind != kind or b.kind != kind:
        return False
    match a.value, b.value:
        case Number(), Number():
            return equal_numbers(a.value, b.value)
        case Expression(), Expression():
            return same_expressions(a.value, b.value)
        case (Expression() as expression, Number() as number) | (Number() as number, Expression() as expression):
            return is_value(expression, number.value)
        case _:
            return a.value == b.value


_READERS: dict[str, Callable[[str], Value | None]] = {
    "number": read_number,
    "choice": read_choice,
    "text": read_text,
    "list": read_list,
}
