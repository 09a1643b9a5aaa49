"""The host around memory sharing: domains are made and taken apart, guests read and write, dom0 maps their pages.

This is what a toolstack (libxl) and a guest do to memory; the sharing calls that act on it are in ``hypervisor``.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import pairwise

import numpy as np

from memshr import errors
from memshr.embedded.columns import CHUNK_BITS
from memshr.embedded.fork import fill_from_parent, leave_parent
from memshr.embedded.mem_sharing import Domain, MemSharing, PageTables
from memshr.embedded.memory import MachineMemory
from memshr.embedded.p2m import HOLES, TYPE_BITS, TYPE_MASK, FrameExtent, P2m, entry, is_ram
from memshr.embedded.shared_frames import NOWHERE, page_id
from memshr.errors import Status
from memshr.hypervisor import error_of
from memshr.types import (
    MAX_GFN_BITS,
    PAGE_SIZE,
    DomainInfo,
    DomainKind,
    DomId,
    Extent,
    Gfn,
    GrantRef,
    P2mType,
    RingRequest,
)

FIRST_RESERVED_DOMID = 0x7FF0
SLACK_PAGES = 64
"""How far max_pages lies above a new domain's pages, when the caller does not say."""

GRANT_ENTRIES = 512
"""References of a grant table of one frame, as a new domain has it (8-byte entries of version 1)."""

_GFNS_OF_A_TABLE = 512
_SMALL_DOMAIN_PAGES = 1024
# Up to here a new domain gets its frames one by one, from the top, in Xen's order; above, in one run.


class ForeignMapping:
    """A mapping of one guest page by dom0: an extra reference to its frame until it is released.

    It keeps to the frame that was there when it was made, whatever happens to the gfn.
    """

    def __init__(self, host: Host, mfn: int, *, writable: bool) -> None:
        self._host = host
        self._mfn: int | None = mfn
        self.writable = writable

    @property
    def mfn(self) -> int:
        """The frame. :raises InvariantError: the mapping was released."""
        if self._mfn is None:
            raise errors.InvariantError("a released mapping was used")
        return self._mfn

    def read(self) -> bytes:
        """The PAGE_SIZE bytes of the frame."""
        return self._host.memory.page(self.mfn).tobytes()

    def write(self, data: bytes, offset: int = 0) -> None:
        """Put bytes into the frame. :raises InvariantError: the mapping is read-only."""
        if not self.writable:
            raise errors.InvariantError("a read-only mapping was written")
        self._host.memory.page(self.mfn)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def close(self) -> None:
        """Give the reference back."""
        mfn, self._mfn = self.mfn, None
        self._host.release_frame(mfn)


