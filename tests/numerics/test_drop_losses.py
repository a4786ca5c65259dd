"""Losses without blocks, against checkpoints that surgery pruned and the loss that transformers computes itself.

Sequences are longer than the windows, and logits are capped well within their range: a block that got another block's
mask or rotary base shows, and so does a cap that was left out.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from sdft_ray.errors import DataError, ModelError, PlanError
from sdft_ray.importance.perplexity import DropMoments, SetLosses, drop_losses, drop_losses_of_parts, set_losses
from sdft_ray.models.loading import load_model
from sdft_ray.models.surgery import drop_blocks
from tests.support.tiny import FAMILIES, build_model, make_model

pytestmark = pytest.mark.slow

NUM_BLOCKS = 4
LENGTHS = (13, 2, 21, 1, 20)
NUM_PREDICTED = sum(LENGTHS) - len(LENGTHS)
QWEN: dict[str, Any] = {"use_sliding_window": True, "sliding_window": 8, "max_window_layers": 2}
SETTINGS: dict[str, dict[str, Any]] = {
    "llama": {"tied": False},
    "mistral": {"sliding_window": 8},
    "qwen2": QWEN,
    "qwen3": QWEN,
    "phi3": {"sliding_window": 8, "tied": False},
    "gemma2": {"final_logit_softcapping": 1.5},
    "gemma3_text": {"final_logit_softcapping": 1.5},
}


def whole_loss(losses: DropMoments) -> float:
    """Mean loss of the whole model, nats per token."""
    return losses.whole_sum / losses.num_tokens


def documents() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (length,), generator=generator) for length in LENGTHS]


def padded(rows: Sequence[Tensor], width: int, pad: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(rows), width), pad)
    mask = torch.zeros_like(ids)
    for number, row in enumerate(rows):
        ids[number, : len(row)] = row
        mask[number, : len(row)] = 1
    return ids, mask


@torch.no_grad()
def theirs(model: PreTrainedModel) -> float:
    """Mean loss over the predicted tokens of all documents, as transformers computes it."""
    ids, mask = padded(documents(), max(LENGTHS))
    return model(input_ids=ids, attention_mask=mask, labels=ids.masked_fill(mask == 0, -100)).loss.item()


def theirs_without(source: Path, target: Path, start: int, n: int) -> float:
    """`theirs` of the checkpoint from which surgery removed blocks [start, start + n)."""
    keep = [block for block in range(NUM_BLOCKS) if not start <= block < start + n]
    drop_blocks(source, target, keep)
    return theirs(load_model(target, "float32"))


def assert_close(losses: DropMoments, others: DropMoments, within: float) -> None:
    assert losses.num_tokens == others.num_tokens
    assert whole_loss(losses) == pytest.approx(whole_loss(others), abs=within)
    assert losses.one_loss_L == pytest.approx(others.one_loss_L, abs=within)
    assert losses.run_loss_S == pytest.approx(others.run_loss_S, abs=within)


def test_every_family_is_here():
    assert set(SETTINGS) == set(FAMILIES)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_pruned_checkpoints(family: str, tmp_path: Path):
    source = make_model(tmp_path / "teacher", family, num_blocks=NUM_BLOCKS, tokenizer=False, **SETTINGS[family])
    model = load_model(source, "float32")
    batches = [padded(documents()[:3], 21), padded(documents()[3:], 20)]
    single, double = drop_losses(model, batches, 1), drop_losses(model, batches, 2)
    expected = [theirs_without(source, tmp_path / "pruned", start, 1) for start in range(NUM_BLOCKS)]
    expected_runs = [theirs_without(source, tmp_path / "pruned", start, 2) for start in range(NUM_BLOCKS - 1)]
    for losses in (single, double):
        assert losses.num_tokens == NUM_PREDICTED
        assert whole_loss(losses) == pytest.approx(theirs(model), abs=1e-5)
        assert losses.one_loss_L == pytest.approx(expected, abs=1e-5)
    assert single.run_loss_S == single.one_loss_L
    assert double.run_loss_S == pytest.approx(expected_runs, abs=1e-5)
    apart = np.diff(np.sort([whole_loss(single), *expected, *expected_runs]))
    assert apart.min() > 2e-5, "candidates must differ by more than the tolerance, or the test shows little"


@pytest.mark.parametrize("family", FAMILIES)
def test_any_set_of_blocks_against_pruned_checkpoints(family: str, tmp_path: Path):
    """Row by row, of sets with holes, at the start, at the end, and of nothing."""
    sets = [(), (0,), (3,), (0, 2), (1, 3), (0, 3), (0, 1, 3), (1, 2)]
    source = make_model(tmp_path / "teacher", family, num_blocks=NUM_BLOCKS, tokenizer=False, **SETTINGS[family])
    rows = documents()
    batches = [
        (*padded(rows[3:], 20), torch.ones(2, 20), torch.tensor([3, 4])),
        (*padded(rows[:3], 21), torch.ones(3, 21), torch.tensor([0, 1, 2])),
    ]
    found = set_losses(load_model(source, "float32"), batches, sets)
    assert found.row_R.tolist() == [0, 1, 2, 3, 4]
    assert found.tokens_R.tolist() == [length - 1 for length in LENGTHS]
    for number, removed in enumerate(sets):
        drop_blocks(source, tmp_path / "pruned", [block for block in range(NUM_BLOCKS) if block not in removed])
        pruned = load_model(tmp_path / "pruned", "float32")
        with torch.no_grad():
            expected = [
                float(pruned(input_ids=row[None], labels=row[None]).loss) * (len(row) - 1) if len(row) > 1 else 0.0
                for row in rows
            ]
        assert found.nats_RC[:, number] == pytest.approx(expected, abs=2e-4)
        assert found.loss_C[number] == pytest.approx(theirs(pruned), abs=1e-5)


def test_a_set_costs_the_blocks_behind_its_first():
    model, calls = build_model(), [0] * NUM_BLOCKS
    for number, block in enumerate(model.model.layers):

        def count(*_: Any, number: int = number) -> None:
            calls[number] += 1

        block.register_forward_hook(count)
    set_losses(model, [padded(documents(), 21)], [(), (1, 3), (2,)])
    assert calls == [1, 1, 1 + 1, 1 + 1]


def test_row_losses_merge_in_any_order():
    model, sets = build_model(), [(), (0, 2)]
    batches = [
        (*padded([row], len(row)), torch.ones(1, len(row)), torch.tensor([i])) for i, row in enumerate(documents())
    ]
    whole = set_losses(model, batches, sets)
    merged = set_losses(model, batches[3:], sets) + set_losses(model, batches[:3], sets)
    assert merged.to_json() == whole.to_json() == SetLosses.from_json(whole.to_json()).to_json()
    assert (SetLosses.empty(sets) + whole).to_json() == whole.to_json()
    with pytest.raises(ModelError, match="same blocks"):
        _ = whole + SetLosses.empty([()])
    with pytest.raises(DataError, match="no loss was measured"):
        _ = SetLosses.empty(sets).loss_C


def test_a_candidate_is_compared_with_the_chosen_one_row_by_row():
    """The standard error is that of a bootstrap over rows."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(3, 40, 300)
    hard = rng.normal(2.0, 0.5, 300)
    nats = np.stack([hard * tokens, (hard + rng.normal(0.3, 0.4, 300)) * tokens], axis=1)
    found = SetLosses(((1, 2), (3,)), np.arange(300), tokens, nats).candidates((1, 2))
    drawn = rng.integers(300, size=(3000, 300))
    resampled = (nats[drawn, 1] - nats[drawn, 0]).sum(1) / tokens[drawn].sum(1)
    other = found[(3,)]
    assert found[(1, 2)]["beyond"] == found[(1, 2)]["stderr"] == 0
    assert other["loss"] == pytest.approx(nats[:, 1].sum() / tokens.sum())
    assert other["beyond"] == pytest.approx((nats[:, 1] - nats[:, 0]).sum() / tokens.sum())
    assert other["stderr"] == pytest.approx(resampled.std(), rel=0.06)


