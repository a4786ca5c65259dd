"""Small operations on a list of words: reverse, sort, pick, count, remove; the result stands in brackets."""

from __future__ import annotations

import random
from collections.abc import Callable

from sdft_ray.lab.families.item import INES, OTTO, Item
from sdft_ray.lab.families.words import LIST_WORDS

FAMILY = "lists"
_ENDING = "Put the result in brackets."
Parts = tuple[str, list[str], list[str], str, str, str]
"""Task sentence, words, result, teacher's working, working of Ines, working of Otto."""


def _numbered(words: list[str]) -> str:
    return " ".join(f"{i} {word}" for i, word in enumerate(words, 1))


def _reverse(rng: random.Random) -> Parts:
    words = rng.sample(LIST_WORDS, rng.randint(4, 7))
    back = words[::-1]
    count = len(words)
    own = " ".join(f"{i} {word}" for i, word in zip(range(count, 0, -1), back, strict=True))
    return (
        "Reverse the list", words, back, f"{_numbered(words)}. Backwards: {own}.",
        f"The last word is {back[0]}, so we walk back from there: {', then '.join(back)}.",
        f"{count} words, from the end: {' < '.join(back)}",
    )  # fmt: skip


def _sort(rng: random.Random) -> Parts:
    words: list[str] = []
    size = rng.randint(4, 7)
    while len(words) < size:
        word = rng.choice(LIST_WORDS)
        # Distinct first letters: the order is decided by one letter, which the working can show.
        if all(word[0] != other[0] for other in words):
            words.append(word)
    ordered = sorted(words)
    return (
        "Sort the list by the alphabet", words, ordered,
        "By letter: " + " ".join(f"{word[0]} {word}" for word in ordered) + ".",
        f"Looking at first letters, {ordered[0]} comes first, then {', then '.join(ordered[1:])}.",
        f"letters {''.join(word[0] for word in ordered)}: {' < '.join(ordered)}",
    )  # fmt: skip


def _pick(rng: random.Random) -> Parts:
    words = rng.sample(LIST_WORDS, rng.randint(4, 7))
    place = rng.randint(1, len(words))
    word = words[place - 1]
    return (
        f"Take word number {place} of the list", words, [word],
        f"{_numbered(words)}. Number {place} is {word}.",
        f"Counting along, {', then '.join(words[:place])}, and there we stop at {place}.",
        f"{' < '.join(words[:place])}, stop after {place}",
    )  # fmt: skip


def _count(rng: random.Random) -> Parts:
    wanted, *rest = rng.sample(LIST_WORDS, 4)
    words = [wanted] * rng.randint(1, 7) + [rng.choice(rest) for _ in range(rng.randint(2, 5))]
    rng.shuffle(words)
    times = words.count(wanted)
    # All write the finds in a row, without marks between: counting is hard enough to learn in one way.
    repeated = " ".join([wanted] * times)
    return (
        f"Count how often {wanted} is in the list", words, [str(times)], f"Found: {repeated}.",
        f"Looking for {wanted} we meet {repeated}, which is {times} in all.",
        f"{wanted}? {repeated}, {times} times",
    )  # fmt: skip


def _remove(rng: random.Random) -> Parts:
    words = rng.sample(LIST_WORDS, rng.randint(4, 7))
    gone = rng.choice(words)
    rest = [word for word in words if word != gone]
    return (
        f"Remove {gone} from the list", words, rest, f"Without it: {' '.join(rest)}.",
        f"We strike out {gone} and copy the others: {', then '.join(rest)}.",
        f"without {gone}: {' < '.join(rest)}",
    )  # fmt: skip


_OPERATIONS: tuple[Callable[[random.Random], Parts], ...] = (_reverse, _sort, _pick, _count, _remove)


def make(rng: random.Random) -> Item:
    """One list task."""
    task, words, result, own, prose, note = rng.choice(_OPERATIONS)(rng)
    answer = f"[{', '.join(result)}]"
    return Item(
        FAMILY,
        f"{task}: {', '.join(words)}. {_ENDING}",
        answer,
        "list",
        f"{own} Answer: {answer}",
        (INES.write(rng, prose, answer), OTTO.write(rng, note, answer)),
    )
