"""One quantity, read to the end of its text: a number with its unit, and words that leave it as it is.

What follows a number is refused unless it is known to be harmless: a noun, a place, a reason. After a calculation with
its result ("9 + 14 = 23 songs in 2 days") more may follow.
"""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from sdft_ray.generation.announcements import AmbiguousError
from sdft_ray.generation.answer_words import doubtful, word_set, words
from sdft_ray.generation.numbers import Number, compound_at, number_at
from sdft_ray.generation.units import known
from sdft_ray.generation.worded_numbers import NUMBER_WORDS, worded_at

LEAD = re.compile(
    r"(?:[\s:(\[{}\"'“#∴⇒→]|-{1,2}>|=>|\\\{|\bNo\.|\b(?:exactly|precisely|only|just|simply|equals|equal\s+to"
    r"|a\s+total\s+of|total|in\s+total|altogether|therefore|thus"
    r"|hence|so|then|finally|clearly|the(?=\s+(?:final|answer|result|solution|sum|value|total|year)\b)|is|result"
    r"|solution|sum|value|final|year|overall|we\s+get|answer|now|in\s+conclusion|in\s+summary|of\s+course)\b[:,]?)*",
    re.IGNORECASE,
)
_SIGN = re.compile(r"(?:negative|minus)\s+(?=[$€£\d.a-z])|[-–]\s+(?=[$€£\d.])", re.IGNORECASE)
_OVER = re.compile(r"(\s*-?\d+)\s+over\s+(\d+)(?=[\s.!)]*\Z)", re.IGNORECASE)
_CALCULATED = re.compile(r"([-$€£]*[\d.,]*\d)\s*=(?=[^-+*/×x]*\d\s*[-+*/×x]\s*[\d(])[\d\s.,$()+*/×x-]*[\d)][\s.$]*")
"""As in "84 = 7 * 12": the calculation follows the answer."""
_BELOW_ZERO = re.compile(r"(?:\s*°?\s?\w+)?\s+below\s+(?:zero|freezing)\b", re.IGNORECASE)
_CLOSED = re.compile(r"(?:\.-(?=\s|\Z))?(?:[\s)\]}\"'”’.!$`*]|\\\})*")


def quantity_at(text: str, start: int) -> tuple[Number, int] | None:
    """The number at an index, with its sign in words, and the index of what follows."""
    sign = _SIGN.match(text, start)
    begin = sign.end() if sign else start
    if over := _OVER.match(text, begin):
        return (Number(Fraction(int(over[1]), int(over[2]))), over.end()) if int(over[2]) else None
    parsed = compound_at(text, begin) or number_at(text, begin) or worded_at(text, begin)
    if parsed is None:
        return None
    number, end = parsed
    if below := _BELOW_ZERO.match(text, end):
        return (number if number.figure < 0 else -number), below.end()
    return (-number if sign else number), end


def consumed(segment: str, *, braced: bool = False, bare: bool = False) -> Number | None:
    """The number at the start of a segment whose rest does not change it; None if the segment is prose.

    `bare` allows nothing after it but its unit, `braced` a few words. Raises `AmbiguousError`.
    """
    if reversed_one := _CALCULATED.fullmatch(segment.strip()):
        segment = reversed_one[1]
    name, calculated = "", False
    if "=" in segment:
        if bare and [one for one in words(segment.rsplit("=", 1)[0]) if len(one) > 1 and not LEAD.fullmatch(one)]:
            return None
        calculated = not bare and CALCULATION.search(segment) is not None
        segment, name = _right_side(segment)
    lead = LEAD.match(segment)
    start = lead.end() if lead else 0
    found = quantity_at(segment, start)
    if found is None:
        if re.match(r"[-+±~<>≤≥|]?\s*[$€£]?\s*\.?\d", segment[start:]):
            raise AmbiguousError
        return None
    number, end = found
    rest = segment[end:]
    opened = re.search(r"[(\[]\s*\Z", segment[:start])
    if opened and not re.match(r"[^()\[\],;]*[)\]]", rest):
        raise AmbiguousError
    if re.match(r"\s?!", rest) and (braced or name or (start == 0 and abs(number.value) <= 20)):
        raise AmbiguousError  # a factorial
    if not (_unit_only(rest, number) if bare else harmless(rest, number, calculated=calculated)):
        raise AmbiguousError
    return replace(number, name=name, nouns=nouns_after(rest, number))


