"""The agent: one thread inside QEMU that does system calls for us, and our end of it.

What makes this hard: guest pages can be remapped only from inside QEMU's own process, by code that QEMU does not have,
and memshr may die at any instant. So:

* **The control area** is a memory file that we and QEMU both have mapped: a page of code, then data. ``injector``
  maps it and makes the thread, once in the life of a QEMU. The thread has all signals blocked, a stack of its own and
  no ties to QEMU's locks; it is cloned with the flags of an ordinary thread, the only ones that QEMU's own sandbox lets
  pass. A later memshr finds the area in /proc/PID/maps and opens it through /proc/PID/map_files.
* **A link** is a Unix socket whose one end the thread holds and whose other end we hold. One byte from us: run the
  table. One byte back: done. *The end of the stream: memshr is gone*, and the thread closes everything that it had for
  us and goes to sleep until the next socket is offered. So nothing of ours stays behind, and nothing has to be cleaned
  up by whoever comes next. Descriptors go to the thread over this socket, not through QEMU's monitor.
* **The thread holds the userfaultfd as well as we do.** If we alone held it, our death would lift the protection of
  pages while a posted table still remaps them, and a write that slipped in between would be lost. As it is, the table
  that is under way ends under full protection; then the thread sees the end of the stream and closes its copy, the
  last one, and every writer that waits goes on.
* **A table stops at its first surprise.** Each call has the result that it must have (the address that a mapping must
  get, the bytes that must be copied); at any other the thread stores what it got and does nothing further.
* **A page is compared with its frame by the thread**, under the protection of its own guest, right before the frame is
  mapped over it (``IF_EQUAL``). Whatever another guest, or we, believed of the page before does not matter then.

Every wait here has a deadline. When one passes, the guest is given up: ``abandon`` lets its writers go on.

``control_area`` has the layout of the area, ``agent.S`` the thread's code. x86-64 only; its strong store order is what
makes plain stores of table and state enough.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import weakref
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from memshr.closing import Closing
from memshr.errors import BackendError, ConnectionLostError, InvariantError, RefusedDomainError
from memshr.qemu import syscalls
from memshr.qemu.control_area import (
    COUNT_AT,
    DATA,
    DONE_AT,
    EXPECTED_SOCKET_AT,
    FORGET,
    KEEP,
    KEEP_RECEIVED,
    LOCAL_PIECES,
    MESSAGE_AT,
    OFFER_AT,
    PID_AT,
    RECEIVED_AT,
    REMOTE_PIECES,
    SCRATCH_AT,
    SLOTS,
    STATE_AT,
    TABLE,
    TABLE_ENTRIES,
    ControlArea,
    Original,
)
from memshr.qemu.injection import descriptor_number
from memshr.qemu.monitor import Monitor

IOVEC = np.dtype([("base", "<u8"), ("length", "<u8")])
"""struct iovec (``linux/uio.h``)"""

ANSWER_DEADLINE_S: Final = 5.0
"""How long a table may wait for the thread, and how long it may then take."""

_IDLE, _POSTED, _UNDER_WAY, _DONE = 0, 1, 2, 4
_ANSWERS: Final = 64
"""bytes that are read at once; one is an answer"""
_DESCRIPTORS_END: Final = 1 << 31
_MSG_CMSG_CLOEXEC: Final = 0x40000000
_UFFD_LINK: Final = "anon_inode:[userfaultfd]"


class AgentCallError(BackendError):
    """A call of a table did not give the result that it must; ``errno`` is the kernel's, 0 if it was no error.

    ``done`` calls before it were done.
    """

    def __init__(self, message: str, *, errno: int, done: int) -> None:
        super().__init__(message)
        self.errno = errno
        self.done = done


def is_linked(pid: int) -> bool:
    """Whether an agent in this QEMU is at work for some memshr, a living one or one that has died just now.

    :raises OSError: the process is gone, or we may not look into it.
    """
    busy = False
    for control in ControlArea.find_all(pid):
        busy |= control.is_taken()
        control.close()
    return busy


class AgentLink(Closing):
    """A connection with the agent of one QEMU, from ``open`` until ``close`` or our death.

    ``uffd`` is our copy of the userfaultfd of QEMU's memory, which has shaken hands already; ``features`` are what the
    kernel's userfaultfd can do. ``deadline_s`` bounds every wait for the agent.
    """

    def __init__(self, control: ControlArea, wire: socket.socket) -> None:
        self.control = control
        self.uffd = -1
        self.features = 0
        self.deadline_s = ANSWER_DEADLINE_S
        self._wire = wire
        self._answer_is_due = False
        self._due_s = 0.0
        self._posted = 0
        self._priority: tuple[int, int] | None = None
        (self._pid_inside,) = control.get(PID_AT, "<i")
        self._slots = [control.slots[0], *[-1] * (SLOTS - 1)]
        """what we have written into the area's slots: what a QEMU has made of them since is not read again"""
        words: NDArray[np.uint64] = np.frombuffer(control.memory, np.uint64, TABLE_ENTRIES * 8, TABLE)
        self._table = words.reshape(TABLE_ENTRIES, 8)
        self.local_pieces, self.remote_pieces = (
            np.frombuffer(control.memory, IOVEC, syscalls.IOV_MAX, offset) for offset in (LOCAL_PIECES, REMOTE_PIECES)
        )
        _open_links.add(self)

    @classmethod
    def open(cls, pid: int, pidfd: int, name: str, control: ControlArea, monitor: Monitor) -> Self:
        """Offer a socket to the sleeping agent, and have it make a userfaultfd. If it fails nothing of it stays.

        :param control: owned by the link from now on, also if this fails.
        :raises RefusedDomainError: another memshr is at work on it, or QEMU may not make a userfaultfd.
        :raises ConnectionLostError: the agent does not answer.
        """
        link = None
        try:
            _wait_until_free(control, pid, name)
            ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
            with theirs:
                link = cls(control, ours)
                link._offer(pid, pidfd, name, theirs, monitor)
            link._make_userfaultfd(pidfd, name)
            # While it is at work somebody may be waiting for it, and the guest's own processors are busy.
            link._prefer(control.thread(pid))
        except BaseException:
            if link is None:
                control.close()
            else:
                link.close()
            raise
        return link

    def _offer(self, pid: int, pidfd: int, name: str, theirs: socket.socket, monitor: Monitor) -> None:
        control = self.control
        status = os.fstat(theirs.fileno())
        monitor.hand_over(theirs.fileno())
        try:
            number = descriptor_number(pid, pidfd, theirs.fileno())
            control.put(EXPECTED_SOCKET_AT, "<2Q", status.st_dev, status.st_ino)
            self._pid_inside = pid_inside(pid)
            control.put(PID_AT, "<i", self._pid_inside)
            control.put(STATE_AT, "<I", _IDLE)
            control.put(OFFER_AT, "<i", number)
            syscalls.futex_wake(control.word_address(OFFER_AT))
            self._wire.settimeout(self.deadline_s)
            try:
                hello = self._wire.recv(1)
            except TimeoutError:
                hello = b""
            if not hello:
                control.put(OFFER_AT, "<i", -1)
                raise ConnectionLostError(
                    f"the agent in guest {name} ({pid}) does not answer", remedy="is QEMU stopped or frozen?"
                )
            self._slots[0] = control.slots[0]
        finally:
            monitor.take_back()

    def _make_userfaultfd(self, pidfd: int, name: str) -> None:
        try:
            device: int | None = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
        except FileNotFoundError:
            device = None
        if device is None:
            made = self.call(syscalls.NR_USERFAULTFD | KEEP, os.O_CLOEXEC)
        else:
            try:
                number = self.give(device)
            finally:
                os.close(device)
            made = self.call(syscalls.NR_IOCTL | KEEP, number, syscalls.USERFAULTFD_IOC_NEW, os.O_CLOEXEC)
        if made < 0:
            raise RefusedDomainError(
                f"guest {name} cannot have a userfaultfd: {_reason(made)}",
                reasons=["QEMU may not make a userfaultfd"],
                remedy="run Linux 6.1 or later as root, or set vm.unprivileged_userfaultfd=1",
            )
        self._kept(made)
        if device is not None:
            self.drop(number)
        wanted = syscalls.UFFD_FEATURE_PAGEFAULT_FLAG_WP | syscalls.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        wanted |= syscalls.userfaultfd_features() & syscalls.UFFD_FEATURE_WP_UNPOPULATED
        # SAFETY: the number is QEMU's word. Requests of userfaultfd go to nothing but a userfaultfd, and to a new one.
        try:
            self.uffd = syscalls.pidfd_getfd(pidfd, made)
            is_one = os.fspath(Path(f"/proc/self/fd/{self.uffd}").readlink()) == _UFFD_LINK
            if is_one:
                syscalls.userfaultfd_api(self.uffd, wanted)
        except OSError as error:
            raise ConnectionLostError(f"guest {name} does not show its userfaultfd: {error.strerror}") from error
        if not is_one:
            raise ConnectionLostError(f"guest {name} shows another file instead of its userfaultfd")
        os.set_blocking(self.uffd, False)
        self.features = wanted

    def _prefer(self, tid: int | None) -> None:
        if tid is not None:
            with contextlib.suppress(OSError):
                before = os.getpriority(os.PRIO_PROCESS, tid)
                self._priority = tid, before
                syscalls.set_priority(tid)

    # -- protection ------------------------------------------------------------------------------------------------

    def register(self, address: int, length_bytes: int) -> None:
        """Make a range of QEMU's memory one that can be write-protected. :raises OSError: it is not all mapped."""
        syscalls.userfaultfd_register(self.uffd, address, length_bytes)

    def protect(self, runs: Iterable[tuple[int, int]]) -> None:
        """Let writers of these runs (address, bytes) wait. :raises OSError: those before the one that fails are."""
        syscalls.userfaultfd_write_protect(self.uffd, runs, True)

    def unprotect(self, runs: Iterable[tuple[int, int]]) -> None:
        """Let writers of these runs go on. :raises OSError: as protect."""
        syscalls.userfaultfd_write_protect(self.uffd, runs, False)

    def wake(self, address: int, length_bytes: int) -> None:
        """Let whoever waits at a page of this range try again. :raises OSError: QEMU has ended."""
        syscalls.userfaultfd_wake(self.uffd, address, length_bytes)

    # -- tables ----------------------------------------------------------------------------------------------------

    def run(self, table: NDArray[np.uint64]) -> int:
        """Have the agent do the calls of ``table``, in order, until one does not give the result that it must.

        :param table: shape ``(n <= TABLE_ENTRIES, 8)``: number, six arguments, the result that it must have.
        :returns: how many calls were done; ``result(i)`` tells what call ``i`` gave.
        :raises ConnectionLostError: QEMU died, or does not run, or does not end the table.
        """
        self.post(table)
        self.await_answer()
        return self.done

    def post(self, table: NDArray[np.uint64]) -> None:
        """The first half of ``run``: several agents can be at work at once. ``await_answer`` is the second half."""
        if not 0 < len(table) <= TABLE_ENTRIES:
            raise InvariantError(f"a table of {len(table)} calls")
        if self._answer_is_due:
            raise InvariantError("a table while another is under way")
        self._table[: len(table)] = table
        self._posted = len(table)
        self.control.put(COUNT_AT, "<2I", len(table), 0)
        self._answer_is_due = True
        self._due_s = time.monotonic() + self.deadline_s
        self.control.put(STATE_AT, "<I", _POSTED)
        try:
            self._wire.sendall(b"\1")
        except OSError as error:
            raise ConnectionLostError("QEMU has ended") from error

    def fileno(self) -> int:
        """What can be read when the agent has answered, for poll(2)."""
        return self._wire.fileno()

    @property
    def rest_s(self) -> float:
        """How long the table that is under way may still take, in seconds."""
        return max(0.0, self._due_s - time.monotonic())

    def await_answer(self) -> None:
        """Wait until no table is under way; ``done`` then says how far the last one got.

        Whoever lifts a protection must call this first: an exception may have ended our wait, and not the table.

        :raises ConnectionLostError: QEMU has ended, or does not answer in time; the caller must ``abandon``.
        """
        last_chance = False
        while self._answer_is_due:
            if not self.rest_s:  # also if bytes that mean nothing keep coming
                self._withdraw(last_chance)
                last_chance = True
            try:
                self._wire.settimeout(max(self.rest_s, 0.001))
                answer = self._wire.recv(_ANSWERS, socket.MSG_PEEK)
            except TimeoutError:
                continue
            except OSError as error:
                raise ConnectionLostError("QEMU has ended") from error
            if not answer:
                raise ConnectionLostError("QEMU has ended")
            # The state decides, and before the byte is taken away: an interrupt between leaves it to the next table.
            self._answer_is_due = self.control.get(STATE_AT, "<I") != (_DONE,)
            self._wire.recv(len(answer))

    def _withdraw(self, last_chance: bool) -> None:
        # Atomic against the agent's own step from posted to under way: afterwards the state is nothing posted (0), or
        # what the agent made of it. A table that was begun gets as much time again, once.
        syscalls.atomic_clear_bits(self.control.word_address(STATE_AT), _POSTED)
        if self.control.get(STATE_AT, "<I") == (_IDLE,):
            self._answer_is_due = False
            raise ConnectionLostError(
                f"QEMU did not run for {self.deadline_s:.0f} s",
                remedy="continue the process (kill -CONT, or thaw it)",
            )
        if last_chance:
            raise ConnectionLostError("QEMU's agent began a table and does not end it")
        self._due_s = time.monotonic() + self.deadline_s

    @property
    def done(self) -> int:
        """How many calls of the last table were done."""
        return min(int(self.control.get(DONE_AT, "<I")[0]), self._posted)

    def result(self, index: int) -> int:
        """What call ``index`` of the last table gave: a value, or a negative errno."""
        value = int(self._table[index, 7])
        return value - (1 << 64) if value >> 63 else value

    def call(self, number: int, *arguments: int) -> int:
        """One system call in QEMU; returns what it gave, as ``result``."""
        self.run(entries([(number, *arguments)], results=[1 << 63]))
        return self.result(0)

    def failure(self, done: int, what: str) -> AgentCallError:
        """The error for a table that ended after ``done`` calls."""
        got = self.result(done)
        return AgentCallError(f"{what}: {_reason(got)}", errno=_errno(got), done=done)

    # -- what a call points to -------------------------------------------------------------------------------------

    @property
    def side_address(self) -> int:
        """Where in QEMU pages are built before they are moved into place."""
        return self.control.side_address

    @property
    def pid_inside(self) -> int:
        """QEMU's own idea of its pid."""
        return self._pid_inside

    @property
    def pieces_addresses(self) -> tuple[int, int]:
        """Where in QEMU ``local_pieces`` and ``remote_pieces`` are."""
        return self.control.code_address + LOCAL_PIECES, self.control.code_address + REMOTE_PIECES

    @property
    def scratch_address(self) -> int:
        """Where in QEMU a call may leave some hundred bytes for ``scratch`` to read."""
        return self.control.data_address + SCRATCH_AT

    def scratch(self, length_bytes: int) -> bytes:
        """What the last calls have left at ``scratch_address``."""
        start = DATA + SCRATCH_AT
        return self.control.memory[start : start + length_bytes]

    def set_pieces(self, pieces: NDArray[np.int64]) -> None:
        """What the next process_vm_readv copies: address to, address from, bytes; shape ``(n <= IOV_MAX, 3)``."""
        for column, held in ((0, self.local_pieces), (1, self.remote_pieces)):
            held["base"][: len(pieces)] = pieces[:, column]
            held["length"][: len(pieces)] = pieces[:, 2]

    @property
    def originals(self) -> list[Original]:
        """How the RAM was before the first memshr changed it; kept in QEMU, so that a later memshr finds it."""
        return self.control.originals

    @originals.setter
    def originals(self, records: Sequence[Original]) -> None:
        self.control.originals = records

    def nodes_address(self, at: int) -> int:
        """Where QEMU has the nodes of record ``at`` of ``originals``."""
        return self.control.nodes_address(at)

    def may_call(self, number: int) -> bool:
        """Whether QEMU's sandbox lets a system call pass that the agent can do without."""
        return number not in self.control.forbidden

    # -- descriptors -----------------------------------------------------------------------------------------------

    def give(self, descriptor: int) -> int:
        """Hand a descriptor of ours to the agent, which closes it when the link ends; returns its number in QEMU.

        :raises AgentCallError: QEMU has too many open.
        """
        data, sock = self.control.data_address, self._slots[0]
        if sock < 0:  # QEMU has written to it
            raise ConnectionLostError("the agent has lost its socket", remedy="leave this guest alone")
        header = data + MESSAGE_AT
        # struct msghdr: no name; one iovec; the control message; then the iovec: one byte.
        self.control.put(MESSAGE_AT, "<9Q", 0, 0, header + 0x40, 1, data + RECEIVED_AT - 16, 24, 0, 0, header + 0x58)
        self.control.put(MESSAGE_AT + 0x48, "<Q", 1)
        self.control.put(RECEIVED_AT, "<i", -1)
        self.post(entries([(syscalls.NR_RECVMSG | KEEP_RECEIVED, sock, header, _MSG_CMSG_CLOEXEC)], results=[1]))
        try:
            socket.send_fds(self._wire, [b"\2"], [descriptor])
        except OSError as error:
            raise ConnectionLostError("QEMU has ended") from error
        self.await_answer()
        (number,) = self.control.get(RECEIVED_AT, "<i")
        if self.done != 1 or number < 0:
            raise AgentCallError("QEMU did not take a descriptor; has it too many open?", errno=24, done=self.done)
        self._kept(number)
        return number

    def drop(self, number: int) -> None:
        """Have the agent close a descriptor that ``give`` gave it."""
        if number in self._slots[1:]:
            self._slots[self._slots.index(number, 1)] = -1
            self.call(syscalls.NR_CLOSE | FORGET, number)

    def _kept(self, number: int) -> None:
        # The agent has noted it in the first slot that was free: so do we.
        if not 0 <= number < _DESCRIPTORS_END:
            raise AgentCallError(f"QEMU says that it has a descriptor {number}", errno=0, done=0)
        if -1 not in self._slots:
            raise InvariantError("the agent has a thousand descriptors")
        self._slots[self._slots.index(-1)] = number

    # -- the end ---------------------------------------------------------------------------------------------------

    def end_agent(self, pid: int) -> None:
        """Have the agent close its descriptors and end; the link is closed then.

        :raises ConnectionLostError: it has not ended; QEMU does not run.
        """
        slots = [slot for slot in self._slots if slot >= 0]
        calls = [*((syscalls.NR_CLOSE, slot) for slot in slots), (syscalls.NR_EXIT, 0)]
        self.post(entries(calls, results=[0] * len(calls)))
        # Not the end of our stream: whoever else has the socket open would hide it.
        end = time.monotonic() + self.deadline_s
        while self.control.thread_lives(pid):
            if time.monotonic() > end:
                self._withdraw(last_chance=True)
            time.sleep(0.001)
        self._priority = None
        self.close()

    def release_files(self) -> None:
        """Close our ends without ending the link; for the child of a fork."""
        uffd, self.uffd = self.uffd, -1
        if uffd >= 0:
            os.close(uffd)
        self._wire.close()

    def __del__(self) -> None:
        # An interrupt may come between the making of a link and the note of whose it is. Its userfaultfd must not
        # stay open: nobody could attach to the guest again.
        if self.control.file >= 0:
            self.close()

    def abandon(self) -> None:
        """Let everybody who waits go on, from whatever thread: the agent sees the end of the stream."""
        with contextlib.suppress(OSError):
            self._wire.shutdown(socket.SHUT_RDWR)
        uffd, self.uffd = self.uffd, -1
        if uffd >= 0:
            os.close(uffd)

    def close(self) -> None:
        """End the link: the agent closes its descriptors, all protection ends, waiting writers go on."""
        self.abandon()
        self._wire.close()
        _open_links.discard(self)
        if self._priority is not None:
            tid, before = self._priority
            self._priority = None
            with contextlib.suppress(OSError):  # the thread has ended
                os.setpriority(os.PRIO_PROCESS, tid, before)
        self._table = _NO_TABLE  # the three keep the area mapped
        self.local_pieces = self.remote_pieces = np.empty(0, dtype=IOVEC)
        self.control.close()


