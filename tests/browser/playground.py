"""The application on a port of its own, with scripted answers, for a browser to look at."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import uvicorn

from sdft_ray.data.chat import ChatFormat, load_tokenizer
from sdft_ray.engines.request import GenerationRequest
from sdft_ray.lab.export import TEACHER
from sdft_ray.serving.access import Key, KeyRing
from sdft_ray.serving.admission import Admission
from sdft_ray.serving.http import build_app
from sdft_ray.serving.service import LoadedModel, Service
from sdft_ray.serving.settings import ServedModel, ServeSettings
from tests.support.scripted_engine import ScriptedEngine


@dataclass
class Playground:
    """A service that answers, and the engines behind it."""

    url: str
    engines: dict[str, ScriptedEngine]
    service: Service

    def prompt(self, model: str, number: int = -1) -> str:
        """What a model was asked, as the chat template put it."""
        ids = self.engines[model].asked[number].prompt_ids
        return self.service.models[model].tokenizer.decode(ids, skip_special_tokens=False)


FACTS: dict[str, dict[str, Any]] = {
    "teacher": {
        "num_parameters": 8_030_261_248, "num_blocks": 32, "weight_bytes": 16_060_522_496,
        "role": "teacher", "recovery": None, "draft": None,
    },
    "student": {
        "num_parameters": 4_898_000_000, "num_blocks": 20, "weight_bytes": 9_796_000_000,
        "role": "student", "recovery": 0.9713, "draft": "student-small",
    },
    "pruned": {"num_parameters": 4_898_000_000, "num_blocks": 20, "weight_bytes": 9_796_000_000, "role": "pruned"},
}  # fmt: skip


def scripted(answer: str | Callable[[GenerationRequest], str], delay_s: float) -> ScriptedEngine:
    """An engine of the laboratory teacher's vocabulary and context."""
    told = answer if callable(answer) else lambda ask: answer
    return ScriptedEngine(told, delay_s=delay_s, max_model_tokens=512, vocab_size=1200)


@contextmanager
def playground(engines: dict[str, ScriptedEngine], keys: tuple[Key, ...] = ()) -> Iterator[Playground]:
    """The application on a port of its own. Without keys anyone may ask."""
    tokenizer = load_tokenizer(TEACHER)
    chat = ChatFormat(tokenizer)
    models = {
        name: LoadedModel(name, engine, tokenizer, chat, Admission(8, 8), facts=FACTS.get(name, {}))
        for name, engine in engines.items()
    }
    settings = ServeSettings(models=tuple(ServedModel(name=name, source=name) for name in models))
    service = Service(models, settings.limits)
    app = build_app(service, KeyRing(None, keys, allow_anonymous=not keys), settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="off", timeout_graceful_shutdown=2))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        try:
            wait_until(lambda: server.started)
            yield Playground(f"http://127.0.0.1:{listening.getsockname()[1]}/", engines, service)
        finally:
            server.should_exit = True
            thread.join()


def wait_until(is_so: Callable[[], bool], within_s: float = 10) -> None:
    deadline = time.monotonic() + within_s
    while not is_so():
        assert time.monotonic() < deadline
        time.sleep(0.02)
