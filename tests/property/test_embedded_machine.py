"""A state machine over the calls of the embedded hypervisor with both judges: audit, and what each guest last wrote."""

import numpy as np
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import Bundle, RuleBasedStateMachine, invariant, rule

from memshr import errors
from memshr.embedded import EmbeddedHypervisor
from memshr.testing import GuestModel
from memshr.types import PAGE_SIZE, DomId, Extent, Gfn, Handle, PageArray

PAGES = 6
gfns = st.integers(0, PAGES).map(Gfn)  # one beyond the domain: a hole, until something is put there
fillings = st.integers(0, 3)


def content(filling: int) -> bytes:
    return bytes([filling]) * PAGE_SIZE


class Embedded(RuleBasedStateMachine):
    """Guests that share only pages that they found equal, as memshr does; the machine may be short of memory."""

    handles = Bundle("handles")
    domains = Bundle("domains")

    def __init__(self) -> None:
        super().__init__()
        self.hypervisor = EmbeddedHypervisor(limit_pages=5 * PAGES)
        self.model = GuestModel()
        self.living: list[DomId] = []

    @rule(target=domains, from_image=st.booleans(), slack=st.integers(0, 2))
    def create(self, from_image: bool, slack: int) -> DomId | None:
        extents = [Extent(Gfn(0), np.zeros((PAGES, PAGE_SIZE), np.uint8))] if from_image else []
        try:
            domid = self.hypervisor.create_domain(
                "d", 0 if from_image else PAGES, max_pages=PAGES + slack, extents=extents
            )
        except errors.HostMemoryError:
            return None
        self.living.append(domid)
        self.hypervisor.control(domid, True)
        for gfn in map(Gfn, range(PAGES)):
            self.model.write(domid, gfn, self.hypervisor.read(domid, gfn))
        return domid

    @rule(domid=domains)
    def destroy(self, domid: DomId | None) -> None:
        if domid in self.living:
            self.hypervisor.destroy_domain(domid)
            self.living.remove(domid)
            self.model.forget(domid)

    @rule(domid=domains, gfn=gfns, filling=fillings, offset=st.integers(0, 1))
    def write(self, domid: DomId | None, gfn: Gfn, filling: int, offset: int) -> None:
        if domid not in self.living:
            return
        data = content(filling)[offset:]
        try:
            self.hypervisor.write(domid, gfn, data, offset)
        except errors.HostMemoryError:
            return
        except errors.NotSharableError:
            assert self.model.content(domid, gfn) is None
            return
        self.model.write(domid, gfn, data, offset)

    @rule(target=handles, domid=domains, gfn=gfns)
    def nominate(self, domid: DomId | None, gfn: Gfn) -> tuple[DomId, Gfn, Handle] | None:
        if domid not in self.living:
            return None
        try:
            return domid, gfn, self.hypervisor.nominate_gfn(domid, gfn)
        except errors.NotSharableError:
            return None

    @rule(source=handles, client=handles)
    def share(self, source: tuple[DomId, Gfn, Handle] | None, client: tuple[DomId, Gfn, Handle] | None) -> None:
        if source is None or client is None or source[0] not in self.living or client[0] not in self.living:
            return
        if self.model.content(*source[:2]) != self.model.content(*client[:2]):
            return
        before = self.hypervisor.counters()
        try:
            self.hypervisor.share_gfns(*source, *client)
        except errors.StaleHandleError:
            assert self.hypervisor.counters() == before

    @rule(pages=st.lists(st.tuples(domains, gfns), min_size=2, max_size=6))
    def share_equal_pages_at_once(self, pages: list[tuple[DomId | None, Gfn]]) -> None:
        known = [(domid, gfn) for domid, gfn in pages if domid in self.living and self.model.content(domid, gfn)]
        if not known:
            return
        array = PageArray(
            np.array([domid for domid, _ in known], np.uint16), np.array([gfn for _, gfn in known], np.int64)
        )
        handles, _ = self.hypervisor.nominate_gfns(array)
        equal = [i for i, page in enumerate(known) if self.model.content(*page) == self.model.content(*known[0])]
        rows = np.array(equal, np.intp)
        source = np.zeros(len(rows), np.intp)
        self.hypervisor.share_gfns_many(array[source], handles[source], array[rows], handles[rows])

    @rule(domid=domains, gfn=gfns)
    def unshare(self, domid: DomId | None, gfn: Gfn) -> None:
        if domid in self.living:
            self.hypervisor.unshare_gfns(PageArray.of_domain(domid, np.array([gfn], np.int64)))

    @rule(domid=domains, gfn=gfns)
    def release_zero(self, domid: DomId | None, gfn: Gfn) -> None:
        if domid in self.living and self.model.content(domid, gfn) == bytes(PAGE_SIZE):
            pages = PageArray.of_domain(domid, np.array([gfn], np.int64))
            handles, _ = self.hypervisor.nominate_gfns(pages)
            self.hypervisor.release_zero_pages(pages, handles)

    @rule(domid=domains, gfn=gfns)
    def populate(self, domid: DomId | None, gfn: Gfn) -> None:
        if domid in self.living:
            try:
                self.hypervisor.populate(domid, gfn)
            except errors.HostMemoryError:
                return
            self.model.forget(domid, gfn)
            # A frame that a living domain gave back comes with what was in it, as in Xen.
            self.model.write(domid, gfn, self.hypervisor.read(domid, gfn))

    @rule(domid=domains, gfn=gfns)
    def decrease_reservation(self, domid: DomId | None, gfn: Gfn) -> None:
        if domid in self.living:
            try:
                self.hypervisor.decrease_reservation(domid, gfn)
            except (errors.HostMemoryError, errors.NotSharableError):
                return
            self.model.forget(domid, gfn)

    @rule(source=handles, domid=domains)
    def add_to_physmap(self, source: tuple[DomId, Gfn, Handle] | None, domid: DomId | None) -> None:
        if source is None or source[0] not in self.living or domid not in self.living:
            return
        known = self.model.content(*source[:2])
        try:
            self.hypervisor.add_to_physmap(*source, domid, Gfn(PAGES))
        except errors.StaleHandleError:
            return
        if known:
            self.model.write(domid, Gfn(PAGES), known)

    @invariant()
    def books_are_right(self) -> None:
        assert self.hypervisor.audit().findings == ()
        assert self.hypervisor.audit().xen_errors == 0

    @invariant()
    def guests_read_what_they_wrote(self) -> None:
        assert self.model.wrong_pages(self.hypervisor.read) == []

    @invariant()
    def no_frame_is_lost(self) -> None:
        owned = sum(info.tot_pages for info in self.hypervisor.domains())
        assert self.hypervisor.memory.allocated_pages == owned + self.hypervisor.counters().used_frames


TestEmbedded = Embedded.TestCase
TestEmbedded.settings = settings(max_examples=150, stateful_step_count=40, deadline=None)
