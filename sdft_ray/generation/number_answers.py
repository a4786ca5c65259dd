"""The number that a response gives as its answer, or the mathematical expression where the answer is none."""

from __future__ import annotations

import re
from dataclasses import replace
from fractions import Fraction

from sdft_ray.generation.announcements import (
    AmbiguousError,
    Announced,
    announced,
    asked,
    bounded,
    denied,
    negated,
    rejected,
    set_aside,
    taken_back,
)
from sdft_ray.generation.expressions import Expression, expression_in
from sdft_ray.generation.numbers import Number, compound_at, number_at, plain, scan


def read_number(text: str) -> Number | Expression | None:
    """The announced number or expression; without an announcement the whole text, or the last number in it.

    None if there is none, or if it is denied, bounded, a question, one of several, or cut off.
    """
    try:
        for answer in announced(text):
            value = _announced_value(answer)
            if value is not None:
                return value
        written = plain(text)
        return _only_number(written.strip()) or expression_in(text) or _stated(text) or _last_number(written)
    except AmbiguousError:
        return None


def _announced_value(answer: Announced) -> Number | Expression | None:
    segment = plain(answer.text)
    try:
        value = _number_in_segment(segment, answer.braced)
    except AmbiguousError:
        expression = expression_in(answer.text, mathematics=answer.braced)
        if expression is None:
            raise
        return expression
    if value is None:
        value = expression_in(answer.text, mathematics=answer.braced)
    if value is None and answer.braced:
        raise AmbiguousError
    return value


_STATED = re.compile(r"(?P<before>[^$\\\n\d.?!]{1,200}\b(?:is|are|equals)\s+)(?P<value>[^\n?!]{1,200})")


def _stated(text: str) -> Number | Expression | None:
    """The quantity, fraction or expression that one sentence ends with: "The length is $3\\sqrt{5}$."."""
    match = _STATED.fullmatch(text.strip())
    if match is None or _refuses(match["before"]):
        return None
    number = _only_number(plain(match["value"]).strip())
    if number is not None and (number.unit or number.value.denominator > 1):
        return number
    return expression_in(match["value"])


_OVER = re.compile(r"\A(\s*-?\d+)\s+over\s+(\d+)(?=[\s.!)]*\Z)", re.IGNORECASE)
_CALCULATED = re.compile(r"([-$€£]*[\d.,]*\d)\s*=(?=[^-+*/×x]*\d\s*[-+*/×x]\s*[\d(])[\d\s.,$()+*/×x-]*[\d)][\s.$]*")
"""As in "84 = 7 * 12": the calculation follows the answer."""


def _only_number(text: str) -> Number | None:
    """The number that a text consists of, but for a known unit."""
    text = _OVER.sub(r"\1/\2", text)
    if calculated := _CALCULATED.fullmatch(text):
        text = calculated[1]
    sign = _SIGN.match(text)
    if words := _worded(text, sign.end() if sign else 0):
        return (-words[0] if sign else words[0]) if not text[words[1] :].strip(" .") else None
    parsed = compound_at(text, 0) or number_at(text, 0)
    unit = parsed[0].unit if parsed else ""
    rest = text[parsed[1] :].strip(" .").lower() if parsed else "?"
    return parsed[0] if parsed and (not rest or (unit and rest.removesuffix("s") == unit.removesuffix("s"))) else None


# --- announced --------------------------------------------------------------------------------------------------

