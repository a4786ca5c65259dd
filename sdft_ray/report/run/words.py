"""What the page and the terminal say of a run: means over families, verdicts, warnings, and short notes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from sdft_ray.evaluation.card import Card, TaskCard
from sdft_ray.models.size import ModelSize
from sdft_ray.report.run.cut_words import how_sure, listed
from sdft_ray.report.run.model import (
    PATCHED,
    PRUNED,
    TEACHER,
    BestVsNext,
    Cost,
    Plan,
    ReportData,
    Retention,
    Truncation,
)
from sdft_ray.report.toolbox.numbers import (
    change,
    count,
    num_bytes,
    number,
    percent,
    percent_error,
    plain,
    points,
    rate,
)  # fmt: skip
from sdft_ray.report.toolbox.words import Words, joined
from sdft_ray.statistics.estimate import Estimate, Interval


@dataclass(frozen=True)
class Group:
    """Families that are read together."""

    name: str
    tasks: tuple[str, ...]


_FEW = 0.25
"""Share of kept rewrites below which a reader is warned."""
TUNED, OFF_DOMAIN = "Tuned families", "Off-domain"


def groups(data: ReportData) -> tuple[Group, ...]:
    """Tuned families apart from all others; one unnamed group where all are of one kind."""
    tuned = tuple(task for task in data.tasks if task in data.tuned_families)
    others = tuple(task for task in data.tasks if task not in data.tuned_families)
    if tuned and others:
        return Group(TUNED, tuned), Group(OFF_DOMAIN, others)
    return (Group("", data.tasks),) if data.tasks else ()


def mean_score(data: ReportData, model: str, tasks: Sequence[str]) -> Estimate | None:
    """Plain mean over the tasks that can be averaged, with the standard error of independent tasks; None unless all are
    known."""
    result = [data.scores.get(model, {}).get(task) for task in tasks if task not in data.not_averaged]
    known = [score for score in result if score is not None]
    if not known or len(known) < len(result):
        return None
    errors = [score.stderr for score in known if score.stderr is not None]
    stderr = math.sqrt(sum(error**2 for error in errors)) / len(known) if len(errors) == len(known) else None
    return Estimate(sum(score.known for score in known) / len(known), stderr)


def about_means(data: ReportData) -> str:
    """What means leave out and why, and whose scores were brought to shares; "" where there is nothing to say."""
    words = []
    if data.not_averaged:
        words.append(f"Not in the means: {joined([f'{task} ({why})' for task, why in data.not_averaged.items()])}.")
    words += [f"{metric} of {task} is shown as a share of {scale:g}." for task, (metric, scale) in data.scales.items()]
    return " ".join(words)


def models(data: ReportData) -> tuple[str, ...]:
    """All models that have scores or a recovery: teacher, pruned, then arms."""
    known = dict.fromkeys((TEACHER, PRUNED, *data.arm_names))
    return tuple(name for name in known if name in data.scores or name in data.recovery)


def ranked_arms(data: ReportData) -> list[tuple[str, Estimate]]:
    """Arms with a known mean recovery, the best first."""
    means = [(name, data.recovery[name].mean) for name in data.arm_names if name in data.recovery]
    known = [(name, mean) for name, mean in means if mean.value is not None]
    return sorted(known, key=lambda pair: -(pair[1].known))


def verdict(data: ReportData) -> list[Words]:
    """One sentence with the figures that matter: size and recovery per arm, each with its standard error."""
    size: list[Words] = []
    if data.sizes is not None:
        before, after = data.sizes.teacher.num_parameters, data.sizes.pruned.num_parameters
        size = [Words(f"{percent(1 - after / before)} fewer parameters", strong=True)]
    recovered = ranked_arms(data)
    if not recovered:
        return [*size, Words("; no student was evaluated." if size else "No student was evaluated.")]
    if PRUNED in data.recovery:
        recovered.append((PRUNED, data.recovery[PRUNED].mean))
    pieces = [Words("With "), *size, Words(", ")] if size else []
    for position, (name, mean) in enumerate(recovered):
        if position:
            pieces.append(Words(" and " if position == len(recovered) - 1 else ", "))
        who = "the untuned pruned model" if name == PRUNED else name
        pieces.append(Words(f"{who} recovers " if position == 0 else f"{who} "))
        pieces.append(Words(percent_error(mean.value, mean.stderr), strong=True, model=name))
        if position == 0:
            pieces.append(Words(" of the teacher’s mean score"))
    return [*pieces, Words(".")]


def overlap(data: ReportData) -> str:
    """What became of seed rows that share words with a test question, in a sentence; "" where nothing is known."""
    result = data.decontamination
    if result is None:
        return ""
    if not result.ngram:
        return f"The {result.num_rows:,} seed rows were not compared with the test questions."
    num = result.num_contaminated
    share, hold, were = ("shares", "holds", "was") if num == 1 else ("share", "hold", "were")
    sentence = (
        f"{num:,} of {result.num_rows:,} seed rows {share} {result.ngram} words in a row with one of the "
        f"{result.num_questions:,} test questions, or {hold} a shorter one whole"
    )
    return f"{sentence}, and {were} left out." if num else f"{sentence}."


def rows_read(data: ReportData) -> list[str]:
    """How the rows of each set were read and which were left out, in one paragraph for each such set."""
    return [f"{name.capitalize()}: {' '.join(sentences)}" for name, sentences in data.rows_read.items()]


def warnings(data: ReportData) -> list[str]:
    """What a reader must know before believing the verdict."""
    failed = [f"The gate “{gate.name}” does not hold ({gate.bound})." for gate in data.gates if not gate.passed]
    unknown = (not_comparable(name, why) for name, why in data.retention.incomparable.items())
    return [*failed, *unknown, *_few_kept(data.selection), *_truncated(data.truncation)]


def _few_kept(selection: Mapping[str, int]) -> list[str]:
    """A warning where most rows of a distilled set are references after all."""
    num_rows, num_kept = sum(selection.values()), selection.get("kept", 0)
    if not selection or num_kept >= _FEW * num_rows:
        return []
    return [
        f"Selection kept {num_kept:,} of {num_rows:,} rewrites: students of distilled data are trained on references "
        "for all other rows."
    ]


def not_comparable(name: str, why: str) -> str:
    """A sentence on a student that has no retention card."""
    return f"What {name} kept cannot be told: {why}."


# --- what was kept ------------------------------------------------------------------------------------------


def is_share(task: TaskCard) -> bool:
    """Whether scores are shares of something good, which are shown in per cent."""
    values = [score.value for score in (task.teacher, task.pruned, task.student)]
    return task.not_averaged is None and all(value is None or 0 <= value <= 1 for value in values)


def difference(value: float | None, *, is_share: bool = True) -> str:
    """−3.5 in points of a hundred, or in units of a metric that is not a share; a dash where it is unknown."""
    if value is None:
        return "–"
    return points(value) if is_share else f"{'+' if value > 0 else ''}{plain(value)}"


def interval(result: Interval | None, *, is_share: bool = True) -> str:
    """−6.0 to −1.0; "" where it is unknown."""
    if result is None or result.low is None or result.high is None:
        return ""
    return " to ".join(difference(end, is_share=is_share) for end in (result.low, result.high))


def percents(result: Interval) -> str:
    """8.1 to 10.6 %: the limits of a share."""
    return f"{100 * (result.low or 0.0):.1f} to {100 * (result.high or 0.0):.1f} %"


def reversals(name: str, card: Card) -> list[tuple[str, bool]]:
    """Sentences on tasks where a student is worse than the pruned model: beyond chance (True), then within it."""
    tasks = {task.task: task for task in card.tasks}
    by_kind = {
        sure: [_gap(tasks[r.task]) for r in card.reversals if r.is_beyond_chance is sure]
        for sure in (True, False, None)
    }
    what = "Patching" if name == PATCHED else "Fine-tuning"
    starts = {
        True: f"{what} made it worse than pruning alone on",
        False: "Worse as well, but within chance:"
        if by_kind[True]
        else "Worse than after pruning alone, but within chance:",
        None: "Worse, and without values per item it cannot be told whether by chance:",
    }
    return [(f"{starts[sure]} {'; '.join(gaps)}.", bool(sure)) for sure, gaps in by_kind.items() if gaps]


def _gap(task: TaskCard) -> str:
    """lab_lists: −3.5 points (−6.0 to −1.0)."""
    comparison, as_share = task.from_pruned, is_share(task)
    ends = interval(comparison.interval, is_share=as_share)
    unit = " points" if as_share else ""
    return f"{task.task}: {difference(comparison.difference, is_share=as_share)}{unit}{f' ({ends})' if ends else ''}"


def beyond_chance(retention: Retention) -> str:
    """All students' tasks that became worse beyond chance, in one sentence; "" where there is none."""
    worse = [
        f"{name} on {_gap(task)}"
        for name, card in retention.students.items()
        for task in card.tasks
        if any(reversal.task == task.task and reversal.is_beyond_chance for reversal in card.reversals)
    ]
    return f"Worse than after pruning alone, beyond chance: {'; '.join(worse)}." if worse else ""


