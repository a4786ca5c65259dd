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

from sdft_ray.data.control import ControlTokens, Piece
from sdft_ray.data.messages import ChatSettings, Prompt, messages_of, with_arguments_as_text
from sdft_ray.data.packing import Document
from sdft_ray.data.turns import (
    ANSWER,
    learn_turn,
    render_frames,
    stand_ins,
    thinking_tokens,
    written_tokens,
)
from sdft_ray.errors import DataError, ModelError


def load_tokenizer(directory: str | Path) -> PreTrainedTokenizerBase:
    """The tokenizer in `directory`: local files only, no remote code. Raises `ModelError`."""
    if not Path(directory).is_dir():
        raise ModelError(f"{directory} is not a directory", "give the directory of a model")
    try:
        return AutoTokenizer.from_pretrained(str(directory), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # tokenizers raises nothing narrower for a damaged file
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise ModelError(
            f"no tokenizer can be loaded from {directory}: {reason}", "copy the tokenizer files of the model"
        ) from error


_RENDERING = (TemplateError, TypeError, ValueError, LookupError, AttributeError)
"""What a template raises that does not take the messages."""
_OPEN_THINKING = re.compile(r"([<\[](?:think|thinking|thought|reason|reasoning)[>\]]|<\|START_THINKING\|>)\s*$", re.I)
"""A thinking block at the end of a prompt, as the families of today write it."""


class ChatFormat:
    """Applies the chat template of a tokenizer; returns token ids and loss masks.

    A prompt is what the model receives: the rendered conversation up to where an answer begins. A document is the
    prompt and what the model then has to write: what the template prints before an answer (an empty thinking block),
    the answer, and the end of the turn, all with loss. A template may render an answered conversation differently, for
    example without a thinking block that the prompt opens: the document begins with the prompt all the same.

    Control tokens are all special tokens and the added tokens that the template prints. In the text of a message they
    are tokenized as text.

    Raises `ModelError` if there is no template, or if it cannot render a plain chat.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase, settings: ChatSettings | None = None) -> None:
        if not getattr(tokenizer, "chat_template", None):
            raise ModelError(
                "the tokenizer has no chat template",
                "use an instruction-tuned model, or add chat_template.jinja beside its tokenizer files",
            )
        self._tokenizer: Any = tokenizer
        self._settings = settings or ChatSettings()
        self._frames = render_frames(lambda messages, prompt: self._render(messages, prompt=prompt))
        names = written_tokens(self._frames, tokenizer)
        self._controls = ControlTokens(tokenizer, names)
        self._turn = learn_turn(self._frames, self._controls)
        thinking = thinking_tokens(self._frames, self._turn, tokenizer)
        self._in_answers = ControlTokens(tokenizer, [name for name in names if name not in thinking])
        eos_id: int | None = self._tokenizer.eos_token_id
        ends = [self._controls.id_of(name) for name in self._controls.names_in(self._turn.end)]
        self._appends_eos = not ends and eos_id is not None
        self.end_ids: tuple[int, ...] = tuple(ends) if ends or eos_id is None else (eos_id,)
        """The control tokens that end an answer in a document, one after another."""
        opener = {self._controls.id_of(self._turn.opener)} if self._turn.opener else set()
        self.stop_ids: frozenset[int] = frozenset({*self.end_ids, *opener, eos_id} - {None})
        """The tokens at which generation stops: those that end an answer, EOS, and what can only open a next turn."""
        if not self.stop_ids:
            raise ModelError(
                "nothing ends an answer: the chat template prints no end of turn, and the tokenizer has no EOS token",
                "set eos_token in tokenizer_config.json",
            )

    @property
    def frame_tokens(self) -> int:
        """Upper bound of the tokens of a question with its answer besides their texts (at most one token per byte)."""
        return max(len(self._frames.prompt.encode()), len(self._frames.answered.encode())) + len(self._turn.lead) + 8

    @property
    def open_thinking(self) -> tuple[str, str] | None:
        """The thinking block that a prompt opens, as what opens it and what an answer has to close it with."""
        found = _OPEN_THINKING.search(self._frames.prompt)
        if found is None:
            return None
        opening = found.group(1)
        return opening, opening.replace("START_", "END_") if "START_" in opening else f"{opening[0]}/{opening[1:]}"

    @property
    def prints_date(self) -> bool:
        """Whether the template asks for the day or the time."""
        template = self._tokenizer.chat_template
        texts = template.values() if isinstance(template, dict) else [template]
        return any("strftime_now" in text for text in texts)

    def spells_control_token(self, text: str) -> bool:
        """Whether a text contains the text of a control token."""
        return self._controls.spelt_in(text) is not None

    def break_control_tokens(self, text: str) -> str:
        """The text with a zero-width space inside each control token, for text that is tokenized elsewhere."""
        return self._controls.broken(text)

    def prompt_text(self, prompt: Prompt) -> str:
        """The rendered conversation up to the start of the answer. Raises `ModelError` as `prompt_ids`."""
        return self._prompt_text(messages_of(prompt))

    def prompt_ids(self, prompt: Prompt) -> list[int]:
        """Token ids of `prompt_text`, with the BOS of the template if it has one.

        Raises `ModelError` for roles or an order that the template rejects, `DataError` for control tokens in a text
        that cannot be distinguished from those of the template.
        """
        messages = messages_of(prompt)
        pieces = self._pieces(messages)
        if pieces is None:
            return self._controls.template_ids(self._prompt_text(messages))
        return self._controls.pieces_ids(pieces)

    def encode(self, prompt: Prompt, response: str) -> Document:
        """One training document: the prompt without loss, then the response and its end of turn with loss.

        White space at the end of the response is removed, and so is what the template prints after the end of the
        turn. A template without an end-of-turn token gets EOS. Control tokens in a text are tokenized as plain text,
        but for those of a thinking block in the response.

        Raises `DataError` if the response is empty, and as `prompt_ids`.
        """
        response = response.rstrip()
        if not response:
            raise DataError("a response is empty", "remove the row, or add a response")
        messages = messages_of(prompt)
        pieces = self._pieces(messages)
        spelt = self._in_answers.spelt_in(response) is not None
        text = self._prompt_text(messages) if pieces is None else ""
        if pieces is None and not spelt:
            begin = self._controls.template_ids(text)
            rest = self._lead_of(messages, text, response) + response + self._turn.end
            written = self._continued(begin, self._controls.template_ids(text + rest), rest)
        else:
            pieces = pieces or [Piece(text, is_template=True)]
            begin = self._controls.pieces_ids(pieces)
            lead = self._lead_of(messages, "".join(piece.text for piece in pieces), response)
            answer = [
                Piece(part, is_template=not number % 2) for number, part in enumerate(self._in_answers.split(response))
            ]
            rest = [Piece(lead, is_template=True), *answer, Piece(self._turn.end, is_template=True)]
            written = self._continued(
                begin, self._controls.pieces_ids([*pieces, *rest]), "".join(piece.text for piece in rest), rest
            )
        if self._appends_eos:
            written = [*written, *self.end_ids]
        return Document(begin + written, [False] * len(begin) + [True] * len(written))

    def encode_sampled(self, prompt: Prompt, response_ids: Sequence[int]) -> Document:
        """A training document from sampled token ids: the prompt without loss, then the ids of the response with loss.

        Tokenizing the text again may give other ids. The last id, which stopped the model, may differ from the end of
        turn of the template: it is replaced by the first token of that. Further tokens of the end are left out, for
        nothing was sampled there.
        """
        begin = self.prompt_ids(prompt)
        written = list(response_ids)
        if self.end_ids and written[-1] not in self.end_ids:
            written[-1] = self.end_ids[0]
        return Document(begin + written, [False] * len(begin) + [True] * len(written))

    def writes_control_tokens(self, response_ids: Sequence[int]) -> bool:
        """Whether a response has a control token before the one that ended it; the text does not show it."""
        return not self._in_answers.ids.isdisjoint(response_ids[:-1])

    def _render(self, messages: list[dict[str, Any]], *, prompt: bool = False) -> str:
        def rendered(turns: list[dict[str, Any]]) -> str:
            return self._tokenizer.apply_chat_template(
                turns, tokenize=False, add_generation_prompt=prompt, **self._settings.for_template()
            )

        turns = self._settings.messages(messages)
        try:
            try:
                return rendered(turns)
            except _RENDERING:
                as_text = with_arguments_as_text(turns)  # which some templates expect
                if as_text == turns:
                    raise
                return rendered(as_text)
        except _RENDERING as error:
            roles = " ".join(str(message.get("role")) for message in messages)
            raise ModelError(
                f"the chat template cannot be rendered for the turns `{roles}`: {error or type(error).__name__}",
                "use turns that the template takes, set `chat` in the recipe, or correct chat_template.jinja; "
                "a template that needs tools or functions cannot be used",
            ) from error

    def _prompt_text(self, messages: list[dict[str, Any]]) -> str:
        if self._turn.prints_header:
            return self._render(messages, prompt=True)
        return self._before_answer(messages) or self._render(messages, prompt=True)

    def _before_answer(self, messages: list[dict[str, Any]]) -> str:
        """The rendered conversation up to an answer that is there; "" if the template leaves the answer out."""
        return self._render([*messages, {"role": "assistant", "content": ANSWER}]).rpartition(ANSWER)[0]

    def _lead_of(self, messages: list[dict[str, Any]], prompt: str, response: str) -> str:
        """What the template prints between this prompt and an answer, where the response does not begin with it.

        A sampled response does, also with a single space; one with more than the template's begins with its own.
        """
        if not self._turn.prints_header or not self._turn.lead:
            return ""
        before = self._before_answer(messages)
        lead = before.removeprefix(prompt) if before.startswith(prompt) else ""
        if not lead.strip():
            return "" if lead and response.startswith(lead) and not response[len(lead)].isspace() else lead
        return "" if response.startswith((lead, lead.split()[0])) else lead

    def _continued(
        self, begin: list[int], whole: list[int], rest: str, pieces: Sequence[Piece] | None = None
    ) -> list[int]:
        """Token ids of `rest`, which follows a prompt; in most tokenizers a part of the `whole` document.

        Where the last token of the prompt merges with what follows, or a tokenizer puts a space before every text,
        `rest` is tokenized by itself: a model that is given the prompt continues it in this way.
        """
        if whole[: len(begin)] == begin:
            return whole[len(begin) :]
        pieces = pieces or [Piece(rest, is_template=True)]
        for anchor in ("", "\n", "."):
            before = self._controls.template_ids(anchor)
            ids = self._controls.pieces_ids([Piece(anchor, is_template=True), *pieces])
            if ids[: len(before)] == before and self._decode(begin + ids[len(before) :]).endswith(rest):
                return ids[len(before) :]
        return self._controls.pieces_ids(pieces)

    def _decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _pieces(self, messages: list[dict[str, Any]]) -> list[Piece] | None:
        """The rendered prompt in pieces, if a message spells a control token; None if none does."""
        contents = [content if isinstance(content := m.get("content"), str) else "" for m in messages]
        token = next((spelt for content in contents if (spelt := self._controls.spelt_in(content))), None)
        if token is None:
            return None
        words = stand_ins(contents)
        framed = [
            {**message, "content": word if content else message.get("content")}
            for message, word, content in zip(messages, words, contents, strict=True)
        ]
        frame, text = self._prompt_text(framed), self._prompt_text(messages)
        plain = _interleave(frame, {w: w for w, c in zip(words, contents, strict=True) if c})
        agrees = plain is not None and self._controls.pieces_ids(plain) == self._controls.template_ids(frame)
        for texts in (contents, [content.strip() for content in contents]) if agrees else ():
            pieces = _interleave(frame, {w: t for w, t, c in zip(words, texts, contents, strict=True) if c})
            if pieces is not None and "".join(piece.text for piece in pieces) == text:
                return pieces
        raise DataError(
            f"a text contains the control token {token}, which this chat template cannot treat as plain text",
            "remove it from the text",
        )


def _interleave(frame: str, texts: Mapping[str, str]) -> list[Piece] | None:
    """A rendering of stand-ins with the texts in their places; None if one is missing or printed twice."""
    if any(frame.count(word) != 1 for word in texts):
        return None
    pieces: list[Piece] = []
    for word in sorted(texts, key=frame.index):
        before, _, frame = frame.partition(word)
        pieces += [Piece(before, is_template=True), Piece(texts[word], is_template=False)]
    return [*pieces, Piece(frame, is_template=True)]


def stop_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokens at which generation stops: those of the chat format, or EOS where there is none that can be used."""
    try:
        return ChatFormat(tokenizer).stop_ids
    except ModelError:
        return end_of_text(tokenizer)


def end_of_text(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The tokenizer's EOS token, if it has one."""
    eos_id: Any = tokenizer.eos_token_id
    return frozenset({eos_id} - {None})