_LEAD = re.compile(
    r"[\s:=≈(\[\"'“]*(?:(?:about|approximately|roughly|around|exactly|only|just|simply|equal to|equals|a total of"
    r"|answer:|answer is|[A-Za-z]\w{0,20}\s*=)[\s:=≈(\[\"'“]*)*"
)
_SIGN = re.compile(r"(?:negative|minus)\s+(?=[$€£\d.a-z])|[-–]\s+(?=[$€£\d.])", re.IGNORECASE)
_STARTS_NUMERIC = re.compile(r"[-+]?[$€£¥₹₩]?\s?[-+]?\.?\d")
_ARITHMETIC = re.compile(r"\s*(?:[-+*/×÷^]|x(?=[\s\d]))\s*[($]?\d|\s+(?:plus|minus|times|divided\s+by)\s")
_ANOTHER_NUMBER = re.compile(
    r"\s*(?:[,;&:/~–—-]|and\b|or\b|to\b|\+/-)?\s*[($-]?\d|\s*±"
    r"|\s*[^\W\d]+['\"]?\s*(?:,|,?\s*(?:and|or|to)\b|;)\s*[$-]?\d"
    r"|\s*[(,]?\s*(?:\w+\s+)?\(?\s*or\s+(?:maybe\s+|perhaps\s+|possibly\s+|even\s+|about\s+)?[$-]?(?:\d|[a-z]\s*=)"
    r"|\s*(?:\w+\s+)?[,(]?\s*or\b(?!\s+(?:equivalently|simply))"
    r"|\s*(?:\w+\s+)?(?:at\s+(?:the\s+)?(?:very\s+)?(?:least|most|minimum|maximum))\b"
    r"|\s*(?:\w+\s+)?(?:plus|minus)\b(?!\s*[$\d])"
    r"|\s*(?:\w+)?,?\s+(?:if|unless|provided|assuming|depending)\b"
    r"|\s+(?:\w+\s+)?(?:more|less|fewer|greater|higher|lower|larger|smaller|older|younger|longer|shorter)\s+than\s+[-$]?\d"
    r"|\s*,?\s*(?:with\s+|and\s+)?(?:an?\s+)?(?:remainder|rest|r)\s+(?:of\s+)?\d"
    r"|\s+and\s+(?:an?|one|two|three)[\s-]+(?:half|third|quarter|fourth|fifth|sixth|eighth|tenth)s?\b"
    r"|\s*(?:,|;|and|or)\s*[a-zA-Z](?:_\{?\w\}?)?\s*="
)
_CLOSED = re.compile(r"[^()\[\],;]*[)\]]")
_BOX_REST = re.compile(r"\s*(?:[^!\\,;<>|{}]|\\(?:text|mathrm)\b)*|[^!]*=[^=]*")
_NAME = re.compile(r"(?<![\w'’])([a-zA-Z])\s*=[\s$(]*\Z")
_UNEVALUATED = re.compile(r"(?:\d|[)}]|(?<![a-zA-Z])[b-zB-HJ-Z])\s*(?:[-+*/×÷]\s*)?\Z")
"""Before an operator and a number, or before a number with a sign: a part of a calculation."""
_ALGEBRA = re.compile(r"\s*[-+*/×·]\s*\(?\d*[b-hj-zB-HJ-Z](?![\w'’])|\s+[xyz]\b(?!\s*\d)")
_CLAUSE_END = re.compile(
    r"[!?;,(\n]|\.(?!\d)|\b(?:because|since|as|so|which|where|when|given|for|after|before|during|each|every|per|with"
    r"|while|than|more than)\b"
)
_RESULT = re.compile(r"=|\b(?:makes?|gives?|equals?|is|are|totals?|leaves?|becomes?|yields?)\b")
_UNIT_POWER = re.compile(r"(?<=[A-Za-z])\^[23]\b")
_NOT_BUT = re.compile(
    r"[\s:]*(?:[a-z]+ly\s+)?not\s[^.!?\n]{1,60}?[,;]?\s+but\s+(?:rather\s+|instead\s+)?", re.IGNORECASE
)
_BELOW_ZERO = re.compile(r"(?:\s*°?\s?\w+)?\s+below\s+(?:zero|freezing)\b", re.IGNORECASE)
_MAX_SEGMENT_STEPS = 3


def _number_in_segment(segment: str, braced: bool = False, steps: int = _MAX_SEGMENT_STEPS) -> Number | None:
    """The number at the start of a segment; None if the segment is prose. Raises `AmbiguousError`."""
    segment = _OVER.sub(r"\1/\2", segment)
    if contrast := _NOT_BUT.match(segment):
        segment = segment[contrast.end() :]
    lead = _LEAD.match(segment)
    start = lead.end() if lead else 0
    sign = _SIGN.match(segment, start)
    start_of_number = sign.end() if sign else start
    parsed = (
        compound_at(segment, start_of_number)
        or number_at(segment, start_of_number)
        or _worded(segment, start_of_number)
    )
    if parsed is None:
        first = re.search(r"\d", segment)
        before = segment[: first.start() if first else len(segment)]
        if sign or _STARTS_NUMERIC.match(segment, start) or _refuses(before):
            raise AmbiguousError
        return None
    number, end = parsed
    rest = segment[end:]
    opened = re.search(r"[(\[]\s*\Z", segment[:start])
    if _refuses(segment[:start]) or (opened and not _CLOSED.match(rest)) or (braced and not _BOX_REST.fullmatch(rest)):
        raise AmbiguousError
    if _ARITHMETIC.match(rest):
        # The answer of "5 + 3 = 8" follows the last equals sign; "5 + 3" is not evaluated.
        if "=" not in rest or not steps:
            raise AmbiguousError
        return _number_in_segment(rest.rsplit("=", 1)[1], braced, steps - 1)
    if _ANOTHER_NUMBER.match(rest) or _ALGEBRA.match(rest):
        raise AmbiguousError
    if _BELOW_ZERO.match(rest):
        return number if number.figure < 0 else -number
    clause = _UNIT_POWER.sub("", _CLAUSE_END.split(rest, maxsplit=1)[0])
    if re.search(r"\d", clause):
        results = list(_RESULT.finditer(clause))
        if not results or not steps:
            raise AmbiguousError
        return _number_in_segment(rest[results[-1].end() :], braced, steps - 1)
    name = _NAME.search(segment[:start])
    return replace(-number if sign else number, name=name[1] if name else "")


