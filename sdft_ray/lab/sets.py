"""The fixed sets of the laboratory: tests, seed sets, calibration and held-out rows; from fixed seeds.

No question of a test appears in any other set, nor in the teacher's training; no two sets share a question.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Collection, Iterator
from functools import cache

from sdft_ray.lab.families import ANNOTATORS, FAMILIES, Item, make_test_item

NUM_TEST = 200
NUM_WORD_PROBLEMS = 2000
NUM_MIXED = 1001
NUM_LARGE = 4_550
"""Of the two sets for studies of data-set size: 4,000 and more are left when a tenth is held out."""
NUM_CALIBRATION = 128
NUM_HELDOUT = 700
SEED_SETS = ("mixed", "word_problems", "mixed_large", "word_problems_large")
"""What `seed_rows` can write: sets to fine-tune on."""
EXAM_EVERY = 3
"""Of the rows with options, each third asks for the answer alone, as tests do; its reference is the bare answer.

Without such rows fine-tuning on any text unlearns the form of the tests, which says nothing about pruning.
"""


@cache
def test_items(family: str) -> tuple[Item, ...]:
    """The test of one family: 200 different questions."""
    rng = random.Random(f"sdft_ray.lab test {family}")
    return tuple(_distinct(lambda: make_test_item(family, rng), NUM_TEST, set()))


@cache
def reserved_questions() -> frozenset[str]:
    """Every test question, in its long form."""
    return frozenset(item.question for family in FAMILIES for item in test_items(family))


@cache
def training_sets() -> dict[str, tuple[Item, ...]]:
    """Name of a seed, held-out or calibration set -> its items; families in turn where they are mixed."""
    taken = set(reserved_questions())
    families = list(FAMILIES)
    sizes = {
        "word_problems": (NUM_WORD_PROBLEMS, families[:1]),
        "mixed": (NUM_MIXED, families),
        "calibration": (NUM_CALIBRATION, families),
        "heldout": (NUM_HELDOUT, families),
        "heldout_word_problems": (NUM_HELDOUT, families[:1]),
        "word_problems_large": (NUM_LARGE, families[:1]),
        "mixed_large": (NUM_LARGE, families),
    }
    sets: dict[str, tuple[Item, ...]] = {}
    for name, (count, chosen) in sizes.items():
        rng = random.Random(f"sdft_ray.lab {name}")
        turn = _cycle(chosen)
        sets[name] = tuple(_distinct(lambda rng=rng, turn=turn: FAMILIES[next(turn)](rng), count, taken))
    return sets


def heldout_items(family: str) -> tuple[Item, ...]:
    """The held-out items of one family, on which learning rates are chosen."""
    return tuple(item for item in training_sets()["heldout"] if item.family == family)


def seed_rows(name: str) -> list[dict[str, str]]:
    """The rows of a set as they are written to disk; an annotator is drawn for each reference."""
    rng = random.Random(f"sdft_ray.lab annotators of {name}")
    with_options = 0
    rows = []
    for index, item in enumerate(training_sets()[name]):
        instruction, reference = item.question, item.references[rng.randrange(len(ANNOTATORS))]
        with_options += bool(item.options)
        if item.options and with_options % EXAM_EVERY == 0:
            instruction, reference = item.exam, item.answer
        rows.append(
            {
                "id": f"{name}-{index:04d}",
                "instruction": instruction,
                "reference": reference,
                "answer_kind": item.answer_kind,
                "family": item.family,
            }
        )
    return rows


def _cycle(names: list[str]) -> Iterator[str]:
    while True:
        yield from names


def _distinct(make: Callable[[], Item], count: int, taken: Collection[str]) -> Iterator[Item]:
    seen = taken if isinstance(taken, set) else set(taken)
    num_yielded = 0
    while num_yielded < count:
        item = make()
        if item.question not in seen:
            seen.add(item.question)
            num_yielded += 1
            yield item
