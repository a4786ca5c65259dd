"""What models have lost, as a table: one row per model, one column per kind of text."""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.evaluation.forgetting import HELD_OUT
from sdft_ray.report.run.model import Forgetting, Likeness, Nats, Ratio, ReportData
from sdft_ray.report.toolbox.numbers import count, nats, number

DASH = "–"
NAMES = {HELD_OUT: "held-out text", "reference": "references", "distilled": "rewrites"}
"""Kinds of text, as they head a column."""


@dataclass(frozen=True)
class Cell:
    """A figure, and below it what it is beside the teacher's; "" for the teacher."""

    figure: str
    beside: str = ""


@dataclass(frozen=True)
class Table:
    """Ready to print. `columns` are names with a count of rows, or ""; `rows` are models with their cells."""

    columns: tuple[tuple[str, str], ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]
    verdicts: tuple[str, ...]
    alike: str
    """How answers were compared, "" where they were not."""


def table(data: ReportData) -> Table | None:
    """None where nobody asked."""
    found = data.forgetting
    if found is None:
        return None
    texts = [text for text in NAMES if text in found.num_rows]
    columns = [(NAMES[text], f"{found.num_rows[text]:,} rows") for text in texts]
    if HELD_OUT in texts:
        columns.insert(1, ("perplexity", "× the teacher’s"))
    if found.likeness:
        columns.append(("answers", "similarity"))
    rows = tuple((model, tuple(_cells(found, model, texts))) for model in found.nll)
    return Table(tuple(columns), rows, tuple(found.verdicts.values()), _alike(found.likeness))


def _cells(found: Forgetting, model: str, texts: list[str]) -> list[Cell]:
    differences = found.to_teacher.get(model, {})
    cells = [Cell(_nats(found.nll[model][text]), _signed(differences.get(text))) for text in texts]
    if HELD_OUT in texts:
        ratio = found.perplexity_ratio.get(model)
        cells.insert(1, Cell(_factor(ratio) if ratio else DASH))
    if found.likeness:
        alike = found.likeness.get(model)
        low = f"5 % below {number(alike.low, 3)}" if alike and alike.low is not None else ""
        cells.append(Cell(_figures(alike.mean, 3) if alike else DASH, low))
    return cells


def _nats(figure: Nats) -> str:
    return nats(figure.value) + ("" if figure.stderr is None else f" ± {nats(figure.stderr)}")


def _signed(difference: Nats | None) -> str:
    if difference is None:
        return ""
    return ("+" if difference.value >= 0.0005 else "") + _nats(difference)


def _factor(ratio: Ratio) -> str:
    """With two decimals, as long as these mean anything."""
    return count(ratio.value) if ratio.value is not None and ratio.value >= 1000 else _figures(ratio, 2)


def _figures(ratio: Ratio, digits: int) -> str:
    if ratio.value is None:
        return DASH
    return number(ratio.value, digits) + ("" if ratio.stderr is None else f" ± {number(ratio.stderr, digits)}")


def _alike(likeness: dict[str, Likeness]) -> str:
    """The same items for all models, so one count serves."""
    if not likeness:
        return ""
    answers = max(part.num_answers for part in likeness.values())
    if not answers:
        return "No task asked for a written answer, so there is none to compare with the teacher’s."
    what = "the cosine between sentence embeddings of a model’s answer and the teacher’s"
    told = [f"Similarity is {what}, over {answers:,} items"]
    for name, what in (
        ("num_empty", "an answer is empty"),
        ("num_cut", "one is longer than the embedding model reads"),
    ):
        if most := max(getattr(part, name) for part in likeness.values()):
            told.append(f"for at most {most:,} {what}")
    return f"{'; '.join(told)}."
