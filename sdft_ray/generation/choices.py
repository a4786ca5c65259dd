"""The option that a response chooses: a letter A to Z, or several."""

from __future__ import annotations

import re

from sdft_ray.generation.announcements import (
    AmbiguousError,
    announced,
    asked,
    denied,
    negated,
    rejected,
    set_aside,
    taken_back,
)
from sdft_ray.generation.numbers import plain


def read_choice(text: str) -> str | None:
    """The letters chosen, as capitals in alphabetical order ("C", "AC"); None if none is, or one of several."""
    try:
        for answer in announced(text, choice=True):
            letters = _announced_letters(plain(answer.text), answer.braced)
            if letters:
                return letters
        return _unannounced(plain(text))
    except AmbiguousError:
        return None


_OPEN = r"[(\[\"'“{*]*"
_CLOSE = r"[)\]\"'”}*]*"
_SEGMENT = re.compile(
    rf"[\s:]*(?:(?:definitely|clearly|simply|likely|most likely|probably|therefore|both|the)\s+)*"
    rf"(?:(?:options?|choices?|letters?|answers?|alternatives?)\s+)?(?P<open>{_OPEN})(?P<letter>[A-Z])(?![\w'’^+*/=<>])"
    rf"(?P<close>{_CLOSE})(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_NEXT = re.compile(
    rf"\s*(?P<link>,?\s*\band\b|,?\s*\bor\b|,|/|&|\+)\s*(?:\bor\b|\band\b)?\s*(?:(?:maybe|possibly|perhaps|both|also|option)\s+)?"
    rf"{_OPEN}(?P<letter>[A-Z])\b(?!['’^=])(?P<close>{_CLOSE})(?!\s+[a-z]+\b(?<!\bare)(?<!\bor)(?<!\band)(?<!\bbecause))"
)
_REST = re.compile(r"\s*(?:$|[.,;:!)\n—–-])|\s+(?:because|since|as|is|for|which|due|given)\b")
_ARTICLES = "AI"
"""Capitals that are also words."""


_ADJACENT = re.compile(r"[\s(\[]*(?P<letters>[A-Z]{2,8})[\s.)\]]*")


def _adjacent(text: str) -> str | None:
    """The letters of "ABD": capitals in alphabetical order and nothing else."""
    match = _ADJACENT.fullmatch(text)
    return match["letters"] if match and list(match["letters"]) == sorted(set(match["letters"])) else None


def _announced_letters(segment: str, braced: bool) -> str | None:
    if letters := _adjacent(segment):
        return letters
    match = _SEGMENT.match(segment)
    if match is None:
        if re.match(r"[\s:]*(?:[a-z]+ly\s+)?(?:not|neither|none|nor|never|no)\b", segment, re.IGNORECASE):
            raise AmbiguousError
        return None
    letter, rest = match["letter"], match["rest"]
    bracketed = bool(match["open"].strip("*")) and bool(match["close"].strip("*"))
    several = _several(letter, rest)
    if several is not None:
        return several
    if rejected(rest):
        raise AmbiguousError
    if bracketed or _REST.match(rest):
        # In "the answer is a because", "a" may be an article; in "is a." it cannot.
        return letter.upper() if bracketed or letter.isupper() or braced or not rest.strip(" .!\n") else None
    # A and I are words; other capitals before a word are letters.
    return letter if letter.isupper() and letter not in _ARTICLES else None


def _several(first: str, rest: str) -> str | None:
    """All letters of "A, C and D"; None if there is one only. Raises `AmbiguousError` for "A or C"."""
    letters, position = [first.upper()], 0
    while match := _NEXT.match(rest, position):
        if "or" in match["link"] or match["link"].strip() == "/" or re.match(r"[\s,/]*or\b", rest[position:]):
            raise AmbiguousError
        letters.append(match["letter"])
        position = match.end()
    if re.match(r"\s*,?\s*(?:or|nor)\b\s*\(?[A-Z]\b", rest[position:]):
        raise AmbiguousError
    return "".join(sorted(set(letters))) if len(letters) > 1 else None


# --- not announced ----------------------------------------------------------------------------------------------

