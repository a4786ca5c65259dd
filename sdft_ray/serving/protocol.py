"""The request bodies of OpenAI's API that this service supports, and its error object.

pydantic parses the bytes and rejects invalid UTF-8 and lone surrogates. An unknown field is an error, as in OpenAI's
API: a client must not believe that an option is used when it is ignored. Clients also send fields that ask for nothing
(`tools: []`); these are accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, ValidationError, model_validator

MAX_STOPS = 16
MAX_TOP_LOGPROBS = 20
MAX_SAMPLES = 128
"""Maximum number of answers of one request: prompts times `n`."""

Role = Literal["system", "developer", "user", "assistant"]
Stop = Annotated[str, Field(min_length=1, max_length=1000)]
TokenId = Annotated[int, Field(ge=0, le=2**31 - 1)]
TokenIds = Annotated[list[TokenId], Field(min_length=1, fail_fast=True)]


def _form_of_prompt(value: Any) -> str | None:
    """Which form a prompt has, so that only that one is validated."""
    if not isinstance(value, list):
        return "text" if isinstance(value, str) else None
    first = value[0] if value else None
    return "texts" if isinstance(first, str) else "all_ids" if isinstance(first, list) else "ids"


Prompt = Annotated[
    Annotated[str, Tag("text")]
    | Annotated[TokenIds, Tag("ids")]
    | Annotated[list[str], Field(max_length=MAX_SAMPLES, fail_fast=True), Tag("texts")]
    | Annotated[list[TokenIds], Field(max_length=MAX_SAMPLES, fail_fast=True), Tag("all_ids")],
    Discriminator(
        _form_of_prompt,
        custom_error_type="prompt_type",
        custom_error_message="Input should be a string, a list of strings, token ids, or a list of lists of token ids",
    ),
]


class ApiError(Exception):
    """An error response: `status`, and the fields of OpenAI's error object."""

    def __init__(
        self,
        status: int,
        message: str,
        *,
        code: str | None = None,
        param: str | None = None,
        retry_after_s: float | None = None,
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message
        self.code = code
        self.param = param
        self.retry_after_s = retry_after_s

    @property
    def body(self) -> dict[str, Any]:
        """OpenAI's error object."""
        kind = _KINDS.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": self.message, "type": kind, "param": self.param, "code": self.code}}


_KINDS = {401: "authentication_error", 403: "permission_error", 429: "rate_limit_error"}


class _Body(BaseModel):
    """No unknown fields. A field of `NEUTRAL` is accepted with a value that asks for nothing."""

    model_config = ConfigDict(extra="forbid", strict=True)
    NEUTRAL: ClassVar[Mapping[str, tuple[Any, ...]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _leave_out_neutral(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        return {name: value for name, value in data.items() if not _is_neutral(cls.NEUTRAL.get(name), value)}


ANYTHING: tuple[Any, ...] = ()
"""For fields that never change an answer."""


def _is_neutral(known: tuple[Any, ...] | None, value: Any) -> bool:
    if known is None:
        return False
    return known == ANYTHING or value is None or any(type(value) is type(n) and value == n for n in known)


class StreamOptions(_Body):
    include_usage: bool = False


class TextPart(_Body):
    NEUTRAL = {"cache_control": ANYTHING, "annotations": ([],)}

    type: Literal["text"]
    text: str


class Message(_Body):
    """One turn of a conversation. `developer` is OpenAI's newer name for `system`.

    Clients send back what they were answered, with all the fields that their library knows.
    """

    NEUTRAL = {
        "refusal": (None,),
        "tool_calls": ([],),
        "function_call": (None,),
        "audio": (None,),
        "annotations": ([],),
        "reasoning": (None,),
        "reasoning_content": (None,),
    }

    role: Role
    content: str | Annotated[list[TextPart], Field(fail_fast=True)]
    name: str | None = Field(default=None, max_length=512)
    """Accepted and ignored."""
    type: Literal["text"] | None = None
    """Accepted and ignored; lm-eval sends it."""

    @property
    def text(self) -> str:
        return self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)


class _Sampling(_Body):
    """Fields of both kinds of requests. Defaults are those of OpenAI's API."""

    NEUTRAL = {
        "tools": ([],),
        "tool_choice": ("none", "auto"),
        "functions": ([],),
        "function_call": ("none", "auto"),
        "parallel_tool_calls": (True, False),
        "response_format": ({"type": "text"},),
        "logit_bias": ({},),
        "logprobs": (False,),
        "store": (False,),
        "metadata": ANYTHING,
        "modalities": (["text"],),
        "service_tier": ("auto", "default"),
        "reasoning_effort": (None,),
        "best_of": (1,),
        "top_k": (-1,),
        "min_p": (0, 0.0),
        "min_tokens": (0,),
        "repetition_penalty": (1, 1.0),
        "length_penalty": (1, 1.0),
        "use_beam_search": (False,),
        "ignore_eos": (False,),
        "stop_token_ids": ([],),
        "bad_words": ([],),
        "skip_special_tokens": (True,),
        "spaces_between_special_tokens": (True,),
        "add_generation_prompt": (True,),
        "continue_final_message": (False,),
        "chat_template_kwargs": ({},),
        "prediction": (None,),
        "audio": (None,),
        "suffix": (None, ""),
        "extra_body": ({},),
    }
    """Fields of OpenAI's API and of vLLM's server with the values that ask for nothing; null is always one."""

    model: str = Field(min_length=1, max_length=512)
    temperature: float | None = Field(default=None, ge=0, le=2)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=0, le=2**31 - 1)
    n: int | None = Field(default=None, ge=1, le=MAX_SAMPLES)
    stop: Stop | Annotated[list[Stop], Field(max_length=MAX_STOPS)] | None = None
    seed: int | None = Field(default=None, ge=-(2**63), le=2**63 - 1)
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = Field(default=None, max_length=512)
    """Accepted and ignored."""

    @property
    def stops(self) -> tuple[str, ...]:
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())

    @property
    def include_usage(self) -> bool:
        """In the last event of a stream; other answers have it anyway."""
        return bool(self.stream_options and self.stream_options.include_usage)


class ChatRequest(_Sampling):
    messages: list[Message] = Field(min_length=1, max_length=2048)
    max_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    max_completion_tokens: int | None = Field(default=None, ge=1, le=2**31 - 1)
    """OpenAI's newer name for `max_tokens`."""
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)

    @model_validator(mode="after")
    def _no_two_meanings(self) -> Any:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs needs logprobs: true")
        if self.max_tokens is not None and self.max_completion_tokens is not None:
            raise ValueError("give max_tokens or max_completion_tokens, not both")
        return self

    @property
    def limit(self) -> int | None:
        return self.max_completion_tokens if self.max_tokens is None else self.max_tokens

    @property
    def scores(self) -> int | None:
        """Number of most likely tokens per position; None: no log-probabilities."""
        return (self.top_logprobs or 0) if self.logprobs else None


