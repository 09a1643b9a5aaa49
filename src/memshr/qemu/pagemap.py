"""What the kernel says about each page of a QEMU: the truth that everything else is checked against.

Sources: ``Documentation/admin-guide/mm/pagemap.rst`` (bits of pagemap and kpageflags); ``fs/proc/task_mmu.c`` and
``fs/proc/page.c`` for what the document leaves open:

* A page of a private file mapping has the file bit until it is copied on write. A page whose entry is empty is read
  from the file again.
* A marker (of userfaultfd: the protection of a page that is not there) looks like a swap entry of the last type.
* The zero page of 4 KiB has neither the file bit nor the exclusive bit, like a page that KSM has merged. The huge zero
  page has the file bit since Linux 6.11, and is never exclusive before.
* The protected bit is also set for swapped pages, for pages that are being migrated, and for markers.
"""

from __future__ import annotations

import errno
import itertools
import mmap
import os
import re
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import BackendError, NoSuchDomainError
from memshr.runs import edges_at, slices
from memshr.types import HUGE_PAGE_PAGES, PAGE_SHIFT, PAGE_SIZE

_PRESENT: Final = np.uint64(1 << 63)
_SWAPPED: Final = np.uint64(1 << 62)
_FILE: Final = np.uint64(1 << 61)
_PROTECTED: Final = np.uint64(1 << 57)
_EXCLUSIVE: Final = np.uint64(1 << 56)
_FRAME: Final = np.uint64((1 << 55) - 1)
_SWAP_TYPE: Final = np.uint64(0x1F)
_MARKER_TYPE: Final = np.uint64(0x1F)
_THP: Final = np.uint64(1 << 22)
_ZERO_PAGE: Final = np.uint64(1 << 24)
_HUGE_ZERO_PAGE: Final = _THP | _ZERO_PAGE

_GAP_PAGES: Final = 2048
"""Pages that are nearer than this are read in one go: 16 KiB of pagemap cost less than another system call."""
_BATCH_PAGES: Final = 1 << 20
"""So many pages are read at once at most, 8 MiB of pagemap: RAM may be terabytes."""
_GAP_FRAMES: Final = 4
"""An entry of kpageflags takes the kernel a fifth of the time of a system call, unlike one of pagemap."""
_SMAPS_LINE_BYTES: Final = 8192
"""More than the line of a mapping has: its numbers, and the path of a file that can be opened by it (PATH_MAX)."""
_SMAPS_BYTES: Final = 256 << 20
"""Of smaps, some 300,000 mappings: ten times as many as a guest has of which much is shared."""

_SMAPS_KSM_KIB: Final = re.compile(rb"^KSM: *([0-9]+) kB$", re.MULTILINE)
"""fs/proc/task_mmu.c, since Linux 6.6; without pages that were merged with the zero page"""

Entries = NDArray[np.uint64]
"""pagemap entries, shape ``(n,)``"""


