"""A sampler that uses a transformers model, for machines without vLLM and as a reference."""

from __future__ import annotations

import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Any

from sdft_ray.generation.sampler import LocalSampler, Sampled, SamplingParams

if TYPE_CHECKING:
    from sdft_ray.data.messages import ChatSettings
    from sdft_ray.generation.scoring import ScoreRequest, ScoreResult

_Request = tuple[list[int], SamplingParams, int, Future[Sampled]]
_ToScore = tuple["ScoreRequest", Future["ScoreResult"]]


class TransformersSampler(LocalSampler):
    """A transformers model in this process. A thread decodes the pending requests, batch by batch.

    Sampled rows are reproducible from their seeds and do not depend on the rest of the batch; vLLM samples other tokens
    for the same seed. Greedy rows agree with vLLM up to rounding. All signals are available.
    """

    def __init__(
        self,
        model_dir: str | Path,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        max_model_tokens: int | None = None,
        max_sequences: int = 32,
        chat: ChatSettings | None = None,
    ) -> None:
        """Load model and tokenizer. Raises `ModelError` as `load_model` does.

        `dtype` is "auto" (that of the checkpoint), "float32", "bfloat16" or "float16". `max_model_tokens` and
        `max_sequences` are as for `VllmSampler`.
        """
        from sdft_ray.data.chat import load_tokenizer
        from sdft_ray.generation.decoding import end_token_ids
        from sdft_ray.models.loading import load_model

        super().__init__(load_tokenizer(Path(model_dir)), chat)
        model: Any = load_model(Path(model_dir), dtype)
        self._model = model.to(device)
        config = self._model.config.get_text_config()
        self.max_model_tokens = max_model_tokens or config.max_position_embeddings
        self.vocab_size = config.vocab_size
        self._max_sequences = max_sequences
        self._end_ids = end_token_ids(self._model, self.stop_ids)
        self._waiting: queue.SimpleQueue[_Request | _ToScore | None] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._serve, name="transformers", daemon=True)
        self._thread.start()

    def _enqueue(self, prompt_ids: list[int], params: SamplingParams, seed: int, future: Future[Sampled]) -> None:
        self._waiting.put((prompt_ids, params, seed, future))

    def submit_score(self, request: ScoreRequest) -> Future[ScoreResult]:
        """See `LocalSampler.submit_score`."""
        future: Future[ScoreResult] = Future()
        self._waiting.put((request, future))
        return future

    def close(self) -> None:
        """Finish pending requests and stop."""
        self._waiting.put(None)
        self._thread.join()

    def _serve(self) -> None:
        closing = False
        while not closing:
            waiting = [self._waiting.get()]
            time.sleep(0.01)  # prompts arrive in bursts: wait for the rest of this one
            while not self._waiting.empty():
                waiting.append(self._waiting.get())
            closing = None in waiting
            requests = [request for request in waiting if request is not None]
            self._score([request for request in requests if len(request) == 2])
            # Rows of similar length need the least padding.
            pending = sorted((request for request in requests if len(request) == 4), key=lambda r: -len(r[0]))
            while pending:
                params = pending[0][1]
                batch = [request for request in pending if request[1] == params][: self._max_sequences]
                pending = [request for request in pending if all(request is not other for other in batch)]
                self._answer(batch, params)

    def _score(self, requests: list[_ToScore]) -> None:
        from sdft_ray.generation.scoring import score

        try:
            for index, scored in score(self._model, [request for request, _ in requests]):
                requests[index][1].set_result(scored)
        except Exception as reason:  # noqa: BLE001  (pending futures must get any error)
            for _, future in requests:
                if not future.done():
                    future.set_exception(reason)

    def _answer(self, batch: list[_Request], params: SamplingParams) -> None:
        from sdft_ray.generation.decoding import decode

        prompts = [request[0] for request in batch]
        try:
            decoded = decode(
                self._model,
                prompts,
                params,
                [request[2] for request in batch],
                stop_token_ids=self._end_ids | set(params.stop_token_ids),
                max_model_tokens=self.max_model_tokens,
                is_stopped=_stopped_by(self.text_of, params.stop),
            )
        except Exception as reason:  # noqa: BLE001  (pending futures must get any error)
            for *_, future in batch:
                future.set_exception(reason)
            return
        for (prompt, _, _, future), (token_ids, reason, signals) in zip(batch, decoded, strict=True):
            text = self.text_of(token_ids)
            future.set_result(Sampled(text, tuple(token_ids), reason, "", len(prompt), len(token_ids), signals))


def _stopped_by(text_of: Callable[[list[int]], str], stop: Sequence[str]) -> Callable[[list[int]], bool] | None:
    """A function that returns whether the newest tokens contain one of the `stop` texts; None if there are none."""
    if not stop:
        return None
    # A token may be a single byte of a character, and the text may start within a token.
    reach = max(len(text.encode()) for text in stop) + 4

    def is_stopped(ids: list[int]) -> bool:
        tail = text_of(ids[-reach:])
        return any(text in tail for text in stop)

    return is_stopped
