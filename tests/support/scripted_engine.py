"""An engine whose answers are written beforehand: no model, no chance, and a pace that a test sets."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncGenerator, Callable

from sdft_ray.engines.request import AnswerDelta, EngineFailedError, FinishReason, GenerationRequest
from sdft_ray.models.precision import Precision


class ScriptedEngine:
    """See `Engine`. Tells what `answer` gives, word by word, each word one token with the white space before it.

    Words come `delay_s` apart, the first after `delay_s` as well. An answer longer than `max_tokens` is cut. What
    `answer` raises is raised before the first piece. Stops and log-probabilities are not heeded.

    A test may look at `asked` (every `GenerationRequest` so far) and `running` (answers under way), and set `died` to
    a reason: then `check` and every request fail, from the next word on.
    """

    def __init__(
        self,
        answer: Callable[[GenerationRequest], str] = lambda ask: "Seven.",
        *,
        delay_s: float = 0.0,
        max_model_tokens: int = 256,
        vocab_size: int = 128,
    ) -> None:
        self.precision: Precision | None = None
        self.max_model_tokens = max_model_tokens
        self.vocab_size = vocab_size
        self.asked: list[GenerationRequest] = []
        self.running = 0
        self.died: str | None = None
        self.is_closed = False
        self.delay_s = delay_s
        self._answer = answer

    async def answer(self, ask: GenerationRequest) -> AsyncGenerator[AnswerDelta, None]:
        """See `Engine.answer`."""
        self.check()
        self.asked.append(ask)
        self.running += 1
        try:
            words = re.findall(r"\s*\S+|\s+$", self._answer(ask))
            told = words[: ask.max_tokens]
            reason: FinishReason = "length" if len(words) > len(told) else "stop"
            if not ask.stream:
                await self._pause(len(told))
                yield AnswerDelta("".join(told), len(told), reason)
                return
            for number, word in enumerate(told, 1):
                await self._pause()
                yield AnswerDelta(word, 1, reason if number == len(told) else None)
            if not told:
                yield AnswerDelta("", 0, reason)
        finally:
            self.running -= 1

    def check(self) -> None:
        """See `Engine.check`."""
        if self.died is not None:
            raise EngineFailedError(f"the engine died: {self.died}")

    def close(self) -> None:
        """See `Engine.close`."""
        self.is_closed = True

    async def _pause(self, num_words: int = 1) -> None:
        await asyncio.sleep(self.delay_s * num_words)
        self.check()
