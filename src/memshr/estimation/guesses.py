"""Guesses what a page is: of a given file, a fill, text, machine code. Only a file is certain, since it is compared.

The rules, in this order; whatever none of them knows has no guess:

1. The page is a page of a file that was given: its name and the number of the page.
2. All zeros; or one byte, or one 2, 4 or 8-byte word again and again.
3. It begins with the magic of an ELF file (``e_ident`` of ``elf.h``).
4. At least 95% of its bytes are printable ASCII or white space, and no byte is zero: text.
5. It has at least 24 marks of x86-64 code, four kinds of which must occur: ``endbr64``, ``push rbp; mov rbp, rsp``,
   near calls with a small distance, ``ret`` before padding, 64-bit moves with a REX.W prefix, multi-byte ``nop``. This
   was chosen by looking at pages of kernels and libraries; other code may escape it, and data may look like it.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memshr import opened
from memshr.errors import ImageError
from memshr.types import PAGE_SIZE, PageBytes

ZERO_PAGE = "zero page"

_CHUNK_BYTES = 1 << 20
_TEXT_SHARE = 0.95
_TEXT_BYTES = frozenset(range(0x20, 0x7F)) | {0x09, 0x0A, 0x0D}
_CODE_MARKS = (
    b"\xf3\x0f\x1e\xfa",
    b"\x55\x48\x89\xe5",
    b"\xc3\xcc",
    b"\xc3\x66",
    b"\x48\x89",
    b"\x48\x8b",
    b"\x48\x8d",
)
_NOPS = (b"\x0f\x1f", b"\x66\x90")
_MIN_MARKS = 24
_MIN_KINDS = 4


def guess(page: bytes) -> str:
    """What a page may be, in words; empty if nothing suggests itself. A guess unless it says ``filled`` or ``zero``."""
    if not any(page):
        return ZERO_PAGE
    for width in (1, 2, 4, 8):
        if page == page[:width] * (PAGE_SIZE // width):
            word = f"{int.from_bytes(page[:width], 'little'):#0{2 + 2 * width}x}"
            return f"filled with {'the byte' if width == 1 else f'the {width}-byte word'} {word}"
    if page.startswith(b"\x7fELF"):
        return "start of an ELF file"
    if 0 not in page and sum(byte in _TEXT_BYTES for byte in page) >= _TEXT_SHARE * PAGE_SIZE:
        return "text (guess)"
    if _looks_like_code(page):
        return "x86-64 code (guess)"
    return ""


def _looks_like_code(page: bytes) -> bool:
    counts = [page.count(mark) for mark in _CODE_MARKS]
    counts.append(sum(page.count(nop) for nop in _NOPS))
    words = np.frombuffer(page, np.uint8)
    near = (words[:-4] == 0xE8) & ((words[4:] == 0) | (words[4:] == 0xFF))
    counts.append(int(np.count_nonzero(near)))
    return sum(counts) >= _MIN_MARKS and sum(count > 0 for count in counts) >= _MIN_KINDS


def keep_file_open(path: str | os.PathLike[str]) -> None:
    """Open a file that ``pages_of_files`` is to look into, for a process that is about to lose the right to.

    :raises ImageError: as ``pages_of_files``.
    """
    try:
        if not stat.S_ISREG(Path(path).stat().st_mode):
            raise _no_regular_file(Path(path))
        opened.keep(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}", path=path) from error


def _no_regular_file(path: Path) -> ImageError:
    return ImageError("this is no regular file", path=path, remedy="name a file to compare contents with")


def pages_of_files(pages: PageBytes, files: Sequence[str | os.PathLike[str]]) -> list[str]:
    """For each page, which page of which file it is: ``FILE at page N``; empty where it is none.

    Compared byte for byte. The rest of a file's last page counts as zeros, as in a page cache.

    :param pages: shape ``(n, PAGE_SIZE)``; few, since each is looked for in every file.
    :raises ImageError: a file is missing, no regular file, or cannot be read.

    Cost: reading the files once, 1 MiB at a time.
    """
    found = [""] * len(pages)
    words = np.ascontiguousarray(pages).view(np.uint64)
    for path in files:
        for first, there in _chunks(Path(path)):
            for i, page in enumerate(words):
                if not found[i]:
                    # The first word tells most pages apart, so that few are compared wholly.
                    (alike,) = np.nonzero(there[:, 0] == page[0])
                    equal = alike[(there[alike] == page).all(axis=1)]
                    if len(equal):
                        found[i] = f"{Path(path).name} at page {first + int(equal[0])}"
    return found


def _chunks(path: Path) -> Iterator[tuple[int, NDArray[np.uint64]]]:
    # The pages of a file, as words, with the number of the first of each part.
    try:
        if not opened.is_held(path) and not stat.S_ISREG(path.stat().st_mode):
            raise _no_regular_file(path)
        with os.fdopen(opened.open_file(path), "rb", buffering=0) as file:
            first = 0
            while chunk := file.read(_CHUNK_BYTES):
                chunk += bytes(-len(chunk) % PAGE_SIZE)
                yield first, np.frombuffer(chunk, np.uint64).reshape(-1, PAGE_SIZE // 8)
                first += len(chunk) // PAGE_SIZE
    except OSError as error:
        raise ImageError(f"cannot be read: {error.strerror}", path=path) from error
