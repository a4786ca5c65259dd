"""Signals: what is refused, how little room they take, and a code worked out by hand."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from sdft_ray.data.example import GENERATED_SCHEMA
from sdft_ray.data.signals import decode_top, encode_top, token_bytes, top_logprobs


def test_a_code_worked_out_by_hand() -> None:
    """Elias-Fano of {2, 5, 11} below 12: 12 // 3 = 4 gives 2 low bits, and high parts 0, 1, 2 in unary."""
    ids, logprobs = encode_top(top_logprobs([[11, 2, 5]], np.log([[0.25, 0.5, 0.125]]), 12))
    low = 0b01_10_11_00  # 2, 1, 3, the lowest bit first
    high = 0b10101_000  # the ones stand at 0 + 0, 1 + 1, 2 + 2
    assert ids == bytes([3, 0, 12, 0, 0, 0, low, high])
    scales = np.log([0.5, 4, 0.125]).astype("<f4").tobytes()
    assert logprobs == bytes([0, 254, round(254 * 0.5**0.5)]) + scales


@pytest.mark.parametrize(
    ("ids", "logprobs", "message"),
    [
        ([[1, 1]], [[-1.0, -1.0]], "repeat"),
        ([[1, 8]], [[-1.0, -1.0]], "outside"),
        ([[-1, 2]], [[-1.0, -1.0]], "outside"),
        ([[1, 2]], [[-1.0, float("nan")]], "NaN"),
        ([[1, 2]], [[-np.inf, -np.inf]], "all -inf"),
        ([[1, 2]], [[-0.1, -0.1]], "sum above 1"),
        ([[1, 2]], [[-0.1]], "not a top k"),
        ([list(range(9))], [[-3.0] * 9], "not a top k of 8"),
    ],
)
def test_what_is_no_top_of_a_distribution_is_refused(
    ids: list[list[int]], logprobs: list[list[float]], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        top_logprobs(ids, logprobs, 8)


def test_rounding_above_zero_becomes_zero() -> None:
    top = top_logprobs([[3]], [[1e-7]], 8)
    assert top.logprobs_TK.tolist() == [[0]]
    assert decode_top(*encode_top(top)).logprobs_TK.tolist() == [[0]]
    assert np.exp(top.tail_T) == pytest.approx(2**-24)


@pytest.mark.slow
def test_room_at_a_vocabulary_of_128256() -> None:
    """METHOD: about 300 bytes for the top 128, 8,192 for hidden states of 4,096 channels."""
    each = token_bytes(top_logprobs=128, hidden_states=True, vocab_size=128_256, hidden_size=4096)
    assert (each.text, each.top_logprobs, each.hidden_states) == (8, 332, 8192)
    assert token_bytes(top_logprobs=0, hidden_states=False, vocab_size=9, hidden_size=9).total == 4
    rng = np.random.default_rng(0)
    logits_TV = 3 * rng.standard_normal((64, 128_256), dtype=np.float32) - np.log(np.arange(128_256) + 20)
    logprobs_TV = logits_TV - np.log(np.exp(logits_TV).sum(axis=1, keepdims=True))
    ids_TK = np.argpartition(-logprobs_TV, 128, axis=1)[:, :128]
    ids, logprobs = encode_top(top_logprobs(ids_TK, np.take_along_axis(logprobs_TV, ids_TK, 1), 128_256))
    assert len(ids) + len(logprobs) == 64 * 332 + 6
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table({"ids": [ids], "logprobs": [logprobs]}), sink, compression="zstd")
    assert len(sink.getvalue()) / 64 < 320


def test_the_generated_table_has_a_place_for_each() -> None:
    assert GENERATED_SCHEMA.names[-4:] == ["response_ids", "top_ids", "top_logprobs", "hidden_states"]
    assert all(GENERATED_SCHEMA.field(name).nullable for name in GENERATED_SCHEMA.names[-4:])
