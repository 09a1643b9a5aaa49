"""The many-page forms answer as the one-page forms do, row by row, whatever the rows are.

Two hosts are prepared alike; on one the rows are done one after the other, on the other at once. Statuses, handles,
counters, contents and page counts must be equal after it, and audit must find nothing on either.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st

from memshr import errors
from memshr.embedded import EmbeddedHypervisor
from memshr.types import PAGE_SIZE, DomainKind, DomId, Gfn, Handle, P2mType, PageArray

PAGES = 8
PLAIN, TIGHT, DISABLED, PV, DYING, FORK = map(DomId, range(1, 7))
UNKNOWN = DomId(99)

domids = st.sampled_from([PLAIN, PLAIN, TIGHT, TIGHT, DISABLED, FORK, PV, DYING, UNKNOWN, DomId(0)])
gfns = st.sampled_from([*range(PAGES), *range(PAGES), PAGES, 200, (1 << 36) - 1, 1 << 36, 1 << 50, -1]).map(Gfn)
pages = st.tuples(domids, gfns)
Page = tuple[DomId, Gfn]


def prepared(steps: list[tuple[Page, Page, str]]) -> EmbeddedHypervisor:
    """A host with a domain of each kind, and some history."""
    hypervisor = EmbeddedHypervisor(limit_pages=6 * PAGES)
    for name in ("plain", "tight", "disabled"):
        hypervisor.create_domain(name, PAGES, max_pages=PAGES + (name == "plain"))
    hypervisor.create_domain("pv", 2, kind=DomainKind.PV)
    hypervisor.create_domain("dying", 2)
    hypervisor.create_domain("fork")
    for domid in (PLAIN, TIGHT, DISABLED, DYING):
        for gfn in map(Gfn, range(PAGES if domid != DYING else 2)):
            hypervisor.write(domid, gfn, bytes([gfn % 3]) * PAGE_SIZE)
    hypervisor.map_foreign(DYING, Gfn(0), writable=False)
    hypervisor.destroy_domain(DYING)
    hypervisor.control(PLAIN, True)
    hypervisor.control(TIGHT, True)
    hypervisor.fork(PLAIN, FORK)
    for first, second, what in steps:
        try:
            apply(hypervisor, first, second, what)
        except errors.CallError:
            continue
    hypervisor.control(DISABLED, False)
    return hypervisor


def apply(hypervisor: EmbeddedHypervisor, first: Page, second: Page, what: str) -> None:
    match what:
        case "share":
            handles = hypervisor.nominate_gfn(*first), hypervisor.nominate_gfn(*second)
            hypervisor.share_gfns(*first, handles[0], *second, handles[1])
        case "nominate":
            hypervisor.nominate_gfn(*first)
        case "hold":
            hypervisor.map_foreign(*first, writable=False)
        case "read":
            hypervisor.read(*first)
        case "hole":
            hypervisor.decrease_reservation(*first)
        case "type":
            hypervisor.set_mem_type(*first, P2mType.RAM_RO)
        case "zero":
            handle = hypervisor.nominate_gfn(*first)
            hypervisor.release_zero_pages(arrays([first]), np.array([handle], np.uint64))
        case "plug":
            hypervisor.add_to_physmap(*first, hypervisor.nominate_gfn(*first), second[0], Gfn(PAGES))
        case "tighten":
            hypervisor.set_max_pages(first[0], hypervisor.domain_info(first[0]).tot_pages)


WHATS = ["share", "share", "share", "nominate", "nominate", "hold", "read", "hole", "type", "zero", "plug", "tighten"]
histories = st.lists(st.tuples(pages, pages, st.sampled_from(WHATS)), max_size=12)


def arrays(rows: list[Page]) -> PageArray:
    return PageArray(np.array([row[0] for row in rows], np.uint16), np.array([row[1] for row in rows], np.int64))


def state(hypervisor: EmbeddedHypervisor) -> list[object]:
    """Everything that can be seen from outside."""
    report = hypervisor.audit()
    assert report.findings == ()
    assert report.xen_errors == 0
    out = np.empty((PAGES + 1, PAGE_SIZE), np.uint8)
    seen: list[object] = [hypervisor.counters(), hypervisor.domains(), hypervisor.books.frames.next_handle]
    for info in hypervisor.domains():
        array = PageArray.of_domain(info.domid, np.arange(PAGES + 1))
        statuses = hypervisor.read_pages(array, out)
        seen += [statuses.tolist(), [row.tobytes() for row in out[statuses == 0]]]
        seen += [[hypervisor.mem_type(info.domid, Gfn(gfn)) for gfn in range(PAGES + 1)]]
        seen += [hypervisor.sharers(info.domid, Gfn(gfn)) for gfn in range(PAGES + 1)]
    return seen


def handle_of(hypervisor: EmbeddedHypervisor, page: Page, twist: int) -> Handle:
    """The page's own handle, or a wrong one."""
    if hypervisor.sharers(*page):
        frames = hypervisor.books.frames
        mfn = hypervisor.books.entries.get(page[0] << 36 | page[1]) >> 4
        return Handle(frames.handle.item(frames.slot_of_mfn.get(mfn)) + twist)
    return Handle(max(twist, 0))


