"""What every image format is made of: a regular file that is read safely, and runs that say where its pages lie.

Three things make this harder than ``open`` and ``read``. A path can be anything: opening a fifo would wait for a writer
without end, and opening a device may do something. An image is often far larger than the memory of the machine that
looks at it, and any number in it may be a lie. And a file can be cut short while it is read: the operating system kills
a process that touches a mapped page which its file has no more, so headers and pages are read by calls that return an
error instead.
"""

from __future__ import annotations

import array
import errno
import os
import pwd
import stat
import tempfile
import threading
import weakref
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from memshr import opened
from memshr.errors import BackendError, ImageError
from memshr.runs import consecutive, edges_at
from memshr.types import MAX_GFN_BITS, PAGE_SIZE, Gfns, PageBytes

RUN = np.dtype([("gfn", np.int64), ("offset", np.int64), ("pages", np.int64)])
"""Pages in a row: the first one's gfn, where they begin in the contents (bytes), and how many they are."""

ZEROS = -1
"""The ``offset`` of a run whose pages are all zero and stored nowhere."""

_WRITE_AGAIN = "write or copy the image again"
_HEAD_BYTES = 64

_SPARED_PART = 20
_SPARED_BYTES = 256 << 20
"""Unpacked pages leave one twentieth of a file system free, or 256 MiB if that is less."""


class Contents:
    """An open file in which the pages of an image lie: what a run's offset counts in."""

    def __init__(self, descriptor: int, size: int) -> None:
        self._close = weakref.finalize(self, os.close, descriptor)
        self._descriptor = descriptor
        self.size = size
        """Bytes."""
        self._holes: NDArray[np.int64] | None = None
        self._lock = threading.Lock()

    @property
    def closed(self) -> bool:
        """Whether ``close`` was called."""
        return not self._close.alive

    def fileno(self) -> int:
        """The descriptor, for reading only.

        :raises ValueError: the file is closed.
        """
        if self.closed:
            raise ValueError("the image is closed")
        return self._descriptor

    def close(self) -> None:
        """Close the file; mappings of it stay. Closing twice does nothing."""
        self._close()

    def check_unchanged(self) -> None:
        """Make sure that the file is still what was opened; costs one ``fstat``.

        :raises ImageError: its size or its time of last modification has changed since it was opened.
        :raises ValueError: the file is closed.
        """
        self.fileno()

    def failed(self, what: str, error: OSError | ValueError | OverflowError, *, remedy: str = "") -> ImageError:
        """An ImageError that the operating system is the cause of, to be raised by the caller."""
        return self.error(f"{what}: {_reason(error)}", remedy=remedy)

    def error(self, message: str, *, offset: int | None = None, remedy: str = "") -> ImageError:
        """An ImageError about this file, to be raised by the caller."""
        return ImageError(message, offset=offset, remedy=remedy)

    def read_into(self, offset: int, out: PageBytes) -> None:
        """Fill ``out`` (C-contiguous) with the bytes from ``offset`` on.

        :raises ImageError: the file has no such bytes any more, or they cannot be read.
        """
        view, got = out.data.cast("B"), 0
        while got < len(view):
            try:
                count = os.preadv(self.fileno(), [view[got:]], offset + got)
            except OSError as error:
                raise self.failed("cannot be read", error, remedy="look for errors of the disk") from error
            if not count:
                self.check_unchanged()
                raise self.error("the file ends here although it is larger", offset=offset + got, remedy=_WRITE_AGAIN)
            got += count

    def holes(self) -> NDArray[np.int64]:
        """The holes of the file: nothing is stored there, and it reads as zeros.

        Found by SEEK_DATA and SEEK_HOLE (lseek(2)), once: two calls for each hole, 16 bytes. A file system that cannot
        tell has none.

        :returns: shape ``(n, 2)``: start and end in bytes; ascending. Those shorter than a page are left out.
        """
        with self._lock:
            if self._holes is None:
                self._holes = self._found_holes()
            return self._holes

    def in_hole(self, offset: int, length: int) -> bool:
        """Whether all of these bytes lie in one hole, so that they need not be read to be known for zeros."""
        holes = self.holes()
        hole = int(np.searchsorted(holes[:, 0], offset, side="right")) - 1
        return hole >= 0 and offset + length <= int(holes[hole, 1])

    def _found_holes(self) -> NDArray[np.int64]:
        found = array.array("q")
        descriptor, place = self.fileno(), 0
        try:
            while place < self.size:
                hole = os.lseek(descriptor, place, os.SEEK_HOLE)
                if hole >= self.size:
                    break
                try:
                    place = os.lseek(descriptor, hole, os.SEEK_DATA)
                except OSError as error:
                    if error.errno != errno.ENXIO:  # no data from here to the end
                        raise
                    place = self.size
                if place - hole >= PAGE_SIZE:
                    found.extend((hole, place))
                elif place <= hole:  # somebody writes to it
                    break
        except (OSError, AttributeError):  # the file system, or this operating system, cannot tell
            found = array.array("q")
        return np.array(found, dtype=np.int64).reshape(-1, 2)


