"""Token-level outputs of the teacher ("signals"), and their encoding: top-k log-probabilities with their tail mass, and
final hidden states.

Position t of a row refers to the token `response_ids[t]`: the distribution from which it was sampled, or the hidden
state before it. Both are those of the raw model (temperature 1, no truncation), independent of the sampling parameters.

**Conditioning.** The teacher's context is the rewriting prompt, which contains the reference: p(token | instruction,
reference, rewrite so far). The student's context is the instruction alone. A student that matches these signals is
trained by context distillation, towards a sharper distribution than that of the teacher without the reference; plain
logit distillation (Minitron, arXiv:2407.14679) compares with the latter. For that, the teacher has to read the
selected responses again without the reference. Rows for which selection keeps the reference response have signals of
the rewrite only, so training has none for them (see `Objective` in the recipe).

**Size.** The token ids of a position are a sorted set in Elias-Fano code (Elias 1974): lossless, and of equal size for
all positions. Log-probabilities have 8 bits each, with finer steps near the top. With k = 128 of 128,256 tokens that is
332 bytes per token. With zstd in Parquet it is 283 on simulated logits (Zipf over ids plus noise, mean top probability
0.80) and 291 for uniformly random ids; the probability-weighted error of the log-probabilities was 0.0014 nats there.
Hidden states in bfloat16 have 2 bytes per channel: exact for a bfloat16 teacher, rounded for a float32 one.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdft_ray.recipe.recipe import MAX_TOP_LOGPROBS

TAIL_FLOOR = -24 * float(np.log(2))
"""Minimum log mass of a non-empty tail: below 2**-24 it is rounding error of the float32 log-probabilities."""
TEXT_BYTES = 4
"""Approximate size of the text of a token in UTF-8."""
ID_BYTES = 4
_HEADER = struct.Struct("<HI")  # k, vocabulary
_LEVELS = 254  # steps between the top log-probability and the lowest finite one
_IMPOSSIBLE = 255  # code of a token whose probability is 0


@dataclass(frozen=True, eq=False)
class TopLogprobs:
    """The k most likely tokens at each of T positions, ids ascending.

    `ids_TK` int32 in [0, vocab_size); `logprobs_TK` float32, natural logarithms of probabilities at temperature 1,
    -inf for impossible tokens; `tail_T` float32, the log mass of all other tokens: at least `TAIL_FLOOR` if there are
    any, -inf if k is the whole vocabulary.
    """

    ids_TK: NDArray[np.int32]
    logprobs_TK: NDArray[np.float32]
    tail_T: NDArray[np.float32]
    vocab_size: int


@dataclass(frozen=True, eq=False)
class Signals:
    """The requested signals of one response, per position.

    `hidden_TD`: bfloat16 bit patterns as uint16, the input of the output head (after the final norm). A model that caps
    its logits (Gemma 2) does so after the head; users of the hidden states have to apply the cap themselves.
    """

    top: TopLogprobs | None = None
    hidden_TD: NDArray[np.uint16] | None = None


def top_logprobs(ids_TK: ArrayLike, logprobs_TK: ArrayLike, vocab_size: int) -> TopLogprobs:
    """Sort the top k of a sampler by id and compute the tail mass as the remainder to 1.

    The tail is log(1 - sum p) in float64, clamped as `TopLogprobs` describes. A log-probability above 0 by rounding is
    set to 0. Raises `ValueError` for NaN, if no token is possible, for ids that repeat or are outside the vocabulary,
    and for probabilities with a sum above 1.
    """
    ids = np.asarray(ids_TK, dtype=np.int64)
    logprobs = np.asarray(logprobs_TK, dtype=np.float64)
    if ids.ndim != 2 or ids.shape != logprobs.shape or not 1 <= ids.shape[1] <= min(MAX_TOP_LOGPROBS, vocab_size):
        raise ValueError(f"ids {ids.shape} and log-probabilities {logprobs.shape} are not a top k of {vocab_size}")
    order = ids.argsort(axis=1)
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size or not (np.diff(ids, axis=1) > 0).all()):
        raise ValueError(f"token ids repeat or are outside the vocabulary of {vocab_size}")
    mass_T = np.exp(logprobs).sum(axis=1)
    if not ((mass_T > 0) & (mass_T < 1 + 1e-3)).all():
        raise ValueError("log-probabilities are not those of a distribution: NaN, all -inf, or a sum above 1")
    tail_T = np.log(np.maximum(1 - mass_T, np.exp(TAIL_FLOOR)))
    if ids.shape[1] == vocab_size:
        tail_T[:] = -np.inf
    return TopLogprobs(
        ids.astype(np.int32),
        np.minimum(logprobs, 0).astype(np.float32),
        tail_T.astype(np.float32),
        vocab_size,
    )


def encode_top(top: TopLogprobs) -> tuple[bytes, bytes]:
    """Ids and log-probabilities as two columns of bytes; `decode_top` is the inverse.

    Lossless for ids, tails and top log-probabilities (float32). With d the distance of a log-probability to the top one
    of its position and R the largest finite d, the error is at most
    sqrt(d R) / 254 + R / 258,064: for R = 12 that is 0.0001 at the top, 0.014 one nat below, 0.047 at the end.
    """
    num_tokens, k = top.ids_TK.shape
    low_bits, num_high = _shape_of(k, top.vocab_size)
    ids_TK = top.ids_TK.astype(np.int64)
    low_TKl = (ids_TK[:, :, None] >> np.arange(low_bits)) & 1
    high_TH = np.zeros((num_tokens, num_high), dtype=np.uint8)
    np.put_along_axis(high_TH, (ids_TK >> low_bits) + np.arange(k), 1, axis=1)
    low_TL = low_TKl.reshape(num_tokens, k * low_bits).astype(np.uint8)
    sections = [np.packbits(bits, axis=1).tobytes() for bits in (low_TL, high_TH)]
    ids = b"".join([_HEADER.pack(k, top.vocab_size), *sections])

    logprobs_TK = top.logprobs_TK.astype(np.float64)
    possible_TK = np.isfinite(logprobs_TK)
    top_T1 = logprobs_TK.max(axis=1, keepdims=True)
    down_TK = np.where(possible_TK, top_T1 - logprobs_TK, 0)
    reach_T1 = down_TK.max(axis=1, keepdims=True)
    steps_TK = np.rint(_LEVELS * np.sqrt(down_TK / np.where(reach_T1 > 0, reach_T1, 1)))
    codes_TK = np.where(possible_TK, steps_TK, _IMPOSSIBLE).astype(np.uint8)
    scales_3T = np.stack([top_T1[:, 0], reach_T1[:, 0], top.tail_T]).astype("<f4")
    return ids, codes_TK.tobytes() + scales_3T.tobytes()


def decode_top(ids: bytes, logprobs: bytes) -> TopLogprobs:
    """The inverse of `encode_top`. Probabilities and tail sum to 1 within the errors given there."""
    k, vocab_size = _HEADER.unpack_from(ids)
    low_bits, num_high = _shape_of(k, vocab_size)
    low_bytes, high_bytes = -(-k * low_bits // 8), -(-num_high // 8)
    num_tokens = len(logprobs) // (k + 12)
    assert len(logprobs) == num_tokens * (k + 12), "the two columns are complete"
    assert len(ids) == _HEADER.size + num_tokens * (low_bytes + high_bytes), "and belong together"

    packed = np.frombuffer(ids, dtype=np.uint8, offset=_HEADER.size)
    low_T, high_T = np.split(packed, [num_tokens * low_bytes])
    low_TL = np.unpackbits(low_T.reshape(num_tokens, low_bytes), axis=1, count=k * low_bits)
    low_TKl = low_TL.reshape(num_tokens, k, low_bits)
    high_TH = np.unpackbits(high_T.reshape(num_tokens, high_bytes), axis=1, count=num_high)
    high_TK = high_TH.nonzero()[1].reshape(num_tokens, k) - np.arange(k)
    ids_TK = (high_TK << low_bits) + (low_TKl.astype(np.int64) << np.arange(low_bits)).sum(axis=2)

    codes_TK = np.frombuffer(logprobs, dtype=np.uint8, count=num_tokens * k).reshape(num_tokens, k)
    scales_3T = np.frombuffer(logprobs, dtype="<f4", offset=num_tokens * k).reshape(3, num_tokens)
    top_T1, reach_T1 = scales_3T[:2, :, None].astype(np.float64)
    steps_TK = codes_TK.astype(np.float64) / _LEVELS
    logprobs_TK = np.where(codes_TK == _IMPOSSIBLE, -np.inf, top_T1 - reach_T1 * steps_TK**2)
    return TopLogprobs(
        ids_TK.astype(np.int32), logprobs_TK.astype(np.float32), scales_3T[2].astype(np.float32), vocab_size
    )


def encode_hidden(hidden_TD: NDArray[np.uint16]) -> bytes:
    """Bit patterns, little-endian, per position."""
    return hidden_TD.astype("<u2").tobytes()


def decode_hidden(content: bytes, num_tokens: int) -> NDArray[np.uint16]:
    """(T, D) bit patterns; in torch: `torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)`."""
    assert num_tokens, "a response has at least one token"
    assert len(content) % (2 * num_tokens) == 0, "and equally many channels per token"
    return np.frombuffer(content, dtype="<u2").reshape(num_tokens, -1).astype(np.uint16)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes per response token of each kind of output, before Parquet compression; an estimate for text."""

    text: int
    top_logprobs: int
    hidden_states: int

    @property
    def total(self) -> int:
        return self.text + self.top_logprobs + self.hidden_states


def token_bytes(*, top_logprobs: int, hidden_states: bool, vocab_size: int, hidden_size: int) -> TokenBytes:
    """What the products asked for take. Token ids are kept, and counted as text, when there are signals."""
    signals = bool(top_logprobs or hidden_states)
    k = min(top_logprobs, vocab_size)
    top = 0
    if k:
        low_bits, num_high = _shape_of(k, vocab_size)
        top = -(-k * low_bits // 8) + -(-num_high // 8) + k + 12
    return TokenBytes(TEXT_BYTES + ID_BYTES * signals, top, 2 * hidden_size * hidden_states)


def _shape_of(k: int, vocab_size: int) -> tuple[int, int]:
    """Number of low bits of an id that are stored directly, and the length of the bitmap with the rest in unary."""
    low_bits = max(0, (vocab_size // k).bit_length() - 1)
    return low_bits, k + ((vocab_size - 1) >> low_bits)
