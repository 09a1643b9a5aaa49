"""An open memory image: its pages as rows to read, and as extents that a domain can be made of."""

from __future__ import annotations

import mmap
import os
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from memshr.closing import Closing
from memshr.images.file import ZEROS, ImageFile, Layout, offset_goes_on
from memshr.images.reading import MAP_NORESERVE, PageReader, mapped
from memshr.indices import Row, of_kind
from memshr.pagesource import PageState, Rows
from memshr.runs import edges_at
from memshr.types import PAGE_SIZE, Extent, Gfn, PageBytes

_FEW_PAGES = 8
"""Runs of fewer pages than that on average are not worth a read each."""


class MemoryImage(Closing):
    """An open memory image: a context manager, and a ``PageSource`` (``pagesource.py``). ``open_image`` makes them.

    ``read_run`` and ``read`` copy pages out of the file, and a file that is cut short meanwhile is an ImageError.

    ``extents`` are for a domain that is made of the image, and then the operating system kills a process that touches
    a page which its file no longer has (SIGBUS). Nothing in Python can catch that, so whoever uses them calls
    ``check_unchanged`` before each batch: it finds a file that was truncated or written meanwhile, except for the
    instant between the check and the touch.

    :param path: what the user named: the file, or the folder that it is in.
    :raises ImageError: the file cannot be mapped.
    """

    live = False

    def __init__(self, path: Path, file: ImageFile, format_name: str, layout: Layout) -> None:
        self._file, self._contents = file, layout.contents
        self.path = path
        self.name = path.name
        """What reports call it. Several images of one name are given longer ones when they are opened."""
        self.format = format_name
        self.runs = layout.runs
        """Where the pages are, dtype RUN: ascending in gfn, not overlapping, none empty."""
        self.total_pages = int(layout.runs["pages"].sum())
        self._reader: PageReader | None = PageReader(self._contents)
        self._extents: Sequence[Extent] | None = None
        # Rows ignore gaps between gfns, so runs that are gaps apart there may be one piece of the file.
        first = edges_at(~offset_goes_on(self.runs), len(self.runs))[:-1]
        row = np.append(0, np.cumsum(self.runs["pages"]))
        self._piece_row = np.append(row[:-1][first], self.total_pages)
        self._piece_offset = self.runs["offset"][first]

    def __repr__(self) -> str:
        return f"<MemoryImage {os.fspath(self.path)!r} {self.format}, {self.total_pages} pages>"

    @property
    def identity(self) -> tuple[int, int]:
        """Device and inode of its file, or of the file in its folder."""
        return self._file.identity

    @property
    def ranges(self) -> NDArray[np.int64]:
        """The pages it has, shape ``(n, 2)``: first gfn and number of pages, as ``PageSource`` says."""
        if not len(self.runs):
            return np.empty((0, 2), np.int64)
        end = self.runs["gfn"] + self.runs["pages"]
        first = edges_at(self.runs["gfn"][1:] != end[:-1], len(self.runs))[:-1]
        return np.stack([self.runs["gfn"][first], np.add.reduceat(self.runs["pages"], first)], axis=1)

    @property
    def extents(self) -> Sequence[Extent]:
        """The pages as arrays of shape ``(n, PAGE_SIZE)``: an extent for each run.

        They are views of the file, mapped when this is first asked for: no page is read before it is touched. They are
        writable, and a write stays in this process. Zeros that are stored nowhere are memory that is not there until
        it is touched. Empty when the image is closed; extents that somebody still has stay valid.

        :raises ImageError: the file cannot be mapped.
        """
        if self._contents.closed:
            return ()
        if self._extents is None:
            self._extents = self._mapped_extents()
        return self._extents

    def _mapped_extents(self) -> list[Extent]:
        runs = self.runs
        zeros = runs["offset"] == ZEROS
        stored: NDArray[np.uint8] | None = None
        empty: NDArray[np.uint8] | None = None
        # Every other array is made of these, which keep the mappings open: an array made of the mapping itself takes
        # three objects where this takes one, and an image may have a million runs.
        if not zeros.all():
            stored = np.frombuffer(mapped(self._contents, private=True), np.uint8)
        if zeros.any():
            anonymous = mmap.mmap(
                -1,
                int(runs["pages"][zeros].sum()) * PAGE_SIZE,
                flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | MAP_NORESERVE,
            )
            if sys.platform == "linux":
                anonymous.madvise(mmap.MADV_NOHUGEPAGE)  # else a page that is written takes 2 MiB
            empty = np.frombuffer(anonymous, np.uint8)
        place = np.where(zeros, 0, runs["offset"])
        place[zeros] = (np.cumsum(runs["pages"][zeros]) - runs["pages"][zeros]) * PAGE_SIZE
        return [
            Extent(Gfn(gfn), np.ndarray((pages, PAGE_SIZE), np.uint8, buffer=empty if zero else stored, offset=offset))
            for gfn, pages, zero, offset in zip(
                runs["gfn"].tolist(), runs["pages"].tolist(), zeros.tolist(), place.tolist(), strict=True
            )
        ]

    def _offsets(self, rows: Rows) -> NDArray[np.int64]:
        """Where the rows are in the contents, or ZEROS."""
        piece = np.searchsorted(self._piece_row, rows, side="right") - 1
        start = self._piece_offset[piece]
        offsets: NDArray[np.int64] = np.where(
            start == ZEROS, ZEROS, start + (rows - self._piece_row[piece]) * PAGE_SIZE
        )
        return offsets

    def states(self, first_row: int, count: int) -> NDArray[np.uint8]:
        """STORED or HOLE for each row, as ``PageSource`` says. A page that is partly in a hole of the file is STORED.

        Zeros that the format stores nowhere are holes, too: of neither can be told whether the host had memory there.

        :raises ImageError: the file has changed. :raises ValueError: the image is closed.
        """
        offsets = self._offsets(of_kind(Row, np.arange(first_row, first_row + count)))
        holes = self._contents.holes()
        states = np.full(count, PageState.STORED, np.uint8)
        if len(holes):
            hole = np.searchsorted(holes[:, 0], offsets, side="right") - 1
            states[(hole >= 0) & (offsets + PAGE_SIZE <= holes[hole, 1])] = PageState.HOLE
        states[offsets == ZEROS] = PageState.HOLE
        self.check_unchanged()
        return states

    def read_run(self, first_row: int, out: PageBytes) -> NDArray[np.bool_]:
        """Read rows in order, as ``PageSource`` says, with a ``preadv`` for each piece of the file that they are in.

        :raises ImageError: the file has changed, or cannot be read. :raises ValueError: the image is closed.
        """
        end_row = first_row + len(out)
        first = int(np.searchsorted(self._piece_row, first_row, side="right")) - 1
        end = int(np.searchsorted(self._piece_row, end_row, side="left"))
        if (end - first) * _FEW_PAGES > len(out) + _FEW_PAGES:
            return self.read(of_kind(Row, np.arange(first_row, end_row)), out)
        for piece in range(first, end):
            piece_row, offset = int(self._piece_row[piece]), int(self._piece_offset[piece])
            start, stop = max(piece_row, first_row), min(int(self._piece_row[piece + 1]), end_row)
            part = out[start - first_row : stop - first_row]
            if offset == ZEROS:
                part[:] = 0
            else:
                self._contents.read_into(offset + (start - piece_row) * PAGE_SIZE, part)
        self.check_unchanged()
        return np.ones(len(out), np.bool_)

    def read(self, rows: Rows, out: PageBytes) -> NDArray[np.bool_]:
        """Read any rows, in any order, as ``PageSource`` says: a system call for 1024 of them.

        :raises ImageError: the file has changed, or cannot be read. :raises ValueError: the image is closed.
        """
        if self._reader is None:
            raise ValueError("the image is closed")
        offsets = self._offsets(rows)
        stored = np.flatnonzero(offsets != ZEROS)
        if len(stored) == len(rows):
            self._reader.read(offsets, out)
        else:
            out[offsets == ZEROS] = 0
            self._reader.read(offsets[stored], out, stored)
        self.check_unchanged()
        return np.ones(len(rows), np.bool_)

    def check_unchanged(self) -> None:
        """Make sure that the file is still what was opened; costs one ``fstat``.

        :raises ImageError: its size or its time of last modification has changed since it was opened.
        :raises ValueError: the image is closed.
        """
        self._file.check_unchanged()

    def close(self) -> None:
        """Let go of the file; ``extents`` is empty afterwards. Closing twice does nothing."""
        self._extents = self._reader = None
        self._contents.close()
        self._file.close()
