"""Samplers against each other: our decoding loop, transformers' own `generate`, and a real vLLM engine."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.generation.sampler import SamplingParams, row_seed
from sdft_ray.generation.transformers_sampler import TransformersSampler
from sdft_ray.lab.export import TEACHER
from sdft_ray.models.loading import load_model
from tests.support.tiny import EOS_ID, PAD_ID, build_model, make_model

PROMPTS = [
    [1, 30, 31, 32],
    [1, 40],
    [1, 50, 51, 52, 53, 54, 55, 56, 57, 58, 59, 60],
    [1, 60, 61],
    [1, 33, 44, 55, 66],
]
SEEDS = [row_seed(0, f"row{i}", 0) for i in range(len(PROMPTS))]
GREEDY = SamplingParams(max_tokens=24)
VLLM_SETTINGS: dict[str, Any] = {"hidden": 128, "head_dim": 32}
"""The smallest heads that vLLM has CPU attention for."""


@pytest.mark.parametrize("family", ["llama", "qwen3", "gemma3_text"])
def test_greedy_decoding_equals_generate(tmp_path: Path, family: str) -> None:
    sampler = TransformersSampler(make_model(tmp_path, family), dtype="float32", max_sequences=4)
    rows = sampler.sample(PROMPTS, GREEDY, SEEDS)
    model: Any = build_model(family)
    for ids, row in zip(PROMPTS, rows, strict=True):
        whole = model.generate(
            torch.tensor([ids]), max_new_tokens=24, do_sample=False, eos_token_id=EOS_ID, pad_token_id=PAD_ID
        )
        assert list(row.token_ids) == whole[0, len(ids) :].tolist()


_ENGINE = """
import json, sys
from sdft_ray.generation.sampler import SamplingParams
from sdft_ray.generation.vllm_sampler import VllmSampler

def top_of(row):
    top = row.signals and row.signals.top
    return top and [top.ids_TK.tolist(), top.logprobs_TK.tolist(), top.tail_T.tolist()]

asked = json.loads(sys.stdin.read())
sampler = VllmSampler(
    asked["model"], dtype=asked["dtype"], kv_cache_bytes=32 << 20, max_model_tokens=64, max_sequences=8
)
answers = []
for prompts, seeds, params in asked["calls"]:
    rows = sampler.sample(prompts, SamplingParams(**params), seeds)
    answers.append([[list(row.token_ids), row.finish_reason, row.text, row.error, top_of(row)] for row in rows])
sampler.close()
print("ANSWERS" + json.dumps(answers))
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("tiny"), "llama", **VLLM_SETTINGS)


