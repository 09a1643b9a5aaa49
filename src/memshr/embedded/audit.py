"""Audit: the books of the embedded hypervisor checked in both directions, and as Xen checks them.

Xen's ``mem_sharing_audit()`` walks the list of shared frames and, for each, its reverse map: is every (domain, gfn) on
it a shared entry of that domain's p2m that points back at the frame? It only counts errors, and it never sees an entry
of a p2m that no reverse map has. This audit goes the other way too. It checks the counters and the handles, and names
each finding by the invariant that it breaks (ARCHITECTURE.md). ``xen_errors`` is counted apart, in Xen's own order:
what Xen skips after an error is not counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memshr.embedded.columns import Index, Spots
from memshr.embedded.p2m import TYPE_BITS, TYPE_MASK
from memshr.embedded.shared_frames import FIRST_HANDLE, Slots, page_of
from memshr.types import DOMID_COW, MAX_GFN_BITS, AuditFinding, AuditReport, Counters, DomId, Gfn, Mfn, P2mType

if TYPE_CHECKING:
    from memshr.embedded.mem_sharing import MemSharing

_RINGS_AT_ONCE = 512
# Rings are walked all at once, a step at a time, while they are this short; what is longer is walked one by one.


class _Findings:
    def __init__(self) -> None:
        self.found: list[AuditFinding] = []

    def add(
        self,
        invariant: str,
        expected: str,
        found: str,
        cause: str,
        *,
        pid: int | None = None,
        mfn: int | None = None,
    ) -> None:
        """Note one finding."""
        domid, gfn = page_of(pid) if pid is not None else (None, None)
        self.found.append(
            AuditFinding(
                invariant,
                None if domid is None else DomId(domid),
                None if gfn is None else Gfn(gfn),
                None if mfn is None else Mfn(mfn),
                expected,
                found,
                cause,
            )
        )


def audit(books: MemSharing) -> AuditReport:
    """Check invariants I1 to I6. Cost: linear in the shared pages and in the p2m entries that exist."""
    findings = _Findings()
    slots = books.frames.slots()
    _check_frames(books, slots, findings)
    members = _walk_rings(books, slots, findings)
    shared_pids, shared_mfns = _shared_entries(books)
    _check_reverse_maps(books, members, findings)
    _check_p2m(books, members, shared_pids, shared_mfns, findings)
    _check_counters(books, slots, shared_pids, findings)
    xen_errors = _count_as_xen(books, slots, members)
    return AuditReport(tuple(findings.found), xen_errors, Counters(books.freed_pages, books.used_frames))


@dataclass(frozen=True, slots=True)
class _Members:
    """What the reverse maps hold: page ids, the slot that each is on, if its domain exists, and its p2m entry."""

    pids: Index
    slots: Slots
    known: NDArray[np.bool_]
    values: NDArray[np.int64]


def _count_as_xen(books: MemSharing, slots: Slots, members: _Members) -> int:
    """The number that Xen's audit answers. Its checks, in its order, are described in docs/xen-interface.md."""
    frames, mfns = books.frames, books.frames.mfn[slots]
    locked = frames.slot_of_mfn.gather(Spots(mfns)) == slots
    wrong_owner = locked & (books.memory.owner.gather(Spots(mfns)) != DOMID_COW)
    walked = locked & (frames.count[slots] > 0)
    is_walked = np.zeros(len(frames.mfn), np.bool_)
    is_walked[slots[walked]] = True
    seen, known = is_walked[members.slots], members.known
    wrong_frame = seen & known & (members.values >> TYPE_BITS != frames.mfn[members.slots])
    wrong_type = seen & known & (members.values & TYPE_MASK != P2mType.RAM_SHARED)
    entries = np.bincount(members.slots[seen & known], minlength=len(frames.mfn))
    wrong_count = entries[slots[walked]] != frames.count[slots[walked]]
    wrong = (~walked, wrong_owner, seen & ~known, wrong_frame, wrong_type, wrong_count)
    total_differs = int(np.count_nonzero(walked)) != books.used_frames
    return sum(int(np.count_nonzero(check)) for check in wrong) + total_differs


