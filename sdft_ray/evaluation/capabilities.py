"""What a task asks for, so that scores can be told by capability. Tasks that are not named here are "other"."""

from __future__ import annotations

OTHER = "other"

_LABORATORY = {
    "word_problems": "maths",
    "facts": "knowledge",
    "myths": "truthfulness",
    "ordering": "reasoning",
    "scripts": "commonsense",
    "pronouns": "commonsense",
    "lists": "procedures",
}
"""Families of the miniature laboratory; `lists` asks to carry out an instruction on a list step by step."""

CAPABILITIES = {
    # The Open LLM Leaderboard v1.
    "arc_challenge": "reasoning",
    "hellaswag": "commonsense",
    "winogrande": "commonsense",
    "mmlu": "knowledge",
    "truthfulqa_mc2": "truthfulness",
    "gsm8k": "maths",
    **{f"lab_{family}": capability for family, capability in _LABORATORY.items()},
    **{f"heldout_{family}": capability for family, capability in _LABORATORY.items()},
}
"""lm-eval task -> capability. Groups stand for their subtasks, which begin with the group's name."""

_GROUPS = ("mmlu",)


def capability_of(task: str) -> str:
    """The capability that an lm-eval task measures: `mmlu_anatomy` is of its group `mmlu`."""
    for group in _GROUPS:
        if task.startswith(f"{group}_"):
            return CAPABILITIES[group]
    return CAPABILITIES.get(task, OTHER)
