"""Files that were written in pieces to where nobody can seek: makedumpfile's flattened form, put in order again.

``makedumpfile -F`` and QEMU's ``dump-guest-memory`` write a dump into a pipe as pieces, each with the offset that it
should have. Nothing is copied here: a ``PiecedFile`` knows where each byte of the dump is in the file.

Layout: makedumpfile.h, ``struct makedumpfile_header`` and ``struct makedumpfile_data_header`` (QEMU has the same in
include/sysemu/dump.h). All numbers are big-endian.
"""

from __future__ import annotations

import array
import struct
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memshr.images.file import ImageFile

SIGNATURE: Final = b"makedumpfile\0"

_HEADER = np.dtype([("signature", "S16"), ("type", ">i8"), ("version", ">i8")])
_HEADER_BYTES = 4096  # MAX_SIZE_MDF_HEADER
_PIECE = struct.Struct(">qq")
_END = -1
_TYPE_FLAT = 1
_VERSION_FLAT = 1

_WINDOW_BYTES = 1 << 20
_MAX_PIECES = 1 << 24
_MAX_REWRITTEN = 4096
_HIGHEST = 1 << 56
_WRITE_AGAIN = "write or copy the image again"


class PiecedFile:
    """What a file holds, put in order. Bytes that no piece has are zeros, as makedumpfile -R leaves them.

    :param starts: shape ``(n,)``: where each piece belongs; ascending, the pieces do not overlap.
    :param lengths: shape ``(n,)``: bytes. :param places: shape ``(n,)``: where each lies in the file.
    """

    def __init__(
        self, file: ImageFile, starts: NDArray[np.int64], lengths: NDArray[np.int64], places: NDArray[np.int64]
    ) -> None:
        self.file = file
        self._starts, self._ends, self._places = starts, starts + lengths, places
        self.size = int(self._ends[-1])
        """Bytes, when put in order."""

    @classmethod
    def whole(cls, file: ImageFile) -> PiecedFile:
        """A file that is in order already: one piece."""
        zero = np.zeros(1, np.int64)
        return cls(file, zero, np.array([file.size]), zero)

    def records(self, dtype: np.dtype[Any], offset: int, count: int, what: str) -> NDArray[Any]:
        """As ``ImageFile.records``; the offset counts in what is put in order.

        :raises ImageError: it ends before the records do, or they cannot be read.
        """
        end = offset + count * dtype.itemsize
        if end > self.size:
            raise self.file.error(
                f"truncated: {what} should reach to {end:#x}, the dump ends at {self.size:#x}",
                offset=offset,
                remedy=_WRITE_AGAIN,
            )
        found = np.zeros(count, dtype=dtype)
        view = found.view(np.uint8)
        first = int(np.searchsorted(self._ends, offset, side="right"))
        last = int(np.searchsorted(self._starts, end, side="left"))
        for start, stop, place in zip(
            self._starts[first:last].tolist(),
            self._ends[first:last].tolist(),
            self._places[first:last].tolist(),
            strict=True,
        ):
            low, high = max(start, offset), min(stop, end)
            self.file.read_into(place + low - start, view[low - offset : high - offset])
        return found

    def places(self, offsets: NDArray[np.int64], lengths: NDArray[np.int64]) -> NDArray[np.int64]:
        """Where in the file these bytes are, each in one stretch; -1: not in one, so they must be asked for."""
        piece = np.searchsorted(self._starts, offsets, side="right") - 1
        places = self._places[piece] + offsets - self._starts[piece]
        places[(piece < 0) | (offsets + lengths > self._ends[piece])] = -1
        return places

    def in_hole(self, offset: int, length: int) -> bool:
        """Whether all of these bytes are known for zeros without reading them."""
        place = int(self.places(np.array([offset]), np.array([length]))[0])
        return place >= 0 and self.file.in_hole(place, length)