def _refuses(before: str) -> bool:
    """Whether the words before a number deny it or make it a bound."""
    words = before.rstrip()
    return denied(words + " ") or bounded(words + " ") or negated(words)


# --- written in words -------------------------------------------------------------------------------------------

_SMALL = [
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
]  # fmt: skip
_TENS = ["twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety"]
_VALUES = {word: i for i, word in enumerate(_SMALL)} | {word: 10 * i for i, word in enumerate(_TENS, 2)}
_POWERS = {"dozen": 12, "hundred": 100, "thousand": 1000, "million": 10**6, "billion": 10**9}
_PARTS = {
    "half": 2,
    "halves": 2,
    "third": 3,
    "quarter": 4,
    "fourth": 4,
    "fifth": 5,
    "sixth": 6,
    "seventh": 7,
    "eighth": 8,
    "ninth": 9,
    "tenth": 10,
}
_WORD = rf"(?:{'|'.join([*_VALUES, *_POWERS])})"
_WORDED = re.compile(
    rf"(?P<whole>(?:{_WORD}|an?(?=\s+(?:hundred|thousand|million|{'|'.join(_PARTS)})\b))(?:(?:\s+and\s+|\s+|-){_WORD}\b)*)?\b"
    rf"(?:(?P<added>\s+and\s+(?:an?|one|two|three|five|seven))?[\s-]*\b(?P<part>{'|'.join(_PARTS)})s?\b)?(?P<percent>\s+per\s?cent\b)?(?=\s*(?:[^\W\d]+\s*)?(?:[.,;!)\"]|\Z|$))",
    re.IGNORECASE | re.MULTILINE,
)


def _worded(text: str, start: int) -> tuple[Number, int] | None:
    """A number in words ("forty-two", "three quarters"), alone or before one word, and the index after it."""
    match = _WORDED.match(text, start)
    if match is None or match.end() == start:
        return None
    words = re.findall(r"[a-z]+", (match["whole"] or "one").lower())
    total = group = 0
    for word in words:
        if word in _POWERS:
            group = max(group, 1) * _POWERS[word]
            if _POWERS[word] >= 1000:
                total, group = total + group, 0
        else:
            group += _VALUES.get(word, 1 if word in ("a", "an") else 0)
    part = (match["part"] or "").lower()
    parts = _PARTS[part] if part else 1
    if part and not match["added"] and not _counts(match, total + group):
        return None
    if match["added"]:  # seven and three quarters
        return Number(total + group + Fraction(_VALUES.get(match["added"].split()[-1].lower(), 1), parts)), match.end()
    scale = Fraction(1, 100) if match["percent"] else Fraction(1)
    return Number(Fraction(total + group, parts), scale), match.end()


def _counts(match: re.Match[str], count: int) -> bool:
    """Whether the parts are counted, as in "two thirds": "third" and "twenty third" are ordinals."""
    plural = match[0][: match.end("part") - match.start() + 1].endswith("s") or match["part"].lower() == "halves"
    return match["part"].lower() == "half" if match["whole"] is None else plural == (count != 1)


_RESULT_IN_WORDS = re.compile(
    r"(?<!there )\b(?:is|equals|makes|gives|leaves|totals?|gets?|are|has|have|had|needs?|earns?"
    r"|costs?|spends?|spent|takes?|pays?|paid|saves?|sold|sells?|buys?|bought|eats?|ate|makes?|made)\s+(?=[a-z])",
    re.IGNORECASE,
)


def _last_worded(text: str) -> Number | None:
    """The number after the last "is" or "makes" of a text without digits; not "one", which may be a pronoun."""
    verbs = list(_RESULT_IN_WORDS.finditer(text))
    found = _worded(text, verbs[-1].end()) if verbs else None
    if found is None or found[0].value <= 1 or not re.fullmatch(r"\W*(?:\w+)?\W*", text[found[1] :]):
        return None
    return None if negated(text[: verbs[-1].end()]) or asked(text[verbs[-1].start() :]) else found[0]


# --- not announced ----------------------------------------------------------------------------------------------

