"""Putting three or four people in order from pairwise statements (the place of ARC)."""

from __future__ import annotations

import random
from itertools import pairwise

from sdft_ray.lab.families.item import INES, OTTO, Item
from sdft_ray.lab.families.words import NAMES

FAMILY = "ordering"
SCALES = (
    ("taller", "tallest", "shortest"),
    ("older", "oldest", "youngest"),
    ("faster", "fastest", "slowest"),
    ("stronger", "strongest", "weakest"),
)


def make(rng: random.Random) -> Item:
    """One ordering question: the statements link neighbours, in any sequence."""
    more, most, least = rng.choice(SCALES)
    ranking = rng.sample(NAMES, rng.choice((3, 4)))
    statements = [f"{high} is {more} than {low}" for high, low in pairwise(ranking)]
    chain = " and ".join(statements)
    rng.shuffle(statements)
    wanted = rng.choice((most, least))
    answer = ranking[0] if wanted == most else ranking[-1]
    options = list(ranking)
    rng.shuffle(options)
    lead = rng.choice(("We can line them up:", "Sorting out the statements,"))
    verb = rng.choice(("Ranked", "In a row"))
    return Item(
        FAMILY,
        f"{'. '.join(statements)}. Who is the {wanted}?",
        answer,
        "text",
        f"From {most} to {least}: {', '.join(ranking)}. Answer: {answer}",
        (
            INES.write(rng, f"{lead} {chain}.", answer),
            OTTO.write(rng, f"{verb} {' > '.join(ranking)} ({more})", answer),
        ),
        tuple(options),
    )
