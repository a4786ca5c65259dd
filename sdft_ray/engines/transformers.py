"""A transformers model behind asyncio, for machines without vLLM: simple static batching.

A thread takes the waiting requests, decodes them in one batch, and streams tokens to each. Requests that arrive
meanwhile wait for the end of the batch. vLLM has continuous batching and is the engine for many clients.
"""

from __future__ import annotations

import asyncio
import queue
import random
import threading
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sdft_ray.data.chat import load_tokenizer, stop_ids
from sdft_ray.engines.request import AnswerDelta, EngineFailedError, FinishReason, GenerationRequest, TokenScore
from sdft_ray.engines.settings import EngineSettings
from sdft_ray.generation.decoding import batch_steps, choose_tokens, end_token_ids
from sdft_ray.models.loading import load_model
from sdft_ray.models.precision import Precision, precision_of


class TransformersEngine:
    """See `Engine`. Log-probabilities are the model's, before temperature and penalties."""

    precision: Precision | None = None

    def __init__(self, model: Any, tokenizer: Any, settings: EngineSettings) -> None:
        self._model, self._tokenizer = model, tokenizer
        config = model.config.get_text_config()
        self.max_model_tokens: int = settings.max_model_tokens or config.max_position_embeddings
        self.vocab_size: int = config.vocab_size
        self._max_sequences = settings.max_sequences
        self._end_ids = end_token_ids(model, stop_ids(tokenizer))
        self._waiting: queue.SimpleQueue[_Row | None] = queue.SimpleQueue()
        self._error: BaseException | None = None
        self._thread = threading.Thread(target=self._serve, name="transformers-engine", daemon=True)
        self._thread.start()

    @classmethod
    def start(cls, model_dir: str | Path, settings: EngineSettings) -> TransformersEngine:
        """Load model and tokenizer. Raises `ModelError` as `load_model` does."""
        precision = precision_of(settings.dtype, Path(model_dir), kv_cache_bytes=settings.kv_cache_bytes)
        model: Any = load_model(Path(model_dir), precision.dtype)
        device = "cuda" if torch.cuda.is_available() else "cpu"
        engine = cls(model.to(device).eval(), load_tokenizer(model_dir), settings)
        engine.precision = precision
        return engine

    async def answer(self, ask: GenerationRequest) -> AsyncGenerator[AnswerDelta, None]:
        """See `Engine.answer`."""
        self.check()
        row = _Row(ask, asyncio.get_running_loop(), _Text(self._tokenizer, ask.stop))
        self._waiting.put(row)
        pieces: list[AnswerDelta] = []
        try:
            while True:
                piece = await row.pieces.get()
                if isinstance(piece, BaseException):
                    raise EngineFailedError(f"the engine failed: {piece}") from piece
                if ask.stream:
                    yield piece
                else:
                    pieces.append(piece)
                if piece.finish_reason:
                    break
            if pieces:
                yield _joined(pieces)
        finally:
            row.is_cancelled = True

    def check(self) -> None:
        """See `Engine.check`."""
        if self._error is not None:
            raise EngineFailedError(f"the engine failed: {self._error}")

    def close(self) -> None:
        """Finish the waiting requests and stop."""
        self._waiting.put(None)
        self._thread.join()

    def _serve(self) -> None:
        while True:
            rows = [self._waiting.get()]
            time.sleep(0.005)  # requests often arrive together: wait for the rest of the batch
            while len(rows) < self._max_sequences and not self._waiting.empty():
                rows.append(self._waiting.get())
            batch = [row for row in rows if row is not None and not row.is_cancelled]
            try:
                if batch:
                    self._answer(batch)
            except Exception as reason:  # noqa: BLE001  (waiting requests must get the error)
                self._error = reason
                for row in batch:
                    row.put(reason)
                return
            if None in rows:
                return

    @torch.inference_mode()
    def _answer(self, rows: list[_Row]) -> None:
        prompt_scores = [self._prompt_scores(row.ask) for row in rows]
        for row, scores in zip(rows, prompt_scores, strict=True):
            if row.ask.max_tokens == 0:
                row.put(AnswerDelta("", 0, "length", (), scores))
        batch = [row for row in rows if row.ask.max_tokens]
        first = {id(row): scores for row, scores in zip(rows, prompt_scores, strict=True)}
        if not batch:
            return
        running = set(range(len(batch)))
        steps = batch_steps(self._model, [row.ask.prompt_ids for row in batch])
        logits_BV, in_batch = next(steps)
        while True:
            tokens = [self._next(batch[i], logits_BV[place], i in running) for place, i in enumerate(in_batch)]
            for place, i in enumerate(in_batch):
                if i in running:
                    row = batch[i]
                    done = self._take(row, tokens[place], logits_BV[place], first.pop(id(row), ()))
                    if done or row.is_cancelled:
                        running.discard(i)
            if not running:
                return
            logits_BV, in_batch = steps.send((torch.tensor(tokens, device=logits_BV.device), running))

    def _next(self, row: _Row, logits_V: Tensor, is_running: bool) -> int:
        """Sample the next token; penalties apply to the tokens of the answer so far, as in OpenAI's API."""
        if not is_running:
            return 0
        ask = row.ask
        if row.token_ids and (ask.presence_penalty or ask.frequency_penalty):
            logits_V = logits_V.clone()
            used, counts = torch.tensor(row.token_ids, device=logits_V.device).unique(return_counts=True)
            logits_V[used] -= ask.presence_penalty + ask.frequency_penalty * counts
        return int(choose_tokens(logits_V[None], ask, [row.noise])[0])

    def _take(self, row: _Row, token: int, logits_V: Tensor, prompt_scores: tuple[TokenScore, ...]) -> bool:
        """Add a token to an answer and stream its text. True if it was the last one."""
        row.token_ids.append(token)
        scores: tuple[TokenScore, ...] = ()
        if row.ask.top_logprobs is not None:
            scores = (self._score(token, logits_V, row.ask.top_logprobs),)
        reason: FinishReason | None = None
        text = ""
        if token in self._end_ids:
            reason = "stop"
        else:
            text, met_stop = row.text.add(token)
            if met_stop:
                reason = "stop"
            elif len(row.token_ids) == row.ask.max_tokens:
                reason = "length"
        if reason is not None:
            text += row.text.rest()
        row.put(AnswerDelta(text, 1, reason, scores, prompt_scores))
        return reason is not None

    def _prompt_scores(self, ask: GenerationRequest) -> tuple[TokenScore, ...]:
        if ask.prompt_top_logprobs is None:
            return ()
        ids_T = torch.tensor(ask.prompt_ids, device=self._model.device)
        logits_TV = self._model(input_ids=ids_T[None], use_cache=False).logits[0].float()
        scores = [
            self._score(token, logits_V, ask.prompt_top_logprobs)
            for token, logits_V in zip(ask.prompt_ids[1:], logits_TV, strict=False)
        ]
        return (TokenScore("", None), *scores)

    def _score(self, token: int, logits_V: Tensor, num_top: int) -> TokenScore:
        logprobs_V = logits_V.log_softmax(dim=-1)
        top = logprobs_V.topk(min(num_top, len(logprobs_V)))
        pairs = zip(top.indices.tolist(), top.values.tolist(), strict=True)
        return TokenScore(
            self._tokenizer.decode([token]),
            float(logprobs_V[token]),
            tuple((self._tokenizer.decode([index]), value) for index, value in pairs),
        )


