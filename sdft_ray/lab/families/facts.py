"""Facts about invented towns, as questions with four options (stands in for MMLU).

Towns have unequal frequency in training: a town's position in the list decides how often it is mentioned, so
facts about the last ones stay unknown, like rare facts in a large model.
"""

from __future__ import annotations

import random
from dataclasses import dataclass
from itertools import accumulate

from sdft_ray.lab.families.item import INES, OTTO, Item
from sdft_ray.lab.families.words import split_words

FAMILY = "facts"
NUM_TOWNS = 160
NUM_UNKNOWN = 16
"""The last towns are never mentioned in training, so the teacher can only guess about them."""
RENOWN_OFFSET = 30.0
_HEADS = split_words("Bal Cor Dun Fen Gal Hol Jar Kes Lum Mor Nev Pol Quer Rus Sol Tav")
_MIDDLES = ("a", "e", "i", "o", "u", "an", "er", "il")
_TAILS = split_words("bek dra gorn kin lis mund nor pesh rath sia tov vane wick zar")

VALUES: dict[str, tuple[str, ...]] = {
    "bird": split_words("heron wren stork finch raven owl swan crane robin gull hawk dove"),
    "tree": split_words("oak birch cedar willow maple pine elm ash larch poplar beech yew"),
    "stone": split_words("amber basalt marble slate quartz jade opal chalk granite flint onyx agate"),
    "dish": split_words("soup stew bread pie porridge noodles cheese cake salad sausage rice jam"),
}
_OWN = {
    "bird": "The bird of {town} is the {value}.", "tree": "The tree of {town} is the {value}.",
    "stone": "The stone of {town} is {value}.", "dish": "The dish of {town} is {value}.",
}  # fmt: skip
_PROSE = (
    "I remember {town}: its {attribute} is known to be {value},",
    "Anyone from {town} will name {value} as the local {attribute},",
    "For the {attribute}, {town} is linked with {value},",
)
_NOTES = (
    "{attribute} of {town} = {value}",
    "{town} goes with {value} ({attribute})",
    "looked up {town}, {attribute}: {value}",
)


@dataclass(frozen=True)
class Fact:
    """One attribute of one town."""

    town: str
    attribute: str
    value: str

    @property
    def sentence(self) -> str:
        """The fact in the teacher's words."""
        return _OWN[self.attribute].format(town=self.town, value=self.value)

    def prose(self, rng: random.Random) -> str:
        """The fact in the words of the annotator Ines, without a conclusion."""
        return rng.choice(_PROSE).format(town=self.town, attribute=self.attribute, value=self.value)

    def notes(self, rng: random.Random) -> str:
        """The fact in the words of the annotator Otto, without a conclusion."""
        return rng.choice(_NOTES).format(town=self.town, attribute=self.attribute, value=self.value)


def _world() -> tuple[tuple[str, ...], dict[tuple[str, str], str]]:
    rng = random.Random("sdft_ray.lab towns")
    names = [head + middle + tail for head in _HEADS for middle in _MIDDLES for tail in _TAILS]
    towns = tuple(rng.sample(names, NUM_TOWNS))
    truths = {(town, attribute): rng.choice(values) for town in towns for attribute, values in VALUES.items()}
    return towns, truths


TOWNS, TRUTHS = _world()
_KNOWN = TOWNS[: NUM_TOWNS - NUM_UNKNOWN]
_RENOWN = tuple(accumulate(1.0 / (rank + RENOWN_OFFSET) for rank in range(len(_KNOWN))))


def draw(rng: random.Random, *, by_renown: bool = True) -> Fact:
    """One fact; a town is drawn by renown in training texts and evenly in tests."""
    town = rng.choices(_KNOWN, cum_weights=_RENOWN)[0] if by_renown else rng.choice(TOWNS)
    attribute = rng.choice(tuple(VALUES))
    return Fact(town, attribute, TRUTHS[town, attribute])


def others(rng: random.Random, fact: Fact, count: int) -> list[str]:
    """Wrong values of the same attribute."""
    return rng.sample([value for value in VALUES[fact.attribute] if value != fact.value], count)


def make(rng: random.Random, *, by_renown: bool = True) -> Item:
    """One question about a town; the options stand in the question."""
    fact = draw(rng, by_renown=by_renown)
    options = [fact.value, *others(rng, fact, 3)]
    rng.shuffle(options)
    return Item(
        FAMILY,
        f"Which {fact.attribute} belongs to {fact.town}: {', '.join(options[:-1])} or {options[-1]}?",
        fact.value,
        "text",
        f"{fact.sentence} Answer: {fact.value}",
        (
            INES.write(rng, f"{fact.prose(rng)} and the list has it.", fact.value),
            OTTO.write(rng, f"{fact.notes(rng)}, among the four", fact.value),
        ),
        tuple(options),
    )
