"""Conditional selection: train on the teacher's own response if it passes, on the reference otherwise.

The rule of arXiv:2410.09982, section 3: a rewrite is kept when its answer equals the reference's. Rewrites
that were cut off, are empty, or talk about the reference that the prompt showed are never kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal, get_args

from sdft_ray.generation.checks import verdict

Reason = Literal[
    "kept",
    "mismatch",
    "no_answer",
    "no_reference_answer",
    "truncated",
    "empty",
    "leaked_reference",
    "too_long",
    "error",
]
"""Why a row trains on what it does; all but "kept" fall back to the reference response.

`mismatch`: the answers differ. `no_answer`: the rewrite has none. `no_reference_answer`: the reference has
none, so nothing can be checked. `truncated`: the rewrite hit the token limit. `empty`: it has no visible
character. `leaked_reference`: it mentions the reference shown in the prompt. `too_long`: it does not fit a
training row. `error`: it could not be sampled.
"""
REASONS: tuple[str, ...] = get_args(Reason)


@dataclass(frozen=True)
class Selected:
    """The response to train on, where it comes from, and why."""

    response: str
    source: Literal["distilled", "reference"]
    reason: Reason


def select(
    row: Mapping[str, str], distilled: str, finish_reason: str, fits: Callable[[str], bool] = lambda response: True
) -> Selected:
    """Choose between the distilled and the reference response of one row.

    `row` has the columns of `SEED_SCHEMA` that matter: instruction, reference_response, answer_kind, check.
    `finish_reason` is "stop", "length" or "error"; `fits` says whether a response can be trained on.
    """
    reason = _reason(row, distilled, finish_reason, fits)
    if reason == "kept":
        return Selected(distilled.strip(), "distilled", reason)
    return Selected(row["reference_response"], "reference", reason)


def _reason(row: Mapping[str, str], distilled: str, finish_reason: str, fits: Callable[[str], bool]) -> Reason:
    if finish_reason == "error":
        return "error"
    if finish_reason == "length":
        return "truncated"
    if not distilled.strip():
        return "empty"
    if leaks_reference(row["instruction"], row["reference_response"], distilled):
        return "leaked_reference"
    if not fits(distilled):
        return "too_long"
    return verdict(row, distilled)


def kept_sample(row: Mapping[str, str], samples: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The sample that a row of `SELECTED_SCHEMA` trains on; None where its reference was kept.

    `samples` are those of the row, in the order in which they were tried. What `select` says depends on a sample's
    text and on how it ended, and only ended ones are kept: the first with the kept text that ended is the one.
    """
    if row["source"] != "distilled":
        return None
    return next(
        sample
        for sample in samples
        if sample["finish_reason"] == "stop" and sample["response"] == row["distilled_response"]
    )


# --- leaks --------------------------------------------------------------------------------------------------
# A leak is a phrase about the response that the prompt showed. The same words can be honest: "the reference
# count", "the reference letter", "the given solution" of an acid. So each pattern names the noun it depends
# on, and a match is honest when the instruction or the reference response speaks of that noun in the same way
# themselves.

_RESPONSE = r"(?:answer|response|solution|explanation|reply|output|text|completion|passage|version)s?"
_SHOWN = r"(?:given|provided|supplied|shown|above|original|sample|example|model)"

_REFERENCE_RESPONSE = re.compile(rf"\breference(?:d)?\s+(?P<noun>{_RESPONSE})\b", re.IGNORECASE)
_BARE_REFERENCE = re.compile(
    rf"\b(?:the|this|that|your)\s+(?:{_SHOWN}\s+)?reference(?=\s*(?:[.,;:!?)\"']|$)"
    r"|\s+(?:says?|states?|gives?|shows?|mentions?|explains?|uses?|is|was|has|does|provided|given|above|and|but|in)\b)"
    r"|^[ \t]*\W{0,3}reference\W{0,3}:",
    re.IGNORECASE | re.MULTILINE,
)
_OWN_WORDS = re.compile(r"\b(?:in|using)\s+(?:my|your|our)\s+own\s+(?P<noun>words)\b", re.IGNORECASE)
_SHOWN_RESPONSE = re.compile(
    rf"\b(?:the|this|your)\s+{_SHOWN}\s+(?P<noun>answer|response|reply|solution)\b"
    r"|\bthe\s+(?P<noun2>answer|response|reply|solution)\s+(?:(?:that\s+)?(?:was|is)\s+)?"
    r"(?:provided|supplied|shown|given\s+(?:above|here|to\s+me))\b",
    re.IGNORECASE,
)
_REWRITE = re.compile(
    r"\b(?:re-?phras(?:ed|ing)|re-?writ(?:ten|ing)|re-?word(?:ed|ing)|paraphras(?:ed?|ing))\s+"
    r"(?:of\s+)?(?:(?:the|this|your|my)\s+)?(?:\w+\s+)?(?P<noun>answer|response|version|solution|reference)\b",
    re.IGNORECASE,
)


def leaks_reference(instruction: str, reference: str, distilled: str) -> bool:
    """Whether the rewrite gives away that its prompt showed a reference response.

    Phrases that the instruction or the reference use themselves are honest, and so are other senses of the
    word.
    """
    honest = f"{instruction}\n{reference}"

    def uses(pattern: str) -> bool:
        return re.search(pattern, honest, re.IGNORECASE) is not None

    for match in _REFERENCE_RESPONSE.finditer(distilled):
        if not uses(rf"\breference(?:d)?\s+{re.escape(match['noun'].rstrip('sS'))}"):
            return True
    if _BARE_REFERENCE.search(distilled) and not uses(r"\breference"):
        return True
    if _OWN_WORDS.search(distilled) and not uses(r"\bown\s+words\b"):
        return True
    for match in _SHOWN_RESPONSE.finditer(distilled):
        noun = (match["noun"] or match["noun2"]).lower()
        # A solution may be an acid; an answer is honest when the request itself shows one.
        shown_in_request = rf"(?:{_SHOWN}|this|my|his|her|their|following|'s)\s+{noun}\b|\b{noun}\s*:"
        if not uses(rf"\b{noun}" if noun == "solution" else shown_in_request):
            return True
    rewritten = _REWRITE.search(distilled)
    return rewritten is not None and not uses(r"\b(?:re-?phras|re-?writ|re-?word|paraphras)")
