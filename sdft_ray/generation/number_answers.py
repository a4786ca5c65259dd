"""The number that a response gives as its answer, or the mathematical expression where the answer is none.

Finding: what is announced, the whole response, or its last sentence. Reading: a small grammar that consumes what was
found to the end; what follows the number may be words that do not change it, such as a unit or a reason.
"""

from __future__ import annotations

import re
from dataclasses import replace

from sdft_ray.generation.announcements import (
    CLAUSE_BREAK,
    AmbiguousError,
    Announced,
    announced,
    contrasted,
    first_sentence,
    sentences,
    settled,
    tidy,
    without_denial,
)
from sdft_ray.generation.answer_words import (
    BOUNDS,
    DOUBTS,
    OPERATIONS,
    SAYING,
    doubtful,
    retracted,
    unsure,
    word_set,
    words,
)
from sdft_ray.generation.expressions import Expression, expression_in, same_expressions
from sdft_ray.generation.numbers import Number, compound_at, equal_numbers, numbers_in, plain, scan
from sdft_ray.generation.quantities import CALCULATION, LEAD, consumed, harmless, nouns_after, quantity_at

Value = Number | Expression


def read_number(text: str) -> Value | None:
    """The announced number or expression; without an announcement the whole text, or that of its last sentence.

    None if there is none, or if it is denied, doubted, bounded, one of several, cut off, or not read to the end.
    """
    text = tidy(text)
    if _TRAILS_OFF.search(text):
        return None
    try:
        if claims := announced(text):
            value = settled(text, claims, _announced_value, _same)
            if value is None:
                return _concluded(text[claims[-1].end - len(claims[-1].text) :])
            rest = text[claims[-1].stop :]
            return value if not retracted(rest) and _restated(plain(rest), value) else None
        return _alone(text) or _concluded(text)
    except AmbiguousError:
        return None


_TRAILS_OFF = re.compile(r"(?:[^\d.]|\d\s)(?:\.{3,}|…)\W*\Z|(?<!\.)\.\.\Z")


def _same(a: Value, b: Value) -> bool:
    if isinstance(a, Number) and isinstance(b, Number):
        return equal_numbers(a, b)
    return isinstance(a, Expression) and isinstance(b, Expression) and same_expressions(a, b)


_AFTER_BOX = re.compile(r"\A(?:[\s$]|\\[)\]])*(?:%(?![%\w]))?")


def _announced_value(claim: Announced) -> Value | None:
    """None if it is prose."""
    content = claim.text if claim.braced else first_sentence(claim.text)[0]
    try:
        number = consumed(plain(contrasted(content)), braced=claim.braced)
        if number and claim.braced and not harmless(_AFTER_BOX.sub(" ", plain(claim.rest), count=1), number):
            raise AmbiguousError
        rest = claim.text[len(content) :]
        if number is not None and not claim.braced and (retracted(rest) or not _restated(plain(rest), number)):
            raise AmbiguousError
    except AmbiguousError:
        expression = expression_in(content, mathematics=claim.braced)
        if expression is None:
            raise
        return expression
    value = number or expression_in(content, mathematics=claim.braced)
    if value is None and claim.braced:
        raise AmbiguousError
    return value


def _alone(text: str) -> Value | None:
    """The number that a text consists of, with a unit but with no other word, or its expression."""
    try:
        number = consumed(plain(text).strip(), bare=True)
    except AmbiguousError:
        number = None
    return number or expression_in(text)


_ENUMERATOR = re.compile(r"^[ \t]*(?:\d{1,3}[.)](?=[ \t]+\S)|step[ \t]+\d+)", re.IGNORECASE | re.MULTILINE)


def _restated(rest: str, value: Value) -> bool:
    """Whether the numbers after an announcement lead to the same one."""
    if len(_ENUMERATOR.findall(rest)) > 1:
        rest = _ENUMERATOR.sub("", rest)
    if not isinstance(value, Number) or not re.search(r"\d", rest):
        return True
    found, unread = scan(rest)
    return bool(found) and not unread and equal_numbers(found[-1][0], value)


# --- the last sentence ------------------------------------------------------------------------------------------

