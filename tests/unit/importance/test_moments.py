import json
import subprocess
import sys

import numpy as np
import pytest

from sdft_ray.errors import DataError, ModelError
from sdft_ray.importance.moments import DepthMoments, DepthScores


def some_moments(seed: int = 0, num_blocks: int = 4) -> DepthMoments:
    rng = np.random.default_rng(seed)
    square = (num_blocks + 1, num_blocks + 1)
    return DepthMoments(rng.random(square) * 7, rng.random(square) * 90, rng.random(num_blocks) * 90, 7, 90)


def test_scores_place_every_pair_once():
    # distance (l, m) is made to spell its own indices
    spelled = np.array([[10.0 * start + end for end in range(4)] for start in range(4)])
    scores = DepthMoments(2 * spelled, 5 * spelled, np.array([5.0, 0.0, -5.0]), 2, 5).scores()
    assert scores.angular_last_LN == [[1.0, 12.0, 23.0], [2.0, 13.0, None]]
    assert scores.angular_mean_LN == scores.angular_last_LN
    assert scores.block_influence_L == [0.0, 1.0, 2.0]
    assert (scores.num_sequences, scores.num_tokens) == (2, 5)


def test_empty_is_neutral():
    moments = some_moments()
    for merged in (DepthMoments.empty(4) + moments, moments + DepthMoments.empty(4)):
        assert merged.scores() == moments.scores()


def test_merging_adds_counts_and_sums():
    left, right = some_moments(1), some_moments(2)
    merged = left + right
    assert (merged.num_sequences, merged.num_tokens) == (14, 180)
    np.testing.assert_array_equal(merged.cosine_sum, left.cosine_sum + right.cosine_sum)
    np.testing.assert_array_equal(merged.angular_last_sum, left.angular_last_sum + right.angular_last_sum)
    np.testing.assert_array_equal(merged.angular_mean_sum, left.angular_mean_sum + right.angular_mean_sum)


def test_other_depth_is_refused():
    with pytest.raises(ModelError, match="4 and 5 blocks"):
        _ = some_moments(num_blocks=4) + some_moments(num_blocks=5)


def test_nothing_measured_is_refused():
    with pytest.raises(DataError, match="nothing was measured"):
        DepthMoments.empty(4).scores()


def test_json_keeps_every_digit():
    moments = some_moments()
    again = DepthMoments.from_json(moments.to_json())
    np.testing.assert_array_equal(again.angular_last_sum, moments.angular_last_sum)
    np.testing.assert_array_equal(again.angular_mean_sum, moments.angular_mean_sum)
    np.testing.assert_array_equal(again.cosine_sum, moments.cosine_sum)
    scores = moments.scores()
    assert DepthScores.from_json(scores.to_json()) == scores
    assert json.loads(scores.to_json())["angular_last_LN"][-1][2] is None


def test_scores_are_read_without_torch():
    code = "import sys, sdft_ray.importance.moments; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
