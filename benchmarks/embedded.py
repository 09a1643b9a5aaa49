"""How fast the embedded hypervisor's calls are, and what its books weigh. Each function prints one table."""

from __future__ import annotations

import time
import tracemalloc
from collections.abc import Callable

import numpy as np

from memshr.embedded import EmbeddedHypervisor
from memshr.errors import PageError
from memshr.types import PAGE_SIZE, DomId, Extent, Gfn, Handle, PageArray

MIB_PAGES = (1 << 20) // PAGE_SIZE


def _seconds(function: Callable[[], object]) -> float:
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


def _two_domains(pages: int) -> tuple[EmbeddedHypervisor, DomId, DomId]:
    hypervisor = EmbeddedHypervisor()
    return hypervisor, hypervisor.create_domain("A", pages), hypervisor.create_domain("B", pages)


def many_page_calls() -> None:
    """Nominate both sides of every pair and share them, in gfn order and in random order."""
    print(
        f"{'pairs':>9}  {'GiB':>5}  {'order':<8} {'nominate':>12} {'share':>12} {'both':>12}"
        "   (pages/s, pairs/s, pairs/s)"
    )
    for pairs in (256 * MIB_PAGES // 2, 1024 * MIB_PAGES // 2, 1_000_000):
        for order in ("gfn", "random"):
            hypervisor, first, second = _two_domains(pairs)
            gfns = np.arange(pairs)
            rng = np.random.default_rng(1)
            sources = PageArray.of_domain(first, gfns if order == "gfn" else rng.permutation(gfns))
            clients = PageArray.of_domain(second, gfns if order == "gfn" else rng.permutation(gfns))
            start = time.perf_counter()
            source_handles, _ = hypervisor.nominate_gfns(sources)
            client_handles, _ = hypervisor.nominate_gfns(clients)
            nominated = time.perf_counter()
            hypervisor.share_gfns_many(sources, source_handles, clients, client_handles)
            shared = time.perf_counter()
            assert hypervisor.counters().freed_pages == pairs
            nominate_rate, share_rate = 2 * pairs / (nominated - start), pairs / (shared - nominated)
            print(
                f"{pairs:>9,}  {2 * pairs / (1024 * MIB_PAGES):>5.2f}  {order:<8}"
                f" {nominate_rate:>12,.0f} {share_rate:>12,.0f} {pairs / (shared - start):>12,.0f}"
            )


def one_page_calls() -> None:
    """The same, a call a page; and a write that unshares a page with its copy."""
    count = 20_000
    for image in (False, True):
        hypervisor = EmbeddedHypervisor()
        first, second = (_written_domain(hypervisor, count, image) for _ in range(2))
        handles = [hypervisor.nominate_gfn(first, Gfn(gfn)) for gfn in range(count)]
        start = time.perf_counter()
        clients = [hypervisor.nominate_gfn(second, Gfn(gfn)) for gfn in range(count)]
        nominated = time.perf_counter()
        for gfn in range(count):
            hypervisor.share_gfns(first, Gfn(gfn), handles[gfn], second, Gfn(gfn), clients[gfn])
        shared = time.perf_counter()
        unshare_us = []
        for gfn in range(count):
            before = time.perf_counter_ns()
            hypervisor.write(second, Gfn(gfn), b"x")
            unshare_us.append((time.perf_counter_ns() - before) / 1000)
        print(f"nominate_gfn {count / (nominated - start):,.0f}/s, share_gfns {count / (shared - nominated):,.0f}/s")
        frames = "frames that were never touched (of images)" if image else "frames that were in use before"
        p50, p99 = np.percentile(unshare_us, [50, 99])
        print(f"a write that unshares with a copy, into {frames}: p50 {p50:.1f} us, p99 {p99:.1f} us")


def _written_domain(hypervisor: EmbeddedHypervisor, pages: int, image: bool) -> DomId:
    if image:
        return hypervisor.create_domain("d", extents=[Extent(Gfn(0), np.ones((pages, PAGE_SIZE), np.uint8))])
    domid = hypervisor.create_domain("d", pages)
    for gfn in range(pages):
        hypervisor.write(domid, Gfn(gfn), b"x")
    return domid


def metadata() -> None:
    """Bytes of books for each page of domain memory (tracemalloc), for image-backed domains."""
    print(f"{'GiB':>5}  {'opened':>8} {'looked at':>10} {'nominated':>10} {'shared':>8}   (bytes a page)")
    for gib in (0.25, 1, 4):
        pages = int(gib * 1024 * MIB_PAGES) // 2
        image = np.broadcast_to(np.zeros((1, PAGE_SIZE), np.uint8), (pages, PAGE_SIZE))
        tracemalloc.start()
        hypervisor = EmbeddedHypervisor()
        domids = [hypervisor.create_domain(name, extents=[Extent(Gfn(0), image)]) for name in "AB"]
        weights = [_weight(pages)]
        arrays = [PageArray.of_domain(domid, np.arange(pages)) for domid in domids]
        before, _ = tracemalloc.get_traced_memory()
        hypervisor.backed(arrays[0])
        hypervisor.backed(arrays[1])
        after, _ = tracemalloc.get_traced_memory()
        weights.append(weights[0] + (after - before) / (2 * pages))
        handles = []
        base, _ = tracemalloc.get_traced_memory()
        handles = [hypervisor.nominate_gfns(array)[0] for array in arrays]
        nominated, _ = tracemalloc.get_traced_memory()
        weights.append(weights[1] + (nominated - base - sum(column.nbytes for column in handles)) / (2 * pages))
        hypervisor.share_gfns_many(arrays[0], handles[0], arrays[1], handles[1])
        shared, _ = tracemalloc.get_traced_memory()
        weights.append(weights[1] + (shared - base - sum(column.nbytes for column in handles)) / (2 * pages))
        tracemalloc.stop()
        print(f"{gib:>5}  {weights[0]:>8.1f} {weights[1]:>10.1f} {weights[2]:>10.1f} {weights[3]:>8.1f}")


def _weight(pages: int) -> float:
    current, _ = tracemalloc.get_traced_memory()
    return current / (2 * pages)


def audit() -> None:
    """Audit with every page shared, by how many are on one frame."""
    for sharers in (2, 256, 100_000):
        pages = 1_000_000 - 1_000_000 % sharers
        hypervisor = EmbeddedHypervisor()
        domid = hypervisor.create_domain("A", pages)
        array = PageArray.of_domain(domid, np.arange(pages))
        handles, _ = hypervisor.nominate_gfns(array)
        source = np.arange(pages) // sharers * sharers
        client = np.flatnonzero(np.arange(pages) % sharers)
        source = source[client]
        hypervisor.share_gfns_many(array[source], handles[source], array[client], handles[client])
        print(f"audit of {pages:,} shared gfns, {sharers:,} on a frame: {_seconds(hypervisor.audit):.2f} s")


def merge_groups() -> None:
    """Two groups put on one frame, by the size of each: the p2m entries of the client's group have to change."""
    for source_pages, client_pages in ((1, 100_000), (100_000, 1), (10_000, 10_000), (100_000, 100_000)):
        hypervisor = EmbeddedHypervisor()
        domid = hypervisor.create_domain("A", source_pages + client_pages)
        pages = PageArray.of_domain(domid, np.arange(source_pages + client_pages))
        handles, _ = hypervisor.nominate_gfns(pages)
        for first, count in ((0, source_pages), (source_pages, client_pages)):
            rows, source = np.arange(first + 1, first + count), np.full(count - 1, first)
            hypervisor.share_gfns_many(pages[source], handles[source], pages[rows], handles[rows])
        client = Gfn(source_pages)
        start = time.perf_counter()
        hypervisor.share_gfns(domid, Gfn(0), Handle(handles.item(0)), domid, client, Handle(handles.item(client)))
        merge_s = time.perf_counter() - start
        assert hypervisor.debug_gfn(domid, client) == source_pages + client_pages
        print(f"{client_pages:>8,} gfns onto the frame of {source_pages:>8,}: {merge_s * 1000:>8.2f} ms")


def random_walk() -> None:
    """A million calls on eight domains of 4,096 pages, with an audit every 10,000."""
    calls, audit_every, domains, pages = 1_000_000, 10_000, 8, 4096
    hypervisor = EmbeddedHypervisor()
    domids = [hypervisor.create_domain(f"d{i}", pages) for i in range(domains)]
    rng = np.random.default_rng(1)
    kinds = rng.choice(5, calls, p=(0.35, 0.25, 0.25, 0.1, 0.05)).tolist()
    picks = [[DomId(domid) for domid in rng.choice(domids, calls).tolist()] for _ in range(2)]
    places = [[Gfn(gfn) for gfn in rng.integers(0, pages, calls).tolist()] for _ in range(2)]
    handles: list[tuple[DomId, Gfn, Handle]] = []
    audit_s = 0.0
    refused = 0
    start = time.perf_counter()
    for call, (kind, domid, other, gfn, place) in enumerate(zip(kinds, *picks, *places, strict=True)):
        try:
            if kind == 0:
                handles.append((domid, gfn, hypervisor.nominate_gfn(domid, gfn)))
            elif kind == 1 and len(handles) > 1:
                hypervisor.share_gfns(*handles.pop(gfn % len(handles)), *handles.pop(place % len(handles)))
            elif kind == 2:
                hypervisor.write(domid, gfn, b"x")
            elif kind == 3:
                hypervisor.read(other, place)
            else:
                hypervisor.debug_gfn(other, place)
        except PageError:
            refused += 1
        if call % audit_every == audit_every - 1:
            before = time.perf_counter()
            assert hypervisor.audit().clean
            audit_s += time.perf_counter() - before
    walk_s = time.perf_counter() - start
    counters = hypervisor.counters()
    print(
        f"{calls:,} calls in {walk_s:.1f} s, of which {calls // audit_every} audits {audit_s:.1f} s;"
        f" {refused:,} refused; at the end {counters.used_frames:,} shared frames, {counters.freed_pages:,} pages freed"
    )


BENCHES = (many_page_calls, one_page_calls, merge_groups, random_walk, metadata, audit)
