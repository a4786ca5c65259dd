"""One checkable task of the miniature laboratory, and the people who wrote the references.

An item carries everything the laboratory says about it: two ways of asking (the long form and the exam form),
what the teacher answers in its own chat style, and one reference response per annotator.
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
        """The question as the evaluation asks it."""
        return self.question + EXAM_SUFFIX if self.options else self.question

    @property
    def gold(self) -> int:
        """Index of the right option; ValueError for a generated answer."""
        return self.options.index(self.answer)


@dataclass(frozen=True)
class Annotator:
    """A person who wrote references, and the layout of the raw documents that show them.

    People vary their words: each text begins and concludes in one of several ways.
    """

    name: str
    layout: str
    text: str
    openings: tuple[str, ...]
    conclusions: tuple[str, ...]

    def prompt(self, question: str) -> str:
        """The raw document up to where the annotator's own text begins."""
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
    """The answer that a laboratory response ends with; None where there is none."""
    pattern = {"number": _NUMBER, "list": _BRACKETS}.get(answer_kind, _ANSWER)
    found = pattern.findall(text)
    return found[-1].strip() if found else None
