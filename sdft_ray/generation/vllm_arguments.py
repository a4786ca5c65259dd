"""vLLM engine arguments that are required wherever an engine is started."""

from __future__ import annotations

from typing import Any

_AT_LEAST = 4096
"""Minimum of `max_num_batched_tokens`: tokens of one engine step."""


def disable_chunked_prefill(arguments: Any) -> None:
    """On a CPU, disable chunked prefill (`arguments` are vLLM's `EngineArgs`, modified in place).

    A prompt that does not fit into the rest of a step would be split, and if its request has a seed, the engine crashes
    (observed in vLLM 0.32: "CPU Generator does not use offset"), and all pending requests fail with it.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    arguments.enable_chunked_prefill = False
    arguments.max_num_batched_tokens = max(_AT_LEAST, arguments.create_model_config().max_model_len)
