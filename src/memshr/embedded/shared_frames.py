"""The books of memory sharing: which frames are shared, their handles, and who is on each (the reverse map).

What makes this hard: a frame may have one sharer or a million, groups are put together whole, and a million calls
must cost seconds. So the reverse map of a frame is a ring of *page ids* (``domid << 36 | gfn``), linked through two
sparse columns. Joining two rings is four writes; leaving one is two; a page that is on no shared frame costs nothing.
A shared frame has a *slot* in a dense table: its mfn, its handle, the count of its sharers (Xen's type count) and one
page id of its ring.

The count is kept apart from the ring on purpose: audit compares the two (I4).
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from memshr.embedded.columns import Column, Index, Spots
from memshr.runs import alike
from memshr.types import MAX_GFN_BITS

NO_SLOT = 0
FIRST_HANDLE = 2
"""Xen's first handle (recorded in tests/traces)."""

NOWHERE = -1
"""A page id of no domain, which reads as a hole: it stands for gfns beyond the address width."""

Slots = NDArray[np.int32]


def page_id(domid: int, gfn: int) -> int:
    """The number that stands for one page of one domain in the books."""
    return domid << MAX_GFN_BITS | gfn


def page_of(pid: int) -> tuple[int, int]:
    """The domid and gfn of a page id."""
    return pid >> MAX_GFN_BITS, pid & (1 << MAX_GFN_BITS) - 1


