"""From a parsed request to an answer: prompt, limits, turns, engine, accounts. Knows neither HTTP nor Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from sdft_ray.data.chat import ChatFormat
from sdft_ray.engines.ask import Ask, Engine, EngineDiedError, Piece, TokenScore
from sdft_ray.errors import DataError, ModelError
from sdft_ray.serving.access import Key
from sdft_ray.serving.admission import Admission, Budgets, RefusedError
from sdft_ray.serving.answers import DONE, Head, Sample, Stream, usage, whole
from sdft_ray.serving.protocol import ApiError, ChatRequest, CompletionRequest
from sdft_ray.serving.settings import Limits

_LONG_TEXT = 20_000
"""Characters from which on a text is tokenized beside the event loop."""


@dataclass
class Served:
    """A model that is served: its engine, its tokenizer, and what the page tells about it."""

    name: str
    engine: Engine
    tokenizer: Any
    chat: ChatFormat | None
    admission: Admission
    fingerprint: str = "fp_unknown"
    created: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    tokenizing: threading.Lock = field(default_factory=threading.Lock)
    """Held by whoever tokenizes: see `Service._tokenize`."""


@dataclass
class Call:
    """One request while it is answered, for logs and metrics."""

    key: Key
    model: str = ""
    num_prompt: int = 0
    num_answer: int = 0
    num_proposed: int = 0
    num_accepted: int = 0
    waited_s: float = 0.0
    began: float = field(default_factory=time.monotonic)
    first_token_s: float | None = None
    """Seconds after `began`."""

    @property
    def usage(self) -> dict[str, Any]:
        """As OpenAI's API tells it."""
        return usage(self.num_prompt, self.num_answer, self.num_proposed, self.num_accepted)


