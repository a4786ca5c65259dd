"""Progress of an evaluation, and lm-eval without its own output."""

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

from sdft_ray.models.environment import variable

OnItem = Callable[[int, int], None]
"""Called with (items done, items in all) while a model is evaluated."""


class ItemCounter(CacheHook):
    """Counts finished requests, which lm-eval reports to its response cache one by one.

    The options of an item are separate requests in another order, so items are counted proportionally.
    """

    def __init__(self, total: int, on_item: OnItem | None, terminal: Any) -> None:
        super().__init__(None)
        self._total, self._on_item, self._terminal = total, on_item, terminal
        self._before = self._requests = self._items = self._done = self._reported = 0

    def begin(self, requests: list[Instance]) -> None:
        """Start counting the requests of one kind."""
        self._before += self._items
        self._requests, self._done = len(requests), 0
        self._items = len({(request.task_name, request.doc_id) for request in requests})

    def add_partial(self, attr: str, req: Any, res: Any) -> None:
        """Count one finished request."""
        self._done += 1
        done = min(self._total, self._before + self._items * self._done // max(1, self._requests))
        if self._on_item is not None and done > self._reported:
            self._reported = done
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


def one_process() -> contextlib.AbstractContextManager[None]:
    """Within, lm-eval draws the bootstrap of a standard error here, with the same draws as in its pool of processes.

    The pool forks. A fork inherits Ray's handler of SIGTERM, which raises `SystemExit`: when the pool ends a fork that
    has hardly begun, the fork goes on as a second copy of this worker.
    """
    return variable("DISABLE_MULTIPROC", "1")  # lm-eval reads it at each bootstrap
