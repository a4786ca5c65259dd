"""From a parsed request to an answer: tokenize, check limits, queue, generate, count tokens. No HTTP, no Ray."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import aclosing
from dataclasses import dataclass, field, replace
from typing import Any

from sdft_ray.data.chat import ChatFormat
from sdft_ray.engines.request import AnswerDelta, Engine, EngineFailedError, GenerationRequest, TokenScore
from sdft_ray.errors import DataError, ModelError
from sdft_ray.serving.access import Key
from sdft_ray.serving.admission import Admission, Budgets, RefusedError
from sdft_ray.serving.answers import DONE, ResponseHeader, Sample, Stream, usage, whole
from sdft_ray.serving.protocol import ApiError, ChatRequest, CompletionRequest
from sdft_ray.serving.settings import Limits

_LONG_TEXT = 20_000
"""Texts with more characters are tokenized in a thread, so that the event loop is not blocked."""

_ROLES = {"developer": "system"}
"""Roles of OpenAI's API that chat templates know by another name."""


@dataclass
class LoadedModel:
    """A loaded model: its engine, its tokenizer, and the facts about it that `/v1/models` lists."""

    name: str
    engine: Engine
    tokenizer: Any
    chat: ChatFormat | None
    admission: Admission
    fingerprint: str = "fp_unknown"
    created: int = 0
    facts: dict[str, Any] = field(default_factory=dict)
    tokenizing: threading.Lock = field(default_factory=threading.Lock)
    """Tokenization takes this lock: see `Service._tokenize`."""


@dataclass
class Call:
    """The record of one request, for logs and metrics."""

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
        """The `usage` object of OpenAI's API."""
        return usage(self.num_prompt, self.num_answer, self.num_proposed, self.num_accepted)


