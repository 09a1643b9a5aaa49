"""A stand-in for Xen's libraries: the same C functions, played by the embedded hypervisor.

This is no Xen and proves nothing about Xen. It takes the place of libxenctrl and libxenforeignmemory below the
binding, so that everything above them runs on any machine: arguments go through the same ctypes prototypes into C and
back, functions return -1 and set errno, structures are filled byte by byte, mappings are real pages of this process.

It answers as the four builds of Xen 4.17.7 did that memshr was run on (``Build``). What hung or killed them it survives
and writes down (``crashes``, ``deaths``); what they got wrong for good (a counter) it gets wrong, too.
"""

from __future__ import annotations

import ctypes
import enum
import errno
import mmap
import struct
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memshr import errors
from memshr.embedded import EmbeddedHypervisor
from memshr.embedded.host import ForeignMapping
from memshr.embedded.p2m import TYPE_BITS, TYPE_MASK
from memshr.embedded.shared_frames import page_of
from memshr.errors import Status
from memshr.types import MAX_GFN_BITS, PAGE_SIZE, DomainInfo, DomainKind, DomId, Gfn, GrantRef, Handle, P2mType
from memshr.xen import libxc
from memshr.xen.connection import connect
from memshr.xen.hypervisor import XenHypervisor
from memshr.xen.libxc import PROT_WRITE, PROTOTYPES, CreateFlag, DominfFlag, Function, Libxc, Release
from memshr.xen.names import Names

_XEN_4_17 = Release(4, 17)
_PV_DOM0 = DominfFlag(0)
_SOMETHING = 0x1000  # a pointer that nobody follows
_KINDS = {
    CreateFlag(0): DomainKind.PV,
    CreateFlag.HVM: DomainKind.SHADOW,
    CreateFlag.HVM | CreateFlag.HAP: DomainKind.HVM,
}
_FLAGS = {
    DomainKind.PV: DominfFlag(0),
    DomainKind.SHADOW: DominfFlag.HVM_GUEST,
    DomainKind.HVM: DominfFlag.HVM_GUEST | DominfFlag.HAP,
}


_RING_ENTRIES = 8
_PLENTY_PAGES = 1 << 28
_MULTICALL_ENTRY = struct.Struct("<QqQQ32x")


class Build(enum.StrEnum):
    """How the hypervisor was built."""

    DEBUG = "debug"
    """With memory sharing, Xen's audit, and assertions that kill it; it shares on any CPU with nested paging."""
    RELEASE = "release"
    """The same without audit and assertions."""
    VMX = "vmx"
    """As the sources are: a release build with memory sharing that asks for Intel VMX, which this CPU does not have."""
    WITHOUT = "without"
    """As distributions ship it: without memory sharing."""


@dataclass(slots=True)
class _Ring:
    # Xen's own side of a sharing ring: how many requests it has put in, and responses taken out.
    requests: int = 0
    responses: int = 0


@dataclass(slots=True)
class _Mapping:
    memory: mmap.mmap
    pages: list[ForeignMapping | None]
    writable: bool


