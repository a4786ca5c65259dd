"""The loop against plain gradients, against itself under other splits, and interrupted."""

from __future__ import annotations

import weakref
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from sdft_ray.data.packing import Document, PackedRows, pack
from sdft_ray.errors import DataError, RecipeError, StoreError
from sdft_ray.training.loop import StepRecord, TrainPlan, mean_loss, rows_of_step, train
from sdft_ray.training.lora import attach
from sdft_ray.training.state import TrainState, load_state, save_state
from tests.support.tiny import build_model

PLAN = TrainPlan(num_steps=4, rows_per_step=5, learning_rate=3e-3, clip_norm=1e9, checkpoint_every=1)


@pytest.fixture(scope="module")
def rows() -> PackedRows:
    rng = np.random.default_rng(0)
    lengths = rng.integers(3, 20, 24)
    return pack([Document(rng.integers(0, 128, n).tolist(), [i >= n // 2 for i in range(n)]) for n in lengths], 32)


def small_model(**settings: Any) -> Any:
    return build_model("llama", num_blocks=2, **settings)


def run(model: Any, rows: PackedRows, plan: TrainPlan, **kwargs: Any) -> tuple[list[StepRecord], list[TrainState]]:
    """Records and copied states of a training run."""
    records: list[StepRecord] = []
    states: list[TrainState] = []

    def save(state: TrainState) -> None:
        weights = {name: value.clone() for name, value in state.weights.items()}
        kept = {name: {key: v.clone() for key, v in values.items()} for name, values in state.optimizer.items()}
        averages = {name: value.clone() for name, value in state.averages.items()}
        states.append(TrainState(state.step, weights, kept, state.identity, averages))

    train(model, rows, plan, report=records.append, save=save, **kwargs)
    return records, states


def first_gradient(states: list[TrainState]) -> dict[str, torch.Tensor]:
    """AdamW's first moment after one step is (1 - beta_1) times the first gradient."""
    return {name: kept["exp_avg"] / (1 - PLAN.betas[0]) for name, kept in states[0].optimizer.items()}


def naive_step(model: Any, rows: PackedRows, indices: np.ndarray) -> tuple[float, dict[str, torch.Tensor]]:
    """Mean loss and gradient of some rows, document by document, by the loss of transformers' logits."""
    few = PackedRows(*(getattr(rows, field.name)[indices] for field in fields(rows)))
    total = torch.zeros(())
    for document in few.documents():
        labels = torch.tensor(
            [token if counts else -100 for token, counts in zip(document.ids, document.loss_mask, strict=True)]
        )
        logits_TV = model(input_ids=torch.tensor([document.ids])).logits[0]
        total = total + torch.nn.functional.cross_entropy(logits_TV[:-1], labels[1:], reduction="sum")
    mean = total / few.num_loss_tokens
    model.zero_grad()
    mean.backward()
    return mean.item(), {name: p.grad.clone() for name, p in model.named_parameters()}


def test_loss_and_gradient_of_a_step_are_means_over_its_response_tokens(rows: PackedRows):
    loss, gradient = naive_step(small_model(), rows, rows_of_step(0, rows.num_rows, 5, PLAN.seed))
    records, states = run(small_model(), rows, replace(PLAN, micro_batch_rows=2))
    assert records[0].loss == pytest.approx(loss, rel=1e-5)
    norm = torch.cat([g.flatten() for g in gradient.values()]).norm().item()
    assert records[0].grad_norm == pytest.approx(norm, rel=1e-5)
    found = first_gradient(states)
    assert found.keys() == gradient.keys()
    for name, expected in gradient.items():
        torch.testing.assert_close(found[name], expected, rtol=1e-3, atol=1e-5, msg=name)


def test_micro_batches_do_not_change_loss_or_gradient(rows: PackedRows):
    records, states = run(small_model(), rows, replace(PLAN, micro_batch_rows=5))
    for micro_batch_rows in (1, 3):
        others, other_states = run(small_model(), rows, replace(PLAN, micro_batch_rows=micro_batch_rows))
        assert [r.loss for r in others] == pytest.approx([r.loss for r in records], rel=1e-5)
        assert [r.num_loss_tokens for r in others] == [r.num_loss_tokens for r in records]
        for name, gradient in first_gradient(states).items():
            torch.testing.assert_close(first_gradient(other_states)[name], gradient, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
@pytest.mark.parametrize(("optimizer", "rate"), [("adamw", 5e-3), ("muon", 5e-3)])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_it_learns(rows: PackedRows, optimizer: Any, rate: float, precision: Any):
    model = small_model()
    plan = TrainPlan(25, 8, rate, optimizer=optimizer, precision=precision)
    before = mean_loss(model, rows)
    summary = train(model, rows, plan)
    assert mean_loss(model, rows) < 0.6 * before
    assert summary.num_steps == 25
    assert summary.loss < 0.7 * before


def test_bf16_follows_fp32(rows: PackedRows):
    exact, _ = run(small_model(), rows, PLAN)
    rough, _ = run(small_model(), rows, replace(PLAN, precision="bf16"))
    assert [r.loss for r in rough] == pytest.approx([r.loss for r in exact], rel=0.02)
    assert [r.loss for r in rough] != [r.loss for r in exact]


@pytest.mark.slow
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_an_interrupted_run_ends_bit_equal(rows: PackedRows, optimizer: Any, precision: Any, tmp_path: Path):
    plan = replace(PLAN, num_steps=5, checkpoint_every=3, optimizer=optimizer, precision=precision)
    whole = small_model()
    records, _ = run(whole, rows, plan)
    train(small_model(), rows, plan, save=lambda state: save_state(tmp_path, state))
    rest = small_model(seed=9)  # its weights must not matter
    resumed, _ = run(rest, rows, plan, resume=load_state(tmp_path))
    assert [r.step for r in resumed] == [4, 5]
    assert [(r.loss, r.grad_norm) for r in resumed] == [(r.loss, r.grad_norm) for r in records[3:]]
    for (name, expected), found in zip(whole.named_parameters(), rest.parameters(), strict=True):
        assert torch.equal(found, expected), name


def test_an_interrupted_run_with_dropout_ends_bit_equal(rows: PackedRows, tmp_path: Path):
    def adapted() -> Any:
        return attach(small_model(), 4, 8.0, 0.3, ["q_proj", "down_proj"])

    plan = replace(PLAN, checkpoint_every=2)
    whole, rest = adapted(), adapted()
    torch.manual_seed(1)
    train(whole, rows, plan)
    torch.manual_seed(2)
    train(adapted(), rows, plan, save=lambda state: save_state(tmp_path / str(state.step), state))
    train(rest, rows, plan, resume=load_state(tmp_path / "2"))
    for expected, found in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(found, expected)


def test_a_state_of_another_run_is_refused_with_the_fields_that_differ(rows: PackedRows):
    _, states = run(small_model(), rows, PLAN)
    changed = replace(PLAN, learning_rate=1.0, seed=4)
    with pytest.raises(StoreError, match=r"another plan or data set: learning_rate 0.003 → 1.0, seed 0 → 4 "):
        train(small_model(), rows, changed, resume=states[0])
    other_execution = replace(PLAN, micro_batch_rows=1, checkpoint_every=0, activation_checkpointing=True)
    assert train(small_model(), rows, other_execution, resume=states[-1]).num_steps == 0


def test_every_epoch_shows_every_row_once_and_ranks_share_the_step():
    steps = [rows_of_step(step, 10, 4, seed=3).tolist() for step in range(10)]
    order = [row for step in steps for row in step]
    epochs = [order[start : start + 10] for start in range(0, 40, 10)]
    assert all(sorted(epoch) == list(range(10)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 4
    assert steps != [rows_of_step(step, 10, 4, seed=4).tolist() for step in range(10)]


def test_gradients_are_clipped_and_their_norm_recorded_before(rows: PackedRows):
    free, _ = run(small_model(), rows, PLAN)
    records, states = run(small_model(), rows, replace(PLAN, clip_norm=0.01))
    assert records[0].grad_norm == free[0].grad_norm > 0.01
    norm = torch.cat([g.flatten() for g in first_gradient(states).values()]).norm()
    assert norm.item() == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_the_model_keeps_its_dtype_buffers_and_attention(rows: PackedRows, dtype: str, precision: Any):
    model = small_model(dtype=dtype)
    frequencies = {name: buffer.clone() for name, buffer in model.named_buffers()}
    train(model, rows, replace(PLAN, precision=precision))
    assert {p.dtype for p in model.parameters()} == {getattr(torch, dtype)}
    assert all(p.grad is None for p in model.parameters())
    for name, buffer in model.named_buffers():
        assert torch.equal(buffer, frequencies[name])
    assert model.config._attn_implementation == "sdpa"
    assert not model.training


def test_frozen_weights_survive_bf16_training_to_the_bit(rows: PackedRows):
    model = attach(small_model(), 2, 4.0, 0.0, ["q_proj"])
    before = {name: p.clone() for name, p in model.named_parameters()}
    train(model, rows, replace(PLAN, precision="bf16"))
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name]) != p.requires_grad, name


def test_the_callers_random_numbers_are_left_alone(rows: PackedRows):
    model = small_model()
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    train(model, rows, PLAN)
    assert torch.equal(torch.rand(3), expected)


def test_records_count_finished_steps_and_tokens(rows: PackedRows):
    model = small_model()
    plan = TrainPlan(
        num_steps=2, rows_per_step=rows.num_rows, learning_rate=1e-3, schedule="linear", warmup_fraction=0.5
    )
    records, states = run(model, rows, plan)
    assert [r.step for r in records] == [1, 2]
    assert {r.num_tokens for r in records} == {rows.num_tokens}
    assert {r.num_loss_tokens for r in records} == {rows.num_loss_tokens}
    assert [r.learning_rate for r in records] == [1e-3, 1e-3]
    assert states == []
    assert records[0].loss == pytest.approx(mean_loss(small_model(), rows), rel=1e-5)


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_averages_are_those_of_the_weights_after_each_step(rows: PackedRows, optimizer: Any):
    plan = replace(PLAN, num_steps=12, ema_decay=0.6, optimizer=optimizer)
    model = small_model()
    expected = {name: p.detach().clone() for name, p in model.named_parameters()}
    _, states = run(model, rows, plan)
    for step, state in enumerate(states):
        decay = min(0.6, (1 + step) / (10 + step))
        for name, value in expected.items():
            value.mul_(decay).add_(state.weights[name] * (1 - decay))
            torch.testing.assert_close(state.averages[name], value, rtol=1e-5, atol=1e-7)
    for name, found in model.named_parameters():
        assert torch.equal(found, states[-1].averages[name]), name
        assert not torch.equal(found, states[-1].weights[name]), name


def test_an_interrupted_run_with_averages_ends_bit_equal(rows: PackedRows, tmp_path: Path):
    plan = replace(PLAN, checkpoint_every=2, ema_decay=0.9)
    whole, rest = small_model(), small_model(seed=3)
    train(whole, rows, plan, save=lambda state: save_state(tmp_path / str(state.step), state))
    train(rest, rows, plan, resume=load_state(tmp_path / "2"))
    for expected, found in zip(whole.parameters(), rest.parameters(), strict=True):
        assert torch.equal(found, expected)


@pytest.mark.parametrize("adapted", [False, True])
def test_recomputed_activations_change_nothing(rows: PackedRows, adapted: bool):
    def fresh() -> Any:
        return attach(small_model(), 2, 4.0, 0.3, ["q_proj", "down_proj"]) if adapted else small_model()

    kept, again = fresh(), fresh()
    expected, _ = run(kept, rows, PLAN)
    found, _ = run(again, rows, replace(PLAN, activation_checkpointing=True))
    assert [(r.loss, r.grad_norm) for r in found] == [(r.loss, r.grad_norm) for r in expected]
    for one, other in zip(kept.parameters(), again.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not any(getattr(module, "gradient_checkpointing", False) for module in again.modules())


def test_recomputed_activations_are_not_held(rows: PackedRows):
    """What autograd keeps for the backward pass, in bytes."""
    held = {}
    for checkpointing in (False, True):
        sizes: list[int] = []

        def keep(tensor: torch.Tensor, sizes: list[int] = sizes) -> torch.Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        plan = replace(PLAN, num_steps=1, activation_checkpointing=checkpointing, checkpoint_every=0)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            train(build_model("llama", num_blocks=6), rows, plan)
        held[checkpointing] = sum(sizes)
    assert held[True] < held[False] / 3


def test_divergence_is_told(rows: PackedRows):
    with pytest.raises(RecipeError, match=r"diverged at step \d+.*lower the learning rate"):
        train(small_model(), rows, replace(PLAN, num_steps=50, learning_rate=1e30))


def test_a_row_without_a_finite_loss_is_named_with_its_documents():
    texts = [Document([20 + i] * 20, [False] * 5 + [True] * 15) for i in range(8)]
    texts[5].ids[3] = 7
    rows = pack(texts, 20)
    model = small_model(tied=False)
    with torch.no_grad():
        model.get_input_embeddings().weight[7] = float("nan")
    plan = replace(PLAN, rows_per_step=8, micro_batch_rows=1)
    with pytest.raises(RecipeError, match=r"diverged at step 1: loss nan.*packed rows 5, which hold example-5 →"):
        train(model, rows, plan, name_of=lambda index: f"example-{index}")


def test_a_step_without_response_tokens_is_refused_with_its_documents():
    texts = [Document([5] * 20, [False] * 20), Document([6] * 20, [False] * 10 + [True] * 10)]
    rows = pack(texts, 20)
    with pytest.raises(DataError, match=r"no token of step \d counts in the loss: packed rows 0, which hold a →"):
        train(small_model(), rows, replace(PLAN, rows_per_step=1), name_of=lambda index: "ab"[index])


def test_rows_without_response_are_refused():
    silent = pack([Document([1, 2, 3], [True, False, False])], 4)
    with pytest.raises(DataError, match="no token"):
        train(small_model(), silent, PLAN)
    with pytest.raises(DataError, match="no token"):
        mean_loss(small_model(), silent)


def test_checkpoints_come_by_time_and_by_steps(rows: PackedRows):
    def steps(every: int, every_s: float) -> list[int]:
        _, states = run(small_model(), rows, replace(PLAN, checkpoint_every=every, checkpoint_every_s=every_s))
        return [state.step for state in states]

    assert steps(0, 1e-9) == [1, 2, 3, 4]
    assert steps(3, 1e-9) == [1, 2, 3, 4]
    assert steps(3, 1e9) == [3]
    assert steps(0, 1e9) == steps(0, 0.0) == []


def test_a_state_is_let_go_of_once_it_is_loaded(rows: PackedRows, tmp_path: Path):
    plan = replace(PLAN, checkpoint_every=3)
    train(small_model(), rows, plan, save=lambda state: save_state(tmp_path, state))
    states = [load_state(tmp_path)]
    kept = weakref.ref(states[0].weights["model.embed_tokens.weight"])
    seen: list[object] = []
    train(small_model(), rows, plan, resume=states.pop(), report=lambda record: seen.append(kept()))
    assert seen == [None]
