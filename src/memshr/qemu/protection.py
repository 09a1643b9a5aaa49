"""Who hears of writes to protected pages: a thread for each guest that is attached.

A write to a protected page waits in the kernel until somebody lets it go on. So the thread here must answer soon, under
all circumstances. It only kills the page's handle and then takes the protection away (``PageStates.written``). It
leaves pages alone while they are being remapped (*in flight*); ``remapping`` wakes their writers afterwards. If the
thread itself fails, for whatever reason, the guest is given up, and no writer waits.

Python's threads take turns; ``SWITCH_INTERVAL_S`` bounds how long a writer waits for a computation of ours.
"""

from __future__ import annotations

import errno
import logging
import os
import select
import sys
import threading
import weakref
from collections.abc import Callable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import DomainError
from memshr.qemu import syscalls
from memshr.qemu.agent import AgentLink
from memshr.qemu.attachment import Attachment

_log = logging.getLogger(__name__)

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

OnWrites = Callable[[Attachment, NDArray[np.int64]], None]
"""Called with a guest and those of its pages that writers wait at, ascending and distinct."""


class _ShortTurns:
    """Python's switch interval is short as long as anybody listens, and what it was when nobody does any more."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before_s = 0.0

    def begin(self) -> None:
        with self._lock:
            if not self._users:
                self._before_s = sys.getswitchinterval()
                sys.setswitchinterval(SWITCH_INTERVAL_S)
            self._users += 1

    def end(self) -> None:
        with self._lock:
            self._users -= 1
            if not self._users:
                sys.setswitchinterval(self._before_s)


_short_turns = _ShortTurns()


class WriteWatch:
    """The thread of one link. It ends when the link does; ``failure`` says what it failed of, if it did."""

    def __init__(self, guest: Attachment, link: AgentLink, on_writes: OnWrites) -> None:
        self._guest = guest
        self._link = link
        self._on_writes = on_writes
        self.failure: BaseException | None = None
        self._ended = False
        # A copy: the link's own number is closed, and may name another file, as soon as somebody gives it up.
        self._uffd = os.dup(link.uffd)
        self._stop = os.eventfd(0, os.EFD_CLOEXEC)
        _open_watches.add(self)
        self._thread = threading.Thread(target=self._run, name=f"memshr-watch-{guest.domid}", daemon=True)
        _short_turns.begin()
        self._thread.start()

    def _run(self) -> None:
        try:
            buffer = np.zeros(_MESSAGES, dtype=_MESSAGE)
            syscalls.set_priority(threading.get_native_id())
            poll = select.poll()
            poll.register(self._uffd, select.POLLIN)
            poll.register(self._stop, select.POLLIN)
            while True:
                ready = dict(poll.poll())
                if self._stop in ready or not self._serve(buffer):
                    return
        except DomainError:  # the guest has ended, or was given up: nobody waits any more
            return
        except BaseException as error:
            self.failure = error
            _log.exception("the write watch of guest %s failed", self._guest.process.name)
            self._guest.lose(error)
        finally:
            self.release_files()
            _short_turns.end()

    def _serve(self, buffer: NDArray[np.void]) -> bool:
        try:
            got = os.readv(self._uffd, [buffer.data])
        except BlockingIOError:  # somebody woke the writer before we looked
            return True
        except OSError as error:
            if error.errno in {errno.ESRCH, errno.EINVAL, errno.EBADF} and self._guest.gone:
                return False
            raise
        messages = buffer[: got // _MESSAGE.itemsize]
        faults = messages[messages["event"] == syscalls.UFFD_EVENT_PAGEFAULT]
        if len(faults):
            pages = self._guest.ram.pages_of_hvas(faults["address"].astype(np.int64))
            self._on_writes(self._guest, np.unique(pages[pages >= 0]))
        return True

    def release_files(self) -> None:
        """Close the copy of the userfaultfd."""
        uffd, self._uffd = self._uffd, -1
        if uffd >= 0:
            os.close(uffd)

    def end(self) -> None:
        """End the thread and close its copy of the userfaultfd; waits for that, unless called by the thread itself."""
        if self._ended:
            return
        self._ended = True
        os.eventfd_write(self._stop, 1)
        if threading.current_thread() is not self._thread:
            self._thread.join()
        os.close(self._stop)


_open_watches: weakref.WeakSet[WriteWatch] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # As in agent: a forked child must hold nothing that keeps pages protected.
    for watch in list(_open_watches):
        watch.release_files()


os.register_at_fork(after_in_child=_let_go_in_child)
