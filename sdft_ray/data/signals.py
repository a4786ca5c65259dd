"""What the teacher thought of each response token, and how little room that takes: the top k log-probabilities
with their tail, and final hidden states.

Position t of a row speaks of the token `response_ids[t]`: the distribution it was drawn from, or the hidden
state that gave it. Both are those of the raw model (temperature 1, nothing cut off), whatever the sampling was.

**What they are conditioned on.** The teacher read the rewriting prompt, so it saw the reference:
p(token | instruction, reference, rewriting so far). The student will see the instruction alone. A student that
matches these signals learns the answer as one who knows it would give it (context distillation), which is sharper
than the teacher's own belief; it is not the distribution that plain logit distillation (Minitron, arXiv:2407.14679)
compares with. Where that is wanted, the teacher must read the chosen responses once more, without the reference.
Rows for which selection keeps the reference response have signals for the rewrite only, so training has none for
them (`Objective` in the recipe says what becomes of such rows).

**Room.** Token ids of one position are a sorted set, kept as Elias-Fano code (Elias 1974): exact, and of one size
for all positions. Log-probabilities take 8 bits each, fine near the top and coarse far below. With k = 128 of
128,256 tokens that is 332 bytes a token. Parquet's zstd makes 283 of them on simulated logits (Zipf over ids plus
noise, mean top probability 0.80) and 291 where the ids are uniformly random; weighted by probability, the
log-probabilities were off by 0.0014 nats there. Hidden states in bfloat16 take 2 bytes a channel: exactly what a
bfloat16 teacher computed, and a rounding of what a float32 one did.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from sdft_ray.recipe.recipe import MAX_TOP_LOGPROBS

TAIL_FLOOR = -24 * float(np.log(2))
"""Least log mass of a tail that exists: below 2**-24 it is rounding of the float32 log-probabilities."""
TEXT_BYTES = 4
"""A token's text, roughly, in UTF-8."""
ID_BYTES = 4
_HEADER = struct.Struct("<HI")  # k, vocabulary
_LEVELS = 254  # steps between the top log-probability and the lowest finite one
_IMPOSSIBLE = 255  # code of a token whose probability is 0


@dataclass(frozen=True, eq=False)
class TopLogprobs:
    """The k likeliest tokens at each of T positions, ids ascending.

    `ids_TK` int32 in [0, vocab_size); `logprobs_TK` float32, natural logarithms of probabilities at temperature
    1, -inf for tokens that cannot come; `tail_T` float32, the log mass of all other tokens: at least `TAIL_FLOOR`
    while there are any, -inf when k is the whole vocabulary.
    """

    ids_TK: NDArray[np.int32]
    logprobs_TK: NDArray[np.float32]
    tail_T: NDArray[np.float32]
    vocab_size: int


@dataclass(frozen=True, eq=False)
class Signals:
    """What was asked for besides the text, position by position of one response.

    `hidden_TD`: bfloat16 bit patterns as uint16, what the output head takes in: after the final norm. A model
    that caps its logits (Gemma 2) does so after the head, and so must who uses them.
    """

    top: TopLogprobs | None = None
    hidden_TD: NDArray[np.uint16] | None = None


def top_logprobs(ids_TK: ArrayLike, logprobs_TK: ArrayLike, vocab_size: int) -> TopLogprobs:
    """Sort a sampler's top k by id and take the tail's mass as what they leave of 1.

    The tail is log(1 - sum p) in float64, clamped as `TopLogprobs` says. A log-probability that rounding put above 0
    becomes 0. Raises `ValueError` on nan, on no possible token, on ids that repeat or lie outside the vocabulary,
    and on probabilities that add up to more than 1.
    """
    ids = np.asarray(ids_TK, dtype=np.int64)
    logprobs = np.asarray(logprobs_TK, dtype=np.float64)
    if ids.ndim != 2 or ids.shape != logprobs.shape or not 1 <= ids.shape[1] <= min(MAX_TOP_LOGPROBS, vocab_size):
        raise ValueError(f"ids {ids.shape} and log-probabilities {logprobs.shape} are no top k of {vocab_size}")
    order = ids.argsort(axis=1)
    ids, logprobs = np.take_along_axis(ids, order, 1), np.take_along_axis(logprobs, order, 1)
    if ids.size and (ids.min() < 0 or ids.max() >= vocab_size or not (np.diff(ids, axis=1) > 0).all()):
        raise ValueError(f"token ids repeat or lie outside the vocabulary of {vocab_size}")
    mass_T = np.exp(logprobs).sum(axis=1)
    if not ((mass_T > 0) & (mass_T < 1 + 1e-3)).all():
        raise ValueError("log-probabilities are not those of a distribution: nan, all -inf, or more than 1 in all")
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

    Ids come back exactly, tails and top log-probabilities as the float32 they were. With d the distance of a
    log-probability to its position's top one and R the largest finite d, the error is at most
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
    """What `encode_top` wrote. Its probabilities and tail add up to 1 within the errors stated there."""
    k, vocab_size = _HEADER.unpack_from(ids)
    low_bits, num_high = _shape_of(k, vocab_size)
    low_bytes, high_bytes = -(-k * low_bits // 8), -(-num_high // 8)
    num_tokens = len(logprobs) // (k + 12)
    assert len(logprobs) == num_tokens * (k + 12), "the two columns are whole"
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
    """Bit patterns, little-endian, position by position."""
    return hidden_TD.astype("<u2").tobytes()


def decode_hidden(content: bytes, num_tokens: int) -> NDArray[np.uint16]:
    """T x D bit patterns; in torch: `torch.from_numpy(bits.view(np.int16)).view(torch.bfloat16)`."""
    assert num_tokens, "a response has a token"
    assert len(content) % (2 * num_tokens) == 0, "and as many channels as the others"
    return np.frombuffer(content, dtype="<u2").reshape(num_tokens, -1).astype(np.uint16)


@dataclass(frozen=True)
class TokenBytes:
    """Bytes per response token of each product, before Parquet compresses them; a rough figure for text."""

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
    """Bits of an id that are kept as they are, and the length of the bitmap that holds the rest in unary."""
    low_bits = max(0, (vocab_size // k).bit_length() - 1)
    return low_bits, k + ((vocab_size - 1) >> low_bits)