def in_order(file: ImageFile) -> PiecedFile:
    """A flattened file, put in order. Costs a walk along its pieces, and 24 bytes for each.

    A piece that has bytes of an earlier one replaces them: makedumpfile writes some headers again at the end.

    :raises ImageError: the file is not flattened, is cut short, or its pieces are not what the format says.
    """
    header = file.records(_HEADER, 0, 1, "the header of the flattened form")[0]
    if (int(header["type"]), int(header["version"])) != (_TYPE_FLAT, _VERSION_FLAT):
        raise file.error(
            f"not supported: flattened form of type {header['type']}, version {header['version']}",
            offset=16,
            remedy="put it in order with makedumpfile -R",
        )
    pieces = _walked(file)
    pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
    starts, ends = pieces[:, 0], pieces[:, 0] + pieces[:, 1]
    rewritten = np.zeros(len(pieces), np.bool_)
    rewritten[1:] = starts[1:] < np.maximum.accumulate(ends)[:-1]
    rewritten[:-1] |= ends[:-1] > np.minimum.accumulate(starts[::-1])[::-1][1:]
    if rewritten.any():
        if rewritten.sum() > _MAX_REWRITTEN:
            raise file.error(
                f"damaged: {rewritten.sum()} pieces overlap; at most {_MAX_REWRITTEN} are read", remedy=_WRITE_AGAIN
            )
        pieces = np.concatenate([pieces[~rewritten], _newest(pieces[rewritten])])
        pieces = pieces[np.argsort(pieces[:, 0], kind="stable")]
    return PiecedFile(file, *np.ascontiguousarray(pieces.T))


def _walked(file: ImageFile) -> NDArray[np.int64]:
    """The pieces in the order in which they are written: start, length, place."""
    found = array.array("q")
    place = _HEADER_BYTES
    window, base = b"", place
    while True:
        if not base <= place <= base + len(window) - _PIECE.size:
            base = place
            length = max(min(_WINDOW_BYTES, file.size - base), _PIECE.size)
            window = file.bytes_at(base, length, "the header of the next piece, or the end mark,")
        start, length = _PIECE.unpack_from(window, place - base)
        if start == _END:
            break
        if not 0 <= start <= _HIGHEST or length <= 0:
            raise file.error(f"damaged: a piece of {length} bytes for {start}", offset=place, remedy=_WRITE_AGAIN)
        if length > file.size - place - _PIECE.size:
            raise file.error(f"truncated: a piece of {length} bytes", offset=place, remedy=_WRITE_AGAIN)
        if len(found) >= 3 * _MAX_PIECES:
            raise file.error(
                f"more than {_MAX_PIECES} pieces", offset=place, remedy="put it in order with makedumpfile -R"
            )
        found.extend((start, length, place + _PIECE.size))
        place += _PIECE.size + length
    if not found:
        raise file.error("no piece of a dump is in it", offset=_HEADER_BYTES, remedy=_WRITE_AGAIN)
    return np.frombuffer(found, np.int64).reshape(-1, 3)


def _newest(pieces: NDArray[np.int64]) -> NDArray[np.int64]:
    """Pieces that overlap, cut so that they do not: of what several have, the one that was written last keeps it."""
    pieces = pieces[np.argsort(pieces[:, 2], kind="stable")]
    starts, ends = pieces[:, 0], pieces[:, 0] + pieces[:, 1]
    bounds = np.unique(np.concatenate([starts, ends]))
    owner = np.full(len(bounds) - 1, -1)
    for number, (first, last) in enumerate(
        zip(np.searchsorted(bounds, starts).tolist(), np.searchsorted(bounds, ends).tolist(), strict=True)
    ):
        owner[first:last] = number
    cut = np.flatnonzero(owner >= 0)
    source = pieces[owner[cut]]
    return np.stack([bounds[cut], bounds[cut + 1] - bounds[cut], source[:, 2] + bounds[cut] - source[:, 0]], axis=1)
