import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from sdft_ray.errors import DataError, ModelError
from sdft_ray.importance.depth import measure
from sdft_ray.importance.moments import DepthMoments
from tests.support.tiny import build_model


def batch(*lengths: int, width: int | None = None) -> tuple[Tensor, Tensor]:
    """Right-padded rows of random tokens."""
    width = width or max(lengths)
    generator = torch.Generator().manual_seed(sum(lengths))
    mask = (torch.arange(width) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(7, 128, mask.shape, generator=generator) * mask, mask


class Forbidden(nn.Module):
    def forward(self, _: Tensor) -> Tensor:
        raise AssertionError("the LM head was computed")


def test_one_backbone_pass_and_no_head():
    model = build_model()
    model.lm_head = Forbidden()
    passes: list[int] = []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    moments = measure(model, [batch(5, 9), batch(7)])
    assert len(passes) == 2
    assert (moments.num_sequences, moments.num_tokens) == (3, 21)
    assert measure(model.model, [batch(5, 9), batch(7)]).scores() == moments.scores()


def test_continues_from_given_moments():
    model = build_model()
    first, second = batch(4, 6), batch(8)
    start = measure(model, [first])
    assert measure(model, [second], start).scores() == measure(model, [first, second]).scores()
    assert measure(model, [], start).scores() == start.scores()


def test_identity_block_moves_nothing():
    model = build_model(num_blocks=3)
    block = model.model.layers[1]
    nn.init.zeros_(block.self_attn.o_proj.weight)
    nn.init.zeros_(block.mlp.down_proj.weight)
    scores = measure(model, [batch(9, 12, 4)]).scores()
    assert scores.block_influence_L[1] == pytest.approx(0.0, abs=1e-6)
    # arccos turns a rounding of 1e-7 in the cosine into about 1e-4
    assert scores.angular_last_LN[0][1] == pytest.approx(0.0, abs=3e-4)
    assert scores.angular_mean_LN[0][1] == pytest.approx(0.0, abs=3e-4)
    assert min(scores.block_influence_L[0], scores.block_influence_L[2]) > 1e-3


def test_small_stream_runs_rows_apart():
    model = build_model()
    whole, passes = measure(model, [batch(5, 9, 2, 9)]), []
    model.model.register_forward_hook(lambda *_: passes.append(1))
    row_bytes = 5 * 32 * 4 * 9
    for stream_bytes, expected in ((1, 4), (2 * row_bytes, 2), (4 * row_bytes, 1)):
        passes.clear()
        split = measure(model, [batch(5, 9, 2, 9)], stream_bytes=stream_bytes)
        assert len(passes) == expected
        np.testing.assert_allclose(split.angular_mean_sum, whole.angular_mean_sum, atol=3e-5, rtol=0)
        assert (split.num_sequences, split.num_tokens) == (4, 25)


def test_bfloat16_is_close_to_float32():
    scores = measure(build_model(), [batch(20, 30, 30)]).scores()
    rough = measure(build_model(dtype="bfloat16"), [batch(20, 30, 30)]).scores()
    assert rough.block_influence_L == pytest.approx(scores.block_influence_L, abs=0.02)
    assert rough.block_influence_L != scores.block_influence_L


def test_left_padding_and_holes_are_refused():
    ids = torch.ones(1, 4, dtype=torch.long)
    for mask in ([[0, 1, 1, 1]], [[1, 0, 1, 1]]):
        with pytest.raises(DataError, match="padded on the left"):
            measure(build_model(), [(ids, torch.tensor(mask))])


def test_empty_row_is_refused():
    ids = torch.ones(2, 3, dtype=torch.long)
    with pytest.raises(DataError, match="no tokens"):
        measure(build_model(), [(ids, torch.tensor([[1, 1, 1], [0, 0, 0]]))])


def test_overflow_is_named_not_hidden():
    model = build_model()
    with torch.no_grad():
        model.model.layers[2].mlp.down_proj.weight.fill_(float("inf"))
    with pytest.raises(ModelError, match="not finite after 3 blocks"):
        measure(model, [batch(5, 9)])


def test_zero_hidden_state_has_no_angle():
    model = build_model()
    nn.init.zeros_(model.model.embed_tokens.weight)
    moments = measure(model, [batch(5, 9)])
    assert (moments.num_sequences, moments.num_tokens, sum(moments.zero_tokens.values())) == (0, 0, 14)
    with pytest.raises(ModelError, match="all zero at every token"):
        moments.scores()


def test_tokens_whose_embedding_is_zero_are_left_out_and_counted():
    """Against angles written out token by token, in float64, without these tokens."""
    model = build_model()
    with torch.no_grad():
        model.model.embed_tokens.weight[[7, 9]] = 0
    ids_BT = torch.tensor([[7, 3, 4, 9, 5, 9], [8, 6, 7, 0, 0, 0], [7, 0, 0, 0, 0, 0]])
    lengths_B = (6, 3, 1)
    mask_BT = torch.tensor([[1] * n + [0] * (6 - n) for n in lengths_B])
    moments = measure(model, [(ids_BT, mask_BT)])
    assert moments.zero_tokens == {7: 3, 9: 2}
    assert (moments.num_sequences, moments.num_tokens) == (2, 5)
    with torch.no_grad():
        stream = []
        handles = [block.register_forward_hook(lambda _m, _i, out: stream.append(out)) for block in model.model.layers]
        model.model(input_ids=ids_BT)
        for handle in handles:
            handle.remove()
        first, last = model.model.embed_tokens(ids_BT).double(), stream[-1].double()

    def angle(row: int, column: int) -> float:
        cosine = torch.nn.functional.cosine_similarity(first[row, column], last[row, column], dim=0)
        return math.acos(float(cosine)) / math.pi

    used = [(0, 1), (0, 2), (0, 4), (1, 0), (1, 1)]
    assert moments.angular_mean_sum[0, -1] == pytest.approx(sum(angle(*place) for place in used), rel=1e-5)
    assert moments.angular_last_sum[0, -1] == pytest.approx(angle(0, 4) + angle(1, 1), rel=1e-5)
    assert moments.scores().zero_tokens == {"7": 3, "9": 2}
    merged = moments + DepthMoments.from_json(moments.to_json())
    assert merged.zero_tokens == {7: 6, 9: 4}


def test_training_mode_is_our_mistake():
    with pytest.raises(AssertionError, match="dropout"):
        measure(build_model().train(), [batch(5)])
