"""kdump-compressed dumps of any shape, right or wrong, packed field by field: the tests' own word on the format.

Layout: makedumpfile's diskdump_mod.h and makedumpfile.h.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

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
) -> bytes:
    """A dump with a page for each gfn; equal bytes are there once.

    :param left_out: gfns that the machine has and the dump has not.
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
    contents, where = bytearray(), dict[bytes, int]()
    for gfn in order or sorted(pages):
        if pages[gfn].data not in where:
            where[pages[gfn].data] = start + len(contents)
            contents += pages[gfn].data
    table = b"".join(
        struct.pack(
            "<qIIQ",
            where[page.data] if page.offset is None else page.offset,
            len(page.data) if page.size is None else page.size,
            page.flags,
            0,
        )
        for _, page in sorted(pages.items())
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
