"""Sharing sessions on the embedded hypervisor: exact figures, races, limits, and what is left behind (nothing)."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from memshr.content.fingerprint import Fingerprinting, FingerprintPages, Fingerprints
from memshr.embedded import EmbeddedHypervisor
from memshr.errors import ConnectionLostError, InvariantError, MemshrError
from memshr.hypervisor import Capability
from memshr.sharing.result import REASONS_TO_DROP, REASONS_TO_KEEP, DomainReport, SharingReport
from memshr.sharing.session import SharingOptions, SharingProgress, share
from memshr.trust import Group
from memshr.types import (
    HUGE_PAGE_PAGES,
    PAGE_SIZE,
    DomId,
    Extent,
    Gfn,
    Handle,
    Handles,
    PageArray,
    PageBytes,
    Statuses,
)

Contents = dict[DomId, dict[Gfn, bytes]]


# -- a host whose guests interfere -----------------------------------------------------------------------------------


class BusyHost(EmbeddedHypervisor):
    """The embedded hypervisor, with something happening just before or after chosen calls."""

    def __init__(self, *, limit_pages: int | None = None) -> None:
        super().__init__(limit_pages=limit_pages)
        self.before: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self.after: dict[str, list[Callable[[], None]]] = defaultdict(list)
        self.without: set[Capability] = set()
        self.extra: set[Capability] = set()
        self.answers: dict[str, list[int]] = defaultdict(list)

    @property
    def capabilities(self) -> frozenset[Capability]:
        return (super().capabilities - self.without) | self.extra

    @contextmanager
    def _around(self, call: str) -> Iterator[None]:
        for happens in (self.before, self.after):
            if happens is self.after:
                yield
            if happens[call]:
                happens[call].pop(0)()

    def read_range(self, domid: DomId, first: Gfn, count: int, buffer: PageBytes) -> PageBytes:
        with self._around("read_range"):
            return super().read_range(domid, first, count, buffer)

    def read_pages(self, pages: PageArray, out: PageBytes) -> Statuses:
        with self._around("read_pages"):
            return super().read_pages(pages, out)

    def nominate_gfn(self, domid: DomId, gfn: Gfn) -> Handle:
        with self._around("nominate_gfn"):
            return super().nominate_gfn(domid, gfn)

    def nominate_gfns(self, pages: PageArray) -> tuple[Handles, Statuses]:
        with self._around("nominate_gfns"):
            forced = self.answers.pop("nominate_gfns", [])
            handles, statuses = super().nominate_gfns(pages[slice(len(forced), None)])
            zeros = np.zeros(len(forced), np.uint64)
            return np.concatenate([zeros, handles]), np.concatenate([np.array(forced, np.int32), statuses])

    def debug_gfns(self, pages: PageArray) -> NDArray[np.int64]:
        with self._around("debug_gfns"):
            return super().debug_gfns(pages)

    def unshare_gfn(self, domid: DomId, gfn: Gfn) -> None:
        with self._around("unshare_gfn"):
            super().unshare_gfn(domid, gfn)

    def unshare_gfns(self, pages: PageArray) -> Statuses:
        with self._around("unshare_gfns"):
            return super().unshare_gfns(pages)

    def share_gfns_many(
        self, sources: PageArray, source_handles: Handles, clients: PageArray, client_handles: Handles
    ) -> Statuses:
        with self._around("share_gfns_many"):
            if (forced := self.answers.pop("share_gfns_many", None)) is not None:
                return np.array([*forced, *[forced[-1]] * (len(sources) - len(forced))], np.int32)
            return super().share_gfns_many(sources, source_handles, clients, client_handles)

    def release_zero_pages(self, pages: PageArray, handles: Handles) -> Statuses:
        with self._around("release_zero_pages"):
            return super().release_zero_pages(pages, handles)


def page(number: int) -> bytes:
    """A page of its own for each number; 0 is the zero page."""
    return number.to_bytes(4, "little") * (PAGE_SIZE // 4)


def with_bits(page_: bytes, *bits: tuple[int, int]) -> bytes:
    """The page with bits flipped, each given by 64-bit word and bit."""
    words = np.frombuffer(page_, np.uint64).copy()
    for word, bit in bits:
        words[word] ^= np.uint64(1) << np.uint64(bit)
    return words.tobytes()


PALETTE = [
    page(0),
    page(1),
    page(2),
    with_bits(page(0), (511, 63)),
    with_bits(page(1), (3, 63), (4, 63)),  # has the fingerprint of page(1), whatever the seed
    with_bits(page(1), (7, 63), (100, 63)),  # and so has this
    with_bits(page(0), (3, 63), (4, 63)),
    page(3)[:-1] + b"x",
]


def add_domain(host: EmbeddedHypervisor, name: str, pages: Sequence[bytes | None]) -> DomId:
    """A domain with these contents from gfn 0 on; None is a hole."""
    extents = []
    start = 0
    while start < len(pages):
        end = start
        while end < len(pages) and pages[end] is not None:
            end += 1
        if run := [content for content in pages[start:end] if content is not None]:
            bytes_ = bytearray().join(run)
            extents.append(Extent(Gfn(start), np.frombuffer(bytes_, np.uint8).reshape(-1, PAGE_SIZE)))
        start = end + 1
    return host.create_domain(name, extents=extents)


def a_host(*domains: Sequence[int | None]) -> BusyHost:
    """A host with one domain for each list of page numbers, named A, B, C..."""
    host = BusyHost()
    for name, numbers in zip("ABCDEF", domains, strict=False):
        add_domain(host, name, [None if number is None else page(number) for number in numbers])
    return host


def contents_of(host: EmbeddedHypervisor) -> Contents:
    """What every guest reads, page by page."""
    return {
        info.domid: {
            Gfn(gfn): host.read(info.domid, Gfn(gfn))
            for first, count in host.populated_ranges(info.domid).tolist()
            for gfn in range(first, first + count)
        }
        for info in host.domains()
    }


def never(_: float) -> None:
    pytest.fail("nothing here needs two samples")


def everyone(host: EmbeddedHypervisor) -> list[Group]:
    return [Group("all", tuple(info.domid for info in host.domains()), 99)]


def each_alone(host: EmbeddedHypervisor) -> list[Group]:
    return [Group(info.name, (info.domid,), 50 + info.domid) for info in host.domains()]


def run(
    host: EmbeddedHypervisor,
    groups: Sequence[Group] | None = None,
    *,
    options: SharingOptions | None = None,
    fingerprinting: Fingerprinting | None = None,
    wait: Callable[[float], None] = never,
    clock: Callable[[], float] = lambda: 0.0,
    nothing_left_behind: bool = True,
) -> SharingReport:
    """A session; the figures of its report add up, whatever happened."""
    report = share(
        host,
        everyone(host) if groups is None else groups,
        wait=wait,
        clock=clock,
        options=options or SharingOptions(threads=1),
        fingerprinting=fingerprinting,
    )
    check_sums(report)
    assert host.audit().clean
    if nothing_left_behind:
        check_nothing_left_behind(host, (options or SharingOptions()).max_sharers)
    return report


def check_sums(report: SharingReport) -> None:
    """The equations that the report's docstring gives."""
    dropped = Counter({reason: report.dropped.get(reason, 0) for reason in REASONS_TO_DROP})
    kept = sum(report.dropped.get(reason, 0) for reason in REASONS_TO_KEEP)
    assert set(report.dropped) <= {*REASONS_TO_DROP, *REASONS_TO_KEEP}
    assert all(count > 0 for count in report.dropped.values())
    parts: list[SharingReport | DomainReport] = [report, *report.domains]
    for part in parts:
        out = sum(part.dropped.get(reason, 0) for reason in REASONS_TO_DROP)
        assert part.total_pages == part.absent_pages + part.zero_pages + part.unique_pages + part.shared_pages + out
    for name in ("total_pages", "absent_pages", "zero_pages", "unique_pages", "shared_pages", "intra_pages"):
        assert getattr(report, name) == sum(getattr(domain, name) for domain in report.domains), name
    assert sum((Counter(domain.dropped) for domain in report.domains), Counter()) == +dropped
    assert report.saved_pages == report.zero_pages + report.intra_pages + report.inter_pages - kept
    assert min(getattr(report, name) for name in ("unique_pages", "inter_pages", "saved_pages", "collisions")) >= 0


