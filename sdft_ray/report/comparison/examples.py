"""Items that changed sides between two models, ready to print."""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.report.comparison.model import Comparison, Example, Response
from sdft_ray.report.toolbox.diff import Piece, side_by_side

HEAD_CHARACTERS, TAIL_CHARACTERS = 1200, 500
"""Of longer answers the beginning and the end are shown."""
PROMPT_CHARACTERS = 2000
BRIEF_CHARACTERS = 32


@dataclass(frozen=True)
class Side:
    """One model's answer, with what the other one does not say marked; `marks` in words.

    `taken` is what the task's filter took out of it, None where that is all of it; `brief` a few words of that.
    """

    model: str
    pieces: list[Piece]
    taken: str | None
    brief: str
    right: bool
    marks: tuple[str, ...]


@dataclass(frozen=True)
class ExampleRow:
    task: str
    item: str
    prompt: str
    target: str
    sides: tuple[Side, Side]


@dataclass(frozen=True)
class ExampleGroup:
    """Items of one pair that changed in one direction, of `num` in all."""

    model: str
    won: bool
    num: int
    rows: tuple[ExampleRow, ...]


def example_groups(comparison: Comparison) -> list[ExampleGroup]:
    """From right to wrong, then from wrong to right, for each other model."""
    groups = []
    for place, model in enumerate(comparison.others):
        for won in (False, True):
            rows = [
                _example_row(comparison.baseline.name, example)
                for example in comparison.examples
                if example.other == model.name and example.won == won
            ]
            flips = [task.changes[place].flips for task in comparison.tasks]
            num = sum(flip.num_only_other if won else flip.num_only_baseline for flip in flips if flip is not None)
            if rows:
                groups.append(ExampleGroup(model.name, won, num, tuple(rows)))
    return groups


def _example_row(baseline: str, example: Example) -> ExampleRow:
    left, right = side_by_side(shortened(example.before.text), shortened(example.after.text))
    sides = (
        _side(baseline, left, example.before, right=not example.won),
        _side(example.other, right, example.after, right=example.won),
    )
    return ExampleRow(
        example.task, shown(example.item), _prompt(example.prompt), shortened(example.target, 300, 0), sides
    )


def _prompt(text: str) -> str:
    """Its end, before which the question stands; evaluations keep no more of it."""
    text = shown(text)
    return text if len(text) < PROMPT_CHARACTERS - 2 else f"… {text[-PROMPT_CHARACTERS:]}"


def _side(model: str, pieces: list[Piece], response: Response, *, right: bool) -> Side:
    marks = [(response.no_answer, "no answer found"), (response.truncated, "cut off")]
    labels = tuple(text for there, text in marks if there)
    taken = shown(response.filtered)
    part = None if taken == shown(response.text) else shortened(taken, 200, 0)
    brief = " ".join(taken.split()) or "nothing"
    return Side(
        model, pieces, part, brief if len(brief) <= BRIEF_CHARACTERS else f"{brief[:BRIEF_CHARACTERS]}…", right, labels
    )


def shortened(text: str, head: int = HEAD_CHARACTERS, tail: int = TAIL_CHARACTERS) -> str:
    """A long text's beginning and end, and how much is missing between them."""
    text = shown(text)
    missing = len(text) - head - tail
    return text if missing <= 0 else f"{text[:head]} … ({missing:,} more characters) … {text[len(text) - tail :]}"


_CONTROL = {code: 0x2400 + code for code in range(32) if chr(code) not in "\t\n"} | {0x7F: 0x2421}


def shown(text: str) -> str:
    """Control characters as signs that can be seen; no white space around."""
    return text.replace("\r\n", "\n").translate(_CONTROL).strip()
