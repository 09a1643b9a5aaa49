"""Firecracker snapshots: a memory file without a header, and a state file that says where its pages belong.

The memory file is the guest's regions of memory, one after the other. A guest of less than 3 GiB has one region, and
then its memory file is a raw image. A larger guest has two, because devices have the addresses below 4 GiB. Where the
first region ends depends on the release, and only the state file tells. The state file is a structure of the release's
own, and it cannot be read without knowing all of it. But the list of regions in it can be found: a count, and for each
region its address and its size. The first address is 0, and the sizes add up to the memory file's size exactly.

So this format needs a state file next to the memory file, and finds it by its magic number, whatever its name is. What
is not found that way is a raw image: the same pages, and only the gfns above the gap are wrong.

Layout: Firecracker, src/vmm/src/snapshot/mod.rs ``SNAPSHOT_MAGIC_ID``; ``GuestMemoryRegionState`` in
src/vmm/src/vstate/memory.rs, with the fields that releases up to 1.10, 1.11 to 1.13, and 1.14 have. All of them write
integers with their full width. A state file that packs them otherwise, as is planned after 1.15, is not found.
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Final

import numpy as np

from memshr import opened
from memshr.errors import ImageError
from memshr.images.file import RUN, ImageFile, Layout, checked_runs
from memshr.types import MAX_GFN_BITS, PAGE_SIZE

_MAGIC: Final = 0x0710_1984_8664_0000
"""Of x86-64; releases before 1.6 have a format version in the lowest 16 bits."""
_MAX_STATE_BYTES: Final = 10 << 20
"""What Firecracker itself reads of a state file at most (``DESERIALIZATION_BYTES_LIMIT``)."""
_MIN_STATE_BYTES: Final = 64
_MAX_NEIGHBOURS: Final = 64
"""Files in the folder that are looked at."""
_MAX_REGIONS: Final = 8
_MAX_PLACES: Final = 1 << 16
"""Places in a state file where a list of regions might be."""
_GAP_START: Final = 3 << 30
"""The lowest address at which any release has its first region end."""
_LAYOUTS: Final = (("<QQ", False), ("<QQQ", False), ("<QQIQ", True))
"""A region in the state file: address, size, and what releases add; True: a byte for each slot follows."""


class Firecracker:
    """Memory files of x86-64 guests, with their state file next to them."""

    name = "firecracker"

    def detect(self, file: ImageFile) -> bool:
        """Whether a state file in the same folder has a list of regions of this size."""
        return file.size % PAGE_SIZE == 0 and self._regions(file) is not None

    def beside(self, path: Path) -> Iterator[Path]:
        """What may be a state file."""
        return _neighbours(path)

    def layout(self, file: ImageFile) -> Layout:
        """The regions, as the state file next to it says. A guest below the gap needs none.

        :raises ImageError: there is no such state file, or there are two that contradict each other.
        """
        if file.size % PAGE_SIZE:
            raise file.error(
                f"no memory file: {file.size} bytes are not a multiple of {PAGE_SIZE}", remedy="copy it again"
            )
        regions = self._regions(file)
        if regions is None and file.size <= _GAP_START:
            regions = ((0, file.size),)
        if not regions:
            what = (
                "the state files next to it contradict each other"
                if regions is not None
                else ("no state file next to it says how its memory is split")
            )
            raise file.error(what, remedy="put its state file next to it, or say --format raw")
        runs, offset = np.empty(len(regions), RUN), 0
        for number, (address, size) in enumerate(regions):
            runs[number] = address // PAGE_SIZE, offset, size // PAGE_SIZE
            offset += size
        return Layout(checked_runs(file, runs, "region"), file)

    def _regions(self, file: ImageFile) -> tuple[tuple[int, int], ...] | None:
        """Address and size of each region. None: nobody says; empty: two state files contradict each other."""
        found = {regions for path in _neighbours(file.path) if (regions := _regions_in(path, file.size)) is not None}
        return (found.pop() if len(found) == 1 else ()) if found else None


def _neighbours(path: Path) -> Iterator[Path]:
    """Some files in the same folder that may be state files, judged by their kind and size."""
    known = opened.files_in(path.parent)
    if known is not None:
        yield from known
        return
    try:
        with os.scandir(path.parent) as entries:
            left = _MAX_NEIGHBOURS
            for entry in entries:
                if not left:
                    return
                if entry.is_file() and _MIN_STATE_BYTES <= entry.stat().st_size <= _MAX_STATE_BYTES:
                    left -= 1
                    yield Path(entry.path)
    except OSError:
        return


def _regions_in(path: Path, total_bytes: int) -> tuple[tuple[int, int], ...] | None:
    """The list of regions in a state file, whose sizes come to ``total_bytes``. None: this is none, or has no such."""
    try:
        state = ImageFile(path)
        try:
            head = int.from_bytes(state.bytes_at(0, 8, "the magic number"), "little")
            if head >> 16 != _MAGIC >> 16 or state.size > _MAX_STATE_BYTES:
                return None
            data = state.bytes_at(0, state.size, "the state file")
        finally:
            state.close()
    except ImageError:
        return None
    places = 0
    for count in range(1, _MAX_REGIONS + 1):
        # The count, and the first region's address, which is 0.
        place = data.find(needle := struct.pack("<QQ", count, 0))
        while place >= 0 and places < _MAX_PLACES:
            places += 1
            for layout, has_slots in _LAYOUTS:
                regions = _regions_at(data, place + 8, count, layout, has_slots)
                if _plausible(regions, total_bytes):
                    return regions
            place = data.find(needle, place + 1)
    return None


def _regions_at(data: bytes, place: int, count: int, layout: str, has_slots: bool) -> tuple[tuple[int, int], ...]:
    regions = []
    for _ in range(count):
        if place + struct.calcsize(layout) > len(data):
            return ()
        fields = struct.unpack_from(layout, data, place)
        place += struct.calcsize(layout) + (fields[-1] if has_slots else 0)
        regions.append((fields[0], fields[1]))
    return tuple(regions)


def _plausible(regions: tuple[tuple[int, int], ...], total_bytes: int) -> bool:
    end = 0
    for address, size in regions:
        if address < end or not size or address % PAGE_SIZE or size % PAGE_SIZE:
            return False
        end = address + size
    return end <= PAGE_SIZE << MAX_GFN_BITS and sum(size for _, size in regions) == total_bytes
