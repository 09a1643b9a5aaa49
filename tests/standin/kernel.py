"""A stand-in for the kernel: the memory of some QEMU processes, as far as memshr can tell it from the real one.

Each process has mappings and, for each page that was ever touched, an entry with what /proc/PID/pagemap would say of
it. A guest's write waits at a page that is protected, as at a real userfaultfd: a message goes into a pipe, whose read
ends stand for the descriptors of the userfaultfd. When the last of them is closed, all protection of the process ends.

What is known of the real kernel and played here: ``mm/userfaultfd.c`` (markers for pages that are not there, which
WP_UNPOPULATED allows; ENOENT for what is not registered), ``fs/userfaultfd.c`` (who is woken when), ``mm/memory.c``
(copy on write; what MADV_DONTNEED leaves), ``mm/mremap.c`` (a moved mapping is registered no more).
"""

from __future__ import annotations

import contextlib
import dataclasses
import enum
import errno
import os
import select
import struct
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Final

import numpy as np

from memshr.qemu import syscalls
from memshr.types import PAGE_SHIFT, PAGE_SIZE

_MESSAGE: Final = struct.Struct("<B7xQQ8x")
"""struct uffd_msg (``linux/userfaultfd.h``): the event, and of a page fault its flags and address"""
_PAGEFAULT_FLAG_WP: Final = 1 << 1

PRESENT: Final = 1 << 63
SWAPPED: Final = 1 << 62
FILE: Final = 1 << 61
PROTECTED: Final = 1 << 57
EXCLUSIVE: Final = 1 << 56
_MARKER_TYPE: Final = 0x1F
ZERO_FRAME: Final = 1
"""the number of the frame that is the zero page"""

WAIT_S: Final = 10.0
"""The most that a test waits for a writer."""


class Kind(enum.Enum):
    """What is at a page that has an entry."""

    OWN = "a frame of the process's own"
    ZERO = "the zero page"
    OF_FILE = "a page of the file that is mapped there"
    SWAPPED = "a frame of its own, swapped out"
    MARKER = "nothing, but protected"


@dataclass
class Entry:
    """A page table entry."""

    kind: Kind
    protected: bool = False
    content: bytearray | None = None


@dataclass(frozen=True)
class Area:
    """A mapping, from page ``start`` up to page ``end``.

    ``file`` is None for anonymous memory, else device and inode; ``offset`` the page of the file that is at ``start``.
    """

    start: int
    end: int
    file: tuple[int, int] | None = None
    offset: int = 0
    registered: bool = False
    flags: frozenset[str] = frozenset()
    policy: tuple[int, bytes] = (0, b"")

    def part(self, start: int, end: int) -> Area:
        """What of it lies between two pages of it."""
        offset = self.offset + start - self.start if self.file else 0
        return dataclasses.replace(self, start=start, end=end, offset=offset)

    def goes_on_in(self, other: Area) -> bool:
        """Whether the kernel makes one mapping of this and the next."""
        offset = self.offset + self.end - self.start if self.file else 0
        return dataclasses.replace(self, start=other.start, end=other.end, offset=offset) == other and (
            self.end == other.start
        )


@dataclass
class Writer:
    """A guest's write. ``done`` once it is in memory."""

    address: int
    data: bytes
    done: bool = False


