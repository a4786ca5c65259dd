"""The result of a run in a terminal: scores, recovery, and a line each on size, gap and choices.

Loads neither torch nor jinja.
"""

from __future__ import annotations

from rich.text import Text

from sdft_ray.evaluation import rounds
from sdft_ray.evaluation.release import Judgement
from sdft_ray.report.run.engines import engines_warnings
from sdft_ray.report.run.model import TEACHER, Grid, ReportData
from sdft_ray.report.run.words import (
    about_means,
    beyond_chance,
    groups,
    mean_score,
    models,
    percents,
    ranked_arms,
    warnings,
)  # fmt: skip
from sdft_ray.report.toolbox.numbers import THIN, change, count, nats, rate
from sdft_ray.report.toolbox.table import Cell, Fitting, Group, Row, Table, estimate, for_terminal, names, without_notes

MAX_REASONS = 2
"""Reasons why a student is not releasable that are printed; the report has all."""


def result_table(data: ReportData) -> Fitting:
    """One row per family, then means and recovery; one column per model. All in per cent.

    Too narrow a terminal first loses the standard errors, then the families.
    """
    if not models(data):
        return Fitting([])
    whole, note, means = _by_family(data), "Per cent, ± one standard error.", about_means(data)
    shapes = [
        (whole, f"{note} {means}".strip()),
        (without_notes(whole), f"Per cent. {means}".strip()),
        (_by_model(data), f"{note} Families are in the report. {means}".strip()),
    ]
    return Fitting((for_terminal(table), words) for table, words in shapes)


def _by_family(data: ReportData) -> Table:
    columns, parts = models(data), groups(data)
    best = next((name for name, _ in ranked_arms(data)), "")

    def mean(title: str, tasks: tuple[str, ...]) -> Row:
        return Row(Cell(title), tuple(estimate(mean_score(data, name, tasks)) for name in columns), strong=True)

    shown = []
    for group in parts:
        rows = [
            Row(
                Cell(task),
                tuple(
                    estimate(data.scores.get(name, {}).get(task), is_share=task not in data.not_averaged)
                    for name in columns
                ),
            )
            for task in group.tasks
        ]
        if len(parts) > 1:
            rows.append(mean(f"mean, {group.name.lower().removesuffix(' families')}", group.tasks))
        shown.append(Group("", tuple(rows)))
    recovery = Row(Cell("recovery"), tuple(_recovery(data, name, best) for name in columns), strong=True)
    last = (mean("mean", data.tasks), recovery)
    if len(parts) > 1:
        shown.append(Group("", last))
    else:
        shown = [Group("", (*(row for group in shown for row in group.rows), *last))]
    return Table("", names("", *columns), tuple(shown))


def _by_model(data: ReportData) -> Table:
    """For many arms: one row per model."""
    best = next((name for name, _ in ranked_arms(data)), "")
    rows = (
        Row(
            Cell(name, tone="best" if name == best else ""),
            (estimate(mean_score(data, name, data.tasks)), _recovery(data, name, "")),
        )
        for name in models(data)
    )
    return Table("", names("", "mean", "recovery"), (Group("", tuple(rows)),))


def _recovery(data: ReportData, name: str, best: str) -> Cell:
    cell = estimate(data.recovery[name].mean if name in data.recovery else None)
    return Cell(cell.text, cell.note, tone="best" if name == best else "")


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
        sizes = ", ".join(f"{was.batch_rows:,}" for was, _ in batches)
        decoding = ", ".join(f"{rounds.ratio(now.decode, was.decode).median:.2f}" for was, now in batches)
        first = ", ".join(f"{rounds.ratio(was.first_token_s, now.first_token_s).median:.2f}" for was, now in batches)
        lines.append(f"Measured with {sizes} sequences: decoding {decoding} ×, first token {first} ×")
    return Text("\n".join(lines).replace(THIN, " "))


def release_lines(data: ReportData) -> list[Text]:
    """Whether each student may be released or why not, what became worse than after pruning, and warnings.

    sft: not releasable. Mean recovery is 74.6 % (95 % interval 72.3 to 76.8 %), below the bound of 85.0 %.
    Worse than after pruning alone, beyond chance: sft on facts: −9.0 points (−14.1 to −4.2).
    """
    lines = [_judged(name, judgement) for name, judgement in data.retention.judgements.items()]
    if worse := beyond_chance(data.retention):
        lines.append(Text(worse))
    told = [*warnings(data), *engines_warnings(data)]
    return [*lines, *(Text(f"Warning: {warning}", style="yellow") for warning in told)]


def _judged(name: str, judgement: Judgement) -> Text:
    if judgement.releasable:
        return Text(f"{name}: ").append("releasable", style="green")
    reasons, more = " ".join(judgement.reasons[:MAX_REASONS]), len(judgement.reasons) - MAX_REASONS
    rest = f" {more} more in the report." if more > 0 else ""
    return Text(f"{name}: ").append("not releasable", style="red").append(f". {reasons}{rest}")


def flip_lines(data: ReportData) -> list[Text]:
    """What a difference of means hides, a line for each student.

    sft: of 1,400 items 9.3 % (7.9 to 10.9 %) went from right to wrong and 4.1 % (3.2 to 5.3 %) back, ...
    """
    lines = []
    for name, card in data.retention.students.items():
        if card.flips is not None:
            lost, gained = (
                f"{100 * (part.value or 0.0):.1f} % ({percents(part)})"
                for part in (card.flips.right_to_wrong, card.flips.wrong_to_right)
            )
            went = f"{lost} went from right to wrong and {gained} back, against the teacher"
            lines.append(Text(f"{name}: of {card.flips.num_items:,} items {went}"))
    return lines


def divergence_line(data: ReportData) -> Text:
    """KL to the teacher on its own answers, nats per token: pruned 0.912 ± 0.021 (99 % of tokens below 6.2), ..."""
    known = data.forgetting.kl if data.forgetting else {}
    if not known:
        return Text("")
    parts = []
    for name, far in known.items():
        error = "" if far.mean.stderr is None else f" ± {nats(far.mean.stderr)}"
        parts.append(f"{name} {nats(far.mean.known)}{error} (99 % of tokens below {nats(far.p99.value or 0.0)})")
    held_out = "held-out " if data.forgetting and data.forgetting.held_out else ""
    return Text(f"KL to the teacher on its own {held_out}answers, nats per token: {', '.join(parts)}")


def gap_line(data: ReportData) -> Text:
    """Teacher: references 0.413, its rewrites 0.013 nats per token, gap 0.400 ± 0.021; "" without figures."""
    if data.gap is None:
        return Text("")
    if TEACHER not in data.gap.nll:
        return Text("No rewrite was kept, so references and rewrites cannot be compared.")
    texts, gap = data.gap.nll[TEACHER], data.gap.gaps[TEACHER]
    reference, distilled = (nats(texts[text].known) for text in ("reference", "distilled"))
    error = "" if gap.stderr is None else f" ± {nats(gap.stderr)}"
    means = f"references {reference}, its rewrites {distilled} nats per token"
    return Text(f"Teacher: {means}, gap {nats(gap.known)}{error}")


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
