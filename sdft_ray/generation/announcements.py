"""Explicit answers in a response (`#### ...`, `\\boxed{...}`, "the answer is ...", "Answer: ..."), and what denies one.

A wrong row in the training set is worse than a lost one. So an answer that is denied ("the answer is not 9"), bounded
("at least 9"), asked ("is it 9?"), taken back ("wait, that is wrong"), or cut off (`\\boxed{9`) is no answer.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass


class AmbiguousError(Exception):
    """An explicit answer with more than one reading, or with none."""


@dataclass(frozen=True)
class Announced:
    """What follows an announcement, to the end of the line or inside the braces, and the text after that."""

    text: str
    braced: bool
    rest: str


_HASHES = re.compile(r"(?<!#)####(?!#)[ \t]*")
_BOXED = re.compile(r"\\(?:boxed|fbox)(?![a-zA-Z])\s*\{?")
_PHRASE = re.compile(
    r"\bans(?:wers?)?\b(?:[ \t]+(?:to|for)[ \t]+[^\n.:]{1,80}?)?\s*"
    r"(?::|=|[ \t][-–—→]+[ \t]|\b(?:is|are|was|comes to|equals|(?:would|will|should|must|has to) be)\b)[ \t]*:?[ \t]*",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"\b(?:correct|right|best|true|final|my)[ \t]+(?:option|choice|letter|alternative)s?\b\s*"
    r"(?::|\b(?:is|are|would be|must be|has to be)\b)[ \t]*:?[ \t]*"
    r"|\b(?:respuesta|antwort|réponse|risposta|resposta)(?:[ \t]+(?:correcta|correcte|corretta|correta|final))?\s*"
    r"(?::|\b(?:es|ist|lautet|est|è|é)\b)[ \t]*:?[ \t]*(?:la[ \t]+)?",
    re.IGNORECASE,
)
_REST_OF_LINE = re.compile(r"\s*(.*)")
"""An announcement at the end of a line refers to the next line that is not empty."""
_MAX_ANNOUNCEMENTS = 100
_MAX_BOX_CHARS = 1000


def announced(text: str, *, choice: bool = False) -> Iterator[Announced]:
    """The explicit answers of a text, last one first; with `choice`, "the correct option is B" is one too.

    Raises `AmbiguousError` at one that is denied, asked, taken back or cut off.
    """
    text = re.sub(r"\*\*|__", "", text).replace("：", ":")
    patterns = (_HASHES, _PHRASE, _CHOICE) if choice else (_HASHES, _PHRASE)
    starts = [(match.end(), match.start(), False) for pattern in patterns for match in pattern.finditer(text)]
    starts += [(match.end(), match.start(), True) for match in _BOXED.finditer(text)]
    for end, start, braced in sorted(starts, reverse=True)[:_MAX_ANNOUNCEMENTS]:
        before = text[max(0, start - 200) : start].rsplit("\n", 1)[-1]
        if braced:
            content = _inside_braces(text, end)
            close = end + len(content) + 1
            if _DENIED.search(before) or _BOUNDED.search(before) or _BOX_BEFORE.search(before):
                raise AmbiguousError
            if _PART_BEFORE.search(before) or _PART_AFTER.match(text, close):
                raise AmbiguousError
        else:
            line = _REST_OF_LINE.match(text, end)
            assert line is not None
            content, close = line[1], line.end()
            if not content.strip(" \t$*.`") and close == len(text):
                raise AmbiguousError  # cut off after "the answer is"
        if _DENIED_ANNOUNCEMENT.search(before) or taken_back(text[end:]) or (not braced and asked(content)):
            raise AmbiguousError
        yield Announced(content, braced, text[close:])


def _inside_braces(text: str, start: int) -> str:
    """Raises `AmbiguousError` if a brace is missing."""
    depth = 1 if text[start - 1] == "{" else 0
    for end in range(start, min(len(text), start + _MAX_BOX_CHARS) if depth else start):
        depth += {"{": 1, "}": -1}.get(text[end], 0)
        if depth == 0:
            return text[start:end]
    raise AmbiguousError


_BOX_BEFORE = re.compile(
    r"\\(?:boxed|fbox)\s*\{[^\n]*\}[\s$]*(?:\\\)|\\\])?\s*(?:[,;&]|\b(?:and|or)\b|\\text\s*\{\s*(?:and|or)\s*\})+[\s$]*(?:\\\(|\\\[)?\s*\Z"
)
"""Two boxes in a row are two answers; after other words the later one counts."""

_PART_BEFORE = re.compile(r"(?:(?<![a-zA-Z])[a-zA-Z]|\d|[-−]\$?|\\[dt]?frac\s*\{|\\sqrt\s*\{|[*/^+])\Z")
_PART_AFTER = re.compile(
    r"\s?(?:[a-zA-Z](?![a-zA-Z])|[\^!]|\\(?:sqrt|pi|[dt]?frac)|[-+*/]\s*[\d\\]|\s*[-+*/]\s*[a-zA-Z](?![a-zA-Z]))"
)
"""A box around a part of the answer."""

# --- what denies an answer ---------------------------------------------------------------------------------------

_FILLER = (
    r"(?:\s+(?:be|being|been|equals?|equal\s+to|actually|necessarily|exactly|just|simply|even|really|definitely|the|a"
    r"|option|choice|answer|letter|correct|right|is|are|either|it|that|value|number|of|quite))*"
)
_OPEN = r"[\s(\[\"'“$*]*(?:\\\(|\\\[)?\s*\Z"
_DENIED = re.compile(
    rf"(?:\b(?:not|no\s+longer|never|neither|nor|cannot|without|except(?:\s+for)?|excluding|unless|whether|if|(?:might|could|may)\s+be"
    rf"|(?:anything|all|everything|everyone)\s+but|(?:instead|short)\s+of|(?:rather|other)\s+than|unlike|rul(?:e|ed|ing)"
    rf"\s+out|eliminat(?:e|es|ed|ing)|reject(?:s|ed|ing)?|exclud(?:e|es|ed)|doubt)\b|n['’]t|≠|!=|\\neq?\b){_FILLER}{_OPEN}",
    re.IGNORECASE,
)
"""Matches at the end of the text before a value: that value is not the answer."""
_SET_ASIDE = re.compile(rf"(?:[,;(]\s*(?:and\s+)?not|instead\s+of|rather\s+than){_FILLER}{_OPEN}", re.IGNORECASE)
"""As in "8, not 9": the value before may be the answer."""
_BOUNDED = re.compile(
    r"(?:[<>≤≥±~]=?|\\(?:leq?|geq?|lt|gt|leqslant|geqslant|pm|mp)\b|\b(?:(?:less|fewer|more|greater|larger|smaller"
    r"|higher|lower|bigger|longer|shorter|other)\s+than(?:\s+or\s+equal\s+to)?|at\s+(?:least|most)|than|up\s+to|upwards?\s+of|in\s+excess\s+of|north\s+of|shy\s+of|at\s+the\s+very\s+(?:least|most)|at\s+(?:best|worst)|twice|double|triple|half(?:\s+of)?"
    r"|(?:%|percent|quarter|third|fraction|multiple|power|square|root|cube|sum|product|factor|out|quotient)\s+of"
    r"|(?:divided|multiplied|divisible)\s+by|over|under"
    r"|below|above|almost|nearly|barely|hardly|scarcely|close\s+to|not\s+quite|exceed(?:s|ing)?|(?:minimum|maximum)\s+of|between|beyond"
    rf"|(?:plus|\+)\s*(?:or|/)?\s*(?:minus|-))){_OPEN}",
    re.IGNORECASE,
)
"""Matches at the end of the text before a number: it is a bound, or one end of a range."""
_DENIED_ANNOUNCEMENT = re.compile(
    r"(?:(?:\b(?:not|never|cannot|false|untrue|doubt(?:s|ed|ful)?|deny|denies|unlikely|impossible|if|whether|unless"
    r"|suppos(?:e|ing)|assum(?:e|ing)|imagine|pretend|claim(?:s|ed)?|guess(?:es|ed))\b|n['’]t)"
    r"(?:\s+(?:think|believe|say|mean|agree|true|sure|certain|clear|know|suppose|conclude|so|the\s+case))*"
    r"(?:\s+(?:that|if|whether))?(?:\s+(?:the|an?|my|your|his|her|their|this|its|our))?"
    r"(?:\s+(?:final|correct|right|true|only|best|real|actual|possible))*"
    r"|\b(?:nobody|no\s+one|none|someone|some|many|most|others?|people|he|she|they|students?)\s+(?:\w+\s+)?"
    r"(?:thinks?|thought|says?|said|believes?|believed|claims?|guess(?:es|ed)?)\s+(?:that\s+)?(?:the|their|his|her)\s+"
    r"|\b(?:wrong|incorrect|false|bad|invalid|tempting|na[iï]ve|mistaken|erroneous)\s+)\s*\Z",
    re.IGNORECASE,
)
_TAKEN_BACK = re.compile(
    r"[.!?,;:\n—–-]\s*(?:(?:but|oh|hmm+|no|well),?\s+)*(?:wait|hold\s+on|scratch\s+that|correction|actually"
    r"|oops|sorry|on\s+(?:second\s+thought|(?:\w+\s+)?reflection)|come\s+to\s+think|I\s+mean\b|or\s+rather|however|never\s*mind|let\s+me\s+(?:re|double|check|try))\b"
    r"|[.!?\n]\s*no\b(?!\s+\w+\s+(?:is|are|was|were)\b)"
    r"|\b(?:that|this|it|which)(?:['’]s|\s+is|\s+was|\s+seems|\s+looks|\s+cannot\s+be|\s+can['’]t\s+be)"
    r"(?:n['’]t|\s+not)?(?:\s+(?:clearly|obviously|also|of\s+course|totally|completely))?\s+"
    r"(?:wrong|incorrect|not\s+(?:right|correct|true)|false|mistaken|impossible)\b"
    r"|\b(?:that|this|it|which)\s+(?:is|was)(?:n['’]t|\s+not)\s+(?:right|correct|true)\b"
    r"|\b(?:that|this|it)\s+(?:can(?:not|['’]t)|could(?:n['’]t|\s+not)|does(?:n['’]t|\s+not))\s+(?:be|seem|look|sound)\s+(?:right|correct|true)\b"
    r"|\b(?:I|we)\s+(?:made\s+an?\s+(?:mistake|error)|was\s+wrong|were\s+wrong|miscalculated|miscounted|forgot)\b"
    r"|\b(?:mistake|error)\s+(?:here|above|somewhere)\b",
    re.IGNORECASE,
)
_REJECTED = re.compile(
    r"[)\]\"'”}*$.]*\s*(?:\w+\s+)?[,:]?\s*(?:which\s+|that\s+|as\s+an\s+answer\s+)?(?:(?:is|was|are|were|seems?|looks?|sounds?"
    r"|must\s+be|would\s+be|will\s+be)(?:n['’]t|\s+not)?\s+"
    r"(?:(?:clearly|definitely|also|both|obviously|simply|just|plainly|certainly|far|way|much|still|slightly|a\s+(?:bit|little))\s+)*(?:wrong|incorrect|false|not\b"
    r"|impossible|ruled\s+out|excluded|eliminated|out\b|invalid|mistaken|too\s+\w+|a\s+mistake|never\b)"
    r"|(?:is|was|are|were|would|will)(?:n['’]t|\s+not|\s+never)\b|cannot\b|can\s*not\b|can['’]t\b|could(?:n['’]t|\s+not)\b"
    r"|does(?:n['’]t|\s+not)\b|fails?\b|until\b)",
    re.IGNORECASE,
)
_NEGATION = re.compile(
    r"\b(?:not|never|nowhere|neither|nor|cannot|impossible|incorrect|unlikely|doubt(?:s|ful)?|far\s+from|no\s+(?:way|longer)"
    r"|no\s+(?:reason|need|point|basis|evidence)|(?:would|could|should|might)(?:['’]ve|\s+have)\s+been|(?<!at\s)least\s+\w+|worst|weakest|poorest|fail(?:s|ed)?\s+to|refus(?:e|es|ed|ing)|declin(?:e|es|ed)|wrong(?:ly)?|false(?:ly)?)\b|n['’]t\b",
    re.IGNORECASE,
)
_CLAUSE = re.compile(
    r"[.,;:!?\n](?!\d)|(?<![!<>])=|\b(?:so|but|therefore|thus|hence|then|and|because|since|which|while|although|as)\b",
    re.IGNORECASE,
)
_FIRST_SENTENCE = re.compile(r"[^.!?]*(?:[.!?](?!\s|$)[^.!?]*)*([.!?])?")


def taken_back(rest: str) -> bool:
    """Whether the text after an answer takes it back: "Wait, that is wrong"."""
    return _TAKEN_BACK.search(rest) is not None


def asked(text: str) -> bool:
    """Whether the first sentence of a text is a question."""
    match = _FIRST_SENTENCE.match(text)
    return match is not None and match[1] == "?"


def denied(before: str) -> bool:
    """Whether the words before a value deny it: "it is not", "anything but"."""
    return _DENIED.search(before[-200:]) is not None


def negated(before: str) -> bool:
    """Whether the clause before a value has a negation: "there is no way it equals"."""
    return _NEGATION.search(_CLAUSE.split(before[-200:])[-1]) is not None


def rejected(rest: str) -> bool:
    """Whether the words after a value reject it: "is not the answer", "is wrong"."""
    return _REJECTED.match(rest) is not None


def set_aside(before: str) -> bool:
    """Whether the words before a value contrast it with the one before: "8, not", "8 rather than"."""
    return _SET_ASIDE.search(before[-200:]) is not None


def bounded(before: str) -> bool:
    """Whether the words before a number make it a bound: "at least", ">"."""
    return _BOUNDED.search(before[-200:]) is not None