_SINGLE = re.compile(r"(?<![A-Za-z'’\\])([a-zA-Z])(?![A-Za-z'’])")
_ASSIGNED = re.compile(r"(?:\A|[\s($,;:])([a-zA-Z])(?:_\{?\w\}?|\([\w,]+\))?\s*=")
_OPERATOR = re.compile(r"[-+*/×÷·]|\bx\b")
_TIMES = re.compile(r"(?<=[\d\w)])\s*\bx\b(?=\s*[$\d(])|(?<=\d)x(?=\d)")
CALCULATION = re.compile(r"\d[%)\]]*(?:\s+[a-zA-Z][\w/'’-]*){0,4}\s*[-–+*/×÷·x]\s*[$€£(\[]*\d[^=,;]*=(?=[^=]*\Z)")
"""A clear final equation: numbers, an operator, numbers, the last equals sign."""
_NO_EQUATION = re.compile(r"[<>!≠≤≥≈~|]\s*=|[<>≤≥≠±∈]|=\s*\Z|\\(?:leq?|geq?|lt|gt|pm|in|neq?)(?![a-z])")


def _right_side(segment: str) -> tuple[str, str]:
    """What follows the last equals sign, and the letter before it; the left side is a name or a calculation.

    Raises `AmbiguousError` for other equations, such as 2x = 4, and for two letters.
    """
    if _NO_EQUATION.search(segment):
        raise AmbiguousError
    left, right = segment.rsplit("=", 1)
    if len({*_ASSIGNED.findall(segment)}) > 1 or len(_ASSIGNED.findall(segment)) > 1:
        raise AmbiguousError
    side = re.split(
        r"[,;:](?=\s)|=|\b(?:so|thus|hence|therefore|then|which|that|is|get|find|gives)\b", left, flags=re.I
    )[-1]
    if named := re.fullmatch(r"[\s($*]*([a-zA-Z])(?:_\{?\w\}?|\([\w,]+\))?[\s)*]*", side):
        return right, named[1]
    side = _TIMES.sub("*", side)
    letters = [one for one in _SINGLE.findall(side) if one not in "aAI"]
    if re.search(r"[|^]|\d[a-zA-Z]\b", re.sub(r"\d\^\d+", "", side)) and not _OPERATOR.search(side):
        raise AmbiguousError
    if any(not known(one) for one in letters) or (letters and not _OPERATOR.search(side)) or re.search(r"\|", side):
        # "the value of x = 5" names a letter too
        tail = re.search(r"\b(?:of|for|gives|get|find|have)\s+([a-zA-Z])\s*\Z", side)
        if tail is None or len(letters) > 1:
            raise AmbiguousError
        return right, tail[1]
    return right, ""


# --- what may follow --------------------------------------------------------------------------------------------

_CHANGING = word_set(
    "plus minus times by and power through till until than off short below under above over beyond before bc at up"
    " out mod modulo choose squared cubed factorial doubled tripled halved each apiece every thousandth hundred"
    " thousand million billion trillion lakh crore dozen dozens half halves third thirds quarter quarters fourth"
    " fifths tenths hundredths remainder rest repeating recurring something odd initially originally first"
    " previously earlier yesterday too is are was were be been being has have had with less fewer higher lower"
    " away ago degrees-below inclusive exclusive onwards upwards onward monday tuesday wednesday thursday friday"
    " saturday sunday january february march april may june july august september october november december jan"
    " feb mar apr jun jul aug sep sept oct nov dec und et y e og en becomes became would will max maximum minimum"
    " tops reversed backwards inverted negated base binary hex hexadecimal octal see part"
) | frozenset(NUMBER_WORDS)
_FOLLOWED = re.compile(
    r"(?P<ok>(?:\s+[a-z]+)?\s+(?:are|is|were|was)\s+(?:left(?:\s+over)?|remaining|needed|required)\b"
    r"|(?:\s+[a-z]+)?\s+is\s+(?:the|my|our)\s+(?:(?:final|correct|right)\s+)?(?:answer|result|total|solution)\b|\s+it\s+is\b)"
)
_REASON = re.compile(
    r"[,;—–:(\s-]*\b(?:because|since|as|which|where|given|i\.e\.|that\s+is|namely|for|when|from|due)\b|\s*[(\[]", re.I
)
_HEAD_END = re.compile(r"[,;(—–:\[]|\s-{1,2}\s|\b(?:because|since|as|which|where|given|so)\b", re.IGNORECASE)
_HEAD = re.compile(
    r"(?:/[a-z]+)?(?:[\s'’\"“”`$)\]}.!°]|[^\W\d_]++(?:['’-][^\W\d_]++)*+(?:/[a-z]+)?(?:(?<=[a-z])\^[23](?!\d))?)*+"
)
_ASIDES = word_set("mod base see max min should ought meant")
_LASTING = re.compile(
    rf"\b(?:in|after|during|within)\s+(?:the\s+)?(?:{'|'.join(NUMBER_WORDS)})(?=\s+[a-z])", re.IGNORECASE
)
"""As in "45 dollars in nine weeks"."""
_NARROWING = re.compile(
    r"\bonly\s+\w|\bper\s+(?!(?:day|week|month|year|hour|minute|second|annum|person|cent)\b)", re.IGNORECASE
)
"""As in "27 seats per row", "27 only on Mondays"."""
_LETTER_UNITS = frozenset("CFKJNVWALhmgls")
_MAX_HEAD_WORDS = 9


