"""A live process as a source of pages, for estimates: what a capture would write, read in place.

The gfns are virtual page numbers. What is mapped is looked up once, at the start; which pages are there is looked up
whenever it is asked. The process is not stopped, and nothing is done to it.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memshr.closing import Closing
from memshr.errors import ImageError
from memshr.images.capture import is_captured
from memshr.pagesource import PageState, Rows
from memshr.procfs import ProcessMemory
from memshr.runs import consecutive, slices
from memshr.types import PAGE_SHIFT, PageBytes


class ProcessSource(Closing):
    """The private memory of a process, as a ``PageSource`` (``pagesource.py``). A context manager.

    :raises ImageError: there is no such process, or it has no private memory.
    :raises PermissionDeniedError: this user may not read it.
    """

    live = True

    def __init__(self, pid: int) -> None:
        self.name = f"pid:{pid}"
        self._memory = ProcessMemory(pid)
        try:
            parts = [(each.start >> PAGE_SHIFT, each.pages) for each in self._memory.mappings() if is_captured(each)]
            if not parts:
                raise ImageError("this process has no private memory that can be read", path=self.name)
            table = np.array(parts, np.int64)
            first = np.append(True, table[1:, 0] != table[:-1, 0] + table[:-1, 1]).nonzero()[0]
            self.ranges: NDArray[np.int64] = np.stack([table[first, 0], np.add.reduceat(table[:, 1], first)], axis=1)
            start, end = int(self.ranges[0, 0]), int(self.ranges[-1].sum())
            self.huge_pages_known = self._memory.huge_and_zero(start << PAGE_SHIFT, end << PAGE_SHIFT) is not None
        except BaseException:
            self.close()
            raise
        self._ends = np.cumsum(self.ranges[:, 1])

    def close(self) -> None:
        """Let go of the process. Closing twice does nothing."""
        self._memory.close()

    @property
    def total_pages(self) -> int:
        """The address space of all its private mappings, whether there are pages behind it or not."""
        return int(self.ranges[:, 1].sum())

    def _pieces(self, first_row: int, count: int) -> list[tuple[int, int, int]]:
        # Rows that follow each other in address space, too: first row of the call, first page, pages.
        pieces = []
        row, end = first_row, first_row + count
        which = int(np.searchsorted(self._ends, first_row, side="right"))
        while row < end:
            stop = min(int(self._ends[which]), end)
            page = int(self.ranges[which].sum()) - int(self._ends[which]) + row
            pieces.append((row - first_row, page, stop - row))
            row, which = stop, which + 1
        return pieces

    def states(self, first_row: int, count: int) -> NDArray[np.uint8]:
        """As ``PageSource`` says. ABSENT are pages never touched, and the kernel's own zero page."""
        states = np.full(count, PageState.ABSENT, np.uint8)
        for row, page, pages in self._pieces(first_row, count):
            start, end = page << PAGE_SHIFT, (page + pages) << PAGE_SHIFT
            special = self._memory.huge_and_zero(start, end) if self.huge_pages_known else None
            huge, zero = special if special is not None else (np.empty((0, 2), np.int64),) * 2
            for state, runs in (
                (PageState.STORED, self._memory.populated(start, end)),
                (PageState.HUGE, huge),
                (PageState.ABSENT, zero),
            ):
                for first, last in (((runs - start) >> PAGE_SHIFT) + row).tolist():
                    states[first:last] = state
        return states

    def read_run(self, first_row: int, out: PageBytes) -> NDArray[np.bool_]:
        """As ``PageSource`` says; a ``preadv`` for each range."""
        readable = np.empty(len(out), np.bool_)
        for row, page, pages in self._pieces(first_row, len(out)):
            readable[row : row + pages] = self._memory.read(page << PAGE_SHIFT, out[row : row + pages])
        return readable

    def read(self, rows: Rows, out: PageBytes) -> NDArray[np.bool_]:
        """As ``PageSource`` says; a ``preadv`` for each run of rows."""
        readable = np.empty(len(rows), np.bool_)
        for run in slices(consecutive(rows)):
            readable[run] = self.read_run(int(rows[run.start]), out[run])
        return readable