class _Text:
    """Incremental detokenization. Text that may be the start of a stop string is buffered."""

    def __init__(self, tokenizer: Any, stops: Sequence[str]) -> None:
        from tokenizers.decoders import DecodeStream

        self._stream = DecodeStream(skip_special_tokens=True)
        self._backend = tokenizer.backend_tokenizer
        self._stops = stops
        self._buffer = ""

    def add(self, token: int) -> tuple[str, bool]:
        """The text that can be streamed now, and whether a stop string was reached; it is not part of the text."""
        self._buffer += self._stream.step(self._backend, token) or ""
        places = [place for stop in self._stops if (place := self._buffer.find(stop)) >= 0]
        if places:
            text, self._buffer = self._buffer[: min(places)], ""
            return text, True
        # Buffer the longest suffix that is a prefix of a stop string.
        longest = max((len(stop) for stop in self._stops), default=1) - 1
        keep = next(
            (n for n in range(min(longest, len(self._buffer)), 0, -1)
             if any(stop.startswith(self._buffer[-n:]) for stop in self._stops)), 0
        )  # fmt: skip
        cut = len(self._buffer) - keep
        text, self._buffer = self._buffer[:cut], self._buffer[cut:]
        return text, False

    def rest(self) -> str:
        """The buffered text, at the end of the answer."""
        text, self._buffer = self._buffer, ""
        return text


@dataclass(eq=False)
class _Row:
    """A request whose client waits in the event loop of another thread."""

    ask: GenerationRequest
    loop: asyncio.AbstractEventLoop
    text: _Text
    pieces: asyncio.Queue[AnswerDelta | BaseException] = field(default_factory=asyncio.Queue)
    token_ids: list[int] = field(default_factory=list)
    is_cancelled: bool = False
    noise: torch.Generator = field(init=False)

    def __post_init__(self) -> None:
        seed = random.getrandbits(63) if self.ask.seed is None else self.ask.seed % 2**63
        self.noise = torch.Generator().manual_seed(seed)

    def put(self, piece: AnswerDelta | BaseException) -> None:
        try:
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, piece)
        except RuntimeError:  # its event loop is closed
            self.is_cancelled = True


def _joined(pieces: Sequence[AnswerDelta]) -> AnswerDelta:
    return AnswerDelta(
        "".join(piece.text for piece in pieces),
        sum(piece.num_tokens for piece in pieces),
        pieces[-1].finish_reason,
        tuple(score for piece in pieces for score in piece.scores),
        pieces[0].prompt_scores,
    )
