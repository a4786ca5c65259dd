"""Answers, for all inputs: numbers survive every way of writing, and nothing makes extraction fail."""

from __future__ import annotations

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.generation.answers import equal, extract
from sdft_ray.generation.numbers import Number
from sdft_ray.generation.selection import select

PATIENT = settings(deadline=None)  # machines may be busy
INTEGERS = st.integers(-(10**15), 10**15)
# Written into a number's place, these neither touch it nor announce anything themselves.
FRAMES = st.sampled_from(
    [
        "{}", "#### {}", "First 3 + 4.\n#### {}", "\\boxed{{{}}}", "The answer is {}.", "Answer: **{}**",
        "Answer:\n{}", "We take 17 and get {}", "so $x = {}$", "the answer is {}, because 2 + 2 is 4",
    ]
)  # fmt: skip


def integer_styles(n: int) -> list[str]:
    sign, size = ("-" if n < 0 else ""), abs(n)
    grouped = f"{size:,}"
    return [
        f"{sign}{size}", f"{sign}{grouped}", f"{sign}{size}.0", f"{sign}{size}.", f"{sign}${grouped}",
        f"{sign}{grouped.replace(',', chr(0x202F))}", f"{sign}{grouped.replace(',', '{,}')}",
        f"{sign}{size} apples", f"\u2212{size}" if n < 0 else f"+{size}", f"{sign}{size}e0",
        f"{sign}{size}/1",
    ]  # fmt: skip


def value_in(text: str) -> Fraction | None:
    answer = extract("number", text)
    return answer.value.value if answer and isinstance(answer.value, Number) else None


@PATIENT
@given(INTEGERS, st.integers(0, 10), FRAMES)
def test_integers_come_back(n: int, style: int, frame: str) -> None:
    text = frame.format(integer_styles(n)[style]).replace("..", ".")  # two would say that a text trails off
    assert value_in(text) == n


@PATIENT
@given(st.integers(-(10**9), 10**9), st.integers(1, 6), FRAMES)
def test_decimals_come_back(units: int, places: int, frame: str) -> None:
    sign, size = ("-" if units < 0 else ""), abs(units)
    text = f"{sign}{size // 10**places:,}.{size % 10**places:0{places}d}"
    assert value_in(frame.format(text)) == Fraction(units, 10**places)


@PATIENT
@given(st.integers(-(10**6), 10**6), st.integers(1, 10**6), st.booleans(), FRAMES)
def test_fractions_come_back(a: int, b: int, latex: bool, frame: str) -> None:
    sign = "-" if a < 0 else ""
    text = f"{sign}\\frac{{{abs(a)}}}{{{b}}}" if latex else f"{a}/{b}"
    assert value_in(frame.format(text)) == Fraction(a, b)


@PATIENT
@given(st.integers(1, 10**6), st.integers(2, 500), st.data(), FRAMES)
def test_mixed_numbers_come_back(whole: int, denominator: int, data: st.DataObject, frame: str) -> None:
    numerator = data.draw(st.integers(1, denominator - 1))
    text = data.draw(st.sampled_from(["{} {}/{}", "{}\\frac{{{}}}{{{}}}"])).format(whole, numerator, denominator)
    assert value_in(frame.format(text)) == whole + Fraction(numerator, denominator)


@PATIENT
@given(st.integers(-(10**6), 10**6), st.integers(0, 4), FRAMES)
def test_percentages_come_back(units: int, places: int, frame: str) -> None:
    sign, size = ("-" if units < 0 else ""), abs(units)
    figure = f"{size // 10**places}" + (f".{size % 10**places:0{places}d}" if places else "")
    assert value_in(frame.format(f"{sign}{figure}%")) == Fraction(units, 100 * 10**places)


@PATIENT
@given(
    st.integers(-999, 999),
    st.integers(-30, 30),
    st.sampled_from(["{}e{}", "{} × 10^{}", "{} \\times 10^{{{}}}"]),
)
def test_scientific_notation_comes_back(figure: int, exponent: int, style: str) -> None:
    assert value_in("#### " + style.format(figure, exponent)) == figure * Fraction(10) ** exponent


@PATIENT
@given(st.integers(0, 999), st.integers(0, 999), st.sampled_from([" ", ",", ", ", "-", ":", " or ", " and "]))
def test_two_numbers_are_never_glued_into_one(a: int, b: int, between: str) -> None:
    found = value_in(f"#### {a}{between}{b}")
    thousands = between in (",", " ") and a > 0 and b >= 100
    assert found == (a * 1000 + b if thousands else None)


@PATIENT
@given(st.fractions(), st.fractions())
def test_equality_is_exact(a: Fraction, b: Fraction) -> None:
    left, right = extract("number", f"#### {a}"), extract("number", f"#### {b}")
    assert equal("number", left, right) is (a == b)


TEXT = st.text(st.characters(codec="utf-8"), max_size=200)
PIECES = st.lists(
    st.sampled_from(
        [
            "#### ",
            "answer is ",
            "\\boxed{",
            "}",
            "\n",
            "A",
            "(B)",
            "3",
            ",",
            ".",
            "/",
            "^",
            "%",
            "-",
            "$",
            " ",
        ]
    )
    | st.text(max_size=3),
    max_size=30,
).map("".join)
KINDS = st.sampled_from(["number", "choice", "text", "list"])


@settings(max_examples=300, deadline=None)
@given(KINDS, TEXT | PIECES)
def test_extraction_never_fails_and_equals_itself(kind: str, text: str) -> None:
    answer = extract(kind, text)
    assert equal(kind, answer, answer) is (answer is not None)


@PATIENT
@given(KINDS, TEXT | PIECES, TEXT | PIECES)
def test_no_answer_never_equals_anything(kind: str, a: str, b: str) -> None:
    assert not equal(kind, None, extract(kind, a))
    assert not equal(kind, extract(kind, b), None)


@PATIENT
@given(
    TEXT,
    TEXT,
    TEXT,
    st.sampled_from(["stop", "length", "error"]),
    KINDS | st.sampled_from(["json", "function_call", "none"]),
)
def test_selection_returns_one_of_the_two(instruction: str, reference: str, own: str, reason: str, kind: str) -> None:
    row = {"instruction": instruction, "reference_response": reference, "answer_kind": kind, "check": ""}
    chosen = select(row, own, reason)
    assert chosen.response == (own.rstrip() if chosen.source == "distilled" else reference)
    assert (chosen.reason == "kept") is (chosen.source == "distilled")
    assert chosen.source == "reference" or reason == "stop"