def status_of(call: Callable[[], object]) -> int:
    try:
        call()
    except errors.CallError as error:
        return int(error.status)
    return 0


@settings(max_examples=150, deadline=None)
@given(histories, st.lists(pages, max_size=12))
def test_nominate_gfns(history: list[tuple[Page, Page, str]], rows: list[Page]) -> None:
    alone, together = prepared(history), prepared(history)
    expected: list[tuple[int, int]] = []
    for row in rows:
        try:
            expected.append((alone.nominate_gfn(*row), 0))
        except errors.CallError as error:
            expected.append((0, int(error.status)))
    handles, statuses = together.nominate_gfns(arrays(rows))
    assert list(zip(handles.tolist(), statuses.tolist(), strict=True)) == expected
    assert state(together) == state(alone)


twists = st.sampled_from([0, 0, 0, 1])
share_rows = st.lists(st.tuples(pages, twists, pages, twists), max_size=12)


@settings(max_examples=300, deadline=None)
@given(histories, share_rows, st.booleans())
def test_share_gfns_many(
    history: list[tuple[Page, Page, str]], rows: list[tuple[Page, int, Page, int]], nominated: bool
) -> None:
    alone, together = prepared(history), prepared(history)
    if nominated:
        everything = [page for row in rows for page in (row[0], row[2])]
        alone.nominate_gfns(arrays(everything))
        together.nominate_gfns(arrays(everything))
        alone.control(DISABLED, False)
        together.control(DISABLED, False)
    handles = [(handle_of(alone, row[0], row[1]), handle_of(alone, row[2], row[3])) for row in rows]
    expected = [
        status_of(lambda asked=(*row[0], pair[0], *row[2], pair[1]): alone.share_gfns(*asked))  # type: ignore[misc]  # a default that binds the value
        for row, pair in zip(rows, handles, strict=True)
    ]
    statuses = together.share_gfns_many(
        arrays([row[0] for row in rows]),
        np.array([pair[0] for pair in handles], np.uint64),
        arrays([row[2] for row in rows]),
        np.array([pair[1] for pair in handles], np.uint64),
    )
    assert statuses.tolist() == expected
    assert state(together) == state(alone)


@settings(max_examples=200, deadline=None)
@given(histories, st.lists(pages, max_size=12))
def test_unshare_gfns(history: list[tuple[Page, Page, str]], rows: list[Page]) -> None:
    alone, together = prepared(history), prepared(history)
    expected = [status_of(lambda row=row: alone.unshare_gfn(*row)) for row in rows]  # type: ignore[misc]  # a default that binds the value
    assert together.unshare_gfns(arrays(rows)).tolist() == expected
    assert state(together) == state(alone)


@settings(max_examples=100, deadline=None)
@given(histories, st.lists(st.tuples(pages, twists), max_size=8))
def test_release_zero_pages(history: list[tuple[Page, Page, str]], rows: list[tuple[Page, int]]) -> None:
    alone, together = prepared(history), prepared(history)
    handles = np.array([handle_of(alone, *row) for row in rows], np.uint64)
    expected = [
        int(alone.release_zero_pages(arrays([page]), handles[row : row + 1])[0]) for row, (page, _) in enumerate(rows)
    ]
    assert together.release_zero_pages(arrays([page for page, _ in rows]), handles).tolist() == expected
    assert state(together) == state(alone)


@settings(max_examples=60, deadline=None)
@given(histories, st.lists(pages, max_size=12))
def test_read_pages_changes_nothing(history: list[tuple[Page, Page, str]], rows: list[Page]) -> None:
    hypervisor = prepared(history)
    before = state(hypervisor)
    out = np.empty((len(rows), PAGE_SIZE), np.uint8)
    statuses = hypervisor.read_pages(arrays(rows), out).tolist()
    for row, page in enumerate(rows):
        alone = hypervisor.read_pages(arrays([page]), single := np.empty((1, PAGE_SIZE), np.uint8))
        assert alone.tolist() == [statuses[row]]
        assert statuses[row] < 0 or single[0].tobytes() == out[row].tobytes()
    assert state(hypervisor) == before
