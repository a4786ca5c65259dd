"""FLOPs of training against torch's own count of what the real loss runs, and against the sizes of configs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from sdft_ray.data.packing import Document, attention_inputs, pack
from sdft_ray.models.families import FAMILIES
from sdft_ray.models.size import size_of
from sdft_ray.recipe.arms import Objective
from sdft_ray.training.flops import StepFlops, model_flops, num_pairs, training_flops
from sdft_ray.training.lora import attach
from sdft_ray.training.losses import Teacher, response_loss
from sdft_ray.training.tail import tune_tail
from tests.support.tiny import build_model

pytestmark = pytest.mark.slow

NUM_ROWS, ROW_TOKENS, NUM_LOSS_TOKENS = 2, 12, 2 * 5
DISTILLED = Objective(forward_kl=1.0)
MATCHED = Objective(cross_entropy=0.0, hidden_mse=1.0)


def adapted(model: Any) -> Any:
    return attach(model, 4, 8.0, 0.0, FAMILIES[model.config.model_type].lora_targets)


TUNED: dict[str, Callable[[Any], Any]] = {
    "full": lambda model: model,
    "lora": adapted,
    "some adapters": lambda model: attach(model, 4, 8.0, 0.0, ["o_proj", "down_proj"]),
    "tail of 2": lambda model: tune_tail(model, 2),
    "head": lambda model: tune_tail(model, 0),
}


def counted(model: Any, objective: Objective, teacher: Any) -> int:
    """What torch counts in the loss of two rows of one document each and in its backward pass."""
    mask = [token >= ROW_TOKENS - 5 for token in range(ROW_TOKENS)]
    rows = pack([Document(list(range(3, 3 + ROW_TOKENS)), mask)] * NUM_ROWS, ROW_TOKENS)
    assert rows.num_loss_tokens == NUM_LOSS_TOKENS
    for one in filter(None, (model, teacher)):
        one.set_attn_implementation("eager")  # torch does not count the fused kernel of CPUs
    held = None if teacher is None else Teacher(teacher, range(model.config.num_hidden_layers))
    inputs, mask_BT = attention_inputs(rows, [0, 1]), torch.from_numpy(rows.loss_mask_NT)
    with FlopCounterMode(display=False) as counter:
        response_loss(model.train(), inputs, mask_BT, objective=objective, teacher=held).backward()
    flops = sum(counter.get_flop_counts()["Global"].values())
    return flops - sum(rotations(one) for one in (model, teacher) if one is not None)


def rotations(model: Any) -> int:
    """Transformers takes the angles of positions as a matrix product, which is no work of the model."""
    with FlopCounterMode(display=False) as counter:
        model(input_ids=torch.zeros(NUM_ROWS, ROW_TOKENS, dtype=torch.long))
    return sum(
        sum(counts.values()) for name, counts in counter.get_flop_counts().items() if name.endswith(".rotary_emb")
    )


def expected(flops: StepFlops) -> int:
    """Torch counts every pair of positions of a row: it computes those that are masked, too."""
    pairs = sum(flops.per_pair.values()) * NUM_ROWS * ROW_TOKENS**2
    return flops.per_token * NUM_ROWS * ROW_TOKENS + flops.per_loss_token * NUM_LOSS_TOKENS + pairs


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("tuned", TUNED)
def test_forward_and_backward_equal_torchs_count(tuned: str, tied: bool) -> None:
    model = TUNED[tuned](build_model("llama", num_blocks=4, tied=tied))
    assert expected(training_flops(model, Objective())) == counted(model, Objective(), None)


@pytest.mark.parametrize("tuned", ["full", "lora", "tail of 2"])
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_every_family(family: str, tuned: str) -> None:
    model = TUNED[tuned](build_model(family, num_blocks=3, tied=False))
    assert expected(training_flops(model, Objective())) == counted(model, Objective(), None)


@pytest.mark.parametrize("objective", [DISTILLED, MATCHED], ids=["distilled", "matched"])
def test_a_teacher_adds_its_forward_pass(objective: Objective) -> None:
    model, teacher = adapted(build_model("llama", num_blocks=2)), build_model("llama", num_blocks=3)
    flops = training_flops(model, objective, teacher.requires_grad_(False))
    alone = training_flops(model, objective)
    assert flops.per_token - alone.per_token == model_flops(teacher).per_token
    assert expected(flops) == counted(model, objective, teacher)


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_full_training_is_three_times_the_forward_pass_of_the_config(family: str) -> None:
    model: Any = build_model(family, num_blocks=3)
    flops = model_flops(model)
    forward = size_of(model.config.to_dict()).matmul_flops_per_token
    assert flops.per_token + flops.per_loss_token == 3 * forward
    frozen = model_flops(model.requires_grad_(False))
    assert frozen.per_token + frozen.per_loss_token == forward


def test_gemma_2_looks_back_on_every_other_block() -> None:
    model: Any = build_model("gemma2", num_blocks=4)
    heads = model.config.num_attention_heads * model.config.head_dim
    assert model_flops(model).per_pair == {None: 2 * 12 * heads, 8: 2 * 12 * heads}


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_pairs_are_those_of_the_mask(window: int | None) -> None:
    lengths = [5, 1, 9]
    naive = sum(
        query >= key and (window is None or query - key < window)
        for length in lengths
        for query in range(length)
        for key in range(length)
    )
    positions_N = np.concatenate([np.arange(length) for length in lengths]).astype(np.int32)
    assert num_pairs(positions_N, window) == naive


def test_a_step_counts_what_its_documents_need() -> None:
    flops = StepFlops(per_token=10, per_loss_token=7, per_pair={None: 3, 2: 5})
    assert flops.of(4, 2, np.array([0, 1, 2, 0])) == 4 * 10 + 2 * 7 + 3 * (1 + 2 + 3 + 1) + 5 * (1 + 2 + 2 + 1)
