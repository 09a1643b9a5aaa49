"""kdump-compressed dumps, as makedumpfile and QEMU's ``dump-guest-memory`` write them, flattened or not.

Two bitmaps with a bit for each gfn come first: which pages the machine has, and which of them are in the file. A
descriptor for each of the latter says where its page is and how it is packed. Pages that were left out (makedumpfile's
dump level) are no pages of the image. The others are unpacked to a temporary file, where zero pages are holes.

What makes this hard: a descriptor has 24 bytes and may name any bytes of the file, so a small file could announce a
great many pages that all unpack from the same bytes. Both writers let descriptors have their bytes in common for pages
of zeros alone (makedumpfile's and QEMU's ``pd_zero``). So the others together must not name more bytes than the file
has: what is written to the temporary file is bounded by how well the file's own bytes are packed.

Layout: makedumpfile's diskdump_mod.h (``struct disk_dump_header``, ``struct kdump_sub_header``) and makedumpfile.h
(``struct page_desc``, ``DUMP_DH_COMPRESSED_*``); QEMU's include/sysemu/dump.h (``DiskDumpHeader64``,
``KdumpSubHeader64``, ``PageDescriptor``).
"""

from __future__ import annotations

import os
import zlib
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import pairwise
from typing import Any, Final

import cramjam
import lzallright
import numpy as np
from numpy.typing import NDArray

from memshr.images.file import ImageFile, Layout, Unpacked
from memshr.images.flattened import SIGNATURE as FLATTENED
from memshr.images.flattened import PiecedFile, in_order
from memshr.types import MAX_GFN_BITS, PAGE_SIZE, Gfns, PageBytes

_SIGNATURE: Final = b"KDUMP   "

_FIELDS = {
    "signature": ("S8", 0),
    "version": ("<i4", 8),
    "status": ("<u4", 424),
    "block_size": ("<i4", 428),
    "sub_header_blocks": ("<i4", 432),
    "bitmap_blocks": ("<u4", 436),
    "max_mapnr": ("<u4", 440),
}
_HEADER = np.dtype(
    {
        "names": list(_FIELDS),
        "formats": [kind for kind, _ in _FIELDS.values()],
        "offsets": [offset for _, offset in _FIELDS.values()],
        "itemsize": 464,
    }
)
_BLOCK_SIZE_OF_32_BITS = 416
_BLOCK_SIZE_OFFSET = 428

_SUB_HEADER = np.dtype(
    {
        "names": ["split", "max_mapnr_64"],
        "formats": ["<i4", "<u8"],
        "offsets": [12, 96],
        "itemsize": 104,
    }
)
_DESCRIPTOR = np.dtype([("offset", "<i8"), ("size", "<u4"), ("flags", "<u4"), ("page_flags", "<u8")])

_HIGHEST_VERSION = 6
_VERSION_WITH_SPLIT = 2
_VERSION_WITH_64_BITS = 6
_INCOMPLETE = 0x8
_PACKED = 0x1 | 0x2 | 0x4 | 0x20

_BATCH_PAGES = 1024
_MAX_THREADS = 8
"""What is unpacked and not yet written is at most 17 batches: 68 MiB."""
_BITMAP_BYTES = 1 << 18
"""How much of a bitmap is looked at in one go."""
_GAP_BYTES = 1 << 14
"""Pages that are further apart in the file than this are read one by one."""

_Pages = tuple[PageBytes, NDArray[np.intp], int]

_BITS = np.array([byte.bit_count() for byte in range(256)], np.uint8)
_WRITE_AGAIN = "write or copy the image again"


