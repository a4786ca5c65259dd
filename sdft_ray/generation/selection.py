"""Conditional selection: train on the teacher's own response if it passes, on the reference response otherwise.

The rule of arXiv:2410.09982, section 3: a rewrite is kept if its answer equals that of the reference. Rewrites that
are truncated or empty, or that mention the reference in the prompt, are never kept.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

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
"""Why a row has its training response; for all but "kept" that is the reference response."""
MEANINGS: dict[Reason, str] = {
    "kept": "the rewrite’s answer is that of the reference",
    "mismatch": "the answers differ",
    "no_answer": "the rewrite gives none",
    "no_reference_answer": "the reference gives none, so nothing can be checked",
    "truncated": "cut off at the token limit",
    "empty": "nothing was written",
    "leaked_reference": "it mentions the reference that its prompt showed",
    "too_long": "it does not fit a training row",
    "error": "it could not be sampled",
}


@dataclass(frozen=True)
class Selected:
    """The response to train on, its source, and the reason."""

    response: str
    source: Literal["distilled", "reference"]
    reason: Reason


def select(
    row: Mapping[str, str], distilled: str, finish_reason: str, fits: Callable[[str], bool] = lambda response: True
) -> Selected:
    """Choose between the distilled and the reference response of one row.

    `row` has these columns of `SEED_SCHEMA`: instruction, reference_response, answer_kind, check.
    White space at the end goes; at the start it stays, because it may be the indentation of code.
    `finish_reason` is "stop", "length" or "error"; `fits` returns whether a response fits a training row.
    """
    reason = _reason(row, distilled, finish_reason, fits)
    if reason == "kept":
        return Selected(distilled.rstrip(), "distilled", reason)
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


def selected_sample(row: Mapping[str, str], samples: Iterable[Mapping[str, Any]]) -> Mapping[str, Any] | None:
    """The sample that a row of `SELECTED_SCHEMA` trains on; None if that is the reference.

    `samples` are those of the row, in the order in which they were drawn. The result of `select` depends only on the
    text and the finish reason of a sample, so it is the first sample with the selected text that finished with "stop".
    """
    if row["source"] != "distilled":
        return None
    return next(
        sample
        for sample in samples
        if sample["finish_reason"] == "stop" and sample["response"] == row["distilled_response"]
    )


# --- leaks --------------------------------------------------------------------------------------------------
# A leak is a phrase about the response in the prompt. The same words can be legitimate: "the reference count", "the
# reference letter", "the given solution" of an acid. So each pattern names the noun that it depends on, and a match is
# legitimate if the instruction or the reference response uses that noun in the same way.

_RESPONSE = r"(?:answer|response|solution|explanation|reply|output|text|completion|passage|version)s?"
_ATTRIBUTE = r"(?:given|provided|supplied|shown|above|original|sample|example|model)"

_REFERENCE_RESPONSE = re.compile(rf"\breference(?:d)?\s+(?P<noun>{_RESPONSE})\b", re.IGNORECASE)
_BARE_REFERENCE = re.compile(
    rf"\b(?:the|this|that|your)\s+(?:{_ATTRIBUTE}\s+)?reference(?=\s*(?:[.,;:!?)\"']|$)"
    r"|\s+(?:says?|states?|gives?|shows?|mentions?|explains?|uses?|is|was|has|does|provided|given|above|and|but|in)\b)"
    r"|^[ \t]*\W{0,3}reference\W{0,3}:",
    re.IGNORECASE | re.MULTILINE,
)
_OWN_WORDS = re.compile(r"\b(?:in|using)\s+(?:my|your|our)\s+own\s+(?P<noun>words)\b", re.IGNORECASE)
_GIVEN_RESPONSE_PATTERN = re.compile(
    rf"\b(?:the|this|your)\s+{_ATTRIBUTE}\s+(?P<noun>answer|response|reply|solution)\b"
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
    """Whether the rewrite reveals that its prompt contained a reference response.

    Phrases that also occur in the instruction or the reference are no leaks, and neither are other senses of a word.
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
    for match in _GIVEN_RESPONSE_PATTERN.finditer(distilled):
        noun = (match["noun"] or match["noun2"]).lower()
        # A solution may be an acid; an answer is legitimate if the request itself contains one.
        in_request = rf"(?:{_ATTRIBUTE}|this|my|his|her|their|following|'s)\s+{noun}\b|\b{noun}\s*:"
        if not uses(rf"\b{noun}" if noun == "solution" else in_request):
            return True
    rewritten = _REWRITE.search(distilled)
    return rewritten is not None and not uses(r"\b(?:re-?phras|re-?writ|re-?word|paraphras)")