def test_parts_of_the_rows_add_up():
    """Row i counts in part i mod K, whichever batch it comes in."""
    model = build_model()
    rows = documents()
    batch = (*padded(rows, 21), torch.ones(5, 21), torch.tensor([0, 1, 2, 3, 4]))
    parts = drop_losses_of_parts(model, [batch], 2, [DropMoments.empty(NUM_BLOCKS, 2)] * 3)
    for number, part in enumerate(parts):
        own = [row for i, row in enumerate(rows) if i % 3 == number]
        assert_close(part, drop_losses(model, [padded(own, 21)], 2), within=1e-6)
    assert_close(sum(parts, start=DropMoments.empty(NUM_BLOCKS, 2)), drop_losses(model, [batch[:2]], 2), within=1e-6)


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str):
    model = build_model(family, **SETTINGS[family])
    alone = drop_losses(model, [padded([row], len(row)) for row in documents()], 2)
    # wide padding, and a pad id that is a real token
    assert_close(drop_losses(model, [padded(documents(), 40, pad=77)], 2), alone, within=1e-6)


def test_all_but_one_block_removed(tmp_path: Path):
    source = make_model(tmp_path / "teacher", tokenizer=False)
    losses = drop_losses(load_model(source, "float32"), [padded(documents(), 21)], 3)
    expected = [theirs_without(source, tmp_path / "pruned", start, 3) for start in range(2)]
    assert losses.run_loss_S == pytest.approx(expected, abs=1e-5)


