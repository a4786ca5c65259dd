"""Two texts side by side, with what only one of them says marked."""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from difflib import SequenceMatcher

MAX_MATCHES = 40_000
"""Pairs of equal words in two texts, up to which they are aligned: within half a second."""
_TOKENS = re.compile(r"\s+|\w+|[^\w\s]")


@dataclass(frozen=True)
class Piece:
    """A stretch of one text; `own` if the other text does not have it."""

    text: str
    own: bool


def side_by_side(left: str, right: str) -> tuple[list[Piece], list[Piece]]:
    """The pieces of both texts, in order; joined they give the texts back.

    Words are compared, white space is not. A lone space or sign between two own pieces counts as own, so that marks
    do not fall apart. Nothing is marked where a few signs or words fill both texts: to align those takes minutes.
    """
    left_tokens, right_tokens = _TOKENS.findall(left), _TOKENS.findall(right)
    left_words = [i for i, token in enumerate(left_tokens) if not token.isspace()]
    right_words = [i for i, token in enumerate(right_tokens) if not token.isspace()]
    left_said, right_said = [left_tokens[i] for i in left_words], [right_tokens[i] for i in right_words]
    counts = Counter(right_said)
    if sum(counts[word] for word in left_said) > MAX_MATCHES:
        return _pieces(left_tokens, set()), _pieces(right_tokens, set())
    matcher = SequenceMatcher(None, left_said, right_said, autojunk=False)
    left_own, right_own = set(left_words), set(right_words)
    for block in matcher.get_matching_blocks():
        left_own.difference_update(left_words[block.a : block.a + block.size])
        right_own.difference_update(right_words[block.b : block.b + block.size])
    return _pieces(left_tokens, left_own), _pieces(right_tokens, right_own)


def _pieces(tokens: list[str], own: set[int]) -> list[Piece]:
    flags = [i in own for i in range(len(tokens))]
    for i in range(1, len(tokens) - 1):
        small = tokens[i].isspace() or not tokens[i].isalnum()
        if not flags[i] and small and flags[i - 1] and flags[i + 1]:
            flags[i] = True
    pieces: list[Piece] = []
    for token, flag in zip(tokens, flags, strict=True):
        if pieces and pieces[-1].own == flag:
            pieces[-1] = Piece(pieces[-1].text + token, flag)
        else:
            pieces.append(Piece(token, flag))
    return pieces