class Kdump:
    """64-bit little-endian kdump-compressed dumps with pages of 4 KiB."""

    name = "kdump"

    def detect(self, file: ImageFile) -> bool:
        return file.starts_with(_SIGNATURE) or file.starts_with(FLATTENED)

    def layout(self, file: ImageFile) -> Layout:
        """Every page that the dump holds, unpacked. Takes as much of TMPDIR as the pages that are not zero.

        :raises ImageError: the file is no such dump, is cut short or damaged, names more pages than its bytes can hold,
            or was left unfinished.
        :raises BackendError: no room to unpack it.
        """
        dump = in_order(file) if file.starts_with(FLATTENED) else PiecedFile.whole(file)
        bitmap_offset, bitmap_bytes, table_offset = _places(dump)
        count = _counted(dump, bitmap_offset, bitmap_bytes)
        if not count:
            raise file.error("the dump holds no memory: no bit of its bitmap is set", remedy=_WRITE_AGAIN)
        table_end = table_offset + count * _DESCRIPTOR.itemsize
        if table_end > dump.size:
            raise file.error(
                f"truncated: the descriptors of {count} pages should reach to {table_end:#x}, "
                f"the dump ends at {dump.size:#x}",
                offset=table_offset,
                remedy=_WRITE_AGAIN,
            )
        unpacked = Unpacked(file)
        try:
            most_bytes = _stored_bytes(file) - count * _DESCRIPTOR.itemsize
            _unpack_all(dump, _gfns(dump, bitmap_offset, bitmap_bytes), table_offset, most_bytes, unpacked)
            return unpacked.layout()
        except BaseException:
            unpacked.close()
            raise


def _unpack_all(
    dump: PiecedFile, batches: Iterator[Gfns], table_offset: int, most_bytes: int, unpacked: Unpacked
) -> None:
    """Unpack every page in threads, and store them in order, so that they make few runs.

    :param most_bytes: what the descriptors may name of pages that are not zero, all together.
    """
    waiting: deque[tuple[Gfns, Future[_Pages]]] = deque()
    left_bytes = most_bytes

    def store_first() -> None:
        nonlocal left_bytes
        gfns, future = waiting.popleft()
        pages, rows, named_bytes = future.result()
        left_bytes -= named_bytes
        if left_bytes < 0:
            raise dump.file.error(
                "damaged: several pages that are not zero are unpacked from the same bytes", remedy=_WRITE_AGAIN
            )
        unpacked.add(gfns, pages, rows)

    workers = min(os.cpu_count() or 1, _MAX_THREADS)
    with ThreadPoolExecutor(workers) as threads:
        try:
            place = table_offset
            for gfns in batches:
                waiting.append((gfns, threads.submit(_pages, dump, place, len(gfns))))
                place += len(gfns) * _DESCRIPTOR.itemsize
                if len(waiting) > 2 * workers:
                    store_first()
            while waiting:
                store_first()
        finally:
            threads.shutdown(cancel_futures=True)


def _stored_bytes(file: ImageFile) -> int:
    """The most bytes that pages which have something else than zeros in them can have in this file.

    Holes have none; but at each end of a hole there may be a page that is partly in it.
    """
    holes = file.holes()
    return file.size - int((holes[:, 1] - holes[:, 0]).sum()) + 2 * PAGE_SIZE * len(holes)


