"""The simplest policy that shares everything: for tests of the mechanism, which selects no pages itself."""

from dataclasses import dataclass

import numpy as np

from memshr.hypervisor import Hypervisor
from memshr.types import PAGE_SIZE, PageArray, PageBytes

CHUNK_PAGES = 2048


@dataclass(frozen=True, slots=True)
class Shared:
    """What one run did, in pages."""

    looked_at: int
    released: int
    shared: int
    late: int
    """pages that were written between nomination and sharing, or between looking and nominating"""


def backed_pages(hypervisor: Hypervisor) -> PageArray:
    """Every page of every domain that the host spends memory on."""
    found = PageArray.empty()
    for domain in hypervisor.domains():
        for first, count in hypervisor.populated_ranges(domain.domid).tolist():
            pages = PageArray.of_domain(domain.domid, np.arange(first, first + count))
            pages = pages[hypervisor.backed(pages)]
            found = PageArray(np.concatenate([found.domids, pages.domids]), np.concatenate([found.gfns, pages.gfns]))
    return found


def sums_of(hypervisor: Hypervisor, pages: PageArray, buffer: PageBytes) -> np.ndarray[tuple[int], np.dtype[np.uint64]]:
    """A number for each page, by its contents."""
    weights = np.random.default_rng(5).integers(1, 1 << 63, PAGE_SIZE // 8, dtype=np.uint64)
    sums = np.empty(len(pages), dtype=np.uint64)
    for start in range(0, len(pages), CHUNK_PAGES):
        some = pages[start : start + CHUNK_PAGES]
        hypervisor.read_pages(some, buffer)
        words = buffer[: len(some)].view(np.uint64)
        sums[start : start + len(some)] = ((words ^ (words >> np.uint64(29))) * weights).sum(axis=1)
    return sums


def share_all(hypervisor: Hypervisor) -> Shared:
    """Release every zero page, and share every page with the first equal one: nominate, read, compare, share."""
    buffer = np.empty((2 * CHUNK_PAGES, PAGE_SIZE), np.uint8)
    everything = backed_pages(hypervisor)
    sums = sums_of(hypervisor, everything, buffer)
    zeros = np.flatnonzero(sums == 0)
    released = 0
    for start in range(0, len(zeros), CHUNK_PAGES):
        pages = everything[zeros[start : start + CHUNK_PAGES]]
        handles, _ = hypervisor.nominate_gfns(pages)
        hypervisor.read_pages(pages, buffer)
        still = np.asarray(~buffer[: len(pages)].any(axis=1))
        released += int((hypervisor.release_zero_pages(pages[still], handles[still]) == 0).sum())
        hypervisor.unshare_gfns(pages[~still])
    _, first, inverse, counts = np.unique(sums, return_index=True, return_inverse=True, return_counts=True)
    clients = np.flatnonzero((counts[inverse] > 1) & (sums != 0) & (first[inverse] != np.arange(len(sums))))
    shared = 0
    for start in range(0, len(clients), CHUNK_PAGES):
        client_rows = clients[start : start + CHUNK_PAGES]
        source_pages, client_pages = everything[first[inverse[client_rows]]], everything[client_rows]
        source_handles, _ = hypervisor.nominate_gfns(source_pages)
        client_handles, _ = hypervisor.nominate_gfns(client_pages)
        hypervisor.read_pages(source_pages, buffer[:CHUNK_PAGES])
        hypervisor.read_pages(client_pages, buffer[CHUNK_PAGES:])
        count = len(client_rows)
        equal = (buffer[:count] == buffer[CHUNK_PAGES : CHUNK_PAGES + count]).all(axis=1)
        statuses = hypervisor.share_gfns_many(
            source_pages[equal], source_handles[equal], client_pages[equal], client_handles[equal]
        )
        shared += int((statuses == 0).sum())
        hypervisor.unshare_gfns(client_pages[~equal])
    late = len(zeros) + len(clients) - released - shared
    return Shared(len(everything), released, shared, late)
