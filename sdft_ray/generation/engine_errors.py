"""What an engine that does not start writes, in words of the resources file."""

from __future__ import annotations

import re

_CACHE = re.compile(
    r"max seq len\s*\((?P<context>\d+)\),\s*\(?(?P<need>[\d.]+) GiB KV\s+cache is needed.*?"
    r"available KV cache\s+memory \((?P<have>[\d.]+) GiB\)(?:.*?maximum model length is (?P<longest>\d+))?",
    re.DOTALL,
)
_NO_CACHE = "No available memory for the cache blocks"
_MARGIN = 1.02
"""vLLM tells GiB with two digits."""


def cache_error(text: str, section: str) -> tuple[str, str] | None:
    """A sentence and a next step if `text` holds vLLM's words on a KV cache that is too small, else None.

    `section` is the part of the settings that configures the engine, such as "generate".
    """
    found = _CACHE.search(text)
    if found is None:
        if _NO_CACHE not in text:
            return None
        return "its engine has no memory left for keys and values", f"raise {section}.kv_cache_bytes"
    context, need, have = int(found["context"]), float(found["need"]), float(found["have"])
    message = f"a context of {context:,} tokens needs {need:g} GiB of keys and values, and its engine has {have:g} GiB"
    longest = int(found["longest"] or 0)
    shorter = f"set {section}.max_model_tokens to {longest} or less" if longest else f"lower {section}.max_model_tokens"
    return message, f"{shorter}, or {section}.kv_cache_bytes to {round(_MARGIN * need * 2**30):_} or more"
