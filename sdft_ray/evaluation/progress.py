"""How far an evaluation is, and lm-eval without its own chatter."""

from __future__ import annotations

import contextlib
import io
import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from lm_eval.api.instance import Instance
from lm_eval.api.model import CacheHook

OnItem = Callable[[int, int], None]
"""Called with (items done, items in all) while a model is evaluated."""


class ItemCounter(CacheHook):
    """Counts finished requests: lm-eval tells its response cache about every one.

    Options of one item are separate requests, in an order of their own, so items are counted in proportion.
    """

    def __init__(self, total: int, on_item: OnItem | None, terminal: Any) -> None:
        super().__init__(None)
        self._total, self._on_item, self._terminal = total, on_item, terminal
        self._before = self._requests = self._items = self._done = self._told = 0

    def begin(self, requests: list[Instance]) -> None:
        """The requests of one kind are about to run."""
        self._before += self._items
        self._requests, self._done = len(requests), 0
        self._items = len({(request.task_name, request.doc_id) for request in requests})

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """One request is finished."""
        self._done += 1
        done = min(self._total, self._before + self._items * self._done // max(1, self._requests))
        if self._on_item is not None and done > self._told:
            self._told = done
            with contextlib.redirect_stderr(self._terminal):
                self._on_item(done, self._total)


@contextlib.contextmanager
def quiet() -> Iterator[Any]:
    """Silence lm-eval, datasets and transformers for a block; yields the stderr that was there before.

    Their progress bars write to `sys.stderr` and some cannot be turned off, so it is exchanged; log levels
    are put back.
    """
    loggers = [logging.getLogger(name) for name in ("lm_eval", "datasets", "transformers", "huggingface_hub")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    terminal = sys.stderr
    try:
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield terminal
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
