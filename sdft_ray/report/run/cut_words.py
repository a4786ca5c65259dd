"""Words on how sure a choice of blocks is."""

from __future__ import annotations

from sdft_ray.report.run.model import Plan
from sdft_ray.report.toolbox.numbers import percent
from sdft_ray.report.toolbox.words import joined

UNITS = {
    "angular_distance": "angular distance",
    "block_influence": "sum of block influences",
    "perplexity": "nats per token without them",
    "best": "nats per token without them",
}
"""What the score of a removal is, by metric."""


def how_sure(plan: Plan) -> str:
    """Would other calibration rows have chosen the same?"""
    sure = plan.stability
    if sure is None:
        return ""
    unit = "nats per token" if plan.metric in {"perplexity", "best"} else UNITS.get(plan.metric, "")
    is_close = sure.difference <= 2 * sure.stderr
    edge = f"{_figure(sure.difference)} ± {_figure(sure.stderr)}"
    close = ", so the two cannot be told apart" if is_close else ""
    return (
        f" Of calibration sets drawn anew from its rows, {percent(sure.share, 0)} choose the same; next best "
        f"{'is block' if len(sure.runner_up) == 1 else 'are blocks'} {listed(sure.runner_up)}, "
        f"{edge} behind ({unit}){close}."
    )


def _figure(value: float) -> str:
    return f"{value:.3g}"


def listed(blocks: tuple[int, ...]) -> str:
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