def released(retention: Retention) -> str:
    """Which students meet the release bounds of the recipe; "" where it has none."""
    good = [name for name, judgement in retention.judgements.items() if judgement.releasable]
    bad = [name for name in retention.judgements if name not in good]
    if not good and not bad:
        return ""
    if not good:
        verb = "misses" if len(bad) == 1 else "miss"
        return f"Not releasable: {joined(bad)} {verb} the release bounds of the recipe."
    return f"Releasable: {joined(good)}.{f' Not releasable: {joined(bad)}.' if bad else ''}"


def comparison(lead: BestVsNext | None) -> str:
    """Whether the best two arms differ beyond chance, paired by item; "" with fewer than two, or without items."""
    if lead is None or lead.difference.value is None or lead.difference.low is None:
        return ""
    gap = f"{number(100 * lead.difference.value, 1)} points ({interval(lead.difference)})"
    if lead.difference.low > 0:
        return f"{lead.best} is ahead of {lead.next_best} by {gap} of the mean score."
    return f"{lead.best} and {lead.next_best} cannot be told apart: their mean scores differ by {gap}."


def _truncated(result: Truncation | None) -> list[str]:
    """One warning for each task whose prompts lost their beginning."""
    if result is None:
        return []
    of = f" of {result.context_tokens:,} tokens" if result.context_tokens else ""
    return [
        f"{task}: {num:,} {'requests' if num != 1 else 'request'} lost the beginning of "
        f"{'their' if num != 1 else 'its'} prompt: the context{of} is too short."
        for task, num in result.tasks.items()
    ]