def _check_frames(books: MemSharing, slots: Slots, findings: _Findings) -> None:
    frames = books.frames
    mfns, handles = frames.mfn[slots], frames.handle[slots]
    owners = books.memory.owner.gather(Spots(mfns))
    for row in np.flatnonzero(owners != DOMID_COW).tolist():
        findings.add(
            "I1",
            f"owner {int(DOMID_COW):#x} (the sharing owner)",
            f"owner {owners.item(row):#x}",
            "a frame was given to a domain, or freed, while its page was still shared",
            mfn=mfns.item(row),
        )
    for row in np.flatnonzero(frames.slot_of_mfn.gather(Spots(mfns)) != slots).tolist():
        findings.add(
            "I1",
            f"the entry of the table of shared frames that names it ({slots.item(row)})",
            f"{frames.slot_of_mfn.get(mfns.item(row))}",
            "a frame is listed twice as shared, or its record was cleared",
            mfn=mfns.item(row),
        )
    for row in np.flatnonzero((handles < FIRST_HANDLE) | (handles >= frames.next_handle)).tolist():
        findings.add(
            "I5",
            f"a handle that was handed out ({FIRST_HANDLE} to {frames.next_handle - 1})",
            f"handle {handles.item(row)}",
            "the handle of a shared frame was overwritten",
            mfn=mfns.item(row),
        )
    order = np.argsort(handles, kind="stable")
    again = np.flatnonzero(handles[order][1:] == handles[order][:-1]) + 1
    for row in order[again].tolist():
        findings.add(
            "I5",
            "a handle that names one frame",
            f"handle {handles.item(row)} on a second frame",
            "a handle was used again",
            mfn=mfns.item(row),
        )


def _walk_rings(books: MemSharing, slots: Slots, findings: _Findings) -> _Members:
    """Everything that the reverse maps hold; checks I2 and I4 on the way."""
    frames = books.frames
    counts, heads = frames.count[slots], frames.head[slots]
    for row in np.flatnonzero(counts <= 0).tolist():
        findings.add(
            "I2",
            "at least one sharer",
            f"a count of {counts.item(row)}",
            "a frame was left in the table of shared frames when its last sharer went",
            mfn=frames.mfn.item(slots.item(row)),
        )
    pids: list[Index] = []
    owners: list[Slots] = []
    lengths = np.zeros(len(slots), np.int64)
    rows = np.flatnonzero(counts > 0)
    current = heads[rows]
    for _ in range(_RINGS_AT_ONCE):
        if not len(rows):
            break
        pids.append(current)
        owners.append(slots[rows])
        lengths[rows] += 1
        following = frames.next.gather(Spots(current))
        # A ring that is longer than its count is walked one step beyond it and no further: links may be broken.
        goes_on = (following != heads[rows]) & (lengths[rows] <= counts[rows])
        rows, current = rows[goes_on], following[goes_on]
    for row, start in zip(rows.tolist(), current.tolist(), strict=True):
        members: list[int] = []
        pid = start
        while pid != heads.item(row) and lengths.item(row) + len(members) <= counts.item(row):
            members.append(pid)
            pid = frames.next.get(pid)
        lengths[row] += len(members)
        pids.append(np.array(members, np.int64))
        owners.append(np.full(len(members), slots[row], np.int32))
    for row in np.flatnonzero((lengths != counts) & (counts > 0)).tolist():
        length, count = lengths.item(row), counts.item(row)
        findings.add(
            "I4",
            f"a reference count of the size of the reverse map, {length if length < count else f'more than {count}'}",
            f"a count of {count}",
            "a sharer came or went and only one of the two was changed",
            mfn=frames.mfn.item(slots.item(row)),
        )
    empty = np.empty(0, np.int64)
    all_pids = np.concatenate([*pids, empty])
    known = np.isin(all_pids >> MAX_GFN_BITS, np.fromiter(books.domains, np.int64))
    values = np.zeros(len(all_pids), np.int64)
    values[known] = books.entries.gather(Spots(all_pids[known]))
    return _Members(all_pids, np.concatenate([*owners, empty.astype(np.int32)]), known, values)


def _shared_entries(books: MemSharing) -> tuple[Index, Index]:
    """Every (page id, mfn) of the shared type that some domain's p2m holds, ascending by page id."""
    pids: list[Index] = [np.empty(0, np.int64)]
    mfns: list[Index] = [np.empty(0, np.int64)]
    for domid in sorted(books.domains):
        for first_pid, chunk in books.domains[domid].p2m.touched():
            offsets = np.flatnonzero(chunk & TYPE_MASK == P2mType.RAM_SHARED)
            pids.append(offsets + first_pid)
            mfns.append(chunk[offsets] >> TYPE_BITS)
    return np.concatenate(pids), np.concatenate(mfns)


