"""Write-protected pages of guests, and the thread that hears of each write to one.

A write to a protected page waits in the kernel until somebody lets it go on, so the thread here must answer soon and
under all circumstances: it does nothing but kill the page's handle and take the protection away, in this order. While
pages are being remapped (*in flight*) it leaves them alone; whoever remaps them wakes their writers afterwards.

Python's threads take turns; ``SWITCH_INTERVAL_S`` bounds how long a writer waits for a computation of ours.
"""

from __future__ import annotations

import errno
import os
import select
import sys
import threading
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.qemu import syscalls

SWITCH_INTERVAL_S: Final = 0.0002
"""Python's own default is 5 ms; a guest should not notice us."""

_MESSAGES: Final = 64

_MESSAGE = np.dtype(
    {
        "names": ["event", "flags", "address"],
        "formats": ["u1", "<u8", "<u8"],
        "offsets": [0, 8, 16],
        "itemsize": 32,
    }
)
"""struct uffd_msg, as far as it is about page faults"""

OnWrites = Callable[[int, NDArray[np.int64]], None]
"""Called with a uffd and the addresses of pages that writers wait at."""
OnEnd = Callable[[int], None]
"""Called with a uffd whose process has ended."""
OnFailure = Callable[[], None]
"""Called when the thread itself fails: whoever waits must be let go in some other way."""


class WriteWatch:
    """The thread. ``add`` and ``remove`` uffds at any time; ``close`` ends it."""

    def __init__(self, on_writes: OnWrites, on_end: OnEnd, on_failure: OnFailure) -> None:
        self._on_writes = on_writes
        self._on_end = on_end
        self._on_failure = on_failure
        self._poll = select.epoll()
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        self._poll.register(self._stop, select.EPOLLIN)
        self._interval = sys.getswitchinterval()
        self.failure: BaseException | None = None
        sys.setswitchinterval(SWITCH_INTERVAL_S)
        self._thread = threading.Thread(target=self._run, name="memshr-write-watch", daemon=True)
        self._thread.start()

    def add(self, uffd: int) -> None:
        """Hear of writes to what this uffd protects."""
        self._poll.register(uffd, select.EPOLLIN)

    def remove(self, uffd: int) -> None:
        """Hear no more of it; whoever still waits is woken when it is closed."""
        self._poll.unregister(uffd)

    def _run(self) -> None:
        buffer = np.zeros(_MESSAGES, dtype=_MESSAGE)
        syscalls.hurry(threading.get_native_id())
        try:
            while True:
                for uffd, events in self._poll.poll():
                    if uffd == self._stop:
                        return
                    if events & (select.EPOLLERR | select.EPOLLHUP) or not self._serve(uffd, buffer):
                        self._poll.unregister(uffd)
                        self._on_end(uffd)
        except BaseException as error:
            self.failure = error
            self._on_failure()

    def _serve(self, uffd: int, buffer: NDArray[np.void]) -> bool:
        try:
            got = os.readv(uffd, [buffer.data])
        except BlockingIOError:  # somebody woke the writer before we looked
            return True
        except OSError as error:
            if error.errno in {errno.ESRCH, errno.EINVAL, errno.EBADF}:
                return False
            raise
        messages = buffer[: got // _MESSAGE.itemsize]
        faults = messages[messages["event"] == syscalls.UFFD_EVENT_PAGEFAULT]
        if len(faults):
            self._on_writes(uffd, faults["address"].astype(np.int64))
        return True

    def close(self) -> None:
        """End the thread; no uffd is closed."""
        os.eventfd_write(self._stop, 1)
        self._thread.join()
        self._poll.close()
        os.close(self._stop)
        sys.setswitchinterval(self._interval)
