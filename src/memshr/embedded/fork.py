"""Forks: a domain whose pages come from its parent, on demand.

A page that the fork reads is nominated in the parent and shared; a page that it writes, or that the parent cannot
nominate, is copied. Forks of forks read through. (Recorded in tests/traces, the fork scenarios.)
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from memshr.embedded.p2m import TYPE_BITS, TYPE_MASK, entry, is_ram
from memshr.embedded.shared_frames import page_id
from memshr.errors import Status
from memshr.types import P2mType

if TYPE_CHECKING:
    from memshr.embedded.mem_sharing import Domain, MemSharing

STORE_PFN, IOREQ_PFN, BUFIOREQ_PFN, CONSOLE_PFN = 1, 5, 6, 17
"""Numbers of the HVM parameters that hold the gfns of special pages (Xen's public hvm/params.h)."""

_SPECIAL_PAGES = (STORE_PFN, IOREQ_PFN, BUFIOREQ_PFN, CONSOLE_PFN)


def fill_from_parent(books: MemSharing, child: Domain, gfn: int, *, writable: bool) -> int:
    """Fill a hole of a fork; a status. EINVAL: it is no fork, or none of its ancestors has anything there."""
    if not writable:
        ancestor = child.parent
        while ancestor is not None:
            handle = books.nominate(ancestor, gfn)
            if handle > 0:
                return books.add_to_physmap(page_id(ancestor.domid, gfn), handle, child, gfn)
            ancestor = ancestor.parent
    return _copy_from_parent(books, child, gfn)


def _copy_from_parent(books: MemSharing, child: Domain, gfn: int) -> int:
    ancestor = child.parent
    while ancestor is not None:
        value = books.entries.get(page_id(ancestor.domid, gfn))
        if is_ram(value):
            # The copy is the child's own from the start; the parent's frame stays as it is.
            status = books.populate(child, gfn)
            if status == Status.OK:
                own = books.entries.get(page_id(child.domid, gfn)) >> TYPE_BITS
                source_mfn = value >> TYPE_BITS
                books.memory.page(own)[:] = books.memory.page(source_mfn) if source_mfn else 0
            return status
        ancestor = ancestor.parent
    return Status.EINVAL


def fork(books: MemSharing, parent: Domain, child: Domain) -> int:
    """Make ``child`` a fork of ``parent``, if it is none yet; a status."""
    if parent.vcpus != child.vcpus:
        return Status.EINVAL
    if not child.pause_count:
        return Status.EBUSY
    if child.parent is None:
        child.parent = parent
        parent.forks += 1
        child.max_pages = parent.max_pages
        child.p2m.max_gfn = max(child.p2m.max_gfn, parent.p2m.max_gfn)
        return _copy_special_pages(books, parent, child)
    return Status.OK


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
            private = np.flatnonzero(chunk & TYPE_MASK == P2mType.RAM_RW) + first_pid
            for pid in private.tolist():
                mfn = books.entries.get(pid) >> TYPE_BITS
                if not books.memory.extra_refs.get(mfn, 0):
                    books.memory.free(mfn)
                    books.entries.set(pid, entry(0, P2mType.HOLE))
                    child.tot_pages -= 1
    return _copy_special_pages(books, child.parent, child) if state else Status.OK


def _copy_special_pages(books: MemSharing, parent: Domain, child: Domain) -> int:
    for parameter in _SPECIAL_PAGES:
        gfn = parent.hvm_params.get(parameter)
        if gfn is None:
            continue
        child.hvm_params[parameter] = gfn
        if not is_ram(books.entries.get(page_id(child.domid, gfn))):
            status = _copy_from_parent(books, child, gfn)
            if status == Status.ENOMEM:
                return status
    return Status.OK
