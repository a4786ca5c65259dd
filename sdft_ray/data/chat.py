"""Conversations as token ids, exactly as the model receives them when it is served.

    chat = ChatFormat(load_tokenizer("path/to/model"))
    prompt = chat.prompt_ids("How many legs has a spider?")     # ends where the answer begins
    document = chat.encode("How many legs has a spider?", "Eight.")

A rendered chat template already contains all its control tokens. It is tokenized once and nothing is added: adding the
tokenizer's special tokens as well would give a second BOS.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from sdft_ray.data.messages import Prompt, messages_of
from sdft_ray.data.packing import Document
from sdft_ray.errors import DataError, ModelError

_STAND_INS = ("Qxinstructionxq", "Qxresponsexq")  # letters only: no template strips or splits them


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`: local files only, no remote code. Raises `ModelError`."""
    if not Path(directory).is_dir():
        raise ModelError(f"{directory} is not a directory", "give the directory of a model")
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except (OSError, ValueError, ImportError, KeyError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"no tokenizer can be loaded from {directory}: {reason}", "copy the tokenizer files of the model"
        ) from error


class ChatFormat:
    """Applies the chat template of a tokenizer; returns token ids and loss masks.

    Raises `ModelError` if there is no template, if it cannot be rendered, or if it produces more than one BOS.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the tokenizer has no chat template",
                "use an instruction-tuned model, or add chat_template.jinja beside its tokenizer files",
            )
        self._tokenizer: Any = tokenizer
        self._bos_id: int | None = self._tokenizer.bos_token_id
        self._eos_id: int | None = self._tokenizer.eos_token_id
        self._control_tokens: dict[str, tuple[int, Any]] = {
            str(token): (index, token) for index, token in self._tokenizer.added_tokens_decoder.items() if token.special
        }
        self._control_ids = {index for index, _ in self._control_tokens.values()}
        longest_first = sorted(self._control_tokens, key=len, reverse=True)
        self._control = re.compile("(" + "|".join(map(re.escape, longest_first)) + ")") if longest_first else None
        self._frame = self._render(_messages(*_STAND_INS))
        if any(self._frame.count(stand_in) != 1 for stand_in in _STAND_INS):
            raise ModelError(
                "the chat template does not render each message exactly once",
                "use a template that renders the user and the assistant message",
            )
        self._check_bos(self._plain_ids(self._frame))
        self._num_after_turn, self._append_eos, self._end_id = self._ending()

    @property
    def frame_tokens(self) -> int:
        """Upper bound of the tokens of a conversation besides its texts (which have at most one token per byte)."""
        return len(self._frame.encode()) + 8

    def spells_control_token(self, text: str) -> bool:
        """Whether a text contains the text of a control token."""
        return self._control is not None and self._control.search(text) is not None

    def break_control_tokens(self, text: str) -> str:
        """The text with a zero-width space inside each control token, for text that is tokenized elsewhere."""
        return text if self._control is None else self._control.sub(lambda match: "\u200b".join(_cut(match[0])), text)

    def prompt_text(self, prompt: Prompt) -> str:
        """The rendered conversation up to the start of the answer."""
        return self._render(messages_of(prompt), prompt=True)

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of `prompt_text`, with the BOS of the template if it has one."""
        ids = self._ids(self.prompt_text(prompt), messages_of(prompt), prompt=True)
        self._check_bos(ids)
        return ids

    def conversation_ids(self, messages: Sequence[Mapping[str, str]]) -> list[int]:
        """Token ids of messages with `role` and `content`, up to the start of the next answer.

        Raises `ModelError` for roles or an order that the template rejects, `DataError` for control tokens in a text
        that cannot be distinguished from those of the template.
        """
        turns = [dict(message) for message in messages]
        return self._ids(self._render(turns, prompt=True), turns, prompt=True)

    def encode(self, prompt: Prompt, response: str) -> Document:
        """One training document: the prompt without loss, then the response and its end of turn with loss.

        White space around the response is removed, and so is what the template prints after the end of the turn. A
        template without an end-of-turn token gets EOS. Control tokens in either text are tokenized as plain text.

        Raises `DataError` if the response is empty or its text cannot be distinguished from control tokens,
        `ModelError` if a rendered conversation does not start with exactly the prompt.
        """
        response = response.rstrip()
        if not response:
            raise DataError("a response is empty", "remove the row, or add a response")
        messages = [*messages_of(prompt), {"role": "assistant", "content": response}]
        before = self.prompt_ids(prompt)
        ids = self._ids(self._render(messages), messages)
        if ids[: len(before)] != before:
            raise ModelError(
                "the chat template renders a prompt differently when an answer follows, or the last token of the "
                f"prompt merges with the answer {response[:40]!r}",
                "use a template in which the generation prompt is the start of the assistant turn",
            )
        self._check_bos(ids)
        ids = ids[: len(ids) - self._num_after_turn]
        if self._append_eos and self._eos_id is not None:
            ids = [*ids, self._eos_id]
        return Document(ids, [False] * len(before) + [True] * (len(ids) - len(before)))

    def encode_sampled(self, prompt: Prompt, response_ids: Sequence[int]) -> Document:
        """A training document from sampled token ids: the prompt without loss, then the ids of the response with loss.

        Tokenizing the text again may give other ids. The last id, which stopped the model, may differ from the end of
        turn of the template: it is replaced by that token, so that the document ends like one of `encode`.
        """
        before = self.prompt_ids(prompt)
        written = list(response_ids)
        if self._end_id is not None:
            written[-1] = self._end_id
        return Document(before + written, [False] * len(before) + [True] * len(written))

    def writes_control_tokens(self, response_ids: Sequence[int]) -> bool:
        """Whether a response has a control token before the one that ended it; the text does not show it."""
        return not self._control_ids.isdisjoint(response_ids[:-1])

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        try:
            return self._tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=prompt)
        except (TemplateError, TypeError, ValueError) as error:
            raise ModelError(f"the chat template cannot be rendered: {error}", "correct chat_template.jinja") from error

    def _plain_ids(self, text: str) -> list[int]:
        """Tokenize without adding special tokens."""
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=False)["input_ids"]

    def _text_ids(self, text: str) -> list[int]:
        """Tokenize control tokens in `text` as plain text."""
        if not text:
            return []
        return self._tokenizer(text, add_special_tokens=False, split_special_tokens=True)["input_ids"]

    def _ids(self, text: str, messages: list[dict[str, Any]], *, prompt: bool = False) -> list[int]:
        """Token ids of a rendered conversation, in which only the control tokens of the template are control tokens."""
        contents = [message["content"] for message in messages]
        if self._control is None or not any(self._control.search(content) for content in contents):
            return self._plain_ids(text)
        stand_ins = [_stand_in(number) for number in range(len(contents))]
        placeholders = [{**message, "content": word} for message, word in zip(messages, stand_ins, strict=True)]
        frame = self._render(placeholders, prompt=prompt)
        pieces = re.split("|".join(stand_ins), frame)
        each_once = len(pieces) == len(contents) + 1
        if each_once and self._framed_ids(pieces, stand_ins) == self._plain_ids(frame):
            for texts in (contents, [content.strip() for content in contents]):
                if text == "".join(_interleave(pieces, texts)):
                    return self._framed_ids(pieces, texts)
        token = next(match for content in contents if (match := self._control.search(content)))
        raise DataError(
            f"a text contains the control token {token.group()}, which this chat template cannot treat as plain text",
            "remove it from the text",
        )

    def _framed_ids(self, pieces: list[str], contents: list[str]) -> list[int]:
        """Ids of alternating template pieces and contents; the contents are tokenized without control tokens."""
        assert self._control is not None
        ids: list[int] = []
        text = ""
        swallows_space = False
        for position, part in enumerate(_interleave(pieces, contents)):
            for piece in [part] if position % 2 else self._control.split(part):
                if position % 2 or piece not in self._control_tokens:
                    text += piece
                    continue
                index, token = self._control_tokens[piece]
                text = text.lstrip() if swallows_space else text
                ids += self._text_ids(text.rstrip() if token.lstrip else text)
                ids.append(index)
                text, swallows_space = "", token.rstrip
        return ids + self._text_ids(text.lstrip() if swallows_space else text)

    def _ending(self) -> tuple[int, bool, int | None]:
        """Number of tokens that the template prints after the end of the turn, whether it lacks an end-of-turn token,
        and the token that ends a document.
        """
        answered = self._frame.index(_STAND_INS[1])
        end = self._control.search(self._frame, answered) if self._control else None
        if end is None:
            return 0, True, self._eos_id
        num_after = len(self._plain_ids(self._frame)) - len(self._plain_ids(self._frame[: end.end()]))
        return num_after, False, self._control_tokens[end.group()][0]

    def _check_bos(self, ids: list[int]) -> None:
        if self._bos_id is None:
            return
        doubled = ids[:2] == [self._bos_id] * 2
        if doubled or (self._bos_id != self._eos_id and ids.count(self._bos_id) > 1):
            raise ModelError(
                "the chat template adds more than one BOS token", "remove the extra bos_token from chat_template.jinja"
            )


def _messages(instruction: str, response: str | None = None) -> list[dict[str, str]]:
    messages = [{"role": "user", "content": instruction}]
    if response is not None:
        messages.append({"role": "assistant", "content": response})
    return messages


def _stand_in(number: int) -> str:
    """Letters only, distinct for each number."""
    return "Qx" + "".join(chr(ord("a") + int(digit)) for digit in str(number)) + "xq"


def _cut(token: str) -> tuple[str, str]:
    return token[:1], token[1:]


def _interleave(pieces: list[str], contents: list[str]) -> list[str]:
    """Template, content, template, ... template."""
    assert len(pieces) == len(contents) + 1
    return [part for pair in zip(pieces, [*contents, ""], strict=True) for part in pair][:-1]
