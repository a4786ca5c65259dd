"""Real vLLM engines against transformers: responses, likelihoods, streams, and checkpoints that surgery wrote.

All engines of this file run in one process, see `tests.support.vllm_process`.
"""

from __future__ import annotations

import asyncio
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.engines.request import GenerationRequest
from sdft_ray.generation.sampler import Sampled, SamplingParams
from sdft_ray.generation.transformers_sampler import TransformersSampler
from sdft_ray.lab.export import TEACHER
from sdft_ray.models.channels import Channels
from sdft_ray.models.loading import load_model
from sdft_ray.models.surgery import drop_blocks, prune_checkpoint
from sdft_ray.planning.engines import KV_BLOCK_TOKENS, least_cache_tokens
from sdft_ray.planning.shape import ModelShape
from tests.numerics.test_engines import MODEL_CHECKS, OTHER_CHECKS, SETTINGS, pieces_of
from tests.numerics.test_sampler import GREEDY, PROMPTS, SEEDS
from tests.numerics.test_scoring import assert_same, by_hand, some_scorings
from tests.support import tiny
from tests.support.vllm_process import Call, decoded, sampled, scored, vllm_process

pytestmark = [pytest.mark.slow, pytest.mark.timeout(900)]

SMALLEST_HEADS: dict[str, Any] = {"head_dim": 32}
"""The smallest heads that vLLM has CPU attention for."""


@pytest.fixture(scope="module")
def vllm() -> Iterator[Callable[..., Any]]:
    with vllm_process() as call:
        yield call


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.make_model(tmp_path_factory.mktemp("tiny"), "llama", hidden=128, **SMALLEST_HEADS)


