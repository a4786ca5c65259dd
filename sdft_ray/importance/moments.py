"""Streaming sums over a calibration set, merged by `+`, and the scores computed from them. Needs no torch.

Index base: block l is 0-based, boundary l is the input of block l, boundary L (after L blocks) is the output
of the last block before the final norm.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from sdft_ray.errors import DataError, ModelError


@dataclass(frozen=True)
class DepthScores:
    """Importance scores of the runs of blocks of a model with L blocks, averaged over a calibration set.

    `angular_last_LN[n - 1][l]` is the angular distance in [0, 1] between the inputs of blocks l and l + n at
    the last non-pad token, averaged over sequences (arXiv:2403.17887): the smaller, the less is lost by
    removing blocks [l, l + n). Rows n = 1..L-1, columns l = 0..L-1; None where l + n > L.
    `angular_mean_LN` is the same distance at every non-pad token, averaged over all tokens of the set, so that a
    long sequence has more weight: less noisy on small sets.
    `block_influence_L[l]` is 1 - mean cosine(input, output of block l) over all tokens, in [0, 2]
    (arXiv:2403.03853).
    `zero_tokens`: name of a token -> positions that no mean includes, because a hidden state is all zero there (most
    often an embedding row of zeros), which has no direction.
    """

    angular_last_LN: list[list[float | None]]
    angular_mean_LN: list[list[float | None]]
    block_influence_L: list[float]
    num_sequences: int
    num_tokens: int
    zero_tokens: dict[str, int] = field(default_factory=dict)

    def to_json(self) -> str:
        """One JSON object; floats round-trip exactly."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> DepthScores:
        """The inverse of `to_json`."""
        return cls(**json.loads(text))


@dataclass(frozen=True, eq=False)
class DepthMoments:
    """Sums in float64, from which `DepthScores` are computed. Parts of a calibration set are merged by `+`.

    `angular_last_sum[l, m]` and `angular_mean_sum[l, m]`, shape (L+1, L+1): sums of angular distances between
    boundaries l and m, over sequences (last token) and over tokens. `cosine_sum`, shape (L,): sum over tokens
    of the cosine between boundaries l and l + 1. `zero_tokens`: id of a token -> positions left out, because a hidden
    state is all zero there; neither they nor sequences of nothing else are counted in the other two numbers.
    """

    angular_last_sum: NDArray[np.float64]
    angular_mean_sum: NDArray[np.float64]
    cosine_sum: NDArray[np.float64]
    num_sequences: int
    num_tokens: int
    zero_tokens: Mapping[int, int] = field(default_factory=dict)

    @classmethod
    def empty(cls, num_blocks: int) -> DepthMoments:
        """The neutral element of `+`."""
        square = (num_blocks + 1, num_blocks + 1)
        return cls(np.zeros(square), np.zeros(square), np.zeros(num_blocks), 0, 0)

    @property
    def num_blocks(self) -> int:
        return len(self.cosine_sum)

    def __add__(self, other: DepthMoments) -> DepthMoments:
        """Merge two disjoint parts. Raises `ModelError` if they are from models of different depth."""
        if self.num_blocks != other.num_blocks:
            raise ModelError(
                f"cannot merge measurements of models with {self.num_blocks} and {other.num_blocks} blocks",
                "measure every part of the calibration set with the same teacher",
            )
        return DepthMoments(
            self.angular_last_sum + other.angular_last_sum,
            self.angular_mean_sum + other.angular_mean_sum,
            self.cosine_sum + other.cosine_sum,
            self.num_sequences + other.num_sequences,
            self.num_tokens + other.num_tokens,
            Counter(self.zero_tokens) + Counter(other.zero_tokens),
        )

    def scores(self) -> DepthScores:
        """Convert sums into means; tokens are named by their ids.

        Raises `DataError` if nothing was measured, `ModelError` if hidden states are all zero at every token.
        """
        if not self.num_sequences and self.zero_tokens:
            raise ModelError("hidden states are all zero at every token", "check the weights of the embedding table")
        if not self.num_sequences:
            raise DataError(
                "the calibration set has no rows, so nothing was measured",
                "give a calibration set with at least one row",
            )
        return DepthScores(
            angular_last_LN=_by_length(self.angular_last_sum / self.num_sequences),
            angular_mean_LN=_by_length(self.angular_mean_sum / self.num_tokens),
            block_influence_L=(1.0 - self.cosine_sum / self.num_tokens).tolist(),
            num_sequences=self.num_sequences,
            num_tokens=self.num_tokens,
            zero_tokens={str(token): count for token, count in sorted(self.zero_tokens.items())},
        )

    def run_sums(self, num_blocks: int, position: str) -> tuple[list[float], int]:
        """By first block: the sum whose mean is the angular distance of a run, and how many it is over.

        `position` is `last` (over sequences) or `mean` (over tokens).
        """
        is_last = position == "last"
        sums = self.angular_last_sum if is_last else self.angular_mean_sum
        return sums.diagonal(num_blocks).tolist(), self.num_sequences if is_last else self.num_tokens

    def influence_sums(self) -> tuple[list[float], int]:
        """By block: the sum whose mean is the block influence, and how many tokens it is over."""
        return (self.num_tokens - self.cosine_sum).tolist(), self.num_tokens

    def to_json(self) -> str:
        """One JSON object; floats round-trip exactly, so merging stored parts equals merging in memory."""
        return json.dumps(
            {
                "angular_last_sum": self.angular_last_sum.tolist(),
                "angular_mean_sum": self.angular_mean_sum.tolist(),
                "cosine_sum": self.cosine_sum.tolist(),
                "num_sequences": self.num_sequences,
                "num_tokens": self.num_tokens,
                "zero_tokens": dict(self.zero_tokens),
            }
        )

    @classmethod
    def from_json(cls, text: str) -> DepthMoments:
        """The inverse of `to_json`."""
        fields: dict[str, Any] = json.loads(text)
        names = ("angular_last_sum", "angular_mean_sum", "cosine_sum")
        last_sum, mean_sum, cosine_sum = (np.asarray(fields[name], dtype=np.float64) for name in names)
        zero_tokens = {int(token): count for token, count in fields["zero_tokens"].items()}
        counts = fields["num_sequences"], fields["num_tokens"]
        return cls(last_sum, mean_sum, cosine_sum, *counts, zero_tokens)


def _by_length(distance: NDArray[np.float64]) -> list[list[float | None]]:
    """From boundary pairs (l, l + n) to rows n = 1..L-1 and columns l = 0..L-1."""
    num_blocks = len(distance) - 1
    return [
        [*(float(x) for x in distance.diagonal(n)), *[None] * (n - 1)]  # entry l of diagonal n is (l, l + n)
        for n in range(1, num_blocks)
    ]
