"""Control tokens: what only a chat template may write, and a user's text never becomes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any


@dataclass(frozen=True)
class Piece:
    """A part of a rendered conversation: written by the template, or the text of a message."""

    text: str
    is_template: bool


class ControlTokens:
    """Some added tokens of a tokenizer, special or not, that are tokens in a template's pieces and text elsewhere."""

    def __init__(self, tokenizer: Any, names: Iterable[str]) -> None:
        self._tokenizer = tokenizer
        added = {str(token): (index, token) for index, token in tokenizer.added_tokens_decoder.items()}
        self._tokens: dict[str, tuple[int, Any]] = {name: added[name] for name in names if name in added}
        self.ids = frozenset(index for index, _ in self._tokens.values())
        self._pattern = _any_of(self._tokens)

    @cached_property
    def _backend(self) -> Any:
        """Made when a text first needs it."""
        return _without(self._tokenizer, [name for name, (_, token) in self._tokens.items() if not token.special])

    def id_of(self, name: str) -> int:
        return self._tokens[name][0]

    def spelt_in(self, text: str) -> str | None:
        """The first control token whose text is in `text`."""
        found = self._pattern.search(text) if self._pattern else None
        return found.group() if found else None

    def names_in(self, text: str) -> list[str]:
        """Every control token in `text`, in order."""
        return self._pattern.findall(text) if self._pattern else []

    def split(self, text: str) -> list[str]:
        """Texts and control tokens, alternating; texts at both ends, which may be empty."""
        return self._pattern.split(text) if self._pattern else [text]

    def broken(self, text: str) -> str:
        """The text with a zero-width space inside each control token, for text that is tokenized elsewhere."""
        return self._pattern.sub(lambda match: match[0][:1] + "\u200b" + match[0][1:], text) if self._pattern else text

    def template_ids(self, text: str) -> list[int]:
        """Token ids of a text in which control tokens are tokens; nothing is added."""
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]

    def text_ids(self, text: str) -> list[int]:
        """Token ids of a text in which no control token is one; nothing is added."""
        if not text:
            return []
        if self.spelt_in(text) is not None and self._backend is not None:
            return self._backend.encode(text, add_special_tokens=False).ids
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def pieces_ids(self, pieces: Sequence[Piece]) -> list[int]:
        """Token ids of pieces in order, which are tokenized together between two control tokens of the template."""
        ids: list[int] = []
        text, swallows_space = "", False
        for piece in pieces:
            for number, part in enumerate(self.split(piece.text) if piece.is_template else [piece.text]):
                if not number % 2:
                    text += part
                    continue
                index, token = self._tokens[part]
                text = text.lstrip() if swallows_space else text
                ids += self.text_ids(text.rstrip() if token.lstrip else text)
                ids.append(index)
                text, swallows_space = "", token.rstrip
        return ids + self.text_ids(text.lstrip() if swallows_space else text)


def _any_of(names: Iterable[str]) -> re.Pattern[str] | None:
    longest_first = sorted(names, key=len, reverse=True)
    return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None


def _without(tokenizer: Any, names: Sequence[str]) -> Any:
    """A copy of the tokenizer's backend that splits `names` and special tokens; None where the tokenizer does it.

    A tokenizer splits its special tokens on request, and no others.
    """
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is None or not names:
        return None
    from tokenizers import Tokenizer

    content = json.loads(backend.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["special"] or token["content"] in names
    copy = Tokenizer.from_str(json.dumps(content))
    copy.encode_special_tokens = True
    copy.no_truncation()
    copy.no_padding()
    return copy
