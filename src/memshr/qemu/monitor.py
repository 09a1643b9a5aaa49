"""QEMU's monitor: a thin QMP client that can hand over file descriptors.

QMP is JSON, one object a line, over a Unix socket; ``add-fd`` takes a descriptor by SCM_RIGHTS and answers with the
number that it has inside QEMU. QEMU serves one client of a socket at a time, others wait unanswered, so memshr
connects for a few commands and hangs up. Descriptors that were handed over may be closed by QEMU as soon as nobody
is connected.

``Monitor`` is what the rest of memshr asks. Two ways lead there: ``SocketMonitor``, the guest's own socket, and
``libvirt_monitor``, where libvirt holds that socket.

Errors: ConnectionLostError (no answer, or QEMU went away), PermissionDeniedError, MonitorError (QEMU refused).
Source: QEMU's ``docs/interop/qmp-spec`` and ``qapi/misc.json``; observed on QEMU 7.2.
"""

from __future__ import annotations

import abc
import json
import os
import socket
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from memshr.errors import BackendError, ConnectionLostError, PermissionDeniedError

GREETING_DEADLINE_S = 3.0
ANSWER_DEADLINE_S = 60.0

_FD_SET = 0x6D656D73
"""The number of the set that QEMU keeps our descriptors in, so that we never touch a set of somebody else's."""


class MonitorError(BackendError):
    """QEMU refused a command; ``command`` says which, ``kind`` is QEMU's class of error."""

    def __init__(self, message: str, *, command: str, kind: str) -> None:
        super().__init__(message)
        self.command = command
        self.kind = kind


class Monitor(abc.ABC):
    """A way to QEMU's monitor. A context manager; hangs up at the end."""

    @abc.abstractmethod
    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, descriptor: int | None = None
    ) -> Any:
        """Run a command and return what it returned.

        :param descriptor: a file descriptor of ours to hand over with the command.
        :raises MonitorError: QEMU refused it.
        :raises ConnectionLostError: QEMU hung up or did not answer; whether the command was done is unknown.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Hang up."""

    def human(self, command: str) -> str:
        """Run a command of the human monitor and return its text."""
        return str(self.execute("human-monitor-command", {"command-line": command}))

    def add_descriptor(self, descriptor: int) -> int:
        """Hand a descriptor over; returns its number inside QEMU. ``remove_descriptors`` takes all of ours back."""
        return int(self.execute("add-fd", {"fdset-id": _FD_SET, "opaque": "memshr"}, descriptor=descriptor)["fd"])

    def remove_descriptors(self) -> None:
        """Have QEMU close every descriptor that memshr handed over and that is still there."""
        try:
            self.execute("remove-fd", {"fdset-id": _FD_SET})
        except MonitorError as error:
            if "not found" not in str(error):
                raise

    def hand_over(self, descriptor: int) -> None:
        """Hand a descriptor over; ``take_back`` has QEMU close it."""
        self.execute("getfd", {"fdname": "memshr"}, descriptor=descriptor)

    def take_back(self) -> None:
        """Have QEMU close what was handed over, also while the guest is paused."""
        try:
            self.execute("closefd", {"fdname": "memshr"})
        except MonitorError as error:
            if "not found" not in str(error):
                raise

    def drain(self, deadline_s: float) -> None:
        """Let every disk request that is under way end."""
        self.execute("transaction", {"actions": []})

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


def returned(command: str, answer: Mapping[str, Any]) -> Any:
    """What an answer of QMP to a command returns.

    :raises MonitorError: it says that QEMU refused the command.
    """
    if "error" in answer:
        error = answer["error"]
        raise MonitorError(f"QEMU refused {command}: {error['desc']}", command=command, kind=error["class"])
    return answer["return"]


class SocketMonitor(Monitor):
    """A QMP connection over a socket of the guest. Events that come in between answers are dropped.

    :param path: the socket, as a path of this process.
    :raises ConnectionLostError: nobody listens, or QEMU does not greet because another client is connected.
    :raises PermissionDeniedError: we may not connect.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._socket = socket.socket(socket.AF_UNIX)
        self._received = b""
        try:
            self._connect()
        except BaseException:
            self._socket.close()
            raise

    def _connect(self) -> None:
        self._socket.settimeout(GREETING_DEADLINE_S)
        try:
            self._socket.connect(os.fspath(self._path))
        except PermissionError as error:
            raise PermissionDeniedError(
                f"may not connect to the QMP socket {self._path}", remedy="run as root or as the user of QEMU"
            ) from error
        except OSError as error:
            raise ConnectionLostError(
                f"cannot connect to the QMP socket {self._path}: {error.strerror or error}",
                remedy="give another one with NAME@/path/qmp.sock",
            ) from error
        try:
            greeting = self._receive()
        except TimeoutError as error:
            raise ConnectionLostError(
                f"the QMP socket {self._path} is busy: QEMU serves one client at a time and did not greet us",
                remedy="end the other client (libvirt keeps its own socket), or start QEMU with a second -qmp",
            ) from error
        if "QMP" not in greeting:
            raise ConnectionLostError(
                f"{self._path} does not speak QMP",
                remedy="give the socket of -qmp or of a -mon with mode=control",
            )
        self._socket.settimeout(ANSWER_DEADLINE_S)
        self.execute("qmp_capabilities")

    def execute(
        self, command: str, arguments: Mapping[str, object] | None = None, *, descriptor: int | None = None
    ) -> Any:
        request = json.dumps({"execute": command, "arguments": arguments or {}}).encode() + b"\n"
        try:
            if descriptor is None:
                self._socket.sendall(request)
            else:
                sent = socket.send_fds(self._socket, [request], [descriptor])
                self._socket.sendall(request[sent:])
            while True:
                answer = self._receive()
                if "return" in answer or "error" in answer:
                    return returned(command, answer)
        except (TimeoutError, ConnectionError) as error:
            raise ConnectionLostError(f"QEMU did not answer {command} on {self._path}") from error

    def _receive(self) -> dict[str, Any]:
        while b"\n" not in self._received:
            received = self._socket.recv(1 << 16)
            if not received:
                raise ConnectionLostError(f"QEMU hung up on {self._path}")
            self._received += received
        line, _, self._received = self._received.partition(b"\n")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        """Hang up."""
        self._socket.close()
