"""Throw-away domains: two guests of a real host that never run, for tests to write to and share.

They stay paused, and are destroyed in the end. Only this writes to the memory of domains.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager

import numpy as np

from memshr.errors import Status, UnsupportedError
from memshr.hypervisor import Hypervisor, error_of
from memshr.types import PAGE_SIZE, DomId, Gfn
from memshr.xen import XenHypervisor, libxc
from memshr.xen.connection import Connection
from memshr.xen.domains import EmptyDomains
from memshr.xen.mappings import Mappings

_SLACK_PAGES = 64


class ThrowawayDomains(EmptyDomains):
    """Makes domains with memory, and destroys them all when it is left."""

    def __init__(self, connection: Connection) -> None:
        super().__init__(connection)
        self._mappings = Mappings(connection)

    def create(self, pages: int, *, first_gfn: int = 0, slack_pages: int = _SLACK_PAGES, hap: bool = True) -> DomId:
        """A new domain, paused, with ``pages`` pages of RAM from ``first_gfn`` on.

        :param slack_pages: how far max_pages lies above that.
        :param hap: with hardware-assisted paging; without it has shadow paging, and cannot share.
        :raises BackendError: the hypervisor refuses; the text says at which step.
        """
        domid = self.create_empty(pages + slack_pages, hap=hap)
        functions, xch = self._connection.libxc, self._connection.xch
        if pages:
            gfns = np.arange(first_gfn, first_gfn + pages, dtype=np.uint64)
            # SAFETY: gfns has as many xen_pfn_t as the call is told.
            self._step(
                f"given {pages} pages",
                functions.xc_domain_populate_physmap_exact(xch, domid, pages, 0, 0, gfns.ctypes.data),
                "is there free memory?",
            )
        return domid

    def set_ring_page(self, domid: DomId, gfn: Gfn) -> None:
        """Say which page of a domain is to be its sharing ring."""
        parameter = libxc.HVM_PARAM_SHARING_RING_PFN
        answer = self._connection.libxc.xc_hvm_param_set(self._connection.xch, domid, parameter, gfn)
        self._step("given a page for its sharing ring", answer)

    def destroy(self, domid: DomId) -> None:
        """Destroy one before the others."""
        self.domids.remove(domid)
        self._step("destroyed", self._connection.libxc.xc_domain_destroy(self._connection.xch, domid))

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
