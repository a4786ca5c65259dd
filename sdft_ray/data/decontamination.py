"""Overlap of seed rows with test questions, by word n-grams as in GPT-3 (arXiv:2005.14165, appendix C).

Text is compared without case, punctuation and spacing. A row overlaps if its instruction or its reference shares n
consecutive words with a question. A question of fewer than n words is compared as a whole: with at least `MIN_WORDS`
words it is searched in both texts; shorter ones match by chance, so only an instruction equal to the question counts.
Text of languages that do not separate words by spaces is compared in whole clauses, so few overlaps are detected there.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from hashlib import blake2b

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from sdft_ray.data.messages import context_texts

MIN_WORDS = 8
"""Minimum number of words to search inside a text. GPT-3 uses n >= 8 for short tests, to avoid false positives."""

Hashes = NDArray[np.uint64]
Flags = NDArray[np.bool_]

_WORD = re.compile(r"[^\W_]+")
_FACTOR = np.uint64(0x9E3779B97F4A7C15)  # odd: multiplication modulo 2**64 loses no bits


class OverlapIndex:
    """The n-grams of test questions as sorted 64-bit hashes. Two different n-grams collide with probability 2**-64."""

    def __init__(self, questions: Iterable[Sequence[str]], ngram: int) -> None:
        """A question may have several texts, compared separately; `ngram` is n, at least 1."""
        assert ngram >= 1, "an n-gram has at least one word"
        self.num_questions = 0
        grams_by_length: dict[int, list[Hashes]] = {}
        for texts in questions:
            self.num_questions += 1
            for words_W in filter(len, map(_word_hashes, texts)):
                longest = min(ngram, len(words_W))
                *_, (_, grams) = _grams(words_W, longest)
                grams_by_length.setdefault(longest, []).append(grams)
        self._by_length = {length: np.unique(np.concatenate(grams)) for length, grams in grams_by_length.items()}
        self._min_inside = min(MIN_WORDS, ngram)

    def contaminated(self, instructions: Sequence[str], references: Sequence[str]) -> Flags:
        """One flag per row. Vectorised over the rows: pass hundreds at a time, as many as fit in memory."""
        assert len(instructions) == len(references), "one reference per instruction"
        num_rows = len(instructions)
        hashes = [_word_hashes(text) for text in (*instructions, *references)]
        lengths = np.array([len(words_W) for words_W in hashes], dtype=np.int64)
        text_W = np.repeat(np.arange(2 * num_rows), lengths)  # index of the text of each word
        hit = np.zeros(2 * num_rows, dtype=np.bool_)
        for length, grams in _grams(np.concatenate([*hashes, _EMPTY]), max(self._by_length, default=0)):
            if length in self._by_length:
                text = text_W[: len(grams)]
                fits = text == text_W[length - 1 :]  # does not cross into the next text
                if length < self._min_inside:
                    fits &= (lengths[text] == length) & (text < num_rows)
                hit[text[fits & _is_in(grams, self._by_length[length])]] = True
        return hit[:num_rows] | hit[num_rows:]


def contaminated_rows(index: OverlapIndex, rows: pa.Table) -> Flags:
    """One flag per row of `SEED_SCHEMA`: instruction, reference, or an earlier message of its conversation."""
    flags = index.contaminated(*(rows[name].to_pylist() for name in ("instruction", "reference_response")))
    contexts = rows["context"].to_pylist()
    texts = [(row, text) for row, context in enumerate(contexts) for text in context_texts(context)]
    if texts:
        places, said = zip(*texts, strict=True)
        np.logical_or.at(flags, np.array(places), index.contaminated(said, [""] * len(said)))
    return flags


def words(text: str) -> list[str]:
    """Runs of letters and digits, case-folded; compatibility forms (ﬁ, ２, e + accent) are unified."""
    return _WORD.findall(unicodedata.normalize("NFKC", text).casefold())


_EMPTY: Hashes = np.zeros(0, dtype=np.uint64)


@lru_cache(maxsize=1 << 16)
def _word_hash(word: str) -> int:
    return int.from_bytes(blake2b(word.encode("utf-8", "surrogatepass"), digest_size=8).digest(), "little")


def _word_hashes(text: str) -> Hashes:
    return np.array([_word_hash(word) for word in words(text)], dtype=np.uint64)


def _grams(words_W: Hashes, longest: int) -> Iterator[tuple[int, Hashes]]:
    """Hashes of all n-grams of 1, 2, ... `longest` words: a polynomial in the hashes of the words, modulo 2**64."""
    grams = words_W
    for length in range(1, longest + 1):
        if length > 1:
            grams = grams[:-1] * _FACTOR + words_W[length - 1 :]
        yield length, grams


def _is_in(grams: Hashes, index: Hashes) -> Flags:
    places = np.minimum(np.searchsorted(index, grams), len(index) - 1)
    return index[places] == grams
