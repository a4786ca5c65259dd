"""The vocabulary that the families share: people and things.

It is small on purpose: to copy one of sixteen names is learned in a fraction of the tokens that forty take.
"""

from __future__ import annotations

import random


def split_words(text: str) -> tuple[str, ...]:
    """The words of a text, as a tuple."""
    return tuple(text.split())


WOMEN = split_words("Anna Clara Edith Flora Greta Mira Olga Sara")
MEN = split_words("Boris David Emil Hugo Jonas Leon Peter Viktor")
NAMES = WOMEN + MEN

THINGS = split_words("apples beads books boxes cards coins eggs jars lemons plates shells stones")

LIST_WORDS = split_words(
    "acorn anchor bell candle drum engine fork glove hammer ink jug kite ladder mirror needle oven pillow "
    "quilt rope spoon tent vase wheel yarn"
)


def pronoun(name: str) -> str:
    """`she` or `he`, by the list that the name is in."""
    return "she" if name in WOMEN else "he"


def two_names(rng: random.Random, *, same_pronoun: bool = False) -> tuple[str, str]:
    """Two different people; of one pronoun if that is what makes the sentence ambiguous."""
    pool = rng.choice((WOMEN, MEN)) if same_pronoun else NAMES
    first, second = rng.sample(pool, 2)
    return first, second
