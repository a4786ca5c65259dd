"""Words that make an answer none: denials, hedges, conditions, corrections, and words that change a number.

English is nearly complete here: these are closed classes of words. Of other languages only the commonest are known.
"""

from __future__ import annotations

import re


def word_set(text: str) -> frozenset[str]:
    """The words of a text, which are separated by spaces."""
    return frozenset(text.split())


NEGATIONS = word_set(
    "not never none nor neither nobody nothing nowhere no cannot cant without dont isnt doesnt didnt wasnt wont"
    " nope nah except excluding fails fail failed refuse refuses refused declines deny denies reject rejects"
    " rejected eliminate eliminated exclude excluded avoid incorrect wrong wrongly false falsely untrue impossible"
    " invalid mistaken nicht kein keine keinen nein pas jamais tampoco nunca niet geen não falsch"
)
HEDGES = word_set(
    "or either maybe perhaps possibly probably might could whether about around roughly approximately approx"
    " circa ca nearly almost hardly barely scarcely unlikely uncertain unsure doubt doubtful depends depending"
    " otherwise between seemingly supposedly allegedly presumably arguably approaching thereabouts ish versus vs"
    " likewise plausible example instance alternatively estimate estimated estimation bound hint unlike contrary"
    " student theoretically kidding joking joke sic placeholder oder ou vielleicht ungefähr etwa quizás peut"
    " environ ungefaehr according"
)
CONDITIONS = word_set(
    "if unless suppose supposing supposed assume assuming assumed imagine pretend whether provided hypothetically"
    " guess guessed guessing example instance alternatively unlike contrary estimate"
    " estimated student between initially originally else otherwise"
)
RETRACTIONS = word_set(
    "wait actually correction corrected oops whoops sorry hmm hm edit scratch mistake mistakes error errors"
    " however but though although yet instead revised revise update updated erratum typo meant mind reconsider"
    " recheck redo recount miscounted miscalculated forgot apologies apologize better should ought wrong incorrect"
    " false untrue impossible invalid no nope kidding joking nein falsch doch perdón pardon rather reflection"
    " strike"
)
DOUBTS = NEGATIONS | HEDGES | CONDITIONS | RETRACTIONS - {"better", "should", "ought", "meant", "mind"}
SAID = word_set(
    "says say said saying claim claims claimed thinks thought believes believed asserts reported asks asked would"
    " people someone everyone everybody some many students others unlike"
)
"""Anywhere in the clause before an announcement: it is someone else's."""
OTHER = word_set(
    "his her their your naive naïve tempting bad another one possible a an first second third initial previous"
    " old former original other partial preliminary rough intermediate opposite earlier expected obvious common"
    " popular"
)
"""Right before the word "answer": it is not the one."""
BOUNDS = word_set(
    "than between over under below above half twice double triple least most up exceed exceeds exceeding minimum"
    " maximum beyond factor multiple divisible divided multiplied modulo short shy north excess away monday"
    " tuesday wednesday thursday friday saturday sunday first initially originally started starts began previously"
    " yesterday earlier formerly each every per percentage-wise outside off half-way within"
)
"""Before a number: it is a bound, one end of a range, a part of a calculation, or the answer of an earlier step."""
OPERATIONS = word_set(
    "root cube square squared power product quotient remainder inverse reciprocal number chapter page step"
    " question version line figure table exercise problem"
)
"""Right before a number: it is a part of a calculation, or a name."""
_WORD = re.compile(r"[^\W\d_]+(?:['’-][^\W\d_]+)*")
PHRASES = re.compile(
    r"n['’]t\b|(?-i:\bmay)\s+(?-i:[a-z])|\b(?:may\s+be|far\s+from|would['’]?(?:ve|\s+have)|far\s+too|rule[ds]?\s+out|ruling\s+out"
    r"|only\s+if|at\s+(?:best|worst)"
    r"|(?:best|worst)[\s-]case|in\s+theory|for\s+now|part\s+\(?(?:[a-h]|[ivx]+|\d)\)?(?!\w)|(?:any"
    r"|every)thing\s+but|all\s+but|tal\s+vez|so\s+far|used\s+to)\b|≠|!=|\\neq?\b|❌|✗|✘|❎",
    re.IGNORECASE,
)


def words(text: str) -> list[str]:
    """The words of a text in lower case, those with an apostrophe whole."""
    return [match[0].casefold() for match in _WORD.finditer(text)]


def doubtful(text: str, doubts: frozenset[str] = DOUBTS) -> bool:
    """Whether a text has one of these words, a negated verb, or a question mark."""
    return "?" in text or PHRASES.search(text) is not None or not doubts.isdisjoint(words(text))


_UNSURE = re.compile(
    r"\b(?:not|n['’]t|never)\s+(?:\w+\s+)?(?:sure|certain|know|tell|say|decide)\b|\b(?:unsure|no\s+idea"
    r"|uncertain|cannot\s+(?:tell|say|know|be\s+sure|determine)"
    r"|can['’]t\s+(?:tell|say|know|be\s+sure|decide)|could\s+be|might\s+be|may\s+be|my\s+guess|a\s+guess"
    r"|torn\s+between)\b",
    re.IGNORECASE,
)
_DENYING = re.compile(
    r"\bI\s+think\s+not\b|\b(?:that|this|it|which|these|those)\b[^.!?\n]{0,30}(?:n['’]t\b|\bnot\b|\bcannot\b"
    r"|\bnever\b)",
    re.IGNORECASE,
)


SAYING = word_set("say says said claims claim claimed thinks thought believes believed guesses")


def unsure(text: str) -> bool:
    """Whether the writer says that it does not know: "I am not sure"."""
    return _UNSURE.search(text) is not None


def retracted(rest: str) -> bool:
    """Whether the text after an answer takes it back or asks: "Wait, that is wrong"."""
    return (
        "?" in rest
        or re.match(r"[ \t]*(?:[a-z]|[-+<>])", rest) is not None
        or not RETRACTIONS.isdisjoint(words(rest))
        or _DENYING.search(rest) is not None
        or PHRASES.search(rest[:40]) is not None
        or unsure(rest)
    )