class Service:
    """Answers chat and completion requests of several models."""

    def __init__(self, models: Mapping[str, Served], limits: Limits) -> None:
        self.models = dict(models)
        self.limits = limits
        self.budgets = Budgets()

    def visible(self, key: Key) -> list[Served]:
        """The models that a key may ask."""
        return [model for model in self.models.values() if key.may_ask(model.name)]

    def card(self, model: Served) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        told = {"id": model.name, "object": "model", "created": model.created, "owned_by": "sdft_ray"}
        limits = {"max_model_len": model.engine.max_model_tokens, "max_output_tokens": self._most(model)}
        return {**told, **limits, "has_chat": model.chat is not None, **model.facts}

    def find(self, name: str, key: Key) -> Served:
        """Raises `ApiError` 404 for a model that is not there, or not for this key."""
        model = self.models.get(name)
        if model is None or not key.may_ask(name):
            known = ", ".join(each.name for each in self.visible(key)) or "none"
            raise ApiError(404, f"there is no model {name!r}; models: {known}", code="model_not_found", param="model")
        return model

    async def chat(self, request: ChatRequest, call: Call) -> dict[str, Any] | AsyncIterator[bytes]:
        """One conversation; a stream's first event is there when this returns. Raises `ApiError`."""
        model = self.find(request.model, call.key)
        messages = [{"role": _ROLES.get(turn.role, turn.role), "content": turn.text} for turn in request.messages]
        ids = await self._tokenize(model, lambda: _chat_ids(model, messages), sum(len(m["content"]) for m in messages))
        asks = self._asks(request, model, [ids], request.limit, request.scores, None)
        head = Head.new(model.name, model.fingerprint, is_chat=True)
        return await self._answer(request, model, head, asks, [""] * len(asks), call)

    async def complete(self, request: CompletionRequest, call: Call) -> dict[str, Any] | AsyncIterator[bytes]:
        """Texts or token ids to go on from; otherwise as `chat`."""
        model = self.find(request.model, call.key)
        prompts = request.prompts
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        all_ids = await self._tokenize(model, lambda: [_prompt_ids(model, prompt) for prompt in prompts], size)
        echoed = request.logprobs if request.echo else None
        limit = min(request.limit, self._most(model)) if request.max_tokens is None else request.limit
        asks = self._asks(request, model, all_ids, limit, request.logprobs, echoed)
        before = [""] * len(asks)
        if request.echo:
            told = [prompt if isinstance(prompt, str) else _text(model, prompt) for prompt in prompts]
            before = [text for text in told for _ in range(request.n or 1)]
        head = Head.new(model.name, model.fingerprint, is_chat=False)
        return await self._answer(request, model, head, asks, before, call)

    def _most(self, model: Served) -> int:
        """Tokens that an answer may have at most."""
        return min(model.engine.max_model_tokens, self.limits.max_output_tokens)

    async def _tokenize(self, model: Served, work: Any, size: int) -> Any:
        """Texts to token ids, one request after the other.

        Whether control tokens that a text spells stay text is a state of the tokenizer, not of its call: another text
        in between would change it.
        """

        def alone() -> Any:
            with model.tokenizing:
                return work()

        try:
            if size > _LONG_TEXT or not model.tokenizing.acquire(blocking=False):
                return await asyncio.to_thread(alone)
            try:
                return work()
            finally:
                model.tokenizing.release()
        except (DataError, ModelError) as reason:
            raise ApiError(400, str(reason), code="invalid_prompt") from None

    def _asks(
        self,
        request: ChatRequest | CompletionRequest,
        model: Served,
        all_ids: list[list[int]],
        limit: int | None,
        scores: int | None,
        prompt_scores: int | None,
    ) -> list[Ask]:
        """What the engine is asked, sample by sample. Raises `ApiError` for what does not fit the context."""
        context, most = model.engine.max_model_tokens, self._most(model)
        if limit is not None and limit > most:
            told = f"max_tokens is {limit}, and this model writes at most {most} tokens"
            raise ApiError(400, told, code="invalid_value", param="max_tokens")
        asks, param = [], "messages" if isinstance(request, ChatRequest) else "prompt"
        for ids in all_ids:
            _check_prompt(ids, model, self.limits, param, least=0 if limit == 0 else 1)
            for number in range(request.n or 1):
                asks.append(
                    Ask(
                        prompt_ids=tuple(ids),
                        max_tokens=min(most if limit is None else limit, context - len(ids)),
                        temperature=1.0 if request.temperature is None else request.temperature,
                        top_p=1.0 if request.top_p is None else request.top_p,
                        top_k=request.top_k or 0,
                        presence_penalty=request.presence_penalty or 0.0,
                        frequency_penalty=request.frequency_penalty or 0.0,
                        seed=None if request.seed is None else (request.seed + number) % 2**63,
                        stop=request.stops,
                        top_logprobs=scores,
                        prompt_top_logprobs=prompt_scores,
                        stream=bool(request.stream),
                    )
                )
        return asks

    async def _answer(
        self,
        request: ChatRequest | CompletionRequest,
        model: Served,
        head: Head,
        asks: list[Ask],
        before: list[str],
        call: Call,
    ) -> dict[str, Any] | AsyncIterator[bytes]:
        if len(asks) > model.admission.capacity:
            told = f"{len(asks)} answers are asked for, more than the {model.admission.capacity} taken at a time"
            raise ApiError(400, told, code="invalid_value", param="n")
        try:
            model.admission.check(len(asks))
            self.budgets.admit(call.key)
        except RefusedError as reason:
            raise _too_much(reason) from None
        call.model, call.num_prompt = model.name, sum(len(ask.prompt_ids) for ask in asks[:: request.n or 1])
        pieces = self._pieces(model, asks, call)
        scored = asks[0].top_logprobs is not None
        if not request.stream:
            samples = [Sample(text) for text in before]
            async with aclosing(pieces):
                async for index, piece in pieces:
                    samples[index].add(piece)
            return whole(head, samples, call.usage, scored=scored)
        stream = Stream(head, tells_usage=request.tells_usage, scored=scored)
        first = await anext(pieces)
        return self._events(stream, first, pieces, before, call, tells_usage=request.tells_usage, head=head)

    async def _events(
        self, stream: Stream, first: tuple[int, Piece], pieces: Any, before: list[str], call: Call, **told: Any
    ) -> AsyncIterator[bytes]:
        """Events of a stream whose first piece has come."""
        begun: set[int] = set()

        def written(index: int, piece: Piece) -> bytes:
            if index in begun:
                return stream.piece(index, piece)
            begun.add(index)
            opening = stream.opening(index) if told["head"].is_chat else b""
            return opening + stream.piece(index, piece, before[index])

        async with aclosing(pieces):
            yield written(*first)
            async for index, piece in pieces:
                yield written(index, piece)
        if told["tells_usage"]:
            yield stream.usage(call.usage)
        yield DONE

    async def _pieces(self, model: Served, asks: list[Ask], call: Call) -> AsyncGenerator[tuple[int, Piece], None]:
        """Pieces of all samples as they come; tokens are counted against the key however this ends.

        A task of its own makes them, so that whoever reads may do so from several tasks, and that closing this ends
        the work whatever it waits for.
        """
        ready: asyncio.Queue[tuple[int, Piece] | None] = asyncio.Queue()
        task = asyncio.create_task(self._make(model, asks, call, ready))
        try:
            while (found := await ready.get()) is not None:
                piece = found[1]
                call.num_answer += piece.num_tokens
                call.num_proposed += piece.num_proposed
                call.num_accepted += piece.num_accepted
                if call.first_token_s is None:
                    call.first_token_s = time.monotonic() - call.began
                yield found
            await task
        except TimeoutError:
            told = f"the answer was not done after {self.limits.request_timeout_s:g} s"
            raise ApiError(504, told, code="timeout") from None
        except RefusedError as reason:
            raise _too_much(reason) from None
        except EngineDiedError:
            told = "the engine is being started anew"
            raise ApiError(503, told, code="engine_restarting", retry_after_s=10) from None
        finally:
            self.budgets.spend(call.key, call.num_prompt + call.num_answer)
            task.cancel()  # the account comes first: when the client has left, waiting is cancelled as well
            await asyncio.gather(task, return_exceptions=True)

    async def _make(self, model: Served, asks: list[Ask], call: Call, ready: asyncio.Queue[Any]) -> None:
        """Have all samples answered, each when it is its turn; None comes last."""

        async def sample(index: int, ask: Ask) -> None:
            async with model.admission.slot(call.key.id) as waited_s:
                call.waited_s = max(call.waited_s, waited_s)
                async with aclosing(model.engine.answer(ask)) as pieces:
                    async for piece in pieces:
                        ready.put_nowait((index, _first_named(model, ask, piece)))

        try:
            async with asyncio.timeout(self.limits.request_timeout_s):
                if len(asks) == 1:
                    await sample(0, asks[0])
                else:
                    async with asyncio.TaskGroup() as group:
                        for index, ask in enumerate(asks):
                            group.create_task(sample(index, ask))
        except BaseExceptionGroup as several:
            raise several.exceptions[0] from None
        finally:
            ready.put_nowait(None)


