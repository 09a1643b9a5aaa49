"""One QEMU process with its monitor sockets, ended for sure."""

import json
import os
import pwd
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from guests.kit import find_program

START_DEADLINE_S = 30.0
ANSWER_DEADLINE_S = 120.0
"""a dump of a whole guest is one QMP command"""


class GuestFailedError(Exception):
    """A guest did not do what it was asked for: it died, or did not answer in time."""


def wait_until(condition: Callable[[], bool], deadline_s: float, what: str) -> None:
    """Poll until ``condition`` holds.

    :raises GuestFailedError: it did not within ``deadline_s``; the text names ``what``.
    """
    end = time.monotonic() + deadline_s
    while not condition():
        if time.monotonic() > end:
            raise GuestFailedError(f"waited {deadline_s:.0f} s in vain: {what}")
        time.sleep(0.02)


class QmpError(Exception):
    """QEMU refused a QMP command; the text is QEMU's."""


class Qmp:
    """A QMP connection; as a context manager it hangs up at the end. Events are kept in ``events``.

    :raises OSError: nobody listens on ``path``.

    """

    def __init__(self, path: Path) -> None:
        self.events: list[dict[str, Any]] = []
        self._socket = socket.socket(socket.AF_UNIX)
        self._lines = self._socket.makefile("rb")
        try:
            self._socket.settimeout(ANSWER_DEADLINE_S)
            self._socket.connect(os.fspath(path))
            self._lines.readline()  # the greeting
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """Run a command and return what it returned.

        :raises QmpError: QEMU refused it.
        :raises GuestFailedError: QEMU hung up instead of answering.
        """
        request = {"execute": command, "arguments": arguments or {}}
        self._socket.sendall(json.dumps(request).encode() + b"\n")
        while line := self._lines.readline():
            answer = json.loads(line)
            if "return" in answer:
                return answer["return"]
            if "error" in answer:
                raise QmpError(f"{command}: {answer['error']['desc']}")
            self.events.append(answer)
        raise GuestFailedError(f"{command}: QEMU hung up")

    def close(self) -> None:
        """Hang up."""
        self._lines.close()
        self._socket.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class Machine:
    """A QEMU process, from ``start`` on.

    It has two QMP sockets: the first on its command line, ``qmp_path``, is left free for memshr; ``qmp()`` uses the
    other. Nobody is connected to either unless a test is in a call: QEMU closes descriptors that were handed to it when
    the last monitor connection ends, and a test that held one would hide what depends on that.

    The first serial port writes to the file behind ``console``, the second is the socket ``port_path``.

    :param memory_mib: guest RAM.
    :param user: run QEMU as this user (needs root); None: as we are.
    """

    def __init__(self, name: str, qemu: Path, *, memory_mib: int = 256, user: str | None = None) -> None:
        self.name = name
        self.memory_mib = memory_mib
        self.folder = Path(tempfile.mkdtemp(prefix=f"memshr-{name}-"))
        if user is not None:
            shutil.chown(self.folder, user)
        self.qmp_path = self.folder / "qmp"
        self.port_path = self.folder / "port"
        self._own_qmp_path = self.folder / "own-qmp"
        self._console_path = self.folder / "console"
        self._stderr_path = self.folder / "stderr"
        self._qemu = qemu
        self._user = user
        self._process: subprocess.Popen[bytes] | None = None

    def start(self, arguments: Sequence[str] = ()) -> Self:
        """Start QEMU with these arguments besides name, memory, monitors and serial ports; return this machine.

        :raises GuestFailedError: QEMU did not come up; the text has its own words.
        """
        # setpriv ends QEMU when this process ends in whatever way, and turns into QEMU itself: same pid, own command
        # line. It changes the user first: the kernel forgets the request for the signal at such a change.
        command: list[str | Path] = [find_program("setpriv", "util-linux"), "--pdeathsig=KILL"]
        if self._user is not None:
            group = pwd.getpwnam(self._user).pw_gid
            command += [f"--reuid={self._user}", f"--regid={group}", "--clear-groups"]
        command += [self._qemu, "-name", self.name, "-m", str(self.memory_mib)]
        command += ["-nodefaults", "-no-user-config", "-display", "none"]
        for path in (self.qmp_path, self._own_qmp_path):
            command += ["-qmp", f"unix:{path},server=on,wait=off"]
        command += ["-serial", f"file:{self._console_path}", "-serial", f"unix:{self.port_path},server=on,wait=off"]
        with self._stderr_path.open("wb") as stderr:
            self._process = subprocess.Popen(
                [*command, *arguments], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=stderr
            )
        try:
            self.wait(self._answers, START_DEADLINE_S, "QEMU opens its monitor")
        except BaseException:
            self.kill()
            raise
        return self

    def _answers(self) -> bool:
        try:
            self.execute("query-status")
        except (OSError, GuestFailedError):  # it does not listen yet, or has ended already: whoever waits looks
            return False
        return True

    @property
    def pid(self) -> int:
        """The process of QEMU."""
        assert self._process is not None, f"guest {self.name} was not started"
        return self._process.pid

    @property
    def console(self) -> str:
        """What the guest wrote to its first serial port so far."""
        return self._console_path.read_text(errors="replace") if self._console_path.exists() else ""

    @property
    def alive(self) -> bool:
        """Is the process still there?"""
        return self._process is not None and self._process.poll() is None

    @property
    def stderr(self) -> str:
        """What QEMU itself said."""
        return self._stderr_path.read_text(errors="replace").strip()

    def wait(self, condition: Callable[[], bool], deadline_s: float, what: str) -> None:
        """wait_until for something that this guest does.

        :raises GuestFailedError: in vain, or QEMU ended before.
        """

        def looked() -> bool:
            if condition():
                return True
            if not self.alive:
                raise GuestFailedError(f"guest {self.name} ended: {self.stderr or self.console[-2000:]}")
            return False

        wait_until(looked, deadline_s, f"guest {self.name}: {what}")

    def qmp(self) -> Qmp:
        """A QMP connection of our own; the caller closes it."""
        return Qmp(self._own_qmp_path)

    def execute(self, command: str, arguments: Mapping[str, object] | None = None) -> Any:
        """One QMP command over a connection of its own; errors as in Qmp.execute."""
        with self.qmp() as qmp:
            return qmp.execute(command, arguments)

    def hmp(self, command: str) -> str:
        """One command of the human monitor."""
        return str(self.execute("human-monitor-command", {"command-line": command}))

    def pause(self) -> None:
        """Stop the guest's processors."""
        self.execute("stop")

    def resume(self) -> None:
        """Let the guest's processors run."""
        self.execute("cont")

    def kill(self) -> None:
        """End QEMU at once and remove its folder."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()
