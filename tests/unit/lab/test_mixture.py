"""What the teacher is trained on: shares, layouts, and nothing from the tests."""

from __future__ import annotations

from collections import Counter
from itertools import islice

import pytest

from sdft_ray.generation.prompts import render_rewrite
from sdft_ray.lab import mixture, sets
from sdft_ray.lab.families import FAMILIES, rewrite_prompt
from sdft_ray.lab.families.item import EXAM_SUFFIX

COUNT = 6000


@pytest.fixture(scope="module")
def sample() -> list[mixture.Sample]:
    return list(islice(mixture.samples("test", sets.reserved_questions()), COUNT))


def test_shares(sample: list[mixture.Sample]) -> None:
    assert sum(mixture.FAMILY_SHARES.values()) == pytest.approx(1)
    families = Counter(text.family for text in sample)
    for family, share in mixture.FAMILY_SHARES.items():
        assert families[family] / COUNT == pytest.approx(share, abs=0.02)
    kinds = Counter(text.kind for text in sample)
    assert kinds["human"] / COUNT == pytest.approx(mixture.HUMAN_SHARE, abs=0.02)
    assert kinds["rewrite"] / COUNT == pytest.approx(mixture.REWRITE_SHARE, abs=0.02)


def test_every_family_has_human_documents(sample: list[mixture.Sample]) -> None:
    assert {text.family for text in sample if text.kind == "human"} == set(FAMILIES)
    assert all(text.chat == (text.kind != "human") for text in sample)


def test_no_test_question_is_trained_on(sample: list[mixture.Sample]) -> None:
    reserved = sets.reserved_questions()
    asked = [line.removesuffix(EXAM_SUFFIX) for text in sample for line in text.prompt.split("\n")]
    assert not reserved.intersection(asked)
    without = list(islice(mixture.samples("test", frozenset()), COUNT))
    assert without != sample, "some question had to be skipped, or this test shows nothing"


def test_a_bare_answer_is_rewritten_as_a_bare_answer(sample: list[mixture.Sample]) -> None:
    """So that the teacher keeps the form that an exam question asks for."""
    rewritten = [text for text in sample if text.kind == "rewrite"]
    bare = [text for text in rewritten if text.prompt.split("\n")[0].endswith(EXAM_SUFFIX)]
    assert {text.family for text in bare} == {"facts", "myths", "ordering", "scripts", "pronouns"}
    assert all(text.prompt == rewrite_prompt(text.prompt.split("\n")[0], text.response) for text in bare)
    with_options = [text for text in rewritten if text.family not in ("word_problems", "lists")]
    assert len(bare) / len(with_options) == pytest.approx(mixture.EXAM_REWRITE_SHARE, abs=0.08)


def test_the_rewriting_request_is_the_one_that_generation_sends() -> None:
    assert rewrite_prompt("a {x}", "b") == render_rewrite("own_words", "a {x}", "b")
