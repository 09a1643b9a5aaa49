"""A state machine over two QEMU guests, with two judges: the audit, and a model of guests and handles.

It runs on real QEMU processes and on the stand-in for them; who runs it says how a memshr is started on the guests.
"""

from collections.abc import Callable
from typing import ClassVar

import numpy as np
import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule, run_state_machine_as_test

from live.qemu_host import QtestHost
from memshr.errors import NotSharableError, StaleHandleError
from memshr.testing import GuestModel
from memshr.types import PAGE_SIZE, Counters, DomId, Gfn, Handle, PageArray
from standin.machine import StandInHost

Page = tuple[DomId, Gfn]

GFNS = [Gfn(0x400 + each) for each in (0, 1, 2, 5, 512, 1030)]
PAGES: list[Page] = [(DomId(domid), gfn) for domid in (1, 2) for gfn in GFNS]
CONTENTS = [bytes(PAGE_SIZE), *(np.random.default_rng(seed).bytes(PAGE_SIZE) for seed in (1, 2))]

pages = st.sampled_from(PAGES)


class TwoGuests(RuleBasedStateMachine):
    """Writes, nominations, sharing, unsharing and restarts of memshr, in any order."""

    open_host: ClassVar[Callable[[], QtestHost | StandInHost]]
    """starts a memshr on the guests, which live for all examples"""

    @initialize()
    def begin(self) -> None:
        self.host = type(self).open_host()
        for domid in self.host.domids:
            self.host.hypervisor.unshare_guest(domid)
        self.model = GuestModel()
        self.handles: dict[Page, Handle] = {}
        """the living handle of each nominated page that is on no frame"""
        self.frames: list[tuple[Handle | None, set[Page]]] = []
        """handle and sharers of each frame; None: given out by nobody since the restart"""
        for page in PAGES:
            self.write_whole(page, CONTENTS[1])

    def teardown(self) -> None:
        if hasattr(self, "host"):
            self.host.hypervisor.close()

    def _frame_of(self, page: Page) -> int | None:
        return next((i for i, (_, sharers) in enumerate(self.frames) if page in sharers), None)

    def _leaves(self, page: Page) -> None:
        # What a write does to the books: the handle dies, or the page leaves its frame.
        self.handles.pop(page, None)
        self.frames = [(handle, sharers - {page}) for handle, sharers in self.frames if sharers != {page}]

    def _handle(self, page: Page) -> Handle | None:
        frame = self._frame_of(page)
        return self.handles.get(page) if frame is None else self.frames[frame][0]

    @rule(page=pages, content=st.sampled_from(CONTENTS))
    def write_whole(self, page: Page, content: bytes) -> None:
        self.host.write(*page, content)
        self.model.write(*page, content)
        self._leaves(page)

    @rule(page=pages, offset=st.integers(0, PAGE_SIZE - 4), data=st.binary(min_size=1, max_size=4))
    def write_some(self, page: Page, offset: int, data: bytes) -> None:
        self.host.write(*page, data, offset)
        self.model.write(*page, data, offset)
        self._leaves(page)

    @rule(page=pages)
    def nominate(self, page: Page) -> None:
        handle = self.host.hypervisor.nominate_gfn(*page)
        known, frame = self._handle(page), self._frame_of(page)
        if known is not None:
            assert handle == known
        elif frame is not None:
            self.frames[frame] = (handle, self.frames[frame][1])
        else:
            self.handles[page] = handle

    @rule(source=pages, client=pages)
    def share_equal_pages(self, source: Page, client: Page) -> None:
        """In the order that policy keeps: nominate both, compare, share."""
        if self.model.content(*source) != self.model.content(*client):
            return
        self.nominate(source)
        self.nominate(client)
        self._share(source, self._handle(source), client, self._handle(client))

    @rule(source=pages, client=pages, stale=st.booleans())
    def share_with_what_handles_there_are(self, source: Page, client: Page, stale: bool) -> None:
        if self.model.content(*source) == self.model.content(*client):
            self._share(source, self._handle(source), client, Handle(10**9) if stale else self._handle(client))

    def _share(self, source: Page, source_handle: Handle | None, client: Page, client_handle: Handle | None) -> None:
        hypervisor = self.host.hypervisor
        arguments = (*source, source_handle or Handle(0), *client, client_handle or Handle(0))
        here, there = self._frame_of(source), self._frame_of(client)
        if source == client or (here is not None and here == there):
            hypervisor.share_gfns(*arguments)
            return
        if source_handle is None or client_handle is None or client_handle == 10**9:
            with pytest.raises(StaleHandleError):
                hypervisor.share_gfns(*arguments)
            return
        hypervisor.share_gfns(*arguments)
        moving = {client} if there is None else self.frames[there][1]
        sharers = ({source} if here is None else self.frames[here][1]) | moving
        self.frames = [frame for i, frame in enumerate(self.frames) if i not in (here, there)]
        self.frames.append((source_handle, sharers))
        for page in sharers:
            self.handles.pop(page, None)

    @rule(chosen=st.lists(pages, max_size=6))
    def unshare(self, chosen: list[Page]) -> None:
        domids = np.array([domid for domid, _ in chosen], np.uint16)
        array = PageArray(domids, np.array([gfn for _, gfn in chosen], np.int64))
        assert not self.host.hypervisor.unshare_gfns(array).any()
        for page in chosen:
            self._leaves(page)

    @rule(page=pages)
    def release_zeros(self, page: Page) -> None:
        if self.model.content(*page) != CONTENTS[0]:
            return
        self.nominate(page)
        handle = self._handle(page)
        assert handle is not None
        array = PageArray.of_domain(page[0], np.array([page[1]], np.int64))
        assert not self.host.hypervisor.release_zero_pages(array, np.array([handle], np.uint64)).any()
        self._leaves(page)

    @rule(seen=st.booleans())
    def fold_back(self, seen: bool) -> None:
        self.host.hypervisor.fold_back(seen=self.host.hypervisor.counters() if seen else None)

    @rule(domid=st.sampled_from([DomId(1), DomId(2)]))
    def unshare_guest(self, domid: DomId) -> None:
        self.host.hypervisor.unshare_guest(domid)
        for page in PAGES:
            if page[0] == domid:
                self._leaves(page)

    @rule(domid=st.sampled_from([DomId(1), DomId(2)]))
    def detach(self, domid: DomId) -> None:
        self.host.hypervisor.detach(domid)
        for page in PAGES:
            if page[0] == domid:
                self._leaves(page)
        self.host.hypervisor.control(domid, True)

    @rule()
    def restart(self) -> None:
        self.host.hypervisor.close()
        self.host = type(self).open_host()
        self.handles = {}
        self.frames = [(None, sharers) for _, sharers in self.frames]

    @invariant()
    def guests_read_what_they_wrote(self) -> None:
        if hasattr(self, "host"):
            assert self.model.wrong_pages(self.host.read) == []

    @invariant()
    def books_are_right(self) -> None:
        if not hasattr(self, "host"):
            return
        hypervisor = self.host.hypervisor
        report = hypervisor.audit()
        assert report.clean, report
        freed = sum(len(sharers) - 1 for _, sharers in self.frames)
        assert hypervisor.counters() == Counters(freed, len(self.frames) + len(self.handles))
        for page in PAGES:
            frame = self._frame_of(page)
            if frame is not None:
                assert hypervisor.debug_gfn(*page) == len(self.frames[frame][1])
            elif page in self.handles:
                assert hypervisor.debug_gfn(*page) == 1
            else:
                with pytest.raises(NotSharableError):
                    hypervisor.debug_gfn(*page)


def run(open_host: Callable[[], QtestHost | StandInHost], examples: int) -> None:
    """Run it."""

    class Machine(TwoGuests):
        pass

    Machine.open_host = staticmethod(open_host)
    wanted = settings(
        max_examples=examples,
        stateful_step_count=30,
        deadline=None,
        suppress_health_check=list(HealthCheck),
        derandomize=True,
        database=None,
    )
    run_state_machine_as_test(Machine, settings=wanted)
