"""The page of a digest of studies, in Markdown: a table of recovery for each study, and one of what accuracy hides."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from sdft_ray.analysis.digest import Digest, unpacked
from sdft_ray.pipeline.study import ROWS
from sdft_ray.report.study.gather import gather_study
from sdft_ray.report.study.tables import study_markdown
from sdft_ray.report.toolbox.numbers import THIN, nats, seconds
from sdft_ray.report.toolbox.table import DASH, Cell, Group, Row, Table, for_markdown, names, share
from sdft_ray.statistics.crossed import CrossedEstimate, crossed_mean

Entry = Mapping[str, Any]
Cells = dict[tuple[str, int], list[Entry]]
"""(arm, number of rows) -> its students, by seed."""


def digest_page(digest: Digest, title: str) -> str:
    """All studies that have a student beside teacher and pruned model; the others in a sentence each."""
    parts = [
        f"# {title}",
        "This page is made from the digest beside it by `jobs/digest.py`; do not edit it. Recovery is the mean score "
        "over tasks as a share of the teacher's, in per cent, with 95 % intervals over items, and over training seeds "
        "where there are several; differences are paired by item and seed. No interval is corrected for the number of "
        "comparisons.",
    ]
    for name, study in digest["studies"].items():
        parts += _study(digest, name, study)
    return "\n\n".join(parts) + "\n"


def _study(digest: Digest, name: str, study: Entry) -> list[str]:
    students = [{**entry, "key": key} for key, entry in digest["students"].items() if entry["study"] == name]
    trainings = [entry for entry in digest["trainings"].values() if entry["study"] == name]
    spent = sum(entry["seconds"] for entry in trainings)
    heading = f"## {name}\n\n{study['description'] or 'A study.'}."
    trained = f"{_counted(len(trainings), 'training')} finished ({seconds(spent).replace(THIN, ' ')})"
    done = f"{trained}, {_counted(len(students), 'student')} evaluated."
    panels = list(_panels(students, study["arms"]))
    if not panels:
        return [f"{heading} {done} No group of students can be compared yet."]
    shown = sum(len(own) for cells in panels for own in cells.values())
    seeds = sorted({len(own) for cells in panels for own in cells.values()})
    over = _counted(seeds[0], "seed") if len(seeds) == 1 else f"{seeds[0]} to {seeds[-1]} seeds"
    one = " With one seed, what another seed would change is in no interval." if seeds[0] == 1 else ""
    told = f"{done} The tables have the {_counted(shown, 'student')} that can be compared, {over} each.{one}"
    tables = []
    for teacher in dict.fromkeys(_any(cells)["teacher"] for cells in panels):  # asked in one way
        alike = [cells for cells in panels if _any(cells)["teacher"] == teacher]
        rows = [row for cells in alike for own in cells.values() for entry in own for row in _rows(digest, entry)]
        tables.append(study_markdown(gather_study(pa.Table.from_pylist(rows, schema=ROWS), name=name)))
        tables.append(for_markdown(_beside(digest, alike)))
    return [f"{heading} {told}", *(table.rstrip() for table in tables)]


def _any(cells: Cells) -> Entry:
    return next(iter(cells.values()))[0]


def _counted(number: int, noun: str) -> str:
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def _panels(students: Sequence[Entry], arms: Sequence[str]) -> Iterator[Cells]:
    """Of each variant and cut the cells that can be compared: all where they have seeds in common, else those that have
    the seed that most of them have. Where one was made in several ways, the way with the most students."""
    groups: dict[tuple[Any, ...], dict[tuple[str, str], list[Entry]]] = {}
    for entry in students:
        ways = groups.setdefault((entry["variant"], entry["metric"], entry["remove_blocks"]), {})
        ways.setdefault((entry["teacher"], entry["pruned"]), []).append(entry)
    for ways in groups.values():
        entries = max(ways.values(), key=len)
        cells: dict[tuple[str, int], dict[int, Entry]] = {}
        for entry in sorted(entries, key=lambda entry: (entry["num_rows"], arms.index(entry["arm"]), entry["seed"])):
            cells.setdefault((entry["arm"], entry["num_rows"]), {})[entry["seed"]] = entry
        seeds = set.intersection(*(set(own) for own in cells.values()))
        if not seeds:  # the seed that most cells have
            every = [seed for own in cells.values() for seed in own]
            seeds = {max(sorted(set(every)), key=every.count)}
        yield {key: [own[seed] for seed in sorted(seeds)] for key, own in cells.items() if seeds <= own.keys()}


def _rows(digest: Digest, entry: Entry) -> Iterator[dict[str, Any]]:
    """One per task, as a study has them."""
    own = digest["evaluations"][entry["key"]]["tasks"]
    teacher, pruned = (digest["evaluations"][entry[model]]["tasks"] for model in ("teacher", "pruned"))
    facts = {name: entry[name] for name in ROWS.names if name in entry}
    for task, score in own.items():
        yield {
            **facts,
            "task": task,
            "tuned": task in entry["tuned"],
            "chance": score["chance"],
            "score": score["score"],
            "n": score["n"],
            "teacher_score": teacher[task]["score"],
            "pruned_score": pruned[task]["score"],
            "items": unpacked(score["items"]),
            "teacher_items": unpacked(teacher[task]["items"]),
        }


# --- beside accuracy ----------------------------------------------------------------------------------------


def _beside(digest: Digest, panels: Sequence[Cells]) -> Table:
    """Flips from the teacher, divergence from it on its own held-out answers, held-out loss."""
    groups = []
    for cells in panels:
        first = _any(cells)
        teacher = digest["evaluations"][first["teacher"]]
        pruned = digest["evaluations"][first["pruned"]]
        rows = [_row("pruned", teacher, [pruned], [])]
        for (arm, num_rows), own in cells.items():
            evaluated = [digest["evaluations"][entry["key"]] for entry in own]
            losses = [entry["held_out_loss"] for entry in own if entry["held_out_loss"] is not None]
            rows.append(_row(f"{arm}, {num_rows:,} rows", teacher, evaluated, losses))
        blocks = f"{first['remove_blocks']} of {first['num_blocks'] + first['remove_blocks']} blocks removed"
        groups.append(Group(", ".join(part for part in (first["variant"], blocks) if part), tuple(rows)))
    columns = names(
        "", "right to wrong, %", "wrong to right, %", "KL to the teacher, nats per token",
        "99 % of tokens at most", "held-out loss", "tokens per answer",
    )  # fmt: skip
    return Table("", columns, tuple(groups))


def _row(name: str, teacher: Entry, models: Sequence[Entry], losses: Sequence[float]) -> Row:
    lost, gained = (_flipped(teacher, models, sign) for sign in (1, -1))
    kl = [model["texts"]["kl"] for model in models if "kl" in model.get("texts", {})]
    mean = nats(statistics.fmean(part["mean"]["value"] for part in kl)) if kl else DASH
    error = f"± {nats(kl[0]['mean']['stderr'])}" if len(kl) == 1 and kl[0]["mean"]["stderr"] is not None else ""
    p99 = nats(statistics.fmean(part["p99"]["value"] for part in kl)) if kl else DASH
    low, high = (kl[0]["p99"][end] for end in ("low", "high")) if len(kl) == 1 else (None, None)
    limits = "" if low is None or high is None else f"({nats(low)} to {nats(high)})"
    cells = (_share(lost), _share(gained), Cell(mean, error), Cell(p99, limits))
    loss = Cell(nats(statistics.fmean(losses)) if losses else DASH)
    return Row(Cell(name), (*cells, loss, Cell(_tokens(teacher, models))))


def _flipped(teacher: Entry, models: Sequence[Entry], sign: int) -> CrossedEstimate | None:
    """Mean over tasks of the share of items that the teacher gets right and the models do not, or the reverse (-1)."""
    tables = {}
    for task, score in teacher["tasks"].items():
        if not isinstance(score["items"], dict):  # graded
            continue
        was_I = np.array(unpacked(score["items"]))
        now_SI = np.array([unpacked(model["tasks"][task]["items"]) for model in models])
        tables[task] = (sign * (was_I - now_SI) > 0).astype(float)
    return crossed_mean(tables) if tables else None


def _share(found: CrossedEstimate | None) -> Cell:
    if found is None or found.value is None:
        return Cell(DASH)
    known = found.low is not None and found.high is not None
    low, high = (max(0.0, found.low or 0.0), min(1.0, found.high or 0.0)) if known else (0.0, 0.0)
    return Cell(share(found.value), f"({share(low)} to {share(high)})" if known else "")


def _tokens(teacher: Entry, models: Sequence[Entry]) -> str:
    """Of the models, and the teacher's; over tasks whose answers are written."""
    written = [task for task, score in teacher["tasks"].items() if "tokens_per_answer" in score]
    if not written:
        return DASH
    was = statistics.fmean(teacher["tasks"][task]["tokens_per_answer"] for task in written)
    now = statistics.fmean(model["tasks"][task]["tokens_per_answer"] for model in models for task in written)
    return f"{now:,.0f} (teacher {was:,.0f})"
