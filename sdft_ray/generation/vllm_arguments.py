"""What vLLM's engines must be told wherever we start one."""

from __future__ import annotations

from typing import Any

_AT_LEAST = 4096
"""Tokens of one step."""


def keep_prompts_whole(arguments: Any) -> None:
    """On a CPU, have no prompt fed in parts (`arguments` are vLLM's `EngineArgs`, changed in place).

    A prompt that does not fit into what a step may still take would be cut in two, and if its request has a seed, the
    engine dies of it (seen in 0.32: "CPU Generator does not use offset"): one such client, or one crowd, would end
    what all others wait for.
    """
    from vllm.platforms import current_platform

    if not current_platform.is_cpu():
        return
    arguments.enable_chunked_prefill = False
    arguments.max_num_batched_tokens = max(_AT_LEAST, arguments.create_model_config().max_model_len)