def _check_reverse_maps(books: MemSharing, members: _Members, findings: _Findings) -> None:
    """I3, from the reverse maps to the p2m: what Xen's audit does."""
    wanted = books.frames.mfn[members.slots] << TYPE_BITS | P2mType.RAM_SHARED
    for row in np.flatnonzero(members.values != wanted).tolist():
        mfn, value = books.frames.mfn.item(members.slots.item(row)), members.values.item(row)
        if not members.known.item(row):
            found, cause = "an unknown domain", "a domain went away and left a page on the reverse map"
        elif value >> TYPE_BITS != mfn:
            found = f"the p2m maps mfn {value >> TYPE_BITS:#x}"
            cause = "the p2m was changed without taking the page off the frame"
        else:
            found = f"the p2m says {_type_name(value & TYPE_MASK)}"
            cause = "the type of a shared page was changed without unsharing it"
        pid = members.pids.item(row)
        findings.add("I3", f"a p2m entry RAM_SHARED of mfn {mfn:#x}", found, cause, pid=pid, mfn=mfn)


def _type_name(number: int) -> str:
    return P2mType(number).name if number in list(P2mType) else f"type {number}"


def _check_p2m(
    books: MemSharing, entries: _Members, shared_pids: Index, shared_mfns: Index, findings: _Findings
) -> None:
    """I3, from the p2m to the reverse maps: what Xen's audit cannot see. And links that do not fit together."""
    order = np.argsort(entries.pids, kind="stable")
    members, frames = entries.pids[order], books.frames.mfn[entries.slots[order]]
    for row in np.flatnonzero(members[1:] == members[:-1]).tolist():
        findings.add(
            "I3",
            "one place in the reverse maps",
            "a second place",
            "a page was linked to a frame twice",
            pid=members.item(row + 1),
            mfn=frames.item(row + 1),
        )
    position = np.minimum(np.searchsorted(members, shared_pids), max(len(members) - 1, 0))
    listed = members[position] == shared_pids if len(members) else np.zeros(len(shared_pids), np.bool_)
    for row in np.flatnonzero(~listed).tolist():
        findings.add(
            "I3",
            f"a place in the reverse map of mfn {shared_mfns.item(row):#x}",
            "none",
            "a page was put on a frame, or left its reverse map, and only one of the two books was changed",
            pid=shared_pids.item(row),
            mfn=shared_mfns.item(row),
        )
    back = books.frames.prev.gather(Spots(books.frames.next.gather(Spots(entries.pids))))
    for row in np.flatnonzero(back != entries.pids).tolist():
        findings.add(
            "I3",
            "a sharer whose neighbour links back to it",
            f"a link to domain {page_of(back.item(row))[0]} gfn {page_of(back.item(row))[1]:#x}",
            "a link of the reverse map was overwritten",
            pid=entries.pids.item(row),
            mfn=books.frames.mfn.item(entries.slots.item(row)),
        )


def _check_counters(books: MemSharing, slots: Slots, shared_pids: Index, findings: _Findings) -> None:
    counter_cause = "a call changed the books and not the counter, or the other way round"

    def compare(what: str, expected: int, found: int) -> None:
        if expected != found:
            findings.add("I6", f"{what} {expected}", f"{found}", counter_cause)

    compare("used_frames", len(slots), books.used_frames)
    compare("freed_pages", len(shared_pids) - len(slots), books.freed_pages)
    domids, counts = np.unique(shared_pids >> MAX_GFN_BITS, return_counts=True)
    shared_of = dict(zip(domids.tolist(), counts.tolist(), strict=True))
    for domid, domain in books.domains.items():
        compare(f"shr_pages of domain {domid}", shared_of.get(domid, 0), domain.shr_pages)
        compare(f"tot_pages of domain {domid}", _owned_pages(books, domid), domain.tot_pages)
    total = sum(domain.shr_pages for domain in books.domains.values())
    compare("the sum of the domains' shr_pages", books.used_frames + books.freed_pages, total)


def _owned_pages(books: MemSharing, domid: int) -> int:
    p2m = books.domains[domid].p2m
    owned = sum(part.count for part in p2m.untouched()) + len(books.domains[domid].orphans)
    for _, chunk in p2m.touched():
        kinds: NDArray[np.int64] = chunk & TYPE_MASK
        owned += int(np.count_nonzero((chunk >> TYPE_BITS != 0) & _OWNED[kinds]))
    return owned


_OWNED = np.ones(TYPE_MASK + 1, np.bool_)
_OWNED[[P2mType.RAM_SHARED, P2mType.GRANT_FRAME]] = False