_NO_TABLE: Final = np.empty((0, 8), dtype=np.uint64)

_open_links: weakref.WeakSet[AgentLink] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A forked child that kept a socket open would hide our death from the agent, and writers would wait for it.
    for link in list(_open_links):
        link.release_files()


os.register_at_fork(after_in_child=_let_go_in_child)


def _errno(result: int) -> int:
    # A result is what QEMU lets us read: most numbers are no errno.
    return -result if -4096 < result < 0 else 0


def _reason(result: int) -> str:
    number = _errno(result)
    return os.strerror(number) if number else f"unexpected result {result:#x}"


def entries(calls: Sequence[tuple[int, ...]], results: Sequence[int]) -> NDArray[np.uint64]:
    """A small table: each call as its number and up to six arguments, and the result that it must have."""
    table = np.zeros((len(calls), 8), dtype=np.uint64)
    for row, call in enumerate(calls):
        table[row, : len(call)] = call
    table[:, 7] = results
    return table


def pid_inside(pid: int) -> int:
    """QEMU's own idea of its pid, which in a container is another. :raises OSError: it has ended."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("NSpid:"):
            return int(line.split()[-1])
    raise ProcessLookupError(f"process {pid} has ended")


def _wait_until_free(control: ControlArea, pid: int, name: str) -> None:
    # The agent of a memshr that has just died needs a moment to see it.
    end = time.monotonic() + ANSWER_DEADLINE_S
    while control.is_taken():
        if time.monotonic() > end:
            raise RefusedDomainError(
                f"another memshr is at work on guest {name} ({pid})",
                reasons=["another memshr is at work on it"],
                remedy="end the other one first",
            )
        time.sleep(0.001)