class Pagemap:
    """The pagemap of one process. :raises OSError: it is gone, or we may not read it."""

    def __init__(self, pid: int) -> None:
        self._file = os.open(f"/proc/{pid}/pagemap", os.O_RDONLY | os.O_CLOEXEC)
        try:
            self._kpageflags: int | None = os.open("/proc/kpageflags", os.O_RDONLY | os.O_CLOEXEC)
        except OSError:
            self._kpageflags = None
        try:
            self._zero_frame = self._find_zero_frame()
        except BaseException:
            self.close()
            raise

    def entries(self, hvas: NDArray[np.int64]) -> Entries:
        """The pagemap entry of the page at each address; cheapest if they ascend.

        :raises NoSuchDomainError: the process is gone: it has exited, or runs another program.
        :raises OSError: the kernel does not answer, which says nothing about the process. EFAULT: it lives, and there
            can be no page at one of these addresses.
        """
        if not len(hvas):
            return np.empty(0, dtype=np.uint64)
        pages = hvas >> PAGE_SHIFT
        if np.all(pages[1:] > pages[:-1]):
            return self._ascending(pages)
        distinct, inverse = np.unique(pages, return_inverse=True)
        return self._ascending(distinct)[inverse]

    def _ascending(self, pages: NDArray[np.int64]) -> Entries:
        found = np.empty(len(pages), dtype=np.uint64)
        for near in slices(edges_at(np.diff(pages) > _GAP_PAGES, len(pages))):
            self._fill(pages[near], found[near])
        return found

    def _fill(self, pages: NDArray[np.int64], found: Entries) -> None:
        # The entries of ascending pages with no large gaps between them.
        start = 0
        while start < len(pages):
            first = int(pages[start])
            end = int(np.searchsorted(pages, first + _BATCH_PAGES))
            count = int(pages[end - 1]) - first + 1
            # Memory that is new to us costs more than reading into it: pages without gaps are read into their place.
            gaps = count > end - start
            words = np.empty(count, dtype=np.uint64) if gaps else found[start:end]
            got = _read_words(self._file, first, words)
            if got < count:
                if not os.pread(self._file, 8, 0):
                    raise NoSuchDomainError("QEMU has ended")
                raise OSError(errno.EFAULT, f"no process has memory at page {first + got:#x}")
            if gaps:
                found[start:end] = words[pages[start:end] - first]
            start = end

    def zero_pages(self, entries: Entries) -> NDArray[np.bool_]:
        """Which of these entries are the kernel's own zero page (of either size), which costs nothing.

        Needs root; without it the answer is no. The small zero page costs no system call. The huge one costs one for
        each 2 MiB of the host in which there is a page that may be it: one of a file, or one that is not exclusive.
        """
        frames = entries & _FRAME
        present = (entries & _PRESENT) != 0
        found = present & (frames == self._zero_frame) & (self._zero_frame != 0)
        may_be = ((entries & _FILE) != 0) | ((entries & _EXCLUSIVE) == 0)
        (suspects,) = np.nonzero(present & may_be & ~found)
        # The huge zero page is whole: it is never mapped in pieces. So one frame speaks for the 2 MiB that it is in.
        _, first, inverse = np.unique(
            frames[suspects] // np.uint64(HUGE_PAGE_PAGES), return_index=True, return_inverse=True
        )
        flags = self._flags(frames[suspects[first]])
        found[suspects] = ((flags & _HUGE_ZERO_PAGE) == _HUGE_ZERO_PAGE)[inverse]
        return np.asarray(found)

    def huge(self, entries: Entries) -> NDArray[np.bool_]:
        """Which of these entries are parts of a transparent huge page, of 2 MiB or smaller (the huge zero page is one).

        Needs root; without it the answer is no. Costs 0.1 us for each frame, each once.
        """
        found = np.zeros(len(entries), dtype=np.bool_)
        (present,) = np.nonzero(entries & _PRESENT)
        frames, inverse = np.unique(entries[present] & _FRAME, return_inverse=True)
        found[present] = ((self._flags(frames) & _THP) != 0)[inverse]
        return found

    def _flags(self, frames: NDArray[np.uint64]) -> NDArray[np.uint64]:
        # The kpageflags of ascending frames; of frame 0, which the kernel shows to those who may not know, nothing
        # that is asked here.
        flags = np.zeros(len(frames), dtype=np.uint64)
        if self._kpageflags is None or not len(frames):
            return flags
        for start, end in itertools.pairwise(edges_at(np.diff(frames) > np.uint64(_GAP_FRAMES), len(frames)).tolist()):
            first = int(frames[start])
            # Short where there is memory of devices: it may lie beyond what there are flags of.
            if end == start + 1:
                flags[start] = int.from_bytes(os.pread(self._kpageflags, 8, first * 8), "little")
                continue
            words = np.zeros(int(frames[end - 1]) - first + 1, dtype=np.uint64)
            _read_words(self._kpageflags, first, words)
            flags[start:end] = words[frames[start:end] - frames[start]]
        return flags

    def _find_zero_frame(self) -> np.uint64:
        # The frame of the small zero page, 0 if we may not know: a read of a page that was never touched maps it. On
        # x86 there is one (arch/x86/include/asm/pgtable.h, empty_zero_page), which stays where it is. It is looked up
        # beforehand because nothing but its frame tells it from the pages that KSM has merged, a hundred thousand.
        with mmap.mmap(-1, PAGE_SIZE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS, prot=mmap.PROT_READ) as untouched:
            array = np.frombuffer(untouched, dtype=np.uint8)
            assert array[0] == 0
            page = array.ctypes.data >> PAGE_SHIFT
            del array
            with Path("/proc/self/pagemap").open("rb", buffering=0) as own:
                frames = np.zeros(1, dtype=np.uint64)
                _read_words(own.fileno(), page, frames)
        frames &= _FRAME
        return np.uint64(frames[0] if (self._flags(frames)[0] & _HUGE_ZERO_PAGE) == _ZERO_PAGE else 0)

    def close(self) -> None:
        """Close the files."""
        os.close(self._file)
        if self._kpageflags is not None:
            os.close(self._kpageflags)


def _read_words(file: int, first: int, words: NDArray[np.uint64]) -> int:
    # Fill ``words`` with what is in a file of 64-bit numbers from number ``first`` on; how many there were.
    out = words.view(np.uint8).data
    got = 0
    while got < len(out):
        read = os.preadv(file, [out[got:]], first * 8 + got)
        if not read:
            break
        got += read
    return got // 8


def is_there(entries: Entries) -> NDArray[np.bool_]:
    """Which pages have contents of their own, or of a file, in memory or swapped out.

    The zero pages are there, too, although they cost nothing: ask ``Pagemap.zero_pages`` what a page costs.
    """
    return np.asarray((entries & (_PRESENT | _SWAPPED)) != 0) & ~_is_marker(entries)


