"""The words of the field, as types: page frame numbers, domains, handles, page types, counters, audit findings.

Everything below the command line speaks in these. Numbers that come in bulk are numpy arrays of the dtypes named
here; objects appear only at the edge (one result of one call).
"""

from __future__ import annotations

import enum
import mmap
from dataclasses import dataclass, field
from typing import NewType

import numpy as np
from numpy.typing import NDArray

__all__ = [
    "HUGE_PAGE_PAGES",
    "PAGE_SHIFT",
    "PAGE_SIZE",
    "AuditFinding",
    "AuditReport",
    "Counters",
    "DomId",
    "DomIds",
    "DomainInfo",
    "DomainKind",
    "Extent",
    "Gfn",
    "Gfns",
    "GrantRef",
    "Handle",
    "Handles",
    "Mfn",
    "P2mType",
    "PageArray",
    "PageBytes",
    "RingRequest",
    "Statuses",
]

PAGE_SHIFT = 12
PAGE_SIZE = 1 << PAGE_SHIFT
"""Bytes in a page. Sharing works on 4 KiB pages only, on Xen and on Linux alike; larger pages are split first."""

MAX_GFN_BITS = 36
"""Guest physical addresses have at most 48 bits, so guest frame numbers have at most 36 (Xen's x86 p2m)."""

Gfn = NewType("Gfn", int)
"""Guest frame number: the index of a page in a domain's own physical address space."""

Mfn = NewType("Mfn", int)
"""Machine frame number: the index of a page of real memory (on QEMU: of a frame pool)."""

DomId = NewType("DomId", int)
"""Domain number, 16 bits; 0 is the control domain and never has pages that can be shared."""

Handle = NewType("Handle", int)
"""The unique 64-bit name of one *version* of a guest page. 0 and 1 are never handed out."""

GrantRef = NewType("GrantRef", int)
"""Index into a domain's grant table."""

DOMID_SELF = DomId(0x7FF0)
DOMID_COW = DomId(0x7FF2)
"""The owner of every shared frame (Xen's ``dom_cow``)."""

DomIds = NDArray[np.uint16]
Gfns = NDArray[np.int64]
Handles = NDArray[np.uint64]
Statuses = NDArray[np.int32]
PageBytes = NDArray[np.uint8]
"""Contents of pages, shape ``(n, PAGE_SIZE)``."""


