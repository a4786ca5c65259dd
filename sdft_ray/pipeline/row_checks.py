"""Checks of rows against the teacher's chat format and context, before any worker starts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from sdft_ray.errors import DataError, ModelError
from sdft_ray.recipe.arms import Train
from sdft_ray.recipe.recipe import Recipe
from sdft_ray.recipe.resources import Resources
from sdft_ray.stages.teacher import TeacherModel

if TYPE_CHECKING:
    from sdft_ray.data.chat import ChatFormat


def check_prompts(recipe: Recipe, resources: Resources, teacher: TeacherModel) -> list[str]:
    """Raise `DataError` for a rewriting prompt that exceeds the context with its response, or an example `max_seq_len`.

    No tokenizer makes more tokens than there are bytes, so of a large set only the first rows, those of many bytes,
    those that spell out control tokens, and one with each order of roles are tokenized here. Also for a set of which
    no row could be trained on; `ModelError` for messages that the template does not render. Returns what may surprise
    about the chat template.
    """
    from sdft_ray.data.documents import fits_surely
    from sdft_ray.data.messages import shape_of
    from sdft_ray.data.rows import read_source
    from sdft_ray.generation.checks import check_error
    from sdft_ray.generation.prompts import render_rewrite

    chat, train = teacher.chat, recipe.train
    context = resources.generate.context_tokens or teacher.fetched.context_tokens
    template, max_tokens = recipe.generate.template, recipe.generate.max_tokens
    room = min(context - max_tokens, train.max_seq_len) - len(render_rewrite(template, "", "").encode())
    shapes: set[object] = set()
    any_fits = False
    closing = chat.open_thinking[1] if chat.open_thinking else ""
    num_rows = num_unclosed = 0
    for number, table in enumerate(read_source(recipe.seed_set, check_error, turns=train.turns)):
        for row in table.to_pylist():
            num_rows += 1
            num_unclosed += closing not in row["reference_response"]
            shape = shape_of(row["context"])
            is_short, is_known = fits_surely(chat, row, (row["reference_response"],), room), shape in shapes
            shapes.add(shape)
            any_fits = any_fits or is_short
            if number and is_short and is_known and not _spells_control_token(chat, row):
                continue
            if not is_known:
                _check_rendered(chat, row)
            _check_rewriting_prompt(chat, row, template, max_tokens, context)
            if any_fits and is_known and train.long_examples != "refuse":
                continue
            any_fits = _fits(chat, row, train) or any_fits
    if not any_fits:
        raise DataError(
            f"no row of the seed set fits train.max_seq_len {train.max_seq_len}, and train.long_examples is "
            f"{train.long_examples}, so nothing would be trained on",
            "raise train.max_seq_len",
        )
    return _template_notes(recipe, chat, num_rows, num_unclosed)


def _template_notes(recipe: Recipe, chat: ChatFormat, num_rows: int, num_unclosed: int) -> list[str]:
    notes = []
    if chat.prints_date:
        notes.append(f"the chat template prints the date; in this run it is {recipe.chat.date} (chat.date)")
    if chat.open_thinking and num_unclosed:
        opening, closing = chat.open_thinking
        notes.append(
            f"the chat template opens a thinking block ({opening}), and {num_unclosed:,} of {num_rows:,} references do "
            f"not close it ({closing}): students learn to answer inside it. If the template can leave it out, set "
            "chat.template_arguments, for example enable_thinking: false"
        )
    return notes


def _spells_control_token(chat: ChatFormat, row: Mapping[str, str]) -> bool:
    return chat.spells_control_token(row["instruction"] + row["context"] + row["reference_response"])


def _check_rendered(chat: ChatFormat, row: Mapping[str, str]) -> None:
    """Raise `ModelError` for messages that the template refuses, or leaves out without a word."""
    from sdft_ray.data.messages import left_out_of, messages_of, row_prompt

    try:
        rendered = chat.prompt_text(row_prompt(row))
    except ModelError as reason:
        if not row["context"]:
            raise
        raise ModelError(f"row {row['example_id']}: {reason.message}", reason.hint) from None
    if lost := left_out_of(messages_of(row_prompt(row)), rendered):
        raise ModelError(
            f"row {row['example_id']}: the chat template leaves out {lost}",
            "remove such rows, or use a template that renders these messages",
        )


def _check_rewriting_prompt(
    chat: ChatFormat, row: Mapping[str, str], template: str, max_tokens: int, context: int
) -> None:
    from sdft_ray.data.messages import prompt_of
    from sdft_ray.generation.prompts import render_rewrite

    asked = render_rewrite(template, row["instruction"], row["reference_response"])
    prompt = chat.prompt_ids(prompt_of(asked, row["context"]))
    if len(prompt) + max_tokens > context:
        raise DataError(
            f"row {row['example_id']}: its rewriting prompt has {len(prompt)} tokens, which with "
            f"generate.max_tokens {max_tokens} exceeds the context of {context}",
            "shorten the row, or lower generate.max_tokens",
        )


def _fits(chat: ChatFormat, row: Mapping[str, str], train: Train) -> bool:
    """Whether a row is trained on, cut or whole. Raises `DataError` where the recipe refuses it."""
    from sdft_ray.data.documents import training_documents
    from sdft_ray.data.messages import row_prompt

    prompt, reference = row_prompt(row), row["reference_response"]
    num_tokens = len(chat.encode(prompt, reference).ids)
    if num_tokens <= train.max_seq_len:
        return True
    if train.long_examples == "refuse":
        raise DataError(
            f"row {row['example_id']} has {num_tokens} tokens and train.max_seq_len is {train.max_seq_len}",
            "raise train.max_seq_len, or set train.long_examples to drop or truncate_prompt",
        )
    return not training_documents(chat, [(prompt, reference)], train.max_seq_len, train.long_examples).dropped


def check_calibration(recipe: Recipe, teacher: TeacherModel) -> None:
    """Encode a calibration row of each form (plain text, a question, turns of these roles in this order).

    Raises `DataError` and `ModelError` as `row_documents`.
    """
    from sdft_ray.data.calibration import row_documents
    from sdft_ray.data.messages import shape_of
    from sdft_ray.data.rows import read_source
    from sdft_ray.generation.checks import check_error

    first: dict[object, int] = {}
    for table in read_source(recipe.calibration, check_error):
        rows = zip(table["instruction"].to_pylist(), table["context"].to_pylist(), strict=True)
        new = [
            index
            for index, (instruction, context) in enumerate(rows)
            if first.setdefault((bool(instruction), shape_of(context)), index) == index
        ]
        row_documents(table.take(new), teacher.tokenizer, recipe.calibration.max_tokens, teacher.chat_settings)