def check_nothing_left_behind(host: EmbeddedHypervisor, max_sharers: int = 1024) -> None:
    """The books are clean, no page is nominated without sharing its frame, and no frame has too many sharers."""
    assert host.audit().clean
    for domid, pages in contents_of(host).items():
        for gfn in pages:
            try:
                sharers = host.debug_gfn(domid, gfn)
            except MemshrError:
                continue
            assert 1 < sharers <= max_sharers, (domid, gfn)


# -- the independent count -------------------------------------------------------------------------------------------


def expected_figures(contents: Contents, groups: Sequence[Group]) -> dict[str, int]:
    """The figures, counted with dictionaries of bytes."""
    figures: Counter[str] = Counter()
    for group in groups:
        copies: dict[bytes, Counter[int]] = defaultdict(Counter)
        for domid in group.domids:
            for content in contents[domid].values():
                figures["total_pages"] += 1
                copies[content][domid] += 1
        for content, of_domain in copies.items():
            pages = sum(of_domain.values())
            if not any(content):
                figures["zero_pages"] += pages
            elif pages == 1:
                figures["unique_pages"] += 1
            else:
                figures["shared_pages"] += pages
                figures["intra_pages"] += pages - len(of_domain)
                figures["inter_pages"] += len(of_domain) - 1
    figures["saved_pages"] = figures["zero_pages"] + figures["intra_pages"] + figures["inter_pages"]
    return {name: figures[name] for name in FIGURES}


FIGURES = ("total_pages", "zero_pages", "unique_pages", "shared_pages", "intra_pages", "inter_pages", "saved_pages")


def figures_of(report: SharingReport) -> dict[str, int]:
    return {name: getattr(report, name) for name in FIGURES}


def expected_pairs(contents: Contents, groups: Sequence[Group]) -> dict[tuple[int, int], tuple[int, int]]:
    pairs: dict[tuple[int, int], tuple[int, int]] = {}
    for group in groups:
        for a, b in combinations(sorted(group.domids), 2):
            first, second = list(contents[a].values()), list(contents[b].values())
            common = {content for content in set(first) & set(second) if any(content)}
            pairs[a, b] = len(common), sum(content in common for content in first + second)
    return pairs


class Crippled:
    """Fingerprints that are hardly any: 0 for the zero page, as promised, and one of few values for any other."""

    def __init__(self, values: int) -> None:
        self.values = values

    @contextmanager
    def __call__(self, _: int) -> Iterator[FingerprintPages]:
        def fingerprint_pages(pages: PageBytes) -> Fingerprints:
            fingerprints: Fingerprints = pages[:, 0].astype(np.uint64) % np.uint64(self.values) + np.uint64(1)
            fingerprints[~pages.any(axis=1)] = 0
            return fingerprints

        yield fingerprint_pages