def test_shards_merge_to_one_pass():
    model = build_model()
    batches = [padded([row], len(row)) for row in documents()]
    whole = drop_losses(model, batches, 2)
    parts = [drop_losses(model, shard, 2) for shard in (batches[3:], batches[:1], batches[1:3])]
    assert_close(sum(parts, start=DropMoments.empty(NUM_BLOCKS, 2)), whole, within=1e-12)
    stored = [DropMoments.from_json(part.to_json()) for part in parts]
    assert (stored[0] + stored[1]).to_json() == (parts[0] + parts[1]).to_json()
    assert drop_losses(model, batches[2:], 2, drop_losses(model, batches[:2], 2)).to_json() == whole.to_json()
    assert drop_losses(model, [], 2, whole).to_json() == whole.to_json()


class Watched(nn.Module):
    """A head that notes how many tokens it sees at a time."""

    def __init__(self, head: nn.Linear) -> None:
        super().__init__()
        self.weight, self.seen = head.weight, list[int]()

    def forward(self, hidden_CD: Tensor) -> Tensor:
        self.seen.append(len(hidden_CD))
        return hidden_CD @ self.weight.T


def test_memory_is_bounded_and_changes_nothing():
    model, batch = build_model(), padded(documents(), 21)
    whole, passes = drop_losses(model, [batch], 2), []
    head = Watched(model.lm_head)
    model.lm_head = head
    model.model.register_forward_hook(lambda *_: passes.append(1))
    assert_close(drop_losses(model, [batch], 2, max_logits=10 * 128), whole, within=1e-6)
    assert (max(head.seen), len(passes)) == (10, 1)
    head.seen.clear()
    assert_close(drop_losses(model, [batch], 2, max_logits=1, stream_bytes=1), whole, within=1e-6)
    assert (max(head.seen), len(passes)) == (1, 1 + len(LENGTHS))


def test_each_candidate_costs_only_the_blocks_after_it():
    model, calls = build_model(), [0] * NUM_BLOCKS
    for number, block in enumerate(model.model.layers):

        def count(*_: Any, number: int = number) -> None:
            calls[number] += 1

        block.register_forward_hook(count)
    drop_losses(model, [padded(documents(), 21)], 2)
    assert calls == [1, 1 + 1, 1 + 2 + 1, 1 + 3 + 2]  # whole model, single blocks before it, runs before it
    assert not any(block._forward_pre_hooks for block in model.model.layers)


def test_identity_block_costs_nothing():
    model = build_model()
    block = model.model.layers[1]
    nn.init.zeros_(block.self_attn.o_proj.weight)
    nn.init.zeros_(block.mlp.down_proj.weight)
    losses = drop_losses(model, [padded(documents(), 21)], 1)
    assert losses.one_loss_L[1] == pytest.approx(whole_loss(losses), abs=1e-6)
    assert all(abs(losses.one_loss_L[other] - whole_loss(losses)) > 1e-4 for other in (0, 2, 3))


def test_low_precision_is_close_and_float64_is_kept():
    batch = [padded(documents(), 21)]
    exact, plain, rough = (drop_losses(build_model(dtype=d), batch, 2) for d in ("float64", "float32", "bfloat16"))
    assert_close(plain, exact, within=1e-6)
    assert_close(rough, exact, within=0.05)
    assert whole_loss(plain) != whole_loss(exact) != whole_loss(rough)


def test_json_keeps_every_digit():
    losses = DropMoments(1 / 3, np.asarray([0.1, 1e-300, 2 / 3]), np.asarray([1e300, np.pi]), 2, 7)
    again = DropMoments.from_json(losses.to_json())
    assert again.to_json() == losses.to_json()
    assert (again.whole_sum, again.num_removed, again.num_tokens) == (1 / 3, 2, 7)
    assert np.array_equal(again.one_sum_L, losses.one_sum_L)
    assert np.array_equal(again.run_sum_S, losses.run_sum_S)
    assert again.run_sum_S.dtype == np.float64