class Host:
    """Domains, their memory, and the machine's; the base of ``EmbeddedHypervisor``, which adds the sharing calls."""

    def __init__(self, *, limit_pages: int | None = None, scrub_byte: int = 0) -> None:
        self.memory = MachineMemory(limit_pages, scrub_byte)
        self.books = MemSharing(self.memory)
        self._next_domid = 1

    # -- domains -----------------------------------------------------------------------------------------------------

    def create_domain(
        self,
        name: str,
        pages: int = 0,
        *,
        first_gfn: int = 0,
        max_pages: int | None = None,
        kind: DomainKind = DomainKind.HVM,
        vcpus: int = 1,
        page_table_pages: int | None = None,
        extents: Sequence[Extent] = (),
    ) -> DomId:
        """A new domain, paused once, with ``pages`` pages of fresh RAM from ``first_gfn`` on and those of ``extents``.

        The arrays of the extents become the domain's memory: they are written when the guest writes, so they should
        be views of a private (copy-on-write) mapping. Nothing of them is read here.

        :param max_pages: how many frames it may own; default: what it gets now and SLACK_PAGES more.
        :param page_table_pages: memory for its page tables, in pages (Xen's HAP allocation); None: no limit.
        :raises HostMemoryError: the machine has not that much memory, or every domid is taken.
        :raises ValueError: extents overlap each other or the fresh RAM, or go beyond the address width.
        """
        if len(self.books.domains) == FIRST_RESERVED_DOMID - 1:
            raise self._no_room(f"there are {FIRST_RESERVED_DOMID - 1} domains, and no more domids")
        while self._next_domid in self.books.domains:
            self._next_domid = self._next_domid % (FIRST_RESERVED_DOMID - 1) + 1
        spans = sorted([(first_gfn, first_gfn + pages)] * bool(pages) + [(e.first_gfn, e.end_gfn) for e in extents])
        if pages < 0 or (spans and (spans[0][0] < 0 or spans[-1][1] > 1 << MAX_GFN_BITS)):
            raise ValueError("pages beyond the address width")
        if any(end > start for (_, end), (start, _) in pairwise(spans)):
            raise ValueError("extents overlap")
        total = pages + sum(len(extent.pages) for extent in extents)
        if self.memory.free_pages is not None and total > self.memory.free_pages:
            raise self._no_room(f"the machine has {self.memory.free_pages} free pages, {name} needs {total}")
        domid = DomId(self._next_domid)
        run = self.memory.allocate_run(domid, pages) if pages > _SMALL_DOMAIN_PAGES else None
        if run is None and pages > _SMALL_DOMAIN_PAGES:
            raise self._no_room(f"this process cannot have {pages} pages, which {name} needs")
        self._next_domid = self._next_domid % (FIRST_RESERVED_DOMID - 1) + 1
        p2m = P2m(domid, self.books.entries)
        self.books.entries.drop(p2m.first_key, p2m.end_key - 1)
        domain = Domain(domid, name, total + SLACK_PAGES if max_pages is None else max_pages, p2m, kind, vcpus)
        self.books.domains[domid] = domain
        if page_table_pages is not None:
            domain.page_tables = PageTables(page_table_pages, vcpus)
            for start, end in spans:
                for gfn in range(start, end, _GFNS_OF_A_TABLE):
                    domain.page_tables.cover(gfn)
        for extent in extents:
            mfn = self.memory.add_image(extent.pages, domid)
            p2m.extents.append(FrameExtent(extent.first_gfn, len(extent.pages), mfn))
        if run is not None:
            p2m.extents.append(FrameExtent(first_gfn, pages, run))
        else:
            for gfn in range(first_gfn, first_gfn + pages):
                mfn_or_none = self.memory.allocate(domid)
                assert mfn_or_none is not None  # there was room for all of them
                self.books.entries.set(page_id(domid, gfn), entry(mfn_or_none, P2mType.RAM_RW))
        p2m.max_gfn = spans[-1][1] - 1 if spans else -1
        domain.tot_pages = total
        return domid

    @staticmethod
    def _no_room(text: str) -> errors.HostMemoryError:
        return errors.HostMemoryError(f"create_domain: {text}", call="create_domain", status=Status.ENOMEM)

    def destroy_domain(self, domid: DomId) -> None:
        """Take a domain apart. Survivors keep the frames that they shared with it, and the handles.

        While dom0 maps a page that the domain alone owned, it stays as a dying domain.

        :raises NoSuchDomainError: no domain has this domid.
        """
        domain = self._existing(domid, "destroy_domain")
        if domain.dying:
            return
        domain.dying = True
        self.disable_ring(domain)
        self.books.destroy(domain)
        parent = leave_parent(domain)
        self._reap(domain)
        self._reap(parent)

    def _reap(self, domain: Domain | None) -> None:
        # A dying domain goes when nothing holds its frames and no fork of it is left.
        if domain is not None and domain.dying and not domain.tot_pages and not domain.forks:
            del self.books.domains[domain.domid]

    def disable_ring(self, domain: Domain) -> None:
        """Take the sharing ring away, if it is enabled."""
        if domain.ring_mfn is not None:
            mfn, domain.ring_mfn = domain.ring_mfn, None
            self.memory.writable_frames.discard(mfn)
            self.release_frame(mfn)

    def pause(self, domid: DomId) -> None:
        """Pause a domain once more. :raises NoSuchDomainError: no domain has this domid."""
        self._existing(domid, "pause").pause_count += 1

    def unpause(self, domid: DomId) -> None:
        """Take one pause back.

        :raises NoSuchDomainError: no domain has this domid.
        :raises RefusedDomainError: EINVAL: it is not paused.
        """
        domain = self._existing(domid, "unpause")
        if not domain.pause_count:
            raise error_of("unpause", Status.EINVAL, domid=domid)
        domain.pause_count -= 1

    def set_max_pages(self, domid: DomId, max_pages: int) -> None:
        """Change how many frames a domain may own; what it owns above that it keeps."""
        self._existing(domid, "set_max_pages").max_pages = max_pages

    def domains(self) -> list[DomainInfo]:
        """See the seam; dying domains are listed."""
        return [self.domain_info(DomId(domid)) for domid in sorted(self.books.domains)]

    def names(self) -> dict[DomId, str]:
        """See the seam."""
        return {info.domid: info.name for info in self.domains()}

    def domain_info(self, domid: DomId) -> DomainInfo:
        """See the seam."""
        domain = self._existing(domid, "domain_info")
        return DomainInfo(
            domid=domid,
            name=domain.name,
            tot_pages=domain.tot_pages,
            shr_pages=domain.shr_pages,
            max_pages=domain.max_pages,
            pause_count=domain.pause_count,
            dying=domain.dying,
            kind=domain.kind,
            crashed=domain.crashed,
        )

    # -- what a guest and its toolstack do with memory ---------------------------------------------------------------

    def write(self, domid: DomId, gfn: Gfn, data: bytes, offset: int = 0, *, vcpu: int | None = None) -> None:
        """Write into a page, which unshares it. To read-only RAM dom0 writes; what a vCPU writes there is lost.

        :param vcpu: the vCPU of the guest that writes; None: dom0 writes through a mapping. It makes a difference when
            there is no memory to unshare the page: with the sharing ring enabled a vCPU waits until domain_resume and
            writes again then, without the ring the domain is crashed; dom0 only gets the error.
        :raises NotSharableError: no RAM there. :raises HostMemoryError: no memory to unshare it.
        :raises ValueError: the bytes do not fit into the page.
        """
        if offset < 0 or offset + len(data) > PAGE_SIZE:
            raise ValueError(f"{len(data)} bytes at offset {offset} do not fit into a page of {PAGE_SIZE} bytes")
        if vcpu is not None and self.mem_type(domid, gfn) is P2mType.RAM_RO:
            return
        try:
            mfn = self._frame_for(domid, gfn, "write", writable=True)
        except errors.HostMemoryError:
            domain = self.books.domains[domid]
            if vcpu is not None and domain.ring_mfn is not None:
                domain.waiting_vcpus.add(vcpu)
                domain.ring_events[-1] = RingRequest(gfn, vcpu)
            elif vcpu is not None:
                domain.crashed = True
            raise
        self.memory.page(mfn)[offset : offset + len(data)] = np.frombuffer(data, np.uint8)

    def waiting_vcpus(self, domid: DomId) -> frozenset[int]:
        """The vCPUs that wait for memory to unshare a page. :raises NoSuchDomainError: no domain has this domid."""
        return frozenset(self._existing(domid, "waiting_vcpus").waiting_vcpus)

    def is_crashed(self, domid: DomId) -> bool:
        """True once a page could not be unshared for a running vCPU and nobody was told by the ring."""
        return self._existing(domid, "is_crashed").crashed

    def read(self, domid: DomId, gfn: Gfn) -> bytes:
        """What a guest sees in one of its pages: PAGE_SIZE bytes.

        :raises NotSharableError: no RAM there.
        """
        mfn = self._frame_for(domid, gfn, "read", writable=False)
        return self.memory.page(mfn).tobytes() if mfn else bytes(PAGE_SIZE)

    def map_foreign(self, domid: DomId, gfn: Gfn, *, writable: bool) -> ForeignMapping:
        """Map a guest page into dom0. A writable mapping unshares the page, whether or not it is ever written.

        :raises NotSharableError: no RAM there. :raises HostMemoryError: no memory to unshare it.
        """
        mfn = self._frame_for(domid, gfn, "map_foreign", writable=writable)
        if not mfn:
            mfn = self._frame_for(domid, gfn, "map_foreign", writable=True)
        self.memory.hold(mfn)
        return ForeignMapping(self, mfn, writable=writable)

    def release_frame(self, mfn: int) -> None:
        """Give back an extra reference to a frame; the last one may let a dying domain go."""
        self._reap(self.books.release(mfn))

    def _frame_for(self, domid: DomId, gfn: Gfn, call: str, *, writable: bool) -> int:
        # The frame to read or write; 0 when the page reads as zeros without one.
        domain = self._existing(domid, call)
        self._fill(domain, gfn, writable=writable)
        value = self.books.entries.get(self._pid(domid, gfn))
        kind = value & TYPE_MASK
        if not is_ram(value):
            raise error_of(call, Status.EINVAL, domid=domid, gfn=gfn)
        if writable and kind in (P2mType.RAM_SHARED, P2mType.RAM_POD):
            if (status := self.books.make_private(domain, gfn)) != Status.OK:
                raise error_of(call, status, domid=domid, gfn=gfn)
            value = self.books.entries.get(page_id(domid, gfn))
        return value >> TYPE_BITS

    def _fill(self, domain: Domain, gfn: Gfn, *, writable: bool) -> None:
        # What an access does to a hole of a fork. Where that fails the hole stays, and nobody is told why.
        if domain.parent is None or not 0 <= gfn < 1 << MAX_GFN_BITS:
            return
        if self.books.entries.get(page_id(domain.domid, gfn)) & TYPE_MASK in HOLES:
            fill_from_parent(self.books, domain, gfn, writable=writable)

    def populate(self, domid: DomId, gfn: Gfn) -> None:
        """Put fresh RAM at a gfn, in place of what was there.

        :raises HostMemoryError: no frame, or max_pages reached. :raises NotSharableError: beyond the address width.
        """
        self._change("populate", domid, gfn, self.books.populate)

    def decrease_reservation(self, domid: DomId, gfn: Gfn) -> None:
        """Take the RAM at a gfn away; a shared page is unshared first.

        :raises HostMemoryError: no memory to unshare it. :raises NotSharableError: there is none.
        """
        self._change("decrease_reservation", domid, gfn, self.books.depopulate)

    def remove_from_physmap(self, domid: DomId, gfn: Gfn) -> None:
        """Make a gfn a hole, leaving its frame to the domain; a shared page just leaves its frame.

        :raises NotSharableError: ENOENT: there is no RAM.
        """
        self._change("remove_from_physmap", domid, gfn, self.books.remove_mapping)

    def _change(self, call: str, domid: DomId, gfn: Gfn, change: Callable[[Domain, int], int]) -> None:
        domain = self._existing(domid, call)
        status = change(domain, gfn) if self._pid(domid, gfn) != NOWHERE else Status.EINVAL
        if status != Status.OK:
            raise error_of(call, status, domid=domid, gfn=gfn)

    def mem_type(self, domid: DomId, gfn: Gfn) -> P2mType:
        """What a gfn is. :raises NoSuchDomainError: no domain has this domid."""
        self._existing(domid, "mem_type")
        return P2mType(self.books.entries.get(self._pid(domid, gfn)) & TYPE_MASK)

    def set_mem_type(self, domid: DomId, gfn: Gfn, kind: P2mType) -> None:
        """Make a gfn RAM_RW, RAM_RO or MMIO_DM; a shared page is unshared first, and a fork's page filled.

        :raises NotSharableError: EINVAL: there is no RAM (a hole may become MMIO_DM), no such type can be set, or the
            gfn is beyond the last one of the domain.
        :raises HostMemoryError: EAGAIN: no memory to unshare it.
        """
        domain = self._existing(domid, "set_mem_type")
        settable = kind in (P2mType.RAM_RW, P2mType.RAM_RO, P2mType.MMIO_DM)
        if not settable or not 0 <= gfn <= max(0, domain.p2m.max_gfn):
            raise error_of("set_mem_type", Status.EINVAL, domid=domid, gfn=gfn)
        self._fill(domain, gfn, writable=True)
        pid = page_id(domid, gfn)
        value = self.books.entries.get(pid)
        if not is_ram(value) and kind is not P2mType.MMIO_DM:
            raise error_of("set_mem_type", Status.EINVAL, domid=domid, gfn=gfn)
        if is_ram(value) and self.books.make_private(domain, gfn) != Status.OK:
            raise error_of("set_mem_type", Status.EAGAIN, domid=domid, gfn=gfn)
        self.books.entries.set(pid, entry(self.books.entries.get(pid) >> TYPE_BITS, kind))

    def modified_memory(self, domid: DomId, gfn: Gfn) -> None:
        """What a device model says after writing a page; in log-dirty mode it is unshared, if it was shared.

        If there is no memory for that the page stays shared, and nobody is told.

        :raises NotSharableError: EINVAL: in log-dirty mode, the last gfn of the domain or one beyond it.
        """
        domain = self._existing(domid, "modified_memory")
        if not domain.log_dirty:
            return
        if not 0 <= gfn < domain.p2m.max_gfn:
            raise error_of("modified_memory", Status.EINVAL, domid=domid, gfn=gfn)
        if self.mem_type(domid, gfn) is P2mType.RAM_SHARED:
            self.books.make_private(domain, gfn)

    def set_log_dirty(self, domid: DomId, enable: bool) -> None:
        """Switch log-dirty mode: writable RAM becomes read-only to track writes, and back. Shared pages stay shared.

        :raises RefusedDomainError: EINVAL: it is on already.
        """
        domain = self._existing(domid, "set_log_dirty")
        if enable and domain.log_dirty:
            raise error_of("set_log_dirty", Status.EINVAL, domid=domid)
        domain.log_dirty = enable
        for part in domain.p2m.untouched():
            self.books.entries.chunk(page_id(domid, part.first_gfn) >> CHUNK_BITS)
        before, after = (P2mType.RAM_RW, P2mType.RAM_LOGDIRTY)[:: 1 if enable else -1]
        for _, chunk in domain.p2m.touched():
            chunk[chunk & TYPE_MASK == before] += after - before

    def map_grant_frame(self, domid: DomId, gfn: Gfn) -> None:
        """Put the domain's grant table at a gfn (XENMEM_add_to_physmap): a page of the hypervisor's own.

        RAM that was there goes, as with decrease_reservation.

        :raises NotSharableError: EINVAL: beyond the address width. :raises HostMemoryError: no memory to unshare it.
        """
        self._change("map_grant_frame", domid, gfn, self.books.map_grant_frame)

    def max_gpfn(self, domid: DomId) -> Gfn:
        """The highest gfn that was ever populated; 0 if none was. :raises NoSuchDomainError: no such domain."""
        return Gfn(max(0, self._existing(domid, "max_gpfn").p2m.max_gfn))

    # -- grants and parameters ---------------------------------------------------------------------------------------

    def grant(self, domid: DomId, ref: GrantRef, gfn: Gfn) -> None:
        """What a guest does: let dom0 map one of its pages by grant reference.

        :raises NotSharableError: ENOENT: the reference is beyond the grant table.
        """
        domain = self._existing(domid, "grant")
        if not 0 <= ref < GRANT_ENTRIES:
            raise error_of("grant", Status.ENOENT, domid=domid, gfn=ref)
        domain.grants[ref] = gfn

    def granted_gfn(self, domid: DomId, ref: GrantRef) -> Gfn:
        """The gfn behind a grant reference. :raises NotSharableError: ENOENT, ENXIO: no such, or not in use."""
        return self._granted_gfn(self._existing(domid, "granted_gfn"), ref, "granted_gfn")

    def map_grant(self, domid: DomId, ref: GrantRef, *, writable: bool) -> ForeignMapping:
        """map_foreign for the page behind a grant reference.

        :raises NotSharableError: ENOENT, ENXIO: no such reference, or not in use; EINVAL: no RAM there.
        """
        domain = self._existing(domid, "map_grant")
        return self.map_foreign(domid, self._granted_gfn(domain, ref, "map_grant"), writable=writable)

    def set_hvm_param(self, domid: DomId, parameter: int, value: int) -> None:
        """What a toolstack does: set one of the numbered parameters of a domain, such as where its rings are."""
        self._existing(domid, "set_hvm_param").hvm_params[parameter] = value

    def ring_events(self, domid: DomId) -> tuple[Gfn, ...]:
        """The gfns that were posted on the sharing ring and are not done with, oldest first."""
        return tuple(request.gfn for request in self._existing(domid, "ring_events").ring_events)

    @staticmethod
    def _granted_gfn(domain: Domain, ref: int, call: str) -> Gfn:
        if not 0 <= ref < GRANT_ENTRIES:
            raise error_of(call, Status.ENOENT, domid=domain.domid, gfn=ref)
        if ref not in domain.grants:
            raise error_of(call, Status.ENXIO, domid=domain.domid, gfn=ref)
        return Gfn(domain.grants[ref])

    @staticmethod
    def _pid(domid: int, gfn: int) -> int:
        return page_id(domid, gfn) if 0 <= gfn < 1 << MAX_GFN_BITS else NOWHERE

    def _existing(self, domid: int, call: str) -> Domain:
        domain = self.books.domains.get(domid)
        if domain is None:
            raise error_of(call, Status.ESRCH, domid=domid)
        return domain