palette = st.integers(0, len(PALETTE) - 1)
domain_contents = st.lists(st.lists(st.one_of(st.none(), palette), max_size=14), min_size=1, max_size=4)
any_fingerprinting = st.sampled_from([None, Crippled(1), Crippled(2)])


@given(
    domain_contents,
    st.lists(st.integers(0, 2), min_size=4, max_size=4),
    any_fingerprinting,
    st.sampled_from([2, 4, 1024]),
    st.sampled_from([1, 3, 8192]),
)
def test_figures_equal_an_independent_count(
    domains: list[list[int | None]],
    membership: list[int],
    fingerprinting: Fingerprinting | None,
    batch_pages: int,
    scan_pages: int,
) -> None:
    host = BusyHost()
    members: dict[int, list[DomId]] = defaultdict(list)
    for i, pages in enumerate(domains):
        members[membership[i]].append(
            add_domain(host, f"domain{i}", [None if number is None else PALETTE[number] for number in pages])
        )
    groups = [Group(f"group{number}", tuple(domids), number) for number, domids in members.items()]
    contents = contents_of(host)

    options = SharingOptions(max_sharers=1024, batch_pages=batch_pages, scan_pages=scan_pages, threads=1)
    report = run(host, groups, options=options, fingerprinting=fingerprinting)

    assert figures_of(report) == expected_figures(contents, groups)
    assert report.dropped == {}
    assert report.stopped is None
    assert report.audit_findings == ()
    assert {pair.domids: (pair.contents, pair.pages) for pair in report.pairs} == expected_pairs(contents, groups)
    assert report.counters == host.counters()
    assert report.counters.freed_pages == report.saved_pages - report.zero_pages
    assert contents_of(host) == contents
    for group in groups:
        frames_of_group(host, group)


def frames_of_group(host: EmbeddedHypervisor, group: Group) -> None:
    """Each shared page of a group has its frame in common with pages of this group only (I10)."""
    sharers: Counter[int] = Counter()
    gfns: dict[int, int] = {}
    for domid in group.domids:
        for first, count in host.populated_ranges(domid).tolist():
            for gfn in range(first, first + count):
                try:
                    gfns_on_frame = host.debug_gfn(domid, Gfn(gfn))
                except MemshrError:
                    continue
                handle = host.nominate_gfn(domid, Gfn(gfn))
                sharers[handle] += 1
                gfns[handle] = gfns_on_frame
    assert dict(sharers) == gfns


