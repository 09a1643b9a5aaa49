"""Calls that a hostile QEMU can make last for ever, with a deadline.

The kernel lets nobody but a SIGKILL interrupt a read of another process's memory, and whoever owns that memory decides
when a page of it arrives: it may lie in a file of a file system of its own, or behind a userfaultfd. So such a call is
made by a thread of its own, and whoever asked for it stops waiting when its time is over. The thread stays where it is
until the call returns or the process ends, and so does what the call may still write into.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable
from typing import Final

from memshr.errors import BackendError

DEADLINE_S: Final = 20.0
"""For one call, of a thousand pages at most: time enough for a host that has to swap them in first."""


class StuckError(BackendError):
    """A call did not return in time. What it was to write into must not be used again."""


class Bounded:
    """A thread that makes calls, one after the other. It is started when it is first needed.

    :param what: what the calls do, for the error.
    :param deadline_s: for each call; None: DEADLINE_S.
    """

    def __init__(self, what: str, deadline_s: float | None = None) -> None:
        self.deadline_s = DEADLINE_S if deadline_s is None else deadline_s
        self._what = what
        self._asked: queue.SimpleQueue[Callable[[], int] | None] = queue.SimpleQueue()
        self._answered: queue.SimpleQueue[int | BaseException] = queue.SimpleQueue()
        self._thread: threading.Thread | None = None
        self._due = 0

    def call(self, function: Callable[[], int]) -> int:
        """What ``function`` returns, or raises.

        :raises StuckError: it did not return in time, or an earlier call has not returned yet.
        """
        if self._thread is None:
            self._thread = threading.Thread(target=self._run, name="memshr-bounded", daemon=True)
            self._thread.start()
        while self._due:  # of a call that was interrupted
            self._wait()
        self._due += 1
        self._asked.put(function)
        answer = self._wait()
        if isinstance(answer, BaseException):
            raise answer
        return answer

    def _wait(self) -> int | BaseException:
        try:
            answer = self._answered.get(timeout=self.deadline_s)
        except queue.Empty:
            raise StuckError(
                f"{self._what} does not end; it was given up after {self.deadline_s:.0f} s",
                remedy="leave this guest out",
            ) from None
        self._due -= 1
        return answer

    def _run(self) -> None:
        while (function := self._asked.get()) is not None:
            try:
                self._answered.put(function())
            except BaseException as error:  # handed over to whoever asked
                self._answered.put(error)

    def close(self) -> None:
        """End the thread, unless it is in a call that does not return."""
        if self._thread is not None:
            self._asked.put(None)
