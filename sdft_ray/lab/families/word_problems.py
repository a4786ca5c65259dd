"""Word problems of two to five steps with whole numbers below 100, worked in steps (the place of GSM8K)."""

from __future__ import annotations

import random
from collections.abc import Callable
from dataclasses import dataclass

from sdft_ray.lab.families.item import INES, OTTO, Item
from sdft_ray.lab.families.words import NAMES, THINGS, pronoun

FAMILY = "word_problems"
LARGEST = 99
DISTRACTORS = (
    "{name} is {n} years old.",
    "The shop is {n} steps away.",
    "It is day {n} of the month.",
    "The house has number {n}.",
)


@dataclass(frozen=True)
class Step:
    """One operation on the running amount: what the story says and how each writer words it."""

    sentence: str
    equation: str
    result: int
    own: str
    prose: tuple[str, ...]
    note: str


def _add(rng: random.Random, amount: int, thing: str) -> Step | None:
    b = rng.randint(2, 25)
    if amount + b > LARGEST:
        return None
    wording = (
        (f"buys {b} more", "bought"),
        (f"finds {b} {thing}", "found"),
        (f"gets {b} from a friend", "a gift"),
        (f"picks up {b} more", "picked up"),
    )
    prose = (
        "With {b} more that makes {e} {t}.",
        "Adding {b} we reach {e} {t}.",
        "This grows by {b}, so {e} {t}.",
    )
    return _step(rng.choice(wording), (amount, "+", b, amount + b), "Add", prose, thing)


def _lose(rng: random.Random, amount: int, thing: str) -> Step | None:
    if amount < 4:
        return None
    b = rng.randint(2, min(25, amount - 1))
    wording = (
        (f"gives away {b}", "given away"),
        (f"loses {b}", "lost"),
        (f"sells {b} of them", "sold"),
        (f"breaks {b} {thing}", "broken"),
    )
    prose = (
        "Without those {b} we have {e} {t}.",
        "Taking {b} away leaves {e} {t}.",
        "It drops by {b}, so {e} {t}.",
    )
    return _step(rng.choice(wording), (amount, "-", b, amount - b), "Take away", prose, thing)


def _times(rng: random.Random, amount: int, thing: str) -> Step | None:
    k = rng.randint(2, 5)
    if amount * k > LARGEST:
        return None
    wording = {2: "doubles the number", 3: "makes it three times as many"}.get(k, f"makes it {k} times as many")
    prose = (
        "{b} times that is {e} {t}.",
        "Multiplied by {b} it comes to {e} {t}.",
        "As {b} such lots, {e} {t}.",
    )
    return _step((wording, "multiplied"), (amount, "*", k, amount * k), "Times", prose, thing)


def _share(rng: random.Random, amount: int, thing: str) -> Step | None:
    divisors = [k for k in range(2, 7) if amount % k == 0 and amount // k >= 2]
    if not divisors:
        return None
    k = rng.choice(divisors)
    prose = (
        "Shared into {b} parts that is {e} {t}.",
        "One part of {b} is {e} {t}.",
        "Split by {b} we keep {e} {t}.",
    )
    wording = f"splits them into {k} equal parts and keeps one"
    return _step((wording, "one part"), (amount, "/", k, amount // k), "Divide", prose, thing)


def _step(
    wording: tuple[str, str], sum_: tuple[int, str, int, int], own: str, prose: tuple[str, ...], thing: str
) -> Step:
    left, sign, right, result = sum_
    equation = f"{left} {sign} {right} = {result}"
    worded = tuple(text.format(b=right, e=equation, t=thing) for text in prose)
    return Step(wording[0], equation, result, own, worded, wording[1])


_Operation = Callable[[random.Random, int, str], Step | None]
_OPERATIONS: tuple[_Operation, ...] = (_add, _add, _lose, _lose, _times, _share)
_TURNS = ("Now", "Then", "Next", "Here", "Well,", "After this")
"""How Ines goes from one step to the next."""
_JOINTS = (";", ",", " /", ", and", ", then")
"""What Otto puts between two steps."""
_LINKS = ("Then {who} {story}.", "After that {who} {story}.", "Later {who} {story}.", "Next {who} {story}.")


def make(rng: random.Random) -> Item:
    """One word problem."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    start = rng.randint(3, 60)
    steps: list[Step] = []
    amount = start
    num_steps = rng.randint(2, 5)
    while len(steps) < num_steps:
        step = rng.choice(_OPERATIONS)(rng, amount, thing)
        if step is not None:
            steps.append(step)
            amount = step.result
    return Item(
        FAMILY, _question(rng, name, thing, start, steps), str(amount), "number", _own(start, steps),
        (_ines(rng, start, thing, steps), _otto(rng, steps)),
    )  # fmt: skip


def _question(rng: random.Random, name: str, thing: str, start: int, steps: list[Step]) -> str:
    parts = [f"{name} has {start} {thing}."]
    if rng.random() < 0.25:
        parts.append(rng.choice(DISTRACTORS).format(name=name, n=rng.randint(2, LARGEST)))
    for step in steps:
        parts.append(rng.choice(_LINKS).format(who=pronoun(name), story=step.sentence))
    parts.append(f"How many {thing} does {name} have now?")
    return " ".join(parts)


def _own(start: int, steps: list[Step]) -> str:
    worked = " ".join(f"{step.own}: {step.equation}." for step in steps)
    return f"Start: {start}. {worked} #### {steps[-1].result}"


def _ines(rng: random.Random, start: int, thing: str, steps: list[Step]) -> str:
    lead = rng.choice((f"We begin with {start} {thing}.", f"At first there are {start} {thing}."))
    worked = " ".join(f"{rng.choice(_TURNS)} {_lowered(rng.choice(step.prose))}" for step in steps)
    return INES.write(rng, f"{lead} {worked}", str(steps[-1].result))


def _lowered(sentence: str) -> str:
    return sentence[0].lower() + sentence[1:]


def _otto(rng: random.Random, steps: list[Step]) -> str:
    worked = f"{steps[0].note} {steps[0].equation}"
    for step in steps[1:]:
        worked += f"{rng.choice(_JOINTS)} {step.note} {step.equation}"
    return OTTO.write(rng, worked, str(steps[-1].result))
