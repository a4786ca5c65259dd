"""The option that a response chooses: a letter A to Z, or several."""

from __future__ import annotations

import re

from sdft_ray.generation.announcements import (
    AmbiguousError,
    Announced,
    announced,
    contrasted,
    first_sentence,
    sentences,
    settled,
    tidy,
)
from sdft_ray.generation.answer_words import CONDITIONS, HEDGES, doubtful, retracted, unsure, word_set, words
from sdft_ray.generation.numbers import plain


def read_choice(text: str) -> str | None:
    """The letters chosen, as capitals in alphabetical order ("C", "AC"); None if none is, or one of several."""
    text = plain(tidy(text))
    try:
        if claims := announced(text, choice=True):
            letters = settled(text, claims, _announced_value, str.__eq__)
            if letters is not None:
                return letters if not _taken_back(text[claims[-1].stop :], letters) else None
            return _concluded(text[claims[-1].end - len(claims[-1].text) :])
        return _concluded(text)
    except AmbiguousError:
        return None


_VERDICT = re.compile(
    r"\s*(?:[Oo]ptions?\s+)?\(?(?P<letter>[A-Z])\)?(?:(?:,|\s+and)\s+\(?[A-Z]\)?)*\s+(?:is|are|was|seems?|looks?"
    r"|would\s+be|does|cannot|can['’]t)(?:n['’]t)?\s"
)


def _taken_back(rest: str, letters: str) -> bool:
    """Whether the text after an answer takes it back; verdicts on other options do not."""
    return any(
        retracted(one)
        for one in sentences(rest)
        if not (verdict := _VERDICT.match(one)) or verdict["letter"] in letters
    )


def _announced_value(claim: Announced) -> str | None:
    """None if it is prose. Raises `AmbiguousError`."""
    content = claim.text.strip()
    letters = _letters(content if claim.braced else contrasted(content), claim.braced)
    if letters and claim.braced and not _harmless(re.sub(r"\A[\s$)\]\\]*", " ", claim.rest), marked=False):
        raise AmbiguousError
    if letters and _taken_back("" if claim.braced else first_sentence(content)[1], letters):
        raise AmbiguousError
    return letters


# --- what follows a letter --------------------------------------------------------------------------------------

_CLOSED = re.compile(r"[\s.,!:;)\]}>\"'”’$*]*")
_REASON = re.compile(
    r"[,;]?\s+(?:because|since|as|which|for|given|due|that)\b.*|,\s+.*|[;—–-]\s+.*|\s+\([^()]*\)[\s.]*"
    r"|\s+(?:is|are)\s+(?:both\s+|all\s+|clearly\s+)?(?:(?:the\s+)?(?:correct|right|true|best)\b|the\s+(?:answer"
    r"|option|choice)\b).*",
    re.IGNORECASE | re.DOTALL,
)
_TURNS = word_set("wait actually correction oops sorry hmm hm edit scratch however instead")
_DOUBTS = (
    _TURNS | HEDGES | CONDITIONS | {"but", "though", "although", "yet", "no", "also", "better", "trap", "distractor"}
)
_RIVAL = re.compile(
    r"(?:\b(?:or|and|vs\.?|not|no|also)\b|[,;/+=]|→|->)\s*(?:(?:option|choice|maybe"
    r"|even)\s+)?\(?[A-HJ-Z]\)?(?!\w|['’]\w)"
    r"|\b[A-HJ-Z]\s+is\s+(?:right|correct|better|best|the)\b"
)
_OF_OTHERS = re.compile(
    r"\W*(?:(?:both|neither|all|none|only|either|options?|two|any)\b|[b-z],?\s+(?:and|or)\s)", re.IGNORECASE
)
_OTHERS_WRONG = re.compile(
    r"(?<!\A)\b(?:options?\s+)?\(?[A-Z]\)?(?:(?:,\s*|,?\s+and\s+)\(?[A-Z]\)?)*\s+(?:is"
    r"|are)\s+(?:\w+\s+)?(?:wrong|incorrect|false|not\s+correct|a\s+distractor|too\s+\w+)\b"
)
_VERDICT_ON_TEXT = re.compile(
    r"\(\s*(?:wrong|incorrect|false|no|not\b[^()]*)\s*\)|\b(?:wrong|incorrect)\s+(?:answer|option|choice)\b"
    r"|\bnot\s+(?:correct|right)\b"
    r"|\b(?:is|was|seems)\s+(?:\w+\s+)?(?:wrong|incorrect|ruled\s+out|a\s+trap|a\s+distractor)\b|\b(?:would"
    r"|can(?:not|['’]t)|could(?:n['’]t|\s+not)?)\s+be\s+(?:wrong|right|correct)\b|\bdoes(?:n['’]t"
    r"|\s+not)\s+(?:work|fit)\b|\bI\s+made\b"
    r"|\b(?:maybe|probably\s+not|I\s+think\s+not|not\s+sure)\W*\Z",
    re.IGNORECASE,
)


