"""Reading pages with several threads, no faster than allowed.

The interpreter lock is free while a page is read and while numpy works on it, so threads that each have a buffer of
their own keep several cores busy. Buffers are small enough that what was just read is still in a cache when it is
worked on, and large enough that threads seldom hand the lock to each other.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

MOST_THREADS = 8
"""More read no faster, since all need the interpreter lock, but each takes 16 MiB and more to work in."""

_Task = TypeVar("_Task")
_Room = TypeVar("_Room")


class Readers:
    """Threads that read, and the rate that all of them together keep to.

    :param threads: None: one for each core that this process may use, and MOST_THREADS at most.
    :param bytes_per_s: the rate; None: no limit.
    :param clock: gives seconds; only differences count. :param wait: waits for a number of seconds.
    """

    def __init__(
        self,
        threads: int | None = None,
        bytes_per_s: float | None = None,
        *,
        clock: Callable[[], float],
        wait: Callable[[float], None],
    ) -> None:
        self._threads = threads or min(len(os.sched_getaffinity(0)), MOST_THREADS)
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._wait = wait
        self._due_s = clock()
        self._lock = threading.Lock()

    def before_reading(self, size_bytes: int) -> None:
        """Wait until ``size_bytes`` may be read. Several threads may call it at once."""
        if self._bytes_per_s is None:
            return
        with self._lock:
            now = self._clock()
            start = max(now, self._due_s)
            self._due_s = start + size_bytes / self._bytes_per_s
        if start > now:
            self._wait(start - now)

    def run(self, tasks: Iterable[_Task], work: Callable[[_Task, _Room], None], room: Callable[[], _Room]) -> None:
        """Call ``work`` with each of ``tasks``; the first error ends all threads and is raised.

        :param room: makes what each thread works in, such as a buffer.
        """
        waiting = iter(tasks)
        lock = threading.Lock()
        stop = threading.Event()

        def run() -> None:
            ours = room()
            while not stop.is_set():
                with lock:
                    task = next(waiting, None)
                if task is None:
                    return
                try:
                    work(task, ours)
                except BaseException:
                    stop.set()
                    raise

        if self._threads == 1:
            run()
            return
        with ThreadPoolExecutor(self._threads, "estimate") as pool:
            try:
                running = [pool.submit(run) for _ in range(self._threads)]
                for each in running:
                    each.result()
            except BaseException:
                stop.set()
                raise