def _reason(error: Exception) -> str:
    return error.strerror if isinstance(error, OSError) and error.strerror else str(error)


class ImageFile(Contents):
    """A regular file, open for reading.

    :raises ImageError: the path is missing, empty, not a regular file, or cannot be opened or read.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._beside: list[ImageFile] = []
        descriptor = self._open_regular()
        self._opened = os.fstat(descriptor)
        super().__init__(descriptor, self._opened.st_size)
        try:
            if not self.size:
                raise self.error("the file is empty", remedy="an image holds at least one page of 4096 bytes")
            try:
                self._head = os.pread(descriptor, _HEAD_BYTES, 0)
            except OSError as error:
                raise self.failed("cannot be read", error, remedy="copy it to a local disk first") from error
        except BaseException:
            self.close()
            raise

    def _open_regular(self) -> int:
        try:
            if opened.is_held(self.path):  # it was asked then
                return opened.open_file(self.path)
            # Asked before opening, because opening a device can act on it, and again by the descriptor, because the
            # path may name something else by then; O_NONBLOCK lets even that open of a fifo return.
            self._require_regular(self.path.stat().st_mode)
            flags = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
            descriptor = os.open(self.path, flags)
        except (OSError, ValueError) as error:
            remedy = "run as a user who may read it" if isinstance(error, PermissionError) else ""
            raise self.failed("cannot be opened", error, remedy=remedy) from error
        try:
            self._require_regular(os.fstat(descriptor).st_mode)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _require_regular(self, mode: int) -> None:
        kinds = {
            stat.S_IFDIR: "a directory",
            stat.S_IFIFO: "a fifo",
            stat.S_IFSOCK: "a socket",
            stat.S_IFCHR: "a character device",
            stat.S_IFBLK: "a block device",
        }
        if not stat.S_ISREG(mode):
            what = kinds.get(stat.S_IFMT(mode), "no regular file")
            raise self.error(f"this is {what}", remedy="name a regular file that holds a memory image")

    def error(self, message: str, *, offset: int | None = None, remedy: str = "") -> ImageError:
        return ImageError(message, path=self.path, offset=offset, remedy=remedy)

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode."""
        return self._opened.st_dev, self._opened.st_ino

    def starts_with(self, magic: bytes) -> bool:
        """Whether the file's first bytes are ``magic``, which has at most 64."""
        return self._head.startswith(magic)

    def bytes_at(self, offset: int, length: int, what: str) -> bytes:
        """``length`` bytes from byte ``offset`` on.

        :param what: names them in the error.
        :raises ImageError: the file ends before they do, or they cannot be read.
        """
        return self.records(np.dtype(np.uint8), offset, length, what).tobytes()

    def records(self, dtype: np.dtype[Any], offset: int, count: int, what: str) -> NDArray[Any]:
        """``count`` records from byte ``offset`` on, as a copy: the file can change, what was checked cannot.

        Costs the memory that they take, so the caller bounds ``count`` where a sparse file could make it absurd.

        :param what: names the records in the error.
        :raises ImageError: the file ends before they do, or they cannot be read.
        """
        end = offset + count * dtype.itemsize
        if offset < 0 or count < 0 or end > self.size:
            raise self.error(
                f"truncated: {what} should reach to {end:#x}, the file ends at {self.size:#x}",
                offset=max(offset, 0),
                remedy=_WRITE_AGAIN,
            )
        found = np.empty(count, dtype=dtype)
        if count:
            self.read_into(offset, found.view(np.uint8))
        return found

    def beside(self, path: str | os.PathLike[str]) -> ImageFile:
        """Another file that belongs to the image; it is closed, and watched for changes, with this one.

        :raises ImageError: as when an ImageFile is made.
        """
        other = ImageFile(path)
        self._beside.append(other)
        return other

    def check_unchanged(self) -> None:
        now = os.fstat(self.fileno())
        if now.st_size != self.size:
            message = f"the file changed from {self.size} to {now.st_size} bytes while it was read"
        elif now.st_mtime_ns != self._opened.st_mtime_ns:
            message = "the file was written while it was read"
        else:
            for other in self._beside:
                other.check_unchanged()
            return
        raise self.error(message, remedy="work on a copy of it, or when nobody writes to it")

    def close(self) -> None:
        for other in self._beside:
            other.close()
        super().close()


