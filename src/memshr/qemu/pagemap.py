"""What the kernel says about each page of a QEMU: the truth that everything else is checked against.

Sources: ``Documentation/admin-guide/mm/pagemap.rst`` (bits of pagemap and kpageflags); ``fs/proc/task_mmu.c`` for what
the document leaves open: a page of a private file mapping has the file bit until it is copied on write, a page whose
entry is empty is read from the file again, and a marker of userfaultfd looks like a swap entry of the last type.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import NoSuchDomainError
from memshr.types import PAGE_SHIFT

_PRESENT: Final = np.uint64(1 << 63)
_SWAPPED: Final = np.uint64(1 << 62)
_FILE: Final = np.uint64(1 << 61)
_EXCLUSIVE: Final = np.uint64(1 << 56)
_FRAME: Final = np.uint64((1 << 55) - 1)
_SWAP_TYPE: Final = np.uint64(0x1F)
_MARKER_TYPE: Final = np.uint64(0x1F)
_THP: Final = 1 << 22
_ZERO_PAGE: Final = 1 << 24

_GAP_PAGES: Final = 2048
"""Pages that are nearer than this are read in one go: 16 KiB of pagemap cost less than another system call."""


class Pagemap:
    """The pagemap of one process. :raises OSError: it is gone, or we may not read it."""

    def __init__(self, pid: int) -> None:
        self._file = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._kpageflags: int | None = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._kpageflags = None

    def entries(self, hvas: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The pagemap entry of the page at each address; cheapest if they ascend.

        :raises NoSuchDomainError: the process is gone.
        """
        if not len(hvas):
            return np.empty(0, dtype=np.uint64)
        pages = hvas >> PAGE_SHIFT
        if np.all(pages[1:] > pages[:-1]):
            return self._ascending(pages)
        distinct, inverse = np.unique(pages, return_inverse=True)
        return self._ascending(distinct)[inverse]

    def _ascending(self, pages: NDArray[np.int64]) -> NDArray[np.uint64]:
        found = np.empty(len(pages), dtype=np.uint64)
        breaks = np.flatnonzero(np.diff(pages) > _GAP_PAGES) + 1
        edges = [0, *breaks.tolist(), len(pages)]
        for start, end in itertools.pairwise(edges):
            first, count = int(pages[start]), int(pages[end - 1] - pages[start]) + 1
            read = os.pread(self._file, count * 8, first * 8)
            if len(read) != count * 8:
                raise NoSuchDomainError("QEMU has ended")
            found[start:end] = np.frombuffer(read, dtype=np.uint64)[pages[start:end] - first]
        return found

    def zero_pages(self, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of these entries are the kernel's own zero page (of either size), which costs nothing.

        Needs root; without it the answer is no.
        """
        found = np.zeros(len(entries), dtype=np.bool_)
        suspects = np.flatnonzero((entries & (_PRESENT | _FILE | _EXCLUSIVE)) == _PRESENT)
        if not len(suspects):
            return found
        frames, inverse = np.unique(entries[suspects] & _FRAME, return_inverse=True)
        flags = np.array([self._flags(int(frame)) for frame in frames], dtype=np.int64)
        found[suspects] = (flags[inverse] & _ZERO_PAGE) != 0
        return found

    def huge(self, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which of these entries are parts of a transparent huge page. One lookup for each entry: sample first."""
        return np.array(
            [bool(self._flags(int(entry & _FRAME)) & _THP) if entry & _PRESENT else False for entry in entries],
            dtype=np.bool_,
        )

    def _flags(self, frame: int) -> int:
        if self._kpageflags is None or frame == 0:  # 0: the kernel hides frame numbers from us
            return 0
        return int.from_bytes(os.pread(self._kpageflags, 8, frame * 8), "little")

    def close(self) -> None:
        """Close the files."""
        os.close(self._file)
        if self._kpageflags is not None:
            os.close(self._kpageflags)


def is_there(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which pages have contents of their own, or of a file, in memory or swapped out (the zero page included)."""
    return np.asarray((entries & (_PRESENT | _SWAPPED)) != 0) & ~_is_marker(entries)


def on_frame(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Of pages *in private mappings of a pool*: which still are the frame, not the guest's own copy."""
    from_file = (entries & _FILE) != 0
    not_faulted_in = (entries & (_PRESENT | _SWAPPED)) == 0
    return np.asarray(from_file | not_faulted_in) | _is_marker(entries)


def _is_marker(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    swapped = (entries & (_PRESENT | _SWAPPED | _FILE)) == _SWAPPED
    return np.asarray(swapped & ((entries & _SWAP_TYPE) == _MARKER_TYPE))


def mapping_flags(pid: int, address: int) -> frozenset[str]:
    """The VmFlags (two letters each, see proc(5)) of the mapping at ``address``; reads smaps only up to there.

    :raises OSError: the process is gone.
    """
    inside = False
    with contextlib.closing(Path(f"/proc/{pid}/smaps").open()) as lines:
        for line in lines:
            word, _, rest = line.partition(" ")
            if word == "VmFlags:" and inside:
                return frozenset(rest.split())
            if "-" in word and not word.endswith(":"):
                start, end = (int(part, 16) for part in word.split("-"))
                inside = start <= address < end
    return frozenset()


def host_available_bytes() -> int:
    """MemAvailable of the host: what could be given out without swapping (``/proc/meminfo``)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0


def map_count_limit() -> int:
    """How many mappings a process may have (``vm.max_map_count``)."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())


def ksm_pages(pid: int) -> int:
    """How many pages of a process KSM has merged (``/proc/PID/ksm_stat``); 0 where the kernel has none."""
    try:
        for line in Path(f"/proc/{pid}/ksm_stat").read_text().splitlines():
            if line.startswith("ksm_merging_pages"):
                return int(line.split()[1])
    except FileNotFoundError:
        pass
    return 0


def is_protected(entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
    """Which pages are write-protected through userfaultfd."""
    return np.asarray((entries & np.uint64(1 << 57)) != 0)
