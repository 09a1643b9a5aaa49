"""A regular file, mapped copy-on-write: what every image format is read from.

Three things make this harder than ``open`` and ``read``. A path can be anything: opening a fifo would wait for a writer
for ever, opening a device may do something. An image is often far larger than the memory of the machine that looks at
it, so nothing may be reserved for it. And domains that are made of an image write to their pages, which must never
reach the file.
"""

from __future__ import annotations

import errno
import mmap
import os
import stat
import sys
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from memshr.errors import ImageError
from memshr.types import PAGE_SIZE, Extent, PageBytes

_MAP_NORESERVE: int = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Python names it from 3.13 on; the number is Linux's for x86-64 and arm64 (``asm-generic/mman.h``)."""


class ImageFormat(Protocol):
    """What a format has to offer to be a row of ``memshr.images.FORMATS``."""

    @property
    def name(self) -> str:
        """The format's name, as users write it."""

    def detect(self, file: MappedFile) -> bool:
        """Whether the file is of this format. Cheap: looks at magic numbers only.

        A format that claims a file owns it: what is wrong with it from here on is an error, and nobody else is asked.

        :raises ImageError: the file is plainly something that no format reads.
        """

    def extents(self, file: MappedFile) -> Sequence[Extent]:
        """The pages of the image: ascending in gfn, not overlapping, none empty; views of the file where possible.

        :raises ImageError: the file is not, or not entirely, what the format says.
        """


class MappedFile:
    """A regular file that is mapped privately, readable and writable, without reserving memory for it.

    :raises ImageError: the path is missing, empty, not a regular file, or cannot be opened or mapped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        descriptor = self._open_regular()
        self._close = weakref.finalize(self, os.close, descriptor)
        try:
            self._descriptor = descriptor
            self._opened = os.fstat(descriptor)
            self.size: int = self._opened.st_size
            """Bytes, when it was opened."""
            if not self.size:
                raise self.error("the file is empty", remedy="an image holds at least one page of 4096 bytes")
            # Every other array is made of this one, which keeps the mapping open: an array made of the mapping itself
            # takes three objects where this takes one, and a core may have a million segments.
            self._bytes: NDArray[np.uint8] | None = np.frombuffer(self._map(), dtype=np.uint8)
        except BaseException:
            self._close()
            raise

    def _open_regular(self) -> int:
        try:
            # Asked before opening, because opening a device can act on it, and again by the descriptor, because the
            # path may name something else by then; O_NONBLOCK lets even that open of a fifo return.
            self._require_regular(self.path.stat().st_mode)
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
            descriptor = os.open(self.path, flags)
        except (OSError, ValueError) as error:
            remedy = "run as a user who may read it" if isinstance(error, PermissionError) else ""
            raise self._failed("cannot be opened", error, remedy=remedy) from error
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

    def _map(self) -> mmap.mmap:
        try:
            if sys.platform == "linux":
                # Without MAP_NORESERVE the kernel refuses a private writable mapping larger than memory and swap.
                return mmap.mmap(
                    self._descriptor,
                    self.size,
                    flags=mmap.MAP_PRIVATE | _MAP_NORESERVE,
                    prot=mmap.PROT_READ | mmap.PROT_WRITE,
                )
            return mmap.mmap(self._descriptor, self.size, access=mmap.ACCESS_COPY)
        except (OSError, ValueError, OverflowError) as error:
            short = isinstance(error, OSError) and error.errno == errno.ENOMEM
            remedy = "raise ulimit -v, set vm.overcommit_memory to 0" if short else "copy it to a local disk first"
            raise self._failed("cannot be mapped", error, remedy=remedy) from error

    def _failed(self, what: str, error: Exception, *, remedy: str) -> ImageError:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else str(error)
        return self.error(f"{what}: {reason}", remedy=remedy)

    def error(self, message: str, *, offset: int | None = None, remedy: str = "") -> ImageError:
        """An ImageError about this file, to be raised by the caller."""
        return ImageError(message, path=self.path, offset=offset, remedy=remedy)

    def records(self, dtype: np.dtype[Any], offset: int, count: int, what: str) -> NDArray[Any]:
        """``count`` records from byte ``offset`` on, as a view of the file. Any offset will do, aligned or not.

        :param what: names the records in the error.
        :raises ImageError: the file ends before they do.
        """
        end = offset + count * dtype.itemsize
        if end > self.size:
            raise self.error(
                f"truncated: {what} should reach to {end:#x}, the file ends at {self.size:#x}",
                offset=offset,
                remedy="write or copy the image again",
            )
        return self._array(dtype, offset, (count,))

    def pages(self, offset: int, count: int) -> PageBytes:
        """``count`` pages from byte ``offset`` on, shape ``(count, PAGE_SIZE)``: a writable view that is not read yet.

        The caller has made sure that they are in the file.
        """
        return self._array(np.dtype(np.uint8), offset, (count, PAGE_SIZE))

    def starts_with(self, magic: bytes) -> bool:
        """Whether the file's first bytes are ``magic``."""
        return self._everything()[: len(magic)].tobytes() == magic

    def _array(self, dtype: np.dtype[Any], offset: int, shape: tuple[int, ...]) -> NDArray[Any]:
        return np.ndarray(shape, dtype=dtype, buffer=self._everything(), offset=offset if shape[0] else 0)

    def _everything(self) -> NDArray[np.uint8]:
        if self._bytes is None:
            raise ValueError(f"{self.path} is closed")
        return self._bytes

    def check_unchanged(self) -> None:
        """See ``MemoryImage.check_unchanged``."""
        self._everything()
        now = os.fstat(self._descriptor)
        if now.st_size != self.size:
            message = f"the file changed from {self.size} to {now.st_size} bytes while it was read"
        elif now.st_mtime_ns != self._opened.st_mtime_ns:
            message = "the file was written while it was read"
        else:
            return
        raise self.error(message, remedy="work on a copy of it, or when nobody writes to it")

    def close(self) -> None:
        """Close the file. The mapping stays for as long as there are views of it."""
        self._bytes = None
        self._close()
