"""Where a response announces its answer, and the words that make it none.

A wrong row in the training set is worse than a lost one. An answer counts where it is announced (`#### ...`,
`\\boxed{...}`, "the answer is ...", "Answer: ...") or stands alone, and only if what was announced is read to its last
character. Denied, doubted, supposed or taken back, it counts as none; so do two announcements that differ.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import TypeVar

from sdft_ray.generation.answer_words import (
    BOUNDS,
    CONDITIONS,
    DOUBTS,
    NEGATIONS,
    OPERATIONS,
    OTHER,
    PHRASES,
    SAID,
    doubtful,
    words,
)

V = TypeVar("V")


class AmbiguousError(Exception):
    """An answer with more than one reading, or with none."""


# --- sentences --------------------------------------------------------------------------------------------------

SENTENCE_END = re.compile(
    r"(?<![\s.])[!?]+(?=\s|\Z)|(?<!\bNo)(?<!\bSt)(?<!\bMr)(?<!\bDr)(?<!\bi\.e)(?<!\be\.g)(?<![.\s])\.(?=\s|\Z)|\n"
)
CLAUSE_BREAK = re.compile(
    r"[,;:—–](?=\s|\Z)|\s-{1,2}\s|\b(?:so|thus|hence|therefore|then|because|since|which|but|and|while|as)\b", re.I
)
_CLAUSE_START = re.compile(CLAUSE_BREAK.pattern.replace("[,;:—–]", "[,;—–]"), re.IGNORECASE)
"""Not a colon: "Wrong: the answer is 9"."""
_SET_ASIDE = re.compile(
    r"(?:\s*[,;(]\s*(?:and\s+)?(?:certainly\s+|definitely\s+)?not|\s+and\s+not|\s+but\s+not|,?\s+instead\s+of"
    r"|,?\s+rather\s+than|\s+as\s+opposed\s+to)\s+(?:option\s+)?(?:[($]*-?[\d.,]*\d%?"
    r"|\(?[A-Z](?![a-z]))[)$]*(?=[.!\s]*\Z)",
    re.IGNORECASE,
)
_NOT_BUT = re.compile(
    r"[\s:]*(?:[a-z]+ly\s+)?not\s+(?:option\s+)?(?:[($]*-?[\d.,]*\d%?|\(?[A-Z](?![a-z]))[)$]*,?\s+(?:but"
    r"|it\s+is)\s+(?:rather\s+|instead\s+)?",
    re.IGNORECASE,
)
_NEGATED_CLAUSE = re.compile(
    r"[^,;.]*(?:\bnot\b|n['’]t\b|\bcannot\b|\bneither\b)[^,;.]*(?:\d"
    r"|\b[A-Z]\b)[^,;.]{0,30}[,;]\s+(?:but\s+)?(?:it['’]s\s+|it\s+is\s+|so\s+)+"
    r"|.*[,;]?\s\bbut\s+(?:rather\s+|instead\s+)?",
    re.DOTALL,
)


def contrasted(text: str) -> str:
    """A sentence without the value that it contrasts with its own: "8, not 9", "not 9 but 8"."""
    if set_aside := _SET_ASIDE.search(text):
        text = text[: set_aside.start()] + "."
    not_but = _NOT_BUT.match(text)
    return text[not_but.end() :] if not_but else text


def without_denial(sentence: str) -> str:
    """What a sentence says after it denied another value, "It isn't 9, it is 8", or after its "but"."""
    match = _NEGATED_CLAUSE.match(sentence) if not PHRASES.search(sentence.replace("n't", "")) else None
    return sentence[match.end() :] if match else sentence


def sentences(text: str) -> list[str]:
    """Sentences with their marks; a line ends a sentence."""
    ends = [0, *(match.end() for match in SENTENCE_END.finditer(text)), len(text)]
    return [one for start, end in pairwise(ends) if (one := text[start:end].strip())]


def first_sentence(text: str) -> tuple[str, str]:
    """The first sentence that is not empty, and what follows it."""
    start = len(text) - len(text.lstrip())
    end = SENTENCE_END.search(text, start)
    return (text[start : end.end()], text[end.end() :]) if end else (text[start:], "")


# --- announcements ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Announced:
    """What follows an announcement: in the braces of a box, or to the end of the line or the next announcement.

    `start` and `end` are its indices with the announcement; `refused` says that it is denied, doubted or cut off;
    `rest` is what follows a box in its sentence, which ends at `stop`.
    """

    text: str
    braced: bool
    refused: bool
    start: int
    end: int
    rest: str = ""

    @property
    def stop(self) -> int:
        """The index after the sentence of a box, or after the announced text."""
        return self.end + len(self.rest)


_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*")
_BOXED = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*\{?")
_PHRASE = re.compile(
    r"\bans(?:wers?)?\b(?:[ \t]+(?:to|for)[ \t]+[^\n.:]{1,80}?)?\s*"
    r"(?::|=|[ \t][-–—→]+[ \t]|\b(?:is|are|was|comes to|equals|(?:would|will|should|must|has to) be)\b)[ \t]*:?[ \t]*"
    r"|\b(?:respuesta|antwort|réponse|risposta|resposta)(?:[ \t]+(?:correcta|correcte|corretta|correta|final))?\s*"
    r"(?::|\b(?:es|ist|lautet|est|è|é)\b)[ \t]*:?[ \t]*(?:la[ \t]+)?"
    r"|^[ \t#]*(?:final[ \t]+)?answer[ \t]*\n",
    re.IGNORECASE | re.MULTILINE,
)
_CHOICE = re.compile(
    r"\b(?:correct|right|best|true|final|my)[ \t]+(?:option|choice|letter|alternative)s?\b\s*"
    r"(?::|\b(?:is|are|would be|must be|has to be)\b)[ \t]*:?[ \t]*"
    r"|\b(?:correct|my[ \t]+(?:pick|selection))[ \t]*:[ \t]*",
    re.IGNORECASE,
)
_REST_OF_LINE = re.compile(r"\s*(.*)")
"""An announcement at the end of a line refers to the next line that is not empty."""
_FILLER = re.compile(
    r"(?:[\s:$*(\[`\\]|\b(?:the|my|final|correct|right|so|is|therefore|thus|hence|that|be|must)\b)*", re.I
)
_MAX_ANNOUNCEMENTS = 100
_MAX_BOX_CHARS = 1000
_MAX_BEFORE = 300
_EMOJI = re.compile(
    "[\U0001f000-\U0001f44d\U0001f44f-\U0001faff\u2705\u2713\u2714\u2728\u2b50\u2600-\u265f\ufe0f\u200d]"
)


_TAGGED = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.DOTALL | re.IGNORECASE)
_CUT = re.compile(r"<(?:answer|think)>(?!.*</)", re.DOTALL | re.IGNORECASE)


def tidy(text: str) -> str:
    """Text without a thinking block, bold marks and emoji; an answer between tags as "Answer: ...".

    What is cut off within a tag is an empty announcement.
    """
    text = _TAGGED.sub(r"\nAnswer: \1\n", text.rsplit("</think>", 1)[-1])
    if cut := _CUT.search(text):
        text = f"{text[: cut.start()]}\\boxed{{"
    text = re.sub(r"(?<=\d) ?\*\* ?(?=-?\d)", "^", text)
    text = re.sub(r"(?:(?<=\s)|\A)~(?=\s?[$€£]?\d)", "≈", text)
    return _EMOJI.sub("", re.sub(r"\*\*|__", "", text).replace("：", ":"))


def announced(text: str, *, choice: bool = False) -> list[Announced]:
    """The announced answers of a `tidy` text in their order; with `choice`, "the correct option is B" is one too."""
    patterns = (_HASHES, _PHRASE, _CHOICE) if choice else (_HASHES, _PHRASE)
    starts = [(match.start(), match.end(), False) for pattern in patterns for match in pattern.finditer(text)]
    starts += [(match.start(), match.end(), True) for match in _BOXED.finditer(text)]
    starts = sorted(starts)[-_MAX_ANNOUNCEMENTS:]
    found = []
    for (start, end, braced), following in zip(starts, [*starts, (len(text), 0, False)][1:], strict=True):
        if found and start < found[-1].end:
            continue
        if braced:
            found.append(_box(text, start, end))
            continue
        line = _REST_OF_LINE.match(text, end)
        assert line is not None
        close = max(end, min(line.end(), following[0]))
        content = text[line.start(1) : close]
        if following[0] <= line.end() and following[0] < len(text) and _FILLER.fullmatch(content):
            continue  # "Answer: the answer is ..."
        cut = not content.strip(" \t$*.`") and close == len(text)
        found.append(Announced(content, False, cut or not _introduced(_before(text, start)), start, close))
    return found


def settled(
    text: str, claims: list[Announced], read: Callable[[Announced], V | None], same: Callable[[V, V], bool]
) -> V | None:
    """The value of the last announcement; None if it is prose.

    Raises `AmbiguousError` if it is refused, or if an earlier one differs and was not taken back.
    """
    *earlier, last = claims
    if last.refused:
        raise AmbiguousError
    value = read(last)
    for claim in earlier if value is not None else []:
        if claim.refused or doubtful(text[claim.start : last.start]):
            continue
        try:
            other = read(claim)
        except AmbiguousError:
            if claim.braced:
                raise
            continue
        if other is not None and value is not None and not same(other, value):
            raise AmbiguousError
    return value


def _before(text: str, start: int) -> str:
    """The sentence before an announcement."""
    before = text[max(0, start - _MAX_BEFORE) : start]
    ends = [match.end() for match in SENTENCE_END.finditer(before)]
    return before[ends[-1] :] if ends else before


def _introduced(sentence: str) -> bool:
    """Whether the words before an announcement neither doubt it nor ascribe it to someone else."""
    sentence = _TURN.sub("", sentence)
    if not CONDITIONS.isdisjoint(words(sentence)):
        return False
    if re.search(r"\b(?:(?:any|every)thing|all)\s+but\b", sentence, re.IGNORECASE):
        return False
    clause = _CLAUSE_START.split(sentence)[-1]
    if re.fullmatch(r"\s*that(?:\s+the)?\s*", clause, re.IGNORECASE):
        clause = sentence  # "It is false, I think, that the answer is"
    if _PART_OF_IT.search(clause) or _WITHOUT.match(sentence):
        return False
    possessive = re.search(r"\b(?!it|that|let|here|there)\w+['’]s\s+(?:\w+\s+)?\Z", clause, re.IGNORECASE)
    if possessive or not OTHER.isdisjoint(words(clause)[-3:]):
        return False
    return not doubtful(_I_SAY.sub("", clause), DOUBTS | SAID)


_TURN = re.compile(
    r"\A\W*(?:(?:no|wait|hold\s+on|actually|sorry|oops|hmm|correction|so)\b[\s,.:;!—–-]*)+", re.IGNORECASE
)
_PART_OF_IT = re.compile(
    r"\b(?:of|to|than|by|from|minus|plus|times|twice|double|half)\s+(?:(?:the|my|our|this|final|correct)\s+)*\Z",
    re.IGNORECASE,
)
"""As in "half of the answer is 9"."""
_WITHOUT = re.compile(r"\W*(?:without|excluding|except\s+for)\b[^,;:]*,[^,;:]*\Z", re.IGNORECASE)
"""As in "Without tax, the answer is 9"."""
_I_SAY = re.compile(r"\b(?:I|we)\s*(?:['’]d|would|['’]ll|will)?\s*(?:say|conclude)\b", re.IGNORECASE)
_PART_BEFORE = re.compile(
    r"(?:(?<![a-zA-Z])[a-zA-Z]|\d|[-−<>≤≥±~|√≈]\s*\$?|\\(?:[dt]?frac|sqrt|text)\s*\{|[*/^+]|\\(?:l"
    r"|g)eq?(?:slant)?|\\[lg]t|\\pm)\s?\Z"
)
_PART_AFTER = re.compile(
    r"\s?(?:[a-zA-Z](?![a-zA-Z])|[\^!\d]|\\(?:sqrt|pi|[dt]?frac|pm)|[-+*/±]\s*[\d\\]"
    r"|\s*[-+*/]\s*[a-zA-Z](?![a-zA-Z]))"
)
"""A box around a part of the answer."""
_BETWEEN_BOXES = (
    r"[\s$]*(?:\\\)|\\\])?\s*(?:[,;&]|\b(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\})+[\s$]*(?:\\\(|\\\[)?\s*"
)
_NEXT_BOX = re.compile(_BETWEEN_BOXES + r"\\(?:boxed|fbox)")
_BOX_BEFORE = re.compile(r"\\(?:boxed|fbox)\s*\{[^\n]*\}" + _BETWEEN_BOXES + r"\Z")


def _box(text: str, start: int, end: int) -> Announced:
    content = _inside_braces(text, end)
    if content is None:
        return Announced("", True, True, start, end)
    close = end + len(content) + 1
    if inner := re.fullmatch(r"\s*\\(?:boxed|fbox)\s*\{(.*)\}\s*", content):
        content = inner[1]
    before, after = _before(text, start), text[close:]
    rest = after[: len(after) - len(first_sentence(after)[1])] if after[:1] != "\n" else ""
    clause = CLAUSE_BREAK.split(before)[-1]
    refused = (
        not _introduced(before)
        or not BOUNDS.isdisjoint(words(clause))
        or not (OPERATIONS | {"minus", "negative"}).isdisjoint(words(clause)[-1:])
        or _PART_BEFORE.search(before) is not None
        or _PART_AFTER.match(text, close) is not None
        or _NEXT_BOX.match(text, close) is not None
        or _BOX_BEFORE.search(before) is not None
        or re.search(r"(?:\b[A-Z]\)?|\d)\s*(?:,|/|&|\band|\bor)\s*[$(]*\Z", before) is not None
        or (not rest.lstrip(" $\\)]").startswith((".", "\n")) and doubtful(rest))
    )
    return Announced(content, True, refused, start, close, rest)


def _inside_braces(text: str, start: int) -> str | None:
    """None if a brace is missing."""
    depth = 1 if text[start - 1] == "{" else 0
    for end in range(start, min(len(text), start + _MAX_BOX_CHARS) if depth else start):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    return None


# --- next to a value --------------------------------------------------------------------------------------------

_REJECTED = re.compile(
    r"[)\]\"'”}*$.]*\s*(?:\w+\s+)?[,:]?\s*(?:which\s+|that\s+|as\s+an\s+answer\s+)?(?:(?:is|was|are|were|seems?"
    r"|looks?|sounds?"
    r"|must\s+be|would\s+be|will\s+be)(?:n['’]t|\s+not)?\s+"
    r"(?:(?:clearly|definitely|also|both|obviously|simply|just|plainly|certainly|far|way|much|still|slightly"
    r"|a\s+(?:bit|little))\s+)*(?:wrong|incorrect|false|not\b"
    r"|impossible|ruled\s+out|excluded|eliminated|out\b|invalid|mistaken|too\s+\w+|a\s+mistake|never\b)"
    r"|(?:is|was|are|were|would|will)(?:n['’]t|\s+not|\s+never)\b|cannot\b|can\s*not\b|can['’]t\b|could(?:n['’]t"
    r"|\s+not)\b"
    r"|does(?:n['’]t|\s+not)\b|fails?\b|until\b)",
    re.IGNORECASE,
)


def denied(before: str) -> bool:
    """Whether the clause before a value denies it: "it is not", "anything but"."""
    clause = CLAUSE_BREAK.split(before[-200:])[-1]
    return PHRASES.search(clause) is not None or not NEGATIONS.isdisjoint(words(clause))


def rejected(rest: str) -> bool:
    """Whether the words after a value reject it: "is not the answer", "is wrong"."""
    return _REJECTED.match(rest) is not None
