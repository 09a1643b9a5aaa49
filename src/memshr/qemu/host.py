"""The machine that the guests run on: everything that is asked of it, or made on it, besides what is of one guest.

What is of one guest is ``target.Target``'s, which is made here. A stand-in for this class (``tests/standin``) is all
that it takes to run this mechanism without root, and without any QEMU.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Protocol

from memshr.procfs import Vma
from memshr.qemu import pagemap
from memshr.qemu.agent import is_linked
from memshr.qemu.guests import GuestProcess, find_guests
from memshr.qemu.lock import GuestLock, holder_of
from memshr.qemu.pool import FramePool
from memshr.qemu.target import Target


class Lock(Protocol):
    """A guest that nobody else works on until it is released."""

    def release(self) -> None:
        """Give it up."""


class Host:
    """This machine."""

    def target(self, process: GuestProcess) -> Target:
        """A guest, open for looking. :raises OSError: as Target."""
        return Target(process)

    def lock(self, process: GuestProcess) -> Lock:
        """Work on a guest alone. :raises RefusedDomainError: as GuestLock. :raises PermissionDeniedError: likewise."""
        return GuestLock(process.pid, process.name)

    def available_bytes(self) -> int:
        """MemAvailable."""
        return pagemap.host_available_bytes()

    def create_pool(self, group: str, owner: str = "") -> FramePool:
        """A new pool. :raises PermissionDeniedError: as FramePool.create. :raises UnsupportedError: likewise."""
        return FramePool.create(group, owner)

    def adopt_pool(self, pid: int, mapping: Vma) -> FramePool | None:
        """The pool behind a mapping. :raises OSError: as FramePool.adopt."""
        return FramePool.adopt(pid, mapping)

    def is_read_by_others(self, pool: FramePool, ours: Collection[int]) -> bool:
        """Whether a QEMU reads a pool, or may be about to, that is none of these processes."""
        return any(self._may_read(process, pool) for process in find_guests() if process.pid not in ours)

    @staticmethod
    def _may_read(process: GuestProcess, pool: FramePool) -> bool:
        try:
            # A table that a dead memshr has left may be about to map any pool.
            if is_linked(process.pid) and holder_of(process.pid) is None:
                return True
            return bool(process.mappings().of_file(pool.file).any())
        except OSError:
            return process.running