def on_frame(entries: Entries) -> NDArray[np.bool_]:
    """Of pages *in private mappings of a pool*: which still are the frame, not the guest's own copy.

    Of other pages the answer means nothing: the huge zero page has the file bit, and absent anonymous memory is absent.
    """
    from_file = (entries & _FILE) != 0
    not_faulted_in = (entries & (_PRESENT | _SWAPPED)) == 0
    return np.asarray(from_file | not_faulted_in) | _is_marker(entries)


def is_protected(entries: Entries) -> NDArray[np.bool_]:
    """Which pages userfaultfd protects against writing: present, swapped out, or not there yet.

    Only that the page table entry says so: it may be left over in a mapping that is registered with no userfaultfd any
    more (``mremap`` before Linux 6.13), and then a write tells nobody.
    """
    return np.asarray((entries & _PROTECTED) != 0)


def _is_marker(entries: Entries) -> NDArray[np.bool_]:
    swapped = (entries & (_PRESENT | _SWAPPED | _FILE)) == _SWAPPED
    return np.asarray(swapped & ((entries & _SWAP_TYPE) == _MARKER_TYPE))


def mapping_flags(pid: int, address: int) -> frozenset[str]:
    """The VmFlags (two letters each, see proc(5)) of the mapping at ``address``; none if nothing is mapped there.

    Reads smaps up to there, for which the kernel looks at every page that is mapped before.

    :raises OSError: the process is gone.
    :raises BackendError: what is mapped before is more, or has longer names, than any QEMU needs.
    """
    inside = False
    left_bytes = _SMAPS_BYTES
    with Path(f"/proc/{pid}/smaps").open("rb") as smaps:
        while line := smaps.readline(_SMAPS_LINE_BYTES):
            left_bytes -= len(line)
            if left_bytes < 0 or not line.endswith(b"\n"):
                raise BackendError(
                    f"process {pid} has hundreds of thousands of mappings, or names of files that are too long",
                    remedy="leave this guest out; an ordinary QEMU has some hundreds",
                )
            word, _, rest = line.partition(b" ")
            if not word.endswith(b":"):
                start, end = (int(part, 16) for part in word.split(b"-"))
                if start > address:
                    break
                inside = address < end
            elif inside and word == b"VmFlags:":
                return frozenset(rest.decode("ascii").split())
    if left_bytes == _SMAPS_BYTES:  # exited and not yet reaped: there is a file with nothing in it
        raise ProcessLookupError(errno.ESRCH, os.strerror(errno.ESRCH), f"/proc/{pid}/smaps")
    return frozenset()


def ksm_pages(pid: int) -> int:
    """How many pages of a process KSM has merged, with others or with the zero page: what unmerging has to copy.

    Before Linux 6.6 this may be too many, never too few: KSM counts a page until it looks at it again, though it was
    written, unmapped or unmerged since; and if KSM is switched off, it never looks. Newer kernels are asked what is
    mapped, which costs a look at every page of the process if KSM has any. Pages merged with the zero page are not
    counted before Linux 6.6. 0 if the kernel has no KSM.

    :raises OSError: the process is gone, or we may not look.
    """
    stat = _ksm_stat(pid)
    # Before Linux 6.3 this number had a file of its own only. It is empty for a process that has exited.
    merged = stat.get(b"ksm_merging_pages") or _read_if_there(pid, "ksm_merging_pages") or b"0"
    mapped = _SMAPS_KSM_KIB.search(_read_if_there(pid, "smaps_rollup")) if int(merged) else None
    pages = int(merged) if mapped is None else int(mapped[1]) * 1024 // PAGE_SIZE
    return pages + int(stat.get(b"ksm_zero_pages", b"0"))


def is_mergeable_by_default(pid: int) -> bool | None:
    """Whether KSM may merge all of a process's anonymous memory, also what it maps later (``PR_SET_MEMORY_MERGE``).

    None: this kernel does not tell. Linux before 6.4 has no such thing; kernels up to 6.14 have it and keep quiet.

    :raises OSError: the process is gone, or we may not look.
    """
    answer = _ksm_stat(pid).get(b"ksm_merge_any")
    return None if answer is None else answer == b"yes"


def _ksm_stat(pid: int) -> dict[bytes, bytes]:
    # Lines like ``ksm_merging_pages 0`` and ``ksm_merge_any: no`` (fs/proc/base.c, proc_pid_ksm_stat).
    lines = (line.split() for line in _read_if_there(pid, "ksm_stat").splitlines())
    return {words[0].rstrip(b":"): words[1] for words in lines if len(words) == 2}


def _read_if_there(pid: int, name: str) -> bytes:
    # A file of a process that not every kernel has; nothing if this kernel has it not.
    directory = Path(f"/proc/{pid}")
    try:
        return (directory / name).read_bytes().strip()
    except FileNotFoundError:
        directory.stat()  # or else it is the process that is not there
        return b""


def host_available_bytes() -> int:
    """MemAvailable of the host: what could be given out without swapping (``/proc/meminfo``)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    return 0
