"""Likelihoods of given tokens: batched passes of transformers against one row at a time."""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch

from sdft_ray.generation.sampler import SamplingParams
from sdft_ray.generation.scoring import ScoreRequest, ScoreResult, score
from sdft_ray.generation.transformers_sampler import TransformersSampler
from sdft_ray.lab.export import TEACHER
from sdft_ray.models.loading import load_model

pytestmark = pytest.mark.slow

_VOCABULARY = range(20, 1200)  # no special tokens


def some_scorings(count: int) -> list[ScoreRequest]:
    """Contexts of many lengths; one final token or several, alone or behind others that are scored."""
    rng = random.Random(0)
    found = []
    for _ in range(count):
        ids = tuple(rng.choice(_VOCABULARY) for _ in range(rng.randrange(2, 90)))
        finals = tuple(rng.sample(_VOCABULARY, rng.choice([1, 1, 4])))
        found.append(ScoreRequest(ids, min(rng.choice([0, 0, 1, 5]), len(ids) - 1), finals))
    return found


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(TEACHER, "float32")


def by_hand(model: Any, asked: ScoreRequest) -> list[tuple[float, bool]]:
    found = []
    for final in asked.finals:
        ids = [*asked.ids, final]
        with torch.no_grad():
            logprobs_TV = model(torch.tensor([ids])).logits[0].log_softmax(dim=-1)
        places = range(len(ids) - 1 - asked.num_scored, len(ids))
        logprob = sum(float(logprobs_TV[t - 1, ids[t]]) for t in places)
        found.append((logprob, all(int(logprobs_TV[t - 1].argmax()) == ids[t] for t in places)))
    return found


def assert_same(found: list[ScoreResult], wanted: list[list[tuple[float, bool]]]) -> None:
    for scored, naive in zip(found, wanted, strict=True):
        assert [greedy for _, greedy in scored.finals] == [greedy for _, greedy in naive]
        logprobs = [logprob for logprob, _ in scored.finals]
        assert logprobs == pytest.approx([logprob for logprob, _ in naive], abs=1e-4)


@pytest.mark.parametrize("batch_tokens", [1, 300, 100_000])
def test_batches_give_what_one_row_gives(model: Any, batch_tokens: int) -> None:
    asked = some_scorings(40)
    found = dict(score(model, asked, batch_tokens=batch_tokens))
    assert_same([found[index] for index in range(40)], [by_hand(model, one) for one in asked])


def test_what_greedy_decoding_writes_is_the_likeliest(model: Any) -> None:
    """And with another last token it is not."""
    sampler = TransformersSampler(TEACHER, dtype="float32")
    (written,) = sampler.sample([[5, 300, 301, 302]], SamplingParams(max_tokens=6), [0])
    *middle, last = written.token_ids
    other = next(token for token in _VOCABULARY if token != last)
    asked = ScoreRequest((5, 300, 301, 302, *middle), len(middle), (last, other))
    finals = sampler.submit_score(asked).result().finals
    sampler.close()
    assert [greedy for _, greedy in finals] == [True, False]
