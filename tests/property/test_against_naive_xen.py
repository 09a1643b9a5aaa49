"""The embedded hypervisor and the naive one do the same calls, and must give the same answers: statuses, handles,
counters, page counts, types, contents, events. After each step both judges look: audit, and what is where.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

import naive_xen
from memshr import errors
from memshr.embedded import EmbeddedHypervisor, ForeignMapping
from memshr.types import PAGE_SIZE, DomainKind, DomId, Gfn, GrantRef, Handle, P2mType, PageArray
from naive_xen import CLIENT, EITHER, SOURCE, Frame, NaiveXen

LIMIT_PAGES = 22
PAGES = 5
TYPES = {
    P2mType.HOLE: naive_xen.HOLE,
    P2mType.RAM_RW: naive_xen.RW,
    P2mType.RAM_RO: naive_xen.RO,
    P2mType.RAM_SHARED: naive_xen.SHARED,
    P2mType.RAM_LOGDIRTY: naive_xen.LOGDIRTY,
    P2mType.MMIO_DM: naive_xen.MMIO,
    P2mType.GRANT_FRAME: naive_xen.GRANT,
    P2mType.RAM_POD: naive_xen.POD,
}
FAR = (1 << 36) - 1

living = st.integers(1, 3).map(DomId)  # those that there are from the start, while nobody destroys them
domids = st.one_of(living, living, living, st.integers(0, 7).map(DomId))
near_gfns = st.integers(0, PAGES).map(Gfn)
gfns = st.one_of(near_gfns, near_gfns, near_gfns, st.sampled_from([FAR, 1 << 36, -1]).map(Gfn))
refs = st.sampled_from([8, 9, 8, 9, 511, 512, -1]).map(GrantRef)
twists = st.sampled_from([0, 0, 0, 0, 1, -1, 1 << 63])
"""What is added to the right handle of a page."""


def answer(call: Callable[[], object]) -> int:
    """What a call answers, as a number."""
    try:
        value = call()
    except errors.CallError as error:
        return int(error.status)
    return int(value) if isinstance(value, int) else 0


class Twins(RuleBasedStateMachine):
    """Both hosts; every rule does one call on each."""

    def __init__(self) -> None:
        super().__init__()
        self.embedded = EmbeddedHypervisor(limit_pages=LIMIT_PAGES)
        self.naive = NaiveXen(LIMIT_PAGES)
        self.held: list[tuple[ForeignMapping, Frame]] = []

    def same(self, call: Callable[[], object], naive: int) -> int:
        """Both answers are equal; returns them."""
        given = answer(call)
        if naive == EITHER:
            assert given in (CLIENT, SOURCE)
        else:
            assert given == naive
        return given

    def handle(self, domid: int, gfn: int, twist: int) -> Handle:
        """The handle of a page, or something near it."""
        domain = self.naive.domains.get(domid)
        frame = domain.page(gfn).frame if domain else None
        return Handle(max((frame.handle if frame else 0) + twist, 0))

    # -- domains -----------------------------------------------------------------------------------------------------

    @initialize()
    def begin(self) -> None:
        for _ in range(3):
            self.create(pages=4, slack=1, kind=DomainKind.HVM, vcpus=1)

    @rule(
        pages=st.integers(0, 4),
        slack=st.integers(-1, 2),
        kind=st.sampled_from([*[DomainKind.HVM] * 4, DomainKind.PV, DomainKind.SHADOW]),
        vcpus=st.sampled_from([1, 1, 1, 2]),
    )
    def create(self, pages: int, slack: int, kind: DomainKind, vcpus: int) -> None:
        max_pages = max(pages + slack, 0)
        try:
            domid = self.embedded.create_domain("d", pages, max_pages=max_pages, kind=kind, vcpus=vcpus)
        except errors.HostMemoryError:
            assert self.naive.create(0, pages, max_pages, kind, vcpus) < 0
            return
        assert self.naive.create(domid, pages, max_pages, kind, vcpus) == 0

    @rule(domid=st.integers(1, 9).map(DomId))
    def destroy(self, domid: DomId) -> None:
        self.same(lambda: self.embedded.destroy_domain(domid), self.naive.destroy(domid))

    @rule(domid=domids)
    def pause(self, domid: DomId) -> None:
        self.same(lambda: self.embedded.pause(domid), self.naive.pause(domid))

    @rule(domid=domids)
    def unpause(self, domid: DomId) -> None:
        self.same(lambda: self.embedded.unpause(domid), self.naive.unpause(domid))

    @rule(domid=domids, pages=st.integers(0, 8))
    def set_max_pages(self, domid: DomId, pages: int) -> None:
        self.same(lambda: self.embedded.set_max_pages(domid, pages), self.naive.set_max_pages(domid, pages))

    # -- memory ------------------------------------------------------------------------------------------------------

    @rule(domid=domids, gfn=gfns, byte=st.integers(0, 2), vcpu=st.sampled_from([None, 0, 1]))
    def write(self, domid: DomId, gfn: Gfn, byte: int, vcpu: int | None) -> None:
        data = bytes([byte]) * PAGE_SIZE
        naive = self.naive.write(domid, gfn, data, vcpu)
        self.same(lambda: self.embedded.write(domid, gfn, data, vcpu=vcpu), naive)

    @rule(domid=domids, gfn=gfns)
    def read(self, domid: DomId, gfn: Gfn) -> None:
        status, data = self.naive.read(domid, gfn)
        found: list[bytes] = []
        self.same(lambda: found.append(self.embedded.read(domid, gfn)), status)
        if data is not None:
            assert found == [data]

    @rule(domid=domids, gfn=gfns, writable=st.booleans())
    def hold(self, domid: DomId, gfn: Gfn, writable: bool) -> None:
        status, frame = self.naive.hold(domid, gfn, write=writable)
        found: list[ForeignMapping] = []
        self.same(lambda: found.append(self.embedded.map_foreign(domid, gfn, writable=writable)), status)
        if frame is not None:
            self.held.append((found[0], frame))

    @rule(domid=domids, ref=refs, times=st.just(1))
    def hold_granted(self, domid: DomId, ref: GrantRef, times: int) -> None:
        if domid not in self.naive.domains:
            return
        gfn = self.naive._granted(domid, ref)
        for _ in range(times):
            status, frame = self.naive.hold(domid, gfn, write=False) if gfn >= 0 else (gfn, None)
            found: list[ForeignMapping] = []
            self.same(lambda found=found: found.append(self.embedded.map_grant(domid, ref, writable=False)), status)  # type: ignore[misc]  # a default that binds the value
            if frame is not None:
                self.held.append((found[0], frame))

    @rule(which=st.integers(0, 9))
    def release(self, which: int) -> None:
        if self.held:
            mapping, frame = self.held.pop(which % len(self.held))
            if frame.data is not None:
                assert mapping.read() == frame.data
            mapping.close()
            self.naive.release(frame)

    @rule(which=st.integers(0, 9), byte=st.integers(0, 2))
    def write_held(self, which: int, byte: int) -> None:
        writable = [(mapping, frame) for mapping, frame in self.held if mapping.writable]
        if writable:
            mapping, frame = writable[which % len(writable)]
            frame.data = bytes([byte]) * PAGE_SIZE
            mapping.write(frame.data)

    @rule(domid=domids, gfn=gfns)
    def populate(self, domid: DomId, gfn: Gfn) -> None:
        self.same(lambda: self.embedded.populate(domid, gfn), self.naive.populate(domid, gfn))

    @rule(domid=domids, gfn=gfns)
    def decrease_reservation(self, domid: DomId, gfn: Gfn) -> None:
        naive = self.naive.decrease_reservation(domid, gfn)
        self.same(lambda: self.embedded.decrease_reservation(domid, gfn), naive)

    @rule(domid=domids, gfn=gfns)
    def remove_from_physmap(self, domid: DomId, gfn: Gfn) -> None:
        naive = self.naive.remove_from_physmap(domid, gfn)
        self.same(lambda: self.embedded.remove_from_physmap(domid, gfn), naive)

    @rule(domid=domids, gfn=gfns, kind=st.sampled_from(P2mType))
    def set_mem_type(self, domid: DomId, gfn: Gfn, kind: P2mType) -> None:
        naive = self.naive.set_mem_type(domid, gfn, TYPES[kind])
        self.same(lambda: self.embedded.set_mem_type(domid, gfn, kind), naive)

    @rule(domid=domids, gfn=gfns)
    def map_grant_frame(self, domid: DomId, gfn: Gfn) -> None:
        self.same(lambda: self.embedded.map_grant_frame(domid, gfn), self.naive.map_grant_frame(domid, gfn))

    @rule(domid=domids, gfn=gfns)
    def modified_memory(self, domid: DomId, gfn: Gfn) -> None:
        self.same(lambda: self.embedded.modified_memory(domid, gfn), self.naive.modified_memory(domid, gfn))

    @rule(domid=domids, enable=st.booleans())
    def set_log_dirty(self, domid: DomId, enable: bool) -> None:
        self.same(lambda: self.embedded.set_log_dirty(domid, enable), self.naive.set_log_dirty(domid, enable))

    @rule(domid=domids, ref=refs, gfn=gfns.filter(lambda gfn: gfn >= 0))
    def grant(self, domid: DomId, ref: GrantRef, gfn: Gfn) -> None:
        self.same(lambda: self.embedded.grant(domid, ref, gfn), self.naive.grant(domid, ref, gfn))

    @rule(domid=domids, parameter=st.sampled_from([1, 17, 29, 29]), gfn=gfns.filter(lambda gfn: gfn >= 0))
    def set_parameter(self, domid: DomId, parameter: int, gfn: Gfn) -> None:
        naive = self.naive.set_parameter(domid, parameter, gfn)
        self.same(lambda: self.embedded.set_hvm_param(domid, parameter, gfn), naive)

    # -- sharing -----------------------------------------------------------------------------------------------------

    @rule(domid=domids, enable=st.booleans())
    def control(self, domid: DomId, enable: bool) -> None:
        self.same(lambda: self.embedded.control(domid, enable), self.naive.control(domid, enable))

    @rule(domid=domids, gfn=gfns)
    def nominate(self, domid: DomId, gfn: Gfn) -> None:
        self.same(lambda: self.embedded.nominate_gfn(domid, gfn), self.naive.nominate(domid, gfn))

    @rule(domid=domids, ref=refs)
    def nominate_gref(self, domid: DomId, ref: GrantRef) -> None:
        self.same(lambda: self.embedded.nominate_gref(domid, ref), self.naive.nominate_gref(domid, ref))

    @rule(source=domids, sgfn=gfns, client=domids, cgfn=gfns, twist=twists, other=twists)
    def share(self, source: DomId, sgfn: Gfn, client: DomId, cgfn: Gfn, twist: int, other: int) -> None:
        sh, ch = self.handle(source, sgfn, twist), self.handle(client, cgfn, other)
        naive = self.naive.share(source, sgfn, sh, client, cgfn, ch)
        self.same(lambda: self.embedded.share_gfns(source, sgfn, sh, client, cgfn, ch), naive)

    @rule(pages=st.lists(st.tuples(living, near_gfns), min_size=2, max_size=4))
    def share_a_group(self, pages: list[tuple[DomId, Gfn]]) -> None:
        for page in pages:
            self.nominate(*page)
            self.share(*pages[0], *page, 0, 0)

    @rule(domid=living, gfn=st.integers(0, 3).map(Gfn), vcpu=st.sampled_from([None, 0, 1]), ring=st.booleans())
    def write_without_room(self, domid: DomId, gfn: Gfn, vcpu: int | None, ring: bool) -> None:
        if ring:
            self.set_up_ring(domid, Gfn((gfn + 2) % 4))
        self.share_a_group([(domid, gfn), (domid, Gfn((gfn + 1) % 4))])
        domain = self.naive.domains.get(domid)
        if domain is not None:
            self.set_max_pages(domid, len(domain.owned))
            self.write(domid, gfn, 1, vcpu)

    @rule(domid=living, gfn=near_gfns, times=st.sampled_from([1, 2, 3, 3]))
    def nominate_while_held_by_grant(self, domid: DomId, gfn: Gfn, times: int) -> None:
        self.grant(domid, GrantRef(8), gfn)
        for _ in range(times):
            self.hold_granted(domid, GrantRef(8), 1)
        self.nominate_gref(domid, GrantRef(8))
        self.debug_gref(domid, GrantRef(8))
        for _ in range(times):
            self.release(-1)

    @rule(domid=living, gfn=near_gfns)
    def give_up_while_held(self, domid: DomId, gfn: Gfn) -> None:
        held = len(self.held)
        self.hold(domid, gfn, False)
        self.decrease_reservation(domid, gfn)
        if len(self.held) > held:
            self.domains_are_equal()
            self.release(-1)

    @rule(source=domids, sref=refs, client=domids, cref=refs)
    def share_grefs(self, source: DomId, sref: GrantRef, client: DomId, cref: GrantRef) -> None:
        sh, ch = (
            self.handle(domid, self.naive._granted(domid, ref) if domid in self.naive.domains else -1, 0)
            for domid, ref in ((source, sref), (client, cref))
        )
        naive = self.naive.share_grefs(source, sref, sh, client, cref, ch)
        self.same(lambda: self.embedded.share_grefs(source, sref, sh, client, cref, ch), naive)

    @rule(source=domids, sgfn=gfns, twist=twists, client=domids, cgfn=gfns)
    def add_to_physmap(self, source: DomId, sgfn: Gfn, twist: int, client: DomId, cgfn: Gfn) -> None:
        sh = self.handle(source, sgfn, twist)
        naive = self.naive.add_to_physmap(source, sgfn, sh, client, cgfn)
        self.same(lambda: self.embedded.add_to_physmap(source, sgfn, sh, client, cgfn), naive)

    @rule(source=domids, client=domids, first=st.integers(-1, PAGES), last=st.integers(-1, PAGES))
    def range_share(self, source: DomId, client: DomId, first: int, last: int) -> None:
        naive = self.naive.range_share(source, client, first, last)
        self.same(lambda: self.embedded.range_share(source, client, Gfn(first), Gfn(last)), naive)

    @rule(domid=domids, gfn=gfns)
    def unshare(self, domid: DomId, gfn: Gfn) -> None:
        self.same(lambda: self.embedded.unshare_gfn(domid, gfn), self.naive.unshare(domid, gfn))

    @rule(domid=domids, gfn=gfns)
    def debug_gfn(self, domid: DomId, gfn: Gfn) -> None:
        self.same(lambda: self.embedded.debug_gfn(domid, gfn), self.naive.debug_gfn(domid, gfn))

    @rule(domid=domids, ref=refs)
    def debug_gref(self, domid: DomId, ref: GrantRef) -> None:
        self.same(lambda: self.embedded.debug_gref(domid, ref), self.naive.debug_gref(domid, ref))

    # -- sharing, many pages -----------------------------------------------------------------------------------------

    @staticmethod
    def pages(pages: list[tuple[DomId, Gfn]]) -> PageArray:
        return PageArray(np.array([page[0] for page in pages], np.uint16), np.array([page[1] for page in pages]))

    @rule(pages=st.lists(st.tuples(domids, gfns), min_size=1, max_size=8))
    def nominate_many(self, pages: list[tuple[DomId, Gfn]]) -> None:
        handles, statuses = self.embedded.nominate_gfns(self.pages(pages))
        naive = [self.naive.nominate(*page) for page in pages]
        assert statuses.tolist() == [min(given, 0) for given in naive]
        assert handles.tolist() == [max(given, 0) for given in naive]

    @rule(rows=st.lists(st.tuples(domids, near_gfns, twists, domids, near_gfns, twists), min_size=1, max_size=8))
    def share_many(self, rows: list[tuple[DomId, Gfn, int, DomId, Gfn, int]]) -> None:
        asked = [(*row[:2], self.handle(*row[:3]), *row[3:5], self.handle(*row[3:])) for row in rows]
        statuses = self.embedded.share_gfns_many(
            self.pages([(row[0], row[1]) for row in asked]),
            np.array([row[2] for row in asked], np.uint64),
            self.pages([(row[3], row[4]) for row in asked]),
            np.array([row[5] for row in asked], np.uint64),
        )
        naive = [self.naive.share(*row) for row in asked]
        for given, expected in zip(statuses.tolist(), naive, strict=True):
            assert given == expected or (expected == EITHER and given in (CLIENT, SOURCE))

    @rule(pages=st.lists(st.tuples(domids, gfns), min_size=1, max_size=8))
    def unshare_many(self, pages: list[tuple[DomId, Gfn]]) -> None:
        statuses = self.embedded.unshare_gfns(self.pages(pages))
        assert statuses.tolist() == [self.naive.unshare(*page) for page in pages]

    @rule(pages=st.lists(st.tuples(domids, gfns, twists), min_size=1, max_size=4))
    def release_zero(self, pages: list[tuple[DomId, Gfn, int]]) -> None:
        asked = [(domid, gfn, self.handle(domid, gfn, twist)) for domid, gfn, twist in pages]
        handles = np.array([row[2] for row in asked], np.uint64)
        statuses = self.embedded.release_zero_pages(self.pages([(row[0], row[1]) for row in asked]), handles)
        assert statuses.tolist() == [self.naive.release_zero(*row) for row in asked]

    # -- events and forks --------------------------------------------------------------------------------------------

    @rule(domid=domids)
    def ring_enable(self, domid: DomId) -> None:
        naive = self.naive.ring_enable(domid)
        given = answer(lambda: self.embedded.ring_enable(domid))
        assert given == naive or (naive == 0 and given > 0)

    @rule(domid=domids, gfn=near_gfns)
    def set_up_ring(self, domid: DomId, gfn: Gfn) -> None:
        self.set_parameter(domid, 29, gfn)
        self.ring_enable(domid)

    @rule(domid=domids)
    def ring_disable(self, domid: DomId) -> None:
        self.same(lambda: self.embedded.ring_disable(domid), self.naive.ring_disable(domid))

    @rule(domid=domids, count=st.integers(0, 2), resume=st.booleans())
    def ring_respond(self, domid: DomId, count: int, resume: bool) -> None:
        self.same(lambda: self.embedded.ring_respond(domid, count), self.naive.ring_respond(domid, count))
        if resume:
            self.domain_resume(domid)

    @rule(domid=domids)
    def domain_resume(self, domid: DomId) -> None:
        self.same(lambda: self.embedded.domain_resume(domid), self.naive.domain_resume(domid))

    @rule(parent=domids, child=domids)
    def fork(self, parent: DomId, child: DomId) -> None:
        self.same(lambda: self.embedded.fork(parent, child), self.naive.fork(parent, child))

    @rule(parent=domids)
    def fork_into_a_new_domain(self, parent: DomId) -> None:
        self.create(0, 0, DomainKind.HVM, 1)
        self.fork(parent, DomId(max(self.naive.domains, default=0)))

    @rule()
    def die_while_held(self) -> None:
        self.create(2, 0, DomainKind.HVM, 1)
        newest = DomId(max(self.naive.domains, default=0))
        self.hold(newest, Gfn(0), False)
        self.destroy(newest)

    @rule(parent=living, child=living, gfn=near_gfns)
    def fork_write_hold_and_reset(self, parent: DomId, child: DomId, gfn: Gfn) -> None:
        self.pause(child)
        self.fork(parent, child)
        self.write(child, gfn, 2, None)
        self.hold(child, gfn, False)
        self.fork_reset(child, False, True)

    @rule(domid=domids, state=st.booleans(), memory=st.booleans())
    def fork_reset(self, domid: DomId, state: bool, memory: bool) -> None:
        naive = self.naive.fork_reset(domid, state=state, memory=memory)
        self.same(lambda: self.embedded.fork_reset(domid, state=state, memory=memory), naive)

    # -- the judges --------------------------------------------------------------------------------------------------

    @invariant()
    def books_are_right(self) -> None:
        report = self.embedded.audit()
        assert report.findings == ()
        assert report.xen_errors == 0
        counters = self.embedded.counters()
        assert (counters.freed_pages, counters.used_frames) == self.naive.counters()
        owned = sum(info.tot_pages for info in self.embedded.domains())
        assert self.embedded.memory.allocated_pages == owned + counters.used_frames

    @invariant()
    def domains_are_equal(self) -> None:
        infos = self.embedded.domains()
        assert [info.domid for info in infos] == sorted(self.naive.domains)
        for info in infos:
            domain = self.naive.domains[info.domid]
            assert info.tot_pages == len(domain.owned)
            assert info.shr_pages == domain.shr_pages
            assert (info.max_pages, info.pause_count) == (domain.max_pages, domain.pauses)
            assert (info.dying, self.embedded.is_crashed(info.domid)) == (domain.dying, domain.crashed)
            assert self.embedded.max_gpfn(info.domid) == max(domain.max_gfn, 0)
            assert self.embedded.ring_events(info.domid) == tuple(gfn for gfn, _ in domain.events)
            if domain.ring is not None:
                waiting = [(request.gfn, request.vcpu) for request in self.embedded.ring_requests(info.domid)]
                assert waiting == domain.events[domain.answers :]
            assert self.embedded.waiting_vcpus(info.domid) == domain.waiting

    @invariant()
    def pages_are_equal(self) -> None:
        out = np.empty((1, PAGE_SIZE), np.uint8)
        for domid, domain in self.naive.domains.items():
            ram = set()
            for gfn in {*range(PAGES + 1), *domain.pages}:
                page = domain.page(gfn)
                assert TYPES[self.embedded.mem_type(DomId(domid), Gfn(gfn))] == page.kind
                if page.kind not in naive_xen.RAM:
                    continue
                ram.add(gfn)
                assert self.embedded.read_pages(self.pages([(DomId(domid), Gfn(gfn))]), out).tolist() == [0]
                if page.frame is None:
                    assert not out.any()
                elif page.frame.data is None:
                    page.frame.data = out[0].tobytes()  # a fresh frame holds what it holds; from now on it is known
                else:
                    assert out[0].tobytes() == page.frame.data
            ranges = self.embedded.populated_ranges(DomId(domid)).tolist()
            assert {gfn for first, count in ranges for gfn in range(first, first + count)} == ram


TestTwins = Twins.TestCase
TestTwins.settings = settings(max_examples=100, stateful_step_count=40, deadline=None)