def page_buffer(pages: int) -> PageBytes:
    """Room for pages, each at an address that a page may have. Costs nothing until touched, and reads as zeros.

    The room that numpy.empty finds for more than some pages begins 16 bytes after such an address, and the kernel
    copies to there at a fraction of its speed (AMD EPYC: process_vm_readv 2.2 instead of 6.8 GB/s, preadv 2.4 instead
    of 14). numpy.zeros would also ask for huge pages, which are touched 2 MiB at a time.
    """
    room = mmap.mmap(-1, max(pages, 1) * PAGE_SIZE, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    return np.frombuffer(room, np.uint8, pages * PAGE_SIZE).reshape(pages, PAGE_SIZE)


class P2mType(enum.IntEnum):
    """What a gfn of a domain is, in the domain's p2m."""

    HOLE = 0
    RAM_RW = 1
    RAM_SHARED = 2
    RAM_RO = 3
    RAM_LOGDIRTY = 4
    MMIO_DM = 5
    """Emulated by a device model: no memory behind it."""
    GRANT_FRAME = 6
    """A frame of the hypervisor's own (a grant table), mapped into the domain."""
    RAM_POD = 7
    """RAM without a frame: it reads as zeros and gets a frame when it is written (Xen's populate-on-demand)."""


class DomainKind(enum.StrEnum):
    """How a domain is virtualised; only hardware-assisted paging can share."""

    HVM = "hvm"
    SHADOW = "shadow"
    PV = "pv"


@dataclass(frozen=True, slots=True)
class PageRef:
    """One guest page: a domain and a gfn."""

    domid: DomId
    gfn: Gfn


@dataclass(frozen=True, slots=True)
class DomainInfo:
    """What a host tells about one domain. Page counts are in pages of PAGE_SIZE.

    ``tot_pages`` counts frames that the domain owns; ``shr_pages`` counts its gfns that are on shared frames, so the
    memory that the guest sees is the sum of both.
    """

    domid: DomId
    name: str
    tot_pages: int
    shr_pages: int
    max_pages: int
    pause_count: int = 0
    dying: bool = False
    kind: DomainKind = DomainKind.HVM
    crashed: bool = False
    """It has stopped by a crash and waits for its toolstack to take it away; its memory is all there still."""


@dataclass(frozen=True, slots=True)
class RingRequest:
    """An entry of a domain's sharing ring: a page that could not be unshared for lack of memory.

    ``vcpu`` is the one that waits until it is answered; None if the control domain asked, which does not wait.
    """

    gfn: Gfn
    vcpu: int | None


HUGE_PAGE_PAGES = 512
"""Pages of a huge page of x86-64: 2 MiB."""


@dataclass(frozen=True, slots=True)
class Counters:
    """The two global counters of memory sharing, as Xen counts.

    ``used_frames`` are the distinct shared frames (a page that is only nominated is already one);
    ``freed_pages`` is the number of gfns on shared frames less ``used_frames``: the memory given back.
    """

    freed_pages: int
    used_frames: int


@dataclass(frozen=True, slots=True)
class AuditFinding:
    """One thing that is wrong with the books.

    ``invariant`` is the number of the broken rule ("I1" to "I11", see ARCHITECTURE.md). ``domid``, ``gfn`` and ``mfn``
    say where, as far as the finding has a place. ``expected`` and ``found`` are the two sides of the comparison and
    ``cause`` says what would make them differ.
    """

    invariant: str
    domid: DomId | None
    gfn: Gfn | None
    mfn: Mfn | None
    expected: str
    found: str
    cause: str

    def __str__(self) -> str:
        place = [
            f"{word} {number:#x}" if word != "domain" else f"{word} {number}"
            for word, number in (("domain", self.domid), ("gfn", self.gfn), ("mfn", self.mfn))
            if number is not None
        ]
        where = f" at {', '.join(place)}" if place else ""
        return f"{self.invariant}{where}: expected {self.expected}, found {self.found} ({self.cause})"


@dataclass(frozen=True, slots=True)
class AuditReport:
    """The result of an audit: every finding, and the number that Xen's own audit would have returned.

    ``counters`` are those of the books that were audited. ``xen_errors`` is None where Xen's own audit was not to be
    had. ``unchecked`` says, in a line each, what was not checked and why.
    """

    findings: tuple[AuditFinding, ...]
    xen_errors: int | None
    counters: Counters
    unchecked: tuple[str, ...] = ()

    @property
    def clean(self) -> bool:
        """True if nothing was found to be wrong, by our judgement and by Xen's."""
        return not self.findings and not self.xen_errors


@dataclass(frozen=True, slots=True)
class PageArray:
    """Many guest pages: ``domids`` (uint16) and ``gfns`` (int64), both of shape ``(n,)``, page i being their i-th pair.

    :raises ValueError: the two arrays do not have the same shape ``(n,)``.
    """

    domids: DomIds
    gfns: Gfns

    def __post_init__(self) -> None:
        if self.domids.ndim != 1 or self.domids.shape != self.gfns.shape:
            raise ValueError(f"domids {self.domids.shape} and gfns {self.gfns.shape} must have one shape (n,)")

    def __len__(self) -> int:
        return len(self.gfns)

    def __getitem__(self, index: slice | NDArray[np.bool_] | NDArray[np.intp]) -> PageArray:
        return PageArray(self.domids[index], self.gfns[index])

    @classmethod
    def of_domain(cls, domid: DomId, gfns: Gfns) -> PageArray:
        """All the pages ``gfns`` of the one domain ``domid``."""
        return cls(np.full(len(gfns), domid, dtype=np.uint16), np.asarray(gfns, dtype=np.int64))

    @classmethod
    def empty(cls) -> PageArray:
        return cls(np.empty(0, dtype=np.uint16), np.empty(0, dtype=np.int64))


@dataclass(frozen=True, slots=True)
class Extent:
    """A run of guest pages with their contents: gfns ``first_gfn`` and up, ``pages`` of shape ``(n, PAGE_SIZE)``.

    ``pages`` may be a view of a mapped file; nothing is read until somebody reads it.
    """

    first_gfn: Gfn
    pages: PageBytes = field(repr=False)

    @property
    def end_gfn(self) -> Gfn:
        """The first gfn after the run."""
        return Gfn(self.first_gfn + len(self.pages))