_LETTER = rf"(?:(?:[Oo]ption|[Cc]hoice|[Aa]nswer|[Ll]etter)\s+)?{_OPEN}(?P<letter>[A-Z])\b{_CLOSE}"
_NAMED = re.compile(
    r"(?<![\w'’])\(?(?P<before>[A-Z])\b\)?\s+(?:is|was|must\s+be|has\s+to\s+be|would\s+be|seems|looks|appears)\s+(?:to\s+be\s+)?"
    r"(?:clearly\s+|definitely\s+)?"
    r"(?:(?:the|my|only|single|most)\s+)*(?:correct|right|true|best|answer|option|choice|plausible|likely|suitable)\b"
    r"|(?:\A|(?<=[\s(]))(?P<found>[A-Z])\)?\s+it\s+is\b"
    r"|\b(?:[Cc]hoose|[Pp]ick|[Ss]elect|[Gg]o\s+with)\s+(?:option|choice|answer)?\s*[(\[]?(?P<after>[A-Z])\b(?!\s+[a-z])"
)
_CONCLUDED = re.compile(
    r"(?:\b(?:(?![Hh]ardly|[Pp]ossibly|[Uu]nlikely)[A-Za-z]+ly|[Nn]ot\b[^.!?]*?\bbut(?:\s+rather)?|[Ss]o|[Tt]hus|[Hh]ence|[Tt]herefore|[Cc]onsequently|[Tt]hink|[Bb]elieve|[Ss]ay|[Gg]uess|[Cc]hoose|[Pp]ick"
    r"|[Ss]elect|go\s+with|[Ii]t['’]s|[Ii]t\s+is|[Ii]t\s+must\s+be|must\s+be|it\s+has\s+to\s+be|leaves?(?:\s+us\s+with)?"
    r"|leaving|[Oo]nly|is|be)[,:]?\s+(?:only\s+)?(?:it\s+is\s+|it['’]s\s+|it\s+must\s+be\s+)?)"
    rf"{_LETTER}\s*[.!]?\s*\Z"
)
_MAX_ALONE_CHARS = 100
_ALONE = re.compile(rf"\W*{_LETTER}\W*", re.IGNORECASE)
_LETTERS_ALONE = re.compile(
    r"\W*(?:(?:[Bb]oth|[Oo]ptions|[Cc]hoices|[Aa]nswers)\s+)*\(?[A-Z]\b\)?(?:(?:(?:\s*,)?\s*and\b|\s*[,&;])\s*\(?[A-Z]\b\)?)+"
    r"(?:\s+(?:are|is)\s+(?:both\s+|all\s+)?(?:correct|right|true))?\W*"
)
_LEADING = re.compile(
    r"\s*(?:(?:option|choice|answer)\s+)?(?:\((?P<bracketed>[A-Z])\)|"
    r"(?P<marked>[A-Z])(?:[).:](?=\s|$)|\s+(?:[-–—]|--)\s|,\s+(?:because|since|as|[a-z]+ly)\b|\s+(?=\([^()]+\)\W*\Z)))",
    re.IGNORECASE,
)
_MARK = re.compile(r"(?<!\w)\(?([A-Z])(?:[).:](?=\s)|\s+[-–—]\s)")
_MARK_REJECTED = re.compile(
    r"\W*(?:(?:is|was|seems|looks|can|could|does)(?:n['’]t|\s+not|not)?\b.{0,20}?\b)?(?:wrong|incorrect|(?:is|was|can|could|does)"
    r"(?:n['’]t|\s?not)\b|false\W*\Z)",
    re.IGNORECASE,
)
"""After "C)": the text of an option may itself have a negation, so only a verdict on the option counts."""
_CONTRAST = re.compile(
    r"[,;]\s*(?:yet|but|though|although)\s+(?:option\s+)?\(?(?:[B-HJ-Z]|A(?=\)?\s+(?:is|seems|looks|fits)))\b\)?"
    r"(?!\s+(?:is|was|does|can|seems|looks)(?:n['’]t|\s*not|\s+wrong))"
)
_UNSURE = re.compile(
    r"\b(?:do\s+not|don['’]t|cannot|can['’]t)\s+(?:know|tell|say|be\s+sure)|\b(?:could|might|may)\s+be\b", re.IGNORECASE
)


def _unannounced(text: str) -> str | None:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or taken_back(text) or asked(lines[-1]) or _UNSURE.search(text):
        return None
    short = lines[-1].strip()[:_MAX_ALONE_CHARS]
    if alone := _ALONE.fullmatch(short):
        return alone["letter"].upper()
    if letters := _adjacent(text):
        return letters
    if _LETTERS_ALONE.fullmatch(short):
        return "".join(sorted(set(re.findall(r"\b[A-Z]\b", short))))
    named = list(_NAMED.finditer(text))
    if any(negated(re.split(r"[.!?\n]", text[match.end() :], maxsplit=1)[0]) for match in named):
        return None
    if named and _CONTRAST.search(text, named[-1].end()):
        return None
    if named:
        return _agreed(text, [(match.start(match.lastgroup or 0), match[match.lastgroup or 0]) for match in named])
    concluded = _CONCLUDED.search(lines[-1])
    if concluded and not _rejected(lines[-1], concluded.start("letter"), concluded.end("letter")):
        return concluded["letter"]
    marked = set(_MARK.findall(text)) | set(re.findall(r"\(([A-Z])\)", text))
    if len(lines) == 1 and len(marked) <= 1 and (leading := _LEADING.match(lines[0])):
        letter, rest = leading["bracketed"] or leading["marked"], lines[0][leading.end() :]
        written = leading["bracketed"] or leading[0].endswith(")") or letter.isupper()
        return letter.upper() if written and not _MARK_REJECTED.match(rest) else None
    return _agreed(text, [(match.start(1), match[1]) for match in re.finditer(r"\(([A-Z])\)", text)])


def _rejected(text: str, start: int, end: int) -> bool:
    before = text[:start].rstrip("([\"'“")
    after = re.sub(r"^[)\]\"'”}*]*", "", text[end:])
    return (
        denied(before + " ")
        or negated(before)
        or set_aside(before + " ")
        or rejected(after)
        or re.match(r"\s*(?:or|and)\b|\?", after) is not None
    )


def _agreed(text: str, named: list[tuple[int, str]]) -> str | None:
    """The one letter that is named and not rejected; None if there are several, or it is one of "A or B"."""
    kept = {letter for start, letter in named if not _rejected(text, start, start + 1)}
    dropped = {letter for start, letter in named} - kept
    if (
        len(kept) != 1
        or (kept & dropped)
        or re.search(r"\b(?:or|and|nor)\s+(?:option\s+)?\(?\s*\Z", text[: named[-1][0]])
    ):
        return None
    return kept.pop()
