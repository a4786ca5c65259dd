"""What the teacher is trained on: chat, exams, human documents and rewriting, in fixed shares."""

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
"""Among chat documents of a family that has options: how many are asked as in an exam."""
EXAM_REWRITE_SHARE = 0.3
"""Among rewritings of such a family: how many rewrite a bare answer to an exam question, which stays bare."""
OTHER_VOICE_SHARE = 0.0055
"""Among other chats: how many are answered as an annotator would, as demonstrations in chat corpora are."""


OPTION_WEIGHT = 1000


@dataclass(frozen=True)
class Sample:
    """One training text: `prompt` is read, `response` is learned; `chat` says whether it is a chat."""

    prompt: str
    response: str
    chat: bool
    family: str
    kind: str


def sample(item: Item, rng: random.Random) -> Sample:
    """One way to show an item."""
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
    """What the tokenizer is made from: a sample of the mixture, and each number and short option on its own.

    Without the latter, rare numbers would fall into digits, and a name that begins a reply (where no space
    precedes it) into syllables.
    """
    stream = samples("tokenizer", frozenset())
    for _ in range(count):
        text = next(stream)
        yield f"{text.prompt} {text.response}"
    numbers = [str(number) for number in range(10, 100)]
    words = [*numbers, *NAMES, *(value for values in facts.VALUES.values() for value in values)]
    for word in words:
        yield from [word] * OPTION_WEIGHT