_CLOSER = re.compile(
    r"\W*(?:I\s+)?hope\b.*|\W*let\s+me\s+know\b.*|\W*that['’]?s?\s+(?:is\s+)?(?:it|all)\W*|\W*done\W*|\W*stop\W*"
    r"|\W*q\.?e\.?d\W*"
    r"|\W*Step\s+\d+:\s+(?:stop|done)\W*|\W*",
    re.IGNORECASE | re.DOTALL,
)
_VERB = re.compile(
    r"\b(?:is|are|was|were|be|equals?|makes?|made|making|gives?|gave|giving|leaves?|leaving|left|totals?|totaling"
    r"|totalling|gets?|got|has|have|had|needs?|needed|earns?"
    r"|earned|costs?|spends?|spent|takes?|took|pays?|paid|saves?|saved|sold|sells?|buys?|bought|eats?|ate"
    r"|becomes?|yields?|yielding|means"
    r"|so|produces?|reaches?|results?|comes\s+to|counts?|reads?|walks?|drives?|changed)\b",
    re.IGNORECASE,
)
_LABEL = re.compile(r"\W*(?P<label>[^:=|]{1,60}?)\s*:\s*(?=\S)")
_IN_EQUATIONS = word_set("up away over below above short within off double triple divided multiplied under most")
_SUBJUNCTIVE = word_set("would could might were had unless suppose")
_COUNTED = frozenset(("each", "every", "per", "half", "twice"))
_FINAL_LABEL = re.compile(
    r"\AA\Z|\b(?:total|sum|result|answer|solution|final|altogether|overall|conclusion|therefore|so|thus"
    r"|hence)\b",
    re.I,
)
_QUANTITIES = word_set(
    "total sum cost price area volume length height width distance speed profit income weight mass age amount"
    " value balance score average mean perimeter result change difference number salary revenue tip discount"
    " temperature"
)
_MONTH = re.compile(
    r"\b(?:Jan(?:uary)?|Feb(?:ruary)?|Mar(?:ch)?|Apr(?:il)?|May|June?|July?|Aug(?:ust)?|Sept?(?:ember)?|Oct(?:ober)?"
    r"|Nov(?:ember)?|Dec(?:ember)?)\b\.?\s*\Z"
)


def _concluded(text: str) -> Value | None:
    """The value that the last sentence of a text ends with. Raises `AmbiguousError`."""
    if unsure(text) or text.count("```") % 2:
        return None
    lines = [line for line in text.replace("```", "\n").splitlines() if line.strip(" |-\t")]
    steps = len(_ENUMERATOR.findall("\n".join(lines))) > 1
    lines = [_ENUMERATOR.sub("", line) if steps else line for line in lines]
    while lines and _CLOSER.fullmatch(lines[-1]):
        lines.pop()
    if not lines or _one_of_rows(lines):
        return None
    found = sentences(lines[-1])
    while len(found) > 1 and _CLOSER.fullmatch(found[-1]):
        found.pop()
    label = _LABEL.match(found[-1])
    if label is None or re.search(r"\d", label["label"]) or CALCULATION.search(found[-1]):
        return _stated(found[-1])
    named = words(label["label"])
    if doubtful(label["label"]) or not (BOUNDS - _COUNTED).isdisjoint(named):
        return None
    if not _FINAL_LABEL.search(label["label"]) and _QUANTITIES.isdisjoint(named) and not _VERB.search(label["label"]):
        return None
    return _stated(found[-1][label.end() :])


def _one_of_rows(lines: list[str]) -> bool:
    """Whether the last line is one of several rows, bullets or labelled values, and not their result."""
    last = lines[-1].strip()
    if last.startswith("|"):
        return True
    if len(lines) == 1 or _FINAL_LABEL.search(last):
        return False
    before = lines[-2].strip()
    for row in (r"[-*•]\s+\S", r"[^:]{1,40}:\s*\S{1,20}\W*\Z", r"[a-zA-Z]\s*=\s*\S+\s*\Z", r"[\d.,$%]+\s*\Z"):
        if re.match(row, last) and re.match(row, before):
            return True
    return False


_STATED = re.compile(r"(?P<before>[^$\\\n\d.?!]{1,200}\b(?:is|are|equals)\s+)(?P<value>[^\n?!]{1,200})")


def _stated(sentence: str) -> Value | None:
    """The number or expression that a sentence states. Raises `AmbiguousError`."""
    sentence = contrasted(without_denial(re.sub(r"\A(?:But|However|And|Yet),?\s+", "", sentence))).strip()
    calculated = CALCULATION.search(plain(sentence)) is not None
    supposed = not _SUBJUNCTIVE.isdisjoint(words(sentence))
    if doubtful(sentence, (DOUBTS | SAYING) - {"if"} if calculated and not supposed else DOUBTS | SAYING):
        return None
    match = _STATED.fullmatch(sentence)
    if match and BOUNDS.isdisjoint(words(match["before"])) and (value := _alone(match["value"])):
        return value
    written = plain(sentence)
    allowed = _COUNTED | _IN_EQUATIONS if calculated else _COUNTED
    if "=" in written and not (BOUNDS - allowed).isdisjoint(words(CLAUSE_BREAK.split(written.split("=")[0])[-1])):
        return None
    if re.search(r"\A[\s($]*[-+]?[$\d.]", written) or "=" in written:
        try:
            return consumed(written) or expression_in(sentence)
        except AmbiguousError:
            *_, written = re.split(r"[,;]\s+(?:so|thus|hence|therefore)\b", written)
            if "=" in written:
                return expression_in(sentence)
    found, unread = scan(written)
    if not found and not unread and not re.search(r"\d", written):
        return _in_words(written)
    if unread or not found:
        return None
    return _last(written, [start for _, start, _ in found])


