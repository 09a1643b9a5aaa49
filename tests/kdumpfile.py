"""Pages of a dump as libkdumpfile reads them: the library that drgn's wheel brings along, called by itself.

drgn opens dumps of Linux kernels that describe themselves (vmcoreinfo) and no others; the library opens any.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
from pathlib import Path
from types import TracebackType
from typing import Self

import drgn

PAGE = 4096
_MACHINE_ADDRESS = 1
"""ADDRXLAT_MACHPHYSADDR of libaddrxlat"""
_NO_DATA = 3
"""KDUMP_ERR_NODATA of libkdumpfile's kdumpfile.h"""


def find_library() -> Path | str | None:
    """The library; None if this machine has none."""
    beside_drgn = Path(drgn.__file__).parents[1] / "drgn.libs"
    found: list[Path] = sorted(beside_drgn.glob("libkdumpfile*"))
    return found[0] if found else ctypes.util.find_library("kdumpfile")


class KdumpFile:
    """A dump, open with libkdumpfile.

    :raises ValueError: the library refuses it; the text is the library's.
    """

    def __init__(self, path: Path) -> None:
        self._library = ctypes.CDLL(os.fspath(find_library() or "libkdumpfile.so"))
        self._library.kdump_new.restype = ctypes.c_void_p
        self._library.kdump_get_err.restype = ctypes.c_char_p
        self._context = ctypes.c_void_p(self._library.kdump_new())
        self._descriptor = os.open(path, os.O_RDONLY)
        if self._library.kdump_open_fdset(self._context, 1, ctypes.byref(ctypes.c_int(self._descriptor))):
            message = self._error()
            self.close()
            raise ValueError(message)

    def _error(self) -> str:
        text: bytes = self._library.kdump_get_err(self._context) or b""
        return text.decode()

    def page(self, gfn: int) -> bytes | None:
        """The page of a gfn; None: the dump does not have it.

        :raises ValueError: it cannot be read; the text is the library's.
        """
        buffer, length = ctypes.create_string_buffer(PAGE), ctypes.c_size_t(PAGE)
        status = self._library.kdump_read(
            self._context, _MACHINE_ADDRESS, ctypes.c_uint64(gfn * PAGE), buffer, ctypes.byref(length)
        )
        if status == _NO_DATA:
            return None
        if status or length.value != PAGE:
            raise ValueError(self._error())
        return buffer.raw

    def close(self) -> None:
        """Let go of the dump."""
        self._library.kdump_free(self._context)
        os.close(self._descriptor)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()
