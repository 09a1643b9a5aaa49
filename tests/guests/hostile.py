"""A hostile QEMU: what a guest that has broken out of its QEMU, or any local user, can put before memshr.

It is one program (programs/hostile.c) whose file is called ``qemu-system-x86_64``, with memory that is really there and
QMP answers that memshr believes. ``MODES`` says what it can do besides; ``spoil`` says which of its answers are odd.
"""

from __future__ import annotations

import contextlib
import os
import pwd
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from guests.kit import build_canary, build_hostile, find_program
from guests.machine import GuestFailedError, wait_until

START_DEADLINE_S = 30.0
FIRST_GFN: Final = 0x400
PAGE_BYTES: Final = 4096
USER: Final = "nobody"

MODES: Final[Mapping[str, str]] = {
    "exec-own-file": "row 1: runs a setuid program while memshr waits, with its own file at the descriptor's number",
    "exec-kept": "row 1: runs a setuid program while memshr waits, which inherits memshr's own descriptor",
    "exec-other": "row 1: runs another ordinary program while memshr waits",
    "exec-at-detach": "row 1: runs a setuid program when its agent has ended, before the mapping is taken out",
    "number-of-own-file": "row 1: puts a program text of its own at the descriptor's number",
    "flip@uffd": "row 2: changes its pages between two looks, and protects them again",
    "own-frame@pool": "row 2: maps a file of its own over pages that are on frames",
    "forged-pool": "row 3: has a file of its own that is called like the pool of the group",
    "forged-pool-race": "row 3: the same, there at one look and gone at the next",
    "pool-write@pool": "row 3: writes to every pool that it was handed, opened anew if need be",
    "pool-swap@pool": "row 3: its own pool and a forged one are in turn at one place, so that names get mixed up",
    "trap-own": "row 4: whoever reads its memory waits for ever, by a userfaultfd of its own",
    "trap-theirs@uffd": "row 4: the same, on memory that it has taken from memshr's userfaultfd",
    "state-under-way@uffd": "row 5: the agent hangs, and the control area says that its table is under way",
    "state-done@uffd": "row 5: the control area says that the table is done",
    "done-nonsense@uffd": "row 5: the control area says that four thousand million calls were done",
    "agent-hangs@agent": "row 5: the agent hangs before there is a link",
    "agent-hangs@uffd": "row 5: the agent hangs when its link has begun",
    "agent-hangs@pool": "row 5: the agent hangs when pages are on frames",
    "agent-dies@agent": "row 5: the agent ends before there is a link",
    "agent-dies@uffd": "row 5: the agent ends when its link has begun",
    "agent-dies@pool": "row 5: the agent ends when pages are on frames",
    "truncated@agent": "row 6: cuts off every file that it was handed",
    "overwritten@agent": "row 6: writes over every file that it was handed",
    "scribble-ff@agent": "row 6: fills the control area's data with ones, all the time",
    "scribble-02@uffd": "row 6: fills the control area's data with twos, all the time",
    "scribble-random@agent": "row 6: fills the control area's data with random bytes, all the time",
    "scribble-random@pool": "row 6: the same, from the time on when pages are on frames",
    "huge-layout": "row 11: has two tebibytes of memory that is not there",
    "tid-forged@agent": "row 13: the control area names a thread of its own as the agent",
    "many-mappings": "row 14: has 60,000 mappings with long names",
    "stops": "row 15: stops itself when it has been handed a descriptor",
    "vfork": "row 15: its main thread cannot be stopped, because it waits for a child of vfork",
    "leader-exits": "row 15: its main thread has ended, the others go on",
    "dies": "row 15: ends when it has been handed a descriptor",
    "wire-flood@uffd": "the link's socket: speaks on it, all the time",
    "wire-steal@uffd": "the link's socket: takes away what memshr says to the agent",
    "wire-shut@uffd": "the link's socket: hangs up on it",
    "uffd-unregister@uffd": "takes its memory away from memshr's userfaultfd",
    "uffd-closed@uffd": "closes memshr's userfaultfd",
    "ram-unmapped@uffd": "unmaps memory that memshr works on",
    "ram-shared@uffd": "maps shared memory over memory that memshr works on",
    "ram-discarded@uffd": "discards memory that memshr works on, all the time",
}
"""mode -> what it does, and the row of the list of dangers that it stands for; ``honest`` does nothing"""


