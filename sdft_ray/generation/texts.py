"""Texts and lists that a response gives as its answer, normalised for comparison."""

from __future__ import annotations

import re
import unicodedata

from sdft_ray.generation.announcements import (
    AmbiguousError,
    Announced,
    announced,
    denied,
    rejected,
    settled,
    tidy,
)
from sdft_ray.generation.answer_words import retracted, unsure
from sdft_ray.generation.numbers import number_at, plain

_SENTENCE_END = re.compile(r"(?<=[a-z0-9)\]]{2})[.!?](?=\s+[A-Z])")
_MEANINGFUL_MARKS = frozenset("#&%@*")
_QUOTES_AND_BRACKETS = "\"'“”‘’`[](){}<> \t"
_FORMULA = re.compile(r"[+*^=<>|]|\w\(|(?<=\w)/(?=\w)|\d\s*-\s*\d|\b[a-z]\s*-\s*[a-z\d]\b")
_THOUSANDS = re.compile(r"(?<![\d,.])\d{1,3}(?:,\d{3})+(?![\d,])")
_ARTICLE = re.compile(r"\b(?:the|an?)\s+(?=\w)|\b(?:The|An?|THE)\s+(?=\w)(?<!\w\s)", re.UNICODE)


def normalize(text: str, *, articles: bool = False) -> str:
    """NFKC, lower case, no punctuation, single spaces; English articles are dropped unless `articles`.

    Marks with a meaning stay: those between digits (3.5, 1/2), the sign of a number, `# & % @ *`, and in a formula all
    but spaces. A capital A within a text is a name ("vitamin A"), and so is an article with nothing after it.
    """
    text = unicodedata.normalize("NFKC", text).replace("\u2212", "-").strip()
    text = _THOUSANDS.sub(lambda match: match[0].replace(",", ""), text)
    if _FORMULA.search(text):
        formula = re.sub(r"\s+", "", text).casefold().rstrip(".;,")
        return formula.strip("\"'“”`$")
    chars: list[str] = []
    for i, char in enumerate(text):
        if not unicodedata.category(char).startswith("P") or char in _MEANINGFUL_MARKS:
            chars.append(char)
            continue
        before, after = text[i - 1 : i], text[i + 1 : i + 2]
        is_sign = char == "-" and after.isdigit() and not before.isalnum()
        is_factorial = char == "!" and before.isdigit()
        if is_sign or is_factorial or (before.isdigit() and after.isdigit()):
            chars.append(char)
        elif unicodedata.category(char) == "Pd" or char in "/_":
            chars.append(" ")
    words = "".join(chars).split()
    kept = [word for i, word in enumerate(words) if articles or not _is_article(words, i)]
    return " ".join(kept).casefold()


def _is_article(words: list[str], i: int) -> bool:
    if words[i].casefold() not in ("a", "an", "the"):
        return False
    if len(words) == 1:
        return True
    return i < len(words) - 1 and (words[i] != "A" or i == 0)


_IT_IS = re.compile(r"\s*it(?:\s+is|\s+was|['’]s)\s+((?:(?:the|an?)\s+)?\S+(?:\s+\S+){0,3})\s*", re.IGNORECASE)
"""A few words after "It is" are a name; more are a sentence."""


def read_text(text: str) -> str | None:
    """The announced text, or the whole one; None if it is empty, denied, asked, taken back or cut off."""
    text = tidy(text)
    try:
        if claims := announced(text):
            value = settled(text, claims, _announced_text, str.__eq__)
            if value is not None:
                return None if retracted(text[claims[-1].stop :]) else value
    except AmbiguousError:
        return None
    if text.rstrip().endswith("?"):
        return None
    text = _unwrapped(text)
    named = _IT_IS.fullmatch(text)
    return normalize(named[1] if named and not _SENTENCE_END.search(text) else text) or None


def _announced_text(claim: Announced) -> str | None:
    first, *rest = _SENTENCE_END.split(_unwrapped(claim.text), maxsplit=1)
    if first.rstrip().endswith("?") or (rest and retracted(rest[0])):
        raise AmbiguousError
    return normalize(first) or None