@pytest.fixture(scope="module")
def stop_token(checkpoint: Path) -> int:
    """A token that the longest greedy response holds in its middle."""
    rows = TransformersSampler(checkpoint, dtype="float32").sample(PROMPTS, GREEDY, SEEDS)
    longest = max(rows, key=lambda row: len(row.token_ids))
    return longest.token_ids[len(longest.token_ids) // 2]


@pytest.fixture(scope="module")
def responses(vllm: Callable[..., Any], checkpoint: Path, stop_token: int) -> dict[str, list[Sampled]]:
    """What one engine responds to all the calls that the tests of the sampler look at."""
    warm = SamplingParams(max_tokens=24, temperature=1.0, top_p=0.9)
    calls: dict[str, Call] = {
        "greedy": (PROMPTS, SEEDS, GREEDY),
        "stopped": (PROMPTS, SEEDS, SamplingParams(max_tokens=24, stop_token_ids=(stop_token,))),
        "bad prompts": ([PROMPTS[0], [], [1] * 64, [1, 128], PROMPTS[1]], SEEDS, GREEDY),
        "full context": ([[1] * 60], [0], GREEDY),
        "sampled": (PROMPTS, SEEDS, warm),
        "reversed": (PROMPTS[::-1], SEEDS[::-1], warm),
        "one prompt": ([PROMPTS[0]] * 4, [1, 2, 3, 1], warm),
        "signals": (PROMPTS, SEEDS, SamplingParams(max_tokens=24, top_logprobs=20)),
        "sampled signals": (
            PROMPTS, SEEDS, SamplingParams(max_tokens=24, temperature=0.5, top_p=0.9, top_logprobs=20)
        ),
        "whole vocabulary": ([PROMPTS[0]], [0], SamplingParams(max_tokens=24, top_logprobs=128)),
    }  # fmt: skip
    return dict(zip(calls, vllm(sampled, checkpoint, "float32", list(calls.values())), strict=True))


def test_greedy_rows_of_vllm_and_transformers_are_equal(
    checkpoint: Path, stop_token: int, responses: dict[str, list[Sampled]]
) -> None:
    sampler = TransformersSampler(checkpoint, dtype="float32", max_model_tokens=64)
    for name, stop_ids in (("greedy", ()), ("stopped", (stop_token,))):
        rows = sampler.sample(PROMPTS, SamplingParams(max_tokens=24, stop_token_ids=stop_ids), SEEDS)
        assert rows == responses[name]
        assert all(row.signals is None for row in rows)
    assert "stop" in [row.finish_reason for row in responses["stopped"]]


def test_bad_rows_do_not_take_the_engine_down(responses: dict[str, list[Sampled]]) -> None:
    good, empty, long, stray, last = responses["bad prompts"]
    assert [good, last] == responses["greedy"][:2]
    assert empty == Sampled.failed("the prompt is empty")
    assert long.finish_reason == "error"
    assert "64 tokens, which leaves no room in the context of 64" in long.error
    assert "outside the vocabulary" in stray.error


def test_a_full_context_ends_with_length(responses: dict[str, list[Sampled]]) -> None:
    (row,) = responses["full context"]
    assert row.finish_reason == "length"
    assert len(row.token_ids) == 4


def test_seeded_rows_of_vllm_do_not_depend_on_their_neighbours(responses: dict[str, list[Sampled]]) -> None:
    assert responses["sampled"] == responses["reversed"][::-1]
    again = [row.token_ids for row in responses["one prompt"]]
    assert again[0] == again[3]
    assert again[0] != again[1] != again[2]


def test_top_log_probabilities_of_vllm_and_transformers_agree(
    checkpoint: Path, responses: dict[str, list[Sampled]]
) -> None:
    """Those of the model in both, however the tokens were chosen."""
    sampler = TransformersSampler(checkpoint, dtype="float32", max_model_tokens=64)
    rows = sampler.sample(PROMPTS, SamplingParams(max_tokens=24, top_logprobs=20), SEEDS)
    for ours, theirs in zip(rows, responses["signals"], strict=True):
        assert ours.token_ids == theirs.token_ids
        assert top_of(ours).ids_TK.tolist() == top_of(theirs).ids_TK.tolist()
        assert np.allclose(top_of(ours).logprobs_TK, top_of(theirs).logprobs_TK, atol=1e-4)
        assert np.allclose(top_of(ours).tail_T, top_of(theirs).tail_T, atol=1e-4)
    for prompt, row in zip(PROMPTS, responses["sampled signals"], strict=True):
        expected_TK = forced_logprobs(checkpoint, "float32", prompt, row)
        assert np.allclose(expected_TK, top_of(row).logprobs_TK, atol=1e-4)
    (row,) = responses["whole vocabulary"]
    assert top_of(row).ids_TK.tolist() == [list(range(128))] * len(row.token_ids), "k is the vocabulary"
    assert np.isneginf(top_of(row).tail_T).all()


@pytest.mark.nightly
def test_top_log_probabilities_of_the_laboratory_teacher_are_as_good_as_bfloat16_allows(
    vllm: Callable[..., Any],
) -> None:
    """Against float32, vLLM's bfloat16 is as near as transformers' own; weighted by probability all are close."""
    chat = ChatFormat(load_tokenizer(TEACHER))
    prompts = [chat.prompt_ids(f"What is {n} plus {n}?") for n in (3, 14, 25)]
    call = (prompts, [0, 1, 2], SamplingParams(max_tokens=16, top_logprobs=64))
    (rows,) = vllm(sampled, TEACHER, "bfloat16", [call])
    off_vllm, off_transformers, mass_off = [], [], []
    for prompt, row in zip(prompts, rows, strict=True):
        exact_TK, near_TK = (forced_logprobs(TEACHER, dtype, prompt, row) for dtype in ("float32", "bfloat16"))
        off_vllm.append(np.abs(top_of(row).logprobs_TK - exact_TK))
        off_transformers.append(np.abs(near_TK - exact_TK))
        mass_off.append((np.exp(exact_TK) * off_vllm[-1]).sum(axis=1))
    assert np.concatenate(off_vllm).mean() < 1.5 * np.concatenate(off_transformers).mean()
    assert np.concatenate(mass_off).mean() < 0.02


def top_of(row: Sampled) -> Any:
    """The top log-probabilities of a response, which must be there."""
    assert row.signals is not None
    assert row.signals.top is not None
    return row.signals.top


def forced_logprobs(model_dir: Path, dtype: str, prompt: list[int], row: Sampled) -> Any:
    """Log-probabilities of the same ids by one forward pass of transformers over prompt and response."""
    model: Any = load_model(model_dir, dtype)
    with torch.no_grad():
        logits_TV = model(torch.tensor([[*prompt, *row.token_ids]])).logits[0, len(prompt) - 1 : -1]
    ids_TK = torch.tensor(top_of(row).ids_TK.tolist())
    return logits_TV.float().log_softmax(dim=-1).gather(1, ids_TK).numpy()


@pytest.fixture(scope="module")
def teacher() -> Any:
    return load_model(TEACHER, "float32")


def test_likelihoods_are_those_of_one_row_at_a_time(vllm: Callable[..., Any], teacher: Any) -> None:
    requests = some_scorings(60)
    assert_same(vllm(scored, TEACHER, "float32", requests), [by_hand(teacher, request) for request in requests])


def test_the_least_cache_for_a_context_is_what_vllm_asks(vllm: Callable[..., Any]) -> None:
    config = json.loads((TEACHER / "config.json").read_text(encoding="utf-8"))
    context, shape = config["max_position_embeddings"], ModelShape.of(config)
    assert context % KV_BLOCK_TOKENS == 0, "a context that fills its last block leaves no room to spare"
    least = least_cache_tokens(context) * shape.kv_bytes(4)
    assert len(vllm(scored, TEACHER, "float32", some_scorings(1), least)) == 1
    with pytest.raises(ValueError, match="KV cache is needed"):
        vllm(scored, TEACHER, "float32", [], least - 1)


@pytest.mark.parametrize(
    "cpus", [pytest.param(1, id="in one process"), pytest.param(2, id="in two", marks=pytest.mark.nightly)]
)
def test_the_asynchronous_engine_keeps_the_promises_of_engines(vllm: Callable[..., Any], cpus: int) -> None:
    vllm(check_promises, cpus)


def check_promises(cpus: int) -> None:
    """All checks of `test_engines` on one `VllmEngine`; with two CPUs vLLM divides its work between two processes."""
    from sdft_ray.engines.vllm import VllmEngine

    async def run_checks() -> None:
        with pytest.MonkeyPatch.context() as patch:
            patch.delenv("VLLM_ENABLE_V1_MULTIPROCESSING")  # which the engine then sets by the number of its CPUs
            engine = VllmEngine.start(TEACHER, SETTINGS, cpus=cpus)
        loop = asyncio.get_running_loop()

        class FromAThread:
            """The engine belongs to this loop; the checks wait in a thread."""

            async def answer(self, ask: GenerationRequest) -> Any:
                pieces = asyncio.run_coroutine_threadsafe(pieces_of(engine, ask), loop)
                for piece in await asyncio.wrap_future(pieces):
                    yield piece

        checked: Any = FromAThread()
        model = load_model(TEACHER, "float32")
        try:
            for check in MODEL_CHECKS:
                await asyncio.to_thread(check, checked, model)
            for other_check in OTHER_CHECKS:
                await asyncio.to_thread(other_check, checked)
        finally:
            engine.close()

    asyncio.run(run_checks())


NUM_BLOCKS, KEPT_BLOCKS = 6, (0, 1, 4, 5)
PROMPT, NEW_TOKENS = list(range(20, 40)), 10
FEW_FAMILIES = ("llama", "qwen2", "gemma3_text")
"""Plain; heads tied to the hidden size; windows, four norms a block and an MLP with another activation."""


def heads_of(family: str) -> dict[str, Any]:
    """Heads of 32 channels, the fewest that vLLM's kernels take, for families that do not divide the hidden size."""
    return {"head_dim": 32, "query_pre_attn_scalar": 32} if family.startswith(("gemma", "qwen3")) else {}


def shorter(folder: Path, family: str) -> Path:
    """A checkpoint that lost two blocks, untied where vLLM can hold it so."""
    small: dict[str, Any] = {"hidden": 64, "num_attention_heads": 2, "num_key_value_heads": 1, **heads_of(family)}
    tied = family == "gemma2"
    source = tiny.make_model(
        folder / "source", family, num_blocks=NUM_BLOCKS, tied=tied, max_shard_bytes=60_000, **small
    )
    drop_blocks(source, folder / "shorter", KEPT_BLOCKS, max_shard_bytes=50_000)
    return folder / "shorter"


def narrower(folder: Path, family: str, keep_blocks: tuple[int, ...] = (0, 1), num_blocks: int = 2) -> Path:
    """A checkpoint that lost hidden, MLP and head channels, and with two of more blocks the others too."""
    rng = random.Random(family)

    def some(size: int, count: int) -> tuple[int, ...]:
        return tuple(sorted(rng.sample(range(size), count)))

    source = tiny.make_model(folder / "source", family, num_blocks=num_blocks, hidden=128, **heads_of(family))
    channels = Channels(
        hidden=some(128, 64 if family == "qwen2" else 96),  # whose heads would else have another size
        mlp=(some(256, 160), some(256, 160)),
        kv_groups=((0,), (1,)),
        heads=((0, 1), (2, 3)),
    )
    prune_checkpoint(source, folder / "narrower", keep_blocks, channels)
    return folder / "narrower"


def shorter_and_narrower(folder: Path, family: str) -> Path:
    """A checkpoint that lost the middle two of four blocks, and channels of those that stay."""
    return narrower(folder, family, keep_blocks=(0, 3), num_blocks=4)


@pytest.mark.parametrize(
    ("cut", "families"),
    [
        pytest.param(shorter_and_narrower, FEW_FAMILIES, id="shorter and narrower"),
        pytest.param(shorter, tiny.FAMILIES, id="shorter", marks=pytest.mark.nightly),
        pytest.param(narrower, tiny.FAMILIES, id="narrower", marks=pytest.mark.nightly),
    ],
)
def test_a_stock_engine_decodes_the_same_tokens_of_pruned_checkpoints(
    vllm: Callable[..., Any], tmp_path: Path, cut: Callable[[Path, str], Path], families: tuple[str, ...]
) -> None:
    expected = {}
    for family in families:
        pruned = cut(tmp_path / family, family)
        model: Any = load_model(pruned, "float32")
        options: dict[str, Any] = {"do_sample": False, "max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
        expected[pruned] = model.generate(torch.tensor([PROMPT]), **options)[0, len(PROMPT) :].tolist()
    assert vllm(decoded, list(expected), PROMPT, NEW_TOKENS) == list(expected.values())