class Unpacked(Contents):
    """A temporary file without a name, into which a format writes pages that it has unpacked.

    Zero pages become holes of it. Pages may be added in any order, by several threads. It lies in TMPDIR and is gone
    when the image is closed, or with the process. It does not fill TMPDIR to the brim: others need room there, too.

    :param source: the image; errors name it.
    :raises BackendError: no temporary file can be made.
    """

    def __init__(self, source: ImageFile) -> None:
        self._source = source
        self._add_lock = threading.Lock()
        self._runs: list[NDArray[np.void]] = []
        try:
            with tempfile.TemporaryFile(prefix="memshr-image-") as file:
                descriptor = os.dup(file.fileno())
        except OSError as error:
            raise self._no_room(error) from error
        super().__init__(descriptor, 0)

    def add(self, gfns: Gfns, pages: PageBytes, rows: NDArray[np.intp] | None = None) -> None:
        """Store a page for each gfn.

        :param gfns: shape ``(n,)``. :param pages: shape ``(m, PAGE_SIZE)``, C-contiguous.
        :param rows: shape ``(n,)``: gfn i gets the page ``rows[i]``; None: it gets page i.
        :raises BackendError: no room for them.
        """
        if rows is None:
            rows = np.arange(len(gfns))
        with self._add_lock:
            start, self.size = self.size, self.size + len(gfns) * PAGE_SIZE
            self._runs.append(runs_of(gfns, start + PAGE_SIZE * np.arange(len(gfns), dtype=np.int64)))
        place = np.flatnonzero(np.asarray(pages.view(np.uint64).any(axis=1))[rows])
        if not len(place):
            return
        self._require_room(len(place) * PAGE_SIZE)
        row = rows[place]
        try:
            for begin, end in pairwise(consecutive(place, row).tolist()):
                self._write(pages[row[begin] : row[begin] + end - begin], start + int(place[begin]) * PAGE_SIZE)
        except OSError as error:
            raise self._no_room(error) from error

    def _require_room(self, wanted_bytes: int) -> None:
        try:
            system = os.fstatvfs(self.fileno())
        except OSError:  # it cannot tell; then writing does
            return
        if not system.f_blocks:  # without a limit: tmpfs(5), size=0
            return
        free_bytes, all_bytes = system.f_bavail * system.f_frsize, system.f_blocks * system.f_frsize
        if free_bytes - wanted_bytes < min(all_bytes // _SPARED_PART, _SPARED_BYTES):
            raise self._no_room(OSError(errno.ENOSPC, f"{free_bytes >> 20:,} MiB are left"))

    def _write(self, pages: PageBytes, offset: int) -> None:
        view = pages.data.cast("B")
        done = 0
        while done < len(view):
            done += os.pwrite(self.fileno(), view[done:], offset + done)

    def layout(self) -> Layout:
        """What was added, as a layout. Call it when all is: it makes the file as long as its last page needs.

        :raises ImageError: a gfn was added twice, or is beyond what a guest can have.
        :raises BackendError: no room.
        """
        try:
            os.ftruncate(self.fileno(), self.size)
        except OSError as error:
            raise self._no_room(error) from error
        runs = np.concatenate([np.empty(0, RUN), *self._runs])
        return Layout(checked_runs(self._source, runs, "run of pages", contents=self), self)

    def error(self, message: str, *, offset: int | None = None, remedy: str = "") -> ImageError:
        return self._source.error(f"unpacked: {message}", offset=offset, remedy=remedy)

    def _no_room(self, error: OSError) -> BackendError:
        remedy = f"make room in {tempfile.gettempdir()}, or set TMPDIR"
        if isinstance(error, PermissionError):
            remedy = f"set TMPDIR to a folder in which {_user()} may write, as everybody may in /tmp"
        return BackendError(f"{self._source.path}: no room to unpack it: {_reason(error)}", remedy=remedy)


def _user() -> str:
    # Whoever we are by now: a process that was root has given that up (memshr.privilege).
    try:
        return pwd.getpwuid(os.geteuid()).pw_name
    except KeyError:
        return f"user {os.geteuid()}"


@dataclass(frozen=True, slots=True)
class Layout:
    """Where the pages of an image are: what a format finds out.

    :param runs: shape ``(n,)``, dtype RUN; as ``checked_runs`` returns them.
    :param contents: the file that the runs' offsets count in: the image, one beside it, or what it was unpacked to.
    """

    runs: NDArray[Any]
    contents: Contents


class ImageFormat(Protocol):
    """What a format has to offer to be a row of ``memshr.images.FORMATS``."""

    @property
    def name(self) -> str:
        """The format's name, as users write it."""

    def detect(self, file: ImageFile) -> bool:
        """Whether the file is of this format. Cheap: looks at magic numbers only.

        A format that claims a file owns it: what is wrong with it from here on is an error, and nobody else is asked.

        :raises ImageError: the file is plainly something that no format reads.
        """

    def layout(self, file: ImageFile) -> Layout:
        """Where the pages are.

        :raises ImageError: the file is not, or not entirely, what the format says.
        :raises BackendError: no room to unpack it.
        """


@runtime_checkable
class CompanyFormat(ImageFormat, Protocol):
    """A format whose images need other files, which lie next to them."""

    def beside(self, path: Path) -> Iterable[Path]:
        """Where such files of the image at ``path`` would be, judged by names; none of them need be there."""


@runtime_checkable
class FolderFormat(ImageFormat, Protocol):
    """A format whose images are folders."""

    def folder_file(self, path: Path) -> Path | None:
        """The file in the folder that holds the pages, which is opened in its place; None: no folder of this kind."""


def runs_of(gfns: Gfns, offsets: NDArray[np.int64]) -> NDArray[Any]:
    """The runs that single pages make: joined where gfn and offset both go on, or where both are zeros.

    :param gfns: shape ``(n,)``, in any order. :param offsets: shape ``(n,)``: bytes, or ZEROS.
    :returns: dtype RUN, ascending in gfn. A gfn that is there twice is in two runs.
    """
    if (gfns[1:] < gfns[:-1]).any():
        order = np.argsort(gfns, kind="stable")
        gfns, offsets = gfns[order], offsets[order]
    runs = np.empty(len(gfns), RUN)
    runs["gfn"], runs["offset"], runs["pages"] = gfns, offsets, 1
    return _joined(runs)


def _joined(runs: NDArray[Any]) -> NDArray[Any]:
    """Runs in order of gfn, those that go on where the one before ends joined to it."""
    if not len(runs):
        return runs
    goes_on = (runs["gfn"][1:] == (runs["gfn"] + runs["pages"])[:-1]) & offset_goes_on(runs)
    first = edges_at(~goes_on, len(runs))[:-1]
    joined = runs[first]
    joined["pages"] = np.add.reduceat(runs["pages"], first)
    return joined


def offset_goes_on(runs: NDArray[Any]) -> NDArray[np.bool_]:
    """Whether each run but the first goes on in the contents where the one before it ends, or both are zeros."""
    zeros = runs["offset"] == ZEROS
    next_offset = runs["offset"] + runs["pages"] * PAGE_SIZE
    goes_on: NDArray[np.bool_] = np.where(zeros[:-1], zeros[1:], runs["offset"][1:] == next_offset[:-1])
    return goes_on


def checked_runs(
    file: ImageFile,
    runs: NDArray[Any],
    what: str,
    *,
    contents: Contents | None = None,
    places: NDArray[np.integer[Any]] | None = None,
    if_overlapping: str = _WRITE_AGAIN,
) -> NDArray[Any]:
    """Runs as a Layout has them: in order of gfn, joined, none empty, no page twice, all of them in the contents.

    Numbers may be anything that fits into an int64: nothing overflows here.

    :param runs: shape ``(n,)``, dtype RUN, in any order; those of no pages are left out.
    :param what: what one of them is in the file, for errors, which add its number.
    :param contents: what their offsets count in; default: ``file``.
    :param places: shape ``(n,)``: where in the file each was described, for errors.
    :param if_overlapping: the remedy if two of them have a gfn in common.
    :raises ImageError: a run has a negative number in it, ends beyond the contents or beyond MAX_GFN_BITS, or two of
        them have a gfn or bytes of the contents in common.
    """
    size = (contents or file).size
    index = np.arange(len(runs))

    def refuse(bad: NDArray[np.bool_], problem: str, remedy: str = _WRITE_AGAIN) -> None:
        if bad.any():
            number = int(index[np.argmax(bad)])
            place = None if places is None else int(places[number])
            raise file.error(f"{what} {number}: {problem}", offset=place, remedy=remedy)

    refuse((runs["pages"] < 0) | (runs["gfn"] < 0) | (runs["offset"] < ZEROS), "damaged: a negative number")
    index = np.flatnonzero(runs["pages"])
    runs = runs[index]
    limit = 1 << MAX_GFN_BITS
    refuse(
        (runs["gfn"] >= limit) | (runs["pages"] > limit - np.minimum(runs["gfn"], limit)),
        f"damaged: it ends beyond the highest guest physical address ({limit * PAGE_SIZE:#x})",
    )
    room = (size - np.minimum(runs["offset"], size)) // PAGE_SIZE
    refuse(
        (runs["offset"] != ZEROS) & (runs["pages"] > room),
        f"truncated: it ends beyond the end of the file ({size:#x})",
    )
    stored = np.flatnonzero(runs["offset"] != ZEROS)
    order = stored[np.argsort(runs["offset"][stored], kind="stable")]
    start, end = runs["offset"][order], (runs["offset"] + runs["pages"] * PAGE_SIZE)[order]
    twice = np.zeros(len(runs), np.bool_)
    twice[order[1:]] = start[1:] < end[:-1]
    refuse(twice, "damaged: it has bytes of the file in common with another one")
    order = np.argsort(runs["gfn"], kind="stable")
    index, runs = index[order], runs[order]
    refuse(
        np.append(False, runs["gfn"][1:] < (runs["gfn"] + runs["pages"])[:-1]),
        "it overlaps another one: a page would be there twice",
        if_overlapping,
    )
    return _joined(runs)
