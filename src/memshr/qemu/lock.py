"""One memshr at a time for each guest: a lock that ends with its holder and tells who that is.

A POSIX record lock on one byte of ``/run/memshr.lock``, the byte whose number is the guest's pid: the kernel gives it
up when the holder dies, leaves nothing else behind, and tells who holds it.
"""

from __future__ import annotations

import errno
import fcntl
import os
import struct
from pathlib import Path
from typing import Final

from memshr.errors import PermissionDeniedError, RefusedDomainError

LOCK_PATH: Final = Path("/run/memshr.lock")
_FLOCK: Final = struct.Struct("hhqqi4x")
"""struct flock (``asm-generic/fcntl.h``): type, whence, start, length, pid"""

_held: dict[int, GuestLock] = {}
_file: list[int] = []
# Closing any descriptor of the file gives up all of a process's record locks on it: one stays open for good.


class GuestLock:
    """The lock of one guest.

    :raises RefusedDomainError: another process, or another object of this one, has it; the text says who.
    :raises PermissionDeniedError: /run/memshr.lock cannot be opened.
    """

    def __init__(self, pid: int, name: str) -> None:
        self._pid = pid
        if pid in _held:
            raise _refused(pid, name, os.getpid())
        _open()
        while not self._taken(pid, name):
            holder = holder_of(pid)
            if holder is not None:
                raise _refused(pid, name, holder)
            # It has just been given up: once more.
        _held[pid] = self

    @staticmethod
    def _taken(pid: int, name: str) -> bool:
        try:
            fcntl.lockf(_open(), fcntl.LOCK_EX | fcntl.LOCK_NB, 1, pid)
        except OSError as error:
            if error.errno in {errno.EAGAIN, errno.EACCES}:
                return False
            raise PermissionDeniedError(
                f"cannot lock guest {name} ({pid}) in {LOCK_PATH}: {error.strerror}",
                remedy="see that /run is a file system with record locks",
            ) from error
        return True

    def release(self) -> None:
        """Give it up."""
        if _held.pop(self._pid, None) is not None:
            fcntl.lockf(_file[0], fcntl.LOCK_UN, 1, self._pid)


def holder_of(pid: int) -> int | None:
    """The process that holds the lock of a guest; None if no process does.

    :raises PermissionDeniedError: /run/memshr.lock cannot be opened.
    """
    if pid in _held:
        return os.getpid()
    asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, pid, 1, 0)
    kind, _, _, _, holder = _FLOCK.unpack(fcntl.fcntl(_open(), fcntl.F_GETLK, asked))
    return None if kind == fcntl.F_UNLCK else int(holder)


def _open() -> int:
    if not _file:
        try:
            _file.append(os.open(LOCK_PATH, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600))
        except OSError as error:
            raise PermissionDeniedError(f"cannot open {LOCK_PATH}: {error.strerror}", remedy="run as root") from error
    return _file[0]


def _refused(pid: int, name: str, holder: int) -> RefusedDomainError:
    try:
        command = Path(f"/proc/{holder}/cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
    except OSError:
        command = "?"
    text = f"process {holder} ({command}) has guest {name} ({pid}) in hand"
    return RefusedDomainError(
        f"another memshr is at work: {text}", reasons=[text], remedy="end it, or wait for its end"
    )
