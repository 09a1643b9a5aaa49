"""QEMU's migration files with the ``mapped-ram`` capability (QEMU 9.0 and newer): each page has its fixed place.

``migrate file:PATH`` with that capability writes the usual stream, but in its list of memory blocks each block has a
header that says where in the file its pages are, and where a bitmap of those that were written. A page whose bit is not
set is zero, whatever the file holds there.

Memory of devices (video memory, ROMs, flash) is in blocks of its own, which are left out: memshr shares RAM of guests
and nothing else. RAM begins at gfn 0, and what a machine has beyond the hole for devices below 4 GiB begins at 4 GiB.
The stream does not say where that hole begins, only the type of the machine, so it is taken to be where that type has
it by default. Estimates do not depend on gfns.

Layout: QEMU's migration/savevm.c (``qemu_savevm_state_header``, ``vmstate_configuration``, ``save_section_header``),
migration/ram.c (``ram_save_setup``, ``struct MappedRamHeader``), docs/devel/migration/mapped-ram.rst; the hole:
hw/i386/pc_piix.c and pc_q35.c. The stream is big-endian; the bitmap is made of the host's words, so on x86 the lowest
bit of its first byte is page 0.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import ImageError
from memshr.images.file import RUN, ZEROS, ImageFile, Layout, checked_runs
from memshr.runs import alike
from memshr.types import MAX_GFN_BITS, PAGE_SHIFT, PAGE_SIZE

_MAGIC: Final = b"QEVM"
_VERSION: Final = 3
_SECTION_START = 1
_SUBSECTION = 5
_CONFIGURATION = 7
_COMMAND = 8
_FLAG_MEM_SIZE = 4
_FLAGS = PAGE_SIZE - 1
_HEADER_VERSION = 1

_GIB = 1 << 30
_HOLES = (
    ("pc-q35", 0xB000_0000, 0x8000_0000),
    ("pc-i440fx", 0xE000_0000, 0xC000_0000),
)
"""Start of a machine type's name; with so much RAM it has some above 4 GiB; then this much of it is below."""

_DEVICE_NAMES = ("pc.bios", "pc.rom")
_DEVICE_ENDINGS = (".rom", ".vram", ".bios", ".flash0", ".flash1")

_MAX_BLOCKS = 4096
_BITMAP_BYTES = 1 << 16
_DUMP = "dump the guest instead: dump-guest-memory, or migrate with mapped-ram (QEMU 9.0 and newer)"
_WRITE_AGAIN = "write or copy the image again"


@dataclass(frozen=True, slots=True)
class _Block:
    name: str
    used_bytes: int
    bitmap_offset: int
    pages_offset: int


class MappedRam:
    """Migration files of 64-bit x86 guests, with mapped-ram."""

    name = "mapped-ram"

    def detect(self, file: ImageFile) -> bool:
        return file.starts_with(_MAGIC)

    def layout(self, file: ImageFile) -> Layout:
        """The guest's RAM: pages in the file where it has them, zeros that are stored nowhere for the rest.

        :raises ImageError: the file is a migration stream of another kind, cut short or damaged.
        """
        stream = _Stream(file)
        machine = _read_configuration(stream)
        blocks = [block for block in _read_blocks(stream) if not _is_device(block.name)]
        blocks.sort(key=lambda block: block.name != "pc.ram")
        if not blocks:
            raise file.error("the file holds no RAM: only memory of devices", remedy=_DUMP)
        parts, gfn = [], 0
        for block in blocks:
            below = _pages_below_hole(machine, block.used_bytes) if not gfn else block.used_bytes >> PAGE_SHIFT
            parts.append(_runs(file, block, gfn, below))
            gfn = int(parts[-1]["gfn"][-1] + parts[-1]["pages"][-1])
        return Layout(checked_runs(file, np.concatenate(parts), "run of pages"), file)


class _Stream:
    """The stream, read from its beginning on; big-endian."""

    def __init__(self, file: ImageFile) -> None:
        self.file = file
        self.place = 0

    def take(self, length: int, what: str) -> bytes:
        found = self.file.bytes_at(self.place, length, what)
        self.place += length
        return found

    def number(self, length: int, what: str) -> int:
        return int.from_bytes(self.take(length, what), "big")

    def name(self, what: str) -> str:
        """A name with one byte for its length before it."""
        return self.take(self.number(1, what), what).decode(errors="backslashreplace")

    def damaged(self, problem: str, place: int) -> ImageError:
        return self.file.error(f"damaged: {problem}", offset=place, remedy=_WRITE_AGAIN)


def _read_configuration(stream: _Stream) -> str:
    """Read up to the list of memory blocks.

    :returns: the machine's type.
    """
    file = stream.file
    if stream.take(4, "the magic number") != _MAGIC:
        raise file.error("no migration file: the magic number is missing", offset=0, remedy="leave --format out")
    version = stream.number(4, "the version")
    if version != _VERSION:
        raise file.error(f"not supported: a migration stream of version {version}", offset=4, remedy=_DUMP)
    machine, capabilities = "", set[str]()
    kind = stream.number(1, "a section")
    if kind == _CONFIGURATION:
        length = stream.number(4, "the machine's type")
        if length > 255:
            raise stream.damaged(f"a machine type of {length} bytes", stream.place - 4)
        machine = stream.take(length, "the machine's type").decode(errors="backslashreplace")
        while (kind := stream.number(1, "a section")) == _SUBSECTION:
            capabilities |= _read_subsection(stream)
    if "mapped-ram" not in capabilities:
        raise file.error("this is a QEMU migration stream without mapped-ram: its pages have no places", remedy=_DUMP)
    if "x-ignore-shared" in capabilities:
        raise file.error("not supported: shared memory was left out of it (x-ignore-shared)", remedy=_DUMP)
    while kind == _COMMAND:
        stream.take(2, "a command")
        stream.take(stream.number(2, "a command"), "a command")
        kind = stream.number(1, "a section")
    place = stream.place - 1
    section = ""
    if kind == _SECTION_START:
        stream.take(4, "a section")
        section = stream.name("a section's name")
        stream.take(8, "a section")
    if section != "ram":
        what = f"a section named {section!r}" if section else f"something of type {kind}"
        raise file.error(f"not supported: {what} comes before the RAM", offset=place, remedy=_DUMP)
    return machine


