"""Ctrl-C and SIGTERM, also where Python drops the exception."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

_SIGNALS = (signal.SIGINT, signal.SIGTERM)


@contextmanager
def interrupts() -> Iterator[Callable[[], None]]:
    """Both signals raise `KeyboardInterrupt` in the main thread; the function that is returned raises it again.

    Python drops an exception that is raised in a destructor, and a signal may arrive in one. A loop that calls the
    function now and then ends all the same. Does nothing in another thread, nor for a signal that is ignored.
    """
    arrived = threading.Event()

    def handle(*_: Any) -> None:
        arrived.set()
        raise KeyboardInterrupt

    def check() -> None:
        if arrived.is_set():
            raise KeyboardInterrupt

    is_main = threading.current_thread() is threading.main_thread()
    before = {number: signal.getsignal(number) for number in _SIGNALS if is_main}
    replaced = {number: handler for number, handler in before.items() if handler not in (signal.SIG_IGN, None)}
    for number in replaced:
        signal.signal(number, handle)
    try:
        yield check
    finally:
        for number, handler in replaced.items():
            signal.signal(number, handler)