_ENUMERATOR = re.compile(r"^[ \t]*(?:\d{1,3}[.)](?=[ \t]+\S)|step[ \t]+\d+)", re.IGNORECASE | re.MULTILINE)
_VERB = (
    r"(?:is|are|was|were|be|makes?|equals?|gives?|gets?|leaves?|leaving|becomes?|totals?|yields?|means|have|has|get)"
)
_SIDE_BY_SIDE = re.compile(
    rf"\s*|\s*[,;/&|]\s*|\s*(?:[^\W\d]+['\"]?\s*)?(?:,?\s*and|or|to|–|—|-)\s*|\s*(?!{_VERB}\b)[^\W\d]+\.?,?\s*"
    r"|\s*['\"′″]\s*|\s*(?:[-+*/×÷±]|\+/-)\s*|\s*[^\W\d]+\s*(?:[-+*×÷x]|by)\s*",
    re.IGNORECASE,
)
"""Between two numbers of one quantity, one range, one date, or one calculation without its result."""
_ASSIGNED = re.compile(r"(?:\A|[^\w)\]}+*/^-]\s*)[a-zA-Z](?:_\{?\w\}?)?\s*=\s*\Z")
_NEXT_ASSIGNED = re.compile(
    r"\s*(?:[,;]|,?\s*(?:and|or)\b|\\text\{\s*(?:and|or)\s*\})?\s*\$?\s*\$?[a-zA-Z](?:_\{?\w\}?)?\s*=\s*"
)
_MONTH = (
    r"(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b\.?"
)
_ESTIMATED = re.compile(r"\b(?:about|approximately|approx\.?|roughly|around|circa)\s+[$€£]?\Z", re.IGNORECASE)
_DAY_OF = re.compile(rf"{_MONTH}\s+\Z")
_OF_MONTH = re.compile(rf"(?:\s+of)?\s+{_MONTH}")
_LOOSE_MINUS = re.compile(rf"(?:\A|\b{_VERB}\s*|[=:]\s*)-\s+[$€£]?\Z", re.IGNORECASE)
_WORDED_MINUS = re.compile(r"\b(?:negative|minus)\s+[$€£]?\Z", re.IGNORECASE)
_SENTENCE_END = re.compile(r"[!?\n]|\.(?!\d)")


def _last_number(text: str) -> Number | None:
    """The last number of a text, unless it numbers a list item or belongs to another number.

    Raises `AmbiguousError` if it is denied, bounded, asked, or one of several.
    """
    if len(_ENUMERATOR.findall(text)) > 1:
        text = _ENUMERATOR.sub("", text)
    numbers, unread = scan(text)
    if not numbers and not unread and not re.search(r"\d", text):
        return _last_worded(text)
    if unread or not numbers:
        raise AmbiguousError
    if len(numbers) > 1 and set_aside(text[numbers[-2][2] : numbers[-1][1]]):
        if _SENTENCE_END.search(text, numbers[-2][2], numbers[-1][1]) or taken_back(text[numbers[-1][2] :]):
            raise AmbiguousError
        numbers.pop()
    if len(numbers) > 1 and (compound := compound_at(text, numbers[-2][1])):
        numbers[-2:] = [(compound[0], numbers[-2][1], compound[1])]
    number, start, end = numbers[-1]
    before, rest = text[max(0, start - 200) : start], text[end:]
    previous = numbers[-2] if len(numbers) > 1 else None
    if previous and previous[0] != number and _belongs(text, previous, start):
        raise AmbiguousError
    if _LOOSE_MINUS.search(before) or _WORDED_MINUS.search(before):
        number, before = -number, before.rstrip(" -$€£")
    if denied(before) or bounded(before) or _ESTIMATED.search(before) or negated(before) or rejected(rest):
        raise AmbiguousError
    if _DAY_OF.search(before) or _OF_MONTH.match(rest):
        raise AmbiguousError
    sentence = _SENTENCE_END.search(rest)
    if (
        (sentence and sentence[0] == "?")
        or asked(rest)
        or taken_back(rest)
        or _ANOTHER_NUMBER.match(rest)
        or _ALGEBRA.match(rest)
    ):
        raise AmbiguousError
    operand = _UNEVALUATED.search(before)
    if operand and (text[start] in "+-" or not operand[0].rstrip()[-1].isalnum()):
        raise AmbiguousError
    if rest.startswith("!") and re.search(r"[=(]\s*\Z", before):
        raise AmbiguousError
    name = _NAME.search(before)
    return replace(-number if _BELOW_ZERO.match(rest) else number, name=name[1] if name else "")


def _belongs(text: str, previous: tuple[Number, int, int], start: int) -> bool:
    """Whether the number at `start` and the previous one are two parts, two ends or two values of one thing."""
    if _SIDE_BY_SIDE.fullmatch(text, previous[2], start):
        return True
    assigned = _ASSIGNED.search(text[max(0, previous[1] - 20) : previous[1]])
    return assigned is not None and _NEXT_ASSIGNED.fullmatch(text, previous[2], start) is not None
