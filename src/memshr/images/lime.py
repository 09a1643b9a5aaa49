"""LiME images: what the Linux Memory Extractor writes with ``format=lime``, and AVML without ``--compress``.

Ranges of physical memory follow each other, each behind a header of 32 bytes that says its first and its last byte.
There is no table of them: where one ends, the next header begins. Ranges are those that Linux calls "System RAM", which
need not begin or end with a page. Pages that are only partly in a range are left out: the rest of them belongs to the
firmware, and LiME itself writes zeros for such a piece (``write_range`` in its main.c).

Layout: LiME, doc/README.md, ``lime_mem_range_header``.
"""

from __future__ import annotations

from typing import Final

import numpy as np

from memshr.errors import ImageError
from memshr.images.file import RUN, ImageFile, Layout, checked_runs
from memshr.types import MAX_GFN_BITS, PAGE_SIZE

MAX_RANGES: Final = 1 << 18
"""More ranges than that are not read: a machine has some dozens of them, AVML makes one of every 16 MiB."""

HEADER: Final = np.dtype([("magic", "<u4"), ("version", "<u4"), ("start", "<u8"), ("last", "<u8"), ("reserved", "<u8")])
"""``lime_mem_range_header``, which AVML has taken over."""

WRITE_AGAIN: Final = "write or copy the image again"


class Lime:
    """LiME images, version 1."""

    name = "lime"
    _MAGIC = b"EMiL"

    def detect(self, file: ImageFile) -> bool:
        return file.starts_with(self._MAGIC)

    def layout(self, file: ImageFile) -> Layout:
        """The whole pages of each range. Reads a header for each of them.

        :raises ImageError: a header is damaged or missing, a range ends beyond the file, or ranges overlap.
        """
        runs: list[tuple[int, int, int]] = []
        places: list[int] = []
        offset = 0
        while offset < file.size:
            start, size = range_at(file, offset, len(runs), magic=self._MAGIC, version=1)
            contents = offset + HEADER.itemsize
            if size > file.size - contents:
                raise file.error(
                    f"truncated: range {len(runs)} should reach to {contents + size:#x}, "
                    f"the file ends at {file.size:#x}",
                    offset=offset,
                    remedy=WRITE_AGAIN,
                )
            first_gfn, skip, pages = whole_pages(start, size)
            runs.append((first_gfn, contents + skip, pages))
            places.append(offset)
            offset = contents + size
        checked = checked_runs(file, np.array(runs, RUN), "range", places=np.array(places))
        if not len(checked):
            raise no_pages(file)
        return Layout(checked, file)


def range_at(file: ImageFile, offset: int, number: int, *, magic: bytes, version: int) -> tuple[int, int]:
    """The range whose header is at ``offset``: its address and its size in bytes, which is not 0.

    :param number: counts the ranges from 0, for errors.
    :raises ImageError: there is no such header, it contradicts itself, or this is one range too many.
    """
    if number >= MAX_RANGES:
        raise file.error(f"damaged: more than {MAX_RANGES} ranges", offset=offset, remedy=WRITE_AGAIN)
    header = file.records(HEADER, offset, 1, f"the header of range {number}")
    found, found_version, start, last, reserved = header[0].tolist()
    if found != int.from_bytes(magic, "little"):
        what = "no image of this format" if not offset else f"damaged: range {number} has no header"
        raise file.error(
            f"{what}: {magic.decode()!r} is missing",
            offset=offset,
            remedy=WRITE_AGAIN if offset else "leave --format out",
        )
    if found_version != version:
        raise file.error(
            f"not supported: version {found_version} of the format, memshr reads {version}",
            offset=offset + 4,
            remedy="write the image with another release of the tool",
        )
    if last < start or reserved:
        raise file.error(f"damaged: the header of range {number}", offset=offset, remedy=WRITE_AGAIN)
    if last >= PAGE_SIZE << MAX_GFN_BITS:
        raise file.error(
            f"damaged: range {number} ends beyond the highest guest physical address ({PAGE_SIZE << MAX_GFN_BITS:#x})",
            offset=offset,
            remedy=WRITE_AGAIN,
        )
    return start, last + 1 - start


def whole_pages(start: int, size: int) -> tuple[int, int, int]:
    """The pages that lie entirely in a range: the first one's gfn, the bytes before it, and how many they are."""
    first_gfn = -(-start // PAGE_SIZE)
    pages = max(0, (start + size) // PAGE_SIZE - first_gfn)
    return first_gfn, (first_gfn * PAGE_SIZE - start if pages else 0), pages


def no_pages(file: ImageFile) -> ImageError:
    """The error for an image in which no whole page is."""
    return file.error("it holds no memory: no range has a whole page in it", remedy=WRITE_AGAIN)