class Service:
    """Answers chat and completion requests to several models."""

    def __init__(self, models: Mapping[str, LoadedModel], limits: Limits) -> None:
        self.models = dict(models)
        self.limits = limits
        self.budgets = Budgets()

    def visible(self, key: Key) -> list[LoadedModel]:
        """The models that a key may use."""
        return [model for model in self.models.values() if key.may_ask(model.name)]

    def card(self, model: LoadedModel) -> dict[str, Any]:
        """The model as `/v1/models` lists it."""
        openai = {"id": model.name, "object": "model", "created": model.created, "owned_by": "sdft_ray"}
        limits = {"max_model_len": model.engine.max_model_tokens, "max_output_tokens": self._max_output(model)}
        return {**openai, **limits, "has_chat": model.chat is not None, **model.facts}

    def find(self, name: str, key: Key) -> LoadedModel:
        """Raises `ApiError` 404 for a model that does not exist, or that this key may not use."""
        model = self.models.get(name)
        if model is None or not key.may_ask(name):
            known = ", ".join(each.name for each in self.visible(key)) or "none"
            raise ApiError(
                404, f"there is no model {name!r}; available models: {known}", code="model_not_found", param="model"
            )
        return model

    async def chat(self, request: ChatRequest, call: Call) -> dict[str, Any] | AsyncIterator[bytes]:
        """Answer a conversation. With `stream`, this returns when the first token is there. Raises `ApiError`."""
        model = self.find(request.model, call.key)
        messages = [{"role": _ROLES.get(turn.role, turn.role), "content": turn.text} for turn in request.messages]
        ids = await self._tokenize(model, lambda: _chat_ids(model, messages), sum(len(m["content"]) for m in messages))
        asks = self._asks(request, model, [ids], request.limit, request.scores, None)
        head = ResponseHeader.new(model.name, model.fingerprint, is_chat=True)
        return await self._answer(request, model, head, asks, [""] * len(asks), call)

    async def complete(self, request: CompletionRequest, call: Call) -> dict[str, Any] | AsyncIterator[bytes]:
        """Continue texts or token ids; otherwise as `chat`."""
        model = self.find(request.model, call.key)
        prompts = request.prompts
        size = sum(len(prompt) for prompt in prompts if isinstance(prompt, str))
        all_ids = await self._tokenize(model, lambda: [_prompt_ids(model, prompt) for prompt in prompts], size)
        echoed = request.logprobs if request.echo else None
        limit = min(request.limit, self._max_output(model)) if request.max_tokens is None else request.limit
        asks = self._asks(request, model, all_ids, limit, request.logprobs, echoed)
        before = [""] * len(asks)
        if request.echo:
            texts = [prompt if isinstance(prompt, str) else _text(model, prompt) for prompt in prompts]
            before = [text for text in texts for _ in range(request.n or 1)]
        head = ResponseHeader.new(model.name, model.fingerprint, is_chat=False)
        return await self._answer(request, model, head, asks, before, call)

    def _max_output(self, model: LoadedModel) -> int:
        """The largest number of tokens that an answer may have."""
        return min(model.engine.max_model_tokens, self.limits.max_output_tokens)

    async def _tokenize(self, model: LoadedModel, work: Any, size: int) -> Any:
        """Convert texts to token ids, one request at a time.

        Whether control tokens in a text are read as text is a state of the tokenizer, not an argument of the call, so a
        concurrent call could change it.
        """

        def locked() -> Any:
            with model.tokenizing:
                return work()

        try:
            if size > _LONG_TEXT or not model.tokenizing.acquire(blocking=False):
                return await asyncio.to_thread(locked)
            try:
                return work()
            finally:
                model.tokenizing.release()
        except (DataError, ModelError) as reason:
            raise ApiError(400, str(reason), code="invalid_prompt") from None

    def _asks(
        self,
        request: ChatRequest | CompletionRequest,
        model: LoadedModel,
        all_ids: list[list[int]],
        limit: int | None,
        scores: int | None,
        prompt_scores: int | None,
    ) -> list[GenerationRequest]:
        """Requests to the engine, one per sample. Raises `ApiError` if a prompt or limit does not fit the context."""
        context, max_output = model.engine.max_model_tokens, self._max_output(model)
        if limit is not None and limit > max_output:
            message = f"max_tokens is {limit}, but answers of this model are limited to {max_output} tokens"
            raise ApiError(400, message, code="invalid_value", param="max_tokens")
        asks, param = [], "messages" if isinstance(request, ChatRequest) else "prompt"
        for ids in all_ids:
            _check_prompt(ids, model, self.limits, param, min_answer=0 if limit == 0 else 1)
            for number in range(request.n or 1):
                asks.append(
                    GenerationRequest(
                        prompt_ids=tuple(ids),
                        max_tokens=min(max_output if limit is None else limit, context - len(ids)),
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
        model: LoadedModel,
        head: ResponseHeader,
        asks: list[GenerationRequest],
        before: list[str],
        call: Call,
    ) -> dict[str, Any] | AsyncIterator[bytes]:
        if len(asks) > model.admission.capacity:
            message = f"the request asks for {len(asks)} answers; the limit is {model.admission.capacity}"
            raise ApiError(400, message, code="invalid_value", param="n")
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
        stream = Stream(head, include_usage=request.include_usage, scored=scored)
        first = await anext(pieces)
        return self._events(stream, first, pieces, before, call, is_chat=head.is_chat, with_usage=request.include_usage)

    async def _events(
        self,
        stream: Stream,
        first: tuple[int, AnswerDelta],
        pieces: AsyncGenerator[tuple[int, AnswerDelta], None],
        before: Sequence[str],
        call: Call,
        *,
        is_chat: bool,
        with_usage: bool,
    ) -> AsyncIterator[bytes]:
        """Server-sent events of a stream. `first` was taken from `pieces`; `before` is the text before each answer."""
        started: set[int] = set()

        def event(index: int, piece: AnswerDelta) -> bytes:
            if index in started:
                return stream.piece(index, piece)
            started.add(index)
            opening = stream.opening(index) if is_chat else b""
            return opening + stream.piece(index, piece, before[index])

        async with aclosing(pieces):
            yield event(*first)
            async for index, piece in pieces:
                yield event(index, piece)
        if with_usage:
            yield stream.usage(call.usage)
        yield DONE

    async def _pieces(
        self, model: LoadedModel, asks: list[GenerationRequest], call: Call
    ) -> AsyncGenerator[tuple[int, AnswerDelta], None]:
        """Pieces of all samples as they arrive. Their tokens are counted against the key, however this ends.

        A separate task generates them: then several tasks may read, and closing this cancels the generation wherever
        it is waiting.
        """
        ready: asyncio.Queue[tuple[int, AnswerDelta] | None] = asyncio.Queue()
        task = asyncio.create_task(self._make(model, asks, call, ready))
        try:
            while (item := await ready.get()) is not None:
                piece = item[1]
                call.num_answer += piece.num_tokens
                call.num_proposed += piece.num_proposed
                call.num_accepted += piece.num_accepted
                if call.first_token_s is None:
                    call.first_token_s = time.monotonic() - call.began
                yield item
            await task
        except TimeoutError:
            message = f"the answer was not finished after {self.limits.request_timeout_s:g} s"
            raise ApiError(504, message, code="timeout") from None
        except RefusedError as reason:
            raise _too_much(reason) from None
        except EngineFailedError:
            message = "the engine is restarting"
            raise ApiError(503, message, code="engine_restarting", retry_after_s=10) from None
        finally:
            self.budgets.spend(call.key, call.num_prompt + call.num_answer)
            task.cancel()  # after counting the tokens: if the client disconnected, the next line is cancelled
            await asyncio.gather(task, return_exceptions=True)

    async def _make(
        self, model: LoadedModel, asks: list[GenerationRequest], call: Call, ready: asyncio.Queue[Any]
    ) -> None:
        """Generate all samples, each when it is admitted; puts their pieces into `ready`, and None last."""

        async def sample(index: int, ask: GenerationRequest) -> None:
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


def _too_much(reason: RefusedError) -> ApiError:
    return ApiError(429, reason.message, code="rate_limit_exceeded", retry_after_s=reason.retry_after_s)


def _chat_ids(model: LoadedModel, messages: list[dict[str, str]]) -> list[int]:
    if model.chat is None:
        raise DataError(f"{model.name} has no chat template", "use /v1/completions")
    return model.chat.prompt_ids(messages)


def _prompt_ids(model: LoadedModel, prompt: str | list[int]) -> list[int]:
    """Control tokens in a text are read as text, as in OpenAI's API; clients that need them send token ids."""
    if not isinstance(prompt, str):
        return prompt
    return model.tokenizer(prompt, split_special_tokens=True)["input_ids"]


def _text(model: LoadedModel, ids: list[int]) -> str:
    return model.tokenizer.decode(ids, skip_special_tokens=False)


def _check_prompt(ids: list[int], model: LoadedModel, limits: Limits, param: str, *, min_answer: int) -> None:
    context = model.engine.max_model_tokens
    if not ids:
        raise ApiError(400, "the prompt is empty", code="invalid_prompt", param=param)
    if len(ids) + min_answer > context:
        message = f"the prompt has {len(ids)} tokens, but the context of {model.name} is {context} tokens"
        raise ApiError(400, message, code="context_length_exceeded", param=param)
    if limits.max_prompt_tokens is not None and len(ids) > limits.max_prompt_tokens:
        message = f"the prompt has {len(ids)} tokens; the limit of this service is {limits.max_prompt_tokens}"
        raise ApiError(400, message, code="context_length_exceeded", param=param)
    unknown = next((token for token in ids if token >= model.engine.vocab_size), None)
    if unknown is not None:
        message = f"token {unknown} is outside the vocabulary of {model.name}"
        raise ApiError(400, message, code="invalid_prompt", param=param)


def _first_named(model: LoadedModel, ask: GenerationRequest, piece: AnswerDelta) -> AnswerDelta:
    """Fill in the text of a prompt's first token: engines leave it out, because it has no log-probability."""
    if not piece.prompt_scores:
        return piece
    first = TokenScore(_text(model, [ask.prompt_ids[0]]), None)
    return replace(piece, prompt_scores=(first, *piece.prompt_scores[1:]))
