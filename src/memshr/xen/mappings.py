"""Foreign mappings: guest pages in batches, looked at, copied, and let go at once.

A mapping is an extra reference to every frame in it, and Xen nominates no frame that has one. So no mapping outlives
the call that made it, and what is read is copied: one copy a page, one mapping for BATCH_PAGES pages.

A writable mapping of a shared page gives it a frame of its own. Where there is none to be had, a release build of Xen
answers ENOMEM and a debug build dies of an assertion. So we look first whether the domain is at its max_pages, or the
host without free memory, and answer ENOMEM ourselves.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
from collections.abc import Callable, Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from memshr.runs import consecutive
from memshr.types import MAX_GFN_BITS, PAGE_SIZE, Gfns, PageBytes, Statuses
from memshr.xen import libxc
from memshr.xen.connection import Connection
from memshr.xen.libxc import PROT_READ, PROT_WRITE

BATCH_PAGES = 4096
"""Pages in one mapping: 16 MiB, so that a domain of 4 GiB is read through 256 of them."""


class Mappings:
    """What dom0 can do to a domain's pages by mapping them.

    :param may_ask: whether Xen may be asked about a page of this domain, which enables sharing on it.
    """

    def __init__(self, connection: Connection, may_ask: Callable[[int], bool] = lambda _domid: True) -> None:
        self._connection = connection
        self._may_ask = may_ask
        self._errs = np.zeros(BATCH_PAGES, np.int32)

    @contextlib.contextmanager
    def _mapped(self, domid: int, gfns: NDArray[np.uint64], prot: int) -> Iterator[tuple[int, Statuses]]:
        # At most BATCH_PAGES pages; the address of their mapping, and a status for each: what failed must not be read.
        count = len(gfns)
        errs = self._errs[:count]
        errs[:] = 0
        functions = self._connection.libxc
        # SAFETY: gfns and errs have count elements of the types that xenforeignmemory_map takes (xen_pfn_t is 64 bits
        # on x86-64), are contiguous, and live until it returns.
        address = functions.xenforeignmemory_map(
            self._connection.fmem, domid, prot, count, gfns.ctypes.data, errs.ctypes.data
        )
        if not address:
            yield 0, np.full(count, -(ctypes.get_errno() or errno.EINVAL), np.int32)
            return
        try:
            # The header speaks of errno values, Linux's privcmd hands out negative ones.
            yield address, -np.abs(errs)
        finally:
            functions.xenforeignmemory_unmap(self._connection.fmem, address, count)

    def _batches(self, gfns: Gfns) -> Iterator[tuple[slice, NDArray[np.uint64]]]:
        for start in range(0, len(gfns), BATCH_PAGES):
            rows = slice(start, min(start + BATCH_PAGES, len(gfns)))
            yield rows, np.ascontiguousarray(gfns[rows], np.uint64)

    def present(self, domid: int, gfns: Gfns) -> NDArray[np.bool_]:
        """Which of these gfns (at most BATCH_PAGES) have RAM behind them. Reads nothing."""
        with self._mapped(domid, gfns.astype(np.uint64), PROT_READ) as (_, statuses):
            return np.asarray(statuses == 0)

    def read(self, domid: int, gfns: Gfns, out: PageBytes, rows: NDArray[np.intp] | None = None) -> Statuses:
        """Copy page i to row i of ``out``, or to row ``rows[i]``; the status of each page."""
        statuses = _in_reach(gfns)
        good = np.flatnonzero(statuses == 0)
        places = good if rows is None else rows[good]
        for batch, wire in self._batches(gfns[good]):
            with self._mapped(domid, wire, PROT_READ) as (address, found):
                statuses[good[batch]] = found
                _copy_runs(address, found, out, places[batch])
        return statuses

    def touch(self, domid: int, gfns: Gfns) -> Statuses:
        """Map pages writably and let them go: each becomes the domain's own, and none is written."""
        statuses = _in_reach(gfns)
        good = np.flatnonzero(statuses == 0)
        for batch, wire in self._batches(gfns[good]):
            if self._room_pages(domid) >= len(wire):
                with self._mapped(domid, wire, PROT_READ | PROT_WRITE) as (_, found):
                    statuses[good[batch]] = found
            else:
                statuses[good[batch]] = [self._touch_one(domid, gfn) for gfn in wire]
        return statuses

    def _touch_one(self, domid: int, gfn: np.uint64) -> int:
        if not self.fits(domid, int(gfn)):
            return -errno.ENOMEM
        with self._mapped(domid, np.array([gfn], np.uint64), PROT_READ | PROT_WRITE) as (_, found):
            return int(found[0])

    def _room_pages(self, domid: int) -> int:
        # How many frames the domain may get: by its max_pages, and by what the host has. A domain that is not there has
        # nothing to unshare, and Xen's own answer is the right one.
        functions, xch = self._connection.libxc, self._connection.xch
        row = np.zeros(1, libxc.domaininfo_dtype(functions.release))
        # SAFETY: one structure of the size that check_domaininfo measured.
        found = functions.xc_domain_getinfolist(xch, domid, 1, row.ctypes.data)
        available_bytes = ctypes.c_uint64()
        if found != 1 or row[0]["domain"] != domid:
            return BATCH_PAGES
        room_pages = int(row[0]["max_pages"]) - int(row[0]["tot_pages"])
        if functions.xc_availheap(xch, 0, 0, -1, ctypes.byref(available_bytes)) < 0:
            return room_pages  # a security module may keep it from us
        return min(room_pages, available_bytes.value // PAGE_SIZE)

    def fits(self, domid: int, gfn: int) -> bool:
        """Whether a writable mapping of this page will find the memory that it takes.

        The last page on a frame takes the frame itself, and one that is not shared takes nothing.
        """
        if self._room_pages(domid) > 0:
            return True
        if not self._may_ask(domid):
            return False
        return bool(self._connection.libxc.xc_memshr_debug_gfn(self._connection.xch, domid, gfn) <= 1)

    @contextlib.contextmanager
    def held(self, domid: int, gfn: int) -> Iterator[None]:
        """Keep a page mapped for as long as the ``with`` lasts, for tests: it cannot be nominated meanwhile."""
        with self._mapped(domid, np.array([gfn], np.uint64), PROT_READ):
            yield

    def write(self, domid: int, gfn: int, data: bytes, offset: int = 0) -> int:
        """Put bytes into a guest's page: a status. For tests and for the sharing ring, not for the sharing of pages.

        :raises ValueError: the bytes do not fit into the page.
        """
        if offset < 0 or offset + len(data) > PAGE_SIZE:
            raise ValueError(f"{len(data)} bytes at offset {offset} do not fit into a page of {PAGE_SIZE} bytes")
        if not self.fits(domid, gfn):
            return -errno.ENOMEM
        with self._mapped(domid, np.array([gfn], np.uint64), PROT_READ | PROT_WRITE) as (address, statuses):
            if not statuses[0]:
                # SAFETY: the page is mapped writably at address, and the bytes end within it.
                ctypes.memmove(address + offset, data, len(data))
            return int(statuses[0])


def _in_reach(gfns: Gfns) -> Statuses:
    # A gfn beyond the address width must not get into a page table entry: its high bits would be cut off, and some
    # other page of the domain would be mapped in its stead.
    return np.where((gfns < 0) | (gfns >> MAX_GFN_BITS != 0), -errno.EINVAL, 0).astype(np.int32)


def _copy_runs(address: int, statuses: Statuses, out: PageBytes, places: NDArray[np.intp]) -> None:
    # One memcpy for each run of pages that are mapped and go to rows in a row.
    good = np.flatnonzero(statuses == 0)
    base, stride = out.ctypes.data, out.strides[0]
    for begin, end in pairwise(consecutive(good, places[good]).tolist()):
        first, count = int(good[begin]), end - begin
        # SAFETY: pages first to first + count are mapped (their status is 0; a page that failed would fault), and out
        # is C-contiguous with at least places[...] + 1 rows of PAGE_SIZE bytes.
        ctypes.memmove(base + int(places[first]) * stride, address + first * PAGE_SIZE, count * PAGE_SIZE)
