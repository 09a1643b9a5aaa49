"""A domain of a host as a source of pages, for estimates: the seam's looking calls and no other.

Nothing is nominated, so nothing is protected, injected or changed.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memshr.errors import NotSharableError, Status
from memshr.hypervisor import Hypervisor, error_of
from memshr.indices import Row, of_kind
from memshr.pagesource import PageState, Rows
from memshr.types import DomId, Gfn, Gfns, PageArray, PageBytes


class DomainSource:
    """One domain, as a ``PageSource`` (``pagesource.py``).

    :param lock: held during each call of the hypervisor, which serves one caller at a time; one for all its domains.
    :param huge: tells which pages are parts of huge pages; None: that is not known.
    :raises NoSuchDomainError: the domain is gone.
    """

    live = True

    def __init__(
        self,
        hypervisor: Hypervisor,
        domid: DomId,
        lock: threading.Lock,
        huge: Callable[[PageArray], NDArray[np.bool_]] | None = None,
    ) -> None:
        self._hypervisor = hypervisor
        self._domid = domid
        self._lock = lock
        self._huge = huge
        self.ranges: NDArray[np.int64] = hypervisor.populated_ranges(domid)
        self.name = hypervisor.names().get(domid, str(domid))
        self._ends = np.cumsum(self.ranges[:, 1])

    @property
    def total_pages(self) -> int:
        """The populated gfns."""
        return int(self.ranges[:, 1].sum())

    def _gfns(self, rows: Rows) -> Gfns:
        which = np.searchsorted(self._ends, rows, side="right")
        gfns: Gfns = rows + (self.ranges[:, 0] + self.ranges[:, 1] - self._ends)[which]
        return gfns

    def states(self, first_row: int, count: int) -> NDArray[np.uint8]:
        """As ``PageSource`` says."""
        gfns = self._gfns(of_kind(Row, np.arange(first_row, first_row + count)))
        states = np.full(count, PageState.STORED, np.uint8)
        with self._lock:
            backed = self._hypervisor.backed(PageArray.of_domain(self._domid, gfns))
            states[~backed] = PageState.ABSENT
            (there,) = np.nonzero(backed)
            if self._huge is not None and len(there):
                states[there[self._huge(PageArray.of_domain(self._domid, gfns[there]))]] = PageState.HUGE
        return states

    def read_run(self, first_row: int, out: PageBytes) -> NDArray[np.bool_]:
        """As ``PageSource`` says; pages that the domain has given up meanwhile cannot be read."""
        rows = of_kind(Row, np.arange(first_row, first_row + len(out)))
        gfns = self._gfns(rows)
        if len(gfns) and gfns[-1] - gfns[0] == len(gfns) - 1:
            with self._lock:
                try:
                    pages = self._hypervisor.read_range(self._domid, Gfn(int(gfns[0])), len(gfns), out)
                except NotSharableError:
                    pass  # some page of the run is gone: find out which
                else:
                    if not np.shares_memory(pages, out):
                        out[:] = pages
                    return np.ones(len(out), np.bool_)
        return self.read(rows, out)

    def read(self, rows: Rows, out: PageBytes) -> NDArray[np.bool_]:
        """As ``PageSource`` says."""
        with self._lock:
            statuses = self._hypervisor.read_pages(PageArray.of_domain(self._domid, self._gfns(rows)), out)
        if (statuses == Status.ESRCH).any():
            raise error_of("read_pages", Status.ESRCH, domid=self._domid)
        return np.asarray(statuses == Status.OK)
