"""The injector, seen from here: putting the agent into a QEMU, and taking its mapping out.

``injector`` is a program of its own that stops QEMU's main thread. This module starts it, asks it, and waits for its
answer not longer than ``ANSWER_DEADLINE_S``: then it is killed, which leaves QEMU as it was (``tracee``).

Errors: RefusedDomainError (this guest is left alone, the reason is in it), BackendError (the injector itself failed).
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Final, Literal, TypedDict

from memshr.errors import BackendError, RefusedDomainError
from memshr.qemu import syscalls
from memshr.qemu.control_area import ControlArea
from memshr.qemu.identity import Identity

ANSWER_DEADLINE_S: Final = 10.0
"""longer than an injector lives with one request: it then has killed itself"""
_ENDING_DEADLINE_S: Final = 10.0
_ANSWER_MOST_BYTES: Final = 1 << 16
_SAID_MOST_BYTES: Final = 1 << 12
_DESCRIPTORS_MOST: Final = 1 << 16

_PROGRAM: Final = "import sys; sys.path.append(sys.argv[1]); from memshr.qemu.injector import main; main()"

Action = Literal["attach", "detach", "judge"]


class Answer(TypedDict, total=False):
    """What the injector says: ``refused``, ``remedy`` and ``stuck`` together, or what it did."""

    refused: str
    remedy: str
    stuck: bool
    code_address: int
    forbidden: list[int]


@dataclass(frozen=True, slots=True)
class Installation:
    """An agent that was put into a QEMU.

    ``code_address`` is where QEMU has the control area; ``forbidden`` are the optional system calls
    (``seccomp.OPTIONAL_CALLS``) that QEMU's seccomp filter forbids: the agent must not make them.
    """

    code_address: int
    forbidden: frozenset[int]


def command() -> list[str]:
    """How the injector is started: with nothing of the environment, and no modules but Python's own and memshr's.

    The user's PYTHONPATH, the current folder and what other packages have installed must not matter to a program that
    runs as root with a thread of QEMU in its hands.
    """
    return [sys.executable, "-I", "-S", "-c", _PROGRAM, os.fspath(Path(__file__).parents[2])]


class Injector:
    """The process that borrows QEMU's threads and takes their mappings out (``injector``), seen from here.

    It is started when it is first needed and serves many guests, because starting takes longer than all its work. It
    ends when this is closed or when we die, but not before what it has under way is done.
    """

    def __init__(self) -> None:
        self._wire: socket.socket | None = None
        self._process: subprocess.Popen[bytes] | None = None

    def ask(self, action: Action, identity: Identity, number_or_address: int, file: int) -> Answer:
        """Have it do ``attach``, ``detach`` or ``judge``, as ``injector`` describes them; returns its answer.

        :param number_or_address: for ``attach`` the number of ``file`` in QEMU, for ``detach`` where QEMU has it.
        :param file: the control area.
        :raises BackendError: it has failed, or did not answer in time; QEMU goes on as it was.
        """
        wire = self._wire or self._start()
        text = f"{action} {identity} {number_or_address}"
        try:
            socket.send_fds(wire, [text.encode()], [file])
            said = wire.recv(_ANSWER_MOST_BYTES)
        except TimeoutError:
            self._end(patience_s=0)
            raise BackendError(
                f"the injector did not answer for {ANSWER_DEADLINE_S:.0f} s on process {identity.pid}",
                remedy="the guest was not attached and goes on; is its process frozen, or the host overloaded?",
            ) from None
        except OSError:
            said = b""
        except BaseException:
            self.close()  # its answer would be taken for that of the next request
            raise
        if not said:
            raise BackendError(f"the injector failed on process {identity.pid}: {self._end(_ENDING_DEADLINE_S)}")
        answer = _validated(said)
        if answer is None:
            self._end(patience_s=0)
            raise BackendError(f"the injector gave no sensible answer on process {identity.pid}")
        if answer.get("stuck"):
            self.close()
        return answer

    def _start(self) -> socket.socket:
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.settimeout(ANSWER_DEADLINE_S)
        try:
            with theirs:
                self._process = subprocess.Popen(
                    command(),
                    stdin=theirs.fileno(),
                    stdout=subprocess.DEVNULL,
                    stderr=subprocess.PIPE,
                    cwd="/",
                    env={},
                    start_new_session=True,
                )
        except BaseException:
            ours.close()
            raise
        self._wire = ours
        return ours

    def close(self) -> None:
        """End it, when it has done what it has under way; kill it if that takes too long."""
        self._end(_ENDING_DEADLINE_S)

    def _end(self, patience_s: float) -> str:
        # Hang up, and kill it if it has not ended within ``patience_s``; returns the last line that it said.
        wire, self._wire = self._wire, None
        process, self._process = self._process, None
        if wire is not None:
            wire.close()
        if process is None:
            return ""
        said = b""
        try:
            said = process.communicate(timeout=patience_s)[1]
        except subprocess.TimeoutExpired:
            process.kill()
            # One that hangs in the kernel ends later, and we do not wait for that.
            with contextlib.suppress(subprocess.TimeoutExpired):
                said = process.communicate(timeout=_ENDING_DEADLINE_S)[1]
        except BaseException:
            process.kill()
            raise
        if process.returncode == -signal.SIGALRM:
            return "it took too long"
        lines = said[-_SAID_MOST_BYTES:].decode(errors="replace").split("\n")
        return next((line for line in reversed(lines) if line.strip()), f"it ended with {process.returncode}")


def _validated(said: bytes) -> Answer | None:
    # The answer if it is of the form that it must have.
    try:
        found = json.loads(said)
    except ValueError:
        return None
    match found:
        case {"refused": str(refused), "remedy": str(remedy), "stuck": bool(stuck)} if len(found) == 3:
            return Answer(refused=refused, remedy=remedy, stuck=stuck)
        case {"code_address": int(address), "forbidden": list(numbers)} if len(found) == 2:
            if 0 < address < 1 << 47 and _are_numbers(numbers):
                return Answer(code_address=address, forbidden=numbers)
        case {"forbidden": list(numbers)} if len(found) == 1 and _are_numbers(numbers):
            return Answer(forbidden=numbers)
        case {} if isinstance(found, dict) and not found:
            return Answer()
    return None


def _are_numbers(values: list[object]) -> bool:
    return all(isinstance(value, int) and 0 <= value < 1024 for value in values)


# -- what memshr wants of it -------------------------------------------------------------------------------------------


def install(identity: Identity, name: str, control: ControlArea, number: int, injector: Injector) -> Installation:
    """Put an agent into a QEMU that has none.

    :param identity: the program that was looked at; another one is not touched.
    :param name: the guest's, for messages.
    :param control: a new one; its ``code_address`` is set.
    :param number: which descriptor of QEMU it is (``descriptor_number``).
    :raises RefusedDomainError: the guest's seccomp filter forbids what the agent does, QEMU cannot be stopped, or it is
        not what it was.
    :raises BackendError: the injector failed.
    """
    answer = injector.ask("attach", identity, number, control.file)
    if "refused" in answer:
        raise _refusal(f"guest {name} ({identity.pid}) cannot be attached", answer)
    control.code_address = answer["code_address"]
    return Installation(answer["code_address"], frozenset(answer["forbidden"]))


def forbidden_calls(identity: Identity, name: str, control: ControlArea, injector: Injector) -> frozenset[int]:
    """Which optional system calls an agent that is there already must not make, as ``Installation.forbidden``.

    It stops QEMU's main thread for a moment if QEMU has a seccomp filter.

    :raises RefusedDomainError: the filter forbids a call that is needed, or QEMU is not what it was.
    :raises BackendError: the injector failed.
    """
    answer = injector.ask("judge", identity, 0, control.file)
    if "refused" in answer:
        raise _refusal(f"guest {name} ({identity.pid}) cannot be attached", answer)
    return frozenset(answer["forbidden"])


def uninstall(identity: Identity, name: str, control: ControlArea, injector: Injector) -> None:
    """Unmap the control area of a QEMU whose agent thread has ended.

    :raises RefusedDomainError: QEMU cannot be stopped for it, or is not what it was; only the mapping stays, which does
        nothing.
    :raises BackendError: the injector failed.
    """
    answer = injector.ask("detach", identity, control.code_address, control.file)
    if "refused" in answer:
        raise _refusal(f"guest {name} ({identity.pid}) keeps an unused mapping of memshr", answer)


def _refusal(text: str, answer: Answer) -> RefusedDomainError:
    reason = answer["refused"]
    return RefusedDomainError(f"{text}: {reason}", reasons=[reason], remedy=answer["remedy"])


# -- descriptors of QEMU -----------------------------------------------------------------------------------------------


def descriptor_number(pid: int, pidfd: int, file: int) -> int:
    """Which descriptor of a process is our open file ``file``, a memory file, a socket or a character device.

    QMP's ``getfd`` takes a descriptor and does not say which number it has got. The text of /proc/PID/fd only says
    where to look; a copy of the descriptor decides. The process can close it or put another file there at any time, so
    whoever uses the number must make sure in the process itself.

    :param pidfd: stands for the process, so ``pid`` is still its number.
    :raises RefusedDomainError: it has no such descriptor, or too many to look at.
    :raises OSError: the process is gone, or we may not look into it.
    """
    wanted = Path(f"/proc/self/fd/{file}").readlink()
    with os.scandir(f"/proc/{pid}/fd") as entries:
        for count, entry in enumerate(entries):
            if count >= _DESCRIPTORS_MOST:
                break
            try:
                if Path(entry.path).readlink() != wanted:
                    continue
                copy = syscalls.pidfd_getfd(pidfd, int(entry.name))
            except OSError as error:
                if error.errno in {errno.ENOENT, errno.EBADF}:  # closed meanwhile
                    continue
                raise
            try:
                if is_same_file(copy, file):
                    return int(entry.name)
            finally:
                os.close(copy)
    reason = "QEMU does not have the descriptor that it was given"
    raise RefusedDomainError(f"process {pid}: {reason}", reasons=[reason], remedy="it is no honest QEMU")


def is_same_file(one: int, other: int) -> bool:
    """Whether two descriptors of ours are one open file, as far as the kernel tells.

    A kernel without kcmp tells only whether they are of one inode. That is as good for memory files and sockets, of
    which each has its own; two openings of a device it does not tell apart.
    """
    ours, theirs = os.fstat(one), os.fstat(other)
    if (ours.st_dev, ours.st_ino, ours.st_rdev) != (theirs.st_dev, theirs.st_ino, theirs.st_rdev):
        return False
    try:
        return syscalls.is_same_open_file(one, other)
    except OSError as error:
        if error.errno not in {errno.ENOSYS, errno.EPERM}:
            raise
        return True
