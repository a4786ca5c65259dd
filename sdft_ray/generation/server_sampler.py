"""A sampler that uses an OpenAI-compatible server."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, cast

from sdft_ray.data.messages import Prompt, messages_of
from sdft_ray.generation.sampler import Sampled, SamplingParams, check_signals

_FINISH_REASONS = {"stop": "stop", "length": "length"}


class ServerSampler:
    """Chat completions of a server that already runs the teacher and applies its chat template.

    Requests to a busy server, dropped connections and timeouts are retried with exponential backoff, `max_retries`
    times per prompt; a prompt that the server rejects becomes a failed row. No signals: `top_logprobs` of the OpenAI
    protocol identifies tokens by text, at most 20 on most servers.
    """

    def __init__(
        self,
        base_url: str,
        model: str,
        *,
        api_key: str = "none",
        max_in_flight: int = 64,
        timeout_s: float = 600.0,
        max_retries: int = 8,
        escape: Callable[[str], str] = lambda prompt: prompt,
    ) -> None:
        """`base_url` ends in `/v1`; `model` is the name of the teacher on the server.

        The server would interpret control tokens in the text of a prompt; `escape` breaks them, see
        `sdft_ray.data.chat.ChatFormat.break_control_tokens`.
        """
        from openai import OpenAI

        self._client = OpenAI(base_url=base_url, api_key=api_key, timeout=timeout_s, max_retries=max_retries)
        self._model = model
        self._escape = escape
        self._pool = ThreadPoolExecutor(max_in_flight, thread_name_prefix="server")

    def submit(self, prompt: Prompt, params: SamplingParams, seed: int) -> Future[Sampled]:
        """See `Sampler.submit`."""
        check_signals("server", params)
        return self._pool.submit(self._request, prompt, params, seed)

    def close(self) -> None:
        """Cancel pending requests and close the connections."""
        self._pool.shutdown(cancel_futures=True)
        self._client.close()

    def _messages(self, prompt: Prompt) -> list[dict[str, Any]]:
        """As OpenAI's protocol has them: arguments of tool calls are text there."""
        messages = messages_of(prompt)
        for message in messages:
            message["content"] = self._escape(message["content"])
            if "tool_calls" in message:
                message["tool_calls"] = [_as_text(call) for call in message["tool_calls"]]
        return messages

    def _request(self, prompt: Prompt, params: SamplingParams, seed: int) -> Sampled:
        from openai import APIStatusError, AuthenticationError, OpenAIError

        # Fields that the OpenAI API does not define go into the body; vLLM, SGLang and llama.cpp accept them.
        extra: dict[str, Any] = {}
        if params.top_k:
            extra["top_k"] = params.top_k
        if params.stop_token_ids:
            extra["stop_token_ids"] = list(params.stop_token_ids)
        try:
            answer = self._client.chat.completions.create(
                model=self._model,
                messages=cast(Any, self._messages(prompt)),
                temperature=params.temperature,
                top_p=params.top_p,
                max_tokens=params.max_tokens,
                seed=seed if params.temperature > 0 else None,
                extra_body=extra or None,
            )
        except AuthenticationError:
            raise
        except APIStatusError as reason:
            return Sampled.failed(f"the server returned status {reason.status_code}: {reason.message}")
        except OpenAIError as reason:
            return Sampled.failed(f"{type(reason).__name__}: {reason}")
        return _finish(answer)


def _as_text(call: Mapping[str, Any]) -> dict[str, Any]:
    function = {**call["function"], "arguments": json.dumps(call["function"]["arguments"], ensure_ascii=False)}
    return {**call, "function": function}


def _finish(answer: Any) -> Sampled:
    choice = answer.choices[0]
    usage = answer.usage
    prompt_tokens = usage.prompt_tokens if usage else 0
    reason = _FINISH_REASONS.get(choice.finish_reason)
    if reason is None:
        return Sampled.failed(f"the server ended the row with {choice.finish_reason!r}", prompt_tokens)
    return Sampled(
        choice.message.content or "",
        (),
        "stop" if reason == "stop" else "length",
        "",
        prompt_tokens,
        usage.completion_tokens if usage else 0,
    )