@pytest.mark.parametrize("num_removed", [-1, 0, 4, 5])
def test_some_blocks_are_removed_and_some_stay(num_removed: int):
    with pytest.raises(PlanError, match="remove 1 to 3 blocks"):
        drop_losses(build_model(), [], num_removed)


def test_a_single_block_cannot_be_missed():
    with pytest.raises(PlanError, match="two blocks or more"):
        DropMoments.empty(1, 1)


def test_nothing_measured_has_no_mean():
    rows_of_one = drop_losses(build_model(), [padded([torch.tensor([5])], 3)], 2)
    for nothing in (DropMoments.empty(4, 2), rows_of_one):
        for name in ("one_loss_L", "run_loss_S"):
            with pytest.raises(DataError, match="no loss was measured"):
                getattr(nothing, name)


def test_other_blocks_do_not_merge():
    with pytest.raises(ModelError, match="without 2 of 4 blocks and without 2 of 5 blocks"):
        _ = DropMoments.empty(4, 2) + DropMoments.empty(5, 2)
    with pytest.raises(ModelError, match="without 2 of 4 blocks and without 1 of 4 blocks"):
        drop_losses(build_model(), [], 2, DropMoments.empty(4, 1))


def test_bad_batches_are_refused():
    ids = torch.ones(1, 4, dtype=torch.long)
    for mask in ([[0, 1, 1, 1]], [[1, 0, 1, 1]]):
        with pytest.raises(DataError, match="padded on the left"):
            drop_losses(build_model(), [(ids, torch.tensor(mask))], 1)
    with pytest.raises(DataError, match="no tokens"):
        drop_losses(build_model(), [(ids, torch.zeros_like(ids))], 1)


def test_models_without_a_known_head_are_refused():
    model = build_model()
    with pytest.raises(ModelError, match="LlamaModel has no LM head"):
        drop_losses(model.model, [], 1)
    sizes = {"hidden_size": 32, "intermediate_size": 64, "num_attention_heads": 4, "num_key_value_heads": 2}
    config = AutoConfig.for_model("granite", vocab_size=128, num_hidden_layers=2, **sizes)
    with pytest.raises(ModelError, match="unsupported architecture 'granite'"):  # it divides its logits
        drop_losses(AutoModelForCausalLM.from_config(config).eval(), [], 1)


def test_overflow_is_named_not_hidden():
    model = build_model()
    nn.init.constant_(model.model.layers[2].mlp.down_proj.weight, float("inf"))
    with pytest.raises(ModelError, match="whole model is not finite → check the weights"):
        drop_losses(model, [padded(documents(), 21)], 1)


def test_overflow_without_a_block_is_named():
    """Block 2 overflows on the embeddings themselves, which it sees only without blocks 0 and 1."""
    model, batch = build_model(), padded(documents(), 21)
    embeddings_BTD = torch.empty(0)

    def keep(_block: nn.Module, args: tuple[Tensor, ...]) -> None:
        nonlocal embeddings_BTD
        embeddings_BTD = args[0]

    def overflow(_block: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
        return output / 0 if torch.equal(args[0], embeddings_BTD) else output

    model.model.layers[0].register_forward_pre_hook(keep)
    model.model.layers[2].register_forward_hook(overflow)
    drop_losses(model, [batch], 1)
    with pytest.raises(ModelError, match="without blocks 0 to 1 the loss is not finite"):
        drop_losses(model, [batch], 2)


def test_training_mode_is_our_mistake():
    with pytest.raises(AssertionError, match="dropout"):
        drop_losses(build_model().train(), [], 1)


def test_only_tokens_of_the_response_count(tmp_path: Path) -> None:
    """Against transformers' loss, whose label -100 leaves a token out."""
    model = load_model(make_model(tmp_path / "m"), "float32")
    generator = torch.Generator().manual_seed(3)
    ids_BT = torch.randint(3, 128, (3, 15), generator=generator)
    said_BT = torch.randint(0, 2, (3, 15), generator=generator)
    mask_BT = torch.ones_like(ids_BT)
    found = drop_losses(model, [(ids_BT, mask_BT, said_BT)], 1, stream_bytes=1)
    with torch.no_grad():
        expected = model(input_ids=ids_BT, labels=ids_BT.masked_fill(said_BT == 0, -100)).loss
    assert found.num_tokens == int(said_BT[:, 1:].sum())
    assert whole_loss(found) == pytest.approx(float(expected), abs=1e-5)
