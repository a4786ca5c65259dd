"""Rows of the page's tables, ready to print."""

from __future__ import annotations

from dataclasses import dataclass

from sdft_ray.report.run.model import PRUNED, Cost, Plan, ReportData, Score, Stage
from sdft_ray.report.run.words import Group, groups, mean_score, models
from sdft_ray.report.toolbox.diff import Piece, side_by_side
from sdft_ray.report.toolbox.numbers import change, count, num_bytes, percent, rate
from sdft_ray.report.toolbox.words import joined

MAX_SAMPLES = 12
MAX_CHARACTERS = 3000
"""Longer texts of a sample are cut, and say so."""

MEANINGS = {
    "kept": "the rewrite’s answer is that of the reference",
    "mismatch": "the answers differ",
    "no_answer": "the rewrite gives none",
    "no_reference_answer": "the reference gives none",
    "truncated": "cut off at the token limit",
    "empty": "nothing was written",
    "leaked_reference": "it speaks of the reference it was shown",
    "error": "it could not be sampled",
}
DATA_NOTES = {"reference": "trained on the references", "distilled": "trained on self-distilled responses"}


@dataclass(frozen=True)
class Tile:
    """One figure at the top of the page."""

    label: str
    figure: str
    note: str


def tiles(data: ReportData) -> list[Tile]:
    """Sizes and speed beside each other; recovery already stands in the headline."""
    shown: list[Tile] = []
    if data.sizes is not None:
        before, after = data.sizes.teacher, data.sizes.pruned
        figures = (
            ("Blocks", before.num_blocks, after.num_blocks, str),
            ("Parameters", before.num_parameters, after.num_parameters, count),
            ("Matmul FLOPs per token", before.matmul_flops_per_token, after.matmul_flops_per_token, count),
            ("KV cache per token", before.kv_bytes_per_token, after.kv_bytes_per_token, num_bytes),
        )
        shown += [Tile(label, change(was, now), f"{form(was)} → {form(now)}") for label, was, now, form in figures]
    if data.speed is not None:
        largest = data.speed.batches[-1]
        was, now = largest.decode.teacher.median, largest.decode.pruned.median
        note = f"{count(was)} → {count(now)} tokens/s"
        shown.append(Tile(f"Decoding, batch of {largest.batch_rows:,}", change(was, now), note))
    return shown


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
        said = []
        if cost.tokens_per_s is not None:
            said.append(f"{cost.tokens_per_s:,.0f} tokens/s")
        if cost.mfu is not None:
            said.append(f"{percent(cost.mfu)} of the devices’ peak (MFU)")
        if cost.peak_memory_bytes is not None:
            said.append(f"at most {num_bytes(cost.peak_memory_bytes)} per process")
        told = [", ".join(said), *data.training_notes.get(name, ())]
        if any(told):
            notes[name] = "; ".join(filter(None, told))
    return notes


def worst(data: ReportData) -> list[tuple[str, str, str]]:
    """Arm, recovery of its worst family, and that family ("" if unknown), for arms that say."""
    found = []
    for name in data.arm_names:
        part = data.recovery.get(name)
        if part is not None and part.min is not None:
            least = [task for task, ratio in part.tasks.items() if ratio.value == part.min]
            found.append((name, percent(part.min), least[0] if least else ""))
    return found


@dataclass(frozen=True)
class ScoreRow:
    """One family, or a mean (`strong`); scores in the order of `score_models`, None where unknown."""

    name: str
    scores: tuple[Score | None, ...]
    strong: bool = False


@dataclass(frozen=True)
class ScoreGroup:
    name: str
    rows: tuple[ScoreRow, ...]


def score_models(data: ReportData) -> tuple[str, ...]:
    """The columns of the table of scores."""
    return tuple(model for model in models(data) if model in data.scores)


def score_groups(data: ReportData) -> list[ScoreGroup]:
    """Families in groups, each with its mean, then the mean over all; empty without scores."""
    names = score_models(data)
    if not names:
        return []

    def mean(name: str, group: Group) -> ScoreRow:
        return ScoreRow(name, tuple(mean_score(data, model, group.tasks) for model in names), strong=True)

    shown = []
    for group in groups(data):
        rows = [ScoreRow(task, tuple(data.scores[model].get(task) for model in names)) for task in group.tasks]
        if group.name and len(rows) > 1:
            rows.append(mean("mean", group))
        shown.append(ScoreGroup(group.name, tuple(rows)))
    shown.append(ScoreGroup("", (mean("mean of all", Group("", data.tasks)),)))
    return shown


