"""The seam: Xen's memory-sharing calls as a Protocol, for one page and for many.

Policy (``memshr.sharing``) speaks to this and to nothing else; every mechanism (the embedded reference hypervisor,
running QEMU guests, a Xen host) stands behind it and must pass ``memshr.testing.check_hypervisor``.

The race-free order, on every mechanism, is: **nominate both pages, read and compare both, share with the two handles.**
A handle names one version of a page. If a page is written after it was nominated its handle dies, and ``share``
refuses a dead handle: whatever was compared is what gets shared. No mechanism compares contents itself.

Names and meanings are Xen's (public header ``memory.h``, libxc's ``xenctrl.h``); where a mechanism answers more
than Xen does, the docstring says so. One-page calls raise (see ``memshr.errors``); many-page calls return a status
for each page, 0 or a negative Xen error number (``memshr.errors.Status``), and never raise for a page.

A call that fails has changed nothing (invariant I9), with the two exceptions that Xen's interface itself makes:
naming a domain first enables sharing on it, and ``range_share`` stops being atomic at its first page.
"""

from __future__ import annotations

import enum
import logging
from collections.abc import Mapping, Sequence
from typing import Final, Protocol, runtime_checkable

import numpy as np
from numpy.typing import NDArray

from memshr import errors
from memshr.errors import Side, Status
from memshr.types import (
    AuditReport,
    Counters,
    DomainInfo,
    DomId,
    Gfn,
    GrantRef,
    Handle,
    Handles,
    PageArray,
    PageBytes,
    RingRequest,
    Statuses,
)

__all__ = [
    "NOT_BACKED",
    "Capability",
    "Hypervisor",
    "error_of",
]


class Capability(enum.StrEnum):
    """What a mechanism can do beyond sharing plain gfns. A call outside its capabilities raises UnsupportedError."""

    GREF = "gref"
    """Pages named by grant reference: nominate_gref, share_grefs, debug_gref."""
    PHYSMAP = "physmap"
    """add_to_physmap: plugging a hole with a shared frame."""
    RANGE = "range"
    """range_share."""
    RING = "ring"
    """The calls of the ring: requests for memory when a page cannot be unshared for lack of it."""
    FORK = "fork"
    """fork and fork_reset."""
    LIVE = "live"
    """Guests run and write while we look: pages need two samples before they are worth nominating."""
    ZERO = "zero"
    """release_zero_pages: an all-zero page can be given back without keeping a frame for it."""
    FRAMES = "frames"
    """frames_of: which pages are together on one frame already, so that nobody need look at them again."""


# Whoever imports memshr decides what becomes of its records (``logging``); without this, Python would print warnings.
# Here and not in the package: every module that records anything comes with this one, and the injector (memshr.qemu),
# which records nothing, starts without logging, a fifth of its time.
logging.getLogger("memshr").addHandler(logging.NullHandler())

NOT_BACKED: Final = -2
"""What frames_of says of a page on which the host spends no memory."""


