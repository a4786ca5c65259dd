"""Typed answers: how the final answer is extracted from a response, and when two answers are equal.

Five kinds: a number (exact), a choice letter A to J, a text, a list of items, or none (nothing to check). An explicit
answer (`#### ...`, `\\boxed{...}`, "the answer is ...", "Answer: ...") has precedence over a guessed one, and a later
explicit answer over an earlier one. An explicit answer that is ambiguous counts as no answer. A missing answer is equal
to nothing, not even to another missing answer.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from sdft_ray.errors import DataError
from sdft_ray.generation.numbers import Number, equal_numbers, number_at, numbers_in, plain


@dataclass(frozen=True)
class Answer:
    """`value` is a `Number`, a choice as a capital letter, a normalised text, or a tuple of normalised items."""

    kind: str
    value: Number | str | tuple[str, ...]


def extract(kind: str, text: str) -> Answer | None:
    """The answer in a response, or None.

    `kind` is "number", "choice", "text", "list" or "none" (always None). Raises `DataError` for another kind.
    """
    if kind == "none":
        return None
    if kind not in _READERS:
        raise DataError(f"unknown answer kind {kind!r}", f"use one of {', '.join([*_READERS, 'none'])}")
    value = _READERS[kind](text)
    return None if value is None else Answer(kind, value)


def equal(kind: str, a: Answer | None, b: Answer | None) -> bool:
    """Whether two answers of this kind are equal. False if either is missing or of another kind."""
    if a is None or b is None or a.kind != kind or b.kind != kind:
        return False
    if isinstance(a.value, Number) and isinstance(b.value, Number):
        return equal_numbers(a.value, b.value)
    return a.value == b.value


# --- explicit answers ---------------------------------------------------------------------------------------

_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*")
_BOXED = re.compile(r"\\(?:boxed|fbox)\s*\{")
_PHRASE = re.compile(
    r"\banswers?\b(?:[ \t]+(?:to|for)[ \t]+[^\n.:]{1,80}?)?\s*"
    r"(?::|=|\b(?:is|are|was|would be|will be|should be|must be|equals|comes to)\b)[ \t]*:?[ \t]*",
    re.IGNORECASE,
)

_REST_OF_LINE = re.compile(r"\s*(.*)")
"""An announcement at the end of a line refers to the next line that is not empty."""
_MAX_ANNOUNCEMENTS = 100


def _announced(text: str) -> Iterator[str]:
    """The text after each announcement (to the end of the line, or inside the braces), last one first."""
    starts = [(match.end(), False) for pattern in (_HASHES, _PHRASE) for match in pattern.finditer(text)]
    starts += [(match.end(), True) for match in _BOXED.finditer(text)]
    for start, braced in sorted(starts, reverse=True)[:_MAX_ANNOUNCEMENTS]:
        yield _inside_braces(text, start) if braced else _REST_OF_LINE.match(text, start)[1]  # type: ignore[index]


def _inside_braces(text: str, start: int) -> str:
    depth = 1
    for end in range(start, min(len(text), start + 1000)):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return ""  # truncated before the closing brace


# --- numbers ------------------------------------------------------------------------------------------------

_NUMBER_LEAD = re.compile(
    r"[\s:=≈(\[\"'“]*(?:(?:about|approximately|exactly|only|just|simply|equal to|equals|a total of|answer:"
    r"|answer is|[A-Za-z]\w{0,20}\s*=)[\s:=≈(\[\"'“]*)*"
)
_STARTS_NUMERIC = re.compile(r"[-+]?[$€£¥₹₩]?\s?[-+]?\.?\d")
_ARITHMETIC = re.compile(r"\s*(?:[-+*/×÷]|x(?=[\s\d]))\s*[($]?\d")
_ANOTHER_NUMBER = re.compile(r"\s*(?:[,;&:/-]|and\b|or\b|to\b)?\s*[($-]?\d|\s*[^\W\d]+\s*(?:,|,?\s*and\b)\s*\d")
_SIDE_BY_SIDE = re.compile(r"\s*|\s*(?:[^\W\d]+\s*)?(?:,?\s*and|or|to)\s*")
_CLAUSE_END = re.compile(r"[!?;,(\n]|\.(?!\d)|\b(?:because|since|as|so|which|where|when|given)\b")
_ENUMERATOR = re.compile(r"^[ \t]*(?:\d{1,3}[.)](?=[ \t]+\S)|step[ \t]+\d+)", re.IGNORECASE | re.MULTILINE)


class _AmbiguousError(Exception):
    """An explicit answer with more than one reading."""


def _number(text: str) -> Number | None:
    text = plain(text)
    try:
        for segment in _announced(text):
            value = _number_in_segment(segment)
            if value is not None:
                return value
    except _AmbiguousError:
        return None
    # No explicit answer: the last number, unless it numbers a list item or directly follows another number.
    if len(_ENUMERATOR.findall(text)) > 1:
        text = _ENUMERATOR.sub("", text)
    numbers = numbers_in(text)
    if len(numbers) > 1 and _SIDE_BY_SIDE.fullmatch(text, numbers[-2][2], numbers[-1][1]):
        return None
    return numbers[-1][0] if numbers else None


def _number_in_segment(segment: str) -> Number | None:
    """The number at the start of a segment; None if the segment is prose. Raises `_AmbiguousError`."""
    lead = _NUMBER_LEAD.match(segment)
    start = lead.end() if lead else 0
    parsed = number_at(segment, start)
    if parsed is None:
        if _STARTS_NUMERIC.match(segment, start):
            raise _AmbiguousError
        return None
    number, end = parsed
    rest = segment[end:]
    if _ARITHMETIC.match(rest):
        # The answer of "5 + 3 = 8" follows the last equals sign; "5 + 3" is not evaluated.
        if "=" not in rest:
            raise _AmbiguousError
        return _number_in_segment(rest.rsplit("=", 1)[1])
    if _ANOTHER_NUMBER.match(rest):
        raise _AmbiguousError
    clause = _CLAUSE_END.split(rest, maxsplit=1)[0]
    return None if re.search(r"\d", clause.partition("=")[0]) else number


# --- choices ------------------------------------------------------------------------------------------------

_LETTER_SEGMENT = re.compile(
    r"[\s:]*(?:(?:option|choice|letter|answer|alternative)\s+)?(?P<open>[(\[\"'“{]*)(?P<letter>[A-Ja-j])(?![\w'’])"
    r"(?P<close>[)\]\"'”}]*)(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_ANOTHER_LETTER = re.compile(r"\s*(?:,|/|&|\band\b|\bor\b)\s*(?:\bor\b|\band\b)?\s*[(\[]?[A-J]\b(?!['’]|\s+[a-z])")
_LETTER_REST = re.compile(r"\s*(?:$|[.,;:!?)\n—–-])|\s+(?:because|since|as|is|for|which|due|given)\b")
_CORRECT = re.compile(
    r"\(?\b(?P<before>[A-J])\b\)?\s+is\s+(?:the\s+)?(?:only\s+)?(?:correct|right|best|answer)\b"
    r"|\b(?:[Cc]hoose|[Pp]ick|[Ss]elect|go with)\s+(?:option|choice|answer)?\s*[(\[]?"
    r"(?P<after>[A-J])\b(?!\s+[a-z])"
)
_LONE_LETTER = re.compile(r"\W*([A-Ja-j])\W*")
_LEADING_LETTER = re.compile(r"\s*(?:\(([A-J])\)|([A-J])[).:])\s")
_OPTION_MARK = re.compile(r"(?<!\w)\(?([A-J])[).:](?=\s)")


def _choice(text: str) -> str | None:
    text = plain(text)
    try:
        for segment in _announced(text):
            letter = _letter_in_segment(segment)
            if letter is not None:
                return letter
    except _AmbiguousError:
        return None
    named = [match["before"] or match["after"] for match in _CORRECT.finditer(text)]
    if named:
        return named[-1] if len(set(named)) == 1 else None
    lines = [line for line in text.splitlines() if line.strip()]
    if lines and (lone := _LONE_LETTER.fullmatch(lines[-1])):
        return lone[1].upper()
    marked = set(_OPTION_MARK.findall(text)) | set(re.findall(r"\(([A-J])\)", text))
    if len(lines) == 1 and len(marked) == 1 and (leading := _LEADING_LETTER.match(lines[0] + " ")):
        return leading[1] or leading[2]
    bracketed = set(re.findall(r"\(([A-J])\)", text))
    return bracketed.pop() if len(bracketed) == 1 else None


def _letter_in_segment(segment: str) -> str | None:
    match = _LETTER_SEGMENT.match(segment)
    if match is None:
        return None
    letter, rest = match["letter"], match["rest"]
    if _ANOTHER_LETTER.match(rest):
        raise _AmbiguousError
    bracketed = bool(match["open"]) and bool(match["close"])
    if bracketed or _LETTER_REST.match(rest):
        # In "the answer is a because", "a" may be an article; in "is a." it cannot.
        return letter.upper() if bracketed or letter.isupper() or not rest.strip(" .!\n") else None
    # A and I are words; other capitals before a word are letters.
    return letter if letter.isupper() and letter not in "AI" else None


# --- texts and lists ----------------------------------------------------------------------------------------

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]]{2})[.!?](?=\s+[A-Z])")
_MEANINGFUL_MARKS = frozenset("#&%@*")
_QUOTES_AND_BRACKETS = "\"'“”‘’`[](){}<> \t"


def normalize(text: str, *, articles: bool = False) -> str:
    """NFKC, lower case, no punctuation, single spaces; English articles are dropped unless `articles`.

    Marks with a meaning stay: those between digits (3.5, 1/2), the sign of a number, and `# & % @ *`.
    """
    text = unicodedata.normalize("NFKC", text).casefold().replace("\u2212", "-")
    chars: list[str] = []
    for i, char in enumerate(text):
        if not unicodedata.category(char).startswith("P") or char in _MEANINGFUL_MARKS:
            chars.append(char)
            continue
        before, after = text[i - 1 : i], text[i + 1 : i + 2]
        is_sign = char == "-" and after.isdigit() and not before.isalnum()
        if is_sign or (before.isdigit() and after.isdigit()):
            chars.append(char)
        elif unicodedata.category(char) == "Pd" or char in "/_":
            chars.append(" ")
    words = "".join(chars).split()
    return " ".join(word for word in words if articles or word not in ("a", "an", "the"))


def _text(text: str) -> str | None:
    for segment in _announced(text):
        value = normalize(_SENTENCE_END.split(_unwrapped(segment), maxsplit=1)[0])
        if value:
            return value
    return normalize(_unwrapped(text)) or None


def _unwrapped(text: str) -> str:
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text).replace("**", "")


def _list(text: str) -> tuple[str, ...] | None:
    text = _unwrapped(text)
    for segment in _announced(text):
        items = _items(segment)
        if items:
            return items
    brackets = re.findall(r"\[([^\[\]\n]*)\]", text)
    if brackets:
        return _items(brackets[-1]) or None
    lines = [line for line in text.splitlines() if line.strip()]
    return (_items(lines[-1].rsplit(":", 1)[-1]) or None) if lines else None


def _items(segment: str) -> tuple[str, ...]:
    """Items separated by commas or semicolons; without those, by spaces."""
    bracket = re.match(r"\s*[\[({]([^\[\](){}\n]*)[\])}]", segment)
    segment = bracket[1] if bracket else _SENTENCE_END.split(segment, maxsplit=1)[0].strip().rstrip(".")
    if re.search(r"[,;]", segment):
        # "1,000, 2,000" separates by comma and space, "1,2" by comma alone.
        parts = re.split(r"[,;]\s+" if re.search(r"[,;]\s", segment) else r"[,;]", segment)
        parts[-1] = re.sub(r"^\s*and\s+", "", parts[-1])
    else:
        parts = segment.split()
    items = (_item(part) for part in parts)
    return tuple(item for item in items if item)


def _item(part: str) -> str:
    part = part.strip(_QUOTES_AND_BRACKETS)
    written = plain(part)
    parsed = number_at(written, 0)
    if parsed is not None and parsed[1] == len(written):
        return str(parsed[0].value)
    return normalize(part, articles=True) or part


_READERS: dict[str, Callable[[str], Number | str | tuple[str, ...] | None]] = {
    "number": _number,
    "choice": _choice,
    "text": _text,
    "list": _list,
}
