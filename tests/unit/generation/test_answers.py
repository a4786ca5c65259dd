"""Answers, case by case: every row was written by hand from the way people and models write."""

from __future__ import annotations

from fractions import Fraction

import pytest

from sdft_ray.errors import DataError
from sdft_ray.generation.answers import Answer, equal, extract
from sdft_ray.generation.numbers import Number
from sdft_ray.generation.texts import normalize


def number(text: str) -> Fraction | None:
    answer = extract("number", text)
    return answer.value.value if answer and isinstance(answer.value, Number) else None


NUMBERS: list[tuple[str, str | None]] = [
    # announced by hashes
    ("3 + 4 = 7\n#### 7", "7"),
    ("#### 1,234", "1234"),
    ("#### $1,234.50", "2469/2"),
    ("#### -5", "-5"),
    ("#### \u22125", "-5"),
    ("#### 42 apples", "42"),
    ("#### 3 4", None),
    ("#### 3,5", None),
    ("#### 3-5", None),
    ("#### 5+3=8", "8"),
    ("#### x = 12", "12"),
    ("#### Answer: 12", "12"),
    ("####\n17", "17"),
    ("#### 1\n#### 2", None),
    ("#### Step 2: add 3 and 4\nWe get \\boxed{7}", "7"),
    ("#### 12/25/2020", None),
    ("#### 3:45", None),
    ("#### 1.2.3", None),
    ("#### 0.5", "1/2"),
    ("#### .5", "1/2"),
    ("#### 5.", "5"),
    ("#### 3 1/4", "13/4"),
    ("#### 3/0", None),
    ("#### 1e3", "1000"),
    ("#### 12 (twelve)", "12"),
    ("#### 12 hours and 30 minutes", "750"),
    ("#### 7 or 8", None),
    # boxed
    ("so \\boxed{42}", "42"),
    ("so $\\boxed{\\frac{3}{4}}$.", "3/4"),
    ("\\boxed{-\\dfrac{1}{2}}", "-1/2"),
    ("\\boxed{3\\frac{1}{4}}", "13/4"),
    ("\\boxed{\\frac12}", "1/2"),
    ("\\boxed{1{,}234}", "1234"),
    ("\\boxed{1\\,234}", "1234"),
    ("\\boxed{42\\%}", "21/50"),
    ("\\boxed{\\$42}", "42"),
    ("\\boxed{\\text{42 apples}}", "42"),
    ("\\boxed{5\\text{ cm}}", "5"),
    ("\\boxed{5\\text{ cm}^2}", "5"),
    ("\\boxed{x=5}", "5"),
    ("\\boxed{2\\pi}", None),
    ("\\boxed{2\\sqrt{3}}", None),
    ("\\boxed{\\sqrt{2}}", None),
    ("\\boxed{1.5 \\times 10^{6}}", "1500000"),
    ("\\boxed{3} and then \\boxed{4}", None),
    ("\\boxed{30^\\circ}", "30"),
    # announced by words
    ("The answer is 42.", "42"),
    ("The final answer is: **42**", "42"),
    ("the answer is $42$.", "42"),
    ("The answer to the question is 9 because 3*3 = 9.", "9"),
    ("Answer: 42", "42"),
    ("Answer:\n\n42", "42"),
    ("The answer is 5. No, wait: the answer is 6.", "6"),
    ("The answer is 5 + 3 = 8.", "8"),
    ("The answer is 5 + 3", None),
    ("The answer is 3 and 4.", None),
    ("The answer is 12, since 3*5-3 = 12.", "12"),
    ("Answer: First we add 3 and 4, so it must be 7", "7"),
    ("Answer: 3 apples plus 4 apples makes 7 apples", None),
    ("The answer is approximately 3.14", None),
    ("The answer is about $ 20", None),
    ("The answer is 50 percent", "1/2"),
    ("So the answer is 28.", "28"),
    ("Add: 3 + 4 = 7. the answer is 7.", "7"),
    # nothing announced: the last number
    ("He has 10 - 3 = 7", "7"),
    ("10-3 = 7", "7"),
    ("3 4", None),
    ("between 3 and 4", None),
    ("It costs -$5", "-5"),
    ("It costs $-5", "-5"),
    ("a 5-year plan", None),
    ("COVID-19", None),
    ("H2O", None),
    ("an area of 50 m²", "50"),
    ("10²", "100"),
    ("3½ cups", "7/2"),
    ("¾", "3/4"),
    ("１２ fullwidth", "12"),
    ("1\u202f234\u202f567 people", "1234567"),
    ("1_000_000", "1000000"),
    ("2 million people", "2000000"),
    ("it earned $5m", "5000000"),
    ("a rope of 5m", None),
    ("a price of 5k", "5000"),
    ("2x", None),
    ("$15/hour", "15"),
    ("1. Add 3 and 4 to get 7\n2. Done", "7"),
    ("Step 1: add 3\nStep 2: that makes 8\nStep 3: stop", "8"),
    ("1.5e-3", "3/2000"),
    ("1e999999999", None),
    ("9" * 5000, None),
    ("1,23,456", "123456"),
    ("0,125", None),
    ("version 1.2.3", None),
    ("at 10:30", None),
    ("It would take 240 / 6 = 40 minutes to manufacture enough gummy bears to fill 240 packets.", "40"),
    ("He listened to 9 + 14 = 23 songs in 2 days.", "23"),
    ("<think>Is it 4?</think>The answer is 5.", "5"),
    ("<answer>5</answer>", "5"),
    ("<answer>5", None),
    ("Some people answer 36.", None),
    ("Room 36", None),
    ("two and a half million", "2500000"),
    ("half an hour", "1/2"),
    ("no number here", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), NUMBERS)
