"""What a correction did to the teacher: paired changes against numpy, and the words for them."""

from __future__ import annotations

import random

import numpy as np
import pytest

from sdft_ray.evaluation.correction import changes, correction_verdict
from sdft_ray.evaluation.recovery import Estimate
from sdft_ray.evaluation.shift import ResponseNll


def test_changes_are_after_less_before_paired_by_row() -> None:
    rng = random.Random(0)
    tokens = [rng.randint(1, 30) for _ in range(40)]
    before = [ResponseNll(rng.uniform(0, 3) * t, t) for t in tokens]
    after = [ResponseNll(row.nats * 0.7 + rng.uniform(0, 0.1), row.num_tokens) for row in before]
    rows = {"teacher": {"reference": before, "distilled": after}, "corrected": {"reference": after, "distilled": after}}
    found = changes(rows)
    n = np.array(tokens)
    moves = np.array([a.nats - b.nats for a, b in zip(after, before, strict=True)])
    mean = moves.sum() / n.sum()
    u = (moves - mean * n) / n.sum()
    assert found["reference"].value == pytest.approx(mean)
    assert found["reference"].stderr == pytest.approx(np.sqrt(40 / 39 * (u**2).sum()))
    assert found["distilled"] == Estimate(0.0, 0.0)


@pytest.mark.parametrize(
    ("reference", "distilled", "says"),
    [
        (Estimate(-0.2, 0.01), Estimate(0.05, 0.01), "0.200 ± 0.010 nats per token nearer to references and 0.050"),
        (Estimate(-0.2, 0.01), Estimate(0.05, 0.01), "nats per token further from its own rewrites."),
        (Estimate(-0.2, 0.2), Estimate(0.0, 0.0), "measurably neither nearer to nor further from references and"),
        (Estimate(-0.2, None), Estimate(0.0, None), "no standard error"),
    ],
)
def test_the_verdict_tells_what_exceeds_two_standard_errors(
    reference: Estimate, distilled: Estimate, says: str
) -> None:
    assert says in correction_verdict({"reference": reference, "distilled": distilled})


def test_without_rows_there_is_nothing_to_tell() -> None:
    assert changes({}) == {}
    assert "nothing to measure" in correction_verdict({})