def _unit_only(rest: str, number: Number) -> bool:
    """Whether nothing follows a number but the unit that was read with it, or a note in brackets."""
    rest = rest.replace("\\}", "").strip(" \n.!)]}\"'”’$`*")
    if not rest:
        return True
    return bool(re.fullmatch(r"[^\W\d_]{1,20}(?:[/ ][^\W\d_]{1,20}){0,2}(?:\^[23])?", rest)) and harmless(
        " " + rest, number
    )


_SCALING = word_set(
    "plus minus short squared cubed factorial doubled tripled halved hundred thousand million billion trillion"
    " lakh crore dozen half third quarter remainder mod modulo base binary reversed inverted negated max maximum"
    " minimum is"
)


_ANOTHER = re.compile(
    rf"\btimes\s+(?:as\b|[$(]?\d)|\A\W*(?:\w+\s+)?(?:to|through|till|until|by|and)\s+[-$]?(?:\d|an?\s+half\b"
    rf"|(?:{'|'.join(NUMBER_WORDS)})\b)",
    re.IGNORECASE,
)


def _after_result(rest: str) -> bool:
    """Whether what follows the result of a calculation is the rest of its sentence: "= 23 songs in 2 days"."""
    cut = re.search(r"[,;(]|\bso\b|\bwhich\b", rest)
    head, tail = (rest[: cut.start()], rest[cut.start() :]) if cut else (rest, "")
    if not re.fullmatch(r"(?:\s?/\s?[a-z]+)?(?:\s+[\w'’$%./-]+)*+[\s.!)$’'\"”]*", head) or re.match(r"\s*\d", head):
        return False
    found = words(head)
    if (
        _ANOTHER.search(head)
        or not _SCALING.isdisjoint(found[:2])
        or not {"plus", "minus", "remainder", "mod"}.isdisjoint(found)
    ):
        return False
    return not re.search(r"\d", tail) and not doubtful(head) and not doubtful(tail)


def harmless(rest: str, number: Number, *, calculated: bool = False) -> bool:
    """Whether what follows a number in its sentence leaves it as it is: a unit, a noun, a reason.

    More may follow where a number is `calculated`.
    """
    if calculated and _after_result(rest):
        return True
    if _CLOSED.fullmatch(rest):
        return True
    if followed := _FOLLOWED.match(rest):
        rest = rest[followed.end() :]
    cut = _HEAD_END.search(rest)
    head, tail = (rest[: cut.start()], rest[cut.start() :]) if cut else (rest, "")
    found = words(_LASTING.sub("", head))
    if "..." in rest or "…" in rest:
        return False
    if not _HEAD.fullmatch(head) or len(found) > _MAX_HEAD_WORDS or doubtful(head) or not _CHANGING.isdisjoint(found):
        return False
    if _NARROWING.search(head):
        return False
    if any(one not in _LETTER_UNITS and not known(one) and one != "a" for one in _SINGLE.findall(head)):
        return False
    if re.search(r"\bmore\b", head) and number.scale != 1:
        return False
    if doubtful(tail) or not _ASIDES.isdisjoint(words(tail)):
        return False
    quiet = not re.search(r"\d", tail) and frozenset(NUMBER_WORDS).isdisjoint(words(tail))
    return quiet or _REASON.match(tail) is not None


_NO_NOUNS = word_set(
    "in of for to by at who left remaining remain remains total altogether per a an the on from all it this that"
    " now only overall more degree unit point as because since which where given also well together combined after"
    " during around per-day again correct right there here still"
)


def nouns_after(rest: str, number: Number) -> frozenset[str]:
    """The words right after a number that has no known unit, without a plural s."""
    found = set()
    for word in (
        words(re.split(r"[^\w\s'’-]", rest, maxsplit=1)[0])[:3] if not number.unit and number.scale == 1 else []
    ):
        singular = word.removesuffix("s")
        if word in _NO_NOUNS or singular in _NO_NOUNS:
            break
        found.add(singular)
    return frozenset(found)
