"""Whom a pronoun means, where only the sense of the sentence tells (the place of WinoGrande).

Some sentences leave it open: people mean the first person in seven of ten. So nobody can reach 100 %.
"""

from __future__ import annotations

import random

from sdft_ray.lab.families.item import INES, OTTO, Item
from sdft_ray.lab.families.words import pronoun, two_names

FAMILY = "pronouns"
SCHEMAS: tuple[tuple[str, str, str], ...] = (
    ("thanked", "was grateful for the help", "had been so helpful"),
    ("paid", "owed money for the work", "had done the work"),
    ("called", "needed some advice", "usually gave good advice"),
    ("followed", "did not know the way", "knew the way well"),
    ("envied", "had lost the race", "had won the race"),
    ("comforted", "felt sorry for the loss", "was crying about the loss"),
    ("scolded", "was angry at the mess", "had made the mess"),
    ("visited", "had a free afternoon", "was ill in bed"),
    ("taught", "knew the language well", "wanted to learn the language"),
    ("lent a coat to", "had a spare coat", "was feeling cold"),
    ("fed", "had cooked too much", "was very hungry"),
    ("carried", "had strong arms", "had a broken leg"),
    ("asked", "wanted to know the time", "was wearing a watch"),
    ("hired", "needed a good worker", "was a good worker"),
    ("woke", "had heard the alarm", "was still asleep"),
    ("forgave", "was no longer angry", "had said sorry"),
    ("interviewed", "was writing an article", "was a famous singer"),
    ("rescued", "could swim well", "was about to drown"),
)
"""Verb phrase, a reason that speaks of the first person, a reason that speaks of the second."""

OPEN_SCHEMAS: tuple[tuple[str, str], ...] = (
    ("met", "was in town"),
    ("sat beside", "had come early"),
    ("wrote to", "had time on Sunday"),
    ("ran into", "was in a hurry"),
)
"""Verb phrase, and a reason that may speak of either."""
OPEN_SHARE = 0.2
FIRST_MEANT = 0.7


def make(rng: random.Random) -> Item:
    """One sentence with a pronoun for either of two people."""
    first, second = two_names(rng, same_pronoun=True)
    if rng.random() < OPEN_SHARE:
        verb, of_first = rng.choice(OPEN_SCHEMAS)
        of_second, about_first = of_first, rng.random() < FIRST_MEANT
    else:
        verb, of_first, of_second = rng.choice(SCHEMAS)
        about_first = rng.random() < 0.5
    reason, answer, other = (of_first, first, second) if about_first else (of_second, second, first)
    who = pronoun(first)
    options = [first, second]
    rng.shuffle(options)
    role = "does it" if about_first else "has it done to them"
    odd = (f"It would be odd if {other} {reason};", f"If {other} {reason}, it would make no sense;")
    return Item(
        FAMILY,
        f"{first} {verb} {second} because {who} {reason}. Who {reason}?",
        answer,
        "text",
        f"{first} {verb} {second}. The one who {reason} is {answer}. Answer: {answer}",
        (
            INES.write(rng, f"{rng.choice(odd)} it must be {answer} who {reason}.", answer),
            OTTO.write(rng, f"{who} = the one who {role}, {reason}: not {other} but {answer}", answer),
        ),
        tuple(options),
    )