class HostileQemu:
    """The program, running from ``start`` on. A context manager that ends it, whatever it has become.

    :param mode: one of MODES, or ``honest``.
    :param user: who it runs as.
    :param capabilities: whether a uid of 0 has any.
    :param name: of the guest.
    :param answers: the odd answers of its QMP: see ``spoil``.
    :param qmp_path: what its command line gives as its QMP socket; None: a socket of its own, that it serves.
    :param own_root: its folder is its root, as in a container.
    :param pages: what its memory has from FIRST_GFN on.
    :param offsets: where the control area's data has ``state``, ``done`` and ``tid``, for modes that forge them.
    """

    def __init__(
        self,
        mode: str = "honest",
        *,
        user: str = USER,
        capabilities: bool = True,
        name: str = "hostile",
        answers: Sequence[str] = (),
        qmp_path: Path | None = None,
        own_root: bool = False,
        pages: bytes = b"",
        offsets: Mapping[str, int] | None = None,
        memory_mib: int = 16,
    ) -> None:
        self.mode = mode
        self.name = name
        self.memory_mib = memory_mib
        self.folder = Path(tempfile.mkdtemp(prefix="memshr-hostile-"))
        self.folder.chmod(0o755)
        shutil.chown(self.folder, user)
        self.canary_path = self.folder / "canary"
        self._report_path = self.folder / "report"
        self._qmp_path = qmp_path
        self._own_root = own_root
        self.answers = answers
        self._pages = pages
        self._offsets = offsets or {}
        self._user = user
        self._capabilities = capabilities
        self._process: subprocess.Popen[bytes] | None = None

    def start(self) -> Self:
        """Start it and wait until it serves QMP.

        :raises MissingPartError: it cannot be built.
        :raises GuestFailedError: it did not come up.
        """
        try:
            self._start()
        except BaseException:
            self.kill()
            raise
        return self

    def _start(self) -> None:
        program = Path(shutil.copy(build_hostile(), self.folder / "qemu-system-x86_64"))
        shutil.copy(build_canary(), self.canary_path)
        # Set-user-ID root, and harmless: it waits for ever. What is made of it shows whether root was touched.
        self.canary_path.chmod(0o755 if self.mode == "exec-other" else 0o4755)
        self._report_path.touch()
        shutil.chown(self._report_path, self._user)
        answers_path = self.folder / "answers"
        answers_path.write_text("".join(f"{line}\n" for line in self.answers))
        (self.folder / "pages").write_bytes(self._pages)
        inside = Path("/") if self._own_root else self.folder
        command = [*self._as_user(), inside / program.name, "-name", self.name, "-m", str(self.memory_mib)]
        command += ["-mode", self.mode, "-report", inside / "report", "-answers", inside / "answers"]
        command += ["-pages", inside / "pages"]
        command += ["-canary", inside / "canary", "-listen", "no" if self._qmp_path else "yes"]
        command += ["-qmp", f"unix:{self._qmp_path or inside / 'qmp'},server=on,wait=off"]
        for word, offset in self._offsets.items():
            command += [f"-{word}", str(offset)]
        # As on a host with vm.unprivileged_userfaultfd=1, where it needs nobody to have one that the kernel waits for.
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC) if self.mode.startswith("trap") else None
        try:
            with (self.folder / "stderr").open("wb") as stderr:
                self._process = subprocess.Popen(
                    command,
                    stdin=subprocess.DEVNULL,
                    stdout=subprocess.DEVNULL,
                    stderr=stderr,
                    start_new_session=True,
                    pass_fds=[] if device is None else [device],
                )
        finally:
            if device is not None:
                os.close(device)

        def came_up() -> bool:
            if not self.alive:
                raise GuestFailedError(f"the hostile QEMU ended: {(self.folder / 'stderr').read_text()}")
            return bool(self.reported("ready"))

        wait_until(came_up, START_DEADLINE_S, "the hostile QEMU starts")

    def _as_user(self) -> list[str | Path]:
        group = pwd.getpwnam(self._user).pw_gid
        if self._own_root:
            return [
                find_program("chroot", "coreutils"),
                f"--userspec=+{pwd.getpwnam(self._user).pw_uid}:+{group}",
                self.folder,
            ]
        setpriv: list[str | Path] = [find_program("setpriv", "util-linux"), "--pdeathsig=KILL"]
        setpriv += [f"--reuid={self._user}", f"--regid={group}", "--clear-groups"]
        return setpriv if self._capabilities else [*setpriv, "--inh-caps=-all", "--bounding-set=-all"]

    @property
    def pid(self) -> int:
        """Its process, also when that has become another program."""
        assert self._process is not None, "the hostile QEMU was not started"
        return self._process.pid

    @property
    def source(self) -> str:
        """How it is named to memshr."""
        return f"qemu:{self.pid}"

    @property
    def alive(self) -> bool:
        """Is the process still there?"""
        return self._process is not None and self._process.poll() is None

    @property
    def exit_code(self) -> int | None:
        """How it has ended; None: it has not."""
        return None if self._process is None else self._process.poll()

    def reported(self, what: str) -> list[list[str]]:
        """What it has reported of a kind: the words of each line that begins with ``what``."""
        lines = [line.split() for line in self._report_path.read_text().splitlines()]
        return [line[1:] for line in lines if line[:1] == [what]]

    @property
    def acted(self) -> bool:
        """Whether it has done what its mode is for, at least once."""
        return bool(self.reported("acted"))

    @property
    def own_files(self) -> set[tuple[int, int]]:
        """Device and inode of each memory file that it has made."""
        return {(int(device), int(inode)) for device, inode in self.reported("memfd")}

    def kill(self) -> None:
        """End it, whatever it has become, and remove its folder."""
        if self._process is not None:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)  # with the child that answers for what it has become
            self._process.wait()
        shutil.rmtree(self.folder, ignore_errors=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def spoil(command: str, kind: str, payload: str = "") -> str:
    """One odd answer of a hostile QEMU.

    :param command: the name of a QMP command, ``greeting``, ``qom-get:PROPERTY``, or ``hmp:`` and the beginning of a
        line of the human monitor.
    :param kind: ``return`` and ``error`` (``payload`` is the JSON of it), ``raw`` (the whole line), ``huge`` (so many
        MiB of text), ``endless``, ``trickle`` (for ever, a blank each tenth of a second), ``events`` (so many before
        the answer, or without end), ``silent``, ``late`` (so many seconds), ``twice``, ``wrong-id`` (somebody else's
        answer first), ``hangup``.
    """
    assert "\n" not in payload, "an answer of its file is one line"
    return f"{command}\t{kind}\t{payload}"
