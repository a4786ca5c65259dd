"""The tables of a run's page."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence

from sdft_ray.evaluation import rounds
from sdft_ray.evaluation.forgetting import HELD_OUT
from sdft_ray.evaluation.rounds import BatchSpeed, Summary
from sdft_ray.generation.selection import MEANINGS
from sdft_ray.models.size import ModelSize
from sdft_ray.report.run.cut_words import listed
from sdft_ray.report.run.model import Forgetting, Grid, ReportData, Speed, TrialRow
from sdft_ray.report.run.words import groups, mean_score, models, size_rows
from sdft_ray.report.toolbox.numbers import (
    THIN,
    count,
    nats,
    num_bytes,
    number,
    percent,
    rate,
    seconds,
    short_time,
)
from sdft_ray.report.toolbox.table import DASH, Cell, Group, Row, Table, bar, estimate, names
from sdft_ray.statistics.estimate import Estimate

TEXTS = {HELD_OUT: "held-out text", "reference": "references", "distilled": "rewrites"}
"""Kinds of text, as they head a column."""


def score_table(data: ReportData, tones: Mapping[str, str]) -> Table:
    """Families in groups, each with its mean, then the mean over all; no groups without scores."""
    known = [model for model in models(data) if model in data.scores]

    def row(name: str, scores: Sequence[Estimate | None], *, strong: bool = False) -> Row:
        is_share = name not in data.not_averaged
        return Row(Cell(name), tuple(estimate(score, is_share=is_share, inline=True) for score in scores), strong)

    def mean(name: str, tasks: Sequence[str]) -> Row:
        return row(name, [mean_score(data, model, tasks) for model in known], strong=True)

    parts = []
    for group in groups(data) if known else ():
        rows = [row(task, [data.scores[model].get(task) for model in known]) for task in group.tasks]
        rows += [mean("mean", group.tasks)] if group.name and len(rows) > 1 else []
        parts.append(Group(group.name, tuple(rows)))
    parts += [Group("", (mean("mean of all", data.tasks),))] if known else []
    columns = names("Family", *(Cell(model, swatch=tones[model]) for model in known))
    return Table("Scores of every model per family, in per cent", columns, tuple(parts), "scores")


def num_items(data: ReportData) -> str:
    """How many items each family has: "200", "100 to 200", or "" where unknown."""
    counts = {score.n for scores in data.scores.values() for score in scores.values() if score.n}
    if not counts:
        return ""
    return f"{max(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


# --- sizes and speed ----------------------------------------------------------------------------------------


def size_table(data: ReportData) -> Table:
    sizes = size_rows(data.sizes.teacher, data.sizes.pruned) if data.sizes else []
    rows = (Row(Cell(name), (*names(*texts), bar(share))) for name, *texts, share in sizes)
    columns = names("Size", "teacher", "pruned", "change", Cell("share of the teacher", kind="wide"))
    return Table("Sizes of teacher and pruned model", columns, (Group("", tuple(rows)),))


def speed_tables(data: ReportData) -> list[Table]:
    """Speed, then memory, with what the sizes predict in a last row; [] where they were not measured."""
    if data.speed is None:
        return []
    factors = _predicted(data.sizes.teacher, data.sizes.pruned) if data.sizes else {}
    return [_speed_table(data.speed, factors), _memory_table(data.speed, factors)]


def _speed_table(speed: Speed, predicted: Mapping[str, Cell]) -> Table:
    def cell(was: Summary, now: Summary, speedup: Summary, form: Callable[[float], str]) -> Cell:
        quartiles = f"{_times(speedup.median)} ({speedup.low:.2f} to {speedup.high:.2f})"
        return Cell(f"{form(was.median)} → {form(now.median)}", quartiles)

    def cells(was: BatchSpeed, now: BatchSpeed) -> tuple[Cell, ...]:
        first, then = was.first_token_s, now.first_token_s
        return (
            cell(was.prefill, now.prefill, rounds.ratio(now.prefill, was.prefill), _tokens),
            cell(was.decode, now.decode, rounds.ratio(now.decode, was.decode), _tokens),
            cell(first, then, rounds.ratio(first, then), short_time),
        )

    # A prompt is bound by multiplications, a new token by reading every weight.
    computed = tuple(predicted[name] for name in ("flops", "weights", "flops") if predicted)
    columns = names("Sequences", "Prefill, tokens/s", "Decode, tokens/s", "First token after")
    caption = "Measured speed of teacher and pruned model, by sequences at once"
    return Table(caption, columns, _by_batch(speed, cells, computed))


def _memory_table(speed: Speed, predicted: Mapping[str, Cell]) -> Table:
    """With a column for the peak where it is known of both models."""

    def cell(was: int, now: int) -> Cell:
        return Cell(f"{num_bytes(was)} → {num_bytes(now)}", _times(was / now) if now else "")

    def cells(was: BatchSpeed, now: BatchSpeed) -> tuple[Cell, ...]:
        weights = cell(speed.teacher.weight_bytes, speed.pruned.weight_bytes)
        known = was.peak_bytes is not None and now.peak_bytes is not None
        peak = (cell(was.peak_bytes or 0, now.peak_bytes or 0),) if known else ()
        return weights, cell(was.kv_bytes, now.kv_bytes), *peak

    width = len(cells(*speed.batches[0]))
    computed = (predicted["weights"], predicted["kv"], Cell())[:width] if predicted else ()
    columns = names("Sequences", "Weights", "Keys and values", "Other, at its peak")[: width + 1]
    caption = "Memory of teacher and pruned model, by sequences at once"
    return Table(caption, columns, _by_batch(speed, cells, computed))


def _by_batch(
    speed: Speed, cells: Callable[[BatchSpeed, BatchSpeed], tuple[Cell, ...]], computed: tuple[Cell, ...]
) -> tuple[Group, ...]:
    rows = [Row(Cell(f"{was.batch_rows:,}"), cells(was, now)) for was, now in speed.batches]
    rows += [Row(Cell("computed"), computed, strong=True)] if computed else []
    return (Group("", tuple(rows)),)


def _predicted(teacher: ModelSize, pruned: ModelSize) -> dict[str, Cell]:
    """By how much the pruned model needs less according to its size alone."""
    factors = {
        "flops": (teacher.matmul_flops_per_token / pruned.matmul_flops_per_token, "matmul FLOPs"),
        "weights": (teacher.weight_bytes / pruned.weight_bytes, "weight bytes"),
        "kv": (teacher.kv_bytes_per_token / pruned.kv_bytes_per_token, "bytes per token"),
    }
    return {name: Cell(_times(factor), unit) for name, (factor, unit) in factors.items()}


def _times(factor: float) -> str:
    return f"{factor:.2f}{THIN}×"


def _tokens(per_s: float) -> str:
    """0.12, 3.46, 34.6, 346, 3,456, 345,612, 3.46 M."""
    if per_s >= 999_999.5:
        return count(per_s)
    return f"{per_s:,.{0 if per_s >= 99.95 else 1 if per_s >= 9.995 else 2}f}"


# --- training and its data ----------------------------------------------------------------------------------


def grid_tables(data: ReportData, tones: Mapping[str, str]) -> list[tuple[Table, str]]:
    """One table per arm with several trials, a row per learning rate and a column per seed, with a note."""
    return [(_grid_table(arm, grid, tones[arm]), _grid_note(arm, grid)) for arm, grid in data.grids.items()]


def _grid_table(arm: str, grid: Grid, tone: str) -> Table:
    seeds = tuple(dict.fromkeys(trial.seed for trial in grid.trials))
    by_place = {(trial.learning_rate, trial.seed): trial for trial in grid.trials}
    rows = []
    for value in dict.fromkeys(trial.learning_rate for trial in grid.trials):
        trials = [by_place.get((value, seed)) for seed in seeds]
        losses = [trial.held_out_loss for trial in trials if trial is not None and trial.held_out_loss is not None]
        mean = nats(math.fsum(losses) / len(losses)) if losses and len(losses) == len(trials) else DASH
        cells = (*map(_trial, trials), *((Cell(mean),) if len(seeds) > 1 else ()))
        rows.append(Row(Cell(rate(value)), cells, strong=any(t is not None and t.chosen for t in trials)))
    titles = [*(f"seed {seed}" for seed in seeds), "mean"] if len(seeds) > 1 else ["held-out loss"]
    columns = names(Cell(f"{arm}: learning rate", swatch=tone), *titles)
    return Table(f"Held-out loss of {arm} by learning rate and seed", columns, (Group("", tuple(rows)),))


def _trial(trial: TrialRow | None) -> Cell:
    if trial is None:
        return Cell(DASH)
    if trial.held_out_loss is None:
        return Cell("diverged")
    return Cell(nats(trial.held_out_loss), tag="chosen" if trial.chosen else "", tag_tone="good")


def _grid_note(arm: str, grid: Grid) -> str:
    """What trials were compared on, and why some diverged."""
    size = f"{count(grid.num_rows)} held-out rows with {count(grid.num_tokens)} response tokens"
    lost = [f"{rate(t.learning_rate)}, seed {t.seed}: {t.reason}." for t in grid.trials if t.reason]
    return " ".join([f"{arm}: compared on {size}.", *lost])


def selection_table(data: ReportData) -> Table:
    """Reasons with a row, kept first, then by count."""
    total, meanings = sum(data.selection.values()), {str(reason): words for reason, words in MEANINGS.items()}
    order = sorted(data.selection.items(), key=lambda item: (item[0] != "kept", -item[1]))
    rows = (
        Row(
            Cell(reason, meanings.get(reason, "")),
            (*names(f"{num:,}", percent(num / total)), bar(num / total, "good" if reason == "kept" else "neutral")),
        )
        for reason, num in order
        if num
    )
    columns = names("Reason", "rows", "share", Cell("share as a bar", kind="wide"))
    return Table("Rows by reason", columns, (Group("", tuple(rows)),))


# --- blocks -------------------------------------------------------------------------------------------------


def candidate_table(data: ReportData) -> Table | None:
    """What `metric: best` compared, the chosen set first; None for other metrics."""
    plan = data.plan
    if plan is None or plan.compared is None:
        return None
    columns = names("Without blocks", "loss", "beyond the chosen", Cell("removed by", kind="text"))
    rows = tuple(
        Row(
            Cell(listed(one.blocks)),
            (
                Cell(nats(one.loss)),
                _nats(Estimate(one.beyond, one.stderr)),
                Cell("; ".join(one.metrics) or DASH, kind="text"),
            ),
            one.blocks == plan.removed_blocks,
        )
        for one in sorted(plan.candidates, key=lambda one: one.loss)
    )
    whole = Row(Cell("none"), (Cell(nats(plan.compared.whole_loss)), Cell(), Cell()))
    caption = f"Loss without candidates on {plan.compared.num_rows:,} calibration rows, in nats per response token"
    return Table(caption, columns, (Group("", (*rows, whole)),))


# --- surprise -----------------------------------------------------------------------------------------------


def gap_table(data: ReportData, tones: Mapping[str, str]) -> Table:
    """References and rewrites under every model, before training."""
    gap, columns = data.gap, names("Nats per token", "references", "rewrites", "gap")
    rows = tuple(
        Row(Cell(model, swatch=tones[model]), _surprise(texts["reference"], texts["distilled"], gap.gaps[model]))
        for model, texts in (gap.nll if gap else {}).items()
        if gap is not None
    )
    caption = "Negative log-likelihood of references and rewrites per model, in nats per token"
    return Table(caption, columns, (Group("", rows),))


def correction_table(data: ReportData) -> Table:
    """Both texts under the teacher, before and after its correction."""
    result, columns = data.correction, names("Nats per token", "before", "after", "change")
    rows = tuple(
        Row(Cell(name), _surprise(result.nll["teacher"][text], result.nll["corrected"][text], result.changes[text]))
        for text, name in (("reference", "references"), ("distilled", "its own rewrites"))
        if result is not None and result.nll
    )
    caption = "Negative log-likelihood of both texts under the teacher, before and after its correction"
    return Table(caption, columns, (Group("", rows),))


def _surprise(*figures: Estimate) -> tuple[Cell, ...]:
    return tuple(_nats(figure) for figure in figures)


def _nats(figure: Estimate) -> Cell:
    assert figure.value is not None
    return Cell(nats(figure.value), "" if figure.stderr is None else f"± {nats(figure.stderr)}", inline=True)


def forgetting_table(data: ReportData, tones: Mapping[str, str]) -> Table | None:
    """One row per model, one column per kind of text, then perplexity and answers; None where it was not measured."""
    result = data.forgetting
    if result is None:
        return None
    texts = [text for text in TEXTS if text in result.num_rows]
    columns = [Cell(TEXTS[text], f"{result.num_rows[text]:,} rows") for text in texts]
    if HELD_OUT in texts:
        columns.insert(1, Cell("perplexity", "× the teacher’s"))
    if result.kl:
        columns += [Cell("KL to the teacher", "nats per token"), Cell("99 % of tokens", "KL at most")]
    columns += [Cell("answers", "similarity")] if result.likeness else []
    rows = (Row(Cell(m, swatch=tones.get(m, "neutral")), tuple(_forgotten(result, m, texts))) for m in result.nll)
    caption = "Negative log-likelihood of held-out text, references and rewrites per model, in nats per token"
    return Table(caption, names("Model", *columns), (Group("", tuple(rows)),))


def _forgotten(result: Forgetting, model: str, texts: Sequence[str]) -> list[Cell]:
    excess = result.to_teacher.get(model, {})
    cells = [Cell(_with_error(result.nll[model][text], 3), _signed(excess.get(text))) for text in texts]
    if HELD_OUT in texts:
        ratio = result.perplexity_ratio.get(model, Estimate(None))
        # Decimals of a large ratio mean nothing.
        large = ratio.value is not None and ratio.value >= 1000
        cells.insert(1, Cell(count(ratio.known) if large else _with_error(ratio, 2)))
    if result.kl:
        far = result.kl.get(model)
        cells.append(Cell(_with_error(far.mean, 3) if far else DASH))
        low, high = (far.p99.low, far.p99.high) if far else (None, None)
        limits = "" if low is None or high is None else f"{number(low, 2)} to {number(high, 2)}"
        cells.append(Cell(number(far.p99.value, 2) if far and far.p99.value is not None else DASH, limits))
    if result.likeness:
        alike = result.likeness.get(model)
        low = f"5 % below {number(alike.low, 3)}" if alike and alike.low is not None else ""
        cells.append(Cell(_with_error(alike.mean if alike else Estimate(None), 3), low))
    return cells


def _with_error(figure: Estimate, digits: int) -> str:
    if figure.value is None:
        return DASH
    return number(figure.value, digits) + ("" if figure.stderr is None else f" ± {number(figure.stderr, digits)}")


def _signed(difference: Estimate | None) -> str:
    if difference is None:
        return ""
    return ("+" if difference.known >= 0.0005 else "") + _with_error(difference, 3)


# --- stages -------------------------------------------------------------------------------------------------


def stage_table(data: ReportData) -> Table:
    """Stages in order; bars are wall times over that of the longest."""
    longest = max((stage.wall_s for stage in data.stages), default=0.0) or 1.0
    rows = (
        Row(
            Cell(stage.name, tag="reused" if stage.skipped else ""),
            (
                bar(stage.wall_s / longest),
                Cell(seconds(stage.wall_s)),
                Cell(num_bytes(stage.peak_rss_bytes) if stage.peak_rss_bytes else DASH),
                Cell(count(stage.num_tokens) if stage.num_tokens else DASH),
                Cell(stage.address.rpartition("/")[2], kind="address"),
            ),
            tone="reused" if stage.skipped else "",
        )
        for stage in data.stages
    )
    columns = names(
        "Stage", Cell("wall time as a bar", kind="wide"), "wall time", "peak memory", "tokens",
        Cell("artifact", kind="address"),
    )  # fmt: skip
    return Table("Wall time, peak memory and tokens per stage", columns, (Group("", tuple(rows)),), "stages")
