"""The RAM of one guest, page by page: which page is at which gfn, and where QEMU has it.

Pages are counted through all RAM ranges of the guest, in order of gfn. All of this is arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from memshr.indices import GuestPage, of_kind
from memshr.qemu.guests import RamRange
from memshr.runs import edges_at, jumps
from memshr.types import PAGE_SHIFT, PAGE_SIZE, Gfns

Pages = NDArray[GuestPage]
"""page numbers of one guest, shape ``(n,)``, ascending and distinct unless said otherwise"""


class GuestRam:
    """The RAM ranges of one guest.

    :param layout: in order of gfn, as ``guests.memory_layout`` says; ranges do not overlap.

    ``pages`` is how many pages there are, ``hvas`` the address of each in QEMU, shape ``(pages,)``; ``first_gfns`` and
    ``range_pages`` are of the ranges, shape ``(len(layout),)``.
    """

    def __init__(self, layout: Sequence[RamRange]) -> None:
        self.layout = tuple(layout)
        self.first_gfns = np.array([ram.first_gfn for ram in layout], dtype=np.int64)
        self.range_pages = np.array([ram.pages for ram in layout], dtype=np.int64)
        self._range_starts = np.cumsum(self.range_pages) - self.range_pages
        self.pages = int(self.range_pages.sum())
        self.hvas = np.concatenate(
            [ram.hva + PAGE_SIZE * np.arange(ram.pages, dtype=np.int64) for ram in layout]
            or [np.empty(0, dtype=np.int64)]
        )
        by_hva = np.argsort([ram.hva for ram in layout])
        self._hva_starts = np.array([layout[at].hva for at in by_hva], dtype=np.int64)
        self._hva_pages = self.range_pages[by_hva]
        self._hva_first = self._range_starts[by_hva]
        self._by_hva = by_hva

    def pages_of_gfns(self, gfns: Gfns) -> Pages:
        """Page number of each gfn, -1 where there is no RAM."""
        if not len(self.first_gfns):
            return of_kind(GuestPage, np.full(len(gfns), -1))
        row = np.maximum(np.searchsorted(self.first_gfns, gfns, side="right") - 1, 0)
        inside = gfns - self.first_gfns[row]
        pages = np.where((inside >= 0) & (inside < self.range_pages[row]), self._range_starts[row] + inside, -1)
        return of_kind(GuestPage, pages)

    def gfns_of_pages(self, pages: Pages) -> Gfns:
        """The gfn of each page."""
        row = np.searchsorted(self._range_starts, pages, side="right") - 1
        return np.asarray(self.first_gfns[row] + pages - self._range_starts[row])

    def pages_of_hvas(self, hvas: NDArray[np.int64]) -> NDArray[np.int64]:
        """Page number of each address, -1 where it is no guest RAM."""
        if not len(self._hva_starts):
            return np.full(len(hvas), -1, dtype=np.int64)
        row = np.maximum(np.searchsorted(self._hva_starts, hvas, side="right") - 1, 0)
        inside = (hvas - self._hva_starts[row]) >> PAGE_SHIFT
        return np.where((inside >= 0) & (inside < self._hva_pages[row]), self._hva_first[row] + inside, -1)

    def range_of_hvas(self, hvas: NDArray[np.int64]) -> NDArray[np.int64]:
        """The place in ``layout`` of the range that holds each address, which is of guest RAM."""
        return np.asarray(self._by_hva[np.searchsorted(self._hva_starts, hvas, side="right") - 1])

    def runs(self, pages: Pages) -> list[tuple[int, int]]:
        """Address and bytes of each run of adjacent pages."""
        hvas = self.hvas[pages]
        edges = edges_at(jumps(hvas, PAGE_SIZE), len(hvas))
        return list(zip(hvas[edges[:-1]].tolist(), (np.diff(edges) * PAGE_SIZE).tolist(), strict=True))
