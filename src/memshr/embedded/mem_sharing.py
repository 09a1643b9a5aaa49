"""Memory sharing itself: how pages become nominated, shared, and private again.

What makes this hard is keeping four books in step: the p2m of each domain, the owner of each frame, the table of
shared frames with its reverse maps, and the counters. Every change of state is one method here, answers with a
status (0, a handle, or a negative Xen error number) and checks everything before it changes anything (I9).

The many-page methods are the same changes on arrays, and give the same answers as the one-page methods in the order
of the rows; a test holds them to that.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memshr.embedded.columns import Column, Index, Spots
from memshr.embedded.memory import MachineMemory
from memshr.embedded.p2m import CHUNK_BITS_PER_DOMAIN, HOLE, HOLES, TYPE_BITS, TYPE_MASK, P2m, entry, is_ram
from memshr.embedded.shared_frames import NO_SLOT, SharedFrames, Slots, page_id, page_of
from memshr.errors import Status
from memshr.types import DOMID_COW, MAX_GFN_BITS, DomainKind, Gfn, Handles, P2mType, RingRequest, Statuses

_SHARED = int(P2mType.RAM_SHARED)
_RW = int(P2mType.RAM_RW)
_POD = int(P2mType.RAM_POD)
_GRANT = int(P2mType.GRANT_FRAME)  # the hypervisor's own frames have no mfn here, but are not equal to holes
NOMINABLE = (_RW, int(P2mType.RAM_LOGDIRTY))
"""Types of pages that can be nominated."""
_IS_NOMINABLE = np.zeros(TYPE_MASK + 1, np.bool_)
_IS_NOMINABLE[list(NOMINABLE)] = True


@dataclass(slots=True)
class Domain:
    """One domain of the embedded hypervisor. Its page counts are kept, not derived, so that audit can judge them."""

    domid: int
    name: str
    max_pages: int
    p2m: P2m
    kind: DomainKind = DomainKind.HVM
    vcpus: int = 1
    tot_pages: int = 0
    shr_pages: int = 0
    pause_count: int = 1
    dying: bool = False
    sharing_enabled: bool = False
    parent: Domain | None = None
    """The domain that this one is a fork of."""
    forks: int = 0
    """How many forks it has; while there are any, it may be dying but does not go away."""
    grants: dict[int, int] = field(default_factory=dict)
    """Grant table entries in use: reference -> gfn."""
    hvm_params: dict[int, int] = field(default_factory=dict)
    ring_mfn: int | None = None
    """The frame of the sharing ring, while it is enabled."""
    ring_events: list[RingRequest] = field(default_factory=list)
    """What could not be unshared for lack of memory, as posted on the ring and not yet resumed."""
    ring_answers: int = 0
    """How many of them, the oldest, have a response in the ring."""
    waiting_vcpus: set[int] = field(default_factory=set)
    """The vCPUs that wait on such a gfn."""
    crashed: bool = False
    log_dirty: bool = False
    orphans: list[int] = field(default_factory=list)
    """Frames that it owns and counts, but has at no gfn: unmapped ones, and those of ``MemSharing.leaving``."""
    arrivals: dict[int, None] = field(default_factory=dict)
    """Of a fork: the frames that became its own since it is one, in their order; some may have left again."""
    page_tables: PageTables | None = None
    """The memory for its page tables, where that is limited."""


class PageTables:
    """What a domain's p2m costs in page tables, when the memory for them is limited.

    Tables have 512 entries in four levels and are never given back. ``pool_pages`` pages are there, of which a domain
    has spent some before its first gfn: with nested paging ready for use, ten root tables more and one monitor table
    for each vCPU (this fits the recording ``oom_p2m_pool_add_to_physmap``).
    """

    def __init__(self, pool_pages: int, vcpus: int) -> None:
        self._free = pool_pages - 10 - vcpus - 1  # the last one is the root of its own p2m
        self._tables: set[tuple[int, int]] = set()

    def cover(self, gfn: int) -> bool:
        """Make the tables that map a gfn, from the top; False if the memory ran out on the way."""
        for level in (3, 2, 1):
            table = level, gfn >> 9 * level
            if table not in self._tables:
                if self._free <= 0:
                    return False
                self._free -= 1
                self._tables.add(table)
        return True


class MemSharing:
    """The books of one host. Domids and gfns that come in are valid; who may call what is checked above."""

    def __init__(self, memory: MachineMemory) -> None:
        self.memory = memory
        self.frames = SharedFrames()
        self.domains: dict[int, Domain] = {}
        self.entries = Column(np.int64, self._make_entries)
        self.freed_pages = 0
        self.used_frames = 0
        self.leaving: dict[int, Domain] = {}
        """Frames that their domain gave up while extra references were held: they stay its own until the last goes."""
        self._mark = np.zeros(0, np.int64)

    def _make_entries(self, key: int) -> NDArray[np.int64] | None:
        domain = self.domains.get(key >> CHUNK_BITS_PER_DOMAIN)
        return domain.p2m.make_chunk(key) if domain else None

    # -- one page ----------------------------------------------------------------------------------------------------

    def nominate(self, domain: Domain, gfn: int, expected_refs: int = 0) -> int:
        """The handle of the page's present version, or a status. ``expected_refs``: extra references it must have."""
        pid = page_id(domain.domid, gfn)
        value = self.entries.get(pid)
        mfn = value >> TYPE_BITS
        if value & TYPE_MASK == _SHARED:
            return self.frames.handle.item(self.frames.slot_of_mfn.get(mfn))
        if (status := self.why_not_nominable(value, expected_refs)) != Status.OK:
            return status
        self.memory.owner.set(mfn, DOMID_COW)
        self.entries.set(pid, mfn << TYPE_BITS | _SHARED)
        domain.tot_pages -= 1
        domain.shr_pages += 1
        self.used_frames += 1
        return self.frames.open(mfn, pid)

    def why_not_nominable(self, value: int, expected_refs: int = 0) -> int:
        """Whether a page that is not shared, with this entry, could be nominated; a status."""
        mfn = value >> TYPE_BITS
        if value & TYPE_MASK not in NOMINABLE or mfn in self.memory.writable_frames:
            return Status.EINVAL
        return Status.OK if self.memory.extra_refs.get(mfn, 0) == expected_refs else Status.E2BIG

    def share(self, source_pid: int, source_handle: int, client_pid: int, client_handle: int) -> int:
        """Put the client's frame's sharers on the source's frame; a status.

        Cost: linear in the sharers of the smaller group, or of the client's while one of the frames is held.
        """
        source, client = self.entries.get(source_pid), self.entries.get(client_pid)
        source_mfn, client_mfn = source >> TYPE_BITS, client >> TYPE_BITS
        if source & TYPE_MASK in HOLES:
            source_mfn = 0  # what a hole had behind it before is not looked at
        if client & TYPE_MASK in HOLES:
            client_mfn = 0
        same_frame = source_mfn == client_mfn and _GRANT not in (source & TYPE_MASK, client & TYPE_MASK)
        if same_frame or source_pid == client_pid:
            return Status.OK  # also for two holes: Xen compares frames before it looks at anything else
        source_shared, client_shared = source & TYPE_MASK == _SHARED, client & TYPE_MASK == _SHARED
        if not source_shared and not client_shared:
            source_first = _lock_order(source_mfn) < _lock_order(client_mfn)
            return Status.S_HANDLE_INVALID if source_first else Status.C_HANDLE_INVALID
        frames = self.frames
        source_slot, client_slot = frames.slot_of_mfn.get(source_mfn), frames.slot_of_mfn.get(client_mfn)
        if not source_shared or (client_shared and frames.handle.item(source_slot) != source_handle):
            return Status.S_HANDLE_INVALID
        if not client_shared or frames.handle.item(client_slot) != client_handle:
            return Status.C_HANDLE_INVALID
        held = self.memory.extra_refs
        larger_moves = frames.count.item(client_slot) > frames.count.item(source_slot)
        if larger_moves and source_mfn not in held and client_mfn not in held:
            # Nobody can tell which of two frames stays. So the larger group does, with the source's bytes and handle.
            self.memory.copy(source_mfn, client_mfn)
            frames.handle[client_slot] = source_handle
            source_slot, client_slot = client_slot, source_slot
            source, client_pid, client_mfn = client, source_pid, source_mfn
        if frames.count.item(client_slot) == 1:
            self.entries.set(client_pid, source)
        else:
            self.entries.scatter(Spots(frames.members(client_slot)), source)
        frames.join(source_slot, client_slot)
        self.memory.free(client_mfn)
        self.freed_pages += 1
        self.used_frames -= 1
        return Status.OK

    def add_to_physmap(self, source_pid: int, source_handle: int, client: Domain, client_gfn: int) -> int:
        """Put the source's frame into a hole of the client; a status."""
        source = self.entries.get(source_pid)
        slot = self.frames.slot_of_mfn.get(source >> TYPE_BITS)
        if source & TYPE_MASK != _SHARED or self.frames.handle.item(slot) != source_handle:
            return Status.S_HANDLE_INVALID
        if client_gfn >> MAX_GFN_BITS:
            return Status.ENOENT  # p2m_next_level() of Xen
        client_pid = page_id(client.domid, client_gfn)
        before = self.entries.get(client_pid)
        if before & TYPE_MASK not in HOLES:
            return Status.C_HANDLE_INVALID
        if client.page_tables is not None and not client.page_tables.cover(client_gfn):
            return Status.ENOMEM
        if before >> TYPE_BITS:
            client.orphans.append(before >> TYPE_BITS)
        self.entries.set(client_pid, source)
        self.frames.link(slot, client_pid)
        client.p2m.max_gfn = max(client.p2m.max_gfn, client_gfn)
        client.shr_pages += 1
        self.freed_pages += 1
        return Status.OK

    def make_private(self, domain: Domain, gfn: int) -> int:
        """Give a RAM page a frame of its own that may be written; a status. Does nothing to one that has it.

        The last sharer takes the frame as it is, whatever max_pages says; any other gets a copy. If there is no memory
        for one, the gfn is posted on the domain's ring.
        """
        pid = page_id(domain.domid, gfn)
        value = self.entries.get(pid)
        kind = value & TYPE_MASK
        if kind not in (_SHARED, _POD):
            return Status.OK
        mfn = value >> TYPE_BITS
        slot = self.frames.slot_of_mfn.get(mfn) if mfn else NO_SLOT
        if kind == _SHARED and self.frames.count.item(slot) == 1:
            self.frames.close(slot)
            self.memory.owner.set(mfn, domain.domid)
            self.used_frames -= 1
            domain.shr_pages -= 1
            own = mfn
        else:
            room = domain.tot_pages < domain.max_pages
            fresh = self.memory.allocate(domain.domid, overwritten=True) if room else None
            if fresh is None:
                if kind == _SHARED and domain.ring_mfn is not None:
                    domain.ring_events.append(RingRequest(Gfn(gfn), None))
                return Status.ENOMEM
            own = fresh
            if kind == _SHARED:
                self.memory.copy(mfn, own)
                self.frames.unlink(slot, pid)
                self.freed_pages -= 1
                domain.shr_pages -= 1
            else:
                self.memory.page(own)[:] = 0
        domain.tot_pages += 1
        _arrived(domain, own)
        self.entries.set(pid, own << TYPE_BITS | _RW)
        return Status.OK

    def release_zero(self, domain: Domain, gfn: int, handle: int) -> int:
        """Give back the frame of a nominated page that the caller found to be all zeros; a status."""
        pid = page_id(domain.domid, gfn)
        value = self.entries.get(pid)
        mfn = value >> TYPE_BITS
        slot = self.frames.slot_of_mfn.get(mfn)
        if value & TYPE_MASK != _SHARED or self.frames.handle.item(slot) != handle:
            return Status.S_HANDLE_INVALID
        self._leave_frame(domain, pid, mfn)
        self.entries.set(pid, _POD)
        return Status.OK

    def populate(self, domain: Domain, gfn: int) -> int:
        """Put fresh RAM at a gfn; a status. A frame that was there before stays the domain's, without a gfn.

        So does the new frame, when a shared page is in its place and cannot be unshared: as in Xen (recorded in
        ``oom_populate_over_shared``), this failure is not free of effects.
        """
        if domain.dying or domain.tot_pages >= domain.max_pages:
            return Status.ENOMEM
        if domain.page_tables is not None and not domain.page_tables.cover(gfn):
            return Status.ENOMEM
        mfn = self.memory.allocate(domain.domid)
        if mfn is None:
            return Status.ENOMEM
        domain.tot_pages += 1
        _arrived(domain, mfn)
        pid = page_id(domain.domid, gfn)
        if self.entries.get(pid) & TYPE_MASK == _SHARED and (status := self.make_private(domain, gfn)) != Status.OK:
            domain.orphans.append(mfn)
            return status
        if before := self.entries.get(pid) >> TYPE_BITS:
            domain.orphans.append(before)
        self.entries.set(pid, entry(mfn, P2mType.RAM_RW))
        domain.p2m.max_gfn = max(domain.p2m.max_gfn, gfn)
        return Status.OK

    def depopulate(self, domain: Domain, gfn: int) -> int:
        """Take the RAM at a gfn away, unsharing it first; ENOMEM if that fails, EINVAL if there is none."""
        pid = page_id(domain.domid, gfn)
        value = self.entries.get(pid)
        if value & TYPE_MASK == _POD:
            self.entries.set(pid, HOLE)
            return Status.OK
        if not is_ram(value):
            return Status.EINVAL
        if (status := self.make_private(domain, gfn)) != Status.OK:
            return status
        self.give_up_frame(domain, self.entries.get(pid) >> TYPE_BITS)
        self.entries.set(pid, HOLE)
        return Status.OK

    def map_grant_frame(self, domain: Domain, gfn: int) -> int:
        """Put a frame of the hypervisor's own at a gfn, in place of what was there; ENOMEM: that cannot be unshared."""
        pid = page_id(domain.domid, gfn)
        if is_ram(self.entries.get(pid)) and (status := self.depopulate(domain, gfn)) != Status.OK:
            return status
        if before := self.entries.get(pid) >> TYPE_BITS:
            domain.orphans.append(before)
        self.entries.set(pid, entry(0, P2mType.GRANT_FRAME))
        domain.p2m.max_gfn = max(domain.p2m.max_gfn, gfn)
        return Status.OK

    def give_up_frame(self, domain: Domain, mfn: int) -> None:
        """Take a frame of its own from a domain. As in Xen it counts until nobody holds it any more."""
        if mfn in self.memory.extra_refs:
            domain.orphans.append(mfn)
            self.leaving[mfn] = domain
        else:
            self.memory.free(mfn)
            domain.tot_pages -= 1

    def release(self, mfn: int) -> Domain | None:
        """Give an extra reference back; returns the domain whose frame went with it, if one did."""
        self.memory.release(mfn)
        if mfn in self.memory.extra_refs or mfn not in self.leaving:
            return None
        domain = self.leaving.pop(mfn)
        domain.orphans.remove(mfn)
        domain.tot_pages -= 1
        self.memory.free(mfn, scrub=domain.dying)
        return domain

    def remove_mapping(self, domain: Domain, gfn: int) -> int:
        """Make a gfn a hole; ENOENT if it is one. Its own frame stays the domain's, off a shared frame it goes.

        Xen forgets the second half: it leaves the page on the frame's reverse map and in the counters, and its audit
        finds two errors from then on (recorded in ``remove_from_physmap_shared``). Here the books stay right.
        """
        pid = page_id(domain.domid, gfn)
        value = self.entries.get(pid)
        mfn = value >> TYPE_BITS
        if not is_ram(value):
            return Status.ENOENT
        if value & TYPE_MASK == _SHARED:
            self._leave_frame(domain, pid, mfn)
        elif mfn:
            domain.orphans.append(mfn)
        self.entries.set(pid, HOLE)
        return Status.OK

    def _leave_frame(self, domain: Domain, pid: int, mfn: int) -> None:
        # Take a page off a shared frame without a copy; the frame goes with its last sharer.
        slot = self.frames.slot_of_mfn.get(mfn)
        if self.frames.count.item(slot) == 1:
            self.frames.close(slot)
            self.memory.free(mfn)
            self.used_frames -= 1
        else:
            self.frames.unlink(slot, pid)
            self.freed_pages -= 1
        domain.shr_pages -= 1

    def came_last(self, domain: Domain) -> int | None:
        """The frame, of those that a fork owns, that came to it last; None if none has come since it is a fork."""
        own = (mfn for mfn in reversed(domain.arrivals) if self.memory.owner.get(mfn) == domain.domid)
        return next(own, None)

    # -- many pages --------------------------------------------------------------------------------------------------

    def nominate_many(self, pids: Index) -> tuple[Handles, Statuses]:
        """``nominate`` for many pages, in order; the same page may come twice."""
        frames = self.frames
        spots = Spots(pids)
        values = self.entries.gather(spots)
        kinds, mfns = values & TYPE_MASK, values >> TYPE_BITS
        handles = np.zeros(len(pids), np.uint64)
        statuses = np.full(len(pids), Status.EINVAL, np.int32)
        fresh = _IS_NOMINABLE[kinds]
        if self.memory.writable_frames:
            fresh &= ~np.isin(mfns, np.fromiter(self.memory.writable_frames, np.int64))
        statuses[fresh] = Status.OK
        if self.memory.extra_refs:
            held = fresh & np.isin(mfns, np.fromiter(self.memory.extra_refs, np.int64))
            statuses[held] = Status.E2BIG
            fresh &= ~held
        if (shared := kinds == _SHARED).any():
            statuses[shared] = Status.OK
            handles[shared] = frames.handle[frames.slot_of_mfn.gather(Spots(mfns[shared]))]
        if not fresh.any():
            return handles, statuses
        rows = np.flatnonzero(fresh)
        fresh_pids = pids if len(rows) == len(pids) else pids[rows]
        fresh_spots = spots if len(rows) == len(pids) else Spots(fresh_pids)
        inverse: NDArray[np.intp] | None = None
        # Pages that are on no ring yet have room for a mark: of a page that comes twice one row's mark is lost.
        frames.next.scatter(fresh_spots, rows)
        if (frames.next.gather(fresh_spots) != rows).any():
            _, first, inverse = np.unique(fresh_pids, return_index=True, return_inverse=True)
            rank = np.empty(len(first), np.intp)
            rank[np.argsort(first)] = np.arange(len(first))
            inverse = rank[inverse]
            kept = rows[np.sort(first)]
            fresh_pids = pids[kept]
            fresh_spots = Spots(fresh_pids)
        else:
            kept = rows
        fresh_mfns = mfns[kept]
        self.memory.owner.scatter(Spots(fresh_mfns), DOMID_COW)
        self.entries.scatter(fresh_spots, fresh_mfns << TYPE_BITS | _SHARED)
        given = frames.open_many(fresh_mfns, fresh_pids, fresh_spots)
        handles[rows] = given if inverse is None else given[inverse]
        self.used_frames += len(kept)
        self._count_pages(fresh_pids, tot_pages=-1, shr_pages=1)
        return handles, statuses

    def share_many(
        self, source_pids: Index, source_handles: Handles, client_pids: Index, client_handles: Handles
    ) -> Statuses:
        """``share`` for every row, in order.

        Rows that do not touch each other's frames are done all at once; if one row's client frame is named by
        another row, the order matters and the rows are taken one by one.
        """
        frames = self.frames
        client_spots = Spots(client_pids)
        sources, clients = self.entries.gather(Spots(source_pids)), self.entries.gather(client_spots)
        source_slots = self._slots_of(sources)
        client_slots = self._slots_of(clients)
        different = (sources >> TYPE_BITS != clients >> TYPE_BITS) | (sources == _GRANT) | (clients == _GRANT)
        source_good = (source_slots != NO_SLOT) & (frames.handle[source_slots] == source_handles)
        client_good = (client_slots != NO_SLOT) & (frames.handle[client_slots] == client_handles)
        joins = different & source_good & client_good
        if self._depend(source_slots, client_slots, joins):
            rows = zip(
                source_pids.tolist(),
                source_handles.tolist(),
                client_pids.tolist(),
                client_handles.tolist(),
                strict=True,
            )
            return np.fromiter((self.share(*row) for row in rows), np.int32, len(source_pids))
        statuses = np.zeros(len(source_pids), np.int32)
        for row in np.flatnonzero(different & ~joins).tolist():
            statuses[row] = self.share(
                source_pids.item(row), source_handles.item(row), client_pids.item(row), client_handles.item(row)
            )
        single = joins & (frames.count[client_slots] == 1)
        if single.any():
            self.entries.scatter(client_spots if single.all() else Spots(client_pids[single]), sources[single])
            frames.join_singles(source_slots[single], client_slots[single])
            self.memory.free_many(clients[single] >> TYPE_BITS)
            joined = int(np.count_nonzero(single))
            self.freed_pages += joined
            self.used_frames -= joined
        for row in np.flatnonzero(joins & ~single).tolist():
            self.share(source_pids.item(row), source_handles.item(row), client_pids.item(row), client_handles.item(row))
        return statuses

    def _slots_of(self, values: NDArray[np.int64]) -> Slots:
        # The slot of each entry's frame, NO_SLOT for entries that are not of the shared type.
        mfns = np.where(values & TYPE_MASK == _SHARED, values >> TYPE_BITS, 0)
        slots: Slots = self.frames.slot_of_mfn.gather(Spots(mfns))
        return slots

    def _depend(self, source_slots: Slots, client_slots: Slots, joins: NDArray[np.bool_]) -> bool:
        # True if a frame that some row gives up is named by another row. No sort: each such frame marks its slot.
        given_up = client_slots[joins]
        if len(self._mark) < len(self.frames.mfn):
            self._mark = np.zeros(len(self.frames.mfn), np.int64)
        numbers = np.arange(1, len(given_up) + 1)
        self._mark[given_up] = numbers
        depend = (
            bool((self._mark[given_up] != numbers).any())
            or bool(self._mark[source_slots].any())
            or bool(self._mark[client_slots[~joins]].any())
        )
        self._mark[given_up] = 0
        return depend

    def take_back_many(self, pids: Index, allowed: NDArray[np.bool_]) -> NDArray[np.bool_]:
        """``make_private`` for those of many pages that are alone on their frame, if ``allowed``; which were done."""
        values = self.entries.gather(Spots(pids))
        slots = self._slots_of(values)
        single: NDArray[np.bool_] = allowed & (slots != NO_SLOT) & (self.frames.count[slots] == 1)
        if single.any():
            _, first = np.unique(slots[single], return_index=True)
            rows = np.sort(np.flatnonzero(single)[first])
            leaving, mfns = pids[rows], values[rows] >> TYPE_BITS
            self.frames.close_many(slots[rows])
            self.memory.owner.scatter(Spots(mfns), (leaving >> MAX_GFN_BITS).astype(np.uint16))
            self.entries.scatter(Spots(leaving), mfns << TYPE_BITS | _RW)
            self.used_frames -= len(rows)
            self._count_pages(leaving, tot_pages=1, shr_pages=-1)
            for domid in np.unique(leaving >> MAX_GFN_BITS).tolist():
                if self.domains[domid].parent is not None:
                    _arrived(self.domains[domid], *mfns[leaving >> MAX_GFN_BITS == domid].tolist())
        return single

    def release_zero_many(self, pids: Index, handles: Handles) -> Statuses:
        """``release_zero`` for many pages, in order; the same page may come twice."""
        values = self.entries.gather(Spots(pids))
        slots = self._slots_of(values)
        statuses = np.full(len(pids), Status.S_HANDLE_INVALID, np.int32)
        named = (slots != NO_SLOT) & (self.frames.handle[slots] == handles)
        single = named & (self.frames.count[slots] == 1)
        if single.any():
            _, first = np.unique(slots[single], return_index=True)
            rows = np.flatnonzero(single)[first]
            self.frames.close_many(slots[rows])
            self.memory.free_many(values[rows] >> TYPE_BITS)
            self.entries.scatter(Spots(pids[rows]), _POD)
            self.used_frames -= len(rows)
            self._count_pages(pids[rows], shr_pages=-1)
            statuses[rows] = Status.OK
        for row in np.flatnonzero(named & ~single).tolist():
            domid, gfn = page_of(pids.item(row))
            statuses[row] = self.release_zero(self.domains[domid], gfn, handles.item(row))
        return statuses

    def destroy(self, domain: Domain) -> None:
        """Take every page from a domain: off its shared frames, and its own frames back to the machine.

        Frames of its own that somebody holds stay with it until they are released.
        """
        held = self._held_frames(domain)
        for part in domain.p2m.untouched():
            mfns = np.arange(part.first_mfn, part.first_mfn + part.count)
            self.memory.free_many(mfns[~np.isin(mfns, held)] if len(held) else mfns)
        shared: list[Index] = []
        for first_pid, chunk in domain.p2m.touched():
            kinds = chunk & TYPE_MASK
            shared.append(np.flatnonzero(kinds == _SHARED) + first_pid)
            mfns = chunk[(kinds != _SHARED) & (kinds != P2mType.GRANT_FRAME)] >> TYPE_BITS
            self.memory.free_many(mfns[(mfns != 0) & ~np.isin(mfns, held)])
        pids = np.concatenate([*shared, np.empty(0, np.int64)])
        if len(pids):
            slots = self._slots_of(self.entries.gather(Spots(pids)))
            emptied = self.frames.unlink_many(slots, pids)
            self.memory.free_many(self.frames.mfn[emptied])
            self.frames.close_many(emptied)
            self.used_frames -= len(emptied)
            self.freed_pages -= len(pids) - len(emptied)
        self.entries.drop(domain.p2m.first_key, domain.p2m.end_key - 1)
        domain.p2m.extents.clear()
        orphans = np.array(domain.orphans, np.int64)
        self.memory.free_many(orphans[~np.isin(orphans, held)])
        domain.orphans = held.tolist()
        self.leaving.update(dict.fromkeys(domain.orphans, domain))
        domain.tot_pages = len(held)
        domain.shr_pages = 0

    def _held_frames(self, domain: Domain) -> Index:
        extra_refs = self.memory.extra_refs
        return np.array([mfn for mfn in extra_refs if self.memory.owner.get(mfn) == domain.domid], np.int64)

    def _count_pages(self, pids: Index, *, tot_pages: int = 0, shr_pages: int = 0) -> None:
        # Add to the page counts of the domains of these pages, so much for each page.
        domids, counts = np.unique(pids >> MAX_GFN_BITS, return_counts=True)
        for domid, count in zip(domids.tolist(), counts.tolist(), strict=True):
            self.domains[domid].tot_pages += tot_pages * count
            self.domains[domid].shr_pages += shr_pages * count


def _arrived(domain: Domain, *mfns: int) -> None:
    if domain.parent is not None:
        for mfn in mfns:
            domain.arrivals.pop(mfn, None)
            domain.arrivals[mfn] = None


def _lock_order(mfn: int) -> int:
    # Xen locks the lower machine frame first, and a hole counts as the highest.
    return mfn or 1 << 62
