"""The result in a terminal: scores, recovery, and a line each about size, gap and choices.

Loads neither torch nor jinja.
"""

from __future__ import annotations

from rich import box
from rich.console import Console, ConsoleOptions, RenderResult
from rich.measure import Measurement
from rich.table import Column, Table
from rich.text import Text

from sdft_ray.report.run.kept_model import Judgement
from sdft_ray.report.run.kept_words import beyond_chance
from sdft_ray.report.run.model import TEACHER, Grid, Ratio, ReportData, Score
from sdft_ray.report.run.words import groups, mean_score, models, ranked_arms, warnings
from sdft_ray.report.toolbox.numbers import THIN, change, count, nats, number, rate

MAX_REASONS = 2
"""Of those for which a student is not releasable; the report has all."""


def result_table(data: ReportData) -> ResultTable:
    """One row per family, then means and recovery; one column per model. All in per cent."""
    return ResultTable(data)


class ResultTable:
    """A table that leaves out the standard errors where the terminal is too narrow for them, then the families."""

    def __init__(self, data: ReportData) -> None:
        self._data = data

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        if not models(self._data):
            return
        unbound = options.update(max_width=10_000)
        with_errors, without = "Per cent, ± one standard error.", "Per cent."
        shapes = (
            (_table(self._data, errors=True), with_errors),
            (_table(self._data, errors=False), without),
            (_by_model(self._data), f"{with_errors} Families are in the report."),
        )
        fitting = (s for s in shapes if Measurement.get(console, unbound, s[0]).maximum <= options.max_width)
        table, note = next(fitting, shapes[-1])
        yield table
        yield Text(note, style="dim")


def size_line(data: ReportData) -> Text:
    """One line of what sizes promise, one of what was measured; "" without either.

    2.42 M → 1.67 M parameters (−31.1 %), matmul FLOPs ÷ 1.45, KV cache ÷ 1.50
    Measured with 1, 16 sequences: decoding 1.38, 1.44 ×, first token 1.45, 1.47 ×
    """
    lines = []
    if data.sizes is not None:
        before, after = data.sizes.teacher, data.sizes.pruned
        fewer = change(before.num_parameters, after.num_parameters)
        flops = before.matmul_flops_per_token / after.matmul_flops_per_token
        kv = before.kv_bytes_per_token / after.kv_bytes_per_token
        parameters = f"{count(before.num_parameters)} → {count(after.num_parameters)} parameters ({fewer})"
        lines.append(f"{parameters}, matmul FLOPs ÷ {flops:.2f}, KV cache ÷ {kv:.2f}")
    if data.speed is not None:
        batches = data.speed.batches
        sizes = ", ".join(f"{batch.batch_rows:,}" for batch in batches)
        decoding = ", ".join(f"{batch.decode.speedup.median:.2f}" for batch in batches)
        first = ", ".join(f"{batch.first_token.speedup.median:.2f}" for batch in batches)
        lines.append(f"Measured with {sizes} sequences: decoding {decoding} ×, first token {first} ×")
    return Text("\n".join(lines).replace(THIN, " "))


def kept_lines(data: ReportData) -> list[Text]:
    """Whether each student may be released or why not, what became worse than after pruning, and warnings.

    sft: not releasable. Mean recovery is 74.6 % (95 % interval 72.3 to 76.8 %), below the bound of 85.0 %.
    Worse than after pruning alone, beyond chance: sft on facts: −9.0 points (−14.1 to −4.2).
    """
    lines = [_judged(name, judgement) for name, judgement in data.retention.judgements.items()]
    if said := beyond_chance(data.retention):
        lines.append(Text(said))
    return [*lines, *(Text(f"Warning: {warning}", style="yellow") for warning in warnings(data))]


def _judged(name: str, judgement: Judgement) -> Text:
    if judgement.releasable:
        return Text(f"{name}: ").append("releasable", style="green")
    told, more = " ".join(judgement.reasons[:MAX_REASONS]), len(judgement.reasons) - MAX_REASONS
    rest = f" {more} more in the report." if more > 0 else ""
    return Text(f"{name}: ").append("not releasable", style="red").append(f". {told}{rest}")


def gap_line(data: ReportData) -> Text:
    """Teacher: references 0.413, its rewrites 0.013 nats per token, gap 0.400 ± 0.021; "" without figures."""
    if data.gap is None:
        return Text("")
    if TEACHER not in data.gap.nll:
        return Text("No rewrite was kept, so references and rewrites cannot be compared.")
    texts, gap = data.gap.nll[TEACHER], data.gap.gaps[TEACHER]
    error = "" if gap.stderr is None else f" ± {nats(gap.stderr)}"
    means = f"references {nats(texts.reference.value)}, its rewrites {nats(texts.distilled.value)} nats per token"
    return Text(f"Teacher: {means}, gap {nats(gap.value)}{error}")


def grid_line(arm: str, grid: Grid) -> Text:
    """sdft: learning rate 1e−3, seed 1 of 6 trials, held-out loss 0.213 nats per token; 1 diverged."""
    best = next(trial for trial in grid.trials if trial.chosen)
    assert best.held_out_loss is not None
    num_lost = sum(trial.held_out_loss is None for trial in grid.trials)
    lost = f"; {num_lost} diverged" if num_lost else ""
    return Text(
        f"{arm}: learning rate {rate(best.learning_rate)}, seed {best.seed} of {len(grid.trials)} trials, "
        f"held-out loss {nats(best.held_out_loss)} nats per token{lost}"
    )


def _frame(*names: str) -> Table:
    return Table(
        Column("", max_width=22, overflow="ellipsis", no_wrap=True),
        *(Column(name, justify="right", no_wrap=True) for name in names),
        box=box.SIMPLE_HEAD,
        show_edge=False,
        pad_edge=False,
        padding=(0, 0, 0, 1),
    )


def _by_model(data: ReportData) -> Table:
    """For many arms: one row per model."""
    best = next((name for name, _ in ranked_arms(data)), "")
    table = _frame("mean", "recovery")
    for name in models(data):
        part = data.recovery.get(name)
        cells = [
            _cell(mean_score(data, name, data.tasks), errors=True),
            _cell(part.mean if part else None, errors=True),
        ]
        table.add_row(Text(name, style="bold green" if name == best else ""), *cells)
    return table


def _table(data: ReportData, *, errors: bool) -> Table:
    names = models(data)
    best = next((name for name, _ in ranked_arms(data)), "")
    table = _frame(*names)

    def mean(title: str, tasks: tuple[str, ...]) -> None:
        table.add_row(title, *(_cell(mean_score(data, name, tasks), errors=errors) for name in names), style="bold")

    parts = groups(data)
    for group in parts:
        for task in group.tasks:
            table.add_row(task, *(_cell(data.scores.get(name, {}).get(task), errors=errors) for name in names))
        if len(parts) > 1:
            mean(f"mean, {group.name.lower().removesuffix(' families')}", group.tasks)
            table.add_row()
    mean("mean", data.tasks)
    recovered = [data.recovery.get(name) for name in names]
    cells = [_cell(part.mean if part else None, errors=errors) for part in recovered]
    for name, cell in zip(names, cells, strict=True):
        cell.stylize("bold green" if name == best else "bold")
    table.add_row(Text("recovery", style="bold"), *cells)
    return table


def _cell(figure: Score | Ratio | None, *, errors: bool) -> Text:
    if figure is None or figure.value is None:
        return Text("–", style="dim")
    text = Text(number(100 * figure.value, 1))
    if errors and figure.stderr is not None:
        text.append(f" ± {number(100 * figure.stderr, 1)}", style="dim")
    return text
