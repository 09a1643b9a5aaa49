"""Forks: a domain whose pages come from its parent, on demand.

A page that the fork reads is nominated in the parent and shared; a page that it writes, or that the parent cannot
nominate, is copied. Forks of forks read through. (Recorded in tests/traces, the fork scenarios.)
"""

from __future__ import annotations

import numpy as np

from memshr.embedded.columns import CHUNK_BITS
from memshr.embedded.mem_sharing import Domain, MemSharing
from memshr.embedded.p2m import HOLE, HOLES, TYPE_BITS, TYPE_MASK, is_ram
from memshr.embedded.shared_frames import page_id
from memshr.errors import Status
from memshr.types import MAX_GFN_BITS, P2mType

STORE_PFN, IOREQ_PFN, BUFIOREQ_PFN, CONSOLE_PFN = 1, 5, 6, 17
"""Numbers of the HVM parameters that hold the gfns of special pages (Xen's public hvm/params.h)."""

_SPECIAL_PAGES = (STORE_PFN, IOREQ_PFN, BUFIOREQ_PFN, CONSOLE_PFN)


def fill_from_parent(books: MemSharing, child: Domain, gfn: int, *, writable: bool) -> int:
    """Fill a hole of a fork; a status. EINVAL: none of its ancestors has anything there.

    The page is that of the nearest ancestor that has one. (Xen 4.17, for a read, takes the nearest one that it can
    nominate; so a fork of a fork may read past its parent's page while somebody maps that. No recording shows it.)
    """
    ancestor = _owner_of_page(books, child.parent, gfn)
    if ancestor is None:
        return Status.EINVAL
    if not writable:
        handle = books.nominate(ancestor, gfn)
        if handle > 0:
            return books.add_to_physmap(page_id(ancestor.domid, gfn), handle, child, gfn)
    return _copy_page(books, ancestor, child, gfn)


def _owner_of_page(books: MemSharing, domain: Domain | None, gfn: int) -> Domain | None:
    # The domain itself, or the nearest of its ancestors that has RAM there.
    while domain is not None and not is_ram(books.entries.get(page_id(domain.domid, gfn))):
        domain = domain.parent
    return domain


def _copy_page(books: MemSharing, ancestor: Domain, child: Domain, gfn: int) -> int:
    # The child gets the contents in a frame of its own; the ancestor's frame stays as it is. (Xen writes special pages
    # into the frame that the child has, even if that is shared: whoever shares it would read them, too.)
    source = books.entries.get(page_id(ancestor.domid, gfn))
    before = books.entries.get(page_id(child.domid, gfn))
    if before & TYPE_MASK in HOLES:
        status = books.populate(child, gfn)
    elif not is_ram(before) or before >> TYPE_BITS == source >> TYPE_BITS:
        return Status.OK
    else:
        status = books.make_private(child, gfn)
    if status == Status.OK:
        own = books.entries.get(page_id(child.domid, gfn)) >> TYPE_BITS
        books.memory.page(own)[:] = books.memory.page(source >> TYPE_BITS) if source >> TYPE_BITS else 0
    return status


def fork(books: MemSharing, parent: Domain, child: Domain) -> int:
    """Make ``child`` a fork of ``parent``; a status. One that is a fork already only gets that domain's settings again.

    Where it fails ``child`` is no fork afterwards; as in Xen it keeps the pages that it got by then, and max_pages.

    A domain cannot be its own ancestor: EINVAL. (Xen 4.17 does not ask.)
    """
    if not child.pause_count:
        return Status.EBUSY
    if child.parent is None:
        if _descends(parent, child):
            return Status.EINVAL
        parent.forks += 1
        child.parent = parent
        child.arrivals.clear()
        child.max_pages = parent.max_pages
    status = _copy_settings(books, parent, child)
    if status != Status.OK:
        leave_parent(child)
    return status


def leave_parent(child: Domain) -> Domain | None:
    """Make a fork an ordinary domain; returns the domain that it was a fork of."""
    parent, child.parent = child.parent, None
    if parent is not None:
        parent.forks -= 1
    return parent


def _descends(domain: Domain, ancestor: Domain) -> bool:
    line: Domain | None = domain
    while line is not None and line is not ancestor:
        line = line.parent
    return line is ancestor


def reset(books: MemSharing, child: Domain, *, state: bool, memory: bool) -> int:
    """Bring a fork back to its parent's memory and/or state; a status.

    Its private pages are dropped if they could be nominated: what could not be shared again could not be refilled.
    As in Xen a reset of the memory alone answers why the page that came last stays, whatever became of the others.
    """
    if not state and not memory:
        return Status.EINVAL
    if child.parent is None:
        return Status.ENOSYS
    status = _drop_private_pages(books, child) if memory else Status.OK
    return _copy_settings(books, child.parent, child) if state else status


def _drop_private_pages(books: MemSharing, child: Domain) -> int:
    for part in child.p2m.untouched():
        books.entries.chunk(page_id(child.domid, part.first_gfn) >> CHUNK_BITS)
    # What the child had before it was a fork is taken to have come in the order of its gfns.
    came_last = books.came_last(child)
    status: int = Status.EINVAL if came_last or child.orphans else Status.OK  # unless it is found at a gfn
    for first_pid, chunk in child.p2m.touched():
        private = np.flatnonzero((chunk >> TYPE_BITS != 0) & (chunk & TYPE_MASK != P2mType.RAM_SHARED)) + first_pid
        for pid in private.tolist():
            value = books.entries.get(pid)
            mfn = value >> TYPE_BITS
            refusal = books.why_not_nominable(value)
            if mfn == came_last or not came_last:
                status = refusal
            if refusal == Status.OK:
                books.give_up_frame(child, mfn)
                books.entries.set(pid, HOLE)
    return status


def _copy_settings(books: MemSharing, parent: Domain, child: Domain) -> int:
    child.hvm_params.update({number: value for number, value in parent.hvm_params.items() if value})
    status = _copy_special_pages(books, parent, child)
    if status == Status.OK:
        child.p2m.max_gfn = max(child.p2m.max_gfn, parent.p2m.max_gfn)
    return status


def _copy_special_pages(books: MemSharing, parent: Domain, child: Domain) -> int:
    for parameter in _SPECIAL_PAGES:
        gfn = parent.hvm_params.get(parameter, 0)
        owner = _owner_of_page(books, parent, gfn) if gfn and not gfn >> MAX_GFN_BITS else None
        if owner is not None and (status := _copy_page(books, owner, child, gfn)) != Status.OK:
            return status
    return Status.OK