@runtime_checkable
class Hypervisor(Protocol):
    """A host whose domains' pages can be shared."""

    @property
    def capabilities(self) -> frozenset[Capability]:
        """What this mechanism can do; constant for the life of the object."""

    # -- looking -----------------------------------------------------------------------------------------------------

    def domains(self) -> Sequence[DomainInfo]:
        """Every domain of the host that could be named in a call, in order of domid (dom0 is left out)."""

    def names(self) -> Mapping[DomId, str]:
        """The name of each of ``domains``, in the same order; cheap where their figures are not."""

    def domain_info(self, domid: DomId) -> DomainInfo:
        """The figures of one domain.

        :raises NoSuchDomainError: no domain has this domid.
        """

    def populated_ranges(self, domid: DomId) -> NDArray[np.int64]:
        """The gfns of ``domid`` that have RAM behind them, shared or not, as ascending runs.

        :returns: shape ``(n, 2)``, each row ``first_gfn, pages``; rows neither touch nor overlap.
        :raises NoSuchDomainError: no domain has this domid.
        """

    def backed(self, pages: PageArray) -> NDArray[np.bool_]:
        """Which of these pages the host really spends memory on, as far as it can be known.

        A guest page that was never touched may cost the host nothing: it reads as zeros, and sharing it saves
        nothing. A mechanism that cannot tell answers True.

        :returns: shape ``(n,)``.
        """

    def huge(self, pages: PageArray) -> NDArray[np.bool_]:
        """Which pages are parts of huge pages of the host, which sharing any piece of them splits.

        A huge page is taken to begin at a gfn that is a multiple of HUGE_PAGE_PAGES. A mechanism that has none, or
        cannot tell, answers False.

        :returns: shape ``(n,)``.
        """

    def frames_of(self, pages: PageArray) -> NDArray[np.int64]:
        """The frame that each page shares; -1 for those that are on no shared frame, NOT_BACKED for those of which
        ``backed`` says no.

        Pages with the same frame hold the same bytes at that moment. A page that is only nominated may have either
        answer. (capability FRAMES)

        :returns: mfns, shape ``(n,)``.
        """

    def read_range(self, domid: DomId, first: Gfn, count: int, buffer: PageBytes) -> PageBytes:
        """Contents of ``count`` populated gfns from ``first`` on: the fast way to scan.

        :param buffer: shape ``(>= count, PAGE_SIZE)``, uint8, C-contiguous; may be used to hold the answer.
        :returns: shape ``(count, PAGE_SIZE)``: either the first rows of ``buffer``, or a read-only view of the memory
            itself; valid until the next call on this object. On a LIVE mechanism each page may be torn.
        :raises NotSharableError: some gfn of the range is not populated.
        :raises NoSuchDomainError: no domain has this domid.
        """

    def read_pages(self, pages: PageArray, out: PageBytes) -> Statuses:
        """Contents of scattered pages, page i into row i of ``out`` (shape ``(>= n, PAGE_SIZE)``, uint8).

        Nominated pages cannot change without their handle dying, so what this reads of them is consistent.

        :returns: status for each page, shape ``(n,)``; EINVAL: nothing populated there, ESRCH: no such domain. The
            rows of pages that failed hold no particular bytes.
        """

    # -- memory sharing, one page ------------------------------------------------------------------------------------

    def control(self, domid: DomId, enable: bool) -> None:
        """Enable or disable memory sharing on a domain. (libxc: ``xc_memshr_control``)

        Disabling does not unshare anything: shared pages stay shared and copy-on-write goes on. Every call that names
        a domain *first* enables sharing on it silently; the second domain of a call must be enabled already.

        :raises NoSuchDomainError: no domain has this domid.
        :raises RefusedDomainError: the domain's kind cannot share (PV, shadow paging, a passed-through device, dom0).
        """

    def nominate_gfn(self, domid: DomId, gfn: Gfn) -> Handle:
        """Make a page a candidate and return the handle of its present version. (``xc_memshr_nominate_gfn``)

        A page that is nominated or shared already keeps its handle, and that one is returned; a new handle is greater
        than any before it. The page becomes read-only to the guest; a write takes it back, kills the handle and goes
        on.

        :raises NotSharableError: EINVAL: hole, out of range, or not plain RAM.
        :raises BusyPageError: E2BIG: the frame has references besides the domain's own.
        :raises NoSuchDomainError: :raises DomainDyingError: :raises RefusedDomainError: about the domain.
        """

    def nominate_gref(self, domid: DomId, ref: GrantRef) -> Handle:
        """nominate_gfn for the page behind a grant reference. (``xc_memshr_nominate_gref``)

        :raises NotSharableError: ENOENT: the reference is out of range; ENXIO: it is not in use; EINVAL as above.
        :raises BusyPageError: E2BIG: the frame does not have exactly three extra references.
        """

    def share_gfns(
        self,
        source_domid: DomId,
        source_gfn: Gfn,
        source_handle: Handle,
        client_domid: DomId,
        client_gfn: Gfn,
        client_handle: Handle,
    ) -> None:
        """Put the client's page, and all that share its frame, on the source's frame. (``xc_memshr_share_gfns``)

        The client's frame is freed and its handle is dead; the source's handle stands for all of them. Contents are
        never compared. If both pages have the same frame already, nothing is checked and nothing happens.

        :raises StaleHandleError: the source's handle (status -10) or the client's (-9) is not valid; the source is
            looked at first when both pages are shared, either may be named when neither is.
        :raises SharingDisabledError: EINVAL: sharing is not enabled on the client's domain.
        :raises NoSuchDomainError: :raises DomainDyingError: :raises RefusedDomainError: about a domain.
        """

    def share_grefs(
        self,
        source_domid: DomId,
        source_ref: GrantRef,
        source_handle: Handle,
        client_domid: DomId,
        client_ref: GrantRef,
        client_handle: Handle,
    ) -> None:
        """share_gfns for pages behind grant references. (``xc_memshr_share_grefs``)

        :raises NotSharableError: ENOENT, ENXIO: a reference is out of range, or not in use.
        """

    def add_to_physmap(
        self, source_domid: DomId, source_gfn: Gfn, source_handle: Handle, client_domid: DomId, client_gfn: Gfn
    ) -> None:
        """Plug a hole of the client's address space with the source's frame. (``xc_memshr_add_to_physmap``)

        :raises StaleHandleError: the source's handle is not valid (-10), or the client's gfn is populated (-9).
        :raises HostMemoryError: ENOMEM: no memory for the client's page tables.
        """

    def range_share(self, source_domid: DomId, client_domid: DomId, first: Gfn, last: Gfn) -> None:
        """Nominate and share the same gfns, ``first`` to ``last``, of two paused domains. (``xc_memshr_range_share``)

        Contents are not compared: this is for a domain and its clone. Pages that cannot be nominated are skipped.

        :raises RefusedDomainError: EINVAL: a domain is not paused, or the range goes beyond one of them.
        :raises BusyPageError: E2BIG: the *last* page could not be nominated for that reason.
        """

    def unshare_gfn(self, domid: DomId, gfn: Gfn) -> None:
        """Give a page back its own frame, as a write would. Does nothing to a page that is not shared.

        Xen has no such call; a writable mapping does it there.

        :raises HostMemoryError: ENOMEM: no memory for the copy, or max_pages reached; the page stays shared.
        :raises NotSharableError: EINVAL: nothing populated there.
        """

    def debug_gfn(self, domid: DomId, gfn: Gfn) -> int:
        """How many gfns are on the frame of this one. (``xc_memshr_debug_gfn``)

        :raises NotSharableError: EINVAL: the page is not shared.
        """

    def debug_gref(self, domid: DomId, ref: GrantRef) -> int:
        """debug_gfn for the page behind a grant reference. (``xc_memshr_debug_gref``)"""

    def audit(self) -> AuditReport:
        """Check the books: every shared frame against the p2m of every domain, and back. (``xc_memshr_audit``)

        Xen walks reverse map -> p2m only and returns a number; this goes both ways and names what is wrong, and
        ``xen_errors`` is the number that Xen would have returned.
        """

    def counters(self) -> Counters:
        """The two global counters. (``xc_sharing_freed_pages``, ``xc_sharing_used_frames``)"""

    # -- memory sharing, many pages ----------------------------------------------------------------------------------

    def nominate_gfns(self, pages: PageArray) -> tuple[Handles, Statuses]:
        """nominate_gfn for every page of ``pages``, in order.

        :returns: handles (uint64, 0 where it failed) and statuses, both of shape ``(n,)``.
        """

    def share_gfns_many(
        self, sources: PageArray, source_handles: Handles, clients: PageArray, client_handles: Handles
    ) -> Statuses:
        """share_gfns for every row, in order: client i onto the frame of source i. All of shape ``(n,)``.

        :returns: statuses, shape ``(n,)``.
        """

    def debug_gfns(self, pages: PageArray) -> NDArray[np.int64]:
        """debug_gfn for every page of ``pages``; 0 where that would be an error.

        :returns: how many gfns are on the frame of each, shape ``(n,)``.
        """

    def unshare_gfns(self, pages: PageArray) -> Statuses:
        """unshare_gfn for every page of ``pages``, in order; it is also how a nomination is taken back.

        :returns: statuses, shape ``(n,)``.
        """

    def release_zero_pages(self, pages: PageArray, handles: Handles) -> Statuses:
        """Give the frames of nominated all-zero pages back: afterwards each reads as zeros and costs nothing.

        Xen has no such call; a mechanism without ZERO raises UnsupportedError, and zero pages are shared like others.
        The caller has compared the pages with zero *after* nominating them; a page whose handle has died is left alone.

        :returns: statuses, shape ``(n,)``; -10 where the handle is not valid.
        """

    # -- events and forks --------------------------------------------------------------------------------------------

    def ring_enable(self, domid: DomId) -> int:
        """Initialise and enable the ring on which unsharing that lacks memory posts its gfn; returns its event port.

        Who enables it must serve it: take ``ring_requests``, make room, ``ring_respond``, ``domain_resume``. A vCPU
        whose request nobody answers never goes on.

        :raises RefusedDomainError: ENODEV: no HAP; EBUSY: it is enabled already; EOPNOTSUPP: no ring page was set up.
        """

    def ring_disable(self, domid: DomId) -> None:
        """Disable the ring. :raises RefusedDomainError: EINVAL: it is not enabled."""

    def ring_requests(self, domid: DomId) -> Sequence[RingRequest]:
        """The requests that lie in the ring unanswered, oldest first.

        Xen has no such call: the ring is a page of the domain.

        :raises RefusedDomainError: ENODEV: the ring is not enabled.
        """

    def ring_respond(self, domid: DomId, count: int | None = None) -> None:
        """Put responses to the ``count`` oldest requests into the ring; None: to all. ``domain_resume`` delivers them.

        :raises RefusedDomainError: ENODEV: the ring is not enabled; EINVAL: the ring has fewer requests.
        """

    def domain_resume(self, domid: DomId) -> None:
        """Let the vCPUs whose requests are answered in the ring try again; the others go on waiting.

        (libxc: ``xc_memshr_domain_resume``)

        :raises RefusedDomainError: ENODEV: the ring is not enabled.
        """

    def fork(self, parent: DomId, child: DomId) -> None:
        """Make the paused, empty domain ``child`` a fork of ``parent``: its pages are filled on demand, by sharing.

        :raises RefusedDomainError: EBUSY: the child is not paused; EINVAL: the numbers of vCPUs differ.
        """

    def fork_reset(self, child: DomId, *, state: bool = False, memory: bool = False) -> None:
        """Bring a fork back to its parent's state and/or memory.

        :raises RefusedDomainError: EINVAL: neither was asked for (looked at first); ENOSYS: not a fork. Of the memory
            alone E2BIG or EINVAL: the page that came last stays, as it is held or no plain RAM; the others are reset.
        """


