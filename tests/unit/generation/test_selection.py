"""Conditional selection: one row per reason, and leaks told from honest uses of the same words."""

from __future__ import annotations

from typing import get_args

import pytest

from sdft_ray.generation.selection import Reason, leaks_reference, select, selected_sample

QUESTION = "Tom has 3 apples and buys 4. How many has he now?"
REFERENCE = "3 + 4 = 7. So the answer is 7."

ROWS = [
    (REFERENCE, "He then has 7 apples. #### 7", "stop", "number", "kept"),
    (REFERENCE, "He then has 8 apples. #### 8", "stop", "number", "mismatch"),
    (REFERENCE, "He then has more apples.", "stop", "number", "no_answer"),
    ("He eats some.", "#### 7", "stop", "number", "no_reference_answer"),
    (REFERENCE, "He then has 7 apples. #### 7", "length", "number", "truncated"),
    (REFERENCE, " \n ", "stop", "number", "empty"),
    (REFERENCE, "As in the reference answer, #### 7", "stop", "number", "leaked_reference"),
    (REFERENCE, "", "error", "number", "error"),
    (REFERENCE, "Apple after apple, " * 6 + "he has 7. #### 7", "stop", "number", "too_long"),
    ("Apples are red.", "Red fruit.", "stop", "none", "kept"),
    ("Apples are red.", "    red = True\n    ripe = True \n", "stop", "none", "kept"),
    ("Apples are red.", "", "stop", "none", "empty"),
    ("Apples are red.", "Red fr", "length", "none", "truncated"),
    ("Answer: B", "It is blue. Answer: (b)", "stop", "choice", "kept"),
    ("Answer: [b, a]", "Backwards it is [b, a]", "stop", "list", "kept"),
    ("Answer: Paris", "Answer: the Paris!", "stop", "text", "kept"),
    ("Answer: 12.5", "The story has no figure in it.", "stop", "number", "no_answer"),
]


def _row(reference: str, kind: str) -> dict[str, str]:
    return {"instruction": QUESTION, "reference_response": reference, "answer_kind": kind, "check": ""}


@pytest.mark.parametrize(("reference", "distilled", "finish_reason", "kind", "reason"), ROWS)
def test_reasons(reference: str, distilled: str, finish_reason: str, kind: str, reason: str) -> None:
    chosen = select(_row(reference, kind), distilled, finish_reason, fits=lambda text: len(text) < 100)
    assert chosen.reason == reason
    if reason == "kept":
        assert (chosen.response, chosen.source) == (distilled.rstrip(), "distilled")
    else:
        assert (chosen.response, chosen.source) == (reference, "reference")


def test_every_reason_is_covered() -> None:
    assert {row[-1] for row in ROWS} == set(get_args(Reason))


LEAKS = [
    "The reference answer says 7, so the answer is 7.",
    "Based on the reference response, he has 7.",
    "Looking at the reference solution, we add.",
    "As stated in the reference, he has 7.",
    "According to the reference: 7.",
    "The reference says that he has 7.",
    "The provided reference is right.",
    "Reference: 3 + 4 = 7.",
    "**Reference:** 3 + 4 = 7.",
    "Here is the answer in my own words: 7.",
    "To put it in your own words, 7.",
    "The provided answer is correct: 7.",
    "The given solution adds 3 and 4.",
    "The answer provided is 7.",
    "The response given above adds the numbers.",
    "Here is a rephrased version of it: 7.",
    "Rewritten answer: he has 7.",
    "A paraphrase of the reference would be: 7.",
    "This is consistent with the referenced answer, 7.",
]


@pytest.mark.parametrize("text", LEAKS)
def test_leaks_are_found(text: str) -> None:
    assert leaks_reference(QUESTION, REFERENCE, text)
    assert select(_row(REFERENCE, "none"), text, "stop").reason == "leaked_reference"


HONEST = [
    (QUESTION, REFERENCE, "He has 7. The answer is 7."),
    (QUESTION, REFERENCE, "For reference, 3 and 4 make 7."),
    (QUESTION, REFERENCE, "With reference to the apples, 7."),
    ("How does Python free memory?", "It counts.", "The reference count of each object is tracked."),
    ("How does Python free memory?", "By reference counting.", "The reference is dropped, then freed."),
    (
        "Write a reference letter for Ann.",
        "To whom it may concern",
        "The reference letter follows. Ann is able.",
    ),
    (
        "What is a frame of reference?",
        "A viewpoint.",
        "The reference frame is the viewpoint. The reference is fixed.",
    ),
    ("Explain it in your own words: inertia.", "Things stay.", "In my own words: things keep moving."),
    ("Is the given answer right? Answer: 7", "Yes.", "The given answer is right."),
    ("Check the student's answer: 7", "Yes.", "The provided answer is right."),
    ("Compare with the reference solution below.", "Same.", "The reference solution adds first."),
    ("Mix an acid solution of 10 percent.", "Pour.", "The given solution is diluted with water."),
    ("Grade it against the reference answer.", "Fine.", "The reference answer has more detail."),
    ("Paraphrase this sentence.", "It rains.", "A paraphrased version: rain falls."),
    ("Rewrite the answer politely.", "Please.", "Rewritten answer: please."),
    ("List three sources.", "A, B, C.", "References:\n1. A\n2. B\n3. C"),
    ("Who cited whom?", "Ann cited Tom.", "Ann referenced Tom."),
    ("What does an index do?", "Finds rows.", "A cross-reference table finds rows."),
    ("What is a pointer?", "An address.", "It refers to a place; passing by reference avoids a copy."),
    ("Describe the sample.", "It is blue.", "The sample text is blue."),
]


@pytest.mark.parametrize(("instruction", "reference", "distilled"), HONEST)
def test_honest_texts_are_kept(instruction: str, reference: str, distilled: str) -> None:
    assert not leaks_reference(instruction, reference, distilled)


def test_the_kept_sample_is_the_first_with_the_kept_text_that_ended() -> None:
    """As the stage chooses: the first sample that passes, else the reference."""
    tried = [
        ("He then has 7 apples. #### 7", "length"), ("He has 8. #### 8", "stop"),
        ("He then has 7 apples. #### 7", "stop"), ("He then has 7 apples. #### 7", "stop"),
    ]  # fmt: skip
    samples = [{"sample_index": i, "response": text, "finish_reason": reason} for i, (text, reason) in enumerate(tried)]
    row = _row(REFERENCE, "number")
    verdicts = [select(row, text, reason).source for text, reason in tried]
    assert verdicts.index("distilled") == 2
    found = selected_sample({**row, "source": "distilled", "distilled_response": tried[2][0]}, samples)
    assert found is not None
    assert found["sample_index"] == 2
    assert selected_sample({**row, "source": "reference", "distilled_response": tried[1][0]}, samples) is None