def num_items(data: ReportData) -> str:
    """How many items each family has: "200", "100 to 200", or "" where unknown."""
    counts = {score.n for scores in data.scores.values() for score in scores.values() if score.n}
    if not counts:
        return ""
    return f"{max(counts):,}" if len(counts) == 1 else f"{min(counts):,} to {max(counts):,}"


@dataclass(frozen=True)
class SizeRow:
    name: str
    before: str
    after: str
    change: str
    share: float


def size_rows(data: ReportData) -> list[SizeRow]:
    """Counts before and after; empty without sizes."""
    if data.sizes is None:
        return []
    before, after = data.sizes.teacher, data.sizes.pruned
    figures = (
        ("Decoder blocks", before.num_blocks, after.num_blocks, str),
        ("Parameters", before.num_parameters, after.num_parameters, count),
        ("Matmul FLOPs per token", before.matmul_flops_per_token, after.matmul_flops_per_token, count),
        ("KV cache per token", before.kv_bytes_per_token, after.kv_bytes_per_token, num_bytes),
        ("Weights", before.weight_bytes, after.weight_bytes, num_bytes),
    )
    return [SizeRow(name, form(was), form(now), change(was, now), now / was) for name, was, now, form in figures]


@dataclass(frozen=True)
class SelectionRow:
    reason: str
    meaning: str
    count: str
    share: float


def selection_rows(data: ReportData) -> list[SelectionRow]:
    """Reasons with a row, kept first, then by count."""
    total = sum(data.selection.values())
    order = sorted(data.selection.items(), key=lambda item: (item[0] != "kept", -item[1]))
    return [SelectionRow(name, MEANINGS.get(name, ""), f"{n:,}", n / total) for name, n in order if n]


@dataclass(frozen=True)
class SampleRow:
    example_id: str
    family: str
    instruction: str
    reason: str
    left: list[Piece]
    right: list[Piece]


def sample_rows(data: ReportData) -> list[SampleRow]:
    """At most `MAX_SAMPLES` rows, with what only the reference or only the rewrite says marked."""
    rows = []
    for sample in data.samples[:MAX_SAMPLES]:
        left, right = side_by_side(_cut(sample.reference), _cut(sample.distilled))
        instruction = _cut(sample.instruction)
        rows.append(SampleRow(sample.example_id, sample.family, instruction, sample.reason, left, right))
    return rows


def _cut(text: str) -> str:
    text = text.strip()
    if len(text) <= MAX_CHARACTERS:
        return text
    return f"{text[:MAX_CHARACTERS]} … ({len(text) - MAX_CHARACTERS:,} more characters)"


@dataclass(frozen=True)
class StageRow:
    stage: Stage
    share: float


def stage_rows(data: ReportData) -> list[StageRow]:
    """Stages in order; `share` is wall time over that of the longest."""
    longest = max((stage.wall_s for stage in data.stages), default=0.0) or 1.0
    return [StageRow(stage, stage.wall_s / longest) for stage in data.stages]


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
    told = [f"Step {n}: {removed_words(plan)}" for n, plan in enumerate((*data.earlier, data.plan), 1)]
    return f"{' '.join(told)} Each step counts the blocks of the model that the one before it left, recovered."


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
    return f"{_removed_blocks(plan)}{narrower}{mended}"


def _removed_blocks(plan: Plan) -> str:
    removed = plan.removed_blocks
    if not removed:
        return f"All {plan.num_blocks} blocks stayed."
    tokens = {"last": " at the last token", "mean": ", mean over all tokens"}.get(plan.position, "")
    rule = {
        "angular_distance": f"the run of {len(removed)} with the smallest angular distance{tokens}",
        "block_influence": "those of the lowest block influence",
        "perplexity": "without which the calibration set surprises the model least",
        "tail": "the last ones",
        "first": "the first ones",
        "random": "drawn at random",
        "explicit": "as the recipe lists them",
    }.get(plan.metric, plan.metric)
    subject, verb = ("Block", "was") if len(removed) == 1 else ("Blocks", "were")
    reason = f": {rule}" if rule else ""
    return f"{subject} {_listed(removed)} of {plan.num_blocks} {verb} removed{reason}."


def _listed(blocks: tuple[int, ...]) -> str:
    """0, 3 to 6 and 9."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    parts = []
    for first, last in runs:
        parts += [f"{first} to {last}"] if last > first + 1 else [str(block) for block in range(first, last + 1)]
    return joined(parts)