@pytest.fixture(scope="module")
def stop_token(checkpoint: Path) -> int:
    """A token that the longest greedy response holds in its middle."""
    rows = TransformersSampler(checkpoint, dtype="float32").sample(PROMPTS, GREEDY, SEEDS)
    longest = max(rows, key=lambda row: len(row.token_ids))
    return longest.token_ids[len(longest.token_ids) // 2]


@pytest.fixture(scope="module")
def answers(checkpoint: Path, stop_token: int) -> list[list[Any]]:
    """What one engine, in a process of its own, says to all the calls that the tests below look at."""
    greedy = {"max_tokens": 24}
    sampled = {"max_tokens": 24, "temperature": 1.0, "top_p": 0.9}
    signals = {"top_logprobs": 20}
    calls = [
        (PROMPTS, SEEDS, greedy),
        (PROMPTS, SEEDS, {**greedy, "stop_token_ids": [stop_token]}),
        ([PROMPTS[0], [], [1] * 64, [1, 128], PROMPTS[1]], SEEDS, greedy),
        ([[1] * 60], [0], greedy),
        (PROMPTS, SEEDS, sampled),
        (PROMPTS[::-1], SEEDS[::-1], sampled),
        ([PROMPTS[0]] * 4, [1, 2, 3, 1], sampled),
        (PROMPTS, SEEDS, {**greedy, **signals}),
        (PROMPTS, SEEDS, {**sampled, "temperature": 0.5, **signals}),
        ([PROMPTS[0]], [0], {**greedy, "top_logprobs": 128}),
    ]
    return _answers_of_vllm(checkpoint, "float32", calls)


def _answers_of_vllm(model_dir: Path, dtype: str, calls: list[Any]) -> list[list[Any]]:
    environment = {
        **os.environ,
        "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",
        "VLLM_LOGGING_LEVEL": "ERROR",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "PYTHONPATH": os.pathsep.join(sys.path),
    }
    done = subprocess.run(
        [sys.executable, "-c", _ENGINE],
        input=json.dumps({"model": str(model_dir), "dtype": dtype, "calls": calls}),
        capture_output=True, text=True, env=environment, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-4000:]
    line = next(line for line in done.stdout.splitlines() if line.startswith("ANSWERS"))
    return json.loads(line.removeprefix("ANSWERS"))


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_greedy_rows_of_vllm_and_transformers_are_equal(
    checkpoint: Path, stop_token: int, answers: list[list[Any]]
) -> None:
    sampler = TransformersSampler(checkpoint, dtype="float32", max_model_tokens=64)
    for stop_ids, vllm_rows in (((), answers[0]), ((stop_token,), answers[1])):
        rows = sampler.sample(PROMPTS, SamplingParams(max_tokens=24, stop_token_ids=stop_ids), SEEDS)
        assert [[list(row.token_ids), row.finish_reason, row.text, row.error, None] for row in rows] == vllm_rows
    assert "stop" in [row[1] for row in answers[1]]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_bad_rows_do_not_take_the_engine_down(answers: list[list[Any]]) -> None:
    good, empty, long, stray, last = answers[2]
    assert [good, last] == [answers[0][0], answers[0][1]]
    assert empty == [[], "error", "", "the prompt is empty", None]
    assert long[1] == "error"
    assert "64 tokens and the context 64" in long[3]
    assert "outside the vocabulary" in stray[3]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_full_context_ends_with_length(answers: list[list[Any]]) -> None:
    token_ids, reason, *_ = answers[3][0]
    assert reason == "length"
    assert len(token_ids) == 4


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_seeded_rows_of_vllm_do_not_depend_on_their_neighbours(answers: list[list[Any]]) -> None:
    assert answers[4] == answers[5][::-1]
    again = [row[0] for row in answers[6]]
    assert again[0] == again[3]
    assert again[0] != again[1] != again[2]


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_top_log_probabilities_of_vllm_and_transformers_agree(checkpoint: Path, answers: list[list[Any]]) -> None:
    """Raw ones in both, however the tokens were chosen."""
    sampler = TransformersSampler(checkpoint, dtype="float32", max_model_tokens=64)
    rows = sampler.sample(PROMPTS, SamplingParams(max_tokens=24, top_logprobs=20), SEEDS)
    for row, (token_ids, *_, top) in zip(rows, answers[7], strict=True):
        assert list(row.token_ids) == token_ids
        assert row.signals is not None
        assert row.signals.top is not None
        assert row.signals.top.ids_TK.tolist() == top[0]
        assert np.allclose(row.signals.top.logprobs_TK, top[1], atol=1e-4)
        assert np.allclose(row.signals.top.tail_T, top[2], atol=1e-4)
    for prompt, (token_ids, *_, top) in zip(PROMPTS, answers[8], strict=True):
        assert np.allclose(_forced_logprobs(checkpoint, "float32", prompt, token_ids, top[0]), top[1], atol=1e-4)
    whole = answers[9][0][4]
    assert whole[0] == [list(range(128))] * len(whole[0]), "k is the vocabulary"
    assert np.isneginf(whole[2]).all()


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_top_log_probabilities_of_the_laboratory_teacher_are_as_good_as_bfloat16_allows() -> None:
    """Against float32, vLLM's bfloat16 is as near as transformers' own; weighted by probability all are close."""
    chat = ChatFormat(load_tokenizer(TEACHER))
    prompts = [chat.prompt_ids(f"What is {n} plus {n}?") for n in (3, 14, 25)]
    (rows,) = _answers_of_vllm(TEACHER, "bfloat16", [(prompts, [0, 1, 2], {"max_tokens": 16, "top_logprobs": 64})])
    off_vllm, off_transformers, mass_off = [], [], []
    for prompt, (token_ids, *_, top) in zip(prompts, rows, strict=True):
        exact_TK, near_TK = (_forced_logprobs(TEACHER, d, prompt, token_ids, top[0]) for d in ("float32", "bfloat16"))
        off_vllm.append(np.abs(np.asarray(top[1]) - exact_TK))
        off_transformers.append(np.abs(near_TK - exact_TK))
        mass_off.append((np.exp(exact_TK) * off_vllm[-1]).sum(axis=1))
    assert np.concatenate(off_vllm).mean() < 1.5 * np.concatenate(off_transformers).mean()
    assert np.concatenate(mass_off).mean() < 0.02


def _forced_logprobs(model_dir: Path, dtype: str, prompt: list[int], token_ids: list[int], ids_TK: Any) -> Any:
    """Log-probabilities of chosen ids by one forward pass of transformers over prompt and response."""
    model: Any = load_model(model_dir, dtype)
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *token_ids]])).logits[0, len(prompt) - 1 : -1]
    return logits_TV.float().log_softmax(dim=-1).gather(1, torch.tensor(ids_TK)).numpy()
