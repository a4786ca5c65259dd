"""Numbers written in words: "forty-two", "two thirds", "seven and a half", "fifty percent"."""

from __future__ import annotations

import re
from fractions import Fraction

from sdft_ray.generation.numbers import Number
from sdft_ray.generation.units import unit_at

_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, 2)}
_POWERS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {
    "half": 2, "halve": 2, "third": 3, "quarter": 4, "fourth": 4, "fifth": 5, "sixth": 6, "seventh": 7, "eighth": 8,
    "ninth": 9, "tenth": 10, "eleventh": 11, "twelfth": 12, "fifteenth": 15, "sixteenth": 16, "twentieth": 20,
    "hundredth": 100, "thousandth": 1000,
}  # fmt: skip
NUMBER_WORDS = frozenset(_VALUES) | frozenset(_POWERS)

_PART = rf"(?P<part>{'|'.join(_PARTS)})(?P<plural>s?)\b"
_WORD = rf"(?:{'|'.join([*_VALUES, *_POWERS])})\b"
_WHOLE = (
    rf"(?P<whole>(?:{_WORD}|an?(?=\s+(?:hundred|thousand|million|{'|'.join(_PARTS)})\b))(?:(?:\s+and\s+|\s+"
    rf"|-){_WORD})*"
)
_MIXED = re.compile(rf"{_WHOLE}?)\s+and\s+(?P<parts>an?|{'|'.join(_SMALL[1:10])})[\s-]+{_PART}", re.IGNORECASE)
_WORDED = re.compile(rf"{_WHOLE})?(?:[\s-]*\b{_PART})?(?P<percent>\s+per\s?cent\b)?", re.IGNORECASE)


def worded_at(text: str, start: int) -> tuple[Number, int] | None:
    """A number in words that starts at an index, and the index after it; None for ordinals and "one of"."""
    if mixed := _MIXED.match(text, start):  # seven and three quarters
        count = _count(mixed["whole"])
        parts = Fraction(_VALUES.get(mixed["parts"].lower(), 1), _PARTS[mixed["part"].lower()])
        if count is None:
            return None
        power = re.compile(rf"\s+({'|'.join(_POWERS)})\b", re.IGNORECASE).match(text, mixed.end())
        times, end = (_POWERS[power[1].lower()], power.end()) if power else (1, mixed.end())
        return Number((count + parts) * times), end
    match = _WORDED.match(text, start)
    if match is None or match.end() == start:
        return None
    count, rest = _count(match["whole"] or "one"), text[match.end() :]
    if count is None:
        return None
    if not match["part"]:
        if count <= 1 and re.match(r"\s+(?:of|another|more|way|that|who|which)\b", rest):
            return None
        scale = Fraction(1, 100) if match["percent"] else Fraction(1)
        return Number(Fraction(count), scale, unit_at(text, match.end())), match.end()
    part = match["part"].lower()
    if count <= 1 and not re.match(r"\W*\Z|\s+(?:of|an?)\b", rest):
        return None  # half full, a third try
    unit = ""
    end = match.end()
    if article := re.match(r"\s+an?(?=\s)", rest):  # half an hour
        unit = unit_at(text, end + article.end())
        end += article.end() if unit else 0
    # "two thirds" are counted parts; "third" and "twenty third" are ordinals.
    counted = part == "half" if match["whole"] is None else bool(match["plural"]) == (count != 1)
    return (Number(Fraction(count, _PARTS[part]), unit=unit), end) if counted else None


def _count(text: str) -> int | None:
    """The value of number words; None if they are several numbers, such as "three four"."""
    total = group = 0
    room = 10**12
    for name in re.findall(r"[a-z]+", text.lower()):
        if name == "and":
            continue
        if name in _POWERS:
            group, room = max(group, 1) * _POWERS[name], 100
            if _POWERS[name] >= 1000:
                total, group, room = total + group, 0, 1000
            continue
        value = _VALUES.get(name, 1)
        if value >= room:
            return None
        group += value
        room = 10 if value >= 20 else 1
    return total + group
