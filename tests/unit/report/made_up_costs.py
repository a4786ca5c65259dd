"""Forgetting and speed of the made-up run. None of the figures was measured."""

from __future__ import annotations

from sdft_ray.evaluation.forgetting import Likeness
from sdft_ray.evaluation.rounds import BatchSpeed, ModelSpeed, Summary, over_rounds
from sdft_ray.report.run.model import Forgetting, Speed
from sdft_ray.statistics.estimate import Estimate


def by_text(text: float, reference: float, distilled: float, stderr: float) -> dict[str, Estimate]:
    figures = {"text": text, "reference": reference, "distilled": distilled}
    return {name: Estimate(value=value, stderr=stderr) for name, value in figures.items()}


FORGETTING = Forgetting(
    held_out=True,
    num_rows={"text": 256, "reference": 88, "distilled": 88},
    nll={
        "teacher": by_text(2.104, 0.413, 0.013, 0.041),
        "pruned": by_text(3.318, 3.271, 2.902, 0.052),
        "sft": by_text(2.871, 0.302, 0.644, 0.047),
        "sdft": by_text(2.344, 0.518, 0.061, 0.043),
    },
    to_teacher={
        "pruned": by_text(1.214, 2.858, 2.889, 0.019),
        "sft": by_text(0.767, -0.111, 0.631, 0.015),
        "sdft": by_text(0.24, 0.105, 0.048, 0.009),
    },
    to_pruned={
        "sft": by_text(-0.447, -2.969, -2.258, 0.013),
        "sdft": by_text(-0.974, -2.753, -2.841, 0.012),
    },
    perplexity_ratio={
        "pruned": Estimate(value=3.367, stderr=0.064),
        "sft": Estimate(value=2.153, stderr=0.032),
        "sdft": Estimate(value=1.271, stderr=0.011),
    },
    likeness={
        "pruned": Likeness(1400, Estimate(value=0.312, stderr=0.008), low=0.041, num_empty=12, num_cut=2),
        "sft": Likeness(1400, Estimate(value=0.745, stderr=0.006), low=0.288),
        "sdft": Likeness(1400, Estimate(value=0.931, stderr=0.003), low=0.702),
    },
    verdicts={
        "text": "Pruning made held-out text 1.214 ± 0.019 nats per token more surprising, and so on.",
        "reference": "Pruning made references 2.858 ± 0.019 nats per token more surprising, and so on.",
    },
)


def steady(value: float) -> Summary:
    """The same in all rounds."""
    return over_rounds([value] * 3)


def wavering(value: float) -> Summary:
    """Quartiles three quarters of a hundredth to either side."""
    return over_rounds([0.985 * value, value, 1.015 * value])


SPEED = Speed(
    prompt_tokens=64,
    new_tokens=64,
    teacher=ModelSpeed(
        4_846_848,
        (
            BatchSpeed(1, steady(9_480), steady(121), wavering(0.00675), 780_288, 1_310_720),
            BatchSpeed(16, steady(61_200), steady(1_210), wavering(0.01673), 12_484_608, 20_971_520),
        ),
    ),
    pruned=ModelSpeed(
        3_337_984,
        (
            BatchSpeed(1, wavering(13_650), wavering(167), steady(0.00469), 520_192, 1_179_648),
            BatchSpeed(16, wavering(89_900), wavering(1_742), steady(0.01139), 8_323_072, 18_874_368),
        ),
    ),
)
