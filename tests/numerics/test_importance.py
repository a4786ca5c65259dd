"""Importance against naive versions straight from the formulas, and against transformers' hidden states."""

import math
from typing import cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from sdft_ray.importance.depth import DepthMoments, DepthScores, measure, measure_parts
from tests.support.tiny import FAMILIES, build_model

LENGTHS = (13, 5, 21, 1, 20)


def rows() -> list[Tensor]:
    generator = torch.Generator().manual_seed(7)
    return [torch.randint(3, 128, (length,), generator=generator) for length in LENGTHS]


def padded(documents: list[Tensor], width: int, pad: int = 0) -> tuple[Tensor, Tensor]:
    ids = torch.full((len(documents), width), pad)
    mask = torch.zeros_like(ids)
    for row, document in enumerate(documents):
        ids[row, : len(document)] = document
        mask[row, : len(document)] = 1
    return ids, mask


@torch.no_grad()
def boundaries(model: PreTrainedModel, document: Tensor) -> Tensor:
    """(L + 1, T, D): hidden states as transformers returns them, but the last one before the final norm."""
    seen: list[Tensor] = []
    handle = cast(nn.Module, model.get_decoder().norm).register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    states = model(document[None], output_hidden_states=True).hidden_states
    handle.remove()
    return torch.cat([*states[:-1], seen[0]]).double()


def naive_angular_distance(x: Tensor, start: int, n: int) -> Tensor:
    """arXiv:2403.17887: arccos(x_l . x_{l+n} / |x_l||x_{l+n}|) / pi, for every token."""
    inner = (x[start] * x[start + n]).sum(-1)
    return torch.arccos((inner / (x[start].norm(dim=-1) * x[start + n].norm(dim=-1))).clamp(-1, 1)) / math.pi


def naive_block_influence(x: Tensor, block: int) -> Tensor:
    """arXiv:2403.03853: 1 - cosine of a block's input and output, for every token."""
    return 1 - torch.nn.functional.cosine_similarity(x[block], x[block + 1], dim=-1)


@pytest.mark.parametrize("family", FAMILIES)
def test_against_naive_formulas(family: str):
    model = build_model(family)
    num_blocks = 4
    states = [boundaries(model, document) for document in rows()]
    scores = measure(model, [padded(rows()[:3], 21), padded(rows()[3:], 20)]).scores()
    assert (scores.num_sequences, scores.num_tokens) == (len(LENGTHS), sum(LENGTHS))
    assert len(scores.angular_last_LN) == len(scores.angular_mean_LN) == num_blocks - 1
    for n in range(1, num_blocks):
        for start in range(num_blocks):
            last, mean = scores.angular_last_LN[n - 1][start], scores.angular_mean_LN[n - 1][start]
            if start + n > num_blocks:
                assert last is None
                assert mean is None
                continue
            distances = [naive_angular_distance(x, start, n) for x in states]
            assert last == pytest.approx(torch.stack([d[-1] for d in distances]).mean().item(), abs=1e-6)
            assert mean == pytest.approx(torch.cat(distances).mean().item(), abs=1e-6)
    for block in range(num_blocks):
        naive = torch.cat([naive_block_influence(x, block) for x in states]).mean().item()
        assert scores.block_influence_L[block] == pytest.approx(naive, abs=1e-6)


def _rows(scores: DepthScores) -> list[list[float]]:
    return [[x for x in row if x is not None] for row in scores.angular_last_LN + scores.angular_mean_LN]


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_changes_nothing(family: str):
    model = build_model(family)
    alone = measure(model, [padded([document], len(document)) for document in rows()]).scores()
    # wide padding, and a pad id that is a real token
    together = measure(model, [padded(rows(), 40, pad=77)]).scores()
    for one, other in zip(_rows(alone), _rows(together), strict=True):
        assert one == pytest.approx(other, abs=1e-6)
    assert together.block_influence_L == pytest.approx(alone.block_influence_L, abs=1e-6)
    assert together.num_tokens == alone.num_tokens


def test_sharding_changes_nothing():
    model = build_model()
    batches = [padded([document], len(document)) for document in rows()]
    whole = measure(model, batches)
    merged = measure(model, batches[3:]) + measure(model, batches[:1]) + measure(model, batches[1:3])
    assert np.abs(merged.angular_mean_sum - whole.angular_mean_sum).max() / whole.num_tokens < 1e-12
    assert np.abs(merged.angular_last_sum - whole.angular_last_sum).max() / whole.num_sequences < 1e-12
    assert np.abs(merged.cosine_sum - whole.cosine_sum).max() / whole.num_tokens < 1e-12


def test_parts_of_the_rows_are_measured_apart():
    """Row i counts in part i mod K; a part has what its rows alone have."""
    model, documents = build_model(), rows()
    batches = [
        (*padded(documents[3:], 20), torch.tensor([3, 4])),
        (*padded(documents[:3], 21), torch.tensor([0, 1, 2])),
    ]
    parts = measure_parts(model, batches, [DepthMoments.empty(4)] * 2)
    for number, part in enumerate(parts):
        own = [row for i, row in enumerate(documents) if i % 2 == number]
        alone = measure(model, [padded(own, 21)])
        assert (part.num_sequences, part.num_tokens) == (alone.num_sequences, alone.num_tokens)
        for name in ("angular_last_sum", "angular_mean_sum", "cosine_sum"):
            np.testing.assert_allclose(getattr(part, name), getattr(alone, name), atol=1e-5)
    scores = (parts[0] + parts[1]).scores()
    for position, matrix in (("last", scores.angular_last_LN), ("mean", scores.angular_mean_LN)):
        sums, counts = zip(*(part.run_sums(2, position) for part in parts), strict=True)
        assert (np.sum(sums, axis=0) / sum(counts)).tolist() == pytest.approx(matrix[1][:3])
    sums, counts = zip(*(part.influence_sums() for part in parts), strict=True)
    assert (np.sum(sums, axis=0) / sum(counts)).tolist() == pytest.approx(scores.block_influence_L)


def test_many_tokens_are_summed_exactly():
    """More tokens than one chunk of work holds: the same means as over the pieces."""
    model = build_model(num_blocks=2, hidden=128)  # 2,730 tokens to a chunk
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(3, 128, (40, 75), generator=generator)
    whole = measure(model, [(ids, torch.ones_like(ids))]).scores()
    pieces = measure(model, [(part, torch.ones_like(part)) for part in ids.split(10)]).scores()
    assert whole.num_tokens == 40 * 75
    assert whole.block_influence_L == pytest.approx(pieces.block_influence_L, abs=1e-7)
    assert whole.angular_mean_LN[0] == pytest.approx(pieces.angular_mean_LN[0], abs=1e-7)
