"""Checks that every token id has a row in the embedding table, and that two models have the same tokenizer; from files,
without loading the tokenizer.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from sdft_ray.errors import ModelError
from sdft_ray.models.json_file import read_json_object

_ROLES = ("bos_token", "eos_token", "pad_token", "unk_token")
_VOCABULARIES = ("tokenizer.json", "*.model", "*.tiktoken", "vocab*.json", "vocab*.txt", "merges*.txt", "tekken*.json")
"""Files with the entries of a tokenizer, one or several of which each has."""
_LIKELY_CAUSE = "use the model's own tokenizer, or resize its embeddings to the tokenizer"


def check_vocabulary(directory: Path, num_rows: int) -> None:
    """Raise `ModelError` if the tokenizer in `directory` can produce an id of `num_rows` or more.

    A special token beyond the table passes if no ordinary text can produce it: it has no role (BOS, EOS,
    padding, unknown) and is not in a chat template. Gemma 3 1B has such a token for images.
    """
    path = directory / "tokenizer.json"
    if not path.is_file():
        _check_loaded(directory, num_rows)
        return
    tokenizer = read_json_object(path)
    highest = _highest_id(tokenizer, path)
    if highest >= num_rows:
        raise ModelError(f"the tokenizer has {highest + 1} entries, the embedding table {num_rows} rows", _LIKELY_CAUSE)
    roles, templates = _used_texts(directory)
    for token in tokenizer.get("added_tokens") or []:
        content, token_id = str(token.get("content")), token.get("id")
        producible = not token.get("special") or content in roles or content in templates
        if isinstance(token_id, int) and token_id >= num_rows and producible:
            raise ModelError(
                f"the tokenizer's {content!r} has id {token_id}, but the embedding table has {num_rows} rows",
                _LIKELY_CAUSE,
            )


def check_same_tokenizer(first: Path, second: Path, hint: str) -> None:
    """Raise `ModelError` with `hint` unless both models have the same tokenizer files.

    The lengths of their embedding tables may differ: rows beyond the ids of the tokenizer are padding.
    """
    for name in sorted(_vocabularies(first) | _vocabularies(second)):
        contents = [path.read_bytes() if path.is_file() else None for path in (first / name, second / name)]
        if contents[0] != contents[1]:
            raise ModelError(f"{first} and {second} have different tokenizers: {name} differs", hint)


def _vocabularies(directory: Path) -> set[str]:
    return {path.name for pattern in _VOCABULARIES for path in directory.glob(pattern) if path.is_file()}


def _used_texts(directory: Path) -> tuple[set[str], str]:
    """The special tokens with a role, and the text of the chat templates."""
    settings_file, template_file = directory / "tokenizer_config.json", directory / "chat_template.jinja"
    settings = read_json_object(settings_file) if settings_file.is_file() else {}
    templates = json.dumps(settings.get("chat_template") or "", ensure_ascii=False)
    if template_file.is_file():
        templates += template_file.read_text(encoding="utf-8")
    roles: set[str] = set()
    for role in _ROLES:
        value = settings.get(role)
        content = value.get("content") if isinstance(value, dict) else value
        if isinstance(content, str):
            roles.add(content)
    return roles, templates


def _highest_id(tokenizer: dict[str, Any], path: Path) -> int:
    """Highest id of the vocabulary proper; added tokens may lie above it."""
    model = tokenizer.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict) and vocabulary:
        return max(vocabulary.values())
    if isinstance(vocabulary, list) and vocabulary:  # Unigram: a list of (token, score), the id is the position
        return len(vocabulary) - 1
    raise ModelError(f"{path} holds no vocabulary", "download that file again")


def _check_loaded(directory: Path, num_rows: int) -> None:
    """For tokenizers without tokenizer.json (SentencePiece only): load the tokenizer and use its vocabulary."""
    if not _vocabularies(directory) and not (directory / "tokenizer_config.json").is_file():
        raise ModelError(f"{directory} holds no tokenizer", "put the model's tokenizer.json beside its weights")
    from transformers import AutoTokenizer

    try:
        tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
    except (OSError, ValueError, ImportError) as reason:
        first_line = str(reason).strip().partition("\n")[0]
        raise ModelError(
            f"cannot load the tokenizer in {directory}: {first_line}",
            "put the model's tokenizer.json beside its weights",
        ) from None
    highest = max(tokenizer.get_vocab().values())
    if highest >= num_rows:
        raise ModelError(f"the tokenizer has {highest + 1} entries, the embedding table {num_rows} rows", _LIKELY_CAUSE)
