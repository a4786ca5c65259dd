"""Samplers without an engine: seeds, errors per row, the choice of tokens, and the transformers sampler."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from sdft_ray.errors import RecipeError
from sdft_ray.generation.decoding import choose_tokens, left_padded, truncated_logits
from sdft_ray.generation.sampler import (
    Sampled,
    Sampler,
    SamplingParams,
    ScriptedSampler,
    digest_words,
    row_seed,
)
from sdft_ray.generation.transformers_sampler import TransformersSampler
from tests.support.tiny import EOS_ID, make_model

PROMPTS = [[1, 30, 31, 32], [1, 40], [1, 50, 51, 52, 53, 54, 55], [1, 60, 61], [1, 33, 44, 55, 66, 77]]
SEEDS = [row_seed(0, f"row{i}", 0) for i in range(len(PROMPTS))]
SAMPLED = SamplingParams(temperature=1.0, max_tokens=12)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"), "llama")


@pytest.fixture(scope="module")
def sampler(checkpoint: Path) -> TransformersSampler:
    return TransformersSampler(checkpoint, dtype="float32", max_sequences=3)


def test_row_seed_depends_on_identity_alone() -> None:
    assert row_seed(7, "abc", 2) == row_seed(7, "abc", 2)
    seeds = {row_seed(seed, name, index) for seed in (0, 1) for name in ("a", "b", "a1") for index in (0, 1, 11)}
    assert len(seeds) == 18
    assert all(0 <= seed < 2**63 for seed in seeds)
    assert row_seed(0, "0123456789abcdef", 0) == 1570837524395261136  # sha256sum of the bytes


@pytest.mark.parametrize(
    ("field", "value"),
    [("temperature", -0.1), ("top_p", 0.0), ("top_p", 1.1), ("top_k", -1), ("max_tokens", 0), ("top_logprobs", 129)],
)
def test_parameters_out_of_range_are_refused(field: str, value: float) -> None:
    changed: dict[str, Any] = {field: value}
    with pytest.raises(RecipeError, match=f"{field} is {value}"):
        SamplingParams(**changed)


def test_scripted_sampler_answers_and_cuts_at_the_limit() -> None:
    scripted: Sampler = ScriptedSampler(lambda prompt: prompt.replace("p", "w"))
    short = scripted.submit("p1 p2", SamplingParams(max_tokens=2), 0).result()
    assert short == Sampled("w1 w2", (), "stop", prompt_tokens=2, response_tokens=2)
    long = scripted.submit("p3 p4 p5", SamplingParams(max_tokens=2), 0).result()
    assert long == Sampled("w3 w4", (), "length", prompt_tokens=3, response_tokens=2)


def test_scripted_answers_depend_on_every_character() -> None:
    assert len(digest_words("a").split(" ")) == 8
    assert digest_words("a" * 1000) != digest_words("a" * 999 + "b")


def test_bad_rows_get_an_error_and_leave_the_others_alone(sampler: TransformersSampler) -> None:
    prompts = [PROMPTS[0], [], [1] * 256, [1, 128], [1, -1], PROMPTS[1]]
    rows = sampler.sample(prompts, SamplingParams(max_tokens=4), [0] * 6)
    assert [row.finish_reason == "error" for row in rows] == [False, True, True, True, True, False]
    assert rows[1] == Sampled("", (), "error", "the prompt is empty")
    assert "256 tokens, which leaves no room in the context of 256" in rows[2].error
    assert "token 128 is outside the vocabulary of 128" in rows[3].error
    alone = sampler.sample([PROMPTS[0], PROMPTS[1]], SamplingParams(max_tokens=4), [0, 0])
    assert [rows[0], rows[5]] == alone


def test_only_bad_rows_run_nothing(sampler: TransformersSampler) -> None:
    assert [row.finish_reason for row in sampler.sample([[], []], SAMPLED, [1, 2])] == ["error", "error"]
    assert sampler.sample([], SAMPLED, []) == []


def test_seeds_must_match_prompts(sampler: TransformersSampler) -> None:
    with pytest.raises(ValueError, match="2 prompts but 1 seeds"):
        sampler.sample([[1], [2]], SAMPLED, [0])


@pytest.mark.parametrize("params", [SAMPLED, SamplingParams(max_tokens=12)], ids=["sampled", "greedy"])
def test_a_row_does_not_depend_on_its_neighbours(sampler: TransformersSampler, params: SamplingParams) -> None:
    together = sampler.sample(PROMPTS, params, SEEDS)
    alone = [sampler.sample([ids], params, [seed])[0] for ids, seed in zip(PROMPTS, SEEDS, strict=True)]
    backwards = sampler.sample(PROMPTS[::-1], params, SEEDS[::-1])[::-1]
    assert together == alone == backwards


def test_seeds_differ_and_repeat(sampler: TransformersSampler) -> None:
    same_prompt = [PROMPTS[0]] * 4
    first = sampler.sample(same_prompt, SAMPLED, [1, 2, 3, 1])
    assert len({row.token_ids for row in first[:3]}) == 3
    assert first[0] == first[3]


def test_responses_end_at_stop_tokens_or_the_limit(sampler: TransformersSampler) -> None:
    greedy = sampler.sample(PROMPTS, SamplingParams(max_tokens=12), SEEDS)
    assert any(row.finish_reason == "length" for row in greedy)
    for row in greedy:
        assert (row.finish_reason == "stop") is (row.token_ids[-1] == EOS_ID)
        assert row.finish_reason == "stop" or len(row.token_ids) == 12
    longest = max(greedy, key=lambda row: len(row.token_ids))
    stop = longest.token_ids[3]
    index = greedy.index(longest)
    stopped = sampler.sample(PROMPTS, SamplingParams(max_tokens=12, stop_token_ids=(stop,)), SEEDS)[index]
    assert stopped.finish_reason == "stop"
    assert stopped.token_ids == longest.token_ids[: longest.token_ids.index(stop) + 1]


def test_the_context_bounds_prompt_and_response_together(checkpoint: Path) -> None:
    small = TransformersSampler(checkpoint, dtype="float32", max_model_tokens=8)
    rows = small.sample(PROMPTS[:3], SamplingParams(max_tokens=12, temperature=1.0), SEEDS[:3])
    for ids, row in zip(PROMPTS, rows, strict=False):
        assert len(ids) + len(row.token_ids) <= 8
        assert row.finish_reason == "stop" or len(ids) + len(row.token_ids) == 8


def test_kept_logits_against_a_sorted_list() -> None:
    logits_BV = torch.randn(4, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    params = SamplingParams(temperature=0.7, top_k=9, top_p=0.8)
    kept_BV = truncated_logits(logits_BV, params)
    for row, kept in zip(logits_BV.tolist(), kept_BV.tolist(), strict=True):
        best = sorted(range(20), key=lambda i: -row[i])[:9]
        weights = [2.718281828459045 ** (row[i] / 0.7) for i in best]
        nucleus, mass = set(), 0.0
        for i, weight in zip(best, weights, strict=True):
            if mass < 0.8:
                nucleus.add(i)
            mass += weight / sum(weights)
        assert {i for i, value in enumerate(kept) if value > -1e30} == nucleus
        assert all(abs(kept[i] - row[i] / 0.7) < 1e-12 for i in nucleus)


def test_drawn_tokens_follow_the_softmax() -> None:
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    logits_BV = probabilities.log().expand(4000, -1)
    noise = [torch.Generator().manual_seed(row_seed(0, str(i), 0)) for i in range(4000)]
    drawn_B = choose_tokens(logits_BV, SamplingParams(temperature=1.0), noise)
    shares = torch.bincount(drawn_B, minlength=4) / 4000
    assert torch.allclose(shares, probabilities, atol=0.03)


def test_left_padding_ends_every_prompt_in_the_last_column() -> None:
    ids_BT, mask_BT = left_padded([[5, 6, 7], [8]], torch.device("cpu"))
    assert ids_BT.tolist() == [[5, 6, 7], [0, 0, 8]]
    assert mask_BT.tolist() == [[1, 1, 1], [0, 0, 1]]