class CompletionRequest(_Sampling):
    prompt: Prompt
    max_tokens: int | None = Field(default=None, ge=0, le=2**31 - 1)
    """None means 16, as in OpenAI's API. 0 is allowed with `echo` only."""
    logprobs: int | None = Field(default=None, ge=0, le=MAX_TOP_LOGPROBS)
    echo: bool | None = None

    @model_validator(mode="after")
    def _nothing_to_say(self) -> Any:
        if self.max_tokens == 0 and not self.echo:
            raise ValueError("max_tokens: 0 needs echo: true")
        if self.num_prompts * (self.n or 1) > MAX_SAMPLES:
            raise ValueError(f"the number of prompts times n exceeds {MAX_SAMPLES}")
        return self

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if isinstance(self.prompt[0], int):
            return [self.prompt]  # type: ignore[list-item]
        return self.prompt  # type: ignore[return-value]

    @property
    def num_prompts(self) -> int:
        return len(self.prompts)

    @property
    def limit(self) -> int:
        return 16 if self.max_tokens is None else self.max_tokens


Request = TypeVar("Request", ChatRequest, CompletionRequest)


def parse(kind: type[Request], body: bytes) -> Request:
    """Parse a request body. Raises `ApiError` 400 that names the field."""
    try:
        return kind.model_validate_json(body)
    except ValidationError as reason:
        if reason.error_count() > 1000:  # building all messages takes longer than validation
            message = f"the body has {reason.error_count()} errors"
            raise ApiError(400, message, code="invalid_value") from None
        errors = reason.errors(include_url=False, include_context=False, include_input=False)
    # A value that fits none of several types has one error per type; the most deeply nested one is the most helpful.
    first = max(errors, key=lambda e: (e["type"] == "extra_forbidden", len(e["loc"]), not e["type"].endswith("_type")))
    if first["type"] == "json_invalid":
        raise ApiError(400, f"the body is not JSON: {first['msg'].removeprefix('Invalid JSON: ')}", code="invalid_json")
    name = _name_of(first["loc"])
    if first["type"] == "extra_forbidden":
        raise ApiError(400, f"unknown field {name}", code="unknown_parameter", param=name)
    if first["type"] == "missing":
        raise ApiError(400, f"field {name} is missing", code="missing_required_parameter", param=name)
    message = first["msg"].removeprefix("Value error, ")
    raise ApiError(400, f"{name}: {message}" if name else message, code="invalid_value", param=name or None)


_UNIONS = ("content", "prompt", "stop")


def _name_of(place: tuple[int | str, ...]) -> str:
    """Dotted name of a field, without the names of types that pydantic adds for unions; at most 200 characters."""
    pairs = zip(("", *place), place, strict=False)
    parts = [str(part) for before, part in pairs if isinstance(part, int) or before not in _UNIONS]
    return ".".join(parts)[:200]