def _harmless(rest: str, *, marked: bool) -> bool:
    """Whether what follows a letter leaves it chosen: nothing, a reason, or after a mark the text of the option."""
    if not marked:
        rest = _OTHERS_WRONG.sub("", rest)
    if _CLOSED.fullmatch(rest):
        return True
    if (
        "?" in rest
        or _VERDICT_ON_TEXT.search(rest)
        or (_RIVAL.search(rest) and not (marked and _OF_OTHERS.match(rest)))
    ):
        return False
    if marked:
        text, after = first_sentence(rest)
        return not doubtful(text, _TURNS) and _MARK_REJECTED.match(text) is None and not retracted(after)
    return _REASON.fullmatch(rest) is not None and not _doubted(rest)


def _doubted(text: str) -> bool:
    return not _DOUBTS.isdisjoint(words(text))


# --- announced --------------------------------------------------------------------------------------------------

_OPEN = r"[(\[\"'“{*]*"
_CLOSE = r"[)\]\"'”}*]*"
_NO_PRIME = r"(?!['’](?<!['‘].['’]))"
"""C' is another thing than 'C'."""
_SEGMENT = re.compile(
    rf"[\s:]*(?:(?:definitely|clearly|simply|likely|most likely|probably|therefore|both|the)\s+)*"
    rf"(?:(?:options?|choices?|letters?|answers?|alternatives?)\s+)?(?P<open>{_OPEN})(?P<letter>[A-Z])(?![\w^+*/=<>#]|-(?!\s)){_NO_PRIME}"
    rf"(?P<close>{_CLOSE})(?P<rest>.*)",
    re.IGNORECASE | re.DOTALL,
)
_NEXT = re.compile(
    rf"\s*(?P<link>,?\s*\band\b|,?\s*\bor\b|,|/|&|\+)\s*(?:\bor\b|\band\b)?\s*(?:(?:maybe|possibly|perhaps|both"
    rf"|also|option)\s+)?"
    rf"{_OPEN}(?P<letter>[A-Z])\b(?!['’^=])(?P<close>{_CLOSE})(?!\s+[a-z]+\b(?<!\bare)(?<!\bor)(?<!\band)(?<!\bbecause))"
)
_ARTICLES = "AI"
"""Capitals that are also words."""


_ADJACENT = re.compile(r"[\s(\[]*(?P<letters>[A-Z]{2,8})[\s.)\]]*")


def _adjacent(text: str) -> str | None:
    """The letters of "ABD": capitals in alphabetical order and nothing else."""
    match = _ADJACENT.fullmatch(text)
    return match["letters"] if match and list(match["letters"]) == sorted(set(match["letters"])) else None


def _letters(segment: str, braced: bool) -> str | None:
    if letters := _adjacent(segment):
        return letters
    match = _SEGMENT.match(segment)
    if match is None:
        if re.match(r"[\s:]*(?:[a-z]+ly\s+)?(?:not|neither|none|nor|never|no)\b", segment, re.IGNORECASE):
            raise AmbiguousError
        return None
    letter, rest = match["letter"], re.sub(rf"\A\s+and\s+only\s+{match['letter']}\b", "", match["rest"])
    several = _several(letter, rest)
    if several is not None:
        return several
    bracketed = bool(match["open"].strip("*")) and bool(match["close"].strip("*"))
    mark = re.match(r"\s*[.:)]\s|\s[-–—]{1,2}\s", rest)
    if mark and _VERDICT.match(rest, mark.end()):
        mark = None  # a sentence about another option
    marked = bracketed or ")" in match["close"] or "]" in match["close"] or mark is not None
    if (
        not marked
        and re.match(r"\s+[a-z]", rest)
        and (letter in _ARTICLES or letter.islower())
        and not _REASON.fullmatch(rest)
    ):
        return None  # a word
    if not _harmless(rest[mark.end() :] if mark else rest, marked=marked):
        raise AmbiguousError
    # In "the answer is a because", "a" may be an article; in "is a." it cannot.
    return letter.upper() if marked or letter.isupper() or braced or not rest.strip(" .!\n") else None