_ROLES = {"developer": "system"}


def _too_much(reason: RefusedError) -> ApiError:
    return ApiError(429, reason.message, code="rate_limit_exceeded", retry_after_s=reason.retry_after_s)


def _chat_ids(model: Served, messages: list[dict[str, str]]) -> list[int]:
    if model.chat is None:
        raise DataError(f"{model.name} has no chat template", "ask /v1/completions")
    return model.chat.conversation_ids(messages)


def _prompt_ids(model: Served, prompt: str | list[int]) -> list[int]:
    """Control tokens that a text spells stay text, as in OpenAI's API; who wants them gives token ids."""
    if not isinstance(prompt, str):
        return prompt
    return model.tokenizer(prompt, split_special_tokens=True)["input_ids"]


def _text(model: Served, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=False)


def _check_prompt(ids: list[int], model: Served, limits: Limits, param: str, *, least: int) -> None:
    context = model.engine.max_model_tokens
    if not ids:
        raise ApiError(400, "the prompt is empty", code="invalid_prompt", param=param)
    if len(ids) + least > context:
        told = f"the prompt has {len(ids)} tokens and the context of {model.name} {context}"
        raise ApiError(400, told, code="context_length_exceeded", param=param)
    if limits.max_prompt_tokens is not None and len(ids) > limits.max_prompt_tokens:
        told = f"the prompt has {len(ids)} tokens, more than the {limits.max_prompt_tokens} allowed here"
        raise ApiError(400, told, code="context_length_exceeded", param=param)
    stray = next((token for token in ids if token >= model.engine.vocab_size), None)
    if stray is not None:
        told = f"token {stray} is outside the vocabulary of {model.name}"
        raise ApiError(400, told, code="invalid_prompt", param=param)


def _first_named(model: Served, ask: Ask, piece: Piece) -> Piece:
    """An engine does not name the first token of a prompt, which has no log-probability."""
    if not piece.prompt_scores:
        return piece
    first = TokenScore(_text(model, [ask.prompt_ids[0]]), None)
    return replace(piece, prompt_scores=(first, *piece.prompt_scores[1:]))
