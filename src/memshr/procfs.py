"""The memory of another process, as Linux's /proc shows it: what is mapped, what is there, and its bytes.

What makes this hard: the process goes on while we look. It maps and unmaps, runs another program, or exits, and its
number is given to another process. So the directory /proc/PID is opened once and everything is opened relative to it:
it stands for that process and never for the next one of the same number. The open ``mem`` file stands for the address
space as it was when it was opened, and reads as empty once that is gone.

Sources: proc(5); the kernel's ``fs/proc/base.c`` (mem), ``Documentation/admin-guide/mm/pagemap.rst``; for
``PAGEMAP_SCAN`` ``struct pm_scan_arg`` and ``struct page_region`` of ``include/uapi/linux/fs.h`` (Linux 6.7).
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import re
import struct
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import overload

import numpy as np
from numpy.typing import NDArray

from memshr.closing import Closing
from memshr.errors import BackendError, ImageError, MemshrError, PermissionDeniedError, UnsupportedError
from memshr.runs import alike, slices, true_runs
from memshr.types import PAGE_SHIFT, PAGE_SIZE, PageBytes

_PAGEMAP_BATCH_PAGES = 1 << 20
"""8 MiB of pagemap in one read: a mapping may be terabytes of address space with next to nothing in it."""

_PAGEMAP_SCAN = 0xC0606610
"""``_IOWR('f', 16, struct pm_scan_arg)``."""
_SCAN_ARGUMENT = struct.Struct("=12Q")
_SCANNED = np.dtype([("start", np.uint64), ("end", np.uint64), ("categories", np.uint64)])
_SCAN_REGIONS = 4096
_PAGE_IS_PFNZERO = 1 << 5
_PAGE_IS_HUGE = 1 << 6

_PRESENT_OR_SWAPPED = np.uint64(3 << 62)


@dataclass(frozen=True, slots=True)
class Vma:
    """One line of /proc/PID/maps: the addresses ``start`` up to, not including, ``end``.

    ``path`` is what the kernel prints: a file (a line end in it reads ``\\012``, and a file that was removed ends in
    `` (deleted)``), a name in brackets, or nothing for an anonymous mapping.
    """

    start: int
    end: int
    readable: bool
    writable: bool
    executable: bool
    shared: bool
    offset: int
    dev_major: int
    dev_minor: int
    inode: int
    path: str

    @property
    def pages(self) -> int:
        """How many pages of address space it takes."""
        return (self.end - self.start) >> PAGE_SHIFT


class Vmas(Sequence[Vma]):
    """The lines of /proc/PID/maps, as columns: made for the tens of thousands of mappings that a shared guest has.

    A ``Vma`` is made when one is asked for.

    :param maps: contents of /proc/PID/maps.
    :raises ValueError: a line is not of the form that the kernel writes.

    ``start``, ``end``, ``offset`` (bytes) and ``inode`` are uint64, ``flags`` the four letters as uint8, shape
    ``(n, 4)``; ``name`` has for each line the place of its path in ``paths``, where each path is once. ``maps`` is what
    was parsed.
    """

    def __init__(self, maps: bytes) -> None:
        self.maps = maps
        text = np.frombuffer(maps, dtype=np.uint8)
        (ends,) = np.nonzero(text == ord("\n"))
        if len(maps) and not maps.endswith(b"\n"):
            ends = np.append(ends, len(maps))
        line = np.concatenate([[0], ends + 1])[: len(ends)]
        lengths = ends - line
        self.start, self.end, self.offset, self.inode = np.zeros((4, len(ends)), dtype=np.uint64)
        self._dev_major, self._dev_minor, self.name = np.zeros((3, len(ends)), dtype=np.int64)
        self.flags = np.zeros((len(ends), 4), dtype=np.uint8)
        self._places = {b"": 0}
        by_length = np.argsort(lengths, kind="stable")
        for rows in (by_length[part] for part in slices(alike(lengths[by_length]))):
            left = rows
            for _ in range(_ALIKE_TRIES):
                if len(left) < _ALIKE_LINES:
                    break
                left = self._parse_alike(text, line, left, int(lengths[left[0]]))
            for row in left.tolist():
                self._note(row, self._parse(int(line[row]), int(ends[row])))
        if (self.start >= self.end).any():
            raise _odd_line()
        self.paths: list[str] = [os.fsdecode(path) for path in self._places]

    def _parse(self, begin: int, end: int) -> re.Match[bytes]:
        line = _MAPS_LINE.fullmatch(self.maps, begin, end)
        if line is None or int(line["inode"]) >= 1 << 64:
            raise _odd_line()
        return line

    def _note(self, rows: int | NDArray[np.int64], line: re.Match[bytes]) -> None:
        # What a line says, for one row or for all that are like it.
        self.start[rows], self.end[rows], self.offset[rows] = (int(line[field], 16) for field in _VARYING)
        self.flags[rows] = np.frombuffer(line["flags"], dtype=np.uint8)
        self._dev_major[rows], self._dev_minor[rows] = int(line["major"], 16), int(line["minor"], 16)
        self.inode[rows] = int(line["inode"])
        self.name[rows] = self._places.setdefault(line["path"] or b"", len(self._places))

    def _parse_alike(
        self, text: NDArray[np.uint8], line: NDArray[np.int64], rows: NDArray[np.int64], length: int
    ) -> NDArray[np.int64]:
        # Parse those of these lines, all of one length, that differ from the middle one in nothing but addresses,
        # flags and offset. In a shared guest nearly all lines are like one of two. Returns the others.
        begin = int(line[rows[len(rows) // 2]])
        model = self._parse(begin, begin + length)
        lines = np.lib.stride_tricks.sliding_window_view(text, length)[line[rows]]
        tail = model.end("offset") - begin
        alike = (lines[:, tail:] == text[begin + tail : begin + length]).all(axis=1)
        for field in ("start", "end", "flags"):
            column = model.end(field) - begin
            alike &= lines[:, column] == text[begin + column]
        digits = [_DIGITS[lines[:, model.start(field) - begin : model.end(field) - begin]] for field in _VARYING]
        for each in digits:
            alike &= (each < 16).all(axis=1)
        found = rows[alike]
        self._note(found, model)
        for values, each in zip((self.start, self.end, self.offset), digits, strict=True):
            numbers = np.zeros(len(rows), dtype=np.uint64)
            for column in each.T:
                numbers = numbers << np.uint64(4) | column
            values[found] = numbers[alike]
        first_flag = model.start("flags") - begin
        self.flags[found] = lines[:, first_flag : first_flag + 4][alike]
        return np.asarray(rows[~alike])

    def __len__(self) -> int:
        return len(self.start)

    @overload
    def __getitem__(self, index: int) -> Vma: ...
    @overload
    def __getitem__(self, index: slice) -> list[Vma]: ...
    def __getitem__(self, index: int | slice) -> Vma | list[Vma]:
        if isinstance(index, slice):
            return [self[row] for row in range(*index.indices(len(self)))]
        flags = self.flags[index].tobytes()
        return Vma(
            start=int(self.start[index]),
            end=int(self.end[index]),
            readable=flags[0:1] == b"r",
            writable=flags[1:2] == b"w",
            executable=flags[2:3] == b"x",
            shared=flags[3:4] == b"s",
            offset=int(self.offset[index]),
            dev_major=int(self._dev_major[index]),
            dev_minor=int(self._dev_minor[index]),
            inode=int(self.inode[index]),
            path=self.paths[int(self.name[index])],
        )

    @property
    def shared(self) -> NDArray[np.bool_]:
        """Which lines are shared mappings, shape ``(n,)``."""
        return np.asarray(self.flags[:, 3] == ord("s"))

    @property
    def executable(self) -> NDArray[np.bool_]:
        """Which lines may be executed, shape ``(n,)``."""
        return np.asarray(self.flags[:, 2] == ord("x"))

    @property
    def ordinary(self) -> NDArray[np.bool_]:
        """Which lines are private memory of no file that can be read and written, shape ``(n,)``."""
        wanted = np.frombuffer(b"rwp", dtype=np.uint8)
        return np.asarray((self.inode == 0) & (self.flags[:, [0, 1, 3]] == wanted).all(axis=1))

    def of_file(self, file: tuple[int, int]) -> NDArray[np.bool_]:
        """Which lines are of the file with this device and inode, shape ``(n,)``."""
        device, inode = file
        major, minor = os.major(device), os.minor(device)
        return np.asarray((self.inode == inode) & (self._dev_major == major) & (self._dev_minor == minor))

    def files(self, rows: NDArray[np.int64]) -> NDArray[np.int64]:
        """Which file each of these lines is of, shape ``(len(rows),)``: files are numbered from 0 on as they come."""
        columns = (self._dev_major[rows], self._dev_minor[rows], self.inode[rows])
        order = np.lexsort(columns)
        begins = np.zeros(len(rows), dtype=np.bool_)
        for column in columns:
            begins[1:] |= column[order][1:] != column[order][:-1]
        sorted_numbers = np.cumsum(begins)
        # lexsort is stable: the first of each file in that order is the first that comes.
        first = order[np.append(True, begins[1:])] if len(rows) else order
        numbers = np.empty(len(rows), dtype=np.int64)
        numbers[order] = np.argsort(np.argsort(first))[sorted_numbers]
        return numbers

    def named(self, wanted: Callable[[str], bool]) -> NDArray[np.bool_]:
        """Which lines have a path that is ``wanted``, shape ``(n,)``; asked once for each different path."""
        return np.array([wanted(path) for path in self.paths], dtype=np.bool_)[self.name]

    def of(self, which: NDArray[np.bool_]) -> list[Vma]:
        """The mappings of these lines."""
        return [self[row] for row in np.flatnonzero(which).tolist()]


def _odd_line() -> ValueError:
    return ValueError("a line of maps is not of the form that the kernel writes")


_MAPS_LINE = re.compile(
    rb"(?P<start>[0-9a-f]{1,16})-(?P<end>[0-9a-f]{1,16}) (?P<flags>.{4}) (?P<offset>[0-9a-f]{1,16})"
    rb" (?P<major>[0-9a-f]{1,8}):(?P<minor>[0-9a-f]{1,8}) (?P<inode>[0-9]{1,20})(?: +(?P<path>.*))?",
    re.DOTALL,
)
_VARYING = ("start", "end", "offset")
_ALIKE_LINES = 256
"""Fewer lines are parsed faster one by one."""
_ALIKE_TRIES = 4
"""How many lines of one length are tried as a pattern. Lines that match none of them are parsed one by one."""

_DIGITS = np.full(256, 255, dtype=np.uint8)
_DIGITS[np.frombuffer(b"0123456789abcdef", dtype=np.uint8)] = np.arange(16)


def process_mappings(pid: int, *, of: str = "", last: Vmas | None = None) -> Vmas:
    """What a process has mapped now, in order of address.

    :param of: leave out, unread, whatever does not have this text in its line.
    :param last: what this said before: returned once more, the same object, if nothing has changed since. Reading is
        then all that it costs, a third.
    :raises OSError: it has ended (or is a kernel thread: then there is nothing), or we may not look. EFBIG: it has so
        many mappings with long names that looking at them would cost more than they are worth.
    """
    maps = _read_maps(pid)
    if of:
        maps = b"".join(line for line in re.findall(b".*\n", maps) if os.fsencode(of) in line)
    return last if last is not None and last.maps == maps else Vmas(maps)


def count_mappings(pid: int) -> int:
    """How many mappings a process has now; a third of the cost of looking at them.

    :raises OSError: it has ended, or we may not look.
    """
    return _read_maps(pid).count(b"\n")


_MOST_MAPS_BYTES = 16 << 20
_MOST_LINE_BYTES = 256


def _read_maps(pid: int) -> bytes:
    # A stranger chooses the names of what it maps, up to 4 KiB each, and the kernel needs long to write them. A guest
    # that shares has many lines, and short ones.
    chunks: list[bytes] = []
    length = lines = 0
    with Path(f"/proc/{pid}/maps").open("rb", buffering=0) as file:
        while chunk := file.read(1 << 16):
            chunks.append(chunk)
            length += len(chunk)
            lines += chunk.count(b"\n")
            if length > _MOST_MAPS_BYTES and length > lines * _MOST_LINE_BYTES:
                raise OSError(errno.EFBIG, "it has mapped very many files with very long names")
    return b"".join(chunks)


class ProcessMemory(Closing):
    """The memory of one process, for reading. A context manager.

    :raises ImageError: there is no process ``pid``, or it has no memory of its own.
    :raises PermissionDeniedError: this user may not read it.
    :raises UnsupportedError: this machine has no Linux /proc.
    """

    def __init__(self, pid: int) -> None:
        self.pid = pid
        with contextlib.ExitStack() as stack:
            try:
                self._directory = os.open(f"/proc/{pid}", os.O_RDONLY | os.O_DIRECTORY)
            except OSError as error:
                if not Path("/proc/self/mem").exists():
                    raise UnsupportedError("memory of processes can be read on Linux only, with /proc") from error
                if error.errno in {errno.ENOENT, errno.ESRCH, errno.ENOTDIR}:
                    raise ImageError(
                        "there is no such process", path=f"pid:{pid}", remedy="look for the number with ps or pgrep"
                    ) from error
                raise self._failed(error) from error
            stack.callback(os.close, self._directory)
            try:
                self._mem = self._open("mem")
                stack.callback(os.close, self._mem)
                # A kernel thread, or a process that has exited and waits to be reaped, has maps, but nothing in them.
                if not self._read("maps"):
                    raise self._gone()
            except OSError as error:
                if self._is_dead():  # then nobody but root is even told that there is no memory
                    raise self._gone() from error
                raise self._failed(error) from error
            try:
                self._pagemap: int | None = self._open("pagemap")
                stack.callback(os.close, self._pagemap)
            except OSError:
                self._pagemap = None
            self._files = stack.pop_all()

    def _is_dead(self) -> bool:
        # Exited and not yet reaped: state Z or X, after the name in parentheses (proc(5), /proc/pid/stat).
        try:
            return self._read("stat").rpartition(b")")[2].split()[0] in (b"Z", b"X")
        except OSError:
            return True

    def close(self) -> None:
        """Close what is open. Closing twice does nothing."""
        self._files.close()

    @property
    def has_pagemap(self) -> bool:
        """Whether it can be told which pages are there; if not, ``populated`` takes all of them to be."""
        return self._pagemap is not None

    def mappings(self) -> Vmas:
        """What the process has mapped at this moment, in order of address.

        :raises ImageError: the process is gone.
        """
        try:
            return Vmas(self._read("maps"))
        except OSError as error:
            raise self._failed(error) from error

    def populated(self, start: int, end: int) -> NDArray[np.int64]:
        """The parts of ``[start, end)`` that have a page, in memory or swapped out; costs 8 bytes read for each page.

        Anonymous memory that was never touched has none and reads as zeros; a mapped file has pages as far as the
        process has used them. Without a pagemap the answer is everything.

        :param start: address of a page; ``end`` likewise.
        :returns: shape ``(n, 2)``, each row start and end address; ascending, rows neither touch nor overlap.
        :raises ImageError: the process is gone.
        """
        if self._pagemap is None:
            return np.array([[start, end]], dtype=np.int64)
        runs = [np.empty((0, 2), dtype=np.int64)]
        entries = np.empty(min(_PAGEMAP_BATCH_PAGES, (end - start) >> PAGE_SHIFT), dtype=np.uint64)
        for first in range(start >> PAGE_SHIFT, end >> PAGE_SHIFT, _PAGEMAP_BATCH_PAGES):
            batch = entries[: min(_PAGEMAP_BATCH_PAGES, (end >> PAGE_SHIFT) - first)]
            got = 0
            while got < batch.nbytes:
                try:
                    count = os.preadv(self._pagemap, [batch.view(np.uint8).data[got:]], first * 8 + got)
                except OSError as error:
                    raise self._failed(error) from error
                if not count:
                    raise self._gone()
                got += count
            runs.append((true_runs((batch & _PRESENT_OR_SWAPPED) != 0) + first) << PAGE_SHIFT)
        found = np.concatenate(runs)
        goes_on = np.flatnonzero(found[1:, 0] == found[:-1, 1])  # from one batch into the next
        return np.stack([np.delete(found[:, 0], goes_on + 1), np.delete(found[:, 1], goes_on)], axis=1)

    def huge_and_zero(self, start: int, end: int) -> tuple[NDArray[np.int64], NDArray[np.int64]] | None:
        """The parts of ``[start, end)`` that are in huge pages, and those that are the kernel's own zero page.

        :returns: shape ``(n, 2)`` each, rows of start and end address, ascending; None if this kernel cannot tell
            (``PAGEMAP_SCAN`` is of Linux 6.7) or the pagemap cannot be read.
        :raises ImageError: the process is gone.
        """
        if self._pagemap is None:
            return None
        found = [np.empty(0, _SCANNED)]
        regions = np.empty(_SCAN_REGIONS, _SCANNED)
        wanted = _PAGE_IS_HUGE | _PAGE_IS_PFNZERO
        while start < end:
            argument = bytearray(
                _SCAN_ARGUMENT.pack(
                    _SCAN_ARGUMENT.size, 0, start, end, 0, regions.ctypes.data, len(regions), 0, 0, 0, wanted, wanted
                )
            )
            try:
                # SAFETY: the kernel writes at most vec_len regions to vec, which is ``regions`` and outlives the call;
                # flags are 0, so nothing is protected or changed.
                count = fcntl.ioctl(self._pagemap, _PAGEMAP_SCAN, argument)
            except OSError as error:
                if error.errno in {errno.ENOTTY, errno.EINVAL}:
                    return None
                raise self._failed(error) from error
            found.append(regions[:count].copy())
            start = _SCAN_ARGUMENT.unpack(argument)[4]
        every = np.concatenate(found)
        addresses = np.stack([every["start"], every["end"]], axis=1).astype(np.int64)
        huge, zero = (every["categories"] & np.uint64(which) != 0 for which in (_PAGE_IS_HUGE, _PAGE_IS_PFNZERO))
        return addresses[huge], addresses[zero]

    def read(self, address: int, out: PageBytes) -> NDArray[np.bool_]:
        """Read consecutive pages, one ``preadv`` for all of them unless some cannot be read.

        The process goes on meanwhile: each page may be torn. Reading a page that was never touched makes the kernel
        map its zero page there, which costs the process page tables but no memory.

        :param address: of the first page.
        :param out: shape ``(n, PAGE_SIZE)``, uint8, C-contiguous; gets the contents.
        :returns: shape ``(n,)``: which pages could be read; the rows of the others hold no particular bytes.
        :raises ImageError: the process has exited or runs another program by now.
        """
        readable = np.ones(len(out), dtype=np.bool_)
        page = 0
        while page < len(out):
            try:
                got = os.preadv(self._mem, [out[page:].data], address + page * PAGE_SIZE)
            except OSError as error:
                if error.errno not in {errno.EIO, errno.EFAULT}:
                    raise self._failed(error) from error
                got = -1
            if not got:
                raise self._gone()
            if got >= PAGE_SIZE:
                page += got // PAGE_SIZE
            else:
                readable[page] = False
                page += 1
        return readable

    def _open(self, name: str) -> int:
        return os.open(name, os.O_RDONLY, dir_fd=self._directory)

    def _read(self, name: str) -> bytes:
        with os.fdopen(self._open(name), "rb") as file:
            return file.read()

    def _gone(self) -> ImageError:
        return ImageError(
            "the process has no memory: it has exited, runs another program by now, or is a kernel thread",
            path=f"pid:{self.pid}",
            remedy="look for the number with ps or pgrep",
        )

    def _failed(self, error: OSError) -> MemshrError:
        if error.errno in {errno.ENOENT, errno.ESRCH}:
            return self._gone()
        if error.errno in {errno.EACCES, errno.EPERM}:
            return PermissionDeniedError(
                f"pid:{self.pid}: not permitted to read the memory of this process",
                remedy="run as root, or allow it with CAP_SYS_PTRACE; kernel.yama.ptrace_scope may forbid it even to "
                "the user whose process it is",
            )
        return BackendError(f"pid:{self.pid}: cannot be read: {os.strerror(error.errno or 0)}")