def _several(first: str, rest: str) -> str | None:
    """All letters of "A, C and D"; None if there is one only. Raises `AmbiguousError` for "A or C"."""
    letters, position = [first.upper()], 0
    while match := _NEXT.match(rest, position):
        if "or" in match["link"] or match["link"].strip() == "/" or re.match(r"[\s,/]*or\b", rest[position:]):
            raise AmbiguousError
        letters.append(match["letter"])
        position = match.end()
    if len(letters) > 1 and not _CLOSED.fullmatch(rest[position:]) and _doubted(rest[position:]):
        raise AmbiguousError
    if re.match(r"\s*,?\s*(?:or|nor)\b\s*\(?[A-Z]\b", rest[position:]):
        raise AmbiguousError
    return "".join(sorted(set(letters))) if len(letters) > 1 else None


# --- not announced ----------------------------------------------------------------------------------------------

_NAME = (
    r"(?:(?:the\s+)?(?:options?|choices?|answers?|letters?|alternatives?)\s+)*"
    rf"{_OPEN}(?P<letter>[A-Z])\b{_NO_PRIME}{_CLOSE}"
)
_ALONE = re.compile(rf"(?:[\s(\[{{<\"'“‘$*:=#>∴⇒→]|-{{1,2}}[\s>])*{_NAME}[\s.,!:;)\]}}>\"”$*]*", re.IGNORECASE)
_LETTERS_ALONE = re.compile(
    r"\W*(?:(?:[Bb]oth|[Oo]ptions|[Cc]hoices|[Aa]nswers)\s+)*\(?[A-Z]\b\)?(?:(?:(?:\s*,)?\s*and\b"
    r"|\s*[,&;])\s*\(?[A-Z]\b\)?)+"
    r"(?:\s+(?:are|is)\s+(?:both\s+|all\s+)?(?:correct|right|true))?\W*"
)
_MARKED = re.compile(
    r"\s*(?:(?:option|choice|answer)\s+)*(?:\((?P<bracketed>[A-Z])\)(?=[\s.,:;]|$)|"
    r"(?P<marked>[A-Z])(?:[).:](?=\s|$)|\s+(?:[-–—]|--)\s|\s+(?=\([^()]+\)\W*\Z)))",
    re.IGNORECASE,
)
_MARK = re.compile(r"(?<!\w)\(?([A-Z])(?:[).:](?=\s)|\)|\s+[-–—]\s)")
_MARK_REJECTED = re.compile(
    r"\W*(?:(?:is|was|seems|looks|can|could|does)(?:n['’]t|\s+not|not)?\b.{0,20}?\b)?(?:wrong|incorrect|(?:is"
    r"|was|can|could|does)"
    r"(?:n['’]t|\s?not)\b|false\W*\Z)",
    re.IGNORECASE,
)
"""After "C)": the text of an option may itself have a negation, so only a verdict on the option counts."""
_CHOSEN = (
    r"(?:(?:I|we|you|one)\s+(?:(?:would|will|should|must|have\s+to|can\s+only)\s+)?|I['’](?:d|ll|m)\s+)?"
    r"(?:choose|pick|select|go(?:ing)?\s+(?:with|for)|say|think|believe|conclude|am\s+confident|confident"
    r"|sure)\s+(?:that\s+)?"
)
_IT = r"(?:it|that|this)(?:['’]s|\s+is|\s+must\s+be|\s+should\s+be|\s+has\s+to\s+be|\s+leaves(?:\s+us\s+with)?)\s+"
_LEADS = (
    rf"(?:(?:so|thus|hence|therefore|then|consequently|finally|clearly|only|obviously|definitely|(?:leaving"
    rf"|which\s+leaves|that\s+leaves)(?:\s+us\s+with)?|(?:[a-z]+ly)(?<!hardly))[,:]?\s+"
    rf"|{_CHOSEN}|{_IT}|(?:the|my)\s+(?:(?:correct|right|best|final|only)\s+)?(?:answer|option|choice"
    rf"|letter)\s+(?:is|must\s+be|should\s+be|would\s+be)\s+)*+"
)
_CORRECT = (
    r"\s+(?:is|was|must\s+be|has\s+to\s+be|would\s+be|seems|looks|appears)\s+(?:to\s+be\s+)?(?:clearly\s+"
    r"|definitely\s+|indeed\s+)?"
    r"(?:(?:the|my|only|single|most|best|correct|right)\s+)*(?:correct|right|true|best|answer|option|choice|one"
    r"|plausible|likely|suitable)"
    r"(?:\s+(?:answer|option|choice|one))?(?:\s+that\s+(?:fits|works|matches)\b[^,;]*)?|\s+it\s+is"
)
_STATEMENT = re.compile(
    rf"(?P<lead>{_LEADS})(?:{_NAME}(?P<verdict>{_CORRECT})?)(?P<rest>.*)", re.IGNORECASE | re.DOTALL
)
_AT_THE_END = re.compile(
    r"(?!(?:Not|No|Grade|Vitamin|Type|Class|Group|Part|Plan|Point|Anything|Everything|All\s+but|Some|Is|Why|They"
    r"|It|Neither|Avoid|Reject|Skip)\b)"
    r"(?:(?:None|All)\s+of\s+the\s+above|[A-Z0-9][\w'’-]*(?:\s+(?!(?:is|are|was|be|it|that|says?|thinks?|pick"
    r"|choose|not|to|but|of|nor|or|and)\b)[\w'’-]+){0,4})"
    r"\s\((?P<letter>[A-Z])\)\W*"
)
"""The text of an option and its letter: "Paris (B)"."""
_BREAK = re.compile(r"[,;:]\s+|\s[-–—]{1,2}\s|(?<=\s)(?=(?:so|thus|hence|therefore|then|means)\s)")