def _last(sentence: str, starts: list[int]) -> Number | None:
    """The last number of a sentence that says nothing else of it."""
    previous = numbers_in(sentence)[-2] if len(starts) > 1 else None
    start = starts[-1]
    if previous and (compound := compound_at(sentence, previous[1])) and compound[1] >= start:
        start, previous = previous[1], None
        if len(starts) > 2:
            previous = numbers_in(sentence)[-3]
    if sign := re.search(
        r"(?:\b(?:negative|minus)\s+|(?<=\bis\s)[-–]\s+|(?<=[:=]\s)[-–]\s+)[$€£]?\Z", sentence[:start], re.IGNORECASE
    ):
        start = sign.start()
    before = sentence[:start]
    quantity = quantity_at(sentence, start)
    if quantity is None or not re.search(r"(?:\A|[\s(\[\"'“:=#])[$€£]?\Z", before) or _MONTH.search(before):
        return None
    if previous and not _VERB.search(sentence, previous[2], start):
        return None
    clause = CLAUSE_BREAK.split(before)[-1]
    found = words(clause)
    if not BOUNDS.isdisjoint(found) or re.search(r"[-+*/×÷^<>|~≈±≤≥≠,]\s*\Z", before):
        return None
    if _OTHERS_NUMBER.search(clause):
        return None
    if found and found[-1] == "of" and (len(found) < 2 or found[-2] not in _QUANTITIES):
        return None
    if before.strip() and not _governs(before, found):
        return None
    number, end = quantity
    factorial = not before.strip() and sentence[end:].startswith("!") and abs(number.value) <= 20
    if factorial or not harmless(sentence[end:], number):
        return None
    return replace(number, nouns=nouns_after(sentence[end:], number))


_OTHERS_NUMBER = re.compile(
    r"\banswers?\b(?!\W*\Z)|\b(?:my|his|her|their|your|our)\s+(?:friend|brother|sister|classmate|teacher"
    r"|neighbou?r|colleague|book|calculator|dad|mom|partner)\b"
    r"|\A(?!.*\d.*\b(?:plus|minus|times)\b).*\b(?:plus|minus|times|added\s+to|doubled|halved|multiplied)\b",
    re.IGNORECASE | re.DOTALL,
)
"""Before a number that is not announced: it is someone else's, or part of an equation in words."""


_BARE_VERBS = word_set(
    "travel collect cover drive walk read bake score use find obtain calculate compute run ride eat drink plant"
    " pick carry sell buy save win lose receive keep learn write build print visit burn produce make spend pay sum"
    " of"
)
_LEADING_TO = word_set("comes come amounts amount adds sums equal up changed changes is equates")
_NO_VERBS = word_set("pages rooms its this as always plus less")
_MODAL = word_set("will can must should to i we they you")
_BETWEEN = word_set(
    "exactly only just simply precisely another altogether total all us them him her me up also then now"
)


def _governs(before: str, found: list[str]) -> bool:
    """Whether the word right before a number is a verb, or one that leads to a result: "sold 48", "comes to 48"."""
    if before.rstrip(" ($€£\"'“").endswith((":", "=")) or re.search(r"\bi\.e\.,?\s*\Z", before):
        return True
    rest = list(found)
    if rest[-2:] == ["total", "of"] or (len(rest) > 1 and rest[-1] == "of" and rest[-2] in _QUANTITIES):
        return True
    while rest and rest[-1] in _BETWEEN:
        rest.pop()
    if not rest:
        return bool(found)
    word, earlier = rest[-1], rest[-2] if len(rest) > 1 else ""
    if word in ("to", "by"):
        return earlier in _LEADING_TO
    if word == "with":
        return earlier in ("left", "up")
    if word in OPERATIONS or word in _NO_VERBS or word.endswith("ss"):
        return False
    after_subject = len(rest) > 1
    return (
        _VERB.fullmatch(word) is not None
        or word in ("it's", "it’s", "that's", "that’s")
        or (after_subject and (word in _BARE_VERBS or earlier in _MODAL or word.endswith(("ed", "s"))))
    )


_RESULT_IN_WORDS = re.compile(
    rf"(?<!there ){_VERB.pattern}\s+(?:exactly\s+|a\s+total\s+of\s+)?(?=[a-z])", re.IGNORECASE
)


def _in_words(sentence: str) -> Number | None:
    """The number after the last "is" or "makes" of a text without digits; not "one", which may be a pronoun."""
    lead = LEAD.match(sentence)
    begin = lead.end() if lead else 0
    verbs = list(_RESULT_IN_WORDS.finditer(sentence))
    for start in (begin, verbs[-1].end() if verbs else begin):
        found = quantity_at(sentence, start)
        if found and BOUNDS.isdisjoint(words(sentence[:start])) and harmless(sentence[found[1] :], found[0]):
            nouns = nouns_after(sentence[found[1] :], found[0])
            return replace(found[0], nouns=nouns) if found[0].value != 1 or start == begin else None
    return None
