"""Frames for shared pages: a sparse memory file for each trust group, and one for each of its guests.

A QEMU can read every frame of a pool that it has been given. So a frame with pages of only one guest lies in a pool of
that guest alone. It moves into the group's pool when another guest is to join it.

What the design rests on:

* A frame is a page of the file; its number is its offset. **An offset is never used again**, also not by a later
  memshr: the file's size is the number of offsets that were ever given out, the kernel keeps it, and the file is sealed
  against shrinking. So a guest that still has an old offset mapped (under a page that it has copied) can never come to
  see another guest's frame there: a punched frame reads as zeros.
* **Only memshr writes.** The file's mode is 0400 and it belongs to a user that no process has; QEMU gets a descriptor
  that was opened for reading, and cannot open it again for writing unless it could read all files of the host anyway.
* **It lives as long as a guest has it mapped**, whether or not a memshr runs. A new memshr finds it in /proc/PID/maps
  and takes it only if it has root's mark (``mark``), which also says whose frames they are. The name in maps is a hint
  where to look, and nothing else: any process can make a file of that name.
* A frame is never a page that a guest already had: its place in memory is the kernel's choice, not a guest's.
"""

from __future__ import annotations

import contextlib
import os
from typing import Final, Self
from urllib.parse import quote

import numpy as np
from numpy.typing import NDArray

from memshr.errors import BackendError, HostMemoryError, InvariantError
from memshr.procfs import Vma, Vmas
from memshr.qemu import mark, syscalls
from memshr.runs import alike, consecutive, slices
from memshr.types import PAGE_SHIFT, PAGE_SIZE, PageBytes

NAME_PREFIX: Final = "memshr-pool:"
_MAPPED_PREFIX: Final = f"/memfd:{NAME_PREFIX}"
_MODE: Final = 0o400
_NOBODY: Final = 0xFFFFFFFD
"""The owner, which no process is: an owner may change the mode, also a QEMU of uid 0 that has no capability."""
_MARK: Final = b"pool:"
_OWN_MARK: Final = b"own:"
_PLAIN: Final = " !#$&'()*+,/:;<=>?@[]^{|}"
_MOST_BYTES: Final = 249
_MOST_POOLS: Final = 4096
"""files called pools that are looked at in one QEMU; it has one of its own group, and those of earlier memshrs"""
_LEAVE_IT: Final = "leave it alone: memshr does not do that"
_HOSTS_MEMORY: Final = 4
"""How many times the memory of the host the frames may be that one QEMU has mapped, as in ``guests``."""


def of_pools(mappings: Vmas) -> NDArray[np.bool_]:
    """Which mappings claim to be of frame pools, shape ``(n,)``. Shared ones lie: ours are private."""
    return mappings.named(lambda path: path.startswith(_MAPPED_PREFIX)) & ~mappings.shared


def files_of_pools(mappings: Vmas) -> list[NDArray[np.int64]]:
    """The lines of each file that is mapped and claims to be a frame pool.

    :raises BackendError: these are more files than there are pools, or more pages than the host could have frames: what
        is done for each of them would have no bound.
    """
    (rows,) = np.nonzero(of_pools(mappings))
    pages = int(((mappings.end[rows] - mappings.start[rows]) >> np.uint64(PAGE_SHIFT)).sum())
    if pages > _HOSTS_MEMORY * os.sysconf("SC_PHYS_PAGES"):
        raise BackendError("it has mapped many times the memory of this host as frames", remedy=_LEAVE_IT)
    files = mappings.files(rows)
    if files.max(initial=-1) >= _MOST_POOLS:
        raise BackendError(f"it has mapped more than {_MOST_POOLS} files that are called frame pools", remedy=_LEAVE_IT)
    order = np.argsort(files, kind="stable")
    return [rows[order[part]] for part in slices(alike(files[order]))]


def fits_pool(group: str) -> bool:
    """Whether a pool can be named after this trust group: memfd_create(2) takes 249 bytes at most."""
    return len(_name(group)) <= _MOST_BYTES


def group_at(pid: int, mapping: Vma) -> str | None:
    """The trust group whose pool is mapped there, by root's mark on the file; None: it is no pool of ours.

    :raises OSError: the guest is gone or the mapping is, or we may not look.
    """
    file = os.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        known = _marked(file)
        return known and known[0]
    finally:
        os.close(file)


def groups_in(pid: int, mappings: Vmas) -> list[str]:
    """The trust groups whose pools a process has mapped, by name; what only calls itself a pool does not count.

    :raises OSError: the process is gone, or we may not look. :raises BackendError: as ``files_of_pools``.
    """
    found: set[str | None] = set()
    for rows in files_of_pools(mappings):
        with contextlib.suppress(FileNotFoundError):  # unmapped since
            found.add(group_at(pid, mappings[int(rows[0])]))
    return sorted(group for group in found if group is not None)


def _marked(file: int) -> tuple[str, str] | None:
    # The group of a pool and its owner, by root's mark; None: it is none.
    found = mark.of(file)
    if found is None:
        return None
    if found.startswith(_MARK):
        return os.fsdecode(found.removeprefix(_MARK)), ""
    if found.startswith(_OWN_MARK):
        owner, _, group = found.removeprefix(_OWN_MARK).partition(b":")
        return os.fsdecode(group), owner.decode()
    return None


