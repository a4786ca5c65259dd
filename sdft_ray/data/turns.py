"""What a chat template prints around an answer, learnt by rendering words that no template knows.

A conversation with an answer is `before ANSWER after`. Of `after`, the end of the turn is what comes first: the first
control token, those that follow it without text between, and the text before them. Whatever opens the next turn is no
part of it, though some templates print that after every answer.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from sdft_ray.data.control import ControlTokens
from sdft_ray.errors import ModelError

Messages = list[dict[str, Any]]
Render = Callable[[Messages, bool], str]
"""From messages, and whether to add the generation prompt, to text. Raises `ModelError`."""

QUESTION, ANSWER, FOLLOW_UP = "Qxinstructionxq", "Qxresponsexq", "Qxfollowxq"  # no template strips or splits letters


@dataclass(frozen=True)
class Frames:
    """Renderings of made-up words; `continued` is "" where the template refuses a second question."""

    plain: str
    """A question, without generation prompt."""
    prompt: str
    """A question, with generation prompt."""
    answered: str
    continued: str
    """A question, its answer, and another question."""

    @property
    def before_question(self) -> str:
        return self.answered.partition(QUESTION)[0]

    @property
    def before_answer(self) -> str:
        return self.answered.partition(ANSWER)[0]

    @property
    def after_answer(self) -> str:
        return self.answered.partition(ANSWER)[2]

    @property
    def between_turns(self) -> str:
        """From an answer to the next question."""
        return self.continued.partition(ANSWER)[2].partition(FOLLOW_UP)[0]


@dataclass(frozen=True)
class Turn:
    """How an answer ends, and where the prompt stops.

    `end` is the text of the end of turn; without a control token where the template prints none. `opener`: the control
    token that begins the next turn, where nothing else ends an answer. `prints_header` is False for a template that
    ignores `add_generation_prompt`: the header of the answer is then taken from an answered conversation. `lead` is
    what the template prints between a prompt and its answer, such as an empty thinking block.
    """

    end: str
    opener: str
    prints_header: bool
    lead: str


def render_frames(render: Render) -> Frames:
    """Raises `ModelError` for a template that cannot render a plain chat or leaves out a message."""
    question = {"role": "user", "content": QUESTION}
    dialogue = [question, {"role": "assistant", "content": ANSWER}]
    frames = Frames(
        render([question], False),
        render([question], True),
        render(dialogue, False),
        _or_nothing(render, [*dialogue, {"role": "user", "content": FOLLOW_UP}]),
    )
    for text, words in ((frames.prompt, [QUESTION]), (frames.answered, [QUESTION, ANSWER])):
        if any(text.count(word) != 1 for word in words):
            raise ModelError(
                "the chat template does not render each message exactly once",
                "use a template that renders the user and the assistant message",
            )
    return frames


def _or_nothing(render: Render, messages: Messages) -> str:
    try:
        return render(messages, False)
    except ModelError:
        return ""


def learn_turn(frames: Frames, controls: ControlTokens) -> Turn:
    """Read off the renderings how the template frames an answer."""
    end, opener = _end(frames, controls)
    lead = frames.before_answer.removeprefix(frames.prompt)
    if lead == frames.before_answer:
        return Turn(end, opener, True, "")
    if _is_header(lead, frames, controls):
        return Turn(end, opener, False, "")
    return Turn(end, opener, True, lead)


def _end(frames: Frames, controls: ControlTokens) -> tuple[str, str]:
    """The end of the turn, or "", and the token that opens the next turn where there is no end."""
    openers = _openers(frames.before_question, controls)
    after, between = frames.after_answer, frames.between_turns
    if controls.names_in(after):
        end = _first_run(after, openers, controls)
        # A last turn may be followed by what ends a whole conversation.
        shared = _first_run(_common_prefix(end, between), openers, controls)
        return shared or end, ""
    found = controls.names_in(between)
    openers.update(controls.names_in(frames.before_question)[-1:])
    if found and found[0] not in openers:
        return _first_run(between, openers, controls), ""
    return _common_prefix(after, between) if frames.continued else after, found[0] if found else ""


def _openers(before_question: str, controls: ControlTokens) -> set[str]:
    """Control tokens that begin a turn: the first in a conversation, and one right after it, for that may be a BOS."""
    parts = controls.split(before_question)
    return set(parts[1:2] if parts[2:3] != [""] else parts[1:4:2])


def _first_run(text: str, openers: set[str], controls: ControlTokens) -> str:
    """`text` up to the first control token and those that follow it at once, but for one that opens a turn; or ""."""
    parts = controls.split(text)
    if len(parts) == 1:
        return ""
    run = parts[0] + parts[1]
    for gap, token in zip(parts[2::2], parts[3::2], strict=False):
        if gap or token in openers:
            break
        run += token
    return run


def _common_prefix(first: str, second: str) -> str:
    length = next((i for i, (a, b) in enumerate(zip(first, second, strict=False)) if a != b), None)
    return first[: min(len(first), len(second)) if length is None else length]


def _is_header(lead: str, frames: Frames, controls: ControlTokens) -> bool:
    """Whether what lies between prompt and answer is the header of the answer, which the prompt should have had.

    White space is part of the answer, for a model writes it. So is a thinking block, which some templates put there.
    """
    if frames.prompt != frames.plain or not lead.strip():
        return False
    after_question = frames.prompt.partition(QUESTION)[2].strip()
    names = controls.names_in(lead)
    has_opener = not _openers(frames.before_question, controls).isdisjoint(names)
    return not names or has_opener or after_question in ("", frames.after_answer.strip())


def written_tokens(frames: Frames, tokenizer: Any) -> list[str]:
    """Control tokens: every special token, and the added ones that the template prints."""
    printed = "\n".join((frames.plain, frames.prompt, frames.answered, frames.continued))
    added = tokenizer.added_tokens_decoder.values()
    return [str(token) for token in added if token.special or (str(token).strip() and str(token) in printed)]


def thinking_tokens(frames: Frames, turn: Turn, tokenizer: Any) -> list[str]:
    """Added tokens, not special, that a model itself may write at the start of an answer, such as `<think>`.

    They stand between the header of an answer and the answer: in the lead, or in the generation prompt of the last
    answer alone.
    """
    header = frames.continued.partition(QUESTION)[2].partition(ANSWER)[0]
    opened = frames.prompt.partition(QUESTION)[2]
    plain = [str(token) for token in tokenizer.added_tokens_decoder.values() if not token.special]
    return [name for name in plain if name in turn.lead or (header and name in opened and name not in header)]


def stand_ins(texts: Sequence[str]) -> list[str]:
    """A word of letters for each text, which none of the texts has."""
    words = []
    for number in range(len(texts)):
        word = "Qx" + "".join(chr(ord("a") + int(digit)) for digit in str(number)) + "xq"
        while any(word in text for text in texts):
            word += "xq"
        words.append(word)
    return words