class SharedFrames:
    """Every shared frame of a host. It knows nothing of p2m and contents: the hypervisor keeps them in step."""

    def __init__(self) -> None:
        self.slot_of_mfn = Column(np.int32)
        self.next = Column(np.int64)
        self.prev = Column(np.int64)
        self.next_handle = FIRST_HANDLE
        self._capacity = 0
        self.mfn: NDArray[np.int64] = np.zeros(0, np.int64)
        self.handle: NDArray[np.uint64] = np.zeros(0, np.uint64)
        self.head: NDArray[np.int64] = np.zeros(0, np.int64)
        self.count: NDArray[np.int32] = np.zeros(0, np.int32)
        self._free: NDArray[np.int32] = np.zeros(0, np.int32)
        self._free_count = 0
        self._grow(1024)

    def _grow(self, capacity: int) -> None:
        def grown(column: NDArray[Any]) -> NDArray[Any]:
            return np.concatenate([column, np.zeros(capacity - len(column), column.dtype)])

        self.mfn, self.handle = grown(self.mfn), grown(self.handle)
        self.head, self.count = grown(self.head), grown(self.count)
        fresh = np.arange(capacity - 1, max(self._capacity, NO_SLOT + 1) - 1, -1, dtype=np.int32)
        free = np.empty(capacity, np.int32)
        free[: self._free_count] = self._free[: self._free_count]
        free[self._free_count : self._free_count + len(fresh)] = fresh
        self._free = free
        self._free_count += len(fresh)
        self._capacity = capacity

    def _take_slots(self, count: int) -> Slots:
        while self._free_count < count:
            self._grow(max(2 * self._capacity, self._capacity + count))
        self._free_count -= count
        return self._free[self._free_count : self._free_count + count][::-1].copy()

    def _give_slots(self, slots: Slots) -> None:
        self._free[self._free_count : self._free_count + len(slots)] = slots
        self._free_count += len(slots)

    def slots(self) -> Slots:
        """The slots in use, ascending."""
        return np.flatnonzero(self.mfn).astype(np.int32)

    # -- one frame ---------------------------------------------------------------------------------------------------

    def open(self, mfn: int, pid: int) -> int:
        """Make ``mfn`` a shared frame with the one sharer ``pid``; returns its new handle."""
        if not self._free_count:
            self._grow(2 * self._capacity)
        self._free_count -= 1
        slot = self._free.item(self._free_count)
        handle = self.next_handle
        self.next_handle += 1
        self.mfn[slot] = mfn
        self.handle[slot] = handle
        self.head[slot] = pid
        self.count[slot] = 1
        self.slot_of_mfn.set(mfn, slot)
        self.next.set(pid, pid)
        self.prev.set(pid, pid)
        return handle

    def close(self, slot: int) -> None:
        """The frame is shared no longer; its handle is dead."""
        self.slot_of_mfn.set(self.mfn.item(slot), NO_SLOT)
        self.mfn[slot] = 0
        self.handle[slot] = 0
        self.count[slot] = 0
        self._free[self._free_count] = slot
        self._free_count += 1

    def link(self, slot: int, pid: int) -> None:
        """Add a sharer."""
        head = self.head.item(slot)
        after = self.next.get(head)
        self.next.set(head, pid)
        self.prev.set(pid, head)
        self.next.set(pid, after)
        self.prev.set(after, pid)
        self.count[slot] += 1

    def unlink(self, slot: int, pid: int) -> None:
        """Take a sharer off; not the last one (that is ``close``)."""
        before = self.prev.get(pid)
        after = self.next.get(pid)
        self.next.set(before, after)
        self.prev.set(after, before)
        if self.head.item(slot) == pid:
            self.head[slot] = after
        self.count[slot] -= 1

    def members(self, slot: int) -> Index:
        """The page ids on a frame, one after the other as they are linked. Cost: linear in their number."""
        head = self.head.item(slot)
        found = [head]
        pid = self.next.get(head)
        while pid != head:
            found.append(pid)
            pid = self.next.get(pid)
        return np.array(found, np.int64)

    def join(self, source_slot: int, client_slot: int) -> None:
        """Put the client's ring into the source's, and close the client's slot. Cost: constant."""
        source, client = self.head.item(source_slot), self.head.item(client_slot)
        after, before = self.next.get(source), self.prev.get(client)
        self.next.set(source, client)
        self.prev.set(client, source)
        self.next.set(before, after)
        self.prev.set(after, before)
        self.count[source_slot] += self.count[client_slot]
        self.close(client_slot)

    # -- many frames -------------------------------------------------------------------------------------------------

    def open_many(self, mfns: Index, pids: Index, spots: Spots) -> NDArray[np.uint64]:
        """``open`` for many distinct frames; returns their handles, ascending. ``spots`` are those of ``pids``."""
        slots = self._take_slots(len(mfns))
        handles = np.arange(self.next_handle, self.next_handle + len(mfns), dtype=np.uint64)
        self.next_handle += len(mfns)
        self.mfn[slots] = mfns
        self.handle[slots] = handles
        self.head[slots] = pids
        self.count[slots] = 1
        self.slot_of_mfn.scatter(Spots(mfns), slots)
        self.next.scatter(spots, pids)
        self.prev.scatter(spots, pids)
        return handles

    def close_many(self, slots: Slots) -> None:
        """``close`` for many distinct slots."""
        self.slot_of_mfn.scatter(Spots(self.mfn[slots]), NO_SLOT)
        self.mfn[slots] = 0
        self.handle[slots] = 0
        self.count[slots] = 0
        self._give_slots(slots)

    def join_singles(self, source_slots: Slots, client_slots: Slots) -> None:
        """``join`` for many clients that each have one sharer; sources may repeat, clients not, and none is both."""
        order = np.argsort(source_slots, kind="stable")
        sources = source_slots[order]
        pids = self.head[client_slots[order]]
        edges = alike(sources)
        starts, ends, lengths = edges[:-1], edges[1:] - 1, np.diff(edges)
        heads = self.head[sources[starts]]
        head_spots = Spots(heads)
        afters = self.next.gather(head_spots)
        prevs = np.empty_like(pids)
        prevs[1:] = pids[:-1]
        prevs[starts] = heads
        nexts = np.empty_like(pids)
        nexts[:-1] = pids[1:]
        nexts[ends] = afters
        spots = Spots(pids)
        self.next.scatter(spots, nexts)
        self.prev.scatter(spots, prevs)
        self.next.scatter(head_spots, pids[starts])
        self.prev.scatter(Spots(afters), pids[ends])
        self.count[sources[starts]] += lengths.astype(np.int32)
        self.close_many(client_slots)

    def unlink_many(self, slots: Slots, pids: Index) -> Slots:
        """Take many distinct sharers off their frames: ``pids[i]`` leaves ``slots[i]``.

        Frames that nobody is left on are *not* closed, and their rings not put right: their slots are returned, each
        once, for the caller to decide what becomes of the frame.

        Cost: log2 of the longest run of neighbours that leave together, times the number of pages.
        """
        frames, leaving = np.unique(slots, return_counts=True)
        self.count[frames] -= leaving.astype(np.int32)
        emptied: Slots = frames[self.count[frames] == 0]
        stays = self.count[slots] > 0
        slots, pids = slots[stays], pids[stays]
        if not len(pids):
            return emptied
        order = np.argsort(pids)
        pids, slots = pids[order], slots[order]
        spots = Spots(pids)
        # Follow the links past every page that leaves too. Every ring here keeps somebody, so this ends.
        after = self._first_staying(pids, self.next.gather(spots))
        before = self._first_staying(pids, self.prev.gather(spots))
        self.next.scatter(Spots(before), after)
        self.prev.scatter(Spots(after), before)
        headless = self.head[slots] == pids
        self.head[slots[headless]] = after[headless]
        return emptied

    @staticmethod
    def _first_staying(leaving: Index, neighbours: Index) -> Index:
        # leaving is sorted. Pointer jumping: a neighbour that leaves is replaced by that one's own neighbour.
        while True:
            position = np.minimum(np.searchsorted(leaving, neighbours), len(leaving) - 1)
            leaves = leaving[position] == neighbours
            if not leaves.any():
                return neighbours
            neighbours = np.where(leaves, neighbours[position], neighbours)
