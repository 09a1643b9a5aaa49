"""Putting the agent into a QEMU and taking its mapping out: the process that does it (``injector``), seen from here."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path

from memshr.errors import BackendError, RefusedDomainError
from memshr.qemu.control_area import ControlArea
from memshr.qemu.monitor import Monitor


class Injector:
    """The process that puts agents into QEMUs, and takes their mappings out (``injector``), seen from here.

    It is started when it is first needed and serves many guests, because starting takes longer than all its work. It
    ends when this is closed or when we die, but not before what it has under way is done.
    """

    def __init__(self) -> None:
        self._wire: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, action: str, pid: int, number: int, file: int) -> dict[str, object]:
        """Have it do ``attach`` or ``detach``, as ``injector`` describes them; returns its answer.

        :raises BackendError: it has failed.
        """
        wire = self._wire or self._start()
        try:
            socket.send_fds(wire, [f"{action} {pid} {number}".encode()], [file])
            answer = wire.recv(1 << 16)
        except OSError:
            answer = b""
        except BaseException:
            self.close()  # its answer would be taken for that of the next request
            raise
        if not answer:
            assert self._process is not None
            said = self._process.communicate()[1].decode(errors="replace").strip()
            self.close()
            raise BackendError(f"the injector failed on process {pid}: {said}")
        found: dict[str, object] = json.loads(answer)
        return found

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with theirs:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "memshr.qemu.injector"],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                start_new_session=True,
            )
        self._wire = ours
        return ours

    def close(self) -> None:
        """End it."""
        if self._wire is not None and self._process is not None:
            self._wire.close()
            self._process.communicate()
        self._wire = self._process = None


def install(pid: int, name: str, monitor: Monitor, injector: Injector) -> ControlArea:
    """Put an agent into a QEMU that has none.

    :raises RefusedDomainError: the guest's seccomp filter forbids what the agent does, or QEMU cannot be stopped.
    """
    control = ControlArea.create()
    try:
        monitor.hand_over(control.file)
        try:
            answer = injector.ask("attach", pid, descriptor_number(pid, -1, control.file), control.file)
        finally:
            monitor.take_back()
        if "refused" in answer:
            raise RefusedDomainError(
                f"guest {name} ({pid}) cannot be attached: {answer['refused']}",
                reasons=[str(answer["refused"])],
                remedy=str(answer["remedy"]),
            )
        control.code_address = int(str(answer["code_address"]))
    except BaseException:
        control.close()
        raise
    return control


def uninstall(pid: int, control: ControlArea, injector: Injector) -> None:
    """Unmap the control area of a QEMU whose agent thread has ended.

    :raises RefusedDomainError: QEMU cannot be stopped for it; only the mapping stays, which does nothing.
    """
    answer = injector.ask("detach", pid, control.code_address, control.file)
    if "refused" in answer:
        raise RefusedDomainError(f"process {pid} keeps an unused mapping of memshr: {answer['refused']}")


def descriptor_number(pid: int, pidfd: int, file: int) -> int:
    """The number that a file of ours has in QEMU."""
    ours = os.readlink(f"/proc/self/fd/{file}")
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        try:
            if os.readlink(entry) == ours:
                return int(entry.name)
        except OSError:
            continue
    raise BackendError("QEMU has not taken a descriptor")
