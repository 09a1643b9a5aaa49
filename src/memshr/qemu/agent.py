"""The agent: one thread inside QEMU that does system calls for us, and our end of it.

What makes this hard: guest pages can be remapped only from inside QEMU's own process, by code that QEMU does not have,
and memshr may die at any instant. So:

* **The control area** is a memory file that we and QEMU both have mapped: a page of code, then data. ``injector``
  maps it and makes the thread, once in the life of a QEMU. The thread has all signals blocked, a stack of its own and
  no ties to QEMU's locks; it is cloned with the flags of an ordinary thread, the only ones that QEMU's own sandbox lets
  pass. A later memshr finds the area in /proc/PID/maps and opens it through /proc/PID/map_files.
* **A session** is a Unix socket whose one end the thread holds and whose other end we hold. One byte from us: run the
  table. One byte back: done. *The end of the stream: memshr is gone*, and the thread closes everything that it had for
  us and goes to sleep until the next socket is offered. So nothing of ours stays behind, and nothing has to be cleaned
  up by whoever comes next.
* **The thread holds the userfaultfd as well as we do.** If we alone held it, our death would lift the protection of
  pages while a posted table still remaps them, and a write that slipped in between would be lost. As it is, the table
  that is under way ends under full protection; then the thread sees the end of the stream and closes its copy, the
  last one, and every writer that waits goes on.
* **A table stops at its first surprise.** Each call has the result that it must have (the address that a mapping must
  get, the bytes that must be copied); at any other the thread stores what it got and does nothing further.

``control_area`` has the layout of the area and the thread's code. x86-64 only; its strong store order is what makes
plain stores of table and state enough.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
import weakref
from collections.abc import Sequence
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from memshr.errors import BackendError, ConnectionLostError, InvariantError, RefusedDomainError
from memshr.qemu import injection, syscalls
from memshr.qemu.control_area import (
    BIRTH_AT,
    COUNT_AT,
    DONE_AT,
    EXPECTED_SOCKET_AT,
    LOCAL_PIECES,
    OFFER_AT,
    REMOTE_PIECES,
    SLOTS,
    SLOTS_AT,
    STATE_AT,
    TABLE,
    TABLE_ENTRIES,
    ControlArea,
)
from memshr.qemu.identity import identity_of
from memshr.qemu.injection import Injector
from memshr.qemu.monitor import Monitor

IOVEC = np.dtype([("base", "<u8"), ("length", "<u8")])
"""struct iovec (``linux/uio.h``)"""

ANSWER_DEADLINE_S: Final = 10.0

_IDLE, _POSTED, _UNDER_WAY, _DONE = 0, 1, 2, 4
_ANSWERS: Final = 64
"""bytes that are read at once; one is an answer"""


class AgentCallError(BackendError):
    """A call of a table did not give the result that it must; ``errno`` is the kernel's, 0 if it was no error.

    ``done`` calls before it were done.
    """

    def __init__(self, message: str, *, errno: int, done: int) -> None:
        super().__init__(message)
        self.errno = errno
        self.done = done


def is_in_session(pid: int) -> bool:
    """Whether an agent in this QEMU is at work for some memshr, a living one or one that has died just now.

    :raises OSError: the process is gone, or we may not look into it.
    """
    busy = False
    for control in ControlArea.find_all(pid):
        busy |= control.is_taken()
        control.close()
    return busy


def install(pid: int, name: str, monitor: Monitor, injector: Injector) -> ControlArea:
    """Put an agent into a QEMU that has none.

    :raises RefusedDomainError: the guest's seccomp filter forbids what the agent does, or QEMU cannot be stopped.
    """
    control = ControlArea.create()
    try:
        number = monitor.add_descriptor(control.file)
        try:
            injection.install(identity_of(pid), name, control, number, injector)
        finally:
            monitor.remove_descriptors()
    except BaseException:
        control.close()
        raise
    return control


def uninstall(pid: int, control: ControlArea, injector: Injector) -> None:
    """As ``injection.uninstall``."""
    injection.uninstall(identity_of(pid), "", control, injector)


class Session:
    """A connection with the agent of one QEMU, from ``open`` until ``close`` or our death.

    ``uffd`` is our copy of the userfaultfd of QEMU's memory, which has shaken hands already; ``features`` are what the
    kernel's userfaultfd can do.
    """

    def __init__(self, control: ControlArea, wire: socket.socket, uffd: int, features: int) -> None:
        self.control = control
        self.uffd = uffd
        self.features = features
        self._wire = wire
        self._answer_is_due = False
        words: NDArray[np.uint64] = np.frombuffer(control.memory, np.uint64, TABLE_ENTRIES * 8, TABLE)
        self._table = words.reshape(TABLE_ENTRIES, 8)
        self.local_pieces, self.remote_pieces = (
            np.frombuffer(control.memory, IOVEC, syscalls.IOV_MAX, offset) for offset in (LOCAL_PIECES, REMOTE_PIECES)
        )
        _open_sessions.add(self)

    @classmethod
    def open(cls, pid: int, pidfd: int, name: str, control: ControlArea, monitor: Monitor) -> Self:
        """Offer a socket to the sleeping agent and get the userfaultfd that it makes.

        :raises RefusedDomainError: another memshr has a session, or QEMU may not make a userfaultfd.
        :raises ConnectionLostError: the agent does not answer.
        """
        _wait_until_free(control, pid, name)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            try:
                device: int | None = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                device = None
            with theirs:
                status = os.fstat(theirs.fileno())
                number = monitor.add_descriptor(theirs.fileno())
                if device is None:
                    birth = [syscalls.NR_USERFAULTFD, os.O_CLOEXEC, 0]
                else:
                    try:
                        birth = [syscalls.NR_IOCTL, monitor.add_descriptor(device), syscalls.USERFAULTFD_IOC_NEW]
                    finally:
                        os.close(device)
                control.put(BIRTH_AT, "<8Q", *birth, os.O_CLOEXEC, 0, 0, 0, 0)
                control.put(EXPECTED_SOCKET_AT, "<2Q", status.st_dev, status.st_ino)
                control.put(STATE_AT, "<I", _IDLE)
                control.put(OFFER_AT, "<i", number)
                syscalls.futex_wake(control.word_address(OFFER_AT))
            ours.settimeout(ANSWER_DEADLINE_S)
            try:
                hello = ours.recv(1)
            except TimeoutError:
                hello = b""
            if not hello:
                control.put(OFFER_AT, "<i", -1)
                raise ConnectionLostError(
                    f"the agent in guest {name} ({pid}) does not answer", remedy="is QEMU stopped or frozen?"
                )
            monitor.remove_descriptors()
            # While it is at work somebody may be waiting for it, and the guest's own processors are busy.
            syscalls.hurry(control.thread(pid))
            (made,) = control.get(SLOTS_AT + 4, "<i")
            if made < 0:
                raise RefusedDomainError(
                    f"guest {name} ({pid}) cannot have a userfaultfd: {os.strerror(-made)}",
                    reasons=["QEMU may not make a userfaultfd"],
                    remedy="run Linux 6.1 or later as root, or set vm.unprivileged_userfaultfd=1",
                )
            uffd = syscalls.pidfd_getfd(pidfd, made)
            undo.callback(os.close, uffd)
            features = syscalls.userfaultfd_features()
            wanted = syscalls.UFFD_FEATURE_PAGEFAULT_FLAG_WP | syscalls.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
            wanted |= features & syscalls.UFFD_FEATURE_WP_UNPOPULATED
            syscalls.userfaultfd_api(uffd, wanted)
            os.set_blocking(uffd, False)
            undo.pop_all()
        return cls(control, ours, uffd, wanted)

    def run(self, table: NDArray[np.uint64]) -> int:
        """Have the agent do the calls of ``table``, in order, until one does not give the result that it must.

        :param table: shape ``(n <= TABLE_ENTRIES, 8)``: number, six arguments, the result that it must have.
        :returns: how many calls were done; ``result(i)`` tells what call ``i`` gave.
        :raises ConnectionLostError: QEMU died, or does not run; in the second case nothing of the table was done.
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
        self.control.put(COUNT_AT, "<2I", len(table), 0)
        self._answer_is_due = True
        self.control.put(STATE_AT, "<I", _POSTED)
        try:
            self._wire.sendall(b"\1")
        except OSError as error:
            raise ConnectionLostError("QEMU has ended") from error

    def await_answer(self) -> None:
        """Wait until no table is under way; ``done`` then says how far the last one got.

        Whoever lifts a protection must call this first: a Ctrl-C may have ended our wait, and not the table.

        :raises ConnectionLostError: as ``run``.
        """
        while self._answer_is_due:
            try:
                answer = self._wire.recv(_ANSWERS, socket.MSG_PEEK)
            except TimeoutError:
                self._withdraw()
                continue
            except OSError as error:
                raise ConnectionLostError("QEMU has ended") from error
            if not answer:
                raise ConnectionLostError("QEMU has ended")
            # The state decides, and before the byte is taken away: a Ctrl-C between leaves it to the next table.
            self._answer_is_due = self.control.get(STATE_AT, "<I") != (_DONE,)
            self._wire.recv(len(answer))

    @property
    def done(self) -> int:
        """How many calls of the last table were done."""
        return int(self.control.get(DONE_AT, "<I")[0])

    def _withdraw(self) -> None:
        # Atomic against the agent's own step from posted to under way: afterwards the state is nothing posted (0), or
        # what the agent made of it.
        syscalls.atomic_clear_bits(self.control.word_address(STATE_AT), _POSTED)
        if self.control.get(STATE_AT, "<I") == (_IDLE,):
            self._answer_is_due = False
            raise ConnectionLostError(
                f"QEMU did not run for {ANSWER_DEADLINE_S:.0f} s",
                remedy="continue the process (kill -CONT, or thaw it)",
            )

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
        number = -got if -4096 < got < 0 else 0
        text = os.strerror(number) if number else f"unexpected result {got:#x}"
        return AgentCallError(f"{what}: {text}", errno=number, done=done)

    def take_descriptor(self, number: int) -> int:
        """Have the agent take its own copy of descriptor ``number`` of QEMU, to be closed when the session ends.

        :returns: the copy's number in QEMU.
        :raises AgentCallError: QEMU has no such descriptor, or too many.
        """
        slots = self.control.get(SLOTS_AT, f"<{SLOTS}i")
        if -1 not in slots:
            raise AgentCallError("no place for another descriptor in the agent", errno=24, done=0)
        copy = self.call(syscalls.NR_FCNTL, number, syscalls.F_DUPFD_CLOEXEC, 3)
        if copy < 0:
            raise self.failure(0, "copying a descriptor in QEMU")
        self.control.put(SLOTS_AT + 4 * slots.index(-1), "<i", copy)
        return copy

    def end_agent(self, pid: int) -> None:
        """Have the agent close its descriptors and end; the session is closed then.

        :raises ConnectionLostError: it has not ended; QEMU does not run.
        """
        slots = [slot for slot in self.control.get(SLOTS_AT, f"<{SLOTS}i") if slot >= 0]
        calls = [*((syscalls.NR_CLOSE, slot) for slot in slots), (syscalls.NR_EXIT, 0)]
        self.post(entries(calls, results=[0] * len(calls)))
        # Not the end of our stream: a paused QEMU keeps its own descriptor of the socket until it runs.
        end = time.monotonic() + ANSWER_DEADLINE_S
        while self.control.thread_lives(pid):
            if time.monotonic() > end:
                self._withdraw()
            time.sleep(0.001)
        self.close()

    def release_files(self) -> None:
        """Close our ends without ending the session; for the child of a fork."""
        uffd, self.uffd = self.uffd, -1
        if uffd >= 0:
            os.close(uffd)
        self._wire.close()

    def abandon(self) -> None:
        """Let everybody who waits go on, from whatever thread: the agent sees the end of the stream."""
        with contextlib.suppress(OSError):
            self._wire.shutdown(socket.SHUT_RDWR)
        uffd, self.uffd = self.uffd, -1
        if uffd >= 0:
            os.close(uffd)

    def close(self) -> None:
        """End the session: the agent closes its descriptors, all protection ends, waiting writers go on."""
        self.abandon()
        self._wire.close()
        _open_sessions.discard(self)
        del self._table, self.local_pieces, self.remote_pieces

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A forked child that kept a socket open would hide our death from the agent, and writers would wait for it.
    for session in list(_open_sessions):
        session.release_files()


os.register_at_fork(after_in_child=_let_go_in_child)


def entries(calls: Sequence[tuple[int, ...]], results: Sequence[int]) -> NDArray[np.uint64]:
    """A small table: each call as its number and up to six arguments, and the result that it must have."""
    table = np.zeros((len(calls), 8), dtype=np.uint64)
    for row, call in enumerate(calls):
        table[row, : len(call)] = call
    table[:, 7] = results
    return table


def _wait_until_free(control: ControlArea, pid: int, name: str) -> None:
    # The agent of a memshr that has just died needs a moment to see it.
    end = time.monotonic() + ANSWER_DEADLINE_S
    while control.is_taken():
        if time.monotonic() > end:
            raise RefusedDomainError(
                f"another memshr has a session with guest {name} ({pid})",
                reasons=["another memshr is at work on it"],
                remedy="end the other one first",
            )
        time.sleep(0.001)
