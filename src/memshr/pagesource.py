"""The second, smaller seam: memory that can only be read, for estimates.

An estimate needs no hypervisor: it needs pages, in order, and to know which of them cost nothing. Image files, live
processes, and the domains of any mechanism offer that as a ``PageSource``. The pages of a source are numbered: its
*rows* count from 0, along its ranges, so that what is known of them is an array.
"""

from __future__ import annotations

import enum
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from memshr.indices import Row
from memshr.types import DomId, PageBytes

__all__ = [
    "PageSource",
    "PageState",
    "Rows",
    "Subject",
]

Rows = NDArray[Row]
"""Numbers of pages of a source, from 0 on along its ranges."""


class PageState(enum.IntEnum):
    """What is known of a page without reading it."""

    STORED = 0
    """It has contents, which ``read`` gives."""
    HOLE = 1
    """It holds zeros, and the file stores nothing for it (mostly: it lies in a hole of a sparse file). Nobody can tell
    whether the host had memory behind it."""
    ABSENT = 2
    """Live memory that the host has not backed: it costs nothing, so it can save nothing."""
    HUGE = 3
    """Live memory, stored, and part of a huge page: to save it the huge page must be split."""


class PageSource(Protocol):
    """Memory to be estimated. A source may be read by several threads at once."""

    @property
    def name(self) -> str:
        """What the source is called in reports and group specs."""

    @property
    def live(self) -> bool:
        """Whether the pages may change while they are looked at."""

    @property
    def ranges(self) -> NDArray[np.int64]:
        """The pages it has, shape ``(n, 2)``: first gfn and number of pages, ascending, none empty, not overlapping.

        For a process the gfns are virtual page numbers.
        """

    @property
    def total_pages(self) -> int:
        """The sum over ``ranges``; rows are below it."""

    def states(self, first_row: int, count: int) -> NDArray[np.uint8]:
        """The ``PageState`` of each of these rows, shape ``(count,)``, as of now.

        :raises MemshrError: the source is gone.
        """

    def read_run(self, first_row: int, out: PageBytes) -> NDArray[np.bool_]:
        """Read ``len(out)`` rows from ``first_row`` on, in order: the fast way.

        :param out: shape ``(n, PAGE_SIZE)``, C-contiguous; rows that have no contents are filled with zeros.
        :returns: which of them could be read, shape ``(n,)``; what ``out`` holds for the others means nothing.
        :raises MemshrError: the source is gone, or has changed although it is not live.
        """

    def read(self, rows: Rows, out: PageBytes) -> NDArray[np.bool_]:
        """Read any rows, in any order; else as ``read_run``."""


@dataclass(frozen=True, slots=True)
class Subject:
    """A source, and what an estimate says of it besides its pages.

    :param kind: ``image``, ``process``, ``qemu`` or ``xen``.
    :param format: of an image; else None.
    :param huge_pages_known: whether the source tells which pages are parts of huge pages (``PageState.HUGE``).
    :param domid: by which its host knows it, and so does the estimate; None: the estimate numbers it.
    """

    pages: PageSource
    kind: str = "image"
    format: str | None = None
    huge_pages_known: bool = False
    domid: DomId | None = None
