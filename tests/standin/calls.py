"""Every call that can fail, as memshr makes it: recorded, watched, and made to fail."""

from __future__ import annotations

import signal
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """The ``number``th call of a name since the recording began, from 0 on."""

    name: str
    number: int

    def __str__(self) -> str:
        return f"{self.name}#{self.number}"


@dataclass(frozen=True)
class Failure:
    """Which call fails, of what, and whether it has its effect: "before" it has, "half" of it, or "after".

    A KeyboardInterrupt comes as a signal, so that it is put off where memshr puts it off.
    """

    call: Call
    error: BaseException
    when: str


class Calls:
    """The calls of one stand-in. Nothing fails unless ``failure`` says so."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()
        self.made: list[Call] = []
        self.failure: Failure | None = None
        self.failed = False
        self.before: Callable[[Call], object] = lambda _: None
        """is told of each call right before it"""

    def begin(self, failure: Failure | None = None) -> None:
        """Record, and count, from here on."""
        with self._lock:
            self.made = []
            self._counts.clear()
            self.failure, self.failed = failure, False

    def end(self) -> list[Call]:
        """Let nothing fail any more; returns what was called."""
        with self._lock:
            self.failure = None
            self.before = lambda _: None
            return list(self.made)

    def of(self, owner: str) -> GuestCalls:
        """The calls that are about one guest."""
        return GuestCalls(self, owner)

    def __call__(self, name: str, call: Callable[[], Result], half: Callable[[], object] | None = None) -> Result:
        """Make a call, or let it fail."""
        if threading.current_thread() is not threading.main_thread():
            name = f"watch: {name}"
        with self._lock:
            this = Call(name, self._counts[name])
            self._counts[name] += 1
            self.made.append(this)
            failure = self.failure if self.failure is not None and self.failure.call == this else None
            self.failed |= failure is not None
        self.before(this)
        if failure is None:
            return call()
        if isinstance(failure.error, KeyboardInterrupt):
            return _interrupted(failure.when, call, half)
        if failure.when == "after":
            call()
        elif failure.when == "half" and half is not None:
            half()
        raise failure.error


def _interrupted(when: str, call: Callable[[], Result], half: Callable[[], object] | None) -> Result:
    # Where the interrupt is put off, the call is done as if nothing had been.
    if when == "half" and half is not None:
        half()
    if when != "after":
        signal.raise_signal(signal.SIGINT)
        return call()
    result = [call()]
    try:
        signal.raise_signal(signal.SIGINT)
    except BaseException:
        result.clear()  # what it was is lost, and no frame of the error keeps it
        raise
    return result[0]


class GuestCalls:
    """As Calls; the names begin with that of a guest."""

    def __init__(self, calls: Calls, owner: str) -> None:
        self._calls = calls
        self._owner = owner

    def __call__(self, name: str, call: Callable[[], Result], half: Callable[[], object] | None = None) -> Result:
        """Make a call, or let it fail."""
        return self._calls(f"{self._owner}: {name}", call, half)
