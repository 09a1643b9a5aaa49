"""Programs that stand for a QEMU while the injector is at work on it, and injectors that are held up or killed."""

from __future__ import annotations

import ctypes
import os
import shutil
import socket
import struct
import subprocess
import sys
import tempfile
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from guests.kit import PROGRAMS, compile_c, find_program
from guests.machine import GuestFailedError
from memshr.qemu import control_area
from memshr.qemu.identity import Identity

LINE_DEADLINE_S = 20.0
SOURCES = Path(control_area.__file__).parents[2]

_PRELUDE = """
import os, signal, sys, time
sys.path.append(sys.argv[1])
from pathlib import Path
from memshr.qemu import control_area, injector, syscalls, tracee
from memshr.qemu.identity import Identity
"""


class Victim:
    """A running program whose standard output is lines and whose standard input the test holds.

    :param files: descriptors that it inherits, under the same numbers.
    :param user: run it as this user (needs root).
    :param seccomp: a seccomp filter that it has.
    """

    def __init__(
        self,
        program: Path,
        *arguments: str,
        files: Sequence[int] = (),
        user: str | None = None,
        seccomp: bytes | None = None,
    ) -> None:
        # setpriv ends it when this process ends in whatever way.
        command: list[str | Path] = [find_program("setpriv", "util-linux"), "--pdeathsig=KILL"]
        if user is not None:
            command += [f"--reuid={user}", "--regid=65534", "--clear-groups"]
        self._process = subprocess.Popen(
            [*command, program, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            pass_fds=files,
            cwd="/",
            preexec_fn=None if seccomp is None else lambda: _confine(seccomp),  # noqa: PLW1509  # one thread only
        )

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def line(self) -> str:
        """The next line that it prints.

        :raises GuestFailedError: it has ended, or prints nothing.
        """
        assert self._process.stdout is not None
        timer = threading.Timer(LINE_DEADLINE_S, self._process.kill)
        timer.start()
        line = self._process.stdout.readline().decode().strip()
        timer.cancel()
        if not line:
            raise GuestFailedError(f"the program ended: {self._process.wait()}")
        return line

    def rounds(self, count: int = 2) -> None:
        """Wait until it has gone round some times more, with everything right."""
        before, _ = self.checked_round()
        while self.checked_round()[0] < before + count:
            pass

    def checked_round(self) -> tuple[int, int]:
        """The number of the next round that it tells, and how many signals it has had.

        :raises GuestFailedError: it has found something wrong.
        """
        words = self.line().split()
        if words[0] != "round":
            raise GuestFailedError(f"the program found something wrong: {words}")
        return int(words[1]), int(words[3])

    def tell(self) -> None:
        """Write a byte to its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.write(b"!")
        self._process.stdin.flush()

    def hang_up(self) -> None:
        """End its standard input."""
        assert self._process.stdin is not None
        self._process.stdin.close()

    def wait(self) -> None:
        """Wait until it has ended. :raises subprocess.TimeoutExpired: it does not."""
        self._process.wait(LINE_DEADLINE_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        with self._process:
            pass


def _confine(seccomp: bytes) -> None:
    # Give this process a seccomp filter: prctl(2), PR_SET_NO_NEW_PRIVS and PR_SET_SECCOMP.
    filters = ctypes.create_string_buffer(seccomp)
    program = struct.pack("@HP", len(seccomp) // 8, ctypes.addressof(filters))
    libc = ctypes.CDLL(None)
    if libc.prctl(38, 1, 0, 0, 0) or libc.prctl(22, 2, program, 0, 0):
        os._exit(126)


@contextmanager
def programs() -> Iterator[tuple[Path, Path, Path]]:
    """``borrowed``, ``impostor``, and a ``borrowed`` that is set-uid root, where every user can execute them."""
    folder = Path(tempfile.mkdtemp(prefix="memshr-victims-"))
    try:
        folder.chmod(0o755)
        borrowed, impostor, privileged = folder / "borrowed", folder / "impostor", folder / "privileged"
        compile_c([PROGRAMS / "borrowed.c", "-O1"], borrowed)
        compile_c([PROGRAMS / "impostor.c", "-O1", "-pthread"], impostor)
        shutil.copyfile(borrowed, privileged)
        for path, mode in ((borrowed, 0o755), (impostor, 0o755), (privileged, 0o4755)):
            path.chmod(mode)
        yield borrowed, impostor, privileged
    finally:
        shutil.rmtree(folder)


def altered(code: str) -> list[str]:
    """How an injector is started in which ``code`` has changed something, and a name is ready for ``code`` to use."""
    return [sys.executable, "-I", "-S", "-c", f"{_PRELUDE}\n{code}\ninjector.main()", os.fspath(SOURCES)]


def dying(call: int, *, after: bool) -> list[str]:
    """How an injector is started that is killed right before, or after, its ``call``-th call of ptrace (from 0)."""
    return altered(f"""
left, real = {call}, syscalls._libc.ptrace
def ptrace(*arguments):
    global left
    left -= 1
    if left < 0 and not {after}:
        os.kill(os.getpid(), signal.SIGKILL)
    result = real(*arguments)
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return result
syscalls._libc.ptrace = ptrace
""")


def ask_one(command: Sequence[str], action: str, identity: Identity, number: int, file: int) -> bytes:
    """Start an injector for one request; returns its answer, empty if it died."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with ours:
        with theirs:
            process = subprocess.Popen(command, stdin=theirs.fileno())
        socket.send_fds(ours, [f"{action} {identity} {number}".encode()], [file])
        answer = ours.recv(1 << 16)
        if b'"stuck": true' in answer:
            process.wait(LINE_DEADLINE_S)  # it ends by itself
    process.wait()
    return answer