# What a status means depends on the call that it answers: errno 9 and 10 of a share are no EBADF and ECHILD. A call
# that is not listed with a status takes the row of "*". Sources: the recordings in tests/traces and Xen's public
# headers (memory.h, xenctrl.h, 4.17).
_MEANINGS: dict[tuple[str, Status], tuple[type[errors.CallError], str]] = {
    ("*", Status.ESRCH): (errors.NoSuchDomainError, "there is no domain {domid}"),
    ("*", Status.EPERM): (
        errors.RefusedDomainError,
        "domain {domid} is the control domain, its pages are never shared",
    ),
    ("*", Status.ENOMEM): (errors.HostMemoryError, "no memory to give gfn {gfn} of domain {domid} its own frame"),
    ("*", Status.EAGAIN): (errors.HostMemoryError, "no memory to give gfn {gfn} of domain {domid} its own frame"),
    ("*", Status.EINVAL): (errors.NotSharableError, "gfn {gfn} of domain {domid} is not populated with plain RAM"),
    ("*", Status.E2BIG): (
        errors.BusyPageError,
        "the frame of gfn {gfn} of domain {domid} has references besides the domain's own",
    ),
    ("*", Status.ENOENT): (errors.NotSharableError, "grant reference {gfn} of domain {domid} is out of range"),
    ("*", Status.ENXIO): (errors.NotSharableError, "grant reference {gfn} of domain {domid} is not in use"),
    ("*", Status.EOPNOTSUPP): (errors.RefusedDomainError, "domain {domid} is paravirtualised; only HVM and PVH share"),
    ("*", Status.ENODEV): (errors.RefusedDomainError, "domain {domid} has no hardware-assisted paging (HAP)"),
    ("*", Status.EXDEV): (errors.RefusedDomainError, "domain {domid} has a passed-through device"),
    ("nominate_gref", Status.E2BIG): (
        errors.BusyPageError,
        "the frame behind grant reference {gfn} of domain {domid} does not have exactly three extra references",
    ),
    ("debug_gfn", Status.EINVAL): (errors.NotSharableError, "gfn {gfn} of domain {domid} is not shared"),
    ("debug_gref", Status.EINVAL): (
        errors.NotSharableError,
        "the page behind grant reference {gfn} of domain {domid} is not shared",
    ),
    ("add_to_physmap", Status.ENOENT): (
        errors.NotSharableError,
        "gfn {gfn} of domain {domid} is beyond the address width",
    ),
    ("add_to_physmap", Status.ENOMEM): (
        errors.HostMemoryError,
        "no memory for the page tables that gfn {gfn} of domain {domid} needs",
    ),
    ("range_share", Status.EINVAL): (
        errors.RefusedDomainError,
        "both domains must be paused, and the range must end within both",
    ),
    ("fork", Status.EBUSY): (errors.RefusedDomainError, "domain {domid} must be paused to become a fork"),
    ("fork", Status.EINVAL): (errors.RefusedDomainError, "domain {domid} must have as many vCPUs as its parent"),
    ("fork_reset", Status.EINVAL): (
        errors.RefusedDomainError,
        "neither state nor memory was asked for, or the page that came last to domain {domid} is no plain RAM",
    ),
    ("fork_reset", Status.E2BIG): (
        errors.RefusedDomainError,
        "the page that came last to domain {domid} has references besides the domain's own, and stays",
    ),
    ("fork_reset", Status.ENOSYS): (errors.RefusedDomainError, "domain {domid} is not a fork"),
    ("ring_enable", Status.EOPNOTSUPP): (errors.RefusedDomainError, "domain {domid} has no page for the sharing ring"),
    ("ring_enable", Status.EBUSY): (errors.RefusedDomainError, "the sharing ring of domain {domid} is enabled already"),
    ("domain_resume", Status.ENODEV): (errors.RefusedDomainError, "the sharing ring of domain {domid} is not enabled"),
    ("ring_requests", Status.ENODEV): (errors.RefusedDomainError, "the sharing ring of domain {domid} is not enabled"),
    ("ring_respond", Status.ENODEV): (errors.RefusedDomainError, "the sharing ring of domain {domid} is not enabled"),
    ("ring_respond", Status.EINVAL): (
        errors.RefusedDomainError,
        "the sharing ring of domain {domid} has fewer requests than that",
    ),
    ("set_log_dirty", Status.EINVAL): (errors.RefusedDomainError, "log-dirty mode of domain {domid} is on already"),
    ("ring_disable", Status.EINVAL): (errors.RefusedDomainError, "the sharing ring of domain {domid} is not enabled"),
}
_HANDLE_SIDES: dict[Status, Side] = {Status.S_HANDLE_INVALID: "source", Status.C_HANDLE_INVALID: "client"}


