"""kdump-compressed dumps of any shape, right or wrong, packed field by field: the tests' own word on the format.

Layout: makedumpfile's diskdump_mod.h and makedumpfile.h.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import cramjam
import lzallright

PAGE = 4096

PACKERS: dict[str, tuple[int, Callable[[bytes], bytes]]] = {
    "plain": (0, bytes),
    "zlib": (0x1, zlib.compress),
    "lzo": (0x2, lambda page: lzallright.LZOCompressor().compress(page)),
    "snappy": (0x4, lambda page: bytes(cramjam.snappy.compress_raw(page))),
    "zstd": (0x20, lambda page: bytes(cramjam.zstd.compress(page))),
}
"""name -> flag of a page descriptor, and what packs a page"""


@dataclass(frozen=True, slots=True)
class Packed:
    """A page descriptor and its bytes; what is None follows from ``data``."""

    data: bytes
    flags: int
    offset: int | None = None
    size: int | None = None


def packed(page: bytes, way: str) -> Packed:
    """A page as makedumpfile packs it: left as it is if packing makes it no smaller."""
    flags, pack = PACKERS[way]
    data = pack(page)
    return Packed(data, flags) if len(data) < PAGE else Packed(page, 0)


_PACKED_ZEROS = frozenset(packed(bytes(PAGE), way).data for way in PACKERS)


@dataclass(frozen=True, slots=True)
class KdumpHeader:
    """The fields of the headers that a test may want to be wrong. What is None follows from the pages."""

    signature: bytes = b"KDUMP   "
    version: int = 6
    status: int = 1
    block_size: int = PAGE
    sub_blocks: int = 1
    bitmap_blocks: int | None = None
    max_mapnr: int | None = None
    split: int = 0
    vmcoreinfo: bytes = b""


def kdump(
    pages: Mapping[int, Packed],
    header: KdumpHeader | None = None,
    *,
    left_out: Sequence[int] = (),
    order: Sequence[int] | None = None,
    equal_once: bool = False,
) -> bytes:
    """A dump with a page for each gfn; pages of zeros are there once, as makedumpfile and QEMU have them.

    :param left_out: gfns that the machine has and the dump has not.
    :param equal_once: any packed pages that are equal are there once, which no honest writer does.
    :param order: the gfns in the order in which their bytes come; default: ascending.
    """
    header = header or KdumpHeader()
    mapnr = max([*pages, *left_out], default=0) + 1 if header.max_mapnr is None else header.max_mapnr
    bitmap = -(-(max([*pages, *left_out], default=0) + 1) // (8 * PAGE)) * PAGE
    blocks = 2 * bitmap // PAGE if header.bitmap_blocks is None else header.bitmap_blocks
    machine = b"".join(word.ljust(65, b"\0") for word in (b"Linux", b"test", b"6.1.0", b"#1", b"x86_64", b""))
    first = struct.pack(
        "<8si390s6x16xIiiIIIIIIi",
        header.signature,
        header.version,
        machine,
        header.status,
        header.block_size,
        header.sub_blocks,
        blocks,
        mapnr & 0xFFFFFFFF,
        0,
        0,
        0,
        0,
        1,
    )
    note_place = PAGE + 104
    second = (
        struct.pack(
            "<QiiQQQQQQQQQQQ",
            0,
            0,
            header.split,
            0,
            0,
            note_place if header.vmcoreinfo else 0,
            len(header.vmcoreinfo),
            0,
            0,
            0,
            0,
            0,
            mapnr,
            mapnr,
        )
        + header.vmcoreinfo
    )
    bits = [bytearray(bitmap), bytearray(bitmap)]
    for gfn in pages:
        bits[1][gfn // 8] |= 1 << gfn % 8
    for gfn in (*pages, *left_out):
        bits[0][gfn // 8] |= 1 << gfn % 8
    start = PAGE * (1 + header.sub_blocks) + 2 * bitmap + 24 * len(pages)
    contents, where = bytearray(), dict[int, int]()
    once: dict[bytes, int] = {}
    for gfn in order or sorted(pages):
        data = pages[gfn].data
        place = once.get(data, start + len(contents))
        if place == start + len(contents):
            contents += data
        if equal_once or data in _PACKED_ZEROS:
            once[data] = place
        where[gfn] = place
    table = b"".join(
        struct.pack(
            "<qIIQ",
            where[gfn] if page.offset is None else page.offset,
            len(page.data) if page.size is None else page.size,
            page.flags,
            0,
        )
        for gfn, page in sorted(pages.items())
    )
    heads = first.ljust(PAGE, b"\0") + second.ljust(PAGE * header.sub_blocks, b"\0")
    return heads + bytes(bits[0]) + bytes(bits[1]) + table + bytes(contents)


END = struct.pack(">qq", -1, -1)


def flattened(pieces: Sequence[tuple[int, bytes]], end: bytes = END, *, kind: int = 1, version: int = 1) -> bytes:
    """The pieces of a dump, each with the offset that it should have."""
    head = struct.pack(">16sqq", b"makedumpfile", kind, version).ljust(PAGE, b"\0")
    return head + b"".join(struct.pack(">qq", offset, len(data)) + data for offset, data in pieces) + end


def in_pieces(contents: bytes, length: int) -> list[tuple[int, bytes]]:
    """A dump cut into pieces of ``length`` bytes."""
    return [(start, contents[start : start + length]) for start in range(0, len(contents), length)]


@dataclass(frozen=True, slots=True)
class Block:
    """A memory block of a mapped-ram file. What is None follows from ``pages``.

    :param pages: page number -> contents, of the pages whose bits are set.
    :param stale: page number -> what lies in the place of a page whose bit is not set.
    """

    name: str
    length_pages: int
    pages: Mapping[int, bytes]
    stale: Mapping[int, bytes] = field(default_factory=dict)
    used_bytes: int | None = None
    version: int = 1
    page_size: int = PAGE
    bitmap_offset: int | None = None
    pages_offset: int | None = None


CAPABILITIES = ("mapped-ram",)


def configuration(
    machine: str = "pc-i440fx-9.0", capabilities: Sequence[str] = CAPABILITIES, more: bytes = b""
) -> bytes:
    """The configuration section of a migration stream."""
    content = b"\x07" + struct.pack(">I", len(machine)) + machine.encode()
    if capabilities:
        content += subsection(
            "configuration/capabilities",
            struct.pack(">I", len(capabilities))
            + b"".join(bytes([len(name)]) + name.encode() for name in capabilities),
        )
    return content + more


def subsection(name: str, content: bytes) -> bytes:
    """A part of the configuration section."""
    return b"\x05" + bytes([len(name)]) + name.encode() + struct.pack(">I", 1) + content


def mapped_ram(
    blocks: Sequence[Block],
    before: bytes | None = None,
    *,
    start: bytes = b"QEVM\0\0\0\3",
    section: bytes = b"\1" + struct.pack(">I", 2) + b"\3ram" + struct.pack(">II", 0, 4),
    total_bytes: int | None = None,
    flags: int = 4,
) -> bytes:
    """A migration file with mapped-ram: QEMU's migration/ram.c, ``mapped_ram_setup_ramblock``.

    :param before: what comes before the section of the RAM; default: a configuration.
    """
    total = sum(block.length_pages * PAGE for block in blocks) if total_bytes is None else total_bytes
    out = bytearray(
        start + (configuration() if before is None else before) + section + struct.pack(">Q", total | flags)
    )
    for block in blocks:
        used = block.length_pages * PAGE
        name = block.name.encode()
        out += bytes([len(name)]) + name + struct.pack(">Q", used if block.used_bytes is None else block.used_bytes)
        bitmap_offset = len(out) + 28
        words = -(-block.length_pages // 64)
        pages_offset = -(-(bitmap_offset + 8 * words) // (1 << 20)) << 20
        out += struct.pack(
            ">IQQQ",
            block.version,
            block.page_size,
            bitmap_offset if block.bitmap_offset is None else block.bitmap_offset,
            pages_offset if block.pages_offset is None else block.pages_offset,
        )
        bitmap = bytearray(8 * words)
        for number in block.pages:
            bitmap[number // 8] |= 1 << number % 8
        out += bitmap
        out += bytes(pages_offset - len(out) + used)
        for number, page in (*block.pages.items(), *block.stale.items()):
            out[pages_offset + number * PAGE : pages_offset + (number + 1) * PAGE] = page
    return bytes(out) + struct.pack(">QBI", 0x10, 0x7E, 2)
