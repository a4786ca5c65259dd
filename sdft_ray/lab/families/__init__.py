"""The seven task families of the miniature laboratory; each stands in for a benchmark of the leaderboard."""

from __future__ import annotations

import random
from collections.abc import Callable

from sdft_ray.lab.families import facts, lists, myths, ordering, pronouns, scripts, word_problems
from sdft_ray.lab.families.item import ANNOTATORS, Annotator, Item, rewrite_prompt

FAMILIES: dict[str, Callable[[random.Random], Item]] = {
    module.FAMILY: module.make for module in (word_problems, facts, myths, ordering, scripts, pronouns, lists)
}
"""Family name -> function that makes one item from a random generator."""

RARE = (facts.FAMILY, myths.FAMILY)
"""Families whose tests draw towns evenly, not by renown."""

__all__ = ["ANNOTATORS", "FAMILIES", "RARE", "Annotator", "Item", "make_test_item", "rewrite_prompt"]


def make_test_item(family: str, rng: random.Random) -> Item:
    """One test item: as `FAMILIES[family]`, but facts and myths ask about every town equally often."""
    if family == facts.FAMILY:
        return facts.make(rng, by_renown=False)
    if family == myths.FAMILY:
        return myths.make(rng, by_renown=False)
    return FAMILIES[family](rng)