def _read_subsection(stream: _Stream) -> set[str]:
    """One subsection of the configuration; the capabilities that it names."""
    place = stream.place
    name = stream.name("a part of the configuration")
    stream.take(4, "a part of the configuration")
    match name:
        case "configuration/target-page-bits":
            bits = stream.number(4, "the page size")
            if bits != PAGE_SHIFT:
                raise stream.file.error(f"not supported: pages of 2**{bits} bytes", offset=place, remedy=_DUMP)
        case "configuration/uuid":
            stream.take(16, "the UUID")
        case "configuration/capabilities":
            count = stream.number(4, "the capabilities")
            if count > 255:
                raise stream.damaged(f"{count} capabilities", place)
            return {stream.name("a capability") for _ in range(count)}
        case _:
            raise stream.file.error(f"not supported: {name!r} in the configuration", offset=place, remedy=_DUMP)
    return set()


def _read_blocks(stream: _Stream) -> list[_Block]:
    """The list of memory blocks, every one."""
    place = stream.place
    total = stream.number(8, "the size of all memory")
    if total & _FLAGS != _FLAG_MEM_SIZE:
        raise stream.damaged("the list of memory blocks is missing", place)
    left = total & ~_FLAGS
    if left > PAGE_SIZE << MAX_GFN_BITS:
        raise stream.damaged(f"{left} bytes of memory", place)
    blocks: list[_Block] = []
    while left > 0:
        place = stream.place
        name = stream.name("the name of a memory block")
        used_bytes = stream.number(8, "the size of a memory block")
        version, page_size = stream.number(4, "a mapped-ram header"), stream.number(8, "a mapped-ram header")
        bitmap_offset, pages_offset = (stream.number(8, "a mapped-ram header") for _ in range(2))
        if version != _HEADER_VERSION:
            raise stream.file.error(f"not supported: mapped-ram of version {version}", offset=place, remedy=_DUMP)
        if page_size != PAGE_SIZE:
            raise stream.file.error(f"not supported: pages of {page_size} bytes", offset=place, remedy=_DUMP)
        if not 0 < used_bytes <= left or used_bytes % PAGE_SIZE:
            raise stream.damaged(f"memory block {name!r} of {used_bytes} bytes", place)
        if pages_offset < stream.place:
            raise stream.damaged(f"memory block {name!r} lies at {pages_offset:#x}, before its header", place)
        if pages_offset + used_bytes > stream.file.size:
            end = pages_offset + used_bytes
            raise stream.file.error(
                f"truncated: memory block {name!r} should reach to {end:#x}, the file ends at {stream.file.size:#x}",
                offset=place,
                remedy=_WRITE_AGAIN,
            )
        if len(blocks) == _MAX_BLOCKS:
            raise stream.damaged(f"more than {_MAX_BLOCKS} memory blocks", place)
        blocks.append(_Block(name, used_bytes, bitmap_offset, pages_offset))
        left -= used_bytes
        stream.place = pages_offset + used_bytes
    return blocks


def _is_device(name: str) -> bool:
    # Blocks of devices have the device's path before their name (qemu_ram_set_idstr), ROMs begin with /rom@.
    return "/" in name or name in _DEVICE_NAMES or name.endswith(_DEVICE_ENDINGS)


def _pages_below_hole(machine: str, ram_bytes: int) -> int:
    for start, least, below in _HOLES:
        if machine.startswith(start) and ram_bytes >= least:
            return below >> PAGE_SHIFT
    return ram_bytes >> PAGE_SHIFT


def _runs(file: ImageFile, block: _Block, first_gfn: int, below: int) -> NDArray[Any]:
    """The runs of one block.

    :param below: how many of its pages lie from ``first_gfn`` on; the others lie from 4 GiB on.
    """
    pages = block.used_bytes >> PAGE_SHIFT
    shift = (4 * _GIB >> PAGE_SHIFT) - below if below < pages else 0
    parts = []
    length = -(-pages // 8)
    for start in range(0, length, _BITMAP_BYTES):
        page, here = start * 8, min(_BITMAP_BYTES, length - start)
        count = min(here * 8, pages - page)
        if file.in_hole(block.bitmap_offset + start, here):
            edges, stored = np.zeros(1, np.int64), np.zeros(1, np.uint8)
        else:
            what = f"the bitmap of memory block {block.name!r}"
            bitmap = file.records(np.dtype(np.uint8), block.bitmap_offset + start, here, what)
            bits = np.unpackbits(bitmap, count=count, bitorder="little")
            edges = alike(bits)[:-1]
            stored = bits[edges]
        if 0 < below - page < count and below - page not in edges:
            cut = int(np.searchsorted(edges, below - page))
            edges, stored = np.insert(edges, cut, below - page), np.insert(stored, cut, stored[cut - 1])
        runs = np.empty(len(edges), RUN)
        runs["gfn"] = edges + page + first_gfn + np.where(edges + page >= below, shift, 0)
        runs["pages"] = np.diff(edges, append=count)
        runs["offset"] = np.where(stored, block.pages_offset + (edges + page) * PAGE_SIZE, ZEROS)
        parts.append(runs)
    return np.concatenate(parts)
