"""The rewriting prompt."""

from __future__ import annotations

import pytest

from sdft_ray.errors import RecipeError
from sdft_ray.generation.prompts import OWN_WORDS, TEMPLATES, render_rewrite, resolve_template
from sdft_ray.lab.families.item import rewrite_prompt


def test_default_is_what_the_laboratory_teacher_was_trained_on() -> None:
    assert render_rewrite("own_words", "How many?", "Seven.") == (
        "How many?\n\nReference: Seven.\n\nAnswer in your own words."
    )
    assert render_rewrite(OWN_WORDS, "How many?", "Seven.") == rewrite_prompt("How many?", "Seven.")


def test_braces_and_fields_in_data_are_data() -> None:
    instruction, reference = "Format {x} and {reference} with {}", "{instruction} {0!r} {{}}"
    rendered = render_rewrite("{instruction}|{reference}|{other}", instruction, reference)
    assert rendered == f"{instruction}|{reference}|{{other}}"


@pytest.mark.parametrize("name", TEMPLATES)
def test_shipped_templates_show_both_fields_once(name: str) -> None:
    rendered = render_rewrite(name, "<I>", "<R>")
    assert rendered.count("<I>") == rendered.count("<R>") == 1
    assert "{" not in rendered


def test_only_the_short_template_says_reference() -> None:
    assert "reference" not in TEMPLATES["own_words_detailed"].replace("{reference}", "").lower()


@pytest.mark.parametrize(
    ("template", "message", "hint"),
    [
        ("own_word", "unknown rewriting template 'own_word'", "own_words"),
        ("zzz", "unknown rewriting template 'zzz'", "own_words, own_words_detailed"),
        ("Say it again: {instruction}", "lacks {reference}", "needs both"),
        ("Rewrite {reference}", "lacks {instruction}", "needs both"),
        ("Rewrite\nit", "lacks {instruction} and {reference}", "needs both"),
    ],
)
def test_template_without_both_fields_is_refused(template: str, message: str, hint: str) -> None:
    with pytest.raises(RecipeError) as caught:
        resolve_template(template)
    assert message in caught.value.message
    assert hint in caught.value.hint