def _unwrapped(text: str) -> str:
    return re.sub(r"\\(?:text|mathrm|textbf|mathbf)\s*\{([^{}]*)\}", r"\1", text).replace("**", "")


# --- lists ------------------------------------------------------------------------------------------------------

Items = tuple[object, ...]
"""Normalised items, each a text or again `Items`."""

_BULLET = re.compile(r"^[ \t]*(?:[-*+•–]|\(?\d{1,3}[.)])[ \t]+(.+?)[ \t]*$")
_NOT_THE_ANSWER = re.compile(r"\b(?:from|of|given|input|original|list|instead\s+of|not|into)\s*:?\s*\Z", re.IGNORECASE)
_OPENED = {"[": "]", "(": ")", "{": "}"}
_OPEN_END = re.compile(
    r"\.\.\.|…|\betc\b|\band\s+so\s+(?:on|forth)\b|\band\s+(?:more|others)\b|\\l?dots", re.IGNORECASE
)
_OTHER_WAY = re.compile(r"\s*,?\s*(?:or\b|and\s+not\b|[\[({])", re.IGNORECASE)
_MAX_DEPTH = 20


def read_list(text: str) -> Items | None:
    """The announced items, or those of the last brackets, of a bulleted list, or of the last line.

    None if there are none, or if they are denied, asked, cut off, open-ended ("...") or one of two ("or").
    """
    text = tidy(text)
    try:
        if claims := announced(text):
            items = settled(text, claims, _announced_items, tuple.__eq__)
            if items:
                return None if retracted(text[claims[-1].stop :]) else items
        return _unannounced(_unwrapped(text))
    except AmbiguousError:
        return None


def _announced_items(claim: Announced) -> Items | None:
    content = _unwrapped(claim.text).strip()
    if not content or _BULLET.match(content):
        return None
    end = _closing(content) if content[0] in _OPENED else len(_SENTENCE_END.split(content, maxsplit=1)[0])
    if retracted(content[end:]) or "?" in content:
        raise AmbiguousError
    return _items(content) or None


_THEY_ARE = re.compile(
    r"\s*(?:(?:the|these)\s+(?:numbers|values|items|elements|names|words|answers|solutions|results)|they)\s+are\s+",
    re.IGNORECASE,
)


def _unannounced(text: str) -> Items | None:
    lines = [line for line in text.splitlines() if line.strip()]
    if not lines or unsure(text) or lines[-1].endswith("?"):
        return None
    bullets = _bulleted(lines)
    if bullets:
        return bullets
    if len(lines) > 1 and all(re.fullmatch(r"\s*[\w.-]+\s*", line) for line in lines):
        return tuple(_item(line) for line in lines)
    spans = [span for span in _bracketed(text) if not _NOT_THE_ANSWER.search(text[: span[0]])]
    if spans:
        start, end = spans[-1]
        if (
            denied(text[:start])
            or rejected(text[end:])
            or _OTHER_WAY.match(text, end)
            or re.search(r"\bor\s*\Z", text[:start])
        ):
            raise AmbiguousError
        return _items(text[start:end]) or None
    if re.search(r"[\[\]]", text):
        raise AmbiguousError
    if len(lines) == 1 and (stated := _THEY_ARE.match(text)) and not re.search(r"[.!?]\s+\S", text):
        return _items(text[stated.end() :].removeprefix(":")) or None
    if _THOUSANDS.fullmatch(lines[-1].strip()):
        raise AmbiguousError  # one number or several
    return _items(lines[-1].rsplit(":", 1)[-1]) or None


def _bulleted(lines: list[str]) -> Items | None:
    """The items of the only block of bullets, which may have lines before it and after it."""
    marks = [_BULLET.match(line) for line in lines]
    places = [i for i, mark in enumerate(marks) if mark]
    if len(places) < 2 or places[-1] - places[0] != len(places) - 1:
        return None
    texts = [mark[1] for mark in marks if mark]
    if places[-1] != len(lines) - 1 or any(_OPEN_END.search(text) for text in texts):
        return None
    return tuple(_item(text.rstrip(",;.")) for text in texts)


