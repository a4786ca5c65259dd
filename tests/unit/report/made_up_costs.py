"""Forgetting and speed of the made-up run. None of the figures was measured."""

from __future__ import annotations

from sdft_ray.report.run.model import BatchSpeed, Compared, Forgetting, Likeness, Nats, Ratio, Speed, Spread


def by_text(text: float, reference: float, distilled: float, stderr: float) -> dict[str, Nats]:
    figures = {"text": text, "reference": reference, "distilled": distilled}
    return {name: Nats(value=value, stderr=stderr) for name, value in figures.items()}


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
        "pruned": Ratio(value=3.367, stderr=0.064),
        "sft": Ratio(value=2.153, stderr=0.032),
        "sdft": Ratio(value=1.271, stderr=0.011),
    },
    likeness={
        "pruned": Likeness(num_answers=1400, mean=Ratio(value=0.312, stderr=0.008), low=0.041, num_empty=12, num_cut=2),
        "sft": Likeness(num_answers=1400, mean=Ratio(value=0.745, stderr=0.006), low=0.288),
        "sdft": Likeness(num_answers=1400, mean=Ratio(value=0.931, stderr=0.003), low=0.702),
    },
    verdicts={
        "text": "Pruning made held-out text 1.214 ± 0.019 nats per token more surprising, and so on.",
        "reference": "Pruning made references 2.858 ± 0.019 nats per token more surprising, and so on.",
    },
)


def compared(teacher: float, pruned: float, speedup: float) -> Compared:
    """Quartiles one hundredth to either side."""
    spreads = [Spread(median=x, low=0.99 * x, high=1.01 * x) for x in (teacher, pruned, speedup)]
    return Compared(teacher=spreads[0], pruned=spreads[1], speedup=spreads[2])


SPEED = Speed(
    prompt_tokens=64,
    new_tokens=64,
    weight_bytes=(4_846_848, 3_337_984),
    batches=(
        BatchSpeed(
            batch_rows=1,
            prefill=compared(9_480, 13_650, 1.44),
            decode=compared(121, 167, 1.38),
            first_token=compared(0.00675, 0.00469, 1.44),
            kv_bytes=(780_288, 520_192),
            peak_bytes=(1_310_720, 1_179_648),
        ),
        BatchSpeed(
            batch_rows=16,
            prefill=compared(61_200, 89_900, 1.47),
            decode=compared(1_210, 1_742, 1.44),
            first_token=compared(0.01673, 0.01139, 1.47),
            kv_bytes=(12_484_608, 8_323_072),
            peak_bytes=(20_971_520, 18_874_368),
        ),
    ),
)
