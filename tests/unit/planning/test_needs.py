"""Formulas against what torch keeps, and figures that are stated twice."""

from __future__ import annotations

import inspect
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.packing import Document, pack
from sdft_ray.generation import scoring, vllm_arguments
from sdft_ray.importance import depth
from sdft_ray.planning import engines, passes
from sdft_ray.planning import training as planned
from sdft_ray.planning.engines import Work, transformers_need, vllm_need
from sdft_ray.planning.shape import ModelShape
from sdft_ray.planning.training import Training, block_bytes, worker_need
from sdft_ray.recipe.arms import Lora, Objective
from sdft_ray.recipe.resources import Train
from sdft_ray.training import attention, head
from sdft_ray.training.attention import document_attention
from sdft_ray.training.losses import response_loss
from sdft_ray.training.step import batch
from tests.support.tiny import build_model

SIZES: dict[str, Any] = {"hidden": 96, "intermediate_size": 256, "num_attention_heads": 6, "vocab_size": 500}


def _shape(num_blocks: int, family: str = "llama") -> ModelShape:
    return ModelShape.of(build_model(family, num_blocks=num_blocks, **SIZES).config.to_dict() | {"dtype": "float32"})


def _kept(family: str, num_blocks: int, dtype: torch.dtype, document_tokens: int) -> int:
    """Bytes of all tensors that autograd keeps of one row of 256 tokens, weights left out."""
    model: Any = build_model(family, num_blocks=num_blocks, **SIZES).train()
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    half = document_tokens // 2
    document = Document([5] * document_tokens, [False] * half + [True] * (document_tokens - half))
    inputs, mask = batch(pack([document] * (256 // document_tokens), 256), np.array([0]), "cpu")
    own = {parameter.data_ptr() for parameter in model.parameters()}
    kept: dict[int, int] = {}

    def pack_hook(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with document_attention(model), torch.autograd.graph.saved_tensors_hooks(pack_hook, lambda tensor: tensor):
        loss = response_loss(model, inputs, mask)
    total = sum(kept.values())
    del loss
    return total


@pytest.mark.parametrize(
    ("family", "dtype", "document_tokens"),
    [
        ("llama", torch.bfloat16, 64),
        ("llama", torch.bfloat16, 250),
        ("llama", torch.float32, 64),
        ("qwen2", torch.bfloat16, 128),
        ("phi3", torch.float32, 128),
    ],
)
def test_a_block_keeps_what_the_formula_says(family: str, dtype: torch.dtype, document_tokens: int) -> None:
    one, three = (_kept(family, num, dtype, document_tokens) for num in (1, 3))
    kept = (three - one) / 2 / 256
    assert block_bytes(_shape(1, family), dtype.itemsize, document_tokens) == pytest.approx(kept, rel=0.12)


def test_figures_that_are_stated_twice() -> None:
    """This room imports no torch, so it repeats some constants of rooms that do."""
    assert {"memory": head.MAX_LOGITS["cpu"], "GPU memory": head.MAX_LOGITS["cuda"]} == planned.MAX_LOGITS
    assert planned._LONG == attention._LONG
    assert passes.STREAM_BYTES == depth.STREAM_BYTES
    assert depth._UNITS_BYTES["cpu"] == passes._UNITS_BYTES
    assert engines.STEP_TOKENS == vllm_arguments._AT_LEAST
    assert inspect.signature(scoring.score).parameters["batch_tokens"].default == engines.SCORE_TOKENS


def test_states_of_training() -> None:
    """16 bytes a parameter in float32, 20 with bfloat16 copies and their gradients; adapters freeze the rest."""
    shape = _shape(4)
    work = Training(shape, Objective(), 8, 8, 1, 4)
    base = planned.TORCH_PROCESS

    def states(work: Training, **settings: Any) -> int:
        need = worker_need(work, Train(**settings), num_workers=1, micro_batch_rows=1)
        names = ("weights", "gradients", "optimizer", "bfloat16 copies", "running average")
        return sum(need.terms.get(name, 0) for name in names)

    assert states(work, precision="fp32") == 16 * shape.num_parameters
    assert states(work, precision="bf16") == 18 * shape.num_parameters  # gradients of a pass beside activations
    adapted = states(Training(shape, Objective(), 8, 8, 1, 4, lora=Lora(rank=2)), precision="fp32")
    assert adapted < 1.5 * 4 * shape.num_parameters
    averaged = states(Training(shape, Objective(), 8, 8, 1, 4, has_average=True), precision="fp32")
    assert averaged == 20 * shape.num_parameters
    assert worker_need(work, Train(), num_workers=1, micro_batch_rows=1).terms["process"] == base


def test_more_of_anything_needs_more() -> None:
    shape = _shape(4)
    work = Training(shape, Objective(), 128, 64, 32, 4)

    def need(work: Training = work, workers: int = 1, rows: int = 2, **settings: Any) -> int:
        return worker_need(work, Train(**settings), num_workers=workers, micro_batch_rows=rows).total

    assert need(rows=1) < need() < need(rows=4)
    assert need(activation_checkpointing=True) < need()
    assert need(workers=2) > 1.9 * need()
    assert need(Training(shape, Objective(forward_kl=1.0), 128, 64, 32, 4, teacher=shape)) > need()
    assert need(Training(shape, Objective(), 256, 64, 32, 4)) > need()
    assert need(rows=64) == need(rows=32), "a step has 32 rows"
    short, long = (Work(8, tokens, 16, all_tokens=10**6) for tokens in (64, 512))
    for ask in (
        lambda work: vllm_need(shape, 4, work, kv_cache_bytes=2**20, context_tokens=1024).total,
        lambda work: transformers_need(shape, 4, work).total,
    ):
        assert ask(short) < ask(long)
