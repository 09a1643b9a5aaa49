"""A table of the agent's that waits until the test lets it go on."""

import os
import struct
from pathlib import Path

from guests.qtest import QtestGuest
from memshr.qemu.control_area import LOCAL_PIECES, ControlArea

POLL = 7
"""number of poll(2) on x86-64"""
POLLIN = 1
FOR_EVER = 2**32 - 1
"""-1 as an int, what poll(2) takes for no timeout"""
READY = 1
"""what poll(2) gives then: descriptors that are ready"""


class Gate:
    """A descriptor in a QEMU that is not ready until ``open``: the end of a pipe that QEMU itself has no use for.

    QEMU opens it as a character device that nothing is connected with, and never reads it.

    :ivar number: of the descriptor in QEMU.
    """

    def __init__(self, guest: QtestGuest) -> None:
        self._path = guest.folder / "gate"
        os.mkfifo(self._path)
        backend = {"type": "pipe", "data": {"device": os.fspath(self._path)}}
        guest.execute("chardev-add", {"id": "gate", "backend": backend})
        self.number = next(
            int(entry.name) for entry in Path(f"/proc/{guest.pid}/fd").iterdir() if self._is_its_end(entry)
        )

    def _is_its_end(self, entry: Path) -> bool:
        try:
            return entry.readlink() == self._path
        except FileNotFoundError:  # closed meanwhile
            return False

    def open(self) -> None:
        """Let whoever waits go on, now and later."""
        self._path.write_bytes(b".")


def waiting_call(control: ControlArea, number: int) -> tuple[int, ...]:
    """The call of a table that waits at a gate; its result must be READY.

    :param number: of the gate's descriptor in QEMU.
    """
    struct.pack_into("<ihh", control.memory, LOCAL_PIECES, number, POLLIN, 0)  # struct pollfd (poll.h)
    return (POLL, control.code_address + LOCAL_PIECES, 1, FOR_EVER)


def main_thread_waits(guest: QtestGuest) -> bool:
    """Whether QEMU's main thread waits at a page that is write-protected. A qtest guest's writes are done there."""
    return Path(f"/proc/{guest.pid}/wchan").read_text() == "handle_userfault"