# --- notes on models and figures ----------------------------------------------------------------------------

DATA_NOTES = {"reference": "trained on the references", "distilled": "trained on self-distilled responses"}


_SIZES: tuple[tuple[str, str, Callable[[float], str]], ...] = (
    ("Decoder blocks", "num_blocks", str),
    ("Parameters", "num_parameters", count),
    ("Matmul FLOPs per token", "matmul_flops_per_token", count),
    ("KV cache per token", "kv_bytes_per_token", num_bytes),
    ("Weights", "weight_bytes", num_bytes),
)


def size_rows(teacher: ModelSize, pruned: ModelSize) -> list[tuple[str, str, str, str, float]]:
    """Name, before, after, change, and after as a share of before, as the report and `sdft explain` show them."""
    pairs = [(getattr(teacher, field), getattr(pruned, field)) for _, field, _ in _SIZES]
    return [
        (name, form(was), form(now), change(was, now), now / was)
        for (name, _, form), (was, now) in zip(_SIZES, pairs, strict=True)
    ]


def tiles(data: ReportData) -> list[tuple[str, str, str]]:
    """Label, change and note of sizes and speed; recovery is in the headline."""
    sizes = size_rows(data.sizes.teacher, data.sizes.pruned)[:4] if data.sizes else []
    rows = [(name, less, f"{was} → {now}") for name, was, now, less, _ in sizes]
    if data.speed is not None:
        batch, pruned = data.speed.batches[-1]
        was, now = batch.decode.median, pruned.decode.median
        note = f"{count(was)} → {count(now)} tokens/s"
        rows.append((f"Decoding, batch of {batch.batch_rows:,}", change(was, now), note))
    return rows


def arm_notes(data: ReportData) -> dict[str, str]:
    """Arm -> what it was trained on, in words."""
    notes = {PRUNED: "not tuned"}
    for name, arm in data.arms.items():
        note = DATA_NOTES.get(arm.data, arm.data)
        note = f"{note} by {arm.objective}" if arm.objective else note
        note = note if arm.num_rows is None else f"{note}, {arm.num_rows:,} rows"
        if arm.learning_rate is not None:
            note = f"{note}, learning rate {rate(arm.learning_rate)}"
        notes[name] = f"{note}, the best of {len(data.grids[name].trials)} trials" if name in data.grids else note
    return notes


