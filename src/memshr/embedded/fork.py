"""Forks: a domain whose pages come from its parent, on demand.

A page that the fork reads is nominated in the parent and shared; a page that it writes, or that the parent cannot
nominate, is copied. Forks of forks read through. (Recorded in tests/traces, the fork scenarios.)
"""

from __future__ import annotations

import numpy as np

from memshr.embedded.mem_sharing import NOMINABLE, Domain, MemSharing
from memshr.embedded.p2m import HOLE, HOLES, TYPE_BITS, TYPE_MASK, is_ram
from memshr.embedded.shared_frames import page_id
from memshr.errors import Status
from memshr.types import MAX_GFN_BITS

STORE_PFN, IOREQ_PFN, BUFIOREQ_PFN, CONSOLE_PFN = 1, 5, 6, 17
"""Numbers of the HVM parameters that hold the gfns of special pages (Xen's public hvm/params.h)."""

_SPECIAL_PAGES = (STORE_PFN, IOREQ_PFN, BUFIOREQ_PFN, CONSOLE_PFN)


def fill_from_parent(books: MemSharing, child: Domain, gfn: int, *, writable: bool) -> int:
    """Fill a hole of a fork; a status. EINVAL: none of its ancestors has anything there.

    The page is that of the nearest ancestor that has one. (Xen 4.17, for a read, takes the nearest one that it can
    nominate; so a fork of a fork may read past its parent's page while somebody maps that. No recording shows it.)
    """
    ancestor = _owner_of_page(books, child, gfn)
    if ancestor is None:
        return Status.EINVAL
    if not writable:
        handle = books.nominate(ancestor, gfn)
        if handle > 0:
            return books.add_to_physmap(page_id(ancestor.domid, gfn), handle, child, gfn)
    return _copy_page(books, ancestor, child, gfn)


def _owner_of_page(books: MemSharing, child: Domain, gfn: int) -> Domain | None:
    ancestor = child.parent
    while ancestor is not None and not is_ram(books.entries.get(page_id(ancestor.domid, gfn))):
        ancestor = ancestor.parent
    return ancestor


def _copy_page(books: MemSharing, ancestor: Domain, child: Domain, gfn: int) -> int:
    # The copy is the child's own from the start; the ancestor's frame stays as it is.
    status = books.populate(child, gfn)
    if status == Status.OK:
        own = books.entries.get(page_id(child.domid, gfn)) >> TYPE_BITS
        source_mfn = books.entries.get(page_id(ancestor.domid, gfn)) >> TYPE_BITS
        books.memory.page(own)[:] = books.memory.page(source_mfn) if source_mfn else 0
    return status


def fork(books: MemSharing, parent: Domain, child: Domain) -> int:
    """Make ``child`` a fork of ``parent``, if it is none yet; a status.

    A domain cannot be its own ancestor: EINVAL. (Xen 4.17 does not ask.)
    """
    if not child.pause_count:
        return Status.EBUSY
    if child.parent is not None:
        return Status.OK
    if _descends(parent, child):
        return Status.EINVAL
    max_pages = child.max_pages
    child.parent = parent
    child.max_pages = parent.max_pages
    status = _copy_special_pages(books, parent, child)
    if status != Status.OK:
        child.parent, child.max_pages = None, max_pages
        return status
    parent.forks += 1
    child.p2m.max_gfn = max(child.p2m.max_gfn, parent.p2m.max_gfn)
    return Status.OK


def _descends(domain: Domain, ancestor: Domain) -> bool:
    line: Domain | None = domain
    while line is not None and line is not ancestor:
        line = line.parent
    return line is ancestor


def reset(books: MemSharing, child: Domain, *, state: bool, memory: bool) -> int:
    """Bring a fork back to its parent's memory and/or state; a status.

    Its private pages are dropped if they could be nominated: what could not be shared again could not be refilled.
    """
    if not state and not memory:
        return Status.EINVAL
    if child.parent is None:
        return Status.ENOSYS
    if memory:
        for first_pid, chunk in child.p2m.touched():
            private = np.flatnonzero(np.isin(chunk & TYPE_MASK, NOMINABLE)) + first_pid
            for pid in private.tolist():
                mfn = books.entries.get(pid) >> TYPE_BITS
                if mfn not in books.memory.extra_refs:
                    books.give_up_frame(child, mfn)
                    books.entries.set(pid, HOLE)
    return _copy_special_pages(books, child.parent, child) if state else Status.OK


def _copy_special_pages(books: MemSharing, parent: Domain, child: Domain) -> int:
    gfns = {parameter: parent.hvm_params[parameter] for parameter in _SPECIAL_PAGES if parameter in parent.hvm_params}
    owners = {gfn: _owner_of_page(books, child, gfn) for gfn in gfns.values() if _is_hole(books, child, gfn)}
    missing = [(owner, gfn) for gfn, owner in owners.items() if owner is not None]
    free_pages = books.memory.free_pages
    no_room = child.tot_pages + len(missing) > child.max_pages or (free_pages is not None and free_pages < len(missing))
    if missing and no_room:
        return Status.ENOMEM
    for owner, gfn in missing:
        if (status := _copy_page(books, owner, child, gfn)) != Status.OK:
            return status
    child.hvm_params.update(gfns)
    return Status.OK


def _is_hole(books: MemSharing, domain: Domain, gfn: int) -> bool:
    return not gfn >> MAX_GFN_BITS and books.entries.get(page_id(domain.domid, gfn)) & TYPE_MASK in HOLES
