"""The answers of the generated tasks, against independent ways of finding them."""

from __future__ import annotations

import random
import re
from collections.abc import Callable

import pytest

from sdft_ray.lab.families import ANNOTATORS, FAMILIES, Item, facts, make_test_item, ordering, scripts
from sdft_ray.lab.families.item import read_answer
from sdft_ray.lab.families.words import pronoun


def _items(family: str, count: int = 200) -> list[Item]:
    rng = random.Random(7)
    return [FAMILIES[family](rng) for _ in range(count)]


@pytest.mark.parametrize("family", FAMILIES)
def test_a_seed_fixes_the_items(family: str) -> None:
    assert _items(family, 20) == _items(family, 20)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_ends_with_the_answer_that_can_be_read_from_it(family: str) -> None:
    for item in _items(family):
        assert len(item.references) == len(ANNOTATORS)
        for text in (item.response, *item.references):
            assert read_answer(item.answer_kind, text) == item.answer, text


@pytest.mark.parametrize("family", FAMILIES)
def test_every_text_shows_its_working(family: str) -> None:
    """More is said before the answer is named at the end."""
    for item in _items(family):
        for text in (item.response, *item.references):
            assert text.rindex(item.answer) > 15, text


@pytest.mark.parametrize("family", [name for name in FAMILIES if _items(name, 1)[0].options])
def test_options_hold_the_answer_once(family: str) -> None:
    golds = set()
    for item in _items(family):
        assert len(set(item.options)) == len(item.options) >= 2
        assert item.options[item.gold] == item.answer
        golds.add(item.gold)
    assert len(golds) >= 2


def test_word_problems_follow_their_story() -> None:
    """Reads the story sentence by sentence, knowing nothing of the working."""
    effects: list[tuple[str, Callable[[int, int], int]]] = [
        (r"(?:buys|finds|gets|picks up) (\d+)", lambda amount, n: amount + n),
        (r"(?:gives away|loses|sells|breaks) (\d+)", lambda amount, n: amount - n),
        (r"makes it (\d+) times", lambda amount, n: amount * n),
        (r"splits them into (\d+)", lambda amount, n: amount // n),
    ]
    for item in _items("word_problems"):
        sentences = item.question.split(". ")
        amount = int(re.search(r"has (\d+)", sentences[0])[1])  # type: ignore[index]
        for sentence in sentences[1:]:
            sentence = sentence.replace("doubles the number", "makes it 2 times")
            sentence = sentence.replace("three times", "3 times")
            for pattern, effect in effects:
                if match := re.search(pattern, sentence):
                    amount = effect(amount, int(match[1]))
        assert str(amount) == item.answer, item.question
        assert 0 <= amount <= 99


def test_every_equation_in_a_text_is_true() -> None:
    for item in _items("word_problems"):
        for text in (item.response, *item.references):
            equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", text)
            assert 2 <= len(equations) <= 5
            for left, sign, right, result in equations:
                a, b = int(left), int(right)
                assert {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign] == int(result)


def test_orderings_follow_from_the_statements() -> None:
    """Tries every permutation: exactly one agrees with the statements."""
    from itertools import permutations

    tops = {most for _, most, _ in ordering.SCALES}
    for item in _items("ordering", 100):
        statements = re.findall(r"(\w+) is \w+ than (\w+)\.", item.question)
        names = sorted({name for pair in statements for name in pair})
        agreeing = [
            order
            for order in permutations(names)
            if all(order.index(high) < order.index(low) for high, low in statements)
        ]
        assert len(agreeing) == 1
        wanted = re.search(r"Who is the (\w+)\?", item.question)[1]  # type: ignore[index]
        assert item.answer == agreeing[0][0 if wanted in tops else -1]


def test_facts_agree_with_myths_and_stay_the_same() -> None:
    told: dict[tuple[str, str], set[str]] = {}
    for item in _items("facts", 1000):
        attribute, town, listed = re.match(r"Which (\w+) belongs to (\w+): (.*)\?", item.question).groups()  # type: ignore[union-attr]
        assert tuple(re.split(", | or ", listed)) == item.options
        told.setdefault((town, attribute), set()).add(item.answer)
    for item in _items("myths", 1000):
        attribute, town = re.search(r"Which (\w+) does (\w+) really", item.question).groups()  # type: ignore[union-attr]
        told.setdefault((town, attribute), set()).add(item.answer)
        assert item.answer not in item.question
    assert all(len(values) == 1 for values in told.values())


def test_rare_towns_are_rare_in_training_and_not_in_tests() -> None:
    rng = random.Random(3)
    last = set(facts.TOWNS[facts.NUM_TOWNS // 2 :])
    trained = sum(facts.draw(rng).town in last for _ in range(2000)) / 2000
    tested = sum(facts.draw(rng, by_renown=False).town in last for _ in range(2000)) / 2000
    assert trained < 0.3 < 0.45 < tested < 0.55
    assert make_test_item("facts", random.Random(1)) != facts.make(random.Random(1))


def test_scripts_go_on_in_order() -> None:
    for item in _items("scripts"):
        events, optional = next(s for s in scripts.SCRIPTS if item.answer in s[0] and _tells(item, s[0]))
        past = [event for event in events if event in item.question]
        here, before = events.index(item.answer), events.index(past[-1])
        assert here == before + 1 or (here == before + 2 and optional == before + 1)


def _tells(item: Item, events: tuple[str, ...]) -> bool:
    return sum(event in item.question for event in events) >= 2


def test_pronouns_are_ambiguous_by_gender() -> None:
    for item in _items("pronouns"):
        assert len({pronoun(name) for name in item.options}) == 1


def test_lists_are_what_was_asked() -> None:
    """Recomputes the result from the question's text alone."""
    for item in _items("lists", 300):
        task, rest = item.question.split(": ", 1)
        words = rest.split(". Put")[0].split(", ")
        got = item.answer.strip("[]").split(", ")
        if task == "Reverse the list":
            expected = list(reversed(words))
        elif task.startswith("Sort"):
            expected = sorted(words)
        elif task.startswith("Take"):
            expected = [words[int(re.search(r"\d+", task)[0]) - 1]]  # type: ignore[index]
        elif task.startswith("Count"):
            expected = [str(words.count(task.split()[3]))]
        else:
            expected = [word for word in words if word != task.split()[1]]
        assert got == expected, item.question