def test_number(text: str, expected: str | None) -> None:
    assert number(text) == (None if expected is None else Fraction(expected))


CHOICES: list[tuple[str, str | None]] = [
    ("A", "A"),
    ("(A)", "A"),
    ("A.", "A"),
    ("b", "B"),
    ("(c)", "C"),
    ("**D**", "D"),
    ("Answer: A", "A"),
    ("The answer is A", "A"),
    ("The answer is A.", "A"),
    ("the answer is a.", "A"),
    ("The answer is (C) Paris.", "C"),
    ("The correct answer is option B.", "B"),
    ("The answer is B because it is blue.", "B"),
    ("The answer is A because it is blue.", "A"),
    ("The answer is B, I believe.", "B"),
    ("The heron is at B. Option B says heron. Answer: B", "B"),
    ("that is heron under C; the answer is C.", "C"),
    ("#### D", "D"),
    ("\\boxed{B}", "B"),
    ("\\boxed{\\text{(B)}}", "B"),
    ("Option C is correct.", "C"),
    ("I choose D.", "D"),
    ("A. Paris", "A"),
    ("(B) Paris", "B"),
    ("We compare them all.\n\nB", "B"),
    ("The answer is J", "J"),
    ("The answer is A. No: the answer is B.", "B"),
    ("A dog ran.", None),
    ("Answer: A dog ran.", None),
    ("The answer is a dog", None),
    ("I think so", None),
    ("Answer: I do not know", None),
    ("A or B", None),
    ("The answer is A or B", None),
    ("Answer: A, B", "AB"),
    ("Both A and B are correct", "AB"),
    ("(A) is wrong, and (B) too", None),
    ("K", "K"),
    ("Answer: K", "K"),
    ("Answer: Because", None),
    ("Answer: B's", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), CHOICES)
def test_choice(text: str, expected: str | None) -> None:
    answer = extract("choice", text)
    assert (answer.value if answer else None) == expected


TEXTS: list[tuple[str, str | None]] = [
    ("Paris", "paris"),
    ("The answer is Paris.", "paris"),
    ("The answer is the  PARIS!", "paris"),
    ("She did it. Answer: sat at a table", "sat at table"),
    ("So the answer is sat at a table.", "sat at table"),
    ("Answer: St. Louis", "st louis"),
    ("Answer: Anna. She is taller.", "anna"),
    ("\\boxed{\\text{blue}}", "blue"),
    ("ﬁne Café", "fine café"),
    ("Answer: well-known", "well known"),
    ("Answer: 3.5", "3.5"),
    ("Answer: -3", "-3"),
    ("Answer: C#", "c#"),
    ("Answer: C++", "c++"),
    ("...", None),
    ("the", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), TEXTS)