def _places(dump: PiecedFile) -> tuple[int, int, int]:
    """Offset and bytes of the bitmap of pages that are in the file, and the offset of their descriptors."""
    file = dump.file
    header = dump.records(_HEADER, 0, 1, "the header")[0]
    if header["signature"] != _SIGNATURE:
        raise file.error("no kdump-compressed dump: the signature is missing", offset=0, remedy="leave --format out")
    version = int(header["version"])
    if not 1 <= version <= _HIGHEST_VERSION:
        swapped = int.from_bytes(version.to_bytes(4, "little", signed=True), "big")
        problem = "the dump is big-endian" if 1 <= swapped <= _HIGHEST_VERSION else f"header version {version}"
        raise file.error(f"not supported: {problem}", offset=8, remedy="memshr reads dumps of 64-bit x86, version 1-6")
    block_size = int(header["block_size"])
    if block_size != PAGE_SIZE:
        place = _BLOCK_SIZE_OFFSET
        problem = f"blocks and pages of {block_size} bytes"
        if dump.records(np.dtype("<i4"), _BLOCK_SIZE_OF_32_BITS, 1, "the header")[0] == PAGE_SIZE:
            place, problem = _BLOCK_SIZE_OF_32_BITS, "the dump is of a 32-bit machine"
        raise file.error(
            f"not supported: {problem}",
            offset=place,
            remedy="memshr reads dumps of 64-bit x86 machines",
        )
    if int(header["status"]) & _INCOMPLETE:
        raise file.error(
            "the dump was left unfinished, as its status says: there was no room for all of it",
            offset=424,
            remedy="write it again where there is room",
        )
    sub_blocks, bitmap_blocks = int(header["sub_header_blocks"]), int(header["bitmap_blocks"])
    if sub_blocks < 1:
        raise file.error(f"damaged: a sub header of {sub_blocks} blocks", offset=432, remedy=_WRITE_AGAIN)
    sub_header = dump.records(_SUB_HEADER, PAGE_SIZE, 1, "the sub header")[0]
    if version >= _VERSION_WITH_SPLIT and sub_header["split"]:
        raise file.error(
            "not supported: one part of a dump that was split",
            offset=PAGE_SIZE + 12,
            remedy="join the parts with makedumpfile --reassemble",
        )
    gfns = int(sub_header["max_mapnr_64"] if version >= _VERSION_WITH_64_BITS else header["max_mapnr"])
    if not 0 < gfns <= 1 << MAX_GFN_BITS:
        raise file.error(
            f"damaged: {gfns} page frames; a guest has at most {1 << MAX_GFN_BITS}",
            offset=PAGE_SIZE + 96 if version >= _VERSION_WITH_64_BITS else 440,
            remedy=_WRITE_AGAIN,
        )
    bitmap_bytes = -(-gfns // 8)
    blocks = -(-bitmap_bytes // PAGE_SIZE)
    if bitmap_blocks < 2 * blocks:
        raise file.error(
            f"damaged: bitmaps of {bitmap_blocks} blocks for {gfns} page frames, which need {2 * blocks}",
            offset=436,
            remedy=_WRITE_AGAIN,
        )
    bitmap_offset = (1 + sub_blocks) * PAGE_SIZE
    return (
        bitmap_offset + bitmap_blocks // 2 * PAGE_SIZE,
        bitmap_bytes,
        bitmap_offset + bitmap_blocks * PAGE_SIZE,
    )


def _bitmap(dump: PiecedFile, offset: int, length: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """The parts of the bitmap that may have a bit set, and the gfn that each begins with."""
    for start in range(0, length, _BITMAP_BYTES):
        part = min(_BITMAP_BYTES, length - start)
        if not dump.in_hole(offset + start, part):
            yield start * 8, dump.records(np.dtype(np.uint8), offset + start, part, "the second bitmap")


def _counted(dump: PiecedFile, offset: int, length: int) -> int:
    """How many bits are set."""
    return sum(int(_BITS[part].sum(dtype=np.int64)) for _, part in _bitmap(dump, offset, length))


def _gfns(dump: PiecedFile, offset: int, length: int) -> Iterator[Gfns]:
    """The gfns whose bits are set, ascending, at most _BATCH_PAGES at a time."""
    for first, part in _bitmap(dump, offset, length):
        gfns = np.flatnonzero(np.unpackbits(part, bitorder="little")) + first
        for start in range(0, len(gfns), _BATCH_PAGES):
            yield gfns[start : start + _BATCH_PAGES]


def _pages(dump: PiecedFile, table_offset: int, count: int) -> _Pages:
    """The distinct pages of ``count`` descriptors, unpacked, and which of them each descriptor names.

    The third value is how many bytes the descriptors name of pages that are not zero.
    """
    table = dump.records(_DESCRIPTOR, table_offset, count, "a page descriptor")

    def refuse(bad: NDArray[np.bool_], problem: str) -> None:
        if bad.any():
            number = int(np.argmax(bad))
            raise dump.file.error(
                f"damaged page descriptor: {problem}: {table['size'][number]} bytes at {table['offset'][number]:#x}, "
                f"flags {table['flags'][number]:#x}",
                offset=table_offset + number * _DESCRIPTOR.itemsize,
                remedy=_WRITE_AGAIN,
            )

    refuse((table["size"] == 0) | (table["size"] > PAGE_SIZE), "no size of a packed page")
    refuse(table["offset"] < 0, "a negative offset")
    refuse(table["offset"] > dump.size - table["size"].astype(np.int64), "beyond the end of the dump")
    packing = table["flags"] & np.uint32(_PACKED)
    refuse((packing & (packing - np.uint32(1)) != 0), "packed in several ways")
    refuse((packing == 0) & (table["size"] != PAGE_SIZE), "not packed, and no whole page")
    _, first, inverse = np.unique(table["offset"], return_index=True, return_inverse=True)
    distinct = table[first]
    same = (table["size"] == distinct["size"][inverse]) & (table["flags"] == distinct["flags"][inverse])
    refuse(~same, "another one names the same bytes in another way")
    pages = np.empty((len(distinct), PAGE_SIZE), np.uint8)
    for row, (packed, way, number) in enumerate(
        zip(_packed(dump, distinct), (distinct["flags"] & _PACKED).tolist(), first.tolist(), strict=True)
    ):
        if not _unpack(way, packed, pages[row]):
            raise dump.file.error(
                f"damaged: a page does not unpack to {PAGE_SIZE} bytes of {_WAYS[way][0]} data",
                offset=table_offset + number * _DESCRIPTOR.itemsize,
                remedy=_WRITE_AGAIN,
            )
    not_zero = np.asarray(pages.view(np.uint64).any(axis=1))[inverse]
    return pages, inverse, int(table["size"][not_zero].sum(dtype=np.int64))


def _packed(dump: PiecedFile, table: NDArray[Any]) -> Iterator[memoryview]:
    """The packed bytes of each descriptor, which are in order of offset."""
    sizes = table["size"].astype(np.int64)
    places = dump.places(table["offset"], sizes)
    ends = places + sizes
    apart = np.ones(len(table) + 1, np.bool_)
    apart[1:-1] = (places[1:] < places[:-1]) | (places[:-1] < 0) | (places[1:] - ends[:-1] > _GAP_BYTES)
    bounds = np.flatnonzero(apart).tolist()
    for first, end in pairwise(bounds):
        if places[first] < 0:  # in several pieces of a flattened file
            bytes_ = np.dtype(np.uint8)
            yield dump.records(bytes_, int(table["offset"][first]), int(sizes[first]), "a page").data
            continue
        base = int(places[first])
        group = dump.file.records(np.dtype(np.uint8), base, int(ends[first:end].max()) - base, "a page").data
        for start, stop in zip((places[first:end] - base).tolist(), (ends[first:end] - base).tolist(), strict=True):
            yield group[start:stop]


def _zlib(packed: memoryview, out: NDArray[np.uint8]) -> int:
    # At most 4 KiB of zlib data make 4 MiB.
    page = zlib.decompress(packed, bufsize=PAGE_SIZE)
    if len(page) == PAGE_SIZE:
        out[:] = np.frombuffer(page, np.uint8)
    return len(page)


def _lzo(packed: memoryview, out: NDArray[np.uint8]) -> int:
    # At most 4 KiB of LZO data make 1 MiB.
    page = lzallright.LZOCompressor.decompress(packed, PAGE_SIZE)
    if len(page) == PAGE_SIZE:
        out[:] = np.frombuffer(page, np.uint8)
    return len(page)


def _snappy(packed: memoryview, out: NDArray[np.uint8]) -> int:
    return int(cramjam.snappy.decompress_raw_into(packed, out.data))


def _zstd(packed: memoryview, out: NDArray[np.uint8]) -> int:
    return int(cramjam.zstd.decompress_into(packed, out.data))


def _stored(packed: memoryview, out: NDArray[np.uint8]) -> int:
    out[:] = np.frombuffer(packed, np.uint8)
    return len(packed)


_WAYS: dict[int, tuple[str, Callable[[memoryview, NDArray[np.uint8]], int]]] = {
    0: ("plain", _stored),
    0x1: ("zlib", _zlib),
    0x2: ("LZO", _lzo),
    0x4: ("snappy", _snappy),
    0x20: ("zstd", _zstd),
}
"""Flags of a descriptor -> what the page is packed with, and what unpacks it and returns how many bytes it had."""


def _unpack(way: int, packed: memoryview, out: NDArray[np.uint8]) -> bool:
    """Whether the page unpacks to exactly one page, which is in ``out`` then."""
    try:
        return _WAYS[way][1](packed, out) == PAGE_SIZE
    except (zlib.error, lzallright.LZOError, cramjam.DecompressionError):
        return False
