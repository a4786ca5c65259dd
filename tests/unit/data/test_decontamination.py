"""Overlap with test questions: exactly n words, the same words written otherwise, and questions that are short."""

from __future__ import annotations

import unicodedata

import pytest

from sdft_ray.data.decontamination import MIN_WORDS, OverlapIndex, words

QUESTION = "a train leaves the old station at nine and reaches the far coast at noon how fast is it"
N = 13


def contaminated(instruction: str, *questions: str, reference: str = "yes", ngram: int = N) -> bool:
    index = OverlapIndex([(question,) for question in questions], ngram)
    return bool(index.contaminated([instruction], [reference])[0])


def part(first: int, last: int) -> str:
    """Words of the question, 0-based and half-open."""
    return " ".join(QUESTION.split()[first:last])


@pytest.mark.parametrize("start", [0, 3, len(QUESTION.split()) - N])
def test_n_words_in_a_row_are_an_overlap_and_one_fewer_is_none(start: int) -> None:
    assert contaminated(f"Well then {part(start, start + N)} they say", QUESTION)
    assert not contaminated(f"Well then {part(start, start + N - 1)} they say", QUESTION)


def test_a_gap_breaks_the_run() -> None:
    assert not contaminated(f"{part(0, 12)} maybe {part(12, 20)}", QUESTION)


def test_the_reference_is_looked_at_too_and_no_run_crosses_from_one_text_to_the_next() -> None:
    assert contaminated("What?", QUESTION, reference=f"As we know, {part(2, 2 + N)}.")
    assert not contaminated(part(0, 7), QUESTION, reference=part(7, N))
    index = OverlapIndex([(QUESTION,)], N)
    flags = index.contaminated([part(0, 7), part(7, N), QUESTION], ["", "", ""])
    assert flags.tolist() == [False, False, True]


def test_case_punctuation_and_spacing_do_not_count() -> None:
    shouted = QUESTION.upper().replace(" AT ", ",\n\tat --").replace(" AND ", ' "and" ').replace("_", " ")
    assert contaminated(shouted, QUESTION)
    assert words("Don’t PANIC_now: 3.5 km²!") == words("don't panic now 3,5 km2")


def test_unicode_forms_of_a_word_are_one() -> None:
    composed = "Groß wäre die ﬁktive Höhe über dem Straßenniveau in Istanbul １２ km höher?"
    decomposed = unicodedata.normalize("NFD", composed.upper().replace("１２", "12").replace("ﬁ", "fi"))
    assert decomposed.casefold() != composed.casefold()
    assert len(words(composed)) == N
    assert contaminated(decomposed, composed)


def test_a_question_shorter_than_n_counts_as_a_whole() -> None:
    short = part(0, MIN_WORDS)
    assert contaminated(f"Say now: {short}, or so?", short)
    assert contaminated("Say", short, reference=f"well {short} or so")
    assert not contaminated(f"Say now: {part(0, MIN_WORDS - 1)}, or so?", short)


def test_below_the_least_number_of_words_only_the_question_itself_counts() -> None:
    short = part(0, MIN_WORDS - 1)
    assert contaminated(f"{short.title()}?", short)
    assert not contaminated(f"{short} then", short)
    assert not contaminated("Say", short, reference=short)


def test_a_small_n_is_taken_as_it_is() -> None:
    assert contaminated(f"so {part(4, 7)} it is", QUESTION, ngram=3)
    assert not contaminated(f"so {part(4, 6)} it is", QUESTION, ngram=3)


def test_texts_without_words_overlap_with_nothing() -> None:
    assert not contaminated("?!", "...", "", reference="")
    assert not contaminated(QUESTION)
    assert OverlapIndex([], N).contaminated([], []).tolist() == []


def test_questions_are_counted_not_their_texts() -> None:
    assert OverlapIndex([("one text", "another"), ("a third",)], N).num_questions == 2
