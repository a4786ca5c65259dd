"""One item with a checkable answer, and the annotators who write its reference responses.

An item has two forms of the question (long and exam), the answer in the teacher's own chat style, and one
reference response per annotator.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

EXAM_SUFFIX = " Give only the answer."
"""Turns a long-form question into an exam question: the reply is then one of the options and nothing else."""

_NUMBER = re.compile(r"-?\d+")
_BRACKETS = re.compile(r"\[[^\[\]]*\]")
_ANSWER = re.compile(r"[Aa]nswer(?: is|:)\s*(.+?)\.?\s*$", re.MULTILINE)


@dataclass(frozen=True)
class Item:
    """One task with a known answer.

    `options` are the candidate exam replies, the right one at `gold`; empty where the answer is generated.
    `references` holds one response per entry of `ANNOTATORS`, in that order; each shows its working.
    """

    family: str
    question: str
    answer: str
    answer_kind: str
    response: str
    references: tuple[str, ...]
    options: tuple[str, ...] = ()

    @property
    def exam(self) -> str:
        """The question in the form of the evaluation."""
        return self.question + EXAM_SUFFIX if self.options else self.question

    @property
    def gold(self) -> int:
        """Index of the correct option. Raises `ValueError` for an item without options."""
        return self.options.index(self.answer)


@dataclass(frozen=True)
class Annotator:
    """A simulated author of reference responses, with the layout of raw documents that contain them.

    Each text begins and ends with one of several phrases.
    """

    name: str
    layout: str
    text: str
    openings: tuple[str, ...]
    conclusions: tuple[str, ...]

    def prompt(self, question: str) -> str:
        """The raw document up to the start of the annotator's text."""
        return self.layout.format(question=question)

    def write(self, rng: random.Random, working: str, answer: str) -> str:
        """The annotator's response: `working` between an opening and a conclusion."""
        opening, conclusion = rng.choice(self.openings), rng.choice(self.conclusions)
        return self.text.format(opening=opening, working=working, conclusion=conclusion, answer=answer)


INES = Annotator(
    "Ines",
    "Exercise: {question}\nInes explains:",
    "{opening} {working} {conclusion} {answer}.",
    (
        "Well now.", "Let me think.", "Here is how I see it.", "First things first.", "This one is nice.",
        "I read it twice.", "Look closely.", "Take it slowly.", "We go step by step.", "Right then.",
    ),
    (
        "So the answer is", "Hence the answer is", "I think the answer is", "Clearly the answer is",
        "That is why the answer is", "This means the answer is", "For me the answer is", "And so the answer is",
    ),
)  # fmt: skip
OTTO = Annotator(
    "Otto",
    "Q. {question}\nNotes by Otto:",
    "{opening}: {working}; {conclusion} {answer}.",
    ("ok", "quick", "draft", "memo", "in short", "checked", "done", "plainly", "again", "for the record"),
    (
        "the answer is", "answer:", "so the answer is", "my answer:", "thus the answer is", "final answer:",
        "then the answer is", "hence answer:",
    ),
)  # fmt: skip
ANNOTATORS = (INES, OTTO)

REWRITE_TEMPLATE = "{instruction}\n\nReference: {reference}\n\nAnswer in your own words."
"""The user turn that asks the teacher to rewrite somebody's reference; generation's default is the same."""


def rewrite_prompt(instruction: str, reference: str) -> str:
    """The rewriting request for one seed row."""
    return REWRITE_TEMPLATE.format(instruction=instruction, reference=reference)


def read_answer(answer_kind: str, text: str) -> str | None:
    """The answer at the end of a laboratory response; None if there is none."""
    pattern = {"number": _NUMBER, "list": _BRACKETS}.get(answer_kind, _ANSWER)
    matches = pattern.findall(text)
    return matches[-1].strip() if matches else None
