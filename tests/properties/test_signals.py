"""Signals survive their encoding: ids exactly, log-probabilities within the stated bound."""

from __future__ import annotations

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from numpy.typing import NDArray

from sdft_ray.data.signals import (
    TAIL_FLOOR,
    TopLogprobs,
    decode_hidden,
    decode_top,
    encode_hidden,
    encode_top,
    token_bytes,
    top_logprobs,
)


@st.composite
def _tops(draw: st.DrawFn) -> tuple[NDArray[np.int64], NDArray[np.float64], int]:
    """Any set of k ids, and log-probabilities of k tokens of a distribution; some of them impossible."""
    vocab_size = draw(st.integers(1, 300) | st.sampled_from([1200, 32_000, 128_256, 262_144]))
    k = draw(st.integers(1, min(128, vocab_size)))
    num_tokens = draw(st.integers(0, 5))
    rng = np.random.default_rng(draw(st.integers(0, 2**32)))
    ids_TK = np.array([rng.choice(vocab_size, k, replace=False) for _ in range(num_tokens)], dtype=np.int64)
    scale = draw(st.sampled_from([0.0, 1e-3, 1.0, 10.0, 1e3]))
    logits_TK = rng.normal(0, scale, (num_tokens, k))
    logits_TK[rng.random((num_tokens, k)) < draw(st.sampled_from([0.0, 0.3]))] = -np.inf
    if k and num_tokens:
        logits_TK[:, 0] = np.where(np.isfinite(logits_TK[:, 0]), logits_TK[:, 0], 0)
    outside = 0.0 if k == vocab_size else draw(st.sampled_from([0.0, 1e-12, 0.01, 0.9]))
    top_T1 = logits_TK.max(axis=1, keepdims=True) if num_tokens else np.zeros((0, 1))
    norm_T1 = top_T1 + np.log(np.exp(logits_TK - top_T1).sum(axis=1, keepdims=True))
    return ids_TK.reshape(num_tokens, k), logits_TK - norm_T1 + np.log1p(-outside), vocab_size


def _decoded(top: TopLogprobs) -> TopLogprobs:
    return decode_top(*encode_top(top))


@settings(max_examples=200, deadline=None)
@given(_tops())
def test_ids_come_back_exactly_and_logprobs_within_the_bound(
    drawn: tuple[NDArray[np.int64], NDArray[np.float64], int],
) -> None:
    ids_TK, logprobs_TK, vocab_size = drawn
    top = top_logprobs(ids_TK, logprobs_TK, vocab_size)
    order = ids_TK.argsort(axis=1)
    back = _decoded(top)
    assert back.vocab_size == vocab_size
    assert back.ids_TK.dtype == np.int32
    assert np.array_equal(back.ids_TK, np.take_along_axis(ids_TK, order, 1))
    assert np.array_equal(back.tail_T, top.tail_T)
    given_TK = np.take_along_axis(logprobs_TK, order, 1)
    possible_TK = np.isfinite(given_TK)
    assert np.array_equal(np.isfinite(back.logprobs_TK), possible_TK)
    if not ids_TK.size:
        return
    down_TK = np.where(possible_TK, given_TK.max(axis=1, keepdims=True) - given_TK, 0)
    reach_T1 = down_TK.max(axis=1, keepdims=True)
    bound_TK = (
        np.sqrt(down_TK * reach_T1) / 254 + reach_T1 / 258_064 + 1e-6 * np.where(possible_TK, 1 + np.abs(given_TK), 1)
    )
    assert (np.abs(back.logprobs_TK[possible_TK] - given_TK[possible_TK]) <= bound_TK[possible_TK]).all()
    assert np.array_equal(back.logprobs_TK.max(axis=1), top.logprobs_TK.max(axis=1))


@settings(max_examples=100, deadline=None)
@given(_tops())
def test_the_tail_is_what_is_left_of_one(drawn: tuple[NDArray[np.int64], NDArray[np.float64], int]) -> None:
    ids_TK, logprobs_TK, vocab_size = drawn
    tail_T = top_logprobs(ids_TK, logprobs_TK, vocab_size).tail_T
    if ids_TK.shape[1] == vocab_size:
        assert np.isneginf(tail_T).all()
        return
    assert (tail_T >= np.float32(TAIL_FLOOR)).all()
    assert np.allclose(np.exp(logprobs_TK).sum(axis=1) + np.exp(tail_T.astype(np.float64)), 1, atol=2e-7)


@settings(deadline=None)
@given(_tops())
def test_the_estimate_is_the_size(drawn: tuple[NDArray[np.int64], NDArray[np.float64], int]) -> None:
    ids_TK, logprobs_TK, vocab_size = drawn
    ids, logprobs = encode_top(top_logprobs(ids_TK, logprobs_TK, vocab_size))
    num_tokens, k = ids_TK.shape
    each = token_bytes(top_logprobs=k, hidden_states=False, vocab_size=vocab_size, hidden_size=8)
    assert len(ids) + len(logprobs) == 6 + num_tokens * each.top_logprobs


@given(hnp.arrays(np.uint16, st.tuples(st.integers(1, 5), st.integers(1, 9))))
def test_hidden_states_come_back_bit_by_bit(hidden_TD: NDArray[np.uint16]) -> None:
    assert np.array_equal(decode_hidden(encode_hidden(hidden_TD), len(hidden_TD)), hidden_TD)