def error_of(call: str, status: int, *, domid: int | None = None, gfn: int | None = None) -> errors.CallError:
    """The error that a one-page form raises for what the many-page form returns as a status.

    :param call: the seam's name of the call.
    :param status: the negative Xen error number; a number that Xen does not use for any of its sharing calls gives a
        plain PageError that names it.
    :param gfn: the gfn (or grant reference) that the call was about, if one.
    """
    try:
        known = Status(status)
    except ValueError:
        return errors.PageError(f"{call}: unexpected answer {status}", call=call, domid=domid, gfn=gfn)
    if side := _HANDLE_SIDES.get(known):
        text = (
            "the client gfn is populated"
            if (call, side) == ("add_to_physmap", "client")
            else (f"the {side}'s handle does not name the present version of its page")
        )
        return errors.StaleHandleError(f"{call}: {text}", side=side, call=call, status=known, domid=domid, gfn=gfn)
    kind, text = _MEANINGS.get((call, known)) or _MEANINGS.get(("*", known)) or (errors.PageError, known.name)
    message = f"{call}: {text.format(domid=domid, gfn=gfn)}"
    if issubclass(kind, errors.RefusedDomainError):
        return kind(message, reasons=(message,), call=call, status=known, domid=domid)
    return kind(message, call=call, status=known, domid=domid, gfn=gfn)