def _bracketed(text: str) -> list[tuple[int, int]]:
    """Start and end of each outermost pair of square brackets."""
    spans, depth, start = [], 0, 0
    for match in re.finditer(r"[\[\]]", text):
        if match[0] == "[":
            start = match.start() if depth == 0 else start
            depth += 1
        else:
            depth -= 1
            if depth == 0:
                spans.append((start, match.end()))
            if depth < 0:
                raise AmbiguousError
    if depth:
        raise AmbiguousError  # cut off
    return spans


def _items(segment: str, depth: int = 0) -> Items:
    """Items separated by commas or semicolons; without those, by "and" or by spaces. Raises `AmbiguousError`."""
    segment = segment.strip()
    if depth > _MAX_DEPTH or _OPEN_END.search(segment):
        raise AmbiguousError
    if segment[:1] in _OPENED:
        end = _closing(segment)
        if _OTHER_WAY.match(segment, end):
            raise AmbiguousError
        segment = segment[1 : end - 1]
    else:
        segment = _SENTENCE_END.split(segment, maxsplit=1)[0].strip().rstrip(".")
    parts = _split(segment)
    if any(not part.strip() for part in parts[:-1]) or re.match(r"\s*or\s", parts[-1] if parts else ""):
        raise AmbiguousError
    return tuple(
        _items(part, depth + 1) if part.strip()[:1] in ("[", "(", "{") and part.strip()[-1:] in "])}" else _item(part)
        for part in parts
        if part.strip()
    )


def _closing(segment: str) -> int:
    """The index after the bracket that closes the first one. Raises `AmbiguousError`."""
    open_ones: list[str] = []
    for i, char in enumerate(segment):
        if char in _OPENED:
            open_ones.append(_OPENED[char])
        elif open_ones and char == open_ones[-1]:
            open_ones.pop()
            if not open_ones:
                return i + 1
    raise AmbiguousError


_QUOTED = re.compile(r"\s*(\"[^\"]*\"|'[^']*'|“[^”]*”)\s*(?:,|;|\Z)")


def _split(segment: str) -> list[str]:
    depth, start, parts, i = 0, 0, [], 0
    # "1,000, 2,000" separates by comma and space, "1,2" by comma alone.
    spaced = re.search(r"[,;]\s", segment) is not None
    while i < len(segment):
        if i == start and (quoted := _QUOTED.match(segment, i)):
            parts.append(quoted[1])
            start = i = quoted.end()
            continue
        char = segment[i]
        depth += (char in "[({") - (char in "])}")
        if depth == 0 and char in ",;" and (not spaced or segment[i + 1 : i + 2].isspace()):
            parts.append(segment[start:i])
            start = i + 1
        i += 1
    if start < len(segment):
        parts.append(segment[start:])
    if not parts:
        return []
    if re.search(r"\s(?:or|and/or)\s", f" {parts[-1]}"):
        raise AmbiguousError
    if len(parts) == 1 and parts[0].strip()[:1] in _OPENED and _closing(parts[0].strip()) == len(parts[0].strip()):
        return parts
    if len(parts) == 1 and not re.search(r"\sand\s", parts[0]):
        return parts[0].split() if not _QUOTED.fullmatch(parts[0]) else parts
    last = re.sub(r"^\s*and\s+", "", parts.pop())
    return parts + (re.split(r"\s+and\s+", last) if len(re.findall(r"\sand\s", last)) == 1 else [last])


def _item(part: str) -> str:
    part = part.strip(_QUOTES_AND_BRACKETS)
    written = plain(part)
    parsed = number_at(written, 0)
    if parsed is not None and parsed[1] == len(written):
        return str(parsed[0].value)
    return normalize(part, articles=True) or part
