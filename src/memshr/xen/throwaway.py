"""Throw-away domains: two guests of a real host that never run, for tests to write to and share.

They are HVM with hardware-assisted paging, have one vCPU, no devices and no emulation but a local APIC (what a PVH
guest has), stay paused, and are destroyed in the end. Only this writes to the memory of domains.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Sequence
from contextlib import AbstractContextManager
from types import TracebackType
from typing import TYPE_CHECKING, Self

import numpy as np

from memshr.errors import BackendError, Status, UnsupportedError
from memshr.hypervisor import Hypervisor, error_of
from memshr.types import PAGE_SIZE, DomId, Gfn
from memshr.xen import libxc
from memshr.xen.connection import Connection
from memshr.xen.libxc import CreateFlag, Release
from memshr.xen.mappings import Mappings

if TYPE_CHECKING:
    from memshr.xen.hypervisor import XenHypervisor

_PAGE_TABLE_MIB = 4
_SLACK_PAGES = 64


class ThrowawayDomains:
    """Makes domains and destroys them all when it is left.

    :param connection: as the hypervisor under test uses it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._mappings = Mappings(connection)
        self.domids: list[DomId] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for domid in reversed(self.domids):  # a fork before its parent, which stays dying until then
            self._connection.libxc.xc_domain_destroy(self._connection.xch, domid)
        self.domids.clear()

    def create(self, pages: int, *, first_gfn: int = 0, slack_pages: int = _SLACK_PAGES, hap: bool = True) -> DomId:
        """A new domain, paused, with ``pages`` pages of RAM from ``first_gfn`` on.

        :param slack_pages: how far max_pages lies above that.
        :param hap: with hardware-assisted paging; without it has shadow paging, and cannot share.
        :raises BackendError: the hypervisor refuses; the text says at which step.
        """
        functions, xch = self._connection.libxc, self._connection.xch
        config = np.zeros(1, libxc.createdomain_dtype(functions.release))
        config["handle"] = np.void(os.urandom(16))
        config["flags"] = CreateFlag.HVM | (CreateFlag.HAP if hap else CreateFlag(0))
        config["max_vcpus"] = 1
        config["max_evtchn_port"] = 1023
        config["max_grant_frames"] = config["max_maptrack_frames"] = np.uint32(-1 & 0xFFFFFFFF)  # Xen's default
        config["emulation_flags"] = libxc.X86_EMU_LAPIC
        if "grant_opts" in (config.dtype.names or ()):
            config["grant_opts"] = libxc.GRANT_VERSION_1
        wanted = ctypes.c_uint32(0)  # 0: Xen chooses
        # SAFETY: config is one struct xen_domctl_createdomain of this release, in a layout checked against its header.
        self._step(
            "created", functions.xc_domain_create(xch, ctypes.byref(wanted), config.ctypes.data), "is HAP available?"
        )
        domid = DomId(wanted.value)
        self.domids.append(domid)
        self._step("given a vCPU", functions.xc_domain_max_vcpus(xch, domid, 1))
        self._give_page_tables(domid)
        self.limit(domid, pages + slack_pages)
        if pages:
            gfns = np.arange(first_gfn, first_gfn + pages, dtype=np.uint64)
            # SAFETY: gfns has as many xen_pfn_t as the call is told.
            self._step(
                f"given {pages} pages",
                functions.xc_domain_populate_physmap_exact(xch, domid, pages, 0, 0, gfns.ctypes.data),
                "is there free memory?",
            )
        return domid

    def limit(self, domid: DomId, max_pages: int) -> None:
        """Set how many frames a domain may own."""
        answer = self._connection.libxc.xc_domain_setmaxmem(self._connection.xch, domid, max_pages * PAGE_SIZE // 1024)
        self._step("given its limit", answer)

    def set_ring_page(self, domid: DomId, gfn: Gfn) -> None:
        """Say which page of a domain is to be its sharing ring."""
        parameter = libxc.HVM_PARAM_SHARING_RING_PFN
        answer = self._connection.libxc.xc_hvm_param_set(self._connection.xch, domid, parameter, gfn)
        self._step("given a page for its sharing ring", answer)

    def destroy(self, domid: DomId) -> None:
        """Destroy one before the others."""
        self.domids.remove(domid)
        self._step("destroyed", self._connection.libxc.xc_domain_destroy(self._connection.xch, domid))

    def _give_page_tables(self, domid: DomId) -> None:
        functions, xch = self._connection.libxc, self._connection.xch
        if functions.xc_set_paging_mempool_size is not None:
            answer = functions.xc_set_paging_mempool_size(xch, domid, _PAGE_TABLE_MIB << 20)
        elif functions.release >= Release(4, 16):
            mib = ctypes.c_uint(_PAGE_TABLE_MIB)
            answer = functions.xc_shadow_control(xch, domid, libxc.SHADOW_OP_SET_ALLOCATION, ctypes.byref(mib), 0)
        else:
            megabytes = ctypes.c_ulong(_PAGE_TABLE_MIB)
            answer = functions.xc_shadow_control(
                *(xch, domid, libxc.SHADOW_OP_SET_ALLOCATION, None, 0, ctypes.byref(megabytes), 0, None)
            )
        self._step("given memory for page tables", answer)

    @staticmethod
    def _step(what: str, answer: int, hint: str = "") -> None:
        if answer < 0:
            reason = os.strerror(ctypes.get_errno())
            raise BackendError(f"a throw-away domain cannot be {what}: {reason}", remedy=hint)

    def write(self, domid: DomId, gfn: Gfn, data: bytes, offset: int = 0) -> None:
        """What the guest would do: put bytes into its page, which unshares it.

        :raises NotSharableError: no RAM there. :raises HostMemoryError: no memory to unshare it.
        """
        status = self._mappings.write(domid, gfn, data, offset)
        if status != Status.OK:
            raise error_of("write", status, domid=domid, gfn=gfn)

    def held(self, domid: DomId, gfn: Gfn) -> AbstractContextManager[None]:
        """Keep a page mapped for as long as the ``with`` lasts."""
        return self._mappings.held(domid, gfn)

    def read(self, domid: DomId, gfn: Gfn) -> bytes:
        """What the guest would see in its page. :raises NotSharableError: no RAM there."""
        page = np.zeros((1, PAGE_SIZE), np.uint8)
        status = int(self._mappings.read(domid, np.array([gfn], np.int64), page)[0])
        if status != Status.OK:
            raise error_of("read", status, domid=domid, gfn=gfn)
        return page.tobytes()


class ThrowawayGuests:
    """Two throw-away domains as the contract kit wants them (``memshr.testing.GuestHost``)."""

    PAGES = 16

    def __init__(self, hypervisor: XenHypervisor, domains: ThrowawayDomains) -> None:
        if not hypervisor.facts.sharing:
            raise UnsupportedError("this hypervisor was built without memory sharing", remedy="see docs/xen-host.md")
        self._hypervisor = hypervisor
        self._domains = domains
        self.domids = (domains.create(self.PAGES), domains.create(self.PAGES))
        for domid in self.domids:
            hypervisor.control(domid, True)

    @property
    def hypervisor(self) -> Hypervisor:
        """The host under test."""
        return self._hypervisor

    def gfns(self, domid: DomId) -> Sequence[Gfn]:
        """Pages that may be used."""
        return [Gfn(gfn) for gfn in range(self.PAGES)]

    def hole(self, domid: DomId) -> Gfn:
        """A gfn beyond the RAM."""
        return Gfn(self.PAGES + 100)

    def write(self, domid: DomId, gfn: Gfn, data: bytes, offset: int = 0) -> None:
        """What the guest does."""
        self._domains.write(domid, gfn, data, offset)

    def read(self, domid: DomId, gfn: Gfn) -> bytes:
        """What the guest sees."""
        return self._domains.read(domid, gfn)
