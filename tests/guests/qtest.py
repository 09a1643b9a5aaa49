"""A QEMU with real guest RAM whose processor never starts: the test plays the guest, through the qtest socket."""

import base64
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Self

from guests.machine import GuestFailedError, Machine

ANSWER_DEADLINE_S = 30.0


class QtestGuest(Machine):
    """A QEMU whose memory the test reads and writes as the guest would.

    QEMU does each access in its main thread, which also serves the monitors. So a write that waits (at a page that is
    write-protected through userfaultfd, say) makes QMP wait too, as a write of a processor would not.
    """

    def __init__(self, name: str, qemu: Path, *, memory_mib: int = 64, user: str | None = None) -> None:
        super().__init__(name, qemu, memory_mib=memory_mib, user=user)
        self._socket: socket.socket | None = None

    def boot(self, arguments: Sequence[str] = ()) -> Self:
        """Start QEMU and connect.

        :raises GuestFailedError: QEMU did not come up.
        """
        path = self.folder / "qtest"
        # Debian's package lacks the accelerator named qtest; the commands work as well beside a processor that stands.
        own = ["-accel", "tcg", "-S", "-qtest", f"unix:{path},server=on,wait=off", "-qtest-log", "none"]
        self.start([*own, *arguments])
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(ANSWER_DEADLINE_S)
        self._socket.connect(str(path))
        return self

    def read(self, gpa: int, length_bytes: int) -> bytes:
        """What the guest's memory holds at a guest-physical address."""
        return base64.b64decode(self._ask(f"b64read {gpa:#x} {length_bytes:#x}"))

    def write(self, gpa: int, content: bytes) -> None:
        """Write at a guest-physical address, as the guest would."""
        self._ask(f"b64write {gpa:#x} {len(content):#x} {base64.b64encode(content).decode()}")

    def fill(self, gpa: int, length_bytes: int, value: int) -> None:
        """Set each byte of a piece of memory to ``value``."""
        self._ask(f"memset {gpa:#x} {length_bytes:#x} {value:#x}")

    def _ask(self, request: str) -> str:
        assert self._socket is not None, f"guest {self.name} was not booted"
        self._socket.sendall(request.encode() + b"\n")
        answer = b""
        while not answer.endswith(b"\n"):
            received = self._socket.recv(1 << 20)
            if not received:
                raise GuestFailedError(f"guest {self.name} ended during {request[:40]}; {self.stderr}")
            answer += received
        word, _, rest = answer.decode().strip().partition(" ")
        if word != "OK":
            raise GuestFailedError(f"guest {self.name}: {answer.decode().strip()} to {request[:40]}")
        return rest

    def kill(self) -> None:
        """End QEMU at once and remove its folder."""
        if self._socket is not None:
            self._socket.close()
        super().kill()
