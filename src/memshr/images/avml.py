"""AVML images: what Microsoft's Acquire Volatile Memory for Linux writes with ``--compress``.

The same ranges as in LiME images, with the same header, but each of them is compressed: a stream in Snappy's framing
format, and behind it the length of that stream in eight bytes. Where a range ends is only known when its stream has
been walked, so opening reads the whole file and unpacks it to a temporary one.

AVML leaves out every block, of up to 16 MiB, that is all zero (``copy_if_nonzero``). Nothing in the file tells such a
block from addresses at which no memory is, so its pages are missing here, and fewer zero pages are counted than the
machine had.

Nothing is unpacked that was not announced: a chunk says how much it holds, at most 64 KiB, before it is unpacked, and
all the chunks of a range must come to the size that its header says.

Layout: avml, src/image.rs; for the streams Google's snappy, framing_format.txt.
"""

from __future__ import annotations

from typing import Final

import cramjam
import numpy as np
from numpy.typing import NDArray

from memshr.images.file import ImageFile, Layout, Unpacked
from memshr.images.lime import HEADER, WRITE_AGAIN, no_pages, range_at
from memshr.types import PAGE_SIZE

_STREAM_HEADER: Final = b"\xff\x06\x00\x00sNaPpY"
_CHUNK_BYTES: Final = 1 << 16
"""What a chunk may hold, unpacked."""
_LONGEST_CHUNK_BYTES: Final = 4 + 32 + _CHUNK_BYTES + _CHUNK_BYTES // 6
"""What such a chunk may take in the file: a checksum, and the worst that snappy.h ``MaxCompressedLength`` allows."""
_BATCH_BYTES: Final = 4 << 20
"""What is unpacked at once."""

_COMPRESSED, _PLAIN, _FIRST_SKIPPABLE = 0x00, 0x01, 0x80


class Avml:
    """AVML images, version 2."""

    name = "avml"
    _MAGIC = b"AVML"

    def detect(self, file: ImageFile) -> bool:
        return file.starts_with(self._MAGIC)

    def layout(self, file: ImageFile) -> Layout:
        """Unpack the whole pages of each range: reads the file once and writes as much as it holds unpacked.

        :raises ImageError: a header or a stream is damaged or cut short, or ranges overlap.
        :raises BackendError: no room to unpack it.
        """
        unpacked = Unpacked(file)
        try:
            offset = number = 0
            while offset < file.size:
                start, size = range_at(file, offset, number, magic=self._MAGIC, version=2)
                offset = _unpack_range(file, offset + HEADER.itemsize, start, size, unpacked)
                number += 1
            if not unpacked.size:
                raise no_pages(file)
            return unpacked.layout()
        except BaseException:
            unpacked.close()
            raise


def _unpack_range(file: ImageFile, begin: int, start: int, size: int, unpacked: Unpacked) -> int:
    """Unpack the stream at ``begin``; returns where the next range's header is."""
    # Whole pages go out; the rest of a batch, less than a page, stays for the next one.
    buffer = np.empty(_BATCH_BYTES + _CHUNK_BYTES + PAGE_SIZE, np.uint8)
    address, held, left = start, 0, size
    offset = first = begin
    batch = 0
    if file.bytes_at(begin, len(_STREAM_HEADER), "a compressed range") != _STREAM_HEADER:
        raise file.error("damaged: no compressed range begins here", offset=begin, remedy=WRITE_AGAIN)
    while left:
        offset, holds = _chunk_at(file, offset, left)
        batch, left = batch + holds, left - holds
        if left and batch < _BATCH_BYTES and offset - first < 2 * _BATCH_BYTES:
            continue
        _unpack(file, first, offset - first, buffer[held : held + batch])
        held += batch
        skip = min(-address % PAGE_SIZE, held)
        pages = (held - skip) // PAGE_SIZE
        end = skip + pages * PAGE_SIZE
        if pages:
            gfns = (address + skip) // PAGE_SIZE + np.arange(pages, dtype=np.int64)
            unpacked.add(gfns, buffer[skip:end].reshape(pages, PAGE_SIZE))
        buffer[: held - end] = buffer[end:held].copy()
        address, held = address + end, held - end
        first, batch = offset, 0
    length = int.from_bytes(file.bytes_at(offset, 8, "the length of a compressed range"), "little")
    if length != offset - begin:
        raise file.error(
            f"damaged: a compressed range is {offset - begin} bytes long, {length} are said",
            offset=offset,
            remedy=WRITE_AGAIN,
        )
    return offset + 8


def _chunk_at(file: ImageFile, offset: int, limit: int) -> tuple[int, int]:
    """Where the chunk at ``offset`` ends, and how many bytes it holds: at most ``limit``."""
    head = file.bytes_at(offset, min(13, file.size - offset), "a compressed range")
    if len(head) < 4:
        raise file.error("truncated: the file ends in a compressed range", offset=offset, remedy=WRITE_AGAIN)
    kind, length = head[0], int.from_bytes(head[1:4], "little")
    end = offset + 4 + length
    if end > file.size:
        raise file.error(
            f"truncated: a piece of a compressed range should reach to {end:#x}, the file ends at {file.size:#x}",
            offset=offset,
            remedy=WRITE_AGAIN,
        )
    if kind >= _FIRST_SKIPPABLE:
        return end, 0
    holds = length - 4
    if kind == _COMPRESSED:
        holds = _varint(head[8:])
    elif kind != _PLAIN:
        raise file.error(f"damaged: an unknown kind of compressed data, {kind}", offset=offset, remedy=WRITE_AGAIN)
    if not 0 < holds <= min(limit, _CHUNK_BYTES) or not 4 < length <= _LONGEST_CHUNK_BYTES:
        raise file.error(
            "damaged: a piece of a compressed range holds more, or less, than it may", offset=offset, remedy=WRITE_AGAIN
        )
    return end, holds


def _varint(data: bytes) -> int:
    """The number of seven-bit digits, lowest first, at the start of ``data``; -1: none."""
    value = 0
    for place, byte in enumerate(data):
        value |= (byte & 0x7F) << 7 * place
        if byte < 0x80:
            return value
    return -1


def _unpack(file: ImageFile, offset: int, length: int, out: NDArray[np.uint8]) -> None:
    """Unpack chunks, which are known to hold as much as ``out`` takes if they are not damaged."""
    frames = _STREAM_HEADER + file.bytes_at(offset, length, "a compressed range")
    try:
        got = cramjam.snappy.decompress_into(frames, out.data)
    except cramjam.DecompressionError as error:
        raise file.error(f"damaged: {error}", offset=offset, remedy=WRITE_AGAIN) from error
    if got != len(out):
        raise file.error(
            f"damaged: {got} bytes where {len(out)} should be in a compressed range", offset=offset, remedy=WRITE_AGAIN
        )
