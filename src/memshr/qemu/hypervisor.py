"""The seam on running QEMU guests: Xen's calls, done with write protection and copy-on-write of the Linux kernel.

What makes this hard: the guests run, and who is on which frame is known to the kernel alone (``books``).

The rules:

1. A nominated page is write-protected; a write to it kills the handle first, then goes on (``WriteWatch``).
2. Between taking a page *in flight* and the end of its remapping, its writers wait. In flight is taken under the lock
   and only from a living handle, so what was compared is what gets shared.
3. Whatever is remapped is protected while that is so, and a table that is under way when we die still ends under
   protection (``agent``).
4. A frame is punched only after the pagemap of every guest has said that nobody reads it.
5. Pages of different trust groups never meet: they have different pools, and share refuses (I10).
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Final

import numpy as np
from numpy.typing import NDArray

from memshr.closing import Closing
from memshr.errors import (
    BackendError,
    ConnectionLostError,
    DomainError,
    HostMemoryError,
    InvariantError,
    NoSuchDomainError,
    RefusedDomainError,
    SharingDisabledError,
    Status,
)
from memshr.hypervisor import NOT_BACKED, Capability, error_of
from memshr.indices import PageId, of_kind
from memshr.qemu import pagemap
from memshr.qemu.agent import AgentLink
from memshr.qemu.attachment import BATCH_PAGES, MOVED_PAGES, Attachment, GuestState
from memshr.qemu.books import NOWHERE, POOL_SHIFT, GuestBooks, GuestFigures, PoolBooks, PoolFigures
from memshr.qemu.guests import GuestProcess
from memshr.qemu.host import Host, Lock
from memshr.qemu.injection import Injector
from memshr.qemu.interrupts import uninterrupted
from memshr.qemu.monitor import MonitorError
from memshr.qemu.protection import WriteWatch
from memshr.qemu.remapping import Remapping
from memshr.qemu.states import PageIds
from memshr.qemu.syscalls import MPOL_BIND, MPOL_MODE_FLAGS
from memshr.runs import edges_at, jumps, slices
from memshr.types import (
    PAGE_SIZE,
    AuditReport,
    Counters,
    DomainInfo,
    DomId,
    Gfn,
    Handle,
    Handles,
    PageArray,
    PageBytes,
    Statuses,
    page_buffer,
)
from memshr.unsupported import UnsupportedCalls

_log = logging.getLogger(__name__)

_WINDOW_PAGES: Final = MOVED_PAGES
_NOMINATED_TOGETHER: Final = 64
"""Pieces of a guest with direct drives that are nominated together, while its disk requests are waited for once."""
_ROUNDS: Final = 20
"""How often pages that a guest with direct drives wrote just then are tried anew."""
DEFAULT_RESERVE_BYTES: Final = 256 << 20
"""Memory of the host that sharing and unsharing leave alone."""


class QemuHypervisor(UnsupportedCalls, Closing):
    """Some running QEMU guests as a ``memshr.hypervisor.Hypervisor``. A context manager.

    Opening looks only; the first nomination of a guest's page, or ``control``, attaches to the guest. ``close`` ends
    all nominations and leaves what is shared shared.

    :param processes: the guests; they get the domids 1, 2, ... in this order.
    :param groups: name of a trust group -> domids of its guests. A guest that is in none is a group of its own.
    :param reserve_bytes: sharing and unsharing stop before the host's MemAvailable falls below this.
    :param host: the machine that they run on; this one, unless a test has another.
    :raises NoSuchDomainError: a guest has ended, or ``groups`` names one that is not there.
    :raises RefusedDomainError: another memshr is at work on a guest.
    :raises BackendError: a guest's monitor cannot be used.
    """

    WHY_NOT: ClassVar = {
        Capability.GREF: "QEMU guests have no grant tables",
        Capability.PHYSMAP: "a QEMU guest's address space is laid out by QEMU",
        Capability.RANGE: "the contents of running guests must be compared",
        Capability.RING: "Linux has its own ways of being out of memory",
        Capability.FORK: "QEMU cannot fork a guest",
    }

    def __init__(
        self,
        processes: Sequence[GuestProcess],
        *,
        groups: Mapping[str, Collection[int]] | None = None,
        reserve_bytes: int = DEFAULT_RESERVE_BYTES,
        host: Host | None = None,
    ) -> None:
        self._host = host or Host()
        self._reserve_bytes = reserve_bytes
        self._locks: dict[int, Lock] = {}
        self._watches: dict[int, WriteWatch] = {}
        self._defect: BaseException | None = None
        self._injector = Injector()
        self._enabled = [False] * len(processes)
        self._chosen_pool: dict[tuple[str, str], int] = {}
        self._books = GuestBooks(processes, groups or {}, self._host)
        self._states = self._books.states
        self._remapping = Remapping(self._books)
        for guest in self._books.guests:
            guest.on_lost = self._on_lost

    def close(self) -> None:
        """End all nominations and links, close every file. What is shared stays shared.

        Each of these is done whatever becomes of the others; the last error is raised then.
        """
        with contextlib.ExitStack() as closing:
            for lock in self._locks.values():
                closing.callback(lock.release)
            closing.callback(self._injector.close)
            closing.callback(self._books.close)
            self._locks = {}

    @property
    def trouble(self) -> tuple[str, ...]:
        """A line for each guest that was given up, and one if pages were found to have lost their protection."""
        lines = [str(guest.lost_error()) for guest in self._books.guests if guest.state is GuestState.LOST]
        if pages := self._remapping.unprotected_pages:
            lines.append(
                f"{pages:,} pages were no longer protected when they were to be shared, and were left alone;"
                " something else on this host changes guest memory (docs/nominations.md)"
            )
        return tuple(lines)

    def _on_lost(self, guest: Attachment) -> None:
        # Whoever it was that gave the link up, maybe the watch itself.
        watch = self._watches.pop(guest.domid, None)
        if watch is not None:
            watch.end()
            if watch.failure is not None and not isinstance(watch.failure, (OSError, DomainError, BackendError)):
                self._defect = watch.failure
        self._books.forget(guest)

    def _watch(self, guest: Attachment, link: AgentLink) -> None:
        self._watches[guest.domid] = WriteWatch(guest, link, self._states.written)

    # -- looking ---------------------------------------------------------------------------------------------------

    @property
    def capabilities(self) -> frozenset[Capability]:
        """LIVE, ZERO and FRAMES."""
        return frozenset({Capability.LIVE, Capability.ZERO, Capability.FRAMES})

    def domains(self) -> Sequence[DomainInfo]:
        """The guests that are still there, in order of domid."""
        found = []
        for guest in self._books.guests:
            if not guest.dead and not guest.gone:
                with contextlib.suppress(NoSuchDomainError):
                    found.append(self.domain_info(guest.domid))
        return found

    def names(self) -> dict[DomId, str]:
        """As the seam says."""
        guests = [guest for guest in self._books.guests if not guest.gone and not guest.dead]
        return {guest.domid: guest.process.name for guest in guests}

    def domain_info(self, domid: DomId) -> DomainInfo:
        """As the seam says; costs a look at the pagemap of the guest's shared pages."""
        guest = self._books.guest(domid, "domain_info")
        figures = self._books.figures(guest)
        shared = figures.sharing_pages + figures.nominated_pages
        return DomainInfo(
            domid=domid,
            name=guest.process.name,
            tot_pages=guest.pages - shared,
            shr_pages=shared,
            max_pages=guest.pages,
            dying=False,
        )

    def populated_ranges(self, domid: DomId) -> NDArray[np.int64]:
        """As the seam says: QEMU's RAM ranges."""
        guest = self._books.guest(domid, "populated_ranges")
        ranges: list[list[int]] = []
        for first, pages in zip(guest.ram.first_gfns.tolist(), guest.ram.range_pages.tolist(), strict=True):
            if ranges and sum(ranges[-1]) == first:
                ranges[-1][1] += pages
            else:
                ranges.append([first, pages])
        return np.array(ranges, dtype=np.int64).reshape(-1, 2)

    def backed(self, pages: PageArray) -> NDArray[np.bool_]:
        """Which pages the host spends memory on: neither absent nor the kernel's zero page. A shared page is."""
        return np.asarray(self.frames_of(pages) != NOT_BACKED)

    def huge(self, pages: PageArray) -> NDArray[np.bool_]:
        """As the seam says: transparent huge pages. Looks at one page of each."""
        found = np.zeros(len(pages), dtype=np.bool_)
        ids, _ = self._books.ids(pages)
        there = np.flatnonzero(ids >= 0)
        for guest, rows in self._books.by_guest(ids[there]):
            found[there[rows]] = guest.huge(self._books.local(guest, ids[there[rows]]))
        return found

    def frames_of(self, pages: PageArray) -> NDArray[np.int64]:
        """As the seam says: one look at the pagemap of all of them."""
        found = np.full(len(pages), NOT_BACKED, dtype=np.int64)
        ids, _ = self._books.ids(pages)
        there = np.flatnonzero(ids >= 0)
        for guest, rows in self._books.by_guest(ids[there]):
            mine = ids[there[rows]]
            entries = guest.entries(self._books.local(guest, mine))
            mapped = self._books.frame[mine]
            frames = np.where(pagemap.on_frame(entries), mapped, NOWHERE)
            absent = ~pagemap.is_there(entries) | guest.zero_pages(entries)
            frames[absent & (mapped == NOWHERE)] = NOT_BACKED
            found[there[rows]] = frames
        return found

    def read_range(self, domid: DomId, first: Gfn, count: int, buffer: PageBytes) -> PageBytes:
        """As the seam says. Absent pages are not touched: they are filled with zeros here."""
        guest = self._books.guest(domid, "read_range")
        local = guest.pages_of_gfns(np.arange(first, first + count, dtype=np.int64))
        if (local < 0).any():
            raise error_of("read_range", Status.EINVAL, domid=domid, gfn=int(first + np.flatnonzero(local < 0)[0]))
        rows = buffer[:count]
        if count:
            guest.read_run(int(local[0]), rows)
        return rows

    def read_pages(self, pages: PageArray, out: PageBytes) -> Statuses:
        """As the seam says: one system call for 1,024 pages."""
        ids, statuses = self._books.ids(pages)
        good = np.flatnonzero(statuses == Status.OK)
        for guest, rows in self._books.by_guest(ids[good]):
            where = good[rows]
            try:
                guest.read_scattered(self._books.local(guest, ids[where]), out, where)
            except DomainError:
                statuses[where] = Status.ESRCH
        return statuses

    # -- one page --------------------------------------------------------------------------------------------------

    def control(self, domid: DomId, enable: bool) -> None:
        """Attach to a guest, or note that it must not be named second any more. Disabling unshares nothing.

        :raises RefusedDomainError: the guest must not be touched; ``reasons`` has each reason with its remedy.
        """
        guest = self._books.present_guest(domid, "control")
        if enable and guest.link is None:
            self._attach(guest)
        self._enabled[domid - 1] = enable

    def _attach(self, guest: Attachment) -> None:
        fresh = guest.domid not in self._locks
        if fresh:
            with uninterrupted():  # a lock that nobody knows of would be held for good
                self._locks[guest.domid] = self._host.lock(guest.process)
        try:
            available = max(0, self._host.available_bytes() - self._reserve_bytes)
            mappings = guest.attach(self._injector, available, self._watch)
            try:
                # Only now: the agent may have been at the last table of a memshr that died, until it took our link.
                self._books.rebuild(guest, mappings)
            except BaseException:
                guest.drop_link()
                raise
        except BaseException:
            if fresh:
                self._locks.pop(guest.domid).release()
            raise

    def _try_attach(self, guest: Attachment) -> bool:
        """Attach to a guest, unless that failed before: then only ``control`` tries again. Whether it is attached."""
        if guest.link is None and guest.why is None and not guest.dead:
            try:
                self.control(guest.domid, True)
            except (DomainError, ConnectionLostError, MonitorError) as error:
                guest.why = error
                _log.warning("guest %s (%d) is left alone: %s", guest.process.name, guest.process.pid, error)
        if guest.link is None:
            return False
        self._enabled[guest.domid - 1] = True
        return True

    def nominate_gfn(self, domid: DomId, gfn: Gfn) -> Handle:
        """As the seam says."""
        self.control(domid, True)
        handles, statuses = self.nominate_gfns(_one(domid, gfn))
        if statuses[0]:
            raise error_of("nominate_gfn", int(statuses[0]), domid=domid, gfn=gfn)
        return Handle(int(handles[0]))

    def share_gfns(
        self,
        source_domid: DomId,
        source_gfn: Gfn,
        source_handle: Handle,
        client_domid: DomId,
        client_gfn: Gfn,
        client_handle: Handle,
    ) -> None:
        """As the seam says; also RefusedDomainError (EXDEV) for domains of different trust groups."""
        self.control(source_domid, True)
        self._books.guest(client_domid, "share_gfns")
        if not self._enabled[client_domid - 1]:
            raise SharingDisabledError(
                f"share_gfns: sharing is not enabled on domain {client_domid}", call="share_gfns", domid=client_domid
            )
        if self._books.groups[source_domid - 1] != self._books.groups[client_domid - 1]:
            text = f"domains {source_domid} and {client_domid} are in different trust groups"
            raise RefusedDomainError(
                f"share_gfns: {text}",
                reasons=[text],
                call="share_gfns",
                status=Status.EXDEV,
                domid=client_domid,
                remedy="name a group that has both, if they may trust each other",
            )
        status = self.share_gfns_many(
            _one(source_domid, source_gfn),
            np.array([source_handle], dtype=np.uint64),
            _one(client_domid, client_gfn),
            np.array([client_handle], dtype=np.uint64),
        )[0]
        if status:
            side = status == Status.C_HANDLE_INVALID
            domid, gfn = (client_domid, client_gfn) if side else (source_domid, source_gfn)
            raise error_of("share_gfns", int(status), domid=domid, gfn=gfn)

    def unshare_gfn(self, domid: DomId, gfn: Gfn) -> None:
        """As the seam says."""
        status = self.unshare_gfns(_one(domid, gfn))[0]
        if status:
            raise error_of("unshare_gfn", int(status), domid=domid, gfn=gfn)

    def debug_gfn(self, domid: DomId, gfn: Gfn) -> int:
        """As the seam says: looks at the pagemap of everybody who has the frame mapped."""
        _, statuses = self._books.ids(_one(domid, gfn))
        if statuses[0]:
            raise error_of("debug_gfn", int(statuses[0]), domid=domid, gfn=gfn)
        count = int(self.debug_gfns(_one(domid, gfn))[0])
        if not count:
            raise error_of("debug_gfn", Status.EINVAL, domid=domid, gfn=gfn)
        return count

    def debug_gfns(self, pages: PageArray) -> NDArray[np.int64]:
        """As the seam says: looks at the pagemap of everybody who has one of the frames mapped."""
        counts = np.zeros(len(pages), dtype=np.int64)
        ids, statuses = self._books.ids(pages)
        good = np.flatnonzero(statuses == Status.OK)
        nominated = self._states.nominated(ids[good])
        counts[good[nominated]] = 1
        shared = good[~nominated]
        shared = shared[self._books.on_frame(ids[shared])]
        frames = self._books.frame[ids[shared]]
        holders = self._books.holders(frames)
        read, readers = np.unique(self._books.frame[holders[self._books.on_frame(holders)]], return_counts=True)
        still = np.isin(frames, read)
        counts[shared[still]] = readers[np.searchsorted(read, frames[still])]
        return counts

    # -- nominate --------------------------------------------------------------------------------------------------

    def nominate_gfns(self, pages: PageArray) -> tuple[Handles, Statuses]:
        """As the seam says. A guest that cannot be attached answers EXDEV; ``control`` says why.

        A guest with drives that write into its RAM past any protection goes on, but its requests that are under way are
        waited for before it answers.
        """
        self._check_watches()
        ids, statuses = self._books.ids(pages)
        for domid in np.unique(pages.domids[statuses == Status.OK]).tolist():
            guest = self._books.guests[domid - 1]
            if not self._try_attach(guest):
                statuses[pages.domids == domid] = Status.ESRCH if guest.dead else Status.EXDEV
        handles = np.zeros(len(pages), dtype=np.uint64)
        good = np.flatnonzero(statuses == Status.OK)
        distinct, inverse = np.unique(ids[good], return_inverse=True)
        given, answers = self._nominate(distinct)
        handles[good], statuses[good] = given[inverse], answers[inverse]
        return handles, statuses

    def _nominate(self, ids: PageIds) -> tuple[Handles, Statuses]:
        # ``ids`` ascend and are distinct. Either all that was plain before is nominated, or nothing of it.
        handles = np.zeros(len(ids), dtype=np.uint64)
        statuses = np.zeros(len(ids), dtype=np.int32)
        shared = self._books.on_frame(ids)
        handles[shared] = self._books.give_frame_handles(self._books.frame[ids[shared]])
        rest = np.flatnonzero(~shared)
        handles[rest] = self._states.handles(ids[rest])
        fresh = rest[handles[rest] == 0]
        try:
            for guest, rows in self._books.by_guest(ids[fresh]):
                try:
                    handles[fresh[rows]] = self._states.nominate(guest, ids[fresh[rows]])
                except DomainError:
                    statuses[fresh[rows]] = Status.ESRCH
                except HostMemoryError:
                    statuses[fresh[rows]] = Status.ENOMEM
        except BaseException:
            self._take_back(ids[fresh])
            raise
        return handles, statuses

    # -- share -----------------------------------------------------------------------------------------------------

    def share_gfns_many(
        self, sources: PageArray, source_handles: Handles, clients: PageArray, client_handles: Handles
    ) -> Statuses:
        """As the seam says; EXDEV: different trust groups; ENOMEM: the host has no more memory or mappings."""
        self._check_watches()
        source_ids, statuses = self._books.ids(sources)
        client_ids, client_statuses = self._books.ids(clients)
        both_holes = (statuses == Status.EINVAL) & (client_statuses == Status.EINVAL)
        # Nothing at a gfn is no shared frame: the handle of that side is not valid. Unknown domains come first.
        for answers, hole in ((client_statuses, Status.C_HANDLE_INVALID), (statuses, Status.S_HANDLE_INVALID)):
            answers[answers == Status.EINVAL] = hole
        statuses = np.where(_of_domain(client_statuses) & ~_of_domain(statuses), client_statuses, statuses)
        statuses = np.where(statuses == Status.OK, client_statuses, statuses)
        enabled = np.array([False, *self._enabled])
        known = (clients.domids > 0) & (clients.domids < len(enabled))
        disabled = known & ~enabled[np.where(known, clients.domids, 0)]
        statuses[disabled & ~_of_domain(statuses)] = Status.EINVAL
        statuses[both_holes & ~disabled] = Status.OK
        groups = np.array(["", *self._books.groups])
        rows = np.flatnonzero((source_ids >= 0) & (client_ids >= 0) & (statuses == Status.OK))
        apart = groups[sources.domids[rows]] != groups[clients.domids[rows]]
        apart |= self._books.on_foreign_frame(source_ids[rows]) | self._books.on_foreign_frame(client_ids[rows])
        statuses[rows[apart]] = Status.EXDEV
        rows = rows[~apart]
        for domid in np.unique(sources.domids[rows]).tolist():
            guest = self._books.guests[domid - 1]
            if not self._try_attach(guest):
                statuses[rows[sources.domids[rows] == domid]] = Status.ESRCH if guest.dead else Status.EXDEV
        rows = rows[statuses[rows] == Status.OK]
        bound_elsewhere = self._bound_elsewhere(source_ids[rows], client_ids[rows])
        statuses[rows[bound_elsewhere]] = Status.EXDEV
        rows = rows[~bound_elsewhere]
        named = np.unique(np.concatenate([sources.domids[rows], clients.domids[rows]])).tolist()
        self._hand_over_pools([self._books.guests[domid - 1] for domid in named], source_ids[rows])
        while len(rows):
            some = rows[: self._independent(source_ids[rows], client_ids[rows])]
            statuses[some] = self._share(source_ids[some], source_handles[some], client_ids[some], client_handles[some])
            rows = rows[len(some) :]
        return statuses

    def _independent(self, sources: PageIds, clients: PageIds) -> int:
        """How many rows from the first on can be done at once: no row changes what a later one looks at."""
        both = np.concatenate([sources, clients])
        shared = self._books.on_frame(both)
        things = np.where(shared, -2 - self._books.frame[both], both)  # a page on a frame stands for its whole frame
        # A row whose pages are together already changes nothing and stays so: it is in nobody's way.
        idle = np.flatnonzero(things[: len(sources)] == things[len(sources) :])
        own = np.arange(2 * len(idle)) + int(self._books.base[-1])
        things[idle], things[len(sources) + idle] = own[: len(idle)], own[len(idle) :]
        _, inverse = np.unique(things, return_inverse=True)
        source, client = inverse[: len(sources)], inverse[len(sources) :]
        row = np.arange(len(sources))
        first_source = np.full(inverse.max() + 1, len(sources))
        first_client = first_source.copy()
        np.minimum.at(first_source, source, row)
        np.minimum.at(first_client, client, row)
        late = (first_client[client] < row) | (first_source[client] < row) | (first_client[source] < row)
        return int(np.argmax(late)) if late.any() else len(sources)

    def _share(self, sources: PageIds, source_handles: Handles, clients: PageIds, client_handles: Handles) -> Statuses:
        """Share independent rows; all pages exist and are in one trust group each row."""
        statuses = np.zeros(len(sources), dtype=np.int32)
        source_shared, client_shared = self._books.on_frame(sources), self._books.on_frame(clients)
        same = (sources == clients) | (
            source_shared & client_shared & (self._books.frame[sources] == self._books.frame[clients])
        )
        good_source = self._valid(sources, source_handles, source_shared)
        good_client = self._valid(clients, client_handles, client_shared)
        is_shared = source_shared | self._states.nominated(sources)
        client_is_shared = client_shared | self._states.nominated(clients)
        statuses[~good_client] = Status.C_HANDLE_INVALID
        statuses[~good_source] = Status.S_HANDLE_INVALID
        # A side that is no shared frame at all is named before any handle is looked at.
        statuses[is_shared & ~client_is_shared] = Status.C_HANDLE_INVALID
        statuses[~is_shared] = Status.S_HANDLE_INVALID
        statuses[same] = Status.OK
        everything = sources, clients
        rows = np.flatnonzero((statuses == Status.OK) & ~same)
        sources, source_handles = sources[rows], source_handles[rows]
        clients, client_handles = clients[rows], client_handles[rows]
        crossing = self._crossing(sources, clients)
        self._promote(sources[crossing & source_shared[rows]])
        for guest, mine in self._books.by_guest(everybody := np.concatenate([sources, clients])):
            if not guest.dead:
                guest.split_huge_pages(np.sort(self._books.local(guest, everybody[mine])))
        # A source that does not get its frame may lie in the mapping of an old one, of which it has been a copy since.
        new = ~source_shared[rows]
        given = self._give_frames(sources[new], source_handles[new], np.unique(sources[crossing]))
        frames = np.where(new & ~np.isin(sources, given), NOWHERE, self._books.frame[sources])
        frames[crossing & self._books.in_own_pool(frames)] = NOWHERE  # there was no memory to move it to the others
        done = self._move_onto(clients, client_handles, client_shared[rows], frames)
        # The rest was written while others were in flight, or there was no memory for it.
        left = np.flatnonzero(~done)
        source_shared, client_shared = self._books.on_frame(sources[left]), self._books.on_frame(clients[left])
        good_source = self._valid(sources[left], source_handles[left], source_shared)
        good_client = self._valid(clients[left], client_handles[left], client_shared)
        answers = np.where(good_client, Status.ENOMEM, Status.C_HANDLE_INVALID)
        answers = np.where(good_source, answers, Status.S_HANDLE_INVALID)
        statuses[rows[left]] = answers
        ended = self._books.has_ended(everything[0]) | self._books.has_ended(everything[1])
        statuses[ended & (statuses != Status.OK)] = Status.ESRCH
        return statuses

    def _valid(self, ids: PageIds, handles: Handles, shared: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """Which handles are those of their pages at this moment; ``shared`` says which pages are on frames."""
        nominated = ~shared & (self._states.handles(ids) == handles)
        on_frame = shared & (self._books.frame_handles(ids, shared) == handles)
        return np.asarray((nominated | on_frame) & (handles != 0))

    def _crossing(self, sources: PageIds, clients: PageIds) -> NDArray[np.bool_]:
        # Rows that put pages of two guests onto one frame: the client's own, or those that are on its frame already.
        guests = [np.searchsorted(self._books.base, ids, side="right") for ids in (sources, clients)]
        frames = self._books.frame[clients]
        with_others = (frames != NOWHERE) & self._books.on_frame(clients) & ~self._books.in_own_pool(frames)
        return np.asarray((guests[0] != guests[1]) | with_others)

    def _promote(self, ids: PageIds) -> None:
        """Move the frames of these pages that are in a pool of one guest into that of its group, for others to join.

        Their handles go with them. What cannot be moved stays where it is.
        """
        frames = np.unique(self._books.frame[ids])
        frames = frames[self._books.in_own_pool(frames)]
        for start in range(0, len(frames), BATCH_PAGES):
            old = frames[start : start + BATCH_PAGES]
            if not self._has_room(len(old)):
                return
            new = np.empty_like(old)
            try:
                for books, rows, numbers in self._books.by_pool(old):
                    contents = page_buffer(len(rows))
                    books.pool.read(numbers, contents)
                    new[rows] = self._add_frames(books.pool.group, "", contents[: len(rows)], (0, b""))
                    for into, places, at in self._books.by_pool(new[rows]):
                        into.handles[at] = books.handles[numbers[places]]
            except HostMemoryError:
                return
            self._move_sharers(old, new)
            # A page that stayed behind has a frame of its own then, and so another handle.
            for books, _, numbers in self._books.by_pool(old):
                left = numbers[books.handles[numbers] != 0]
                books.handles[left] = self._states.new_handles(len(left))

    def _move_sharers(self, old: NDArray[np.int64], new: NDArray[np.int64]) -> None:
        # Every page that is on one of the old frames onto the new one that holds the same bytes.
        order = np.argsort(old)
        sharers = self._books.holders(old)
        sharers = sharers[self._books.on_frame(sharers)]
        targets = new[order[np.searchsorted(old[order], self._books.frame[sharers])]]
        for flight in self._remapping.flights(sharers, targets):
            with self._remapping.flight(sharers[flight]):
                held = flight[self._remapping.pin_sharers(sharers[flight])]
                self._remapping.map(sharers[held], targets[held])
        self._punch_unread(np.unique(old))
        self._punch_unread(np.unique(new))

    def _give_frames(self, ids: PageIds, handles: Handles, for_others: PageIds) -> PageIds:
        """Map fresh frames with their contents over those of the pages that are still nominated under these handles.

        :param for_others: those of them whose frame pages of other guests are to join.
        :returns: the pages for which it was done.
        """
        ids, first = np.unique(ids, return_index=True)
        handles = handles[first]
        given = np.zeros(len(ids), dtype=np.bool_)
        for flight in self._remapping.flights(ids, ids):
            if not self._has_room(len(flight)):
                break
            some = ids[flight]
            # Read while nobody waits: reading a page of a QEMU may take as long as that QEMU wants. What was read is
            # what becomes the frame, once; each page is compared with it before it is mapped over the page.
            try:
                frames = self._new_frames(some, np.isin(some, for_others))
            except HostMemoryError:
                break
            landed = np.zeros(len(flight), dtype=np.bool_)
            there = frames != NOWHERE
            try:
                with self._remapping.flight(some):
                    taken = np.flatnonzero(there & self._remapping.take(some, handles[flight]))
                    for books, rows, numbers in self._books.by_pool(frames[taken]):
                        books.handles[numbers] = handles[flight[taken]][rows]
                    landed[taken] = self._remapping.map(some[taken], frames[taken])
                    given[flight[landed]] = True
            finally:
                self._punch_unread(frames[there & ~landed])
        return ids[given]

    def _move_onto(
        self, clients: PageIds, handles: Handles, shared: NDArray[np.bool_], frames: NDArray[np.int64]
    ) -> NDArray[np.bool_]:
        """Map frames over clients that are still nominated under these handles, and over all pages that are on the
        frames of shared clients. A frame that is NOWHERE is left out.

        :returns: for which clients it was done.
        """
        there = frames != NOWHERE
        done = np.zeros(len(clients), dtype=np.bool_)
        single = np.flatnonzero(there & ~shared)
        single = single[np.argsort(clients[single])]
        for flight in self._remapping.flights(clients[single], frames[single]):
            some = single[flight]
            with self._remapping.flight(clients[some]):
                taken = some[self._remapping.take(clients[some], handles[some])]
                done[taken] = self._remapping.map(clients[taken], frames[taken])
        (whole,) = np.nonzero(there & shared)
        if len(whole):
            old_frames = self._books.frame[clients[whole]]
            self._move_sharers(old_frames, frames[whole])
            done[whole] = self._books.frame[clients[whole]] == frames[whole]
        return done

    def _new_frames(self, sources: PageIds, for_others: NDArray[np.bool_]) -> NDArray[np.int64]:
        """Copies of the contents of pages in new frames; NOWHERE for those of guests that are lost meanwhile.

        :param for_others: which of them go into the pool of the group; the others into one of their guest alone.
        :raises HostMemoryError: no memory for them.
        """
        frames = np.full(len(sources), NOWHERE, dtype=np.int64)
        for guest, rows in self._books.by_guest(sources):
            local = self._books.local(guest, sources[rows])
            contents = page_buffer(len(rows))
            try:
                guest.read_for_others(local, contents)
            except DomainError:
                continue
            which, policies = guest.policies(local)
            group, own = self._books.groups[guest.domid - 1], self._owner_of(guest)
            into_group = for_others[rows] | (not own)
            for owner, there in (("", into_group), (own, ~into_group)):
                for at, policy in enumerate(policies):
                    mine = (which == at) & there
                    if mine.any():
                        some = contents[: len(rows)] if mine.all() else contents[: len(rows)][mine]
                        frames[rows[mine]] = self._add_frames(group, owner, some, policy)
        return frames

    def _owner_of(self, guest: Attachment) -> str:
        # Whose pool the frames are in that only this guest's pages are on: the group's if that is nobody else.
        return "" if self._books.is_alone(guest) else guest.process.key

    def _add_frames(self, group: str, owner: str, contents: PageBytes, policy: tuple[int, bytes]) -> NDArray[np.int64]:
        number = self._chosen_pool[group, owner]
        books = self._books.pools[number]
        first = books.pool.add(contents, policy)
        books.grow()
        books.sums[first : first + len(contents)] = self._books.sums(contents)
        return (number << POOL_SHIFT) + first + np.arange(len(contents))

    def _bound_elsewhere(self, sources: PageIds, clients: PageIds) -> NDArray[np.bool_]:
        # Rows whose client may only have memory of certain NUMA nodes, which the source's frame need not be of.
        elsewhere = np.zeros(len(sources), dtype=np.bool_)
        if not any(guest.is_bound for guest in self._books.guests):
            return elsewhere
        policies: dict[tuple[int, bytes], int] = {}
        strict = [False]
        numbers = []
        for ids in (sources, clients):
            found = np.zeros(len(ids), dtype=np.int64)
            for guest, rows in self._books.by_guest(ids):
                which, known = guest.policies(self._books.local(guest, ids[rows]))
                own = [policies.setdefault(policy, len(policies)) for policy in known]
                found[rows] = np.array(own, dtype=np.int64)[which]
            numbers.append(found)
        strict = [mode & ~MPOL_MODE_FLAGS == MPOL_BIND for mode, _ in policies]
        return np.asarray(np.array(strict)[numbers[1]] & (numbers[0] != numbers[1]))

    def _hand_over_pools(self, guests: Sequence[Attachment], sources: PageIds) -> None:
        # Before anything is in flight, and first for all: which pool new frames go to is decided once. Everybody
        # of a group may come to be moved, as a page on a frame of somebody named.
        groups = {self._books.groups[guest.domid - 1] for guest in guests}
        for group in groups:
            self._choose_pool(group, "")
        # Not before: choosing attaches to guests that read one of the pools.
        members = [
            guest
            for guest in self._books.guests
            if guest.link is not None and self._books.groups[guest.domid - 1] in groups
        ]
        for guest in members:
            self._choose_pool(self._books.groups[guest.domid - 1], self._owner_of(guest))
        frames = self._books.frame[sources]
        of_sources = set(np.unique(frames[frames != NOWHERE] >> POOL_SHIFT).tolist())
        for guest in members:
            group = self._books.groups[guest.domid - 1]
            needed = of_sources | {self._chosen_pool[group, owner] for owner in ("", self._owner_of(guest))}
            mine = [
                books
                for number, books in enumerate(self._books.pools)
                if number in needed and self._books.is_for(books, guest)
            ]
            with contextlib.suppress(DomainError):
                guest.forget_pools([books.pool for books in mine])
                for books in mine:
                    books.seen_in.add(guest.domid)  # from now on a table of its agent may map it
                    guest.pool_number(books.pool)

    def _choose_pool(self, group: str, owner: str) -> None:
        # Which pool new frames of a group go to, or those of one of its guests alone.
        for attempt in (1, 2):
            for number, books in enumerate(self._books.pools):
                if (books.pool.group, books.pool.owner) == (group, owner) and self._books.has_all_readers(books):
                    self._chosen_pool[group, owner] = number
                    return
            if attempt == 1:
                self._attach_readers()  # perhaps only because there is no link with one of them
        self._books.pools.append(PoolBooks(self._host.create_pool(group, owner)))
        self._chosen_pool[group, owner] = len(self._books.pools) - 1

    def _punch_unread(self, frames: NDArray[np.int64]) -> int:
        """Give back the memory of those of these frames that nobody reads; returns how many."""
        if not len(frames):
            return 0
        holders = self._books.holders(frames)
        read = np.unique(self._books.frame[holders[self._books.on_frame(holders)]])
        unread = frames[~np.isin(frames, read)]
        punched = 0
        for books, _, numbers in self._books.by_pool(unread):
            books.handles[numbers] = books.sums[numbers] = 0
            if self._books.has_all_readers(books):
                books.pool.punch(numbers)
                punched += len(numbers)
        return punched

    # -- unshare ---------------------------------------------------------------------------------------------------

    def unshare_gfns(self, pages: PageArray) -> Statuses:
        """As the seam says. A page on a frame gets anonymous memory of its own; a nomination is taken back."""
        self._check_watches()
        ids, statuses = self._books.ids(pages)
        good = np.unique(ids[statuses == Status.OK])
        for guest, _ in self._books.by_guest(good):
            self._refresh_books(guest)
        self._take_back(good)
        shared = good[self._books.on_frame(good)]
        self._make_private(shared)
        left = shared[self._books.frame[shared] != NOWHERE]
        left = left[self._books.on_frame(left)]
        statuses[np.isin(ids, left)] = Status.ENOMEM
        return statuses

    def _take_back(self, ids: PageIds) -> None:
        # Every nomination of these, whatever becomes of some guest.
        with contextlib.ExitStack() as taking:
            for guest, rows in self._books.by_guest(ids):
                taking.callback(self._take_back_in, guest, ids[rows])

    def _take_back_in(self, guest: Attachment, ids: PageIds) -> None:
        with contextlib.suppress(DomainError):  # then none is nominated
            self._states.take_back(guest, ids)

    def _make_private(self, ids: PageIds) -> int:
        """Give pages (ascending, distinct, not nominated) anonymous memory of their own, and unread frames back to
        the host. Stops where the host has no memory left; what was done shows in the books.

        :returns: how many frames were given back.
        """
        frames = np.unique(self._books.frame[ids])
        for guest, rows in self._books.by_guest(ids):
            if self._try_attach(guest):
                some = ids[rows]
                self._move(guest, [some[at : at + BATCH_PAGES] for at in range(0, len(some), BATCH_PAGES)])
        return self._punch_unread(frames[frames != NOWHERE])

    def _has_room(self, pages: int) -> bool:
        return self._host.available_bytes() - pages * PAGE_SIZE >= self._reserve_bytes

    def _move(self, guest: Attachment, pieces: Sequence[PageIds]) -> None:
        """Give pages of one guest memory of their own, piece by piece (each a table's worth), as far as there is room.

        A disk request that is under way would go on writing into the page that is replaced. So the pages of a guest
        with such drives are nominated first, which waits for its requests; what is written meanwhile is left for later.
        """
        together = _NOMINATED_TOGETHER if guest.must_drain else 1
        for first in range(0, len(pieces), together):
            some = pieces[first : first + together]
            if not guest.must_drain:
                if not self._move_one(guest, some[0], None):
                    return
                continue
            everything = np.unique(np.concatenate(some))
            try:
                handles = self._states.nominate(guest, everything)
                for piece in some:
                    if not self._move_one(guest, piece, handles[np.searchsorted(everything, piece)]):
                        return
            except DomainError:
                return
            finally:
                self._take_back(everything)

    def _move_one(self, guest: Attachment, ids: PageIds, handles: Handles | None) -> bool:
        # One table's worth: of those nominated under these handles, or of all. Whether to go on.
        if guest.link is None or not self._has_room(len(ids)):
            return False
        with self._remapping.flight(ids):
            flying = self._remapping.pin(ids) if handles is None else self._remapping.take(ids, handles)
            done = self._remapping.make_private(ids[flying])
        return bool(done.all())

    def release_zero_pages(self, pages: PageArray, handles: Handles) -> Statuses:
        """As the seam says: the page is dropped, and the next read finds the kernel's zero page."""
        self._check_watches()
        ids, statuses = self._books.ids(pages)
        statuses[statuses == Status.EINVAL] = Status.S_HANDLE_INVALID
        good = np.flatnonzero(statuses == Status.OK)
        _, first = np.unique(ids[good], return_index=True)  # of a page that comes twice, the second handle is dead
        good, again = good[first], np.delete(good, first)
        statuses[again] = Status.S_HANDLE_INVALID
        mine, handles = ids[good], handles[good]
        for guest, rows in self._books.by_guest(mine):
            if not guest.dead:
                guest.split_huge_pages(self._books.local(guest, mine[rows]))
        released = np.zeros(len(mine), dtype=np.bool_)
        frames = np.unique(self._books.frame[mine])
        for flight in self._remapping.flights(mine, mine):
            some = mine[flight]
            shared = self._books.on_frame(some)
            with self._remapping.flight(some):
                valid = self._valid(some, handles[flight], shared)
                alone = np.flatnonzero(valid & ~shared)
                valid[alone] = self._remapping.take(some[alone], handles[flight[alone]])
                held = np.flatnonzero(valid & shared)
                valid[held] = self._remapping.pin_sharers(some[held])
                statuses[good[flight[~valid]]] = Status.S_HANDLE_INVALID
                taken = flight[valid]
                released[taken] = self._remapping.empty(mine[taken])
        self._punch_unread(frames[frames != NOWHERE])
        statuses[good[~released & (statuses[good] == Status.OK)]] = Status.ENOMEM
        statuses[good[self._books.has_ended(mine)]] = Status.ESRCH
        return statuses

    # -- whole guests ----------------------------------------------------------------------------------------------

    def fold_back(self, *, seen: Counters | None = None) -> int:
        """Move pages that guests have copied back into anonymous memory, and give unread frames back to the host.

        :param seen: what ``counters`` or ``audit`` said a moment ago: nobody is looked at again if by these every page
            that has a frame mapped is on it, and every frame has a reader. What was copied since then is left.
        :returns: how many frames were given back.
        """
        (mapped,) = np.nonzero(self._books.frame != NOWHERE)
        if seen is not None and seen.freed_pages + seen.used_frames == len(mapped):
            backed = sum(books.pool.backed_bytes for books in self._books.pools)
            if backed == seen.used_frames * PAGE_SIZE:
                return 0
        given_back = 0
        ids, frames = self._books.readers()
        for guest, _ in self._books.by_guest(of_kind(PageId, np.setdiff1d(mapped, ids, assume_unique=True))):
            if guest.gone or guest.dead:
                continue
            self._refresh_books(guest)
            base = self._books.base[guest.domid - 1]
            copied = base + np.flatnonzero(guest.in_pool)
            copied = copied[~self._books.on_frame(copied)]
            copied = copied[self._states.plain(copied)]
            if len(copied) and self._enabled[guest.domid - 1]:
                given_back += self._make_private(copied)
        return given_back + self._punch_all_but(frames)

    def punch_unread(self) -> int:
        """Give every frame that nobody reads back to the host; returns how many had memory."""
        return self._punch_all_but(self._books.readers()[1])

    def _punch_all_but(self, read: NDArray[np.int64]) -> int:
        # Frames that nobody reads stay so, unless we have them mapped: a look that is a while old does.
        read = np.unique(read)
        punched = 0
        for number, books in enumerate(self._books.pools):
            backed = (number << POOL_SHIFT) + books.pool.backed_frames()
            unread = np.setdiff1d(backed, read, assume_unique=True)
            if len(unread) and not self._books.has_all_readers(books):
                self._attach_readers()
            punched += self._punch_unread(unread)
        return punched

    def _refresh_books(self, guest: Attachment) -> None:
        """Have a link with a guest that has ever been shared, so that nobody else changes it under our books."""
        if guest.link is None and not guest.dead and (guest.in_pool.any() or guest.has_agent):
            self._try_attach(guest)

    def _attach_readers(self) -> None:
        # Open a link with each guest that may read a pool: a pool has all its readers only if each of them is linked.
        for guest in self._books.guests:
            if not guest.gone:
                with contextlib.suppress(DomainError):
                    self._refresh_books(guest)

    def unshare_guest(self, domid: DomId) -> int:
        """Give every page of a guest back its own memory, in large pieces that can be huge pages again.

        :returns: how many pages were on frames.
        :raises HostMemoryError: the host has no room for it (nothing was done), or ran out half-way.
        """
        self.control(domid, True)
        guest = self._books.guest(domid, "unshare_guest")
        everything = self._books.ids_of(guest, np.arange(guest.pages))
        self._take_back(everything)
        in_pool = np.flatnonzero(guest.in_pool)
        shared = int(self._books.on_frame(self._books.ids_of(guest, in_pool)).sum())
        needed = len(in_pool) * PAGE_SIZE
        available = self._host.available_bytes()
        if available - needed < self._reserve_bytes:
            raise HostMemoryError(
                f"unsharing guest {guest.process.name} needs {needed >> 20} MiB; the host has {available >> 20} MiB"
                f" and keeps {self._reserve_bytes >> 20} MiB in reserve",
                call="unshare_guest",
                status=Status.ENOMEM,
                domid=domid,
                remedy="free memory, or end another guest first",
            )
        frames = np.unique(self._books.frame[self._books.ids_of(guest, in_pool)])
        for _ in range(_ROUNDS if guest.must_drain else 1):
            windows = self._windows(guest, np.flatnonzero(guest.in_pool))
            if not windows or guest.link is None:
                break
            self._move(guest, [self._books.ids_of(guest, window) for window in windows])
        self._punch_unread(frames)
        if guest.in_pool.any():
            self._books.guest(domid, "unshare_guest")
            raise HostMemoryError(
                f"guest {guest.process.name} has {int(guest.in_pool.sum())} pages left that are not its own",
                call="unshare_guest",
                status=Status.ENOMEM,
                domid=domid,
                remedy="relieve the host, then again",
            )
        return shared

    def _windows(self, guest: Attachment, in_pool: NDArray[np.int64]) -> list[NDArray[np.int64]]:
        # The aligned pieces of RAM that hold pages in pools, cut so that each is one run of addresses.
        windows = []
        for key in np.unique(guest.hvas[in_pool] // (_WINDOW_PAGES * PAGE_SIZE)).tolist():
            start = key * _WINDOW_PAGES * PAGE_SIZE
            hvas = np.arange(start, start + _WINDOW_PAGES * PAGE_SIZE, PAGE_SIZE, dtype=np.int64)
            pages = guest.ram.pages_of_hvas(hvas)
            pages = np.sort(pages[pages >= 0])
            windows += [pages[run] for run in slices(edges_at(jumps(guest.hvas[pages], PAGE_SIZE), len(pages)))]
        return windows

    def detach(self, domid: DomId) -> None:
        """Unshare a guest wholly and take the agent out of it: thread, mappings, descriptors are gone.

        :raises HostMemoryError: as unshare_guest.
        """
        self.unshare_guest(domid)
        guest = self._books.guest(domid, "detach")
        guest.detach(self._injector)
        self._enabled[domid - 1] = False
        for books in self._books.pools:
            books.seen_in.discard(domid)

    def enlisted(self, domid: DomId) -> GuestProcess:
        """The process behind a domid."""
        return self._books.guest(domid, "enlisted").process

    def guest_figures(self, domid: DomId) -> GuestFigures:
        """What one guest shares; reads the pagemap of all its RAM."""
        return self._books.guest_figures(domid)

    def pool_figures(self) -> list[PoolFigures]:
        """The frame pools of the guests."""
        return self._books.pool_figures()

    def counters(self) -> Counters:
        """As the seam says; costs a look at the pagemap of every shared page."""
        return self._books.counters()

    def audit(self) -> AuditReport:
        """Check what this object believes against what the kernel says; see ``GuestBooks.audit``."""
        return self._books.audit()

    def _check_watches(self) -> None:
        if self._defect is not None:
            raise InvariantError("a write watch has failed") from self._defect


def _one(domid: DomId, gfn: Gfn) -> PageArray:
    return PageArray(np.array([domid], dtype=np.uint16), np.array([gfn], dtype=np.int64))


def _of_domain(statuses: Statuses) -> NDArray[np.bool_]:
    return np.asarray((statuses == Status.ESRCH) | (statuses == Status.EPERM))
