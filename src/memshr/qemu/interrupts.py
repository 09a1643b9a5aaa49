"""Ctrl-C and SIGTERM, put off while a guest's pages are half-way from one state to another.

Python raises KeyboardInterrupt in the main thread between any two instructions, also in the midst of the lines that put
something right. Every change of state here is made so that an exception leaves no trace; this makes it rare that one
comes, and keeps it out of the lines that undo. What came meanwhile is delivered at the end, to whoever handles it.
"""

from __future__ import annotations

import contextlib
import signal
import threading
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Final

_PUT_OFF: Final = (signal.SIGINT, signal.SIGTERM)

_pending: list[tuple[int, FrameType | None]] = []
_depth = 0


def _note(number: int, frame: FrameType | None) -> None:
    _pending.append((number, frame))


@contextlib.contextmanager
def uninterrupted() -> Iterator[None]:
    """No handler of SIGINT or SIGTERM runs inside the ``with``, but right after it. It must be short.

    Only Python's main thread runs handlers, so in other threads this does nothing. It may be entered again inside.
    """
    global _depth  # noqa: PLW0603  # handlers are a property of the process
    if threading.current_thread() is not threading.main_thread() or _depth:
        yield
        return
    handlers: dict[int, Callable[[int, FrameType | None], object]] = {}
    try:
        _depth = 1
        for each in _PUT_OFF:
            before = signal.getsignal(each)
            if callable(before):  # neither ignored, nor the system's own, nor somebody's in C
                handlers[each] = before
                signal.signal(each, _note)
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        _depth = 0
        arrived, _pending[:] = list(_pending), []
        for number, frame in arrived:
            if number in handlers:
                handlers[number](number, frame)
