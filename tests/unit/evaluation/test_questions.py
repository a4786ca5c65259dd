"""Questions and answers as plain values: digests, JSON, repetition, and the chance that one of k samples is right."""

from __future__ import annotations

import itertools
import json
import statistics
from dataclasses import fields, replace

import pytest

from sdft_ray.evaluation.pass_at_k import chance
from sdft_ray.evaluation.questions import (
    GenerationQuestion,
    Likelihoods,
    LoglikelihoodQuestion,
    Question,
    Text,
    answer_from_json,
    answer_to_json,
    key_of,
    repetition,
)

WRITING = GenerationQuestion((1, 2, 3), ("\n",), 8)
LIKELIHOOD = LoglikelihoodQuestion((1, 2, 3), 1, (4, 5))


@pytest.mark.parametrize("question", [WRITING, LIKELIHOOD])
def test_every_field_of_a_question_counts(question: Question) -> None:
    changed = {
        "ids": (1, 2, 4), "stop": (), "max_tokens": 9, "temperature": 0.5, "top_p": 0.5, "top_k": 2, "seed": 1,
        "is_cut": True, "num_scored": 0, "finals": (5, 4),
    }  # fmt: skip
    keys = {key_of(question)}
    for field in fields(question):
        keys.add(key_of(replace(question, **{field.name: changed[field.name]})))
    assert len(keys) == 1 + len(fields(question))
    assert key_of(question) == key_of(replace(question))


def test_a_writing_and_a_likelihood_of_the_same_tokens_are_two_questions() -> None:
    assert key_of(WRITING) != key_of(LIKELIHOOD)


def test_answers_survive_json_to_the_bit() -> None:
    answers = [Likelihoods(((-1.2345678901234567, True), (-0.1, False))), Text("a\u2028\ud800b", 3, True, 0.25)]
    for answer in answers:
        assert answer_from_json(json.loads(json.dumps(answer_to_json(answer)))) == answer


def test_repetition_counts_what_stood_before() -> None:
    assert repetition([]) == repetition([1, 1, 1]) == repetition([1, 2, 3, 4, 5]) == 0.0
    # a b c d, b c d a, c d a b, d a b c, a b c d: one of five stood before
    assert repetition([1, 2, 3, 4, 1, 2, 3, 4]) == pytest.approx(1 / 5)
    assert repetition([7] * 103) == pytest.approx(99 / 100)


@pytest.mark.parametrize(("num", "right"), [(5, 0), (5, 2), (5, 5), (4, 1)])
def test_chance_of_one_right_answer_in_k(num: int, right: int) -> None:
    """By going through every choice of k samples."""
    samples = [True] * right + [False] * (num - right)
    for k in range(1, num + 1):
        naive = statistics.fmean(any(chosen) for chosen in itertools.combinations(samples, k))
        assert chance(num, right, k) == pytest.approx(naive)