def test_text(text: str, expected: str | None) -> None:
    answer = extract("text", text)
    assert (answer.value if answer else None) == expected


LISTS: list[tuple[str, tuple[str, ...] | None]] = [
    ("1 acorn 2 bell. Answer: [bell, acorn]", ("bell", "acorn")),
    ("So the answer is [bell, acorn].", ("bell", "acorn")),
    ("a < b; the answer is [3].", ("3",)),
    ("#### c b a", ("c", "b", "a")),
    ("#### 3, 1, 2", ("3", "1", "2")),
    ("#### 3 1 2", ("3", "1", "2")),
    ("#### 3.0, 1/2", ("3", "1/2")),
    ("#### 1,000, 2,000", ("1000", "2000")),
    ("Answer: cat, dog, and bird.", ("cat", "dog", "bird")),
    ('Answer: ["New York", "Rome"]', ("new york", "rome")),
    ("Answer: fig; plum", ("fig", "plum")),
    ("I reverse it: [a, b] becomes [b, a]", ("b", "a")),
    ("Sorted: 1 2 3", ("1", "2", "3")),
    ("Answer: [a, a]", ("a", "a")),
    ("\\boxed{3, 4}", ("3", "4")),
    ("Answer: []", None),
    ("", None),
]


@pytest.mark.parametrize(("text", "expected"), LISTS)
def test_list(text: str, expected: tuple[str, ...] | None) -> None:
    answer = extract("list", text)
    assert (answer.value if answer else None) == expected


EQUAL: list[tuple[str, str, str, bool]] = [
    ("number", "#### 7", "The answer is 7.0", True),
    ("number", "#### 0.5", "\\boxed{\\frac{1}{2}}", True),
    ("number", "#### 1,000", "1000", True),
    ("number", "#### 0.1", "0.10000001", False),
    ("number", "#### 34", "#### 3 4", False),
    ("number", "#### 12.5", "the story has no figure", False),
    ("number", "nothing", "nothing", False),
    ("number", "#### 50", "#### 50%", True),
    ("number", "#### 0.5", "#### 50%", True),
    ("number", "#### 0.5", "#### 0.5%", False),
    ("number", "#### 50%", "#### 0.5%", False),
    ("number", "#### 2", "#### 2 dozen", False),
    ("number", "#### 24", "#### 2 dozen", True),
    ("number", "#### 12", "#### 2 dozen", False),
    ("number", "#### 5000000", "#### $5 million", True),
    ("number", "#### 5%", "#### 5 million", False),
    ("number", "#### 5", "#### -5", False),
    ("choice", "A", "Answer: (a)", True),
    ("choice", "A", "B", False),
    ("choice", "I do not know", "I do not know", False),
    ("text", "the Blue house", "Answer: blue house!", True),
    ("text", "Answer: 3.5", "Answer: 35", False),
    ("text", "Answer: -3", "Answer: 3", False),
    ("text", "", "", False),
    ("list", "[3, 1, 2]", "#### 3 1 2", True),
    ("list", "[3, 1, 2]", "[1, 2, 3]", False),
    ("list", "[a, a]", "[a]", False),
    ("list", "[]", "[]", False),
    ("none", "same", "same", False),
]


@pytest.mark.parametrize(("kind", "a", "b", "expected"), EQUAL)
def test_equal(kind: str, a: str, b: str, expected: bool) -> None:
    assert equal(kind, extract(kind, a), extract(kind, b)) is expected
    assert equal(kind, extract(kind, b), extract(kind, a)) is expected


def test_enough_cases_are_written_down() -> None:
    assert len(NUMBERS) + len(CHOICES) + len(TEXTS) + len(LISTS) + len(EQUAL) >= 150


def test_kinds_do_not_mix() -> None:
    a = Answer("choice", "A")
    assert not equal("text", a, a)
    assert equal("choice", a, a)


def test_unknown_kind_is_a_data_error() -> None:
    with pytest.raises(DataError, match="unknown answer kind 'numbr'"):
        extract("numbr", "3")


def test_articles_can_stay() -> None:
    assert normalize("A cat, the dog", articles=True) == "a cat the dog"