def _concluded(text: str) -> str | None:
    """The letter that stands alone, marks the only line, or is stated by the last sentence."""
    lines = [line for line in text.replace("```", "\n").splitlines() if line.strip()]
    if not lines or unsure(text) or re.search("[❌✗✘❎]", lines[-1]):
        return None
    last = lines[-1].strip()
    if len(last) > 2 and last[0] in "'‘" and last[-1] in "'’":
        last = last[1:-1]
    if alone := _ALONE.fullmatch(last):
        return alone["letter"].upper() if "?" not in last else None
    if letters := _adjacent(text):
        return letters
    if _LETTERS_ALONE.fullmatch(last) and "?" not in last:
        return "".join(sorted(set(re.findall(r"\b[A-Z]\b", last))))
    marks = set(_MARK.findall(text))
    if len(marks) <= 1 and (leading := _MARKED.match(last)):
        letter, rest = leading["bracketed"] or leading["marked"], last[leading.end() :]
        written = leading["bracketed"] or leading[0].endswith(")") or letter.isupper()
        return letter.upper() if written and _harmless(rest, marked=True) else None
    return _stated(sentences(last)[-1])


def _stated(sentence: str) -> str | None:
    """The letter of "I choose C.", "A and B are wrong, so C is correct."."""
    sentence = contrasted(sentence)
    if not (CONDITIONS | HEDGES).isdisjoint(words(sentence)) or "?" in sentence:
        return None
    starts = [0, *(match.end() for match in _BREAK.finditer(sentence))]
    for start in reversed(starts):
        match = _STATEMENT.fullmatch(sentence, start)
        if (
            match
            and _harmless(match["rest"], marked=False)
            and (not start or match["lead"] or match["verdict"])
            and _is_letter(match["letter"], sentence, match.start("letter"))
        ):
            return match["letter"] if not _denies(sentence[:start], match["letter"]) else None
    at_the_end = _AT_THE_END.fullmatch(sentence)
    if at_the_end is None or doubtful(re.sub(r"\A(?:None|All)\s+of\b", "", sentence)):
        return None
    return at_the_end["letter"]


def _is_letter(letter: str, sentence: str, start: int) -> bool:
    """Capitals only; "I" is a word unless it is named an option or stands before a verdict."""
    if not letter.isupper():
        return False
    return (
        letter != "I" or re.match(r"I\)?\s+(?:is|was)\b", sentence[start:]) is not None or "option" in sentence.lower()
    )


def _denies(before: str, letter: str) -> bool:
    """Whether the clauses before a letter name the same one, or end in a negation that includes it."""
    if re.search(rf"\b{letter}\b", before) or (before.rstrip().endswith(":") and doubtful(before)):
        return True
    clause = before.rstrip(" ,;:").lower()
    return re.search(r"\b(?:not|never|no)\Z", clause) is not None
