"""The index of hashes against plain lists of words."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from sdft_ray.data.decontamination import MIN_WORDS, OverlapIndex

# Few words, so that long runs are shared often.
texts = st.lists(st.sampled_from("ab"), max_size=14).map(" ".join)
rows = st.lists(st.tuples(texts, texts), max_size=6)


def _holds(text: list[str], gram: list[str]) -> bool:
    return any(text[i : i + len(gram)] == gram for i in range(len(text) - len(gram) + 1))


def _naive(instruction: list[str], reference: list[str], question: list[str], ngram: int) -> bool:
    if not question:
        return False
    if len(question) < min(MIN_WORDS, ngram):
        return instruction == question
    length = min(ngram, len(question))
    grams = [question[i : i + length] for i in range(len(question) - length + 1)]
    return any(_holds(text, gram) for text in (instruction, reference) for gram in grams)


@settings(deadline=None)
@given(st.lists(texts, max_size=4), rows, st.integers(1, 15))
def test_equal_to_the_naive_search(questions: list[str], rows: list[tuple[str, str]], ngram: int) -> None:
    index = OverlapIndex([(question,) for question in questions], ngram)
    expected = [any(_naive(i.split(), r.split(), q.split(), ngram) for q in questions) for i, r in rows]
    found = index.contaminated([i for i, _ in rows], [r for _, r in rows])
    assert found.tolist() == expected


@settings(deadline=None)
@given(rows)
def test_rows_together_and_one_by_one_give_the_same(rows: list[tuple[str, str]]) -> None:
    index = OverlapIndex([("a b a a b b a b b", "b b a")], 5)
    together = index.contaminated([i for i, _ in rows], [r for _, r in rows]).tolist()
    assert together == [bool(index.contaminated([i], [r])[0]) for i, r in rows]