@given(domain_contents, any_fingerprinting, st.integers(2, 5), st.sampled_from([2, 5, 1024]))
def test_a_limit_on_sharers_costs_what_the_report_says(
    domains: list[list[int | None]], fingerprinting: Fingerprinting | None, max_sharers: int, batch_pages: int
) -> None:
    host = BusyHost()
    for i, pages in enumerate(domains):
        add_domain(host, f"domain{i}", [None if number is None else PALETTE[number] for number in pages])
    contents = contents_of(host)
    options = SharingOptions(max_sharers=max_sharers, batch_pages=batch_pages, threads=1)
    report = run(host, options=options, fingerprinting=fingerprinting)
    expected = expected_figures(contents, everyone(host))
    extra = sum(
        -(-count // max_sharers) - 1
        for content, count in Counter(c for pages in contents.values() for c in pages.values()).items()
        if any(content)
    )
    assert report.dropped.get("max_sharers", 0) == extra
    assert expected.pop("saved_pages") == report.saved_pages + sum(report.dropped.values())
    assert figures_of(report) == {**expected, "saved_pages": report.saved_pages}
    assert report.counters.freed_pages == report.saved_pages - report.zero_pages
    if fingerprinting is None and batch_pages == 1024:
        assert set(report.dropped) <= {"max_sharers"} or report.collisions
    for domid, content in contents.items():
        for gfn in content:
            try:
                assert host.debug_gfn(domid, gfn) <= max_sharers
            except MemshrError:
                continue
    assert contents_of(host) == contents


@given(domain_contents, any_fingerprinting, st.sampled_from([2, 3, 5, 1024]), st.booleans(), st.sampled_from([2, 1024]))
def test_a_second_run_finds_nothing_new_and_counts_the_same(
    domains: list[list[int | None]],
    fingerprinting: Fingerprinting | None,
    max_sharers: int,
    narrow_first: bool,
    batch_pages: int,
) -> None:
    host = BusyHost()
    for i, pages in enumerate(domains):
        add_domain(host, f"domain{i}", [None if number is None else PALETTE[number] for number in pages])
    contents = contents_of(host)
    options = SharingOptions(max_sharers=max_sharers, batch_pages=batch_pages, threads=1)
    if narrow_first:  # what was shared within each domain is then joined between them
        alone = run(host, each_alone(host), options=options, fingerprinting=fingerprinting)
        assert alone.inter_pages == 0
    first = run(host, options=options, fingerprinting=fingerprinting)
    if narrow_first and max_sharers == 1024:
        assert (
            first.saved_pages + alone.zero_pages + first.dropped.get("separate_frames", 0)
            == (expected_figures(contents, everyone(host))["saved_pages"])
        )
        assert first.dropped == {}
    counters = host.counters()
    second = run(host, options=options, fingerprinting=fingerprinting)
    assert host.counters() == counters == second.counters
    assert second.saved_pages == first.saved_pages - first.zero_pages
    assert second.dropped == first.dropped
    assert (second.intra_pages, second.inter_pages) == (first.intra_pages, first.inter_pages)
    assert second.absent_pages == first.absent_pages + first.zero_pages
    assert second.zero_pages == 0
    assert second.pairs == first.pairs
    assert contents_of(host) == contents


def test_a_second_run_nominates_nothing_for_the_page_that_full_frames_leave_over() -> None:
    host = a_host([1, 1, 1, 1, 1, 2], [1, 1, 1, 1, 3, 2])
    options = SharingOptions(max_sharers=4)
    first = run(host, options=options)

    def nominated() -> None:
        raise AssertionError("nominated")

    host.before["nominate_gfns"] = host.before["nominate_gfn"] = [nominated]
    second = run(host, options=options)
    assert second == first
    assert second.dropped == {"max_sharers": 2}
    assert second.counters.freed_pages == 7


def test_a_second_run_nominates_nothing_even_if_pages_collide() -> None:
    host = a_host([1, 2, 3, 1, 1], [4, 2, 5, 3, 1])
    crippled = Crippled(1)
    first = run(host, fingerprinting=crippled)

    def nominated() -> None:
        raise AssertionError("nominated")

    host.before["nominate_gfns"] = host.before["nominate_gfn"] = [nominated]
    second = run(host, fingerprinting=crippled)
    assert second == first
    assert second.collisions == 6
    assert contents_of(host) == contents_of(a_host([1, 2, 3, 1, 1], [4, 2, 5, 3, 1]))


def test_a_page_that_is_written_before_the_second_look_is_volatile() -> None:
    class WrittenHost(BusyHost):
        written = False

        def huge(self, pages: PageArray) -> NDArray[np.bool_]:
            if self.written:  # after the scan, and before anything else
                self.write(DomId(1), Gfn(2), b"\2")
            return super().huge(pages)

    host = WrittenHost()
    add_domain(host, "A", [page(1), page(1), page(3), page(5)])
    host.extra = {Capability.LIVE}
    crippled = Crippled(2)
    first = run(host, wait=lambda _: None, fingerprinting=crippled)
    assert first.dropped == {}
    host.written = True
    second = run(host, fingerprinting=crippled)
    assert second.dropped == {"volatile": 1}
    assert (second.shared_pages, second.unique_pages) == (2, 1)


# -- examples --------------------------------------------------------------------------------------------------------


def test_zero_inside_and_between_are_told_apart() -> None:
    host = a_host([0, 1, 1, 1, 2, 5, None, 9], [1, 1, 2, 0, 0, 6])
    report = run(host)
    assert (report.zero_pages, report.intra_pages, report.inter_pages, report.saved_pages) == (3, 3, 2, 8)
    assert [domain.intra_pages for domain in report.domains] == [2, 1]
    assert [domain.unique_pages for domain in report.domains] == [2, 1]
    (pair,) = report.pairs
    assert (pair.names, pair.contents, pair.pages) == (("A", "B"), 2, 7)


def test_groups_do_not_share_with_each_other() -> None:
    host = a_host([1, 1], [1, 1], [1, 1])
    report = run(host, each_alone(host))
    assert (report.intra_pages, report.inter_pages) == (3, 0)
    assert report.pairs == ()
    assert [host.debug_gfn(DomId(domid), Gfn(0)) for domid in (1, 2, 3)] == [2, 2, 2]


def test_a_frame_that_another_group_is_on_is_left_alone() -> None:
    host = a_host([1], [1], [1, 1])
    run(host, [Group("ab", (DomId(1), DomId(2)), 1)])
    report = run(host, [Group("ac", (DomId(1), DomId(3)), 2)])
    assert report.dropped == {"separate_frames": 1}
    assert host.debug_gfn(DomId(1), Gfn(0)) == 2
    assert host.debug_gfn(DomId(3), Gfn(0)) == 2


def test_new_copies_go_onto_the_frame_that_is_there() -> None:
    host = a_host([1, 1, 8], [8, 8])
    run(host)
    late = add_domain(host, "C", [page(1), page(8), page(8)])
    report = run(host)
    assert report.dropped == {}
    assert host.counters().used_frames == 2
    assert host.debug_gfn(late, Gfn(0)) == 3
    assert host.debug_gfn(late, Gfn(1)) == 5


def test_a_domain_that_joins_costs_no_call_for_each_frame() -> None:
    class CountingHost(EmbeddedHypervisor):
        asked = 0

        def debug_gfn(self, domid: DomId, gfn: Gfn) -> int:
            self.asked += 1
            return super().debug_gfn(domid, gfn)

    host = CountingHost()
    for name in ("A", "B"):
        add_domain(host, name, [page(seed) for seed in range(1, 301)])
    run(host)
    add_domain(host, "C", [page(seed) for seed in range(1, 302)])
    host.asked = 0
    report = run(host, nothing_left_behind=False)
    assert (report.shared_pages, report.counters.used_frames) == (900, 300)
    assert host.asked <= 16, "one page that is not shared is looked for, and nothing else"


def test_a_frame_of_several_domains_leads_and_takes_those_of_one() -> None:
    host = a_host([1, 1, 1], [1, 1], [1])
    run(host, [Group("a", (DomId(1),), 1), Group("bc", (DomId(2), DomId(3)), 2)])
    assert host.counters().used_frames == 2
    report = run(host)
    assert (host.counters().used_frames, report.dropped) == (1, {})


def test_frames_of_several_domains_are_not_joined() -> None:
    host = a_host([1], [1], [1], [1])
    run(host, [Group("ab", (DomId(1), DomId(2)), 1), Group("cd", (DomId(3), DomId(4)), 2)])
    report = run(host)
    assert report.dropped == {"separate_frames": 1}
    assert (report.inter_pages, report.saved_pages) == (3, 2)


def test_huge_pages_are_split_only_where_it_pays() -> None:
    class HugeHost(BusyHost):
        def huge(self, pages: PageArray) -> NDArray[np.bool_]:
            return np.asarray(pages.gfns < 1024)  # the first two huge pages

    def filled() -> HugeHost:
        host = HugeHost()
        for number, name in enumerate("AB"):
            contents = [page(1000 + 2000 * number + gfn) for gfn in range(1024 + 8)]
            # Of each guest a zero page and one other in the first huge page, four in the second, two outside.
            for content, gfn in enumerate((1, 2, 600, 601, 602, 603, 1024, 1025)):
                contents[gfn] = page(content)
            add_domain(host, name, contents)
        return host

    outcomes = {
        limit: run(filled(), options=SharingOptions(huge_page_pages=limit, threads=1)) for limit in (0, 2, 3, 513)
    }
    saved = {limit: report.saved_pages for limit, report in outcomes.items()}
    assert saved == {0: 9, 2: 9, 3: 6, 513: 2}
    spared = {limit: report.dropped.get("huge_page", 0) for limit, report in outcomes.items()}
    assert spared == {0: 0, 2: 0, 3: 4, 513: 12}


def test_pages_on_frames_are_no_reason_to_split_a_huge_page() -> None:
    """They have their saving already: of each guest's huge page only what a split would gain is counted."""

    class HugeHost(BusyHost):
        def huge(self, pages: PageArray) -> NDArray[np.bool_]:
            return np.asarray(pages.gfns < HUGE_PAGE_PAGES)

    host = HugeHost()
    for number, name in enumerate("AB"):
        contents = [page(1000 + 2000 * number + gfn) for gfn in range(HUGE_PAGE_PAGES)]
        contents[1:4] = [page(1)] * 3
        add_domain(host, name, contents)
    first = run(host, options=SharingOptions(huge_page_pages=0, threads=1))
    assert first.saved_pages == 5
    for domid in (1, 2):
        host.write(DomId(domid), Gfn(10), page(2))
    spared = run(host, options=SharingOptions(huge_page_pages=2, threads=1))
    assert (spared.saved_pages, spared.dropped) == (5, {"huge_page": 2})
    split = run(host, options=SharingOptions(huge_page_pages=1, threads=1))
    assert (split.saved_pages, split.dropped) == (6, {})


def test_joining_frames_respects_the_limit() -> None:
    host = a_host([1, 1, 1], [1, 1, 1], [1])
    run(host, each_alone(host))
    report = run(host, options=SharingOptions(max_sharers=4, threads=1))
    assert [host.debug_gfn(DomId(domid), Gfn(0)) for domid in (1, 2, 3)] == [4, 3, 4]
    assert report.dropped == {"max_sharers": 1}


def test_without_zero_capability_zero_pages_share_a_frame_like_others() -> None:
    host = a_host([0, 0, 1], [0, 1])
    host.without = {Capability.ZERO}
    report = run(host)
    assert (report.zero_pages, report.inter_pages, report.saved_pages) == (3, 1, 3)
    assert report.dropped == {"zero_frames": 1}
    assert host.counters().freed_pages == 3
    lone = a_host([0, 1], [2])
    lone.without = {Capability.ZERO}
    report = run(lone)
    assert (report.zero_pages, report.saved_pages, report.dropped) == (1, 0, {"zero_frames": 1})


def test_pages_with_equal_fingerprints_find_their_partners() -> None:
    host = BusyHost()
    alike = [with_bits(page(1), (word, 63), (word + 1, 63)) for word in range(0, 40, 2)]
    add_domain(host, "A", alike * 2)
    add_domain(host, "B", [*alike[:5], page(1)])
    report = run(host)
    assert (report.intra_pages, report.inter_pages, report.unique_pages) == (20, 5, 1)
    assert report.collisions > 0
    assert report.dropped == {}


def test_scattered_pages_are_read_in_one_call() -> None:
    host = a_host([7, None] * 200)
    calls: list[str] = []
    host.before["read_range"] = [lambda: calls.append("run by run")] * 400
    assert run(host).intra_pages == 199
    assert calls == []


def test_progress_goes_up_to_the_end_of_each_phase() -> None:
    host = a_host([0, 1, 1, 2] * 4, [1, 3])
    seen: list[SharingProgress] = []
    options = SharingOptions(scan_pages=4, batch_pages=4, max_sharers=2, threads=1)
    share(host, everyone(host), wait=never, options=options, progress=seen.append)
    phases = dict.fromkeys(progress.phase for progress in seen)
    assert list(phases) == ["scan", "zero pages", "share"]
    for phase in phases:
        done = [progress.done_pages for progress in seen if progress.phase == phase]
        assert done == sorted(done)
        assert done[-1] == next(progress.total_pages for progress in seen if progress.phase == phase)


def test_no_domains_and_empty_domains() -> None:
    assert run(BusyHost(), []).total_pages == 0
    host = a_host([], [1])
    report = run(host)
    assert (report.total_pages, report.unique_pages) == (1, 1)


def test_json_is_plain_and_its_keys_are_stable() -> None:
    report = run(a_host([1, 1], [1])).to_dict()
    assert list(report) == [
        *("total_pages", "absent_pages", "zero_pages", "unique_pages", "shared_pages", "intra_pages", "inter_pages"),
        *("saved_pages", "counters", "audit_findings", "domains", "pairs", "dropped", "collisions", "stopped"),
        *("left_out", "audit_unchecked"),
    ]
    assert report["counters"] == {"freed_pages": 2, "used_frames": 1}
    assert list(report["domains"][0]) == [
        *("domid", "name", "group", "total_pages", "absent_pages", "zero_pages", "unique_pages", "shared_pages"),
        *("intra_pages", "dropped"),
    ]
    assert report["pairs"] == [{"domids": [1, 2], "names": ["A", "B"], "group": "all", "contents": 1, "pages": 3}]


@pytest.mark.parametrize("options", [{"max_sharers": 1}, {"batch_pages": 1}, {"scan_pages": 0}])
def test_senseless_options_are_refused(options: dict[str, int]) -> None:
    with pytest.raises(MemshrError):
        SharingOptions(**options)


# -- guests that write, and other accidents --------------------------------------------------------------------------


def writing(host: EmbeddedHypervisor, domid: int, gfn: int, content: bytes = b"new") -> Callable[[], None]:
    return lambda: host.write(DomId(domid), Gfn(gfn), content)


def test_a_page_written_between_read_and_share_is_not_shared() -> None:
    host = a_host([1, 1, 1], [1])
    host.after["read_pages"] = [writing(host, 1, 1)]
    report = run(host)
    assert report.dropped == {"written": 1}
    assert (report.intra_pages, report.inter_pages, report.saved_pages) == (1, 1, 2)
    assert host.read(DomId(1), Gfn(1)) == b"new" + page(1)[3:]
    assert host.read(DomId(1), Gfn(0)) == page(1)


def test_a_page_written_between_nominate_and_read_is_not_shared() -> None:
    host = a_host([1, 1, 2, 2])
    host.after["nominate_gfns"] = [writing(host, 1, 1)]
    report = run(host)
    assert report.intra_pages == 1
    assert report.saved_pages == 1
    assert host.read(DomId(1), Gfn(1)) == b"new" + page(1)[3:]


@pytest.mark.parametrize("written", [[0], [0, 1], [0, 1, 2], [0, 2]])
def test_if_the_leader_is_written_the_others_share_without_it(written: list[int]) -> None:
    host = a_host([1, 1, 1, 1])

    def write_all() -> None:
        for gfn in written:
            host.write(DomId(1), Gfn(gfn), b"new")

    host.after["read_pages"] = [write_all]
    report = run(host)
    assert report.dropped == {"written": len(written)}
    left = 4 - len(written)
    assert report.saved_pages == max(left - 1, 0)
    assert host.counters().freed_pages == max(left - 1, 0)


def test_a_leader_written_after_it_was_shared_hands_over_to_its_fellows() -> None:
    host = a_host([1] * 6)
    host.after["read_pages"] = [writing(host, 1, 0), writing(host, 1, 1)]
    host.after["share_gfns_many"] = [writing(host, 1, 1)]
    report = run(host)
    # 0 was written before, 1 led the second attempt; when it was written the others stayed on its frame
    assert report.dropped["written"] >= 1
    assert host.debug_gfn(DomId(1), Gfn(5)) == host.counters().freed_pages + 1


def test_a_zero_page_written_at_any_moment_keeps_what_was_written() -> None:
    for call in ("nominate_gfns", "read_pages", "release_zero_pages"):
        for happens in ("before", "after"):
            host = a_host([0, 0, 5])
            getattr(host, happens)[call] = [writing(host, 1, 1)]
            report = run(host)
            late = (call, happens) == ("release_zero_pages", "after")
            assert report.zero_pages == (2 if late else 1)
            assert report.dropped == ({} if late else {"written": 1})
            assert host.read(DomId(1), Gfn(1)) == b"new" + page(0)[3:]


@given(
    st.lists(st.lists(palette, min_size=1, max_size=10), min_size=1, max_size=3),
    st.lists(
        st.tuples(
            st.sampled_from(["before", "after"]),
            st.sampled_from(["read_range", "nominate_gfns", "read_pages", "share_gfns_many", "release_zero_pages"]),
            st.integers(0, 2),
            st.integers(0, 9),
            palette,
        ),
        max_size=8,
    ),
    st.booleans(),
    st.sampled_from([2, 3, 1024]),
    st.booleans(),
)
def test_whatever_is_written_when_each_guest_reads_what_it_wrote_last(
    domains: list[list[int]],
    writes: list[tuple[str, str, int, int, int]],
    live: bool,
    batch_pages: int,
    twice: bool,
) -> None:
    host = BusyHost()
    if live:
        host.extra = {Capability.LIVE}
    for i, pages in enumerate(domains):
        add_domain(host, f"domain{i}", [None if number is None else PALETTE[number] for number in pages])
    expected = contents_of(host)

    def write(domid: DomId, gfn: Gfn, content: bytes) -> None:
        host.write(domid, gfn, content)
        expected[domid][gfn] = content

    for when, call, domain, gfn, content in writes:
        domid = DomId(domain % len(domains) + 1)
        place = Gfn(gfn % len(expected[domid]))
        getattr(host, when)[call].append(
            lambda domid=domid, place=place, content=content: write(domid, place, PALETTE[content])
        )
    options = SharingOptions(max_sharers=4, batch_pages=batch_pages, threads=1)
    # a write after the share may leave a frame to its last sharer, so a page alone on its frame means nothing here
    report = run(host, options=options, wait=lambda _: None, nothing_left_behind=not writes)
    assert contents_of(host) == expected
    if twice:
        report = run(host, options=options, wait=lambda _: None, nothing_left_behind=not writes)
    assert contents_of(host) == expected
    assert report.counters == host.counters()


def test_two_samples_drop_what_changes_between_them() -> None:
    host = a_host([1, 1, 1, 2, 2, 5], [1, 2])
    host.extra = {Capability.LIVE}
    waited: list[float] = []

    def wait(seconds: float) -> None:
        waited.append(seconds)
        for gfn in (1, 3):
            host.write(DomId(1), Gfn(gfn), b"new")

    report = run(host, options=SharingOptions(sample_interval_s=7, threads=1), wait=wait)
    assert waited == [7]
    assert report.dropped == {"volatile": 2}
    assert (report.intra_pages, report.inter_pages) == (1, 2)


def test_zero_pages_are_given_back_while_others_wait_for_their_second_sample() -> None:
    host = a_host([0, 0, 1, 1])
    host.extra = {Capability.LIVE}
    now = [100.0]

    def passing(seconds: float) -> Callable[[], None]:
        def pass_() -> None:
            now[0] += seconds

        return pass_

    def wait(seconds: float) -> None:
        assert seconds == 4, "giving back took 3 of them"
        host.write(DomId(1), Gfn(0), b"new")
        now[0] += seconds

    host.after["release_zero_pages"] = [passing(3)]
    options = SharingOptions(sample_interval_s=7, threads=1)
    report = run(host, options=options, wait=wait, clock=lambda: now[0])
    assert (report.zero_pages, report.intra_pages, report.dropped) == (2, 1, {})

    host = a_host([0, 1, 1])
    host.extra = {Capability.LIVE}
    host.after["release_zero_pages"] = [passing(8)]
    assert run(host, options=options, clock=lambda: now[0]).saved_pages == 2, "waits although there was enough to do"


def test_without_zero_capability_zero_pages_are_sampled_twice_like_others() -> None:
    host = a_host([0, 0, 0, 5])
    host.extra, host.without = {Capability.LIVE}, {Capability.ZERO}
    report = run(host, wait=lambda _: host.write(DomId(1), Gfn(1), b"new"))
    assert (report.zero_pages, report.dropped) == (2, {"volatile": 1, "zero_frames": 1})


def test_nothing_to_share_needs_no_second_sample() -> None:
    host = a_host([1, 2, 3])
    host.extra = {Capability.LIVE}
    assert run(host).unique_pages == 3


def test_a_busy_page_is_counted_and_the_others_share() -> None:
    host = a_host([1, 1, 1])
    mapping = host.map_foreign(DomId(1), Gfn(0), writable=False)
    report = run(host)
    assert (report.dropped, report.saved_pages) == ({"busy": 1}, 1)
    mapping.close()
    report = run(host)
    assert (report.dropped, report.saved_pages, host.counters().used_frames) == ({}, 2, 1)


@pytest.mark.parametrize("when", ["read_range", "nominate_gfns", "read_pages"])
def test_a_page_that_goes_away_is_counted(when: str) -> None:
    host = a_host([1] * 200)
    host.before[when] = [lambda: host.decrease_reservation(DomId(1), Gfn(5))]
    report = run(host)
    assert report.dropped == {"not_sharable": 1}
    assert report.saved_pages == 198


@pytest.mark.parametrize("happens", ["before", "after"])
@pytest.mark.parametrize("call", ["read_range", "nominate_gfns", "read_pages", "share_gfns_many"])
@pytest.mark.parametrize("domid", [1, 2])
def test_a_domain_that_goes_away_is_skipped(call: str, happens: str, domid: int) -> None:
    host = a_host([1, 1, 2, 0], [1, 2, 2, 1], [1, 1])
    getattr(host, happens)[call] = [lambda: host.destroy_domain(DomId(domid))]
    at_last = (call, happens) == ("share_gfns_many", "after")  # the session has no call left to notice it by
    report = run(host, nothing_left_behind=not at_last)
    assert {info.domid for info in host.domains()} == {1, 2, 3} - {domid}
    if not at_last:
        assert report.dropped == {"domain_gone": 4}
        assert report.counters.freed_pages == report.saved_pages - report.zero_pages
        left = contents_of(host)
        groups = [Group("rest", tuple(left), 1)]
        expected = expected_figures(left, groups)
        expected["zero_pages"], expected["saved_pages"] = report.zero_pages, report.saved_pages
        expected["total_pages"] = report.total_pages
        assert figures_of(report) == expected


def test_a_domain_that_is_not_there_is_named() -> None:
    host = a_host([1, 1])
    report = run(host, [Group("g", (DomId(1), DomId(77)), 1)])
    assert report.saved_pages == 1
    assert [domain.domid for domain in report.domains] == [1, 77]


@pytest.mark.parametrize("call", ["nominate_gfns", "share_gfns_many"])
def test_without_memory_the_session_stops_and_says_what_was_left(call: str) -> None:
    host = a_host([1, 1, 2, 2, 3, 3], [1, 0])
    host.without = {Capability.ZERO}
    host.answers[call] = [-12]
    options = SharingOptions(max_sharers=2, batch_pages=2, threads=1)
    report = run(host, each_alone(host), options=options)
    assert report.stopped is not None
    assert "no memory" in report.stopped
    assert "\n" not in report.stopped
    assert report.dropped["no_memory"] >= 4
    assert report.domains[1].dropped == {"no_memory": 2}
    later = run(host, each_alone(host), options=options)
    assert (later.stopped, later.saved_pages) == (None, 3)


def test_without_memory_for_zero_pages_the_session_stops() -> None:
    host = a_host([0, 0, 1, 1])
    host.answers["nominate_gfns"] = [-12]
    report = run(host)
    assert report.stopped is not None
    assert report.dropped == {"no_memory": 3}
    assert report.zero_pages == 1


def test_refusals_of_other_kinds_are_counted() -> None:
    host = a_host([1, 1, 2, 2])
    host.answers["nominate_gfns"] = [-95]
    assert run(host).dropped == {"refused": 1}
    host = a_host([1, 1, 2, 2])
    host.answers["share_gfns_many"] = [-22]
    assert run(host).dropped == {"refused": 2}


def failing(error: type[BaseException]) -> Callable[[], None]:
    def fail() -> None:
        raise error("stop")

    return fail


BREAKS = [KeyboardInterrupt, SystemExit, ConnectionLostError]


@pytest.mark.parametrize("call", ["nominate_gfns", "read_pages", "share_gfns_many", "release_zero_pages"])
@pytest.mark.parametrize("happens", ["before", "after"])
@pytest.mark.parametrize("error", BREAKS)
def test_when_the_session_breaks_off_no_page_stays_nominated(
    call: str, happens: str, error: type[BaseException]
) -> None:
    host = a_host([0, 0, 1, 1, 2, 2], [7])
    contents = contents_of(host)
    getattr(host, happens)[call] = [failing(error)]
    with pytest.raises(error):
        share(host, everyone(host), wait=never, options=SharingOptions(threads=1))
    check_nothing_left_behind(host)
    assert contents_of(host) == contents


def a_host_where_new_handles_are_looked_for() -> BusyHost:
    """Something is shared on it already, and it does not tell which pages are on frames: so the session probes."""
    host = a_host([0, 0, 1, 1, 2, 2], [7])
    run(host)
    add_domain(host, "L", [page(1), page(9), page(9)])
    host.without = {Capability.FRAMES}
    return host


@pytest.mark.parametrize("call", ["nominate_gfn", "unshare_gfn", "nominate_gfns", "share_gfns_many", "unshare_gfns"])
@pytest.mark.parametrize("happens", ["before", "after"])
@pytest.mark.parametrize("error", BREAKS)
def test_the_page_by_which_new_handles_are_found_does_not_stay_nominated(
    call: str, happens: str, error: type[BaseException]
) -> None:
    host = a_host_where_new_handles_are_looked_for()
    contents = contents_of(host)
    getattr(host, happens)[call] = [failing(error)]
    if call == "unshare_gfns":
        host.after["read_pages"] = [writing(host, 3, 2, page(8))]  # its partner is left alone: taken back
        contents[DomId(3)][Gfn(2)] = page(8)
    with pytest.raises(error):
        share(host, everyone(host), wait=never, options=SharingOptions(threads=1))
    check_nothing_left_behind(host)
    assert contents_of(host) == contents


@pytest.mark.parametrize("call", ["nominate_gfns", "nominate_gfn", "share_gfns_many"])
@pytest.mark.parametrize("again", ["debug_gfns", "unshare_gfns"])
@pytest.mark.parametrize("happens", ["before", "after"])
def test_taking_back_goes_on_when_it_is_interrupted_itself(call: str, again: str, happens: str) -> None:
    host = a_host_where_new_handles_are_looked_for()

    def fail() -> None:
        getattr(host, happens)[again] = [failing(SystemExit)]
        raise KeyboardInterrupt

    host.before["share_gfns_many"] = [fail] if call == "share_gfns_many" else []
    host.after[call] += [fail] if call != "share_gfns_many" else []
    with pytest.raises(KeyboardInterrupt):
        share(host, everyone(host), wait=never, options=SharingOptions(threads=1))
    assert not getattr(host, happens)[again], "it was interrupted"
    check_nothing_left_behind(host)


def test_an_interrupt_in_the_middle_of_nominating_leaves_nothing_nominated() -> None:
    host = a_host([1, 1, 2, 2])

    def some_and_no_more() -> None:
        EmbeddedHypervisor.nominate_gfn(host, DomId(1), Gfn(0))
        EmbeddedHypervisor.nominate_gfn(host, DomId(1), Gfn(2))
        raise SystemExit

    host.before["nominate_gfns"] = [some_and_no_more]
    with pytest.raises(SystemExit):
        share(host, everyone(host), wait=never, options=SharingOptions(threads=1))
    check_nothing_left_behind(host)


def test_what_somebody_else_has_nominated_stays_so_when_the_session_breaks_off() -> None:
    host = a_host([0, 0, 1, 1, 2, 2], [7, 5])
    run(host)
    add_domain(host, "L", [page(1), page(9), page(9), page(5)])
    host.without = {Capability.FRAMES}
    handle = EmbeddedHypervisor.nominate_gfn(host, DomId(2), Gfn(1))
    host.after["nominate_gfns"] = [failing(KeyboardInterrupt)]
    with pytest.raises(KeyboardInterrupt):
        share(host, everyone(host), wait=never, options=SharingOptions(threads=1))
    assert host.debug_gfn(DomId(2), Gfn(1)) == 1
    assert EmbeddedHypervisor.nominate_gfn(host, DomId(2), Gfn(1)) == handle
    host.unshare_gfn(DomId(2), Gfn(1))
    check_nothing_left_behind(host)


def test_a_contradiction_found_while_taking_back_is_not_hidden() -> None:
    host = a_host([1, 1])
    host.after["nominate_gfns"] = [failing(KeyboardInterrupt)]
    host.before["debug_gfns"] = [failing(InvariantError)]
    with pytest.raises(InvariantError):
        share(host, everyone(host), wait=never, options=SharingOptions(threads=1))
