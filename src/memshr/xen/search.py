"""Finding the pages of a domain in an address space of 36 bits, when Xen has no call that lists them.

Two things are known beforehand: the highest gfn that was ever populated, and how many pages there are. A look costs one
mapping for BATCH_PAGES gfns, wherever they are. Guests have their RAM from gfn 0 on, with a hole below 4 GiB. So the
likeliest places are looked at first, and then all of that. Pages that are still missing lie in between, where gfns are
probed in steps.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
from numpy.typing import NDArray

from memshr.runs import joined_ranges, true_runs
from memshr.types import Gfns
from memshr.xen.mappings import BATCH_PAGES

NEAR_PAGES = 1 << 21
"""Gfns that are looked at in any domain, whatever it has: 8 GiB of address space, the hole for devices included."""
SPREAD = 4
"""Gfns that are looked at besides, for each page that the domain has."""
STEPS = (1 << 18, 1 << 15, 1 << 12)
"""Distances of the gfns that are probed where nobody expects any: a run of 16 MiB is found wherever it lies."""
PROBES = 1 << 12
"""Mappings that probing may take; so many are needed for the whole address space at the last of the steps."""


class Search:
    """One search.

    :param look: which of some gfns, at most BATCH_PAGES, have RAM behind them.
    :param highest: the highest gfn that may have.
    :param expected_pages: how many pages there are, or a few more.
    """

    def __init__(self, look: Callable[[Gfns], NDArray[np.bool_]], highest: int, expected_pages: int) -> None:
        self._look = look
        self._highest = highest
        self._expected_pages = expected_pages
        self._runs: list[tuple[int, int]] = []
        self._seen: set[int] = set()  # blocks of BATCH_PAGES gfns
        self.found_pages = 0

    def ranges(self) -> NDArray[np.int64]:
        """The runs of gfns that were found, ascending: rows ``first_gfn, pages``, which neither touch nor overlap."""
        reach = self._expected_pages * SPREAD
        end = self._highest // BATCH_PAGES + 1
        low_end = min(end, reach // BATCH_PAGES + 1)
        near_end = min(end, (NEAR_PAGES + reach) // BATCH_PAGES + 1)
        far = max(near_end, end - reach // BATCH_PAGES - 1)
        for block in range(low_end):
            if not self._scan(block) and self._complete:
                break
        for block in (*range(end - 1, far - 1, -1), *range(low_end, near_end)):
            if self._complete:
                break
            self._scan(block)
        for block in self._probed(near_end, far):
            self._scan_around(block)
        return self._merged()

    @property
    def _complete(self) -> bool:
        return self.found_pages >= self._expected_pages

    def _scan(self, block: int) -> bool:
        # Look at every gfn of a block; whether there is any page in it.
        if block in self._seen:
            return False
        self._seen.add(block)
        first = block * BATCH_PAGES
        present = self._look(np.arange(first, min(first + BATCH_PAGES, self._highest + 1)))
        self.found_pages += int(np.count_nonzero(present))
        self._runs += ((begin, end) for begin, end in (true_runs(present) + first).tolist())
        return bool(present.any())

    def _probed(self, first: int, end: int) -> Iterator[int]:
        # Blocks between these two in which a page was found by looking at single gfns.
        budget = PROBES
        for step in STEPS:
            for start in range(first * BATCH_PAGES, end * BATCH_PAGES, step * BATCH_PAGES):
                if self._complete or not budget:
                    return
                budget -= 1
                gfns = np.arange(start, min(start + step * BATCH_PAGES, end * BATCH_PAGES), step)
                yield from np.unique(gfns[self._look(gfns)] // BATCH_PAGES).tolist()

    def _scan_around(self, block: int) -> None:
        # A block and its neighbours, as far as there are pages in them.
        if self._scan(block):
            for direction in (1, -1):
                neighbour = block + direction
                while 0 <= neighbour <= self._highest // BATCH_PAGES and self._scan(neighbour):
                    neighbour += direction

    def _merged(self) -> NDArray[np.int64]:
        return joined_ranges(np.array(self._runs, np.int64).reshape(-1, 2))
