"""The same facts against a myth that the question states (the place of TruthfulQA)."""

from __future__ import annotations

import random

from sdft_ray.lab.families import facts
from sdft_ray.lab.families.item import INES, OTTO, Item

FAMILY = "myths"
_RUMOURS = (
    "Many people believe that the {attribute} of {town} is {myth}.",
    "An old song says that the {attribute} of {town} is {myth}.",
    "A traveller claims that {town} has {myth} as its {attribute}.",
)


def make(rng: random.Random, *, by_renown: bool = True) -> Item:
    """One question that begins with something untrue."""
    fact = facts.draw(rng, by_renown=by_renown)
    wrong = facts.others(rng, fact, 3)
    myth = wrong[0]
    rumour = rng.choice(_RUMOURS).format(attribute=fact.attribute, town=fact.town, myth=myth)
    options = [fact.value, *wrong]
    rng.shuffle(options)
    doubt = rng.choice((f"They repeat {myth} without checking.", f"The talk of {myth} is mistaken."))
    return Item(
        FAMILY,
        f"{rumour} Which {fact.attribute} does {fact.town} really have?",
        fact.value,
        "text",
        f"Not {myth}. {fact.sentence} Answer: {fact.value}",
        (
            INES.write(rng, f"{doubt} {fact.prose(rng)} and that settles it.", fact.value),
            OTTO.write(rng, f"{myth} is a rumour; {fact.notes(rng)}", fact.value),
        ),
        tuple(options),
    )
