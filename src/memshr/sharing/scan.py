"""Scanning: the fingerprint of every page of a trust group on which the host spends memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from memshr.content.fingerprint import FingerprintPages, Fingerprints
from memshr.errors import NotSharableError, Status
from memshr.hypervisor import NOT_BACKED, Hypervisor, error_of
from memshr.runs import consecutive, range_members
from memshr.types import DomId, Gfn, Gfns, PageArray, PageBytes, page_buffer

_SCATTERED_RUN_PAGES = 256
"""Runs that are shorter than this on average are read page by page in one call, not run by run in many."""
_BACKED_STRIDE = 1 << 20


@dataclass(frozen=True, slots=True)
class Scan:
    """The pages of one domain that the host spends memory on, and what they looked like.

    :param gfns: ascending, shape ``(n,)``.
    :param fingerprints: of each, shape ``(n,)``.
    :param readable: which of them could be read, shape ``(n,)``; the fingerprints of the others mean nothing.
    """

    gfns: Gfns
    fingerprints: Fingerprints
    readable: NDArray[np.bool_]


class Scanner:
    """Reads domains in batches into one buffer, and fingerprints what it reads.

    :param batch_pages: pages of one batch. The buffer has that size unless the mechanism shows its memory itself.
    """

    def __init__(self, hypervisor: Hypervisor, fingerprint_pages: FingerprintPages, batch_pages: int) -> None:
        self._hypervisor = hypervisor
        self._fingerprint_pages = fingerprint_pages
        self._batch_pages = batch_pages
        self._buffer: PageBytes = page_buffer(batch_pages)
        # The frames that were met, ascending, with what ``Scan`` says of a page.
        self._frames = np.empty(0, dtype=np.int64)
        self._frame_fingerprints: Fingerprints = np.empty(0, dtype=np.uint64)
        self._frame_readable = np.empty(0, dtype=np.bool_)

    def backed_gfns(self, domid: DomId, populated: NDArray[np.int64]) -> Gfns:
        """The gfns of ``populated`` (rows of first gfn and pages) that the host spends memory on, ascending.

        :raises NoSuchDomainError: the domain is gone.
        """
        gfns = _gfns(populated)
        backed = np.empty(len(gfns), dtype=np.bool_)
        for stride, pages in _strides(domid, gfns):
            backed[stride] = self._hypervisor.backed(pages)
        return gfns if backed.all() else gfns[backed]

    def backed_frames(self, domid: DomId, populated: NDArray[np.int64]) -> tuple[Gfns, NDArray[np.int64]]:
        """As ``backed_gfns``, and what ``Hypervisor.frames_of`` says of each, in one look at the domain."""
        gfns = _gfns(populated)
        frames = np.empty(len(gfns), dtype=np.int64)
        for stride, pages in _strides(domid, gfns):
            frames[stride] = self._hypervisor.frames_of(pages)
        backed = frames != NOT_BACKED
        return gfns[backed], frames[backed]

    def scan(self, domid: DomId, gfns: Gfns, advance: Callable[[int], None]) -> Scan:
        """Look at the pages ``gfns`` (ascending) of one domain.

        :param advance: told after each batch how many pages it had.
        :raises NoSuchDomainError: the domain is gone.

        Cost: the bandwidth of reading, where gfns come in runs. Memory: 9 bytes a page.
        """
        fingerprints = np.empty(len(gfns), dtype=np.uint64)
        readable = np.ones(len(gfns), dtype=np.bool_)
        for first in range(0, len(gfns), self._batch_pages):
            batch = slice(first, first + self._batch_pages)
            self._scan_batch(domid, gfns[batch], fingerprints[batch], readable[batch])
            advance(len(gfns[batch]))
        return Scan(gfns, fingerprints, readable)

    def scan_sharing(self, domid: DomId, gfns: Gfns, frames: NDArray[np.int64], advance: Callable[[int], None]) -> Scan:
        """As ``scan``, but one page stands for all that share its frame, in every domain that this scanner looks at.

        :param frames: what ``Hypervisor.frames_of`` says of the pages, shape ``(n,)``. A page that is written after
            that has the frame's fingerprint here, or its frame has the new page's: contents are compared in any case.
        """
        (shared,) = np.nonzero(frames >= 0)
        distinct, first = np.unique(frames[shared], return_index=True)
        unseen = ~np.isin(distinct, self._frames)
        standing = shared[first[unseen]]
        read = frames < 0
        read[standing] = True
        advance(len(gfns) - int(np.count_nonzero(read)))
        scan = self.scan(domid, gfns[read], advance)
        fingerprints = np.empty(len(gfns), dtype=np.uint64)
        readable = np.ones(len(gfns), dtype=np.bool_)
        fingerprints[read], readable[read] = scan.fingerprints, scan.readable
        met = np.concatenate([self._frames, distinct[unseen]])
        order = np.argsort(met)
        self._frames = met[order]
        self._frame_fingerprints = np.concatenate([self._frame_fingerprints, fingerprints[standing]])[order]
        self._frame_readable = np.concatenate([self._frame_readable, readable[standing]])[order]
        places = np.searchsorted(self._frames, frames[shared])
        fingerprints[shared], readable[shared] = self._frame_fingerprints[places], self._frame_readable[places]
        return Scan(gfns, fingerprints, readable)

    def _scan_batch(self, domid: DomId, gfns: Gfns, fingerprints: Fingerprints, readable: NDArray[np.bool_]) -> None:
        edges = consecutive(gfns)
        if (len(edges) - 2) * _SCATTERED_RUN_PAGES > len(gfns):
            self._scan_scattered(domid, gfns, fingerprints, readable)
            return
        for first, end in pairwise(edges.tolist()):
            try:
                pages = self._hypervisor.read_range(domid, Gfn(int(gfns[first])), end - first, self._buffer)
            except NotSharableError:  # some page of the run is gone since the ranges were asked for: find out which
                self._scan_scattered(domid, gfns[first:end], fingerprints[first:end], readable[first:end])
            else:
                fingerprints[first:end] = self._fingerprint_pages(pages)

    def _scan_scattered(
        self, domid: DomId, gfns: Gfns, fingerprints: Fingerprints, readable: NDArray[np.bool_]
    ) -> None:
        statuses = self._hypervisor.read_pages(PageArray.of_domain(domid, gfns), self._buffer)
        if (statuses == Status.ESRCH).any():
            raise error_of("read_pages", Status.ESRCH, domid=domid)
        readable[:] = statuses == Status.OK
        fingerprints[:] = self._fingerprint_pages(self._buffer[: len(gfns)])


def _gfns(populated: NDArray[np.int64]) -> Gfns:
    return range_members(populated[:, 0], populated[:, 1])


def _strides(domid: DomId, gfns: Gfns) -> Iterator[tuple[slice, PageArray]]:
    for first in range(0, len(gfns), _BACKED_STRIDE):
        stride = slice(first, first + _BACKED_STRIDE)
        yield stride, PageArray.of_domain(domid, gfns[stride])