@dataclass
class StandIn:
    """The functions of ``libxc.PROTOTYPES`` by name, and knobs to make them refuse."""

    embedded: EmbeddedHypervisor = field(default_factory=EmbeddedHypervisor)
    release: Release = _XEN_4_17
    """What the library is."""
    running: Release | None = None
    """What the hypervisor says that it is; None: the same."""
    build: Build = Build.DEBUG
    """How the hypervisor was built."""
    dom0_flags: DominfFlag = _PV_DOM0
    refuse: dict[str, int] = field(default_factory=dict)
    """Functions that fail, and the errno that they fail with."""
    missing: frozenset[str] = frozenset()
    """Functions that the library does not have."""
    pod_entries: dict[int, int] = field(default_factory=dict)
    """Domains with populate-on-demand pages left."""
    domaininfo_bytes: int | None = None
    """sizeof(xc_domaininfo_t) of a library that is not what its soname says."""
    calls: list[tuple[Any, ...]] = field(default_factory=list)
    """Every call in order: the function's name and its arguments after the first."""
    crashes: list[tuple[DomId, Gfn]] = field(default_factory=list)
    """The pages at which Xen 4.17 would have died: given up while a third domain had them."""
    deaths: list[str] = field(default_factory=list)
    """What else would have hung or killed it, in words."""
    free_pages: int | None = None
    """What the host says that it has; None: the truth."""
    console: bytes = b""
    before: dict[str, list[Callable[[], None]]] = field(default_factory=lambda: defaultdict(list))
    """What happens just before a function is called, once each."""

    def __post_init__(self) -> None:
        self._mappings: dict[int, _Mapping] = {}
        self._rings: dict[int, _Ring] = {}
        self._miscounted_pages = 0  # add_to_physmap calls that failed and were counted as freed
        self._buffers: dict[int, Any] = {}
        share = self.embedded.books.share

        def watched(source_pid: int, source_handle: int, client_pid: int, client_handle: int) -> int:
            doomed = self._gives_up_what_a_third_maps(source_pid, client_pid)
            status = share(source_pid, source_handle, client_pid, client_handle)
            if status == 0 and doomed:
                _, gfn = page_of(client_pid)
                self.crashes.append((DomId(client_pid >> MAX_GFN_BITS), Gfn(gfn)))
            return status

        # Also range_share comes through here, step by step; that is why the books are watched and not the call.
        vars(self.embedded.books)["share"] = watched
        if self.build is Build.VMX:
            vars(self.embedded)["_cannot_share"] = lambda _domain: Status.EOPNOTSUPP

    def _gives_up_what_a_third_maps(self, source_pid: int, client_pid: int) -> bool:
        books = self.embedded.books
        source, client = books.entries.get(source_pid), books.entries.get(client_pid)
        if client & TYPE_MASK != P2mType.RAM_SHARED or source >> TYPE_BITS == client >> TYPE_BITS:
            return False
        members = books.frames.members(books.frames.slot_of_mfn.get(client >> TYPE_BITS))
        of_the_call = {source_pid >> MAX_GFN_BITS, client_pid >> MAX_GFN_BITS}
        return not of_the_call.issuperset((members >> MAX_GFN_BITS).tolist())

    def load(self, release: Release) -> Libxc | None:
        """What ``libxc.load`` does: the functions, if this is the release that is asked for."""
        if release != self.release:
            return None
        functions: dict[str, Function] = {}
        for prototype in PROTOTYPES:
            if prototype.name not in self.missing and hasattr(self, prototype.name):
                played = self._played(prototype.name, getattr(self, prototype.name), prototype.restype)
                # As C sees it: the arguments are converted into the prototype's types and back.
                functions[prototype.name] = ctypes.CFUNCTYPE(prototype.restype, *prototype.argtypes, use_errno=True)(
                    played
                )
        return Libxc(functions, self.release, f"stand-in for libxenctrl.so.{self.release}")

    def _played(self, name: str, function: Function, restype: Any) -> Function:
        sharing = name.startswith("xc_memshr_")
        failure = None if restype is ctypes.c_void_p else -1

        def play(*arguments: Any) -> Any:
            self.calls.append((name, *(a for a in arguments[1:] if not isinstance(a, ctypes._Pointer))))
            if self.before[name]:
                self.before[name].pop(0)()
            if name in self.refuse or (sharing and self.build is Build.WITHOUT):
                ctypes.set_errno(self.refuse.get(name, errno.ENOSYS))
                return failure
            try:
                answer = function(*arguments[1:])
            except errors.CallError as error:
                ctypes.set_errno(error.status.errno)
                return failure
            return 0 if answer is None and restype is not None else answer

        return play

    # -- the hypervisor and its domains ------------------------------------------------------------------------------

    def xc_interface_open(self, _dombuild_logger: int, _flags: int) -> int:
        return _SOMETHING

    def xc_interface_close(self) -> None:
        pass

    def xc_version(self, command: int, address: int | None) -> int:
        if command == libxc.XENVER_VERSION:
            running = self.running or self.release
            return running.major << 16 | running.minor
        assert address is not None
        text = b".7-standin\0" if command == libxc.XENVER_EXTRAVERSION else b"hvm-3.0-x86_64 \0"
        ctypes.memmove(address, text, len(text))
        return 0

    def xc_domain_getinfolist(self, first: int, count: int, address: int) -> int:
        dtype = libxc.domaininfo_dtype(self.release)
        domains = [d for d in self.embedded.domains() if d.domid >= first][: count if first else count - 1]
        rows = np.zeros(len(domains) + (not first), dtype)
        if not first:
            rows[0]["flags"] = self.dom0_flags
        for row, info in zip(rows[not first :], domains, strict=True):
            self._fill(row, info)
        filled = rows.tobytes()
        if self.domaininfo_bytes:
            filled = b"\0" * self.domaininfo_bytes
        ctypes.memmove(address, filled, len(filled))
        return len(rows)

    @staticmethod
    def _fill(row: np.void, info: DomainInfo) -> None:
        flags = _FLAGS[info.kind]
        flags |= DominfFlag.PAUSED if info.pause_count else DominfFlag(0)
        flags |= DominfFlag.DYING if info.dying else DominfFlag(0)
        flags |= DominfFlag.SHUTDOWN if info.crashed else DominfFlag(0)
        reason = libxc.SHUTDOWN_CRASH if info.crashed else 0
        row["domain"], row["flags"] = info.domid, flags | reason << libxc.DOMINF_SHUTDOWN_SHIFT
        row["tot_pages"], row["shr_pages"], row["max_pages"] = info.tot_pages, info.shr_pages, info.max_pages

    def _domain(self, domid: int) -> Any:
        self.embedded.domain_info(DomId(domid))  # ESRCH
        return self.embedded.books.domains[domid]

    def xc_domain_maximum_gpfn(self, domid: int, highest: Any) -> None:
        highest[0] = max(self._domain(domid).p2m.max_gfn, 0)

    def xc_domain_get_pod_target(self, domid: int, total: Any, cached: Any, entries: Any) -> None:
        total[0] = self._domain(domid).tot_pages
        cached[0] = 0
        entries[0] = self.pod_entries.get(domid, 0)

    def xc_hvm_param_get(self, domid: int, parameter: int, value: Any) -> None:
        value[0] = self._domain(domid).hvm_params.get(parameter, 0)

    def xc_availheap(self, _min_width: int, _max_width: int, _node: int, available: Any) -> None:
        free = self.embedded.memory.free_pages if self.free_pages is None else self.free_pages
        available[0] = (_PLENTY_PAGES if free is None else free) * PAGE_SIZE

    def xc_domain_pause(self, domid: int) -> None:
        self._not_of_dom0(domid)
        self.embedded.pause(DomId(domid))

    def xc_domain_unpause(self, domid: int) -> None:
        self._not_of_dom0(domid)
        self.embedded.unpause(DomId(domid))

    @staticmethod
    def _not_of_dom0(domid: int) -> None:
        # Where Xen says EINVAL of the domain that calls.
        if domid == 0:
            raise errors.CallError("not of the domain that calls", status=Status.EINVAL)

    def xc_readconsolering(self, address: int, count: Any, _clear: int, incremental: int, index: Any) -> None:
        said = self.console[index[0] if incremental else 0 :][: count[0]]
        ctypes.memmove(address, said, len(said))
        count[0] = len(said)
        index[0] += len(said)

    # -- memory sharing ----------------------------------------------------------------------------------------------

    def xc_memshr_control(self, domid: int, enable: int) -> None:
        self.embedded.control(DomId(domid), bool(enable))

    def xc_memshr_ring_enable(self, domid: int, port: Any) -> None:
        self._not_of_dom0(domid)
        page = self._domain(domid).hvm_params.get(libxc.HVM_PARAM_SHARING_RING_PFN, 0)
        try:
            port[0] = self.embedded.ring_enable(DomId(domid))
        except errors.HostMemoryError:
            self._assert(f"ring_enable: no memory to unshare gfn {page} of domain {domid}")
            raise
        self._rings[domid] = _Ring()

    def xc_memshr_ring_disable(self, domid: int) -> None:
        self._not_of_dom0(domid)
        self.embedded.ring_disable(DomId(domid))
        self._rings.pop(domid, None)

    def _ring_page(self, domid: int) -> Any:
        # The bytes of an enabled ring, with every request in it that there is room for.
        domain = self.embedded.books.domains.get(domid)
        if domain is None or domain.ring_mfn is None:
            return None
        ring, page = self._rings[domid], self.embedded.memory.page(domain.ring_mfn)
        for request in domain.ring_events[ring.requests - ring.responses :]:
            if ring.requests - ring.responses == _RING_ENTRIES:
                break
            paused = libxc.VM_EVENT_VCPU_PAUSED if request.vcpu is not None else 0
            entry = bytearray(libxc.VM_EVENT_BYTES)
            struct.pack_into(
                "<IIII", entry, 0, libxc.VM_EVENT_VERSION, paused, libxc.VM_EVENT_REASON_MEM_SHARING, request.vcpu or 0
            )
            struct.pack_into("<Q", entry, libxc.VM_EVENT_GFN_OFFSET, request.gfn)
            place = _entry_offset(ring.requests)
            page[place : place + len(entry)] = np.frombuffer(entry, np.uint8)
            ring.requests += 1
            page[:4] = np.frombuffer(struct.pack("<I", ring.requests & 0xFFFFFFFF), np.uint8)
        return page

    def xc_memshr_domain_resume(self, domid: int) -> None:
        self._not_of_dom0(domid)
        page = self._ring_page(domid)
        if page is None:
            self.embedded.domain_resume(DomId(domid))
            return
        ring = self._rings[domid]
        (produced,) = struct.unpack_from("<I", page.tobytes(), 8)
        count = (produced - ring.responses) & 0xFFFFFFFF
        if count > ring.requests - ring.responses:
            self.deaths.append(f"domain_resume: prints about {count} responses of domain {domid} that nobody gave")
            return
        for _ in range(count):
            (version,) = struct.unpack_from("<I", page.tobytes(), _entry_offset(ring.responses))
            assert version == libxc.VM_EVENT_VERSION, "a response of another version is passed over, its vCPU waits"
            ring.responses += 1
        self.embedded.ring_respond(DomId(domid), count)
        self.embedded.domain_resume(DomId(domid))

    def _assert(self, what: str) -> None:
        # An assertion of a debug build fails.
        if self.build is Build.DEBUG:
            self.deaths.append(what)

    def xc_memshr_nominate_gfn(self, domid: int, gfn: int, handle: Any) -> None:
        handle[0] = self.embedded.nominate_gfn(DomId(domid), Gfn(gfn))

    def xc_memshr_nominate_gref(self, domid: int, ref: int, handle: Any) -> None:
        handle[0] = self.embedded.nominate_gref(DomId(domid), GrantRef(ref))

    def xc_memshr_share_gfns(self, sdom: int, sgfn: int, sh: int, cdom: int, cgfn: int, ch: int) -> None:
        self.embedded.share_gfns(DomId(sdom), Gfn(sgfn), Handle(sh), DomId(cdom), Gfn(cgfn), Handle(ch))

    def xc_memshr_share_grefs(self, sdom: int, sref: int, sh: int, cdom: int, cref: int, ch: int) -> None:
        self.embedded.share_grefs(DomId(sdom), GrantRef(sref), Handle(sh), DomId(cdom), GrantRef(cref), Handle(ch))

    def xc_memshr_add_to_physmap(self, sdom: int, sgfn: int, sh: int, cdom: int, cgfn: int) -> None:
        try:
            self.embedded.add_to_physmap(DomId(sdom), Gfn(sgfn), Handle(sh), DomId(cdom), Gfn(cgfn))
        except errors.CallError as error:
            self._miscounted_pages += error.status == Status.ENOENT
            raise

    def xc_memshr_range_share(self, sdom: int, cdom: int, first: int, last: int) -> None:
        self.embedded.range_share(DomId(sdom), DomId(cdom), Gfn(first), Gfn(last))

    def xc_memshr_fork(self, parent: int, child: int, _iommu: bool, _block: bool) -> None:
        domains = self.embedded.books.domains
        line = domains.get(parent)
        while line is not None and child in domains and domains[child].parent is None:
            if line is domains[child]:
                self.deaths.append(f"fork: domain {child} is its own ancestor now, and an access to a hole hangs")
                return
            line = line.parent
        self.embedded.fork(DomId(parent), DomId(child))

    def xc_memshr_fork_reset(self, child: int, state: bool, memory: bool) -> None:
        self.embedded.fork_reset(DomId(child), state=state, memory=memory)

    def xc_memshr_debug_gfn(self, domid: int, gfn: int) -> int:
        return self.embedded.debug_gfn(DomId(domid), Gfn(gfn))

    def xc_memshr_debug_gref(self, domid: int, ref: int) -> int:
        return self.embedded.debug_gref(DomId(domid), GrantRef(ref))

    def xc_memshr_audit(self) -> int:
        if self.build is not Build.DEBUG:
            ctypes.set_errno(errno.ENOSYS)
            return -1
        report = self.embedded.audit()
        self.console += b"".join(b"(XEN) mem_sharing.c: %s\n" % str(finding).encode() for finding in report.findings)
        return report.xen_errors or 0

    def xc_sharing_freed_pages(self) -> int:
        return self.embedded.counters().freed_pages + self._miscounted_pages

    def xc_sharing_used_frames(self) -> int:
        return self.embedded.counters().used_frames

    # -- throw-away domains ------------------------------------------------------------------------------------------

    def xc_domain_create(self, domid: Any, address: int) -> None:
        dtype = libxc.createdomain_dtype(self.release)
        config = np.frombuffer(ctypes.string_at(address, dtype.itemsize), dtype)[0]
        kind = _KINDS[CreateFlag(int(config["flags"]))]
        domid[0] = self.embedded.create_domain("throw-away", kind=kind, max_pages=0, vcpus=0)

    def xc_domain_destroy(self, domid: int) -> None:
        self.embedded.destroy_domain(DomId(domid))

    def xc_domain_max_vcpus(self, domid: int, count: int) -> None:
        self._domain(domid).vcpus = count

    def xc_domain_setmaxmem(self, domid: int, kib: int) -> None:
        self.embedded.set_max_pages(DomId(domid), kib * 1024 // PAGE_SIZE)

    def xc_domain_populate_physmap_exact(self, domid: int, count: int, order: int, _flags: int, gfns: int) -> None:
        assert order == 0
        for gfn in np.frombuffer(ctypes.string_at(gfns, count * 8), np.uint64).tolist():
            self.embedded.populate(DomId(domid), Gfn(gfn))

    def xc_hvm_param_set(self, domid: int, parameter: int, value: int) -> None:
        self.embedded.set_hvm_param(DomId(domid), parameter, value)

    def xc_set_paging_mempool_size(self, domid: int, _size_bytes: int) -> None:
        self._domain(domid)

    def xc_shadow_control(self, domid: int, _operation: int, _mib: Any, _mode: int) -> None:
        self._domain(domid)

    # -- foreign mappings --------------------------------------------------------------------------------------------

    def xenforeignmemory_open(self, _flags: int) -> int:
        return _SOMETHING

    def xenforeignmemory_close(self) -> None:
        pass

    def xenforeignmemory_map(self, domid: int, prot: int, count: int, gfns: int, errs: int) -> int:
        wanted = np.frombuffer(ctypes.string_at(gfns, count * 8), np.uint64).tolist()
        found = np.zeros(count, np.int32)
        memory = mmap.mmap(-1, count * PAGE_SIZE)
        pages: list[ForeignMapping | None] = [None] * count
        self._ring_page(domid)
        present = self._present(domid, np.array(wanted, np.uint64))
        found[~present] = -errno.EINVAL
        for i in np.flatnonzero(present).tolist():
            gfn, writable = wanted[i], bool(prot & PROT_WRITE)
            try:
                page = self.embedded.map_foreign(DomId(domid), Gfn(gfn), writable=writable)
            except errors.CallError as error:
                found[i] = error.status  # negative, as Linux's privcmd hands it out
                if writable and error.status == Status.ENOMEM:
                    self._assert(f"a writable mapping of gfn {gfn} of domain {domid} found no memory to unshare it")
            else:
                pages[i] = page
                memory[i * PAGE_SIZE : (i + 1) * PAGE_SIZE] = page.read()
        ctypes.memmove(errs, found.ctypes.data, found.nbytes)
        buffer = (ctypes.c_ubyte * len(memory)).from_buffer(memory)
        address = ctypes.addressof(buffer)
        self._buffers[address] = buffer
        self._mappings[address] = _Mapping(memory, pages, bool(prot & PROT_WRITE))
        return address

    def _present(self, domid: int, gfns: NDArray[np.uint64]) -> NDArray[np.bool_]:
        # Which gfns may have RAM, so that a large address space does not take long; a fork's come when looked at.
        domain = self.embedded.books.domains.get(domid)
        if domain is None or domain.parent is not None:
            return np.ones(len(gfns), np.bool_)
        runs = domain.p2m.populated_ranges()
        if not len(runs):
            return np.zeros(len(gfns), np.bool_)
        which = np.searchsorted(runs[:, 0].astype(np.uint64), gfns, side="right") - 1
        ends = (runs[:, 0] + runs[:, 1]).astype(np.uint64)
        return np.asarray((which >= 0) & (gfns < ends[which]))

    def xenforeignmemory_unmap(self, address: int, count: int) -> None:
        mapping = self._mappings.pop(address)
        assert len(mapping.pages) == count, "unmapped with another size than it was mapped with"
        for i, page in enumerate(mapping.pages):
            if page is not None:
                if mapping.writable:  # a copy of the frame was mapped, so what was written goes back now
                    page.write(mapping.memory[i * PAGE_SIZE : (i + 1) * PAGE_SIZE])
                page.close()
        del self._buffers[address]

    @property
    def mapped_pages(self) -> int:
        """Pages that are mapped now."""
        return sum(len(mapping.pages) for mapping in self._mappings.values())

    # -- many hypercalls in one --------------------------------------------------------------------------------------

    def xencall_open(self, _flags: int) -> int:
        return _SOMETHING

    def xencall_close(self) -> None:
        pass

    def xencall_alloc_buffer_pages(self, count: int) -> int:
        buffer = (ctypes.c_ubyte * (count * PAGE_SIZE))()
        address = ctypes.addressof(buffer)
        self._buffers[address] = buffer
        return address

    def xencall_free_buffer_pages(self, address: int, count: int) -> None:
        assert len(self._buffers.pop(address)) == count * PAGE_SIZE

    def xencall2(self, op: int, address: int, count: int) -> None:
        # Of all that this could be: a list of questions about pages.
        assert op == libxc.HYPERVISOR_MULTICALL
        for entry in range(address, address + count * _MULTICALL_ENTRY.size, _MULTICALL_ENTRY.size):
            op, _, command, argument = _MULTICALL_ENTRY.unpack_from(ctypes.string_at(entry, _MULTICALL_ENTRY.size))
            sub_op, domid, gfn = struct.unpack("<BxHxxxxQ", ctypes.string_at(argument, 16))
            assert (op, command) == (libxc.HYPERVISOR_MEMORY_OP, libxc.XENMEM_SHARING_OP)
            assert sub_op == libxc.SHARING_OP_DEBUG_GFN
            try:
                result = self.xc_memshr_debug_gfn(domid, gfn)
            except errors.CallError as error:
                result = int(error.status)
            ctypes.memmove(entry + 8, struct.pack("<q", result), 8)

    # -- logging -----------------------------------------------------------------------------------------------------

    def xtl_createlogger_stdiostream(self, _level: int, _flags: int) -> int:
        return _SOMETHING

    def xtl_logger_destroy(self) -> None:
        pass


def _entry_offset(index: int) -> int:
    return libxc.RING_ENTRIES_OFFSET + index % _RING_ENTRIES * libxc.VM_EVENT_BYTES


def open_stand_in(stand_in: StandIn | None = None, names: Callable[[], Names] = lambda: Names("")) -> XenHypervisor:
    """The seam of ``memshr.xen``, on the stand-in for Xen's libraries instead of a Xen host."""
    played = StandIn() if stand_in is None else stand_in
    connection = connect(played.load)
    try:
        return XenHypervisor(connection, names())
    except BaseException:
        connection.close()
        raise
