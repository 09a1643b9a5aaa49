"""The agent's thread, played: it carries out tables as ``agent.S`` does, on the memory of a stand-in process.

The other end is the real ``memshr.qemu.agent.AgentLink``, on a real control area and a real socket. Nothing runs by
itself: the thread gets on whenever somebody waits for it, and holds back what a test wants held back. Its descriptors
are ours.
"""

from __future__ import annotations

import contextlib
import errno
import os
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.qemu import control_area, syscalls
from memshr.qemu.agent import IOVEC, AgentLink
from memshr.qemu.control_area import (
    COUNT_AT,
    DATA,
    DONE_AT,
    FORGET,
    IF_EQUAL,
    KEEP,
    KEEP_RECEIVED,
    LOCAL_PIECES,
    NOT_EQUAL,
    RECEIVED_AT,
    REMOTE_PIECES,
    STATE_AT,
    TABLE,
    ControlArea,
)
from standin.calls import GuestCalls
from standin.kernel import Failed, Memory

_IDLE, _POSTED, _UNDER_WAY, _DONE = 0, 1, 2, 4
_NAMES: Final = {
    syscalls.NR_MMAP: "mmap",
    syscalls.NR_MREMAP: "mremap",
    syscalls.NR_MUNMAP: "munmap",
    syscalls.NR_MADVISE: "madvise",
    syscalls.NR_MBIND: "mbind",
    syscalls.NR_GETPID: "getpid",
    syscalls.NR_GET_MEMPOLICY: "get_mempolicy",
    syscalls.NR_PROCESS_VM_READV: "process_vm_readv",
    syscalls.NR_RECVMSG: "recvmsg",
    syscalls.NR_CLOSE: "close",
}


class _Blocks(Exception):
    """A call waits for something that has not come yet."""


