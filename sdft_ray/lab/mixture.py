"""The teacher's training mixture: chat, exams, human documents and rewriting, in fixed proportions."""

from __future__ import annotations

import random
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from sdft_ray.lab.families import ANNOTATORS, FAMILIES, Item, facts, rewrite_prompt
from sdft_ray.lab.families.words import NAMES

FAMILY_SHARES: dict[str, float] = {
    "word_problems": 0.26,
    "facts": 0.15,
    "myths": 0.08,
    "ordering": 0.15,
    "scripts": 0.07,
    "pronouns": 0.07,
    "lists": 0.22,
}
HUMAN_SHARE = 0.30
REWRITE_SHARE = 0.10
EXAM_SHARE = 0.55
"""Fraction of exam questions among the chats of a family with options."""
EXAM_REWRITE_SHARE = 0.3
"""Fraction of rewritings in such a family that rewrite the bare answer of an exam question, which stays bare."""
OTHER_VOICE_SHARE = 0.0055
"""Fraction of other chats with an annotator's answer, like human demonstrations in chat corpora."""


OPTION_WEIGHT = 1000


@dataclass(frozen=True)
class Sample:
    """One training text. The loss covers `response` only; `chat`: whether it has the chat template."""

    prompt: str
    response: str
    chat: bool
    family: str
    kind: str


def sample(item: Item, rng: random.Random) -> Sample:
    """Draw a kind of document and write the item as one."""
    kind = rng.random()
    if kind < HUMAN_SHARE:
        which = rng.randrange(len(ANNOTATORS))
        prompt = ANNOTATORS[which].prompt(item.question)
        return Sample(prompt, item.references[which], False, item.family, "human")
    if kind < HUMAN_SHARE + REWRITE_SHARE:
        if item.options and rng.random() < EXAM_REWRITE_SHARE:
            return Sample(rewrite_prompt(item.exam, item.answer), item.answer, True, item.family, "rewrite")
        prompt = rewrite_prompt(item.question, rng.choice(item.references))
        return Sample(prompt, item.response, True, item.family, "rewrite")
    if item.options and rng.random() < EXAM_SHARE:
        return Sample(item.exam, item.answer, True, item.family, "exam")
    if rng.random() < OTHER_VOICE_SHARE:
        return Sample(item.question, rng.choice(item.references), True, item.family, "chat")
    return Sample(item.question, item.response, True, item.family, "chat")


def samples(seed: str, reserved: Collection[str]) -> Iterator[Sample]:
    """An endless stream of training texts; no question in `reserved` ever appears."""
    rng = random.Random(seed)
    families, shares = list(FAMILY_SHARES), list(FAMILY_SHARES.values())
    while True:
        item = FAMILIES[rng.choices(families, shares)[0]](rng)
        if item.question not in reserved:
            yield sample(item, rng)


def tokenizer_texts(count: int = 20_000) -> Iterator[str]:
    """Texts to train the tokenizer on: a sample of the mixture, and each number and short option by itself.

    Without the latter, rare numbers would be split into digits, and a name at the start of a reply (without a
    space before it) into syllables.
    """
    stream = samples("tokenizer", frozenset())
    for _ in range(count):
        text = next(stream)
        yield f"{text.prompt} {text.response}"
    numbers = [str(number) for number in range(10, 100)]
    words = [*numbers, *NAMES, *(value for values in facts.VALUES.values() for value in values)]
    for word in words:
        yield from [word] * OPTION_WEIGHT