class Userfaultfd:
    """What the kernel has of a userfaultfd. Its descriptors are read ends of a pipe; ``new`` makes the first."""

    def __init__(self) -> None:
        first, self._write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        self.new = first

    @property
    def is_closed(self) -> bool:
        """Whether nobody has a descriptor of it any more."""
        look = select.poll()
        look.register(self._write_end, 0)
        return bool(look.poll(0))

    def say(self, address: int) -> None:
        """Tell of a writer that waits."""
        with contextlib.suppress(BrokenPipeError):  # closed just now: whoever looks next lets everybody go
            os.write(self._write_end, _MESSAGE.pack(syscalls.UFFD_EVENT_PAGEFAULT, _PAGEFAULT_FLAG_WP, address))

    def take_back(self, start: int, end: int) -> None:
        """Whoever waits at these addresses does not any more: what nobody has read of that is not to be read."""
        if self.is_closed:
            return
        again = os.open(f"/proc/self/fd/{self._write_end}", os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        try:
            said = b""
            with contextlib.suppress(BlockingIOError):
                while piece := os.read(again, 1 << 16):
                    said += piece
            left = [message for message in _MESSAGE.iter_unpack(said) if not start <= message[2] < end]
            if left:
                os.write(self._write_end, b"".join(_MESSAGE.pack(*message) for message in left))
        finally:
            os.close(again)

    def close(self) -> None:
        """The process has ended."""
        os.close(self._write_end)


class Failed(OSError):
    """A call that the kernel refuses."""

    def __init__(self, number: int) -> None:
        super().__init__(number, os.strerror(number))


class Kernel:
    """Processes, and the files that they have mapped."""

    def __init__(self) -> None:
        self.lock = threading.RLock()
        self.files: dict[tuple[int, int], int] = {}
        """a descriptor of each file that was ever mapped"""
        self.names: dict[tuple[int, int], str] = {}
        """what it is called in maps, if not "other" """
        self.most_mappings = 65530
        self.protects_what_is_not_there = True
        """UFFD_FEATURE_WP_UNPOPULATED, of Linux 6.4"""

    def file_of(self, descriptor: int) -> tuple[int, int]:
        """Device and inode; the file lives from now on."""
        status = os.fstat(descriptor)
        file = status.st_dev, status.st_ino
        if file not in self.files:
            self.files[file] = os.open(f"/proc/self/fd/{descriptor}", os.O_RDONLY | os.O_CLOEXEC)
        return file

    def close(self) -> None:
        """Give up the files."""
        for descriptor in self.files.values():
            os.close(descriptor)
        self.files = {}


class Memory:
    """The memory of one process. Addresses and lengths are in bytes, whole pages."""

    def __init__(self, kernel: Kernel) -> None:
        self.kernel = kernel
        self.areas: list[Area] = []
        self.entries: dict[int, Entry] = {}
        self.waiting: list[Writer] = []
        self.userfaultfds: list[Userfaultfd] = []
        self.faults = 0
        """how many messages of writers there were"""

    # -- mappings ------------------------------------------------------------------------------------------------------

    def maps(self) -> bytes:
        """As /proc/PID/maps."""
        lines = []
        with self.kernel.lock:
            for area in self.areas:
                device, inode = area.file or (0, 0)
                text = (
                    f"{area.start << PAGE_SHIFT:x}-{area.end << PAGE_SHIFT:x} rw-p {area.offset << PAGE_SHIFT:08x}"
                    f" {os.major(device):02x}:{os.minor(device):02x} {inode}"
                )
                if area.file:
                    text = f"{text:<73}{self.kernel.names.get(area.file, 'other')}"
                lines.append(f"{text}\n".encode())
        return b"".join(lines)

    def area_at(self, page: int) -> Area | None:
        """The mapping that has a page."""
        return next((area for area in self.areas if area.start <= page < area.end), None)

    def _replace(self, start: int, end: int, new: list[Area]) -> None:
        # Whatever was mapped between two pages gives way to these.
        kept = []
        for area in self.areas:
            if area.start < start:
                kept.append(area.part(area.start, min(area.end, start)))
            if area.end > end:
                kept.append(area.part(max(area.start, end), area.end))
        joined: list[Area] = []
        for area in sorted([*kept, *new], key=lambda each: each.start):
            if joined and joined[-1].goes_on_in(area):
                joined[-1] = dataclasses.replace(joined[-1], end=area.end)
            else:
                joined.append(area)
        if len(joined) > self.kernel.most_mappings:
            raise Failed(errno.ENOMEM)
        self.areas = joined

    def _inside(self, start: int, end: int) -> list[Area]:
        # The parts of mappings between two pages. Failed: not all of it is mapped.
        parts = [
            area.part(max(area.start, start), min(area.end, end))
            for area in self.areas
            if area.start < end and area.end > start
        ]
        if sum(part.end - part.start for part in parts) != end - start:
            raise Failed(errno.ENOMEM)
        return parts

    def _pages(self, start: int, end: int) -> list[int]:
        return [page for page in range(start, end) if page in self.entries]

    def map(self, address: int, length: int, file: tuple[int, int] | None, offset: int, *, replace: bool) -> None:
        """mmap(MAP_PRIVATE), MAP_FIXED or MAP_FIXED_NOREPLACE."""
        start, end = _pages_of(address, length)
        if not replace and any(area.start < end and area.end > start for area in self.areas):
            raise Failed(errno.EEXIST)
        self._replace(start, end, [Area(start, end, file, offset >> PAGE_SHIFT if file else 0)])
        for page in self._pages(start, end):
            del self.entries[page]

    def unmap(self, address: int, length: int) -> None:
        """munmap."""
        start, end = _pages_of(address, length)
        self._replace(start, end, [])
        for page in self._pages(start, end):
            del self.entries[page]

    def move(self, address: int, length: int, to: int) -> None:
        """mremap(MREMAP_FIXED), of one mapping or a part of one."""
        start, end = _pages_of(address, length)
        parts = self._inside(start, end)
        if len(parts) != 1:
            raise Failed(errno.EFAULT)
        entries = {page: self.entries[page] for page in self._pages(start, end)}
        self.unmap(to, length)
        by = (to >> PAGE_SHIFT) - start
        moved = dataclasses.replace(parts[0], start=start + by, end=end + by, registered=False)
        self._replace(start, end, [])
        self._replace(start + by, end + by, [moved])
        for page, entry in entries.items():
            del self.entries[page]
            self.entries[page + by] = Entry(entry.kind, False, entry.content)

    def advise(self, address: int, length: int, advice: int) -> None:
        """madvise."""
        start, end = _pages_of(address, length)
        parts = self._inside(start, end)
        if advice == syscalls.MADV_DONTNEED:
            for part in parts:
                for page in self._pages(part.start, part.end):
                    entry = self.entries.pop(page)
                    if part.file and entry.protected:  # only what is anonymous loses its marker
                        self.entries[page] = Entry(Kind.MARKER, True)
            return
        gone, come = _FLAGS[advice]
        self._replace(start, end, [dataclasses.replace(part, flags=part.flags - gone | come) for part in parts])

    def bind(self, address: int, length: int, policy: tuple[int, bytes]) -> None:
        """mbind."""
        start, end = _pages_of(address, length)
        self._replace(start, end, [dataclasses.replace(part, policy=policy) for part in self._inside(start, end)])

    # -- pages ---------------------------------------------------------------------------------------------------------

    def entry_bits(self, address: int) -> int:
        """As /proc/PID/pagemap."""
        page = address >> PAGE_SHIFT
        entry = self.entries.get(page)
        if entry is None:
            return 0
        protected = PROTECTED if entry.protected else 0
        match entry.kind:
            case Kind.OWN:
                return PRESENT | EXCLUSIVE | protected | (page + 2)
            case Kind.ZERO:
                return PRESENT | protected | ZERO_FRAME
            case Kind.OF_FILE:
                return PRESENT | FILE | protected | (page + 2)
            case Kind.SWAPPED:
                return SWAPPED | protected | page << 5
            case Kind.MARKER:
                return SWAPPED | protected | _MARKER_TYPE

    def _fault_in(self, page: int) -> Entry:
        # What a read does.
        area = self.area_at(page)
        if area is None:
            raise Failed(errno.EFAULT)
        entry = self.entries.setdefault(page, Entry(Kind.MARKER))
        if entry.kind is Kind.MARKER:
            entry.kind = Kind.OF_FILE if area.file else Kind.ZERO
        elif entry.kind is Kind.SWAPPED:
            entry.kind = Kind.OWN
        return entry

    def read(self, address: int, length: int) -> bytes:
        """The bytes there, of any pages. :raises Failed: EFAULT: nothing is mapped there."""
        found = b""
        with self.kernel.lock:
            for page in range(address >> PAGE_SHIFT, (address + length - 1 >> PAGE_SHIFT) + 1):
                entry = self._fault_in(page)
                if entry.content is not None:
                    found += entry.content
                elif entry.kind is Kind.OF_FILE:
                    area = self.area_at(page)
                    assert area is not None
                    assert area.file is not None
                    found += self._of_file(area.file, area.offset + page - area.start)
                else:
                    found += bytes(PAGE_SIZE)
        first = address & (PAGE_SIZE - 1)
        return found[first : first + length]

    def _of_file(self, file: tuple[int, int], page: int) -> bytes:
        return os.pread(self.kernel.files[file], PAGE_SIZE, page << PAGE_SHIFT).ljust(PAGE_SIZE, b"\0")

    def put(self, address: int, data: bytes) -> None:
        """Write without asking whether a page is protected: what the process does where it has protected nothing, or a
        device does that goes past the page tables."""
        while data:
            page, first = address >> PAGE_SHIFT, address & (PAGE_SIZE - 1)
            piece = data[: PAGE_SIZE - first]
            self._fault_in(page)
            entry = self.entries[page]
            if entry.content is None:
                entry.content = bytearray(self.read(page << PAGE_SHIFT, PAGE_SIZE))
                entry.kind = Kind.OWN
            entry.content[first : first + len(piece)] = piece
            address, data = address + len(piece), data[len(piece) :]

    # -- guests' writes ------------------------------------------------------------------------------------------------

    def write(self, address: int, data: bytes) -> Writer:
        """A guest writes within one page: at once, or as soon as the page is protected no more."""
        writer = Writer(address, data)
        with self.kernel.lock:
            self.settle()
            self._try(writer)
        return writer

    def _try(self, writer: Writer) -> None:
        page = writer.address >> PAGE_SHIFT
        entry, area = self.entries.get(page), self.area_at(page)
        if entry is not None and entry.protected and area is not None and area.registered and self.userfaultfds:
            self.waiting.append(writer)
            self.faults += 1
            self.userfaultfds[-1].say(page << PAGE_SHIFT)
            return
        self.put(writer.address, writer.data)
        writer.done = True

    def wake(self, address: int, length: int) -> None:
        """UFFDIO_WAKE: whoever waits there tries again."""
        with self.kernel.lock:
            end = address + length
            woken = [writer for writer in self.waiting if address <= writer.address < end]
            self.waiting = [writer for writer in self.waiting if writer not in woken]
            for each in self.userfaultfds:
                each.take_back(address, end)
            for writer in woken:
                self._try(writer)

    # -- userfaultfd ---------------------------------------------------------------------------------------------------

    def open_userfaultfd(self) -> int:
        """A descriptor of a new one, which the caller closes."""
        with self.kernel.lock:
            self.settle()
            assert not self.userfaultfds, "a userfaultfd was left behind"
            self.userfaultfds.append(Userfaultfd())
            return self.userfaultfds[-1].new

    def settle(self) -> None:
        """If the last descriptor of the userfaultfd is closed: nothing is protected any more, and nobody waits."""
        with self.kernel.lock:
            closed = [each for each in self.userfaultfds if each.is_closed]
            if not closed:
                return
            for each in closed:
                each.close()
                self.userfaultfds.remove(each)
            self.areas, areas = [], self.areas
            for area in areas:
                self._replace(area.start, area.end, [dataclasses.replace(area, registered=False)])
            for page, entry in list(self.entries.items()):
                entry.protected = False
                if entry.kind is Kind.MARKER:
                    del self.entries[page]
            waiting, self.waiting = self.waiting, []
            for writer in waiting:
                self._try(writer)

    def register(self, address: int, length: int) -> None:
        """UFFDIO_REGISTER."""
        with self.kernel.lock:
            start, end = _pages_of(address, length)
            parts = [dataclasses.replace(part, registered=True) for part in self._inside(start, end)]
            self._replace(start, end, parts)

    def protect(self, address: int, length: int, *, on: bool) -> None:
        """UFFDIO_WRITEPROTECT."""
        with self.kernel.lock:
            start, end = _pages_of(address, length)
            parts = self._inside(start, end)
            if not all(part.registered for part in parts):
                raise Failed(errno.ENOENT)
            for part in parts:
                makes_markers = part.file is not None or self.kernel.protects_what_is_not_there
                for page in range(part.start, part.end):
                    entry = self.entries.get(page)
                    if entry is not None:
                        entry.protected = on
                        if entry.kind is Kind.MARKER and not on:
                            del self.entries[page]
                    elif on and makes_markers:
                        self.entries[page] = Entry(Kind.MARKER, True)
            if not on:
                self.wake(address, length)

    # -- other actors --------------------------------------------------------------------------------------------------

    def lose_protection(self, address: int) -> None:
        """What a merge by KSM does to a protected page: its entry is replaced, and the protection is gone."""
        with self.kernel.lock:
            self.entries[address >> PAGE_SHIFT].protected = False

    def swap_out(self, address: int) -> None:
        """Swap a page of its own out."""
        with self.kernel.lock:
            entry = self.entries[address >> PAGE_SHIFT]
            assert entry.kind is Kind.OWN
            entry.kind = Kind.SWAPPED

    def protected_pages(self) -> set[int]:
        """The addresses of all pages that a write would wait at."""
        with self.kernel.lock:
            self.settle()
            return {page << PAGE_SHIFT for page, entry in self.entries.items() if entry.protected}


_FLAGS: Final[dict[int, tuple[frozenset[str], frozenset[str]]]] = {
    syscalls.MADV_DONTDUMP: (frozenset(), frozenset({"dd"})),
    syscalls.MADV_DONTFORK: (frozenset(), frozenset({"dc"})),
    syscalls.MADV_MERGEABLE: (frozenset(), frozenset({"mg"})),
    syscalls.MADV_UNMERGEABLE: (frozenset({"mg"}), frozenset()),
    syscalls.MADV_HUGEPAGE: (frozenset({"nh"}), frozenset({"hg"})),
    syscalls.MADV_NOHUGEPAGE: (frozenset({"hg"}), frozenset({"nh"})),
}
"""advice -> the VmFlags that go, and those that come"""


def _pages_of(address: int, length: int) -> tuple[int, int]:
    if address % PAGE_SIZE or length % PAGE_SIZE or length <= 0:
        raise Failed(errno.EINVAL)
    return address >> PAGE_SHIFT, address + length >> PAGE_SHIFT


def bits_of_all(memory: Memory, hvas: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Iterator[int]:
    """The pagemap entries of pages, one by one."""
    with memory.kernel.lock:
        for hva in hvas.tolist():
            yield memory.entry_bits(hva)