def _name(group: str) -> str:
    # The kernel writes a line end as \012 where a user reads the name; whatever is not plain is quoted here.
    return NAME_PREFIX + quote(os.fsencode(group), safe=_PLAIN)


class FramePool:
    """The frames of one trust group.

    :param file: the memory file, open to read and write; owned by this object from now on.
    :param owner: the only guest that gets it, as ``GuestProcess.key``; empty: every guest of the group may.

    ``file`` is its device and inode, by which mappings of it are known.
    """

    def __init__(self, group: str, file: int, owner: str = "") -> None:
        self.group = group
        self.owner = owner
        self._file = file
        status = os.fstat(file)
        self.file = status.st_dev, status.st_ino

    @classmethod
    def create(cls, group: str, owner: str = "") -> Self:
        """A new, empty pool.

        :raises PermissionDeniedError: we are not root. :raises UnsupportedError: as mark.put.
        """
        file = syscalls.memfd_create(_name(group))
        try:
            mark.put(file, (_OWN_MARK + owner.encode() + b":" if owner else _MARK) + os.fsencode(group))
            os.fchmod(file, _MODE)
            os.fchown(file, _NOBODY, _NOBODY)
            syscalls.add_seals(file, syscalls.F_SEAL_SHRINK)
        except BaseException:
            os.close(file)
            raise
        return cls(group, file, owner)

    @classmethod
    def adopt(cls, pid: int, mapping: Vma) -> Self | None:
        """The pool behind a mapping of a guest (see of_pools); None if it is no pool that a memshr made.

        :raises OSError: the guest is gone or the mapping is.
        """
        # SAFETY: nothing is read or written before the check of the mark; a guest could name a file of its own like a
        # pool. Whose pool it is says the mark too, so it does not matter which file was mapped there a moment ago.
        file = os.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDWR | os.O_CLOEXEC)
        try:
            known = _marked(file)
        except BaseException:
            os.close(file)
            raise
        if known is None:
            os.close(file)
            return None
        return cls(known[0], file, known[1])

    @property
    def frames(self) -> int:
        """How many frame numbers were ever given out: 0 up to this one."""
        return os.fstat(self._file).st_size >> PAGE_SHIFT

    @property
    def backed_bytes(self) -> int:
        """How much memory the host spends on it."""
        return os.fstat(self._file).st_blocks * 512

    def readable(self) -> int:
        """A new descriptor that can only read: what a QEMU is given. The caller closes it."""
        return os.open(f"/proc/self/fd/{self._file}", os.O_RDONLY | os.O_CLOEXEC)

    def add(self, pages: PageBytes, policy: tuple[int, bytes] = (0, b"")) -> int:
        """Put ``pages`` (shape ``(n, PAGE_SIZE)``, C-contiguous) into new frames; returns the number of the first.

        :param policy: the NUMA policy by which their memory is found: mode with mode flags, bits of the nodes.
        :raises HostMemoryError: the host has no memory for them; the frame numbers are spent, no memory is.
        """
        first = self.frames
        offset = first << PAGE_SHIFT
        os.ftruncate(self._file, offset + pages.nbytes)
        data = pages.reshape(-1).data
        written = 0
        try:
            with syscalls.memory_policy(*policy):
                while written < len(data):
                    written += os.pwrite(self._file, data[written:], offset + written)
        except OSError as error:
            syscalls.punch_hole(self._file, offset, len(data))
            raise HostMemoryError(
                f"no memory for {len(pages)} shared frames: {os.strerror(error.errno or 0)}", remedy="relieve the host"
            ) from error
        return first

    def read(self, frames: NDArray[np.int64], out: PageBytes) -> None:
        """Contents of frames, frame i into row i of ``out`` (shape ``(>= n, PAGE_SIZE)``)."""
        for run in slices(consecutive(frames)):
            rows = out[run]
            if os.preadv(self._file, [rows.data], int(frames[run.start]) << PAGE_SHIFT) != rows.nbytes:
                raise InvariantError(f"pool {self.group} ends before frame {int(frames[run.stop - 1])}")

    def punch(self, frames: NDArray[np.int64]) -> None:
        """Give the memory of frames back to the host. No guest may read any of them.

        :param frames: shape ``(n,)``, in any order.
        """
        ordered = np.unique(frames)
        for run in slices(consecutive(ordered)):
            pages = run.stop - run.start
            syscalls.punch_hole(self._file, int(ordered[run.start]) << PAGE_SHIFT, pages << PAGE_SHIFT)

    def backed_frames(self) -> NDArray[np.int64]:
        """The frames that the host spends memory on, ascending; costs a call for each run."""
        runs = []
        end = self.frames << PAGE_SHIFT
        offset = 0
        while offset < end:
            try:
                start = os.lseek(self._file, offset, os.SEEK_DATA)
            except OSError:  # nothing but holes up to the end
                break
            offset = os.lseek(self._file, start, os.SEEK_HOLE)
            runs.append(np.arange(start >> PAGE_SHIFT, -(-offset // PAGE_SIZE), dtype=np.int64))
        return np.concatenate(runs) if runs else np.empty(0, dtype=np.int64)

    def close(self) -> None:
        """Close our descriptor; frames that guests have mapped stay."""
        os.close(self._file)