def cost_notes(data: ReportData) -> dict[str, str]:
    """Arm -> tokens per second, MFU and memory of its training, and what went wrong, in words; arms of which nothing
    is known are absent."""
    notes = {}
    for name in data.loss_curves:
        cost = data.training_costs.get(name, Cost())
        parts = []
        if cost.tokens_per_s is not None:
            parts.append(f"{cost.tokens_per_s:,.0f} tokens/s")
        if cost.mfu is not None:
            parts.append(f"{percent(cost.mfu)} of the devices’ peak (MFU)")
        if cost.peak_memory_bytes is not None:
            parts.append(f"at most {num_bytes(cost.peak_memory_bytes)} per process")
        words = [", ".join(parts), *data.training_notes.get(name, ())]
        if any(words):
            notes[name] = "; ".join(filter(None, words))
    return notes


def worst(data: ReportData) -> list[tuple[str, str, str]]:
    """Arm, recovery of its worst family, and that family, for arms where it is known."""
    known = ((name, data.recovery[name]) for name in data.arm_names if name in data.recovery)
    return [(name, percent(part.min.value), part.min_task or "") for name, part in known if part.min.value is not None]


def similarity(data: ReportData) -> str:
    """How answers were compared with the teacher's, "" where they were not; all models answer the same items."""
    likeness = data.forgetting.likeness if data.forgetting else {}
    if not likeness:
        return ""
    answers = max(part.num_answers for part in likeness.values())
    if not answers:
        return "No task asked for a written answer, so there is none to compare with the teacher’s."
    what = "the cosine between sentence embeddings of a model’s answer and the teacher’s"
    parts = [f"Similarity is {what}, over {answers:,} items"]
    for name, what in (
        ("num_empty", "an answer is empty"),
        ("num_cut", "one is longer than the embedding model reads"),
    ):
        if most := max(getattr(part, name) for part in likeness.values()):
            parts.append(f"for at most {most:,} {what}")
    return f"{'; '.join(parts)}."


# --- what was removed ---------------------------------------------------------------------------------------

_SPACE_WORDS = {
    "hidden": "hidden channels",
    "mlp": "MLP channels",
    "heads": "query heads",
    "kv_groups": "key-value groups",
}


def pruning_words(data: ReportData) -> str:
    """What was removed in all steps; "" without a plan."""
    if data.plan is None:
        return ""
    if not data.earlier:
        return removed_words(data.plan)
    steps = [f"Step {n}: {removed_words(plan)}" for n, plan in enumerate((*data.earlier, data.plan), 1)]
    return f"{' '.join(steps)} Each step counts the blocks of the model that the one before it left, recovered."


def removed_words(plan: Plan) -> str:
    """What was removed and by which rule, in a sentence or two."""
    kept = [f"{part:,} of {whole:,} {_SPACE_WORDS.get(space, space)}" for space, (part, whole) in plan.widths.items()]
    narrower = f" The most active stayed: {joined(kept)}." if kept else ""
    patches = [f"{100 * before:.3g} to {100 * after:.3g} % (block {block})" for block, before, after in plan.residuals]
    mended = (
        f" A linear map brings the stream behind the cut nearer, from {joined(patches)} of its square."
        if patches
        else ""
    )
    return f"{_removed_blocks(plan)}{how_sure(plan)}{narrower}{mended}"


def _removed_blocks(plan: Plan) -> str:
    removed = plan.removed_blocks
    if not removed:
        return f"All {plan.num_blocks} blocks stayed."
    tokens = {"last": " at the last token", "mean": ", mean over all tokens"}.get(plan.position, "")
    rule = {
        "angular_distance": f"the run of {len(removed)} with the smallest angular distance{tokens}",
        "block_influence": "those of the lowest block influence",
        "perplexity": "without which the calibration set surprises the model least",
        "best": "of what all metrics would remove, that which raises the loss on calibration responses least",
        "tail": "the last ones",
        "first": "the first ones",
        "random": "drawn at random",
        "explicit": "as the recipe lists them",
    }.get(plan.metric, plan.metric)
    subject, verb = ("Block", "was") if len(removed) == 1 else ("Blocks", "were")
    reason = f": {rule}" if rule else ""
    return f"{subject} {listed(removed)} of {plan.num_blocks} {verb} removed{reason}."
