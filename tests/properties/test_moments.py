"""Whatever way batches are spread over workers and merged again, the scores stay the same."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.importance.moments import DepthMoments, DepthScores

NUM_BLOCKS = 5


def batch_moments(seed: int) -> DepthMoments:
    """Sums as one batch of some size leaves them: every distance in [0, 1], every cosine in [-1, 1]."""
    rng = np.random.default_rng(seed)
    num_sequences = int(rng.integers(1, 64))
    num_tokens = num_sequences * int(rng.integers(1, 2000))
    square = (NUM_BLOCKS + 1, NUM_BLOCKS + 1)
    return DepthMoments(
        num_sequences * rng.random(square),
        num_tokens * rng.random(square),
        num_tokens * rng.uniform(-1, 1, NUM_BLOCKS),
        num_sequences,
        num_tokens,
    )


def merged(parts: list[DepthMoments]) -> DepthMoments:
    return sum(parts, start=DepthMoments.empty(NUM_BLOCKS))


def numbers(scores: DepthScores) -> list[float]:
    rows = [*scores.angular_last_LN, *scores.angular_mean_LN, scores.block_influence_L]
    return [x for row in rows for x in row if x is not None]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), num_batches=st.integers(1, 40), num_workers=st.integers(1, 6), stored=st.booleans())
def test_any_sharding_gives_the_same_scores(data: st.DataObject, num_batches: int, num_workers: int, stored: bool):
    batches = [batch_moments(seed) for seed in range(num_batches)]
    order = data.draw(st.permutations(range(num_batches)))
    worker_of = data.draw(st.lists(st.integers(0, num_workers - 1), min_size=num_batches, max_size=num_batches))
    parts = [merged([batches[i] for i in order if worker_of[i] == worker]) for worker in range(num_workers)]
    if stored:
        parts = [DepthMoments.from_json(part.to_json()) for part in parts]
    scores = merged(data.draw(st.permutations(parts))).scores()
    expected = merged(batches).scores()
    assert (scores.num_sequences, scores.num_tokens) == (expected.num_sequences, expected.num_tokens)
    assert max(abs(a - b) for a, b in zip(numbers(scores), numbers(expected), strict=True)) < 1e-12


@given(st.integers(0, 2**32), st.integers(0, 2**32))
def test_merging_commutes_exactly(left: int, right: int):
    one, other = batch_moments(left), batch_moments(right)
    assert (one + other).to_json() == (other + one).to_json()
