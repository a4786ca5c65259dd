"""Would other calibration rows have chosen the same blocks? Bootstrap over parts of the calibration set.

Parts are groups of rows, or single rows: units that are independent of each other, as tokens of a row are not. With
sums x_k and weights w_k of K parts the score is sum x / sum w, a ratio. A resample draws K parts with replacement
(Efron, 1979); 1,000 of them with a fixed seed. The bootstrap's standard error over K units is too small by the factor
sqrt((K - 1) / K), which is taken out.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

_NUM_DRAWS = 1000


@dataclass(frozen=True)
class Stability:
    """How sure a choice is.

    `share`: of resamples of the `num_parts` parts, in [0, 1], that choose the same blocks. `runner_up`: the set that
    is next; it scores `difference` >= 0 more than the chosen one (lower is better), with the standard error `stderr`.
    """

    share: float
    runner_up: tuple[int, ...]
    difference: float
    stderr: float
    num_parts: int


def stability(
    sums_KS: Sequence[Sequence[float]], weights_K: Sequence[float], options: Sequence[Sequence[int]], count: int = 1
) -> Stability | None:
    """Of the choice of the `count` options with the lowest scores, the first of equals; their blocks are removed.

    `options` are S sets of blocks. Parts without weight say nothing. None with fewer than two parts, or where all
    options are chosen.
    """
    weights = np.asarray(weights_K, dtype=np.float64)
    sums = np.asarray(sums_KS, dtype=np.float64)[weights > 0]
    weights = weights[weights > 0]
    num_parts = len(weights)
    if num_parts < 2 or len(options) <= count:
        return None
    order = np.argsort(sums.sum(0), kind="stable")
    drawn_DK = np.random.default_rng(0).multinomial(num_parts, np.full(num_parts, 1 / num_parts), size=_NUM_DRAWS)
    scores_DS = (drawn_DK @ sums) / (drawn_DK @ weights)[:, None]
    chosen = np.sort(np.argsort(scores_DS, axis=1, kind="stable")[:, :count], axis=1)
    last, following = order[count - 1], order[count]
    moves_D = scores_DS[:, following] - scores_DS[:, last]
    swapped = [*order[: count - 1], following]
    return Stability(
        share=float((chosen == np.sort(order[:count])).all(1).mean()),
        runner_up=tuple(sorted(block for number in swapped for block in options[number])),
        difference=float((sums[:, following] - sums[:, last]).sum() / weights.sum()),
        stderr=float(moves_D.std(ddof=1) * (num_parts / (num_parts - 1)) ** 0.5),
        num_parts=num_parts,
    )
