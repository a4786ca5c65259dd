"""lm-eval on an OpenAI-compatible server, with lm-eval's own `local-completions` model."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from lm_eval.api.instance import Instance
from lm_eval.models.openai_completions import LocalCompletionsAPI

from sdft_ray.errors import EvaluationError
from sdft_ray.evaluation.harness import EvalConfig, evaluate_with
from sdft_ray.evaluation.progress import ItemCounter, OnItem
from sdft_ray.evaluation.questions import Text
from sdft_ray.statistics.scores import Scores


@dataclass(frozen=True)
class Endpoint:
    """A model on a server. `url` ends in `/v1`; the tokenizer is a local directory, the served model's own."""

    url: str
    model: str
    tokenizer: Path
    key: str | None = field(default=None, repr=False)
    num_concurrent: int = 16

    def cards(self) -> dict[str, dict[str, Any]]:
        """The server's model descriptions by name. Raises `EvaluationError` if the server cannot be reached."""
        request = urllib.request.Request(f"{self.url}/models", headers=self.headers)  # noqa: S310  (the user's own URL)
        try:
            with urllib.request.urlopen(request, timeout=30) as answer:  # noqa: S310
                return {card["id"]: card for card in json.load(answer)["data"]}
        except urllib.error.HTTPError as reason:
            hint = (
                "set the environment variable given by --key-variable to a valid API key"
                if reason.code == 401
                else "check the URL; it ends in /v1"
            )
            raise EvaluationError(f"{self.url}/models returned status {reason.code}", hint) from None
        except (OSError, ValueError, KeyError, TypeError) as reason:
            raise EvaluationError(
                f"cannot read {self.url}/models: {reason}", "check the URL, and that the server is running"
            ) from None

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.key}"} if self.key else {}


_API: Any = LocalCompletionsAPI  # lm-eval's registration hides the class from type checkers


class EndpointLM(_API):
    """`local-completions`, quiet, with our count of finished items. Prompts are sent as token ids."""

    num_truncated: ClassVar[Counter[str]] = Counter()
    """lm-eval cuts nothing here: a prompt that does not fit is refused by the server."""
    texts: ClassVar[dict[tuple[str, int], list[Text]]] = {}
    """A server does not tell lm-eval how an answer ended."""

    def __init__(self, endpoint: Endpoint, max_length: int, seed: int, counter: ItemCounter) -> None:
        super().__init__(
            model=endpoint.model,
            base_url=f"{endpoint.url}/completions",
            tokenizer=str(endpoint.tokenizer),
            tokenizer_backend="huggingface",
            num_concurrent=endpoint.num_concurrent,
            max_length=max_length,
            max_retries=3,
            seed=seed,
            header={"Content-Type": "application/json", **endpoint.headers},
        )
        self._counter = counter
        self.set_cache_hook(counter)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """As in lm-eval."""
        self._counter.begin(requests)
        return super().loglikelihood(requests, disable_tqdm=True)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """As in lm-eval."""
        self._counter.begin(requests)
        return super().generate_until(requests, disable_tqdm=True)


def evaluate_endpoint(endpoint: Endpoint, config: EvalConfig, on_item: OnItem | None = None) -> Scores:
    """Score a served model. Raises `EvaluationError` if the server does not have it, and as `harness.evaluate`."""
    cards = endpoint.cards()
    if endpoint.model not in cards:
        raise EvaluationError(f"{endpoint.url} has no model {endpoint.model!r}", f"it has {', '.join(cards)}")
    length = cards[endpoint.model].get("max_model_len") or 2048
    result = evaluate_with(lambda counter: EndpointLM(endpoint, length, config.seed, counter), config, on_item)
    return result.scores