class AgentThread:
    """The thread of one link.

    ``silent``: it does not run, as in a QEMU that is stopped. ``stuck``: it begins a table and does not get
    beyond its call number ``stuck_after``.
    """

    def __init__(self, memory: Memory, control: ControlArea, wire: socket.socket, pid: int, calls: GuestCalls) -> None:
        self.memory = memory
        self.control = control
        self.silent = False
        self.stuck = False
        self.stuck_after = 0
        self.rows = 0
        """how many calls it has made"""
        self._wire = wire
        self._pid = pid
        wire.setblocking(False)  # socket.recv_fds of Python 3.11 passes no flags on
        self._calls = calls
        self._in_table = False
        self._lock = threading.RLock()
        self.ended = False

    def go_on(self) -> None:
        """Do whatever there is to do. Between its calls, and between a comparison and its call, others may act."""
        with self._lock:
            while not (self.ended or self.silent):
                if self._in_table:
                    if not self._carry_out():
                        return
                    continue
                try:
                    byte = self._wire.recv(1)
                except BlockingIOError:
                    return
                except OSError:
                    byte = b""
                if not byte:
                    self.hang_up()
                elif self.control.get(STATE_AT, "<I") == (_POSTED,):
                    self.control.put(STATE_AT, "<I", _UNDER_WAY)
                    self.control.put(DONE_AT, "<I", 0)
                    self._in_table = True

    def hang_up(self) -> None:
        """Close everything: memshr has gone, or the process ends."""
        for number in reversed(self.control.slots):
            if number >= 0:
                self._close(number)
        self.control.slots = [-1] * control_area.SLOTS
        self._end()

    def _end(self) -> None:
        self.ended = True
        self._in_table = False
        self._wire.close()
        self.control.close()
        self.memory.settle()

    def _carry_out(self) -> bool:
        # The table that is under way; whether it has ended.
        (count,) = self.control.get(COUNT_AT, "<I")
        words: NDArray[np.uint64] = np.frombuffer(self.control.memory, np.uint64, count * 8, TABLE).reshape(-1, 8)
        (done,) = self.control.get(DONE_AT, "<I")
        while done < count:
            if self.stuck and done >= self.stuck_after:
                return False
            number, *arguments, wanted = words[done].tolist()
            try:
                got = self._entry(number, arguments)
            except _Blocks:
                return False
            if got is None:  # the thread has ended
                del words
                self._end()
                return True
            words[done, 7] = got & (2**64 - 1)
            if got & (2**64 - 1) != wanted:
                break
            done += 1
            self.control.put(DONE_AT, "<I", done)
        self.control.put(STATE_AT, "<I", _DONE)
        self._in_table = False
        with contextlib.suppress(OSError):
            self._wire.send(b"\1")
        return True

    def _entry(self, number: int, arguments: list[int]) -> int | None:
        if number & IF_EQUAL and not self._is_equal(arguments):
            return NOT_EQUAL
        flags, number = number & ~0xFFFF, number & 0xFFFF
        if number == syscalls.NR_EXIT:
            return None
        self.rows += 1
        if flags & FORGET:
            self._note(arguments[0], -1)
        got = self._made(number, arguments)
        if got is not None and got >= 0 and flags & KEEP:
            self._note(-1, self.control.get(RECEIVED_AT, "<i")[0] if flags & KEEP_RECEIVED == KEEP_RECEIVED else got)
        return got

    def _note(self, old: int, new: int) -> None:
        slots = self.control.slots
        if old in slots:
            self.control.set_slot(slots.index(old), new)

    def _made(self, number: int, arguments: list[int]) -> int | None:
        try:
            return self._calls(f"in QEMU: {_NAMES[number]}", lambda: self._call(number, arguments))
        except OSError as error:
            error.__traceback__ = None  # its frames would keep the control area mapped
            return -(error.errno or errno.EIO)

    def _is_equal(self, arguments: list[int]) -> bool:
        address, length, _, _, file, offset = arguments
        try:
            return os.pread(file, length, offset) == self.memory.read(address, length)
        except OSError:
            return False

    def _call(self, number: int, arguments: list[int]) -> int:
        with self.memory.kernel.lock:
            return self._locked_call(number, arguments)

    def _locked_call(self, number: int, arguments: list[int]) -> int:
        memory = self.memory
        match number, arguments:
            case syscalls.NR_MMAP, [address, length, _, flags, file, offset]:
                anonymous = flags & syscalls.MAP_ANONYMOUS
                mapped = None if anonymous else memory.kernel.file_of(file)
                memory.map(address, length, mapped, offset, replace=bool(flags & syscalls.MAP_FIXED))
                return address
            case syscalls.NR_MREMAP, [address, length, _, _, to, _]:
                memory.move(address, length, to)
                return to
            case syscalls.NR_MUNMAP, [address, length, *_]:
                memory.unmap(address, length)
            case syscalls.NR_MADVISE, [address, length, advice, *_]:
                memory.advise(address, length, advice)
            case syscalls.NR_MBIND, [address, length, mode, nodes, bits, _]:
                at = nodes - self.control.code_address
                memory.bind(address, length, (mode, bytes(self.control.memory[at : at + (bits - 1) // 8])))
            case syscalls.NR_GET_MEMPOLICY, [mode_at, nodes_at, _, address, _, _]:
                area = memory.area_at(address >> 12)
                mode, mask = area.policy if area is not None else (0, b"")
                self._poke(mode_at, mode.to_bytes(4, "little"))
                self._poke(nodes_at, mask.ljust(control_area.NODE_MASK_BYTES, b"\0"))
            case syscalls.NR_PROCESS_VM_READV, [pid, _, pieces, *_] if pid == self._pid:
                return self._copy(pieces)
            case syscalls.NR_GETPID, _:
                return self._pid
            case syscalls.NR_RECVMSG, _:
                return self._receive()
            case syscalls.NR_CLOSE, [file, *_]:
                self._close(file)
            case _:
                raise Failed(errno.ENOSYS)
        return 0

    def _poke(self, address: int, data: bytes) -> None:
        at = address - self.control.code_address
        assert at >= DATA
        self.control.memory[at : at + len(data)] = data

    def _copy(self, pieces: int) -> int:
        local, remote = (np.frombuffer(self.control.memory, IOVEC, pieces, at) for at in (LOCAL_PIECES, REMOTE_PIECES))
        copied = 0
        for to, there in zip(local, remote, strict=True):
            self.memory.put(int(to["base"]), self.memory.read(int(there["base"]), int(there["length"])))
            copied += int(there["length"])
        return copied

    def _receive(self) -> int:
        try:
            data, files, _, _ = socket.recv_fds(self._wire, 1, 1)
        except BlockingIOError:
            raise _Blocks from None
        for file in files:
            os.set_inheritable(file, False)
            self.control.put(RECEIVED_AT, "<i", file)
        return len(data)

    def _close(self, number: int) -> None:
        if not self._wire._closed and number == self._wire.fileno():  # type: ignore[attr-defined]
            self._wire.close()
        else:
            os.close(number)


class StandInLink(AgentLink):
    """The real link, but for the requests of userfaultfd, which go to the stand-in for the kernel."""

    def __init__(self, control: ControlArea, wire: socket.socket, agent: AgentThread, calls: GuestCalls) -> None:
        super().__init__(control, wire)
        self.agent = agent
        self._memory = agent.memory
        self._calls = calls

    def register(self, address: int, length_bytes: int) -> None:
        self._calls("link.register", lambda: self._memory.register(address, length_bytes))

    def protect(self, runs: Iterable[tuple[int, int]]) -> None:
        self._change("link.protect", list(runs), True)

    def unprotect(self, runs: Iterable[tuple[int, int]]) -> None:
        self._change("link.unprotect", list(runs), False)

    def _change(self, name: str, runs: list[tuple[int, int]], on: bool) -> None:
        def change(some: list[tuple[int, int]]) -> Callable[[], None]:
            def done() -> None:
                for run in some:
                    self._memory.protect(*run, on=on)

            return done

        first, length = runs[0] if runs else (0, 0)
        page = min(length, 4096)
        self._calls(name, change(runs), change(runs[: len(runs) // 2] or [(first, page)]))

    def wake(self, address: int, length_bytes: int) -> None:
        self._calls("link.wake", lambda: self._memory.wake(address, length_bytes))

    def post(self, table: NDArray[np.uint64]) -> None:
        def posted() -> None:
            super(StandInLink, self).post(table)
            self.agent.go_on()

        self._calls("link.post", posted)

    def await_answer(self) -> None:
        def awaited() -> None:
            self.agent.go_on()
            super(StandInLink, self).await_answer()

        self._calls("link.await_answer", awaited)

    def give(self, descriptor: int) -> int:
        return self._calls("link.give", lambda: super(StandInLink, self).give(descriptor))

    def drop(self, number: int) -> None:
        self._calls("link.drop", lambda: super(StandInLink, self).drop(number))

    def end_agent(self, pid: int) -> None:
        def ended() -> None:
            super(StandInLink, self).end_agent(pid)

        self._calls("link.end_agent", ended)

    def abandon(self) -> None:
        super().abandon()
        self.agent.go_on()
        self._memory.settle()
