"""The output of `sdft try`: templates, examples side by side, distances, times, and what to put into the recipe."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Any

from rich.console import Console, Group
from rich.panel import Panel
from rich.table import Table
from rich.text import Text

from sdft_ray.report.toolbox.numbers import MINUS, THIN, number, p_words, percent, seconds
from sdft_ray.statistics.estimate import Estimate, plain

if TYPE_CHECKING:
    from sdft_ray.generation.trial import Example, TemplateTrial
    from sdft_ray.pipeline.rehearsal import Rehearsal

_SHORT = 0.5
"""Share of the words of references below which rewrites may lack their steps."""
_CUT = 400
"""Characters of an instruction, a reference and a rewrite that are shown."""


def print_rehearsal(found: Rehearsal, console: Console | None = None) -> None:
    """Readable at 80 columns and in a pipe."""
    console = console or Console(highlight=False)
    console.print(
        f"{found.num_rows} of {found.num_seed_rows:,} rows of the seed set, rewritten by every template.\n",
        soft_wrap=True,
    )
    console.print(_templates(found))
    console.print(
        Text(
            f"\nown: kept by selection, and no copy of the reference; with its 95 % interval. {_distance_words(found)}"
        ),
        style="dim",
    )
    console.print(_reasons(found))
    for trial in found.templates:
        console.print(_examples(trial))
    console.print()
    console.print(_steps(found))
    for line in _closing(found):
        console.print(Text(line), soft_wrap=True)


def rehearsal_json(found: Rehearsal) -> dict[str, Any]:
    """Fractions in [0, 1], seconds, nats per token."""
    data = plain(found)
    for trial in data["templates"]:
        del trial["is_own"]
    return data | {"advice": advice(found)}


def rehearsal_text(found: Rehearsal) -> str:
    """One JSON object."""
    return json.dumps(rehearsal_json(found))


def advice(found: Rehearsal) -> str:
    """Which template to take, and whether the rows tell."""
    best = next(trial for trial in found.templates if trial.name == found.recommendation.template)
    if not best.num_own:
        return (
            "No template has a rewrite kept. Look at the examples: the answers may be cut (generate.max_tokens), or "
            "checked in the wrong way (seed_set.answer_kind)."
        )
    return f"{_told(found, best)}{_warning(best)}"


def _warning(best: TemplateTrial) -> str:
    if best.length is None or best.length >= _SHORT:
        return ""
    words = percent(best.length, 0).replace(THIN, " ")
    return (
        f"\nIts rewrites have {words} of the words of their references: bare answers pass the check of worked "
        "solutions, and teach no steps. Look at the examples."
    )


def _told(found: Rehearsal, best: TemplateTrial) -> str:
    kept = f"{best.num_own} of {best.num_rows} rows ({_interval(best)})"
    alike = ", ".join(found.recommendation.alike)
    more = max(64, 4 * found.num_rows)
    unsure = f" {found.num_rows} rows do not tell it from {alike}: try --rows {more}." if alike else ""
    if best.name == found.template:
        return f"The recipe's template, {best.name}, keeps most: {kept}.{unsure}"
    p_value = found.recommendation.p_value
    assert p_value is not None, "another template is compared"
    own = next(trial for trial in found.templates if trial.name == found.template)
    against = f"{best.name} keeps most: {kept}, for {own.num_own} of the recipe's {own.name} (p = {p_words(p_value)})"
    if found.template in found.recommendation.alike:
        return f"{against}, which may be chance: keep the recipe as it is, or try --rows {more}."
    return f"{against}.{unsure} In the recipe:\n  generate: {{template: {best.name}}}"


def _interval(trial: TemplateTrial) -> str:
    low, high = trial.own.low, trial.own.high
    assert low is not None and high is not None, "there are rows"  # noqa: PT018
    return f"{number(100 * low, 0)} to {percent(high, 0)}".replace(THIN, " ")


def _plain_table(*columns: str, left: int = 1) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, column in enumerate(columns):
        table.add_column(column, justify="left" if place < left else "right", overflow="fold")
    return table


def _templates(found: Rehearsal) -> Table:
    table = _plain_table("template", "own", "interval", "copies", "length", "reference", "rewrite")
    for trial in found.templates:
        style = "bold green" if trial.name == found.recommendation.template else ""
        mark = " *" if trial.name == found.template else ""
        nats = (_nats(trial.distance.reference), _nats(trial.distance.rewrite)) if trial.distance else ("", "")
        length = "" if trial.length is None else percent(trial.length, 0).replace(THIN, " ")
        cells = (f"{trial.num_own}", _interval(trial), f"{trial.num_copies}", length, *nats)
        table.add_row(Text(trial.name + mark, style=style), *cells)
    return table


def _distance_words(found: Rehearsal) -> str:
    words = "* the recipe's template. length: words of these rewrites, of 100 % in their references."
    if any(trial.distance for trial in found.templates):
        words += (
            " reference, rewrite: nats per token under the teacher, for the rows that are kept, ± one standard error; "
            "the lower, the nearer to what the teacher would say itself."
        )
    return words


def _nats(value: Estimate) -> str:
    if value.value is None:
        return ""
    error = "" if value.stderr is None else f" ± {value.stderr:.2f}"
    return f"{value.value:.2f}{error}".replace("-", MINUS)


def _reasons(found: Rehearsal) -> Group:
    """Why rewrites are not kept, a line for each template, and what the reasons mean."""
    from sdft_ray.generation.selection import MEANINGS

    table = _plain_table("not kept", "why", left=2)
    seen: set[str] = set()
    for trial in found.templates:
        others = {reason: number for reason, number in trial.reasons.items() if reason != "kept"}
        seen |= set(others)
        why = ", ".join(f"{number} {reason}" for reason, number in others.items())
        table.add_row(f"{sum(others.values())} of {trial.num_rows}, {trial.name}", why or "–")
    words = (f"{reason}: {meaning}" for reason, meaning in MEANINGS.items() if reason in seen)
    return Group(Text(), table, Text("; ".join(words), style="dim"))


def _examples(trial: TemplateTrial) -> Group:
    shown = [_side_by_side(example) for example in (*trial.kept, *trial.others)]
    return Group(Text(f"\n{trial.name}: rewrites that are kept, and some that are not", style="bold"), *shown)


def _side_by_side(example: Example) -> Panel:
    table = Table.grid(padding=(0, 2), expand=True)
    table.add_column(ratio=1, overflow="fold")
    table.add_column(ratio=1, overflow="fold")
    table.add_row(Text("reference", style="dim"), Text("rewrite", style="dim"))
    table.add_row(Text(_cut(example.reference)), Text(_cut(example.rewrite)))
    style = "green" if example.reason == "kept" else "red"
    title = Text(f"{example.example_id}: {example.reason}", style=style)
    return Panel(Group(Text(_cut(example.instruction), style="italic"), table), title=title, title_align="left")


def _cut(text: str) -> str:
    return text if len(text) <= _CUT else f"{text[: _CUT - 1]}…"


def _steps(found: Rehearsal) -> Table:
    table = _plain_table("step", "time", "")
    table.columns[-1].justify = "left"
    for step in found.steps:
        told = "" if step.seconds is None or step.note else seconds(step.seconds).replace(THIN, " ")
        table.add_row(step.step, told, Text(step.note, style="dim"))
    return table


def _closing(found: Rehearsal) -> list[str]:
    unknown = [step.step for step in found.steps if step.seconds is None]
    bound = "at least " if unknown else "about "
    total = seconds(found.total_s).replace(THIN, " ")
    return [
        f"\nThe run takes {bound}{total}, its steps side by side as the machine allows; the teacher writes "
        f"{found.tokens_per_s:,.0f} tokens/s here.",
        f"This rehearsal took {seconds(found.took_s).replace(THIN, ' ')}.",
        "",
        advice(found),
    ]
