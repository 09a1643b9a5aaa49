"""The embedded reference hypervisor: Xen's memory sharing in process, with real contents, for any user on any OS.

It answers the sharing calls as Xen does (who may be named, in which order things are checked, what each error is),
and offers what surrounds them in a host: domains are created from fresh RAM or from memory images and destroyed,
guests read and write, dom0 maps their pages. The books themselves are in ``mem_sharing``; this class checks who is
asking, and turns statuses into errors.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memshr import errors
from memshr.embedded import fork
from memshr.embedded.audit import audit
from memshr.embedded.columns import CHUNK_BITS, Spots
from memshr.embedded.host import Host
from memshr.embedded.mem_sharing import Domain
from memshr.embedded.p2m import TYPE_BITS, TYPE_MASK, is_ram_many
from memshr.embedded.shared_frames import NOWHERE, page_id, page_of
from memshr.errors import Status
from memshr.hypervisor import NOT_BACKED, Capability, error_of
from memshr.types import (
    MAX_GFN_BITS,
    AuditReport,
    Counters,
    DomainKind,
    DomId,
    DomIds,
    Gfn,
    GrantRef,
    Handle,
    Handles,
    P2mType,
    PageArray,
    PageBytes,
    PageRef,
    RingRequest,
    Statuses,
)

SHARING_RING_PFN = 29
"""The HVM parameter that names the page of the sharing ring (Xen's public hvm/params.h)."""

_RING_PORT = 1
_REFS_OF_A_GRANTED_PAGE = 3


class EmbeddedHypervisor(Host):
    """A host in this process; see the module's docstring. It implements ``memshr.hypervisor.Hypervisor``.

    :param limit_pages: machine memory in pages; None: as much as the process can get.
    :param scrub_byte: what fresh RAM holds; Xen's debug build uses 0xc2.

    Metadata: 8 bytes for each page that somebody looked at, 30 for each that is or was shared, and 32 for each shared
    frame. Pages of an image that nobody looked at cost nothing.
    """

    @property
    def capabilities(self) -> frozenset[Capability]:
        """Everything but live guests."""
        return frozenset(Capability) - {Capability.LIVE}

    # -- looking -----------------------------------------------------------------------------------------------------

    def populated_ranges(self, domid: DomId) -> NDArray[np.int64]:
        """See the seam. Cost: one pass over the entries that exist, nothing for the rest."""
        return self._existing(domid, "populated_ranges").p2m.populated_ranges()

    def backed(self, pages: PageArray) -> NDArray[np.bool_]:
        """See the seam: False for released zero pages, which have no frame."""
        kinds: NDArray[np.int64] = self.books.entries.gather(Spots(self._pids(pages))) & TYPE_MASK
        return np.asarray(kinds != P2mType.RAM_POD)

    def huge(self, pages: PageArray) -> NDArray[np.bool_]:
        """See the seam: there are none here."""
        return np.zeros(len(pages), np.bool_)

    def frames_of(self, pages: PageArray) -> NDArray[np.int64]:
        """See the seam."""
        values = self.books.entries.gather(Spots(self._pids(pages)))
        kinds = values & TYPE_MASK
        frames = np.where(kinds == P2mType.RAM_POD, NOT_BACKED, -1)
        return np.where(kinds == P2mType.RAM_SHARED, values >> TYPE_BITS, frames)

    def read_range(self, domid: DomId, first: Gfn, count: int, buffer: PageBytes) -> PageBytes:
        """See the seam: a view of the frames where they are in a row, a copy in ``buffer`` where not."""
        domain = self._existing(domid, "read_range")
        first_pid = page_id(domid, first)
        if not self.books.entries.touched(first_pid >> CHUNK_BITS):
            for extent in domain.p2m.extents:
                if extent.first_gfn <= first and first + count <= extent.first_gfn + extent.count:
                    return self._view(extent.first_mfn + first - extent.first_gfn, count)
        values = self.books.entries.gather(Spots(np.arange(first_pid, first_pid + count)))
        if not is_ram_many(values).all():
            gfn = Gfn(first + int(np.flatnonzero(~is_ram_many(values))[0]))
            raise error_of("read_range", Status.EINVAL, domid=domid, gfn=gfn)
        mfns = values >> TYPE_BITS
        if mfns[0] and (np.diff(mfns) == 1).all() and self.memory.run(int(mfns[0]), count) is not None:
            return self._view(int(mfns[0]), count)
        self._read_frames(mfns, buffer)
        return buffer[:count]

    def _view(self, mfn: int, count: int) -> PageBytes:
        run = self.memory.run(mfn, count)
        assert run is not None
        view = run.view()
        view.flags.writeable = False
        return view

    def _read_frames(self, mfns: NDArray[np.int64], out: PageBytes, rows: NDArray[np.intp] | None = None) -> None:
        framed = mfns != 0
        if rows is None and framed.all():
            self.memory.read(mfns, out)
            return
        rows = np.arange(len(mfns)) if rows is None else rows
        self.memory.read(mfns[framed], out, rows[framed])
        out[rows[~framed]] = 0

    def read_pages(self, pages: PageArray, out: PageBytes) -> Statuses:
        """See the seam."""
        known = np.fromiter(self.books.domains, np.uint16)
        values = self.books.entries.gather(Spots(self._pids(pages)))
        statuses = np.where(is_ram_many(values), Status.OK, Status.EINVAL).astype(np.int32)
        statuses[~np.isin(pages.domids, known)] = Status.ESRCH
        good = statuses == Status.OK
        if good.all():
            self._read_frames(values >> TYPE_BITS, out)
        else:
            self._read_frames(values[good] >> TYPE_BITS, out, np.flatnonzero(good))
        return statuses

    # -- memory sharing, one page ------------------------------------------------------------------------------------

    def control(self, domid: DomId, enable: bool) -> None:
        """See the seam."""
        if domid == 0:
            raise error_of("control", Status.EOPNOTSUPP, domid=domid)
        domain = self._existing(domid, "control")
        if enable and (status := self._cannot_share(domain)) != Status.OK:
            raise error_of("control", status, domid=domid)
        domain.sharing_enabled = enable

    def nominate_gfn(self, domid: DomId, gfn: Gfn) -> Handle:
        """See the seam."""
        domain = self.first_named(domid, "nominate_gfn")
        result = self.books.nominate(domain, gfn) if 0 <= gfn < 1 << MAX_GFN_BITS else Status.EINVAL
        if result < 0:
            raise error_of("nominate_gfn", result, domid=domid, gfn=gfn)
        return Handle(result)

    def nominate_gref(self, domid: DomId, ref: GrantRef) -> Handle:
        """See the seam."""
        domain = self.first_named(domid, "nominate_gref")
        gfn = self._granted_gfn(domain, ref, "nominate_gref")
        result = (
            Status.EINVAL
            if self._pid(domid, gfn) == NOWHERE
            else self.books.nominate(domain, gfn, expected_refs=_REFS_OF_A_GRANTED_PAGE)
        )
        if result < 0:
            raise error_of("nominate_gref", result, domid=domid, gfn=ref)
        return Handle(result)

    def share_gfns(
        self,
        source_domid: DomId,
        source_gfn: Gfn,
        source_handle: Handle,
        client_domid: DomId,
        client_gfn: Gfn,
        client_handle: Handle,
    ) -> None:
        """See the seam."""
        self.first_named(source_domid, "share_gfns")
        self.second_named(client_domid, "share_gfns")
        source, client = self._pid(source_domid, source_gfn), self._pid(client_domid, client_gfn)
        status = self.books.share(source, source_handle, client, client_handle)
        if status != Status.OK:
            is_source = status == Status.S_HANDLE_INVALID
            domid, gfn = (source_domid, source_gfn) if is_source else (client_domid, client_gfn)
            raise error_of("share_gfns", status, domid=domid, gfn=gfn)

    def share_grefs(
        self,
        source_domid: DomId,
        source_ref: GrantRef,
        source_handle: Handle,
        client_domid: DomId,
        client_ref: GrantRef,
        client_handle: Handle,
    ) -> None:
        """See the seam."""
        source = self.first_named(source_domid, "share_grefs")
        client = self.second_named(client_domid, "share_grefs")
        source_gfn = self._granted_gfn(source, source_ref, "share_grefs")
        client_gfn = self._granted_gfn(client, client_ref, "share_grefs")
        self.share_gfns(source_domid, source_gfn, source_handle, client_domid, client_gfn, client_handle)

    def add_to_physmap(
        self, source_domid: DomId, source_gfn: Gfn, source_handle: Handle, client_domid: DomId, client_gfn: Gfn
    ) -> None:
        """See the seam."""
        self.first_named(source_domid, "add_to_physmap")
        client = self.second_named(client_domid, "add_to_physmap")
        source = self._pid(source_domid, source_gfn)
        status = self.books.add_to_physmap(source, source_handle, client, client_gfn)
        if status != Status.OK:
            raise error_of("add_to_physmap", status, domid=client_domid, gfn=client_gfn)

    def range_share(self, source_domid: DomId, client_domid: DomId, first: Gfn, last: Gfn) -> None:
        """See the seam."""
        source = self.first_named(source_domid, "range_share")
        client = self.second_named(client_domid, "range_share")
        highest = max(0, min(source.p2m.max_gfn, client.p2m.max_gfn))
        paused = (source.pause_count or source.forks) and (client.pause_count or client.forks)
        if not paused or max(first, last) > highest or min(first, last) < 0:
            raise error_of("range_share", Status.EINVAL, domid=client_domid)
        result = int(Status.OK)
        if first <= last:
            # Only what the source has RAM at can change anything, and the last gfn decides the answer.
            for start, count in source.p2m.populated_ranges().tolist():
                for gfn in range(max(start, first), min(start + count, last)):
                    self._share_same_gfn(source, client, gfn)
            result = self._share_same_gfn(source, client, last)
        if result not in (Status.OK, Status.EINVAL):  # Xen turns EINVAL of the last page into success
            raise error_of("range_share", result, domid=client_domid, gfn=last)

    def _share_same_gfn(self, source: Domain, client: Domain, gfn: int) -> int:
        source_handle = self.books.nominate(source, gfn)
        if source_handle < 0:
            return source_handle
        client_handle = self.books.nominate(client, gfn)
        if client_handle < 0:
            return client_handle
        pids = page_id(source.domid, gfn), page_id(client.domid, gfn)
        return self.books.share(pids[0], source_handle, pids[1], client_handle)

    def unshare_gfn(self, domid: DomId, gfn: Gfn) -> None:
        """See the seam."""
        self._frame_for(domid, gfn, "unshare_gfn", writable=True)

    def debug_gfn(self, domid: DomId, gfn: Gfn) -> int:
        """See the seam."""
        self.first_named(domid, "debug_gfn")
        value = self.books.entries.get(self._pid(domid, gfn))
        if value & TYPE_MASK != P2mType.RAM_SHARED:
            raise error_of("debug_gfn", Status.EINVAL, domid=domid, gfn=gfn)
        frames = self.books.frames
        return frames.count.item(frames.slot_of_mfn.get(value >> TYPE_BITS))

    def sharers(self, domid: DomId, gfn: Gfn) -> list[PageRef]:
        """The pages that are on the frame of this one, itself included; none if it is not shared."""
        value = self.books.entries.get(self._pid(domid, gfn))
        if value & TYPE_MASK != P2mType.RAM_SHARED:
            return []
        members = self.books.frames.members(self.books.frames.slot_of_mfn.get(value >> TYPE_BITS))
        return [PageRef(DomId(owner), Gfn(page)) for owner, page in map(page_of, sorted(members.tolist()))]

    def debug_gref(self, domid: DomId, ref: GrantRef) -> int:
        """See the seam."""
        domain = self.first_named(domid, "debug_gref")
        return self.debug_gfn(domid, self._granted_gfn(domain, ref, "debug_gref"))

    def audit(self) -> AuditReport:
        """See the seam. Cost: linear in the pages that are shared and in the entries that exist."""
        return audit(self.books)

    def counters(self) -> Counters:
        """See the seam."""
        return Counters(self.books.freed_pages, self.books.used_frames)

    # -- memory sharing, many pages ----------------------------------------------------------------------------------

    def nominate_gfns(self, pages: PageArray) -> tuple[Handles, Statuses]:
        """See the seam."""
        statuses = self._statuses(pages.domids, self._first_status)
        if (statuses == Status.OK).all():
            return self.books.nominate_many(self._pids(pages))
        handles = np.zeros(len(pages), np.uint64)
        good = np.flatnonzero(statuses == Status.OK)
        handles[good], statuses[good] = self.books.nominate_many(self._pids(pages[good]))
        return handles, statuses

    def share_gfns_many(
        self, sources: PageArray, source_handles: Handles, clients: PageArray, client_handles: Handles
    ) -> Statuses:
        """See the seam."""
        client_domids = np.unique(clients.domids).tolist()
        if any(self._is_disabled(domid) and (sources.domids == domid).any() for domid in client_domids):
            # A row may enable a domain, as its source, that an earlier row had as a disabled client.
            return self._share_in_order(sources, source_handles, clients, client_handles)
        statuses = self._statuses(sources.domids, self._first_status)
        second = self._statuses(clients.domids, self._second_status)
        statuses = np.where(statuses == Status.OK, second, statuses)
        good = statuses == Status.OK
        if good.all():
            return self.books.share_many(self._pids(sources), source_handles, self._pids(clients), client_handles)
        statuses[good] = self.books.share_many(
            self._pids(sources[good]), source_handles[good], self._pids(clients[good]), client_handles[good]
        )
        return statuses

    def debug_gfns(self, pages: PageArray) -> NDArray[np.int64]:
        """See the seam."""
        counts = np.zeros(len(pages), np.int64)
        (named,) = np.nonzero(self._statuses(pages.domids, self._first_status) == Status.OK)
        values = self.books.entries.gather(Spots(self._pids(pages[named])))
        shared = values & TYPE_MASK == P2mType.RAM_SHARED
        frames = self.books.frames
        counts[named[shared]] = frames.count[frames.slot_of_mfn.gather(Spots(values[shared] >> TYPE_BITS))]
        return counts

    def _share_in_order(
        self, sources: PageArray, source_handles: Handles, clients: PageArray, client_handles: Handles
    ) -> Statuses:
        statuses = np.zeros(len(sources), np.int32)
        rows = zip(
            *(sources.domids.tolist(), sources.gfns.tolist(), source_handles.tolist()),
            *(clients.domids.tolist(), clients.gfns.tolist(), client_handles.tolist()),
            strict=True,
        )
        for row, arguments in enumerate(rows):
            try:
                self.share_gfns(*arguments)
            except errors.CallError as error:
                statuses[row] = error.status
        return statuses

    def unshare_gfns(self, pages: PageArray) -> Statuses:
        """See the seam. Last sharers, such as nominated pages, go all at once; each other page costs a call."""
        statuses = np.zeros(len(pages), np.int32)
        one_by_one = np.flatnonzero(~self.books.take_back_many(self._pids(pages), self._with_room(pages.domids)))
        for row in one_by_one.tolist():
            try:
                self.unshare_gfn(DomId(pages.domids.item(row)), Gfn(pages.gfns.item(row)))
            except errors.CallError as error:
                statuses[row] = error.status
        return statuses

    def _with_room(self, domids: DomIds) -> NDArray[np.bool_]:
        # Rows of domains that could have every page of these rows: there the order does not matter.
        found, inverse, counts = np.unique(domids, return_inverse=True, return_counts=True)
        rooms = [self._has_room(domid, count) for domid, count in zip(found.tolist(), counts.tolist(), strict=True)]
        return np.array(rooms, np.bool_)[inverse]

    def _has_room(self, domid: int, pages: int) -> bool:
        domain = self.books.domains.get(domid)
        return domain is not None and domain.tot_pages + pages <= domain.max_pages

    def release_zero_pages(self, pages: PageArray, handles: Handles) -> Statuses:
        """See the seam: afterwards the page is populate-on-demand."""
        statuses = self._statuses(pages.domids, self._first_status)
        good = np.flatnonzero(statuses == Status.OK)
        statuses[good] = self.books.release_zero_many(self._pids(pages[good]), handles[good])
        return statuses

    # -- events and forks --------------------------------------------------------------------------------------------

    def ring_enable(self, domid: DomId) -> int:
        """See the seam. The ring's page must have been named by HVM parameter 29 before."""
        domain = self._existing(domid, "ring_enable")
        if domain.dying:
            return 0
        if domain.kind is not DomainKind.HVM:
            raise error_of("ring_enable", Status.ENODEV, domid=domid)
        if domain.ring_mfn is not None:
            raise error_of("ring_enable", Status.EBUSY, domid=domid)
        if not domain.hvm_params.get(SHARING_RING_PFN):
            raise error_of("ring_enable", Status.EOPNOTSUPP, domid=domid)
        domain.ring_mfn = self._frame_for(domid, Gfn(domain.hvm_params[SHARING_RING_PFN]), "ring_enable", writable=True)
        self.memory.writable_frames.add(domain.ring_mfn)
        self.memory.hold(domain.ring_mfn)
        domain.ring_events.clear()
        domain.ring_answers = 0
        return _RING_PORT

    def ring_disable(self, domid: DomId) -> None:
        """See the seam."""
        domain = self._existing(domid, "ring_disable")
        if domain.ring_mfn is None and not domain.dying:
            raise error_of("ring_disable", Status.EINVAL, domid=domid)
        self.disable_ring(domain)

    def _with_ring(self, domid: DomId, call: str) -> Domain:
        domain = self._existing(domid, call)
        if domain.ring_mfn is None and not domain.dying:
            raise error_of(call, Status.ENODEV, domid=domid)
        return domain

    def ring_requests(self, domid: DomId) -> tuple[RingRequest, ...]:
        """See the seam."""
        domain = self._with_ring(domid, "ring_requests")
        return tuple(domain.ring_events[domain.ring_answers :])

    def ring_respond(self, domid: DomId, count: int | None = None) -> None:
        """See the seam."""
        domain = self._with_ring(domid, "ring_respond")
        there = len(domain.ring_events) - domain.ring_answers
        if count is not None and not 0 <= count <= there:
            raise error_of("ring_respond", Status.EINVAL, domid=domid)
        domain.ring_answers += there if count is None else count

    def domain_resume(self, domid: DomId) -> None:
        """See the seam."""
        domain = self._with_ring(domid, "domain_resume")
        answered = {request.vcpu for request in domain.ring_events[: domain.ring_answers]}
        del domain.ring_events[: domain.ring_answers]
        domain.ring_answers = 0
        domain.waiting_vcpus -= answered - {request.vcpu for request in domain.ring_events}

    def fork(self, parent: DomId, child: DomId) -> None:
        """See the seam. The child's max_pages become the parent's; pages that the child has already stay."""
        child_domain = self.first_named(child, "fork")
        if (status := self._named_status(parent)) != Status.OK:
            raise self._domain_error("fork", status, parent)
        if self.books.domains[parent].vcpus != child_domain.vcpus:
            raise error_of("fork", Status.EINVAL, domid=child)
        parent_domain = self.first_named(parent, "fork")
        result = fork.fork(self.books, parent_domain, child_domain)
        if result == Status.EINVAL:
            text = f"fork: domain {child} would be its own ancestor"
            raise errors.RefusedDomainError(text, reasons=(text,), call="fork", status=Status.EINVAL, domid=child)
        if result != Status.OK:
            raise error_of("fork", result, domid=child)

    def fork_reset(self, child: DomId, *, state: bool = False, memory: bool = False) -> None:
        """See the seam."""
        status = fork.reset(self.books, self.first_named(child, "fork_reset"), state=state, memory=memory)
        if status != Status.OK:
            raise error_of("fork_reset", status, domid=child)

    # -- who may be named --------------------------------------------------------------------------------------------

    @staticmethod
    def _pids(pages: PageArray) -> NDArray[np.int64]:
        pids = pages.domids.astype(np.int64) << MAX_GFN_BITS | pages.gfns
        beyond = pages.gfns >> MAX_GFN_BITS != 0
        return np.where(beyond, NOWHERE, pids) if beyond.any() else pids

    @staticmethod
    def _cannot_share(domain: Domain) -> Status:
        if domain.kind is DomainKind.PV:
            return Status.EOPNOTSUPP
        return Status.ENODEV if domain.kind is DomainKind.SHADOW else Status.OK

    def _named_status(self, domid: int) -> Status:
        """Whether a call may name this domain at all."""
        domain = self.books.domains.get(domid)
        if domain is None:
            return Status.EPERM if domid == 0 else Status.ESRCH
        return Status.EINVAL if domain.dying else Status.OK

    def _first_status(self, domid: int) -> Status:
        """Whether a call may name this domain first; if it may, sharing is enabled on it from now on."""
        if (status := self._named_status(domid)) != Status.OK:
            return status
        domain = self.books.domains[domid]
        if not domain.sharing_enabled and (status := self._cannot_share(domain)) != Status.OK:
            return status
        domain.sharing_enabled = True
        return Status.OK

    def _second_status(self, domid: int) -> Status:
        if (status := self._named_status(domid)) != Status.OK:
            return status
        return Status.OK if self.books.domains[domid].sharing_enabled else Status.EINVAL

    def _is_disabled(self, domid: int) -> bool:
        domain = self.books.domains.get(domid)
        return domain is not None and not domain.sharing_enabled

    def first_named(self, domid: int, call: str) -> Domain:
        """The domain that a call names first, on which it enables sharing.

        :raises NoSuchDomainError: :raises DomainDyingError: :raises RefusedDomainError: it cannot be named so.
        """
        domain = self.books.domains.get(domid)
        if domain is not None and domain.sharing_enabled and not domain.dying:
            return domain
        if (status := self._first_status(domid)) == Status.OK:
            return self.books.domains[domid]
        raise self._domain_error(call, status, domid)

    def second_named(self, domid: int, call: str) -> Domain:
        """A domain that a call names second.

        :raises NoSuchDomainError: :raises DomainDyingError: :raises RefusedDomainError: it cannot be named.
        :raises SharingDisabledError: sharing is not enabled on it.
        """
        if (status := self._second_status(domid)) == Status.OK:
            return self.books.domains[domid]
        raise self._domain_error(call, status, domid)

    def _domain_error(self, call: str, status: Status, domid: int) -> errors.CallError:
        if status != Status.EINVAL:
            return error_of(call, status, domid=domid)
        if self.books.domains[domid].dying:
            text = f"{call}: domain {domid} is being destroyed"
            return errors.DomainDyingError(text, call=call, status=status, domid=domid)
        return errors.SharingDisabledError(
            f"{call}: memory sharing is not enabled on domain {domid}",
            call=call,
            status=status,
            domid=domid,
            remedy=f"enable it with control({domid}, True)",
        )

    @staticmethod
    def _statuses(domids: DomIds, status_of: Callable[[int], Status]) -> Statuses:
        # The status of each row's domain, asked once for each domain.
        statuses = np.zeros(len(domids), np.int32)
        for domid in np.unique(domids).tolist():
            if (status := status_of(domid)) != Status.OK:
                statuses[domids == domid] = status
        return statuses
