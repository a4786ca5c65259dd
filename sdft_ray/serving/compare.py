"""Compare served models on the same prompts: throughput, time to first token, and whether their answers are equal."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import httpx

from sdft_ray.errors import ServeError
from sdft_ray.serving.load import Load, chat_body, press

PROMPTS = (
    "A farmer has 12 hens and sells 5. How many are left?",
    "Name three rivers and say where each one ends.",
    "Explain to a child why the sky is blue.",
    "Write a short letter that thanks a neighbour for watering the plants.",
    "What is the difference between a virus and a bacterium?",
    "A train leaves at 9:40 and arrives at 12:05. How long does it travel?",
    "Give me a recipe for pancakes in five steps.",
    "Summarise in one sentence what a compiler does.",
)
"""Used where no file of prompts is given."""


@dataclass(frozen=True)
class Row:
    """One model with one number of concurrent clients; greedy decoding, streamed."""

    model: str
    clients: int
    tokens_per_s: float
    median_first_s: float
    median_s: float
    acceptance_length: float | None
    """Tokens per decoding step of a model with a draft model: its own and the accepted ones. None without a draft."""
    same_share: float
    """Fraction of the answers that are identical to those of the first model."""


def read_prompts(path: Path) -> list[str]:
    """Read one prompt per line: plain text, or JSON with `prompt` or `instruction`. Raises `ServeError`."""
    try:
        lines = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as reason:
        raise ServeError(f"cannot read {path}: {reason}", "give a text file with one prompt per line") from None
    prompts = [_prompt(line, f"{path}, line {number}") for number, line in enumerate(lines, 1)]
    if not prompts:
        raise ServeError(f"{path} has no prompts", "write one per line")
    return prompts


def _prompt(line: str, place: str) -> str:
    if not line.lstrip().startswith("{"):
        return line
    try:
        row = json.loads(line)
        return str(row["prompt"] if "prompt" in row else row["instruction"])
    except (ValueError, KeyError):
        raise ServeError(f"{place} is JSON with neither prompt nor instruction", "use one of these keys") from None


def compare(
    url: str,
    models: Sequence[str],
    prompts: Sequence[str],
    *,
    clients: Sequence[int],
    max_tokens: int,
    key: str | None = None,
) -> list[Row]:
    """Each model in turn answers all prompts, with each number of concurrent clients. `url` ends in `/v1`.

    Raises `ServeError` if a request fails.
    """
    headers = {"Authorization": f"Bearer {key}"} if key else {}
    num_drafted = _num_drafted(url, headers)

    def measured(model: str, num_clients: int, num: int) -> Load:
        def body(number: int) -> dict[str, object]:
            return chat_body(model, prompts[number], temperature=0, max_tokens=max_tokens, stream=True)

        load = asyncio.run(press(url, body, clients=num_clients, num_requests=num, headers=headers))
        if set(load.statuses) != {200}:
            raise ServeError(
                f"requests to {model} at {url} returned statuses {load.statuses}",
                "check that it is served, and the API key",
            )
        return load

    rows, first = [], {}
    for model in models:
        measured(model, 1, 1)  # warm-up
        for num_clients in clients:
            load = measured(model, num_clients, len(prompts))
            texts = [each.text for each in load.seen]
            same = sum(own == other for own, other in zip(texts, first.setdefault(num_clients, texts), strict=True))
            drafted, share = num_drafted.get(model), load.accepted_share
            length = None if drafted is None or share is None else 1 + drafted * share
            speeds = (load.tokens_per_s, load.median_first_s, load.median_s, length)
            rows.append(Row(model, num_clients, *speeds, same / len(texts)))
    return rows


def _num_drafted(url: str, headers: dict[str, str]) -> dict[str, int]:
    """Tokens that each model's draft proposes per step, where the server reports it."""
    try:
        answer = httpx.get(f"{url}/models", headers=headers, timeout=30)
        answer.raise_for_status()
        return {card["id"]: card["num_draft_tokens"] for card in answer.json()["data"] if card.get("num_draft_tokens")}
    except (httpx.HTTPError, ValueError, KeyError, TypeError) as reason:
        raise ServeError(
            f"cannot read {url}/models: {reason}", "check the URL, which ends in /v1, and the API key"
        ) from None
