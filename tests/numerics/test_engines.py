"""The transformers engine against transformers' own `generate` and log-softmax; vLLM's engine: test_vllm.py."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import aclosing
from typing import Any

import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.engines.request import AnswerDelta, Engine, GenerationRequest
from sdft_ray.engines.settings import EngineSettings
from sdft_ray.engines.transformers import TransformersEngine
from sdft_ray.lab.export import TEACHER
from sdft_ray.models.loading import load_model

pytestmark = pytest.mark.slow

TOKENIZER: Any = load_tokenizer(TEACHER)
QUESTIONS = ("A farmer has 12 hens and sells 5. How many are left?", "Tom has 3 pens.", "Sort these: pear, apple, fig")
PROMPTS = [tuple(ChatFormat(TOKENIZER).prompt_ids(question)) for question in QUESTIONS]
SETTINGS = EngineSettings(dtype="float32", max_sequences=8)


@pytest.fixture(scope="module")
def engine() -> Iterator[TransformersEngine]:
    found = TransformersEngine.start(TEACHER, SETTINGS)
    yield found
    found.close()


@pytest.fixture(scope="module")
def model() -> Any:
    return load_model(TEACHER, "float32")


async def pieces_of(engine: Engine, ask: GenerationRequest) -> list[AnswerDelta]:
    return [piece async for piece in engine.answer(ask)]


def answers(engine: Engine, *asks: GenerationRequest) -> list[list[AnswerDelta]]:
    async def all_of() -> list[list[AnswerDelta]]:
        return await asyncio.gather(*(pieces_of(engine, ask) for ask in asks))

    return asyncio.run(all_of())


def text_of(pieces: list[AnswerDelta]) -> str:
    return "".join(piece.text for piece in pieces)


def greedy(model: Any, prompt: tuple[int, ...], max_tokens: int) -> list[int]:
    with torch.inference_mode():
        return model.generate(torch.tensor([prompt]), max_new_tokens=max_tokens, do_sample=False)[
            0, len(prompt) :
        ].tolist()


def check_greedy_answers(engine: Engine, model: Any) -> None:
    asks = [
        GenerationRequest(prompt, 40, temperature=0.0, stream=stream) for prompt in PROMPTS for stream in (False, True)
    ]
    for ask, pieces in zip(asks, answers(engine, *asks), strict=True):
        expected = greedy(model, ask.prompt_ids, 40)
        assert text_of(pieces) == TOKENIZER.decode(expected, skip_special_tokens=True)
        assert sum(piece.num_tokens for piece in pieces) == len(expected)
        assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
        assert pieces[-1].finish_reason == ("length" if len(expected) == 40 else "stop")
        assert ask.stream or len(pieces) == 1  # a reader who lags behind gets several tokens at once


def check_log_probabilities(engine: Engine, model: Any) -> None:
    prompt = PROMPTS[0]
    (pieces,) = answers(
        engine, GenerationRequest(prompt, 6, temperature=0.0, top_logprobs=3, prompt_top_logprobs=2, stream=True)
    )
    written = greedy(model, prompt, 6)
    ids = torch.tensor([*prompt, *written])
    with torch.inference_mode():
        logprobs_TV = model(ids[None]).logits[0].log_softmax(-1)
    expected_T = logprobs_TV[:-1].gather(-1, ids[1:, None])[:, 0]
    told = [*pieces[0].prompt_scores, *(score for piece in pieces for score in piece.scores)]
    assert told[0].logprob is None
    assert len(told) == len(ids)
    found_T = torch.tensor([score.logprob for score in told[1:]])
    torch.testing.assert_close(found_T, expected_T, atol=2e-4, rtol=1e-4)
    for place, score in enumerate(told[1:]):
        wanted = 2 if place < len(prompt) - 1 else 3
        values = torch.tensor([value for _, value in score.top[:wanted]])
        torch.testing.assert_close(values, logprobs_TV[place].topk(wanted).values, atol=2e-4, rtol=1e-4)
    assert all(piece.prompt_scores == () for piece in pieces[1:])


def check_stops(engine: Engine) -> None:
    whole = text_of(answers(engine, GenerationRequest(PROMPTS[0], 40, temperature=0.0))[0])
    for stop in (whole[3:9], whole[7], whole[-4:]):
        for stream in (False, True):
            asked = GenerationRequest(PROMPTS[0], 40, temperature=0.0, stop=("never said", stop), stream=stream)
            (pieces,) = answers(engine, asked)
            assert text_of(pieces) == whole[: whole.index(stop)]
            assert pieces[-1].finish_reason == "stop"


def check_only_the_prompt(engine: Engine) -> None:
    (pieces,) = answers(engine, GenerationRequest(PROMPTS[1], 0, prompt_top_logprobs=0))
    assert [(piece.text, piece.num_tokens, piece.finish_reason) for piece in pieces] == [("", 0, "length")]
    assert len(pieces[0].prompt_scores) == len(PROMPTS[1])


def check_seeds(engine: Engine) -> None:
    def sampled(seed: int) -> str:
        beside = GenerationRequest(PROMPTS[1], 7, temperature=1.0)
        return text_of(answers(engine, GenerationRequest(PROMPTS[0], 12, temperature=2.0, seed=seed), beside)[0])

    assert sampled(1) == sampled(1) != sampled(2)


def check_a_crowd_with_seeds(engine: Engine) -> None:
    """Long prompts that do not all fit into one step of vLLM's."""
    asks = [
        GenerationRequest((20 + n,) * (490 - n), 2, temperature=1.0, seed=n) for n in range(20)
    ]  # unlike, so none is cached
    assert [sum(piece.num_tokens for piece in pieces) for pieces in answers(engine, *asks)] == [2] * 20


def check_penalties(engine: Engine, model: Any) -> None:
    """Logits less the penalties of what the answer has said so far, step by step."""
    prompt = tuple(TOKENIZER("hens hens hens hens hens hens", add_special_tokens=False)["input_ids"])
    presence, frequency = 2.0, 2.0
    written: list[int] = []
    for _ in range(20):
        with torch.no_grad():
            logits_V = model(torch.tensor([[*prompt, *written]])).logits[0, -1].clone()
        for token in set(written):
            logits_V[token] -= presence + frequency * written.count(token)
        written.append(int(logits_V.argmax()))
    asked = GenerationRequest(prompt, 20, temperature=0.0, presence_penalty=presence, frequency_penalty=frequency)
    (pieces,) = answers(engine, asked)
    assert text_of(pieces) == TOKENIZER.decode(written, skip_special_tokens=True)
    assert written != greedy(model, prompt, 20)


MODEL_CHECKS = (check_log_probabilities, check_greedy_answers, check_penalties)
OTHER_CHECKS = (check_stops, check_only_the_prompt, check_seeds, check_a_crowd_with_seeds)


@pytest.mark.parametrize("check", MODEL_CHECKS)
def test_transformers_against_the_model(check: Any, engine: TransformersEngine, model: Any) -> None:
    check(engine, model)


@pytest.mark.parametrize("check", OTHER_CHECKS)
def test_transformers(check: Any, engine: TransformersEngine) -> None:
    check(engine)


def test_leaving_early_ends_the_work(engine: TransformersEngine) -> None:
    async def leave() -> None:
        async with aclosing(engine.answer(GenerationRequest(PROMPTS[0], 400, temperature=2.0, stream=True))) as pieces:
            await anext(pieces)

    asyncio.run(leave())
    asyncio.run(asyncio.wait_for(pieces_of(engine, GenerationRequest(PROMPTS[1], 3)), 20))
