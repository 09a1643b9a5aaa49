"""Reading pages that lie anywhere in a file, a thousand with one call, and never by touching a mapping ourselves.

Equal pages are found all over an image, so comparing them is random access. One ``pread`` for each costs more than the
copying does; a mapping is fast, but whoever touches a page of it that the file has lost meanwhile is killed (SIGBUS).
So the kernel copies out of our own mapping for us: process_vm_readv(2) on our own process takes 1024 pieces a call and
answers EFAULT where a page is gone. Then, and where such calls are forbidden, each page is read by itself, which says
what is wrong.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memshr.images.file import Contents
from memshr.types import PAGE_SIZE, PageBytes

PIECES_OF_A_CALL: Final = 1024
"""UIO_MAXIOV (linux/uio.h): how many pieces process_vm_readv takes."""

_IOVEC = np.dtype([("base", np.uint64), ("length", np.uint64)])
"""struct iovec (bits/types/struct_iovec.h) where pointers have 64 bits."""

_DENSE = 4
"""A batch is read ahead if it needs at least one in this many of the pages between its first and its last."""


def _process_vm_readv() -> Any:
    """The function of the C library; None if it has none."""
    call = getattr(ctypes.CDLL(None, use_errno=True), "process_vm_readv", None)
    if call is not None:
        call.restype = ctypes.c_ssize_t
        pieces = (ctypes.c_void_p, ctypes.c_ulong)
        call.argtypes = [ctypes.c_int, *pieces, *pieces, ctypes.c_ulong]
    return call


class PageReader:
    """Reads pages of a file by their offsets. May be used by several threads at once.

    Holds a mapping of the file, whose pages it lets go after each batch: however much is read, they do not count as
    memory of this process for longer.

    :raises ImageError: the file cannot be mapped.
    """

    def __init__(self, contents: Contents) -> None:
        self._contents = contents
        self._mapping = mapped(contents, private=False)
        # Batches are from all over the file. What lies between is not wanted: a sample would read everything.
        self._mapping.madvise(mmap.MADV_RANDOM)
        self._address = int(np.frombuffer(self._mapping, np.uint8).ctypes.data)
        self._call = _process_vm_readv()

    def read(self, offsets: NDArray[np.int64], out: PageBytes, rows: NDArray[np.int64] | None = None) -> None:
        """Read the page at each of these offsets.

        :param offsets: shape ``(n,)``, bytes; each at most the file's size less PAGE_SIZE.
        :param out: shape ``(m, PAGE_SIZE)``, C-contiguous: row ``rows[i]`` gets the page at ``offsets[i]``.
        :param rows: shape ``(n,)``; None: row i gets the page at ``offsets[i]``.
        :raises ImageError: the file has lost a page, or it cannot be read.
        """
        if rows is None:
            rows = np.arange(len(offsets))
        for start in range(0, len(offsets), PIECES_OF_A_CALL):
            batch = slice(start, start + PIECES_OF_A_CALL)
            if self._call is None or not self._copied(offsets[batch], out, rows[batch]):
                for row, offset in zip(rows[batch].tolist(), offsets[batch].tolist(), strict=True):
                    self._contents.read_into(offset, out[row])

    def _copied(self, offsets: NDArray[np.int64], out: PageBytes, rows: NDArray[np.int64]) -> bool:
        """Have the kernel copy the pages. False: it does not, so each has to be read."""
        low, high = int(offsets.min()), int(offsets.max()) + PAGE_SIZE
        if high - low <= _DENSE * len(offsets) * PAGE_SIZE:
            os.posix_fadvise(self._contents.fileno(), low, high - low, os.POSIX_FADV_WILLNEED)
        pieces = np.empty((2, len(offsets)), _IOVEC)
        pieces["base"][0], pieces["base"][1] = out.ctypes.data + rows * PAGE_SIZE, self._address + offsets
        pieces["length"] = PAGE_SIZE
        # SAFETY: the kernel writes into rows of ``out`` alone, which the caller keeps alive; a remote address that has
        # no page any more is an error of the call and no fault of ours.
        got = self._call(os.getpid(), pieces[0].ctypes.data, len(offsets), pieces[1].ctypes.data, len(offsets), 0)
        refused = got < 0 and ctypes.get_errno() in {errno.EPERM, errno.ENOSYS}
        start = low - low % mmap.PAGESIZE
        self._mapping.madvise(mmap.MADV_DONTNEED, start, high - start)
        if refused:  # a container's seccomp rules
            self._call = None
        return bool(got == len(offsets) * PAGE_SIZE)


def mapped(contents: Contents, *, private: bool) -> mmap.mmap:
    """The whole file as a mapping.

    :param private: writable, and what is written stays in this process; else read-only. Nothing is reserved for it.
    :raises ImageError: it cannot be mapped.
    """
    try:
        if private:
            # Without MAP_NORESERVE the kernel refuses a private writable mapping larger than memory and swap.
            flags, access = mmap.MAP_PRIVATE | MAP_NORESERVE, mmap.PROT_READ | mmap.PROT_WRITE
        else:
            flags, access = mmap.MAP_SHARED, mmap.PROT_READ
        return mmap.mmap(contents.fileno(), contents.size, flags=flags, prot=access)
    except (OSError, ValueError, OverflowError) as error:
        short = isinstance(error, OSError) and error.errno == errno.ENOMEM
        remedy = "raise ulimit -v, set vm.overcommit_memory to 0" if short else "copy it to a local disk first"
        raise contents.failed("cannot be mapped", error, remedy=remedy) from error


MAP_NORESERVE: Final[int] = getattr(mmap, "MAP_NORESERVE", 0x4000)
"""Python names it from 3.13 on; the number is Linux's for x86-64 and arm64 (``asm-generic/mman.h``)."""
