"""Signals of the transformers sampler against one plain forward pass over prompt and response."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.signals import decode_top, encode_top
from sdft_ray.errors import ResourceError
from sdft_ray.generation.sampler import Sampled, SamplingParams, ScriptedSampler, check_signals, row_seed
from sdft_ray.generation.server_sampler import ServerSampler
from sdft_ray.generation.transformers_sampler import TransformersSampler
from sdft_ray.recipe.recipe import Generate
from tests.support.tiny import build_model, make_model

PROMPTS = [[1, 30, 31, 32], [1, 40], [1, 50, 51, 52, 53, 54, 55], [1, 60, 61]]
SEEDS = [row_seed(0, f"row{i}", 0) for i in range(len(PROMPTS))]
# Sampled, and cut: what is recorded must be neither.
PARAMS = SamplingParams(temperature=0.7, top_p=0.8, top_k=20, max_tokens=10, top_logprobs=16, hidden_states=True)
FAMILIES = ["llama", "gemma2"]


def _sampled(folder: Path, family: str, params: SamplingParams) -> list[Sampled]:
    sampler = TransformersSampler(make_model(folder, family), dtype="float32", max_sequences=3)
    rows = sampler.sample(PROMPTS, params, SEEDS)
    sampler.close()
    return rows


@pytest.mark.parametrize("family", FAMILIES)
def test_signals_are_those_of_the_raw_model(tmp_path: Path, family: str) -> None:
    model: Any = build_model(family)
    for prompt, row in zip(PROMPTS, _sampled(tmp_path, family, PARAMS), strict=True):
        assert row.signals is not None
        top, hidden_TD = row.signals.top, row.signals.hidden_TD
        assert top is not None
        assert hidden_TD is not None
        with torch.no_grad():
            out = model(torch.tensor([[*prompt, *row.token_ids]]), output_hidden_states=True)
        # The token at place i is chosen from the logits at place i - 1.
        where = slice(len(prompt) - 1, -1)
        best_TK = out.logits[0, where].log_softmax(dim=-1).topk(16)
        assert top.ids_TK.tolist() == best_TK.indices.sort(dim=-1).values.tolist()
        ordered_TK = best_TK.values.gather(1, best_TK.indices.argsort(dim=-1))
        assert np.allclose(top.logprobs_TK, ordered_TK, atol=1e-5)
        assert np.allclose(np.exp(top.tail_T), 1 - ordered_TK.exp().sum(dim=-1), atol=1e-5)
        # METHOD: the last entry is after the final norm, as the head takes it in.
        kept_TD = torch.from_numpy(hidden_TD.view(np.int16)).view(torch.bfloat16).float()
        assert torch.allclose(kept_TD, out.hidden_states[-1][0, where], rtol=2**-8, atol=1e-5)


def test_hidden_states_times_the_head_give_the_log_probabilities(tmp_path: Path) -> None:
    """With a bfloat16 teacher the hidden states are exact, so the whole distribution is."""
    folder = make_model(tmp_path, "llama", dtype="bfloat16")
    sampler = TransformersSampler(folder, dtype="bfloat16", max_sequences=3)
    model: Any = build_model("llama", dtype="bfloat16")
    head_VD = model.get_output_embeddings().weight.detach()
    for row in sampler.sample(PROMPTS, PARAMS, SEEDS):
        assert row.signals is not None
        assert row.signals.top is not None
        assert row.signals.hidden_TD is not None
        hidden_TD = torch.from_numpy(row.signals.hidden_TD.view(np.int16)).view(torch.bfloat16)
        logprobs_TV = (hidden_TD @ head_VD.T).float().log_softmax(dim=-1)
        top = decode_top(*encode_top(row.signals.top))
        again_TK = logprobs_TV.gather(1, torch.from_numpy(top.ids_TK.astype(np.int64)))
        reach_T = top.logprobs_TK.max(axis=1) - top.logprobs_TK.min(axis=1)
        assert np.abs(top.logprobs_TK - again_TK.numpy()).max() < reach_T.max() / 254 + 0.02
    sampler.close()


def test_only_what_is_asked_for_is_there(tmp_path: Path) -> None:
    rows = _sampled(tmp_path, "llama", SamplingParams(max_tokens=4))
    assert all(row.signals is None for row in rows)
    sampler = TransformersSampler(tmp_path, dtype="float32")
    top_only, hidden_only = (
        sampler.sample([PROMPTS[0]], params, [0])[0].signals
        for params in (SamplingParams(max_tokens=4, top_logprobs=2), SamplingParams(max_tokens=4, hidden_states=True))
    )
    sampler.close()
    assert top_only is not None
    assert top_only.hidden_TD is None
    assert hidden_only is not None
    assert hidden_only.top is None


def test_a_vocabulary_below_k_is_kept_whole(tmp_path: Path) -> None:
    sampler = TransformersSampler(make_model(tmp_path, "llama", vocab_size=110), dtype="float32")
    signals = sampler.sample([PROMPTS[0]], SamplingParams(max_tokens=3, top_logprobs=128), [0])[0].signals
    sampler.close()
    assert signals is not None
    assert signals.top is not None
    assert signals.top.ids_TK.tolist() == [list(range(110))] * 3
    assert np.isneginf(signals.top.tail_T).all()


def test_recorded_rows_do_not_depend_on_their_neighbours(tmp_path: Path) -> None:
    sampler = TransformersSampler(make_model(tmp_path, "llama"), dtype="float32", max_sequences=4)
    together = sampler.sample(PROMPTS, PARAMS, SEEDS)
    for ids, seed, row in zip(PROMPTS, SEEDS, together, strict=True):
        alone = sampler.sample([ids], PARAMS, [seed])[0]
        assert alone.token_ids == row.token_ids
        assert alone.signals is not None and row.signals is not None  # noqa: PT018
        assert alone.signals.top is not None and row.signals.top is not None  # noqa: PT018
        assert np.allclose(alone.signals.top.logprobs_TK, row.signals.top.logprobs_TK, atol=1e-5)
        assert len(row.signals.top.tail_T) == len(row.token_ids)
    sampler.close()


@pytest.mark.parametrize(
    ("sampler", "asked"),
    [
        ("vllm", {"hidden_states": True}),
        ("server", {"hidden_states": True}),
        ("server", {"top_logprobs": 5}),
        ("scripted", {"top_logprobs": 5}),
    ],
)
def test_signals_that_a_sampler_cannot_give_are_refused(sampler: str, asked: dict[str, Any]) -> None:
    with pytest.raises(
        ResourceError, match=f"the {sampler} sampler cannot provide generate.{next(iter(asked))}"
    ) as caught:
        check_signals(sampler, Generate(**asked))
    assert "transformers" in caught.value.hint


def test_signals_that_a_sampler_can_give_are_not() -> None:
    check_signals("vllm", Generate(top_logprobs=128))
    check_signals("transformers", Generate(top_logprobs=128, hidden_states=True))
    check_signals("server", Generate())


def test_samplers_refuse_by_themselves() -> None:
    for sampler in (ScriptedSampler(), ServerSampler("http://127.0.0.1:9/v1", "none")):
        with pytest.raises(ResourceError, match=r"cannot provide generate\.top_logprobs"):
            sampler.submit("hello", SamplingParams(top_logprobs=1), 0)
        sampler.close()
