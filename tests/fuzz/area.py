"""Whatever a QEMU writes into its control area: what memshr reads from there is bounded, or a MemshrError.

An input is written over the data of an area: before it is read, and again while a table is under way.
``fuzz.campaign`` searches for inputs that break this.
"""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memshr.errors import InvariantError, MemshrError
from memshr.qemu import syscalls
from memshr.qemu.agent import AgentLink, entries
from memshr.qemu.control_area import (
    CONTROL_BYTES,
    CONTROL_NAME,
    DATA,
    NODE_MASK_BYTES,
    SLOTS,
    ControlArea,
    Original,
)

CORPUS = Path(__file__).parent / "corpus" / "area"

CODE_ADDRESS = 0x7F0000000000
_GETPID = 39
_MOST_FORBIDDEN = 16
_DEADLINE_S = 0.001
"""To some inputs there is no answer; so long it is waited for."""


class HostileLink(AgentLink):
    """A link with an agent that writes ``data`` over the area while it has a table, and answers with some bytes."""

    def __init__(self, control: ControlArea, wire: socket.socket, theirs: socket.socket, data: bytes) -> None:
        super().__init__(control, wire)
        self.deadline_s = _DEADLINE_S
        self._theirs, self._data = theirs, data

    def post(self, table: NDArray[np.uint64]) -> None:
        super().post(table)
        overwrite(self.control, self._data)
        self._theirs.sendall(b"x" * (len(self._data) % 4))


def overwrite(control: ControlArea, data: bytes) -> None:
    """Write over all that QEMU can write to."""
    control.memory[DATA : DATA + len(data)] = data[: CONTROL_BYTES - DATA]


def exercise(data: bytes, folder: Path) -> list[str]:
    """Read everything that memshr reads from an area that holds ``data``; returns what went well.

    :raises AssertionError: a promise was broken. So is anything but MemshrError; and InvariantError, as it is no bug.
    """
    del folder
    went_well = []
    for name, ask in _ASKED.items():
        file = syscalls.memfd_create(CONTROL_NAME)
        os.ftruncate(file, CONTROL_BYTES)
        ours, theirs = socket.socketpair()
        with theirs, HostileLink(ControlArea(file, CODE_ADDRESS), ours, theirs, data) as link:
            overwrite(link.control, data)
            try:
                ask(link)
                went_well.append(name)
            except InvariantError:
                raise
            except MemshrError as error:
                _require_shown(str(error))
    return went_well


def _require_shown(text: str) -> None:
    assert text.isprintable()


def _look(link: AgentLink) -> None:
    control = link.control
    assert len(control.slots) == SLOTS
    assert len(control.forbidden) <= _MOST_FORBIDDEN
    assert len(control.originals) < CONTROL_BYTES // NODE_MASK_BYTES
    link.may_call(_GETPID)
    control.is_taken()
    control.thread_lives(os.getpid())


def _run(link: AgentLink) -> None:
    calls = link.control.memory[DATA] + 1
    done = link.run(entries([(_GETPID,)] * calls, results=[0] * calls))
    assert 0 <= done <= calls
    for index in range(calls):
        assert -(1 << 63) <= link.result(index) < 1 << 63
    if done < calls:
        _require_shown(str(link.failure(done, "a call")))


def _give(link: AgentLink) -> None:
    assert link.give(link.fileno()) >= 0
    assert len(link.scratch(100)) == 100


def _make(link: AgentLink) -> None:
    # The number that the answer names is looked up in this process.
    pidfd = os.pidfd_open(os.getpid())
    try:
        link._make_userfaultfd(pidfd, "hostile")
    finally:
        os.close(pidfd)


def _note(link: AgentLink) -> None:
    # A guest that is attached anew has its ranges noted, besides those that are there.
    link.originals = [*link.originals, Original(1 << 40, 1 << 41, 0, 0, b"")]


_ASKED: dict[str, Callable[[AgentLink], object]] = {
    "look": _look,
    "run": _run,
    "call": lambda link: link.call(_GETPID),
    "give": _give,
    "keep": lambda link: link._kept(link.call(_GETPID)),
    "make": _make,
    "drop": lambda link: link.drop(8),
    "note": _note,
}
