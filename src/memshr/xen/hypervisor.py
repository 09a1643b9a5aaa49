"""The seam on a real Xen host.

What makes this hard is not the calls, which libxc does, but what surrounds them:

* An errno means something else for each call. A share answers 9 and 10 for dead handles; anything else that answers
  those has lost its file descriptor. EINVAL and ESRCH do not say which of two domains they are about: we look.
* A foreign mapping is a reference that keeps a page from being nominated, and a look at a populate-on-demand page
  allocates it. So mappings are short (``mappings``) and domains with such pages are not looked at.
* Some calls make Xen 4.17 die or hang. memshr does not make them. docs/xen-host.md lists them, with where each is
  refused.
* A question to Xen about a page enables sharing on its domain. To find out first whether sharing is enabled takes
  another domain to ask with: ``sharing_enabled``.
"""

from __future__ import annotations

import ctypes
import errno
import logging
import os
from collections.abc import Callable, Sequence
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from memshr import errors
from memshr.closing import Closing
from memshr.errors import Status
from memshr.hypervisor import Capability, error_of
from memshr.runs import alike
from memshr.types import (
    MAX_GFN_BITS,
    AuditReport,
    Counters,
    DomainInfo,
    DomainKind,
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
from memshr.unsupported import UnsupportedCalls
from memshr.xen import libxc
from memshr.xen.audit import PATIENCE_S, Auditor
from memshr.xen.connection import Connection, HostFacts
from memshr.xen.domains import EmptyDomains
from memshr.xen.libxc import RELEASES, DominfFlag
from memshr.xen.mappings import Mappings
from memshr.xen.names import Names
from memshr.xen.ring import SharingRing
from memshr.xen.search import Search
from memshr.xen.sharers import Page, Sharers

_log = logging.getLogger(__name__)

_DOMAINS_AT_ONCE = 256
_FIRST_RESERVED_DOMID = 0x7FF0
_NOWHERE = (1 << 52) - 1
# A frame number that no domain has. libxc marks grant references with bit 62 of a gfn, so a gfn from outside must
# not get that far; Xen answers for this one as for every gfn where nothing is.
_Place = tuple[DomId, Gfn | GrantRef]
_REFUSE_ENABLING = (Status.EOPNOTSUPP, Status.ENODEV, Status.EXDEV)
_HANDLE_CALLS = frozenset({"share_gfns", "share_grefs", "add_to_physmap"})
_NO_SHARING = (errno.ENOSYS, errno.EOPNOTSUPP)


class XenHypervisor(UnsupportedCalls, Closing):
    """A Xen host, driven from its control domain; implements ``memshr.hypervisor.Hypervisor``.

    Use one object from one thread. Every call is at least one hypercall; the many-page forms spare the Python around
    it, not the hypercall, because Xen has no call for many pages.

    :param connection: open, and checked by ``connect``; it is closed with this object.
    """

    WHY_NOT: ClassVar = {
        Capability.FRAMES: "Xen does not tell dom0 which frame a page is on",
        Capability.ZERO: "Xen has no such call; share zero pages like others",
    }

    def __init__(self, connection: Connection, names: Names | None = None) -> None:
        self._connection = connection
        self._libxc = connection.libxc
        self._xch = connection.xch
        self._debug = self._libxc.xc_memshr_debug_gfn
        self._share_gfns = self._libxc.xc_memshr_share_gfns
        self._mappings = Mappings(connection, lambda domid: bool(self.sharing_enabled(DomId(domid))))
        self._names = Names() if names is None else names
        self._dtype = libxc.domaininfo_dtype(self._libxc.release)
        self._enabled: set[int] = set()  # domains that Xen has sharing enabled on, as far as we saw
        self._readable: set[int] = set()  # domains whose pages may be looked at
        self._sharers = Sharers()
        self._newest_handle = 0  # that Xen was seen to give out
        self._forks: dict[int, int] = {}  # child -> parent, as far as they were made here
        self._responses: dict[int, int] = {}  # domid -> what has been answered so far, of rings that were enabled here
        self._asker: EmptyDomains | None = None
        self.unseen_pages: dict[DomId, int] = {}
        """Of domains that were looked over: pages that they have, and that were not found."""
        self._sharing = self._is_built_in()
        extraversion = connection.text(libxc.XENVER_EXTRAVERSION, libxc.EXTRAVERSION_BYTES)
        self.facts = HostFacts(
            version=f"{self._libxc.release}{extraversion}",
            library=self._libxc.soname,
            capabilities=connection.text(libxc.XENVER_CAPABILITIES, libxc.CAPABILITIES_BYTES),
            sharing=self._sharing,
        )

    def _is_built_in(self) -> bool:
        # The counters read 0 without memory sharing, too. But a question about a page of our own domain is refused
        # with EPERM where sharing is built in, and with ENOSYS where it is not (seen on both, 4.17.7). It changes
        # nothing: sharing is never enabled on the domain that asks.
        if self._debug(self._xch, 0, 0) >= 0 or (number := ctypes.get_errno()) == errno.EPERM:
            return True
        if number in _NO_SHARING:
            return False
        raise errors.PermissionDeniedError(
            f"memory sharing cannot be asked about: {os.strerror(number)}",
            remedy="run in dom0; if XSM is on, its policy must allow memory sharing",
        )

    def close(self) -> None:
        """Close the libraries' handles. Nothing of the host depends on them: what is shared stays shared."""
        try:
            self.dismiss_asker()
        finally:
            self._connection.close()

    @property
    def capabilities(self) -> frozenset[Capability]:
        """See the seam. Without memory sharing in the hypervisor only looking is left; ZERO is no call of Xen's.

        Whether a *domain* can share (HVM, hardware-assisted paging, VMX, no passed-through device) Xen tells when it is
        enabled, and for forks when one is made.
        """
        if not self._sharing:
            return frozenset({Capability.LIVE})
        return frozenset(Capability) - {Capability.ZERO, Capability.FRAMES}

    # -- looking -----------------------------------------------------------------------------------------------------

    def domains(self) -> list[DomainInfo]:
        """See the seam; dying domains are listed. Cost: one hypercall for 256 domains."""
        infos = [info for info in self._list_domains() if info.domid]
        self._names.forget_all_but(info.domid for info in infos)
        return infos

    def names(self) -> dict[DomId, str]:
        """See the seam."""
        return {info.domid: info.name for info in self.domains()}

    def _list_domains(self) -> list[DomainInfo]:
        infos: list[DomainInfo] = []
        first = 0
        while True:
            batch = self._domaininfo(first, _DOMAINS_AT_ONCE)
            infos += [self._domain_info(row) for row in batch]
            if len(batch) < _DOMAINS_AT_ONCE:
                return infos
            first = infos[-1].domid + 1

    def _domaininfo(self, first: int, count: int) -> NDArray[np.void]:
        rows = np.zeros(count, self._dtype)
        # SAFETY: count structures of the size that check_domaininfo measured.
        found = self._libxc.xc_domain_getinfolist(self._xch, first, count, rows.ctypes.data)
        if found < 0:
            self._status("domains")
            raise errors.ConnectionLostError(f"the list of domains cannot be read: {os.strerror(ctypes.get_errno())}")
        return rows[:found]

    def _domain_info(self, row: np.void) -> DomainInfo:
        flags = DominfFlag(int(row["flags"]) & sum(DominfFlag))
        reason = int(row["flags"]) >> libxc.DOMINF_SHUTDOWN_SHIFT & libxc.DOMINF_SHUTDOWN_MASK
        kind = DomainKind.PV
        if DominfFlag.HVM_GUEST in flags:
            kind = DomainKind.HVM if DominfFlag.HAP in flags else DomainKind.SHADOW
        domid = DomId(int(row["domain"]))
        return DomainInfo(
            domid=domid,
            name=self._names[domid],
            tot_pages=int(row["tot_pages"]),
            shr_pages=int(row["shr_pages"]),
            max_pages=int(row["max_pages"]),
            pause_count=int(DominfFlag.PAUSED in flags),  # Xen tells whether, not how often
            dying=DominfFlag.DYING in flags,
            kind=kind,
            crashed=DominfFlag.SHUTDOWN in flags and reason == libxc.SHUTDOWN_CRASH,
        )

    def _known(self, domid: int) -> DomainInfo | None:
        if not 0 <= domid < _FIRST_RESERVED_DOMID:
            return None
        rows = self._domaininfo(domid, 1)  # the next domain that exists, if this one does not
        return self._domain_info(rows[0]) if len(rows) and int(rows[0]["domain"]) == domid else None

    def domain_info(self, domid: DomId) -> DomainInfo:
        """See the seam. ``pause_count`` is 1 for any number of pauses: Xen does not tell it."""
        info = self._known(domid)
        if info is None:
            raise error_of("domain_info", Status.ESRCH, domid=domid)
        return info

    def select(self, name: str) -> list[DomainInfo]:
        """The domains that a user names: ``all`` (every one but dom0, whatever its kind and state), a domid, or a name.

        :raises NoSuchDomainError: there is none of that domid or name, or a name is that of several.
        """
        domains = self.domains()
        if name == "all":
            return domains
        if name.isascii() and name.isdecimal():
            return [self.domain_info(DomId(int(name)))]
        found = [info for info in domains if info.name == name]
        if len(found) != 1:
            names = ", ".join(f"{info.domid} ({info.name})" for info in domains) or "none"
            which = f"{len(found)} domains are called" if found else "no domain is called"
            raise errors.NoSuchDomainError(f"{which} {name!r}", remedy=f"name one by its domid; there are: {names}")
        return found

    def admit(self, domid: DomId, call: str = "share") -> None:
        """See that a domain's pages may be looked at, and enable sharing on it, as naming it in a call would.

        :raises NoSuchDomainError: :raises DomainDyingError: it is gone, or going.
        :raises RefusedDomainError: dom0, PV, shadow paging, a passed-through device, populate-on-demand pages.
        :raises UnsupportedError: this Xen shares no domain's pages.
        """
        self.need_sharing(call)
        self._look_at(domid, call)
        if (status := self._first(domid, call)) != Status.OK:
            raise self._error(call, status, domid)

    def populated_ranges(self, domid: DomId) -> NDArray[np.int64]:
        """See the seam. Cost: one mapping for BATCH_PAGES gfns up to the highest, or of those that are looked at.

        The address space is 36 bits wide, and Xen has no call that lists what is in it. Gfns are looked at one by one
        up to NEAR_PAGES and four times what the domain has, and as far down from the highest; and what lies between is
        probed in steps. What was not found is counted in ``unseen_pages``. (Xen counts some pages that have no gfn,
        such as the rings of a device model.)

        Looking at a page of a fork fills it from its parent. A domain with populate-on-demand pages left is refused,
        because looking would allocate them, and take the domain down when there is no memory for it.

        :raises RefusedDomainError: PV, dom0, or populate-on-demand. :raises DomainDyingError: it is being destroyed.
        """
        info = self._look_at(domid, "populated_ranges")
        expected = info.tot_pages + info.shr_pages
        present = self._mappings.present
        search = Search(lambda gfns: present(domid, gfns), self.maximum_gfn(domid), expected)
        table = search.ranges()
        self.unseen_pages[domid] = max(expected - search.found_pages, 0)
        if not search.found_pages and self._known(domid) is None:
            raise error_of("populated_ranges", Status.ESRCH, domid=domid)
        return table

    def maximum_gfn(self, domid: DomId) -> int:
        """The highest gfn that was ever populated. (``xc_domain_maximum_gpfn``)

        :raises NoSuchDomainError: no domain has this domid.
        """
        highest = ctypes.c_ulong()
        if self._libxc.xc_domain_maximum_gpfn(self._xch, domid, ctypes.byref(highest)) < 0:
            raise self._error("maximum_gfn", self._status("maximum_gfn"), domid)
        return highest.value

    def _look_at(self, domid: int, call: str) -> DomainInfo:
        # Whether a domain's pages may be mapped at all; a domain that may is remembered.
        info = self._known(domid)
        self._readable.discard(domid)
        if domid == 0:
            raise error_of(call, Status.EPERM, domid=domid)
        if info is None:
            raise error_of(call, Status.ESRCH, domid=domid)
        if info.dying:
            raise self._dying(call, domid)
        if info.kind is DomainKind.PV:
            raise error_of(call, Status.EOPNOTSUPP, domid=domid)
        total, cached, entries = ctypes.c_uint64(), ctypes.c_uint64(), ctypes.c_uint64()
        answer = self._libxc.xc_domain_get_pod_target(
            self._xch, domid, ctypes.byref(total), ctypes.byref(cached), ctypes.byref(entries)
        )
        if answer < 0:
            raise self._error(call, self._status(call), domid)
        if entries.value:
            text = f"{call}: domain {domid} has {entries.value} populate-on-demand pages, which a look would allocate"
            raise errors.RefusedDomainError(
                text,
                reasons=(text,),
                call=call,
                status=Status.EINVAL,
                domid=domid,
                remedy="start it with memory = maxmem, or wait until its balloon driver has run",
            )
        self._readable.add(domid)
        return info

    def backed(self, pages: PageArray) -> NDArray[np.bool_]:
        """See the seam: every populated page of a Xen domain has a frame."""
        return np.ones(len(pages), np.bool_)

    def huge(self, pages: PageArray) -> NDArray[np.bool_]:
        """See the seam: Xen does not tell dom0 which of a domain's pages are parts of superpages."""
        return np.zeros(len(pages), np.bool_)

    def read_range(self, domid: DomId, first: Gfn, count: int, buffer: PageBytes) -> PageBytes:
        """See the seam: a copy in ``buffer``, through one mapping for BATCH_PAGES pages.

        :raises RefusedDomainError: PV, dom0, or populate-on-demand pages.
        """
        if domid not in self._readable:
            self._look_at(domid, "read_range")
        statuses = self._mappings.read(domid, np.arange(first, first + count), buffer)
        if statuses.any():
            if self._known(domid) is None:
                raise error_of("read_range", Status.ESRCH, domid=domid)
            raise error_of("read_range", Status.EINVAL, domid=domid, gfn=first + int(np.flatnonzero(statuses)[0]))
        return buffer[:count]

    def read_pages(self, pages: PageArray, out: PageBytes) -> Statuses:
        """See the seam; one mapping for BATCH_PAGES pages of one domain."""
        return self._by_domain(
            pages, "read_pages", lambda domid, rows: self._mappings.read(domid, pages.gfns[rows], out, rows)
        )

    def _by_domain(self, pages: PageArray, call: str, do: Callable[[int, NDArray[np.intp]], Statuses]) -> Statuses:
        # Something done to the pages of one domain after the other, by mapping them.
        statuses = np.zeros(len(pages), np.int32)
        for domid in np.unique(pages.domids).tolist():
            rows = np.flatnonzero(pages.domids == domid)
            try:
                if domid not in self._readable:
                    self._look_at(domid, call)
            except errors.CallError as error:
                statuses[rows] = error.status
                continue
            found = do(domid, rows)
            odd = (found != Status.OK) & (found != Status.ENOMEM)
            if odd.any():
                # How Linux words a failure to map differs by release; there are two reasons that it can have.
                found[odd] = Status.EINVAL if self._known(domid) else Status.ESRCH
            statuses[rows] = found
        return statuses

    # -- memory sharing, one page ------------------------------------------------------------------------------------

    def control(self, domid: DomId, enable: bool) -> None:
        """See the seam."""
        self.need_sharing("control")
        self._enabled.discard(domid)
        if self._libxc.xc_memshr_control(self._xch, domid, int(enable)) < 0:
            status = self._status("control")
            self._need_vmx("control", status, domid)
            raise self._error("control", status, domid)
        if enable:
            self._enabled.add(domid)

    def nominate_gfn(self, domid: DomId, gfn: Gfn) -> Handle:
        """See the seam."""
        handle = ctypes.c_uint64()
        status = self._first(domid, "nominate_gfn")
        if status == Status.OK:
            answer = self._libxc.xc_memshr_nominate_gfn(self._xch, domid, _wire(gfn), ctypes.byref(handle))
            if answer >= 0:
                self._newest_handle = max(self._newest_handle, handle.value)
                return Handle(handle.value)
            status = self._status("nominate_gfn")
        raise self._error("nominate_gfn", status, domid, gfn)

    def nominate_gref(self, domid: DomId, ref: GrantRef) -> Handle:
        """See the seam."""
        handle = ctypes.c_uint64()
        status = self._first(domid, "nominate_gref")
        if status == Status.OK:
            answer = self._libxc.xc_memshr_nominate_gref(self._xch, domid, ref, ctypes.byref(handle))
            if answer >= 0:
                return Handle(handle.value)
            status = self._status("nominate_gref")
        raise self._error("nominate_gref", status, domid, ref)

    def share_gfns(
        self,
        source_domid: DomId,
        source_gfn: Gfn,
        source_handle: Handle,
        client_domid: DomId,
        client_gfn: Gfn,
        client_handle: Handle,
    ) -> None:
        """See the seam.

        :raises BusyPageError: EBUSY, which is ours and not Xen's: the client's frame has more gfns than its own, and
            it is not certain that they belong to the two domains of the call. Xen 4.17 would crash.
        """
        self._need_first(source_domid, "share_gfns")
        status = self._share(source_domid, source_gfn, source_handle, client_domid, client_gfn, client_handle)
        if status != Status.OK:
            raise self._share_error("share_gfns", status, (source_domid, source_gfn), (client_domid, client_gfn))

    def _share(
        self,
        source_domid: DomId,
        source_gfn: Gfn,
        source_handle: Handle,
        client_domid: DomId,
        client_gfn: Gfn,
        client_handle: Handle,
    ) -> int:
        # A share that Xen survives; its status.
        enabled = self._enabled
        if source_domid not in enabled and (status := self._first(source_domid, "share_gfns")) != Status.OK:
            return status
        source, client = (source_domid, source_gfn), (client_domid, client_gfn)
        if client_domid not in enabled and (done := self._ask_about_client(source, client)) is not None:
            return done
        wire_client = _wire(client_gfn)
        sharers = self._debug(self._xch, client_domid, wire_client)
        if (sharers > 1 or self._forks) and not self._may_give_up(
            source, source_handle, client, client_handle, sharers
        ):
            return Status.EBUSY
        answer = self._share_gfns(
            self._xch, source_domid, _wire(source_gfn), source_handle, client_domid, wire_client, client_handle
        )
        if answer < 0:
            return self._status("share_gfns")
        self._sharers.join(source, source_handle, client, client_handle)
        return Status.OK

    def _ask_about_client(self, source: Page, client: Page) -> int | None:
        # To count a client's sharers would enable sharing on its domain, which a share does not do. So for a domain
        # that was not seen enabled, ask with handles that never exist: Xen looks at the domains first, and then at
        # whether there is anything to do. The answer, if it is one; None if the domain turns out to be enabled.
        answer = self._share_gfns(self._xch, source[0], _wire(source[1]), 0, client[0], _wire(client[1]), 0)
        if answer >= 0:
            return Status.OK
        status = self._status("share_gfns")
        if status not in (Status.S_HANDLE_INVALID, Status.C_HANDLE_INVALID):
            return status
        self._enabled.add(client[0])
        return None

    def sharing_enabled(self, domid: DomId) -> bool | None:
        """Whether memory sharing is enabled on a domain, asked without enabling it; None if nobody can be asked.

        Xen has no such call: another domain, one with sharing enabled, is made to ask. If none is known, an empty
        throw-away domain is made for it, which ``dismiss_asker`` takes away.
        """
        if domid in self._enabled:
            return True
        while asker := next(iter(self._enabled), None) or self._hire_asker():
            status = self._ask_about_client((DomId(asker), Gfn(0)), (domid, Gfn(0)))
            if status is None or status == Status.OK:
                return True
            if (info := self._known(asker)) and not info.dying:
                return False
            self._enabled.discard(asker)
        return None

    def _hire_asker(self) -> int | None:
        # A domain without memory that exists to be named first. It never runs.
        if self._asker is not None or not self._sharing:
            return None
        self._asker = EmptyDomains(self._connection)
        try:
            domid = self._asker.create_empty()
        except errors.BackendError:
            self.dismiss_asker()
            return None
        if self._libxc.xc_memshr_control(self._xch, domid, 1) < 0:
            self._need_vmx("sharing_enabled", self._status("control"), domid)
            return None
        self._enabled.add(domid)
        return domid

    def dismiss_asker(self) -> None:
        """Destroy the domain that ``sharing_enabled`` made, if it made one."""
        asker, self._asker = self._asker, None
        if asker is not None:
            self._enabled.difference_update(asker.domids)
            with asker:
                pass  # leaving it destroys them

    def _may_give_up(self, source: Page, source_handle: int, client: Page, client_handle: int, sharers: int) -> bool:
        # Xen 4.17 dies of a share that gives up a frame which a third domain maps. So a client's frame with several
        # gfns is given up only if each of them is known, by name, to belong to one of the two domains.
        # A fork takes pages from its parent at any moment, so a parent's frames are not given up at all.
        if sharers < 1 or not self._is_version(client, client_handle) or not self._is_version(source, source_handle):
            return True  # Xen will refuse it for that
        if source_handle == client_handle:
            return True  # one frame already: nothing to do
        if self._has_forks(client[0]):
            return False
        if sharers == 1:
            return True
        known = self._sharers.pages(Handle(client_handle)) | {client, (source[0], client[1])}  # range_share: one gfn
        present = [page for page in known if self._is_version(page, client_handle)]
        if len(present) != sharers or any(domid not in (source[0], client[0]) for domid, _ in present):
            return False
        self._sharers.learn(Handle(client_handle), present)
        return True

    def _is_version(self, page: Page, handle: int) -> bool:
        # Whether a page is shared now under this handle. Asked in this order nothing is nominated that was not.
        domid, gfn = page[0], _wire(page[1])
        if self._debug(self._xch, domid, gfn) < 1:
            return False
        present = ctypes.c_uint64()
        answer = self._libxc.xc_memshr_nominate_gfn(self._xch, domid, gfn, ctypes.byref(present))
        return bool(answer >= 0 and present.value == handle)

    def _has_forks(self, domid: int) -> bool:
        if domid not in self._forks.values():
            return False
        self._forget_ended_forks()
        return domid in self._forks.values()

    def _forget_ended_forks(self) -> None:
        self._forks = {child: parent for child, parent in self._forks.items() if self._known(child)}

    def share_grefs(
        self,
        source_domid: DomId,
        source_ref: GrantRef,
        source_handle: Handle,
        client_domid: DomId,
        client_ref: GrantRef,
        client_handle: Handle,
    ) -> None:
        """See the seam. A client's frame with more than one gfn is refused: which they are is not known by reference.

        :raises BusyPageError: EBUSY, ours, as for share_gfns.
        """
        self._need_first(source_domid, "share_grefs")
        status = self._share_grefs(source_domid, source_ref, source_handle, client_domid, client_ref, client_handle)
        if status != Status.OK:
            raise self._share_error("share_grefs", status, (source_domid, source_ref), (client_domid, client_ref))

    def _share_grefs(
        self,
        source_domid: int,
        source_ref: int,
        source_handle: int,
        client_domid: int,
        client_ref: int,
        client_handle: int,
    ) -> int:
        share = self._libxc.xc_memshr_share_grefs
        if share(self._xch, source_domid, source_ref, 0, client_domid, client_ref, 0) >= 0:
            return Status.OK  # one frame already
        status = self._status("share_grefs")
        if status not in (Status.S_HANDLE_INVALID, Status.C_HANDLE_INVALID):
            return status
        self._enabled.add(client_domid)
        sharers = self._libxc.xc_memshr_debug_gref(self._xch, client_domid, client_ref)
        if sharers > 1 or self._has_forks(client_domid):
            return Status.EBUSY
        if share(self._xch, source_domid, source_ref, source_handle, client_domid, client_ref, client_handle) < 0:
            return self._status("share_grefs")
        return Status.OK

    def add_to_physmap(
        self, source_domid: DomId, source_gfn: Gfn, source_handle: Handle, client_domid: DomId, client_gfn: Gfn
    ) -> None:
        """See the seam. A gfn beyond the address width is refused here: Xen would count a page as freed, for good.

        (So it does where the client's page tables find no memory, which nobody can know before.)
        """
        self._need_first(source_domid, "add_to_physmap")
        source, client = (source_domid, source_gfn), (client_domid, client_gfn)
        if not 0 <= client_gfn < 1 << MAX_GFN_BITS:
            raise error_of("add_to_physmap", Status.ENOENT, domid=client_domid, gfn=client_gfn)
        answer = self._libxc.xc_memshr_add_to_physmap(
            *(self._xch, source_domid, _wire(source_gfn), source_handle, client_domid, client_gfn)
        )
        if answer < 0:
            raise self._share_error("add_to_physmap", self._status("add_to_physmap"), source, client)
        self._sharers.plug(source, source_handle, client)

    def range_share(self, source_domid: DomId, client_domid: DomId, first: Gfn, last: Gfn) -> None:
        """See the seam.

        Cost: if any page of the client is shared, a hypercall for each gfn of the range first.

        :raises BusyPageError: EBUSY, ours: a page of the client in the range is on a frame with others, and not on the
            one that the source's page is on. Xen 4.17 may crash; nothing was done.
        """
        self._need_first(source_domid, "range_share")
        if (gfn := self._gfn_not_to_give_up(source_domid, client_domid, first, last)) is not None:
            raise self._third_domain("range_share", (client_domid, Gfn(gfn)))
        if self._libxc.xc_memshr_range_share(self._xch, source_domid, client_domid, first, last) < 0:
            status = self._status("range_share")
            raise self._share_error("range_share", status, (source_domid, first), (client_domid, last))

    def _gfn_not_to_give_up(self, source_domid: int, client_domid: int, first: int, last: int) -> int | None:
        # Xen shares the range gfn by gfn and asks nobody in between; and what one step puts on a frame the next may
        # give up. With every frame of the client its own, or the source's already, no step gives up what others map.
        info = self._known(client_domid)
        if info is None or not info.shr_pages or not self.sharing_enabled(DomId(client_domid)):
            return None
        if self._has_forks(client_domid):
            return first
        for gfn in range(first, min(last, self.maximum_gfn(DomId(client_domid))) + 1):
            if self._debug(self._xch, client_domid, gfn) > 1:
                handle = ctypes.c_uint64()
                self._libxc.xc_memshr_nominate_gfn(self._xch, client_domid, gfn, ctypes.byref(handle))
                if not self._is_version((DomId(source_domid), Gfn(gfn)), handle.value):
                    return gfn
        return None

    def unshare_gfn(self, domid: DomId, gfn: Gfn) -> None:
        """See the seam: the page is mapped writably, and nothing is written."""
        self.need_sharing("unshare_gfn")
        status = self.unshare_gfns(PageArray.of_domain(domid, np.array([gfn], np.int64)))[0]
        if status != Status.OK:
            raise self._error("unshare_gfn", int(status), domid, gfn)

    def debug_gfn(self, domid: DomId, gfn: Gfn) -> int:
        """See the seam. A debug build of Xen writes a line to its console for each."""
        status = self._first(domid, "debug_gfn")
        if status == Status.OK:
            answer = self._debug(self._xch, domid, _wire(gfn))
            if answer >= 0:
                return int(answer)
            status = self._status("debug_gfn")
        raise self._error("debug_gfn", status, domid, gfn)

    def debug_gfns(self, pages: PageArray) -> NDArray[np.int64]:
        """See the seam. Cost: one hypercall a page."""
        self.need_sharing("debug_gfns")
        named = {domid: self._first(domid, "debug_gfns") == Status.OK for domid in np.unique(pages.domids).tolist()}
        debug, xch = self._debug, self._xch
        answers = [
            debug(xch, domid, _wire(gfn)) if named[domid] else 0
            for domid, gfn in zip(pages.domids.tolist(), pages.gfns.tolist(), strict=True)
        ]
        return np.maximum(np.array(answers, np.int64), 0)

    def debug_gref(self, domid: DomId, ref: GrantRef) -> int:
        """See the seam."""
        status = self._first(domid, "debug_gref")
        if status == Status.OK:
            answer = self._libxc.xc_memshr_debug_gref(self._xch, domid, ref)
            if answer >= 0:
                return int(answer)
            status = self._status("debug_gref")
        raise self._error("debug_gref", status, domid, ref)

    def audit(self, patience_s: float = PATIENCE_S) -> AuditReport:
        """See the seam: Xen's own audit with what it said on its console, and a count of every shared page by us.

        :param patience_s: how long our count may take. What was not counted by then is in the report.

        :raises UnsupportedError: this Xen shares no domain's pages.

        Cost: Xen walks every shared frame; we ask about the gfns of the domains that share until all of their shared
        pages are found or the time is up. Xen leaves its audit out of release builds; then ``xen_errors`` is None.
        """
        self.need_sharing("audit")
        try:
            if not self._enabled and not self.counters().used_frames:
                self._hire_asker()  # nothing is shared: can anything be?
            return Auditor(self, self._connection, patience_s).run()
        finally:
            self.dismiss_asker()

    def counters(self) -> Counters:
        """See the seam."""
        self.need_sharing("counters")
        freed = self._libxc.xc_sharing_freed_pages(self._xch)
        used = self._libxc.xc_sharing_used_frames(self._xch)
        if freed < 0 or used < 0:
            self._status("counters")
            raise errors.ConnectionLostError(f"the counters cannot be read: {os.strerror(ctypes.get_errno())}")
        return Counters(freed_pages=freed, used_frames=used)

    # -- memory sharing, many pages ----------------------------------------------------------------------------------

    def nominate_gfns(self, pages: PageArray) -> tuple[Handles, Statuses]:
        """See the seam. Cost: one hypercall a page."""
        self.need_sharing("nominate_gfns")
        count = len(pages)
        handles = np.zeros(count, np.uint64)
        statuses = np.zeros(count, np.int32)
        refused = {domid: self._first(domid, "nominate_gfn") for domid in np.unique(pages.domids).tolist()}
        nominate, xch = self._libxc.xc_memshr_nominate_gfn, self._xch
        handle = ctypes.c_uint64()
        reference = ctypes.byref(handle)
        for row, (domid, gfn) in enumerate(zip(pages.domids.tolist(), pages.gfns.tolist(), strict=True)):
            if refused[domid]:
                statuses[row] = refused[domid]
            elif nominate(xch, domid, _wire(gfn), reference) >= 0:
                handles[row] = handle.value
            else:
                statuses[row] = self._status("nominate_gfn")
        self._tell("nominate_gfns", statuses)
        self._see_frames(pages, handles)
        return handles, statuses

    def _see_frames(self, pages: PageArray, handles: Handles) -> None:
        # Pages that have one handle are on one frame. That is how frames of other processes become known: also those of
        # which only one page was nominated now, if the handle is older than the newest that was seen before.
        order = np.argsort(handles, kind="stable")
        order = order[handles[order] > 0]
        if not len(order):
            return
        ordered = handles[order]
        bounds = alike(ordered)
        old = (ordered[bounds[:-1]] <= self._newest_handle) | (np.diff(bounds) > 1)
        self._newest_handle = max(self._newest_handle, int(ordered[-1]))
        for run in np.flatnonzero(old).tolist():
            rows = order[bounds[run] : bounds[run + 1]]
            places = zip(pages.domids[rows].tolist(), pages.gfns[rows].tolist(), strict=True)
            self._sharers.seen(Handle(int(ordered[bounds[run]])), places)

    def share_gfns_many(
        self, sources: PageArray, source_handles: Handles, clients: PageArray, client_handles: Handles
    ) -> Statuses:
        """See the seam; EBUSY where share_gfns would raise BusyPageError. Cost: two hypercalls a row."""
        self.need_sharing("share_gfns_many")
        rows = zip(
            *(sources.domids.tolist(), sources.gfns.tolist(), source_handles.tolist()),
            *(clients.domids.tolist(), clients.gfns.tolist(), client_handles.tolist()),
            strict=True,
        )
        statuses = np.fromiter((self._share(*row) for row in rows), np.int32, len(sources))
        self._tell("share_gfns_many", statuses)
        return statuses

    def unshare_gfns(self, pages: PageArray) -> Statuses:
        """See the seam. Cost: one writable mapping for BATCH_PAGES pages of one domain."""
        self.need_sharing("unshare_gfns")
        statuses = self._by_domain(
            pages, "unshare_gfn", lambda domid, rows: self._mappings.touch(domid, pages.gfns[rows])
        )
        self._tell("unshare_gfns", statuses)
        return statuses

    # -- events and forks --------------------------------------------------------------------------------------------

    def ring_enable(self, domid: DomId) -> int:
        """See the seam. The domain is paused meanwhile, so that no request comes before its page is initialised."""
        self.need_sharing("ring_enable")
        if not self._known(domid) or domid == 0:
            raise self._error("ring_enable", Status.EINVAL if domid == 0 else Status.ESRCH, domid)
        ring = SharingRing(self._connection, self._mappings, domid)
        self.pause(domid)
        try:
            if ring.gfn and not self._mappings.fits(domid, ring.gfn):
                raise error_of("ring_enable", Status.ENOMEM, domid=domid, gfn=ring.gfn)
            port = ctypes.c_uint32()
            if self._libxc.xc_memshr_ring_enable(self._xch, domid, ctypes.byref(port)) < 0:
                raise self._error("ring_enable", self._status("ring_enable"), domid)
            try:
                ring.initialise()
            except BaseException:
                self._libxc.xc_memshr_ring_disable(self._xch, domid)
                raise
            self._responses[domid] = 0
            return port.value
        finally:
            self.unpause(domid)

    def ring_disable(self, domid: DomId) -> None:
        """See the seam."""
        self.need_sharing("ring_disable")
        if self._libxc.xc_memshr_ring_disable(self._xch, domid) < 0:
            raise self._error("ring_disable", self._status("ring_disable"), domid)
        self._responses.pop(domid, None)

    def ring_requests(self, domid: DomId) -> list[RingRequest]:
        """See the seam.

        :raises RefusedDomainError: EINVAL: the domain has no ring that memshr has enabled.
        :raises UnsupportedError: the ring's entries have a layout that memshr does not know.
        """
        return self._ring(domid, "ring_requests").requests()

    def ring_respond(self, domid: DomId, count: int | None = None) -> None:
        """See the seam.

        :raises RefusedDomainError: EINVAL also: the domain has no ring that memshr has enabled.
        """
        responses = self._ring(domid, "ring_respond").respond(count)
        if domid in self._responses:
            self._responses[domid] = responses

    def _ring(self, domid: int, call: str) -> SharingRing:
        self.need_sharing(call)
        if domid == 0 or not self._known(domid):
            raise self._error(call, Status.EPERM if domid == 0 else Status.ESRCH, domid)
        ring = SharingRing(self._connection, self._mappings, domid)
        if not ring.gfn:
            raise error_of(call, Status.ENODEV, domid=domid)
        return ring

    def domain_resume(self, domid: DomId) -> None:
        """See the seam. The domain is paused meanwhile, so that it cannot change what Xen is going to believe.

        :raises RefusedDomainError: EINVAL also: the domain has no ring that memshr has enabled. Xen is not asked: it
            would take what lies in the page for responses, and print a line for each.
        """
        ring = self._ring(domid, "domain_resume")
        self.pause(domid)
        try:
            ring.check("domain_resume", self._responses.get(domid))
            if self._libxc.xc_memshr_domain_resume(self._xch, domid) < 0:
                raise self._error("domain_resume", self._status("domain_resume"), domid)
        finally:
            self.unpause(domid)

    def fork(self, parent: DomId, child: DomId) -> None:
        """See the seam. While the child lives, no frame of the parent is given up by a share: see share_gfns.

        Xen lets a domain become its own ancestor, and hangs the host at the next access to a hole of it. It does not
        tell who is whose fork. So a child must be empty, unless it is a fork that was made here; and a parent must not
        be, unless it is: an ancestor of the parent always has pages.

        :raises RefusedDomainError: EINVAL also: the child has memory, the parent has none, or they are one domain.
        """
        self._need_first(child, "fork")
        if (reason := self._why_no_fork(parent, child)) is not None:
            raise errors.RefusedDomainError(
                reason, reasons=(reason,), call="fork", status=Status.EINVAL, domid=child, remedy="see docs/xen-host.md"
            )
        if self._libxc.xc_memshr_fork(self._xch, parent, child, False, False) < 0:
            status = self._status("fork")
            about = self._culprit(status, (parent, child))
            if about is None:
                about = parent if status in _REFUSE_ENABLING else child
            raise self._error("fork", status, about)
        self._forks.setdefault(child, parent)
        self._enabled.add(parent)

    def _why_no_fork(self, parent: int, child: int) -> str | None:
        if parent == child:
            return f"fork: domain {child} would be its own ancestor"
        parent_info, child_info = self._known(parent), self._known(child)
        if parent_info is None or child_info is None or parent == 0 or parent_info.dying:
            return None  # Xen refuses it
        if parent_info.kind is not DomainKind.HVM:
            return None
        self._forget_ended_forks()
        if child not in self._forks and child_info.tot_pages + child_info.shr_pages:
            return f"fork: domain {child} has memory of its own, and may be an ancestor of domain {parent}"
        if parent not in self._forks and not parent_info.tot_pages + parent_info.shr_pages:
            return f"fork: domain {parent} has no memory, so there is nothing to fork"
        return None

    def fork_reset(self, child: DomId, *, state: bool = False, memory: bool = False) -> None:
        """See the seam.

        :raises UnsupportedError: Xen up to 4.16 can only reset both.
        """
        has_flags = RELEASES[self._libxc.release].fork_reset_has_flags
        if not has_flags and state != memory:
            raise errors.UnsupportedError(
                f"fork_reset of Xen {self._libxc.release} resets state and memory together",
                remedy="ask for both, or use Xen 4.17",
            )
        status = self._first(child, "fork_reset")
        if status == Status.OK:
            if not has_flags and not state:
                raise self._error("fork_reset", Status.EINVAL, child)
            flags = (state, memory) if has_flags else ()
            if self._libxc.xc_memshr_fork_reset(self._xch, child, *flags) >= 0:
                return
            status = self._status("fork_reset")
        raise self._error("fork_reset", status, child)

    # -- domains -----------------------------------------------------------------------------------------------------

    def pause(self, domid: DomId) -> None:
        """Pause a domain once more. (``xc_domain_pause``) :raises NoSuchDomainError: no domain has this domid."""
        if self._libxc.xc_domain_pause(self._xch, domid) < 0:
            raise self._error("pause", self._status("pause"), domid)

    def unpause(self, domid: DomId) -> None:
        """Take one pause back. (``xc_domain_unpause``)

        :raises NoSuchDomainError: no domain has this domid.
        :raises RefusedDomainError: EINVAL: it is not paused.
        """
        if self._libxc.xc_domain_unpause(self._xch, domid) < 0:
            raise self._error("unpause", self._status("unpause"), domid)

    # -- answers -----------------------------------------------------------------------------------------------------

    def need_sharing(self, call: str) -> None:
        """See that memory sharing is built into this Xen. :raises UnsupportedError: it is not."""
        if not self._sharing:
            raise errors.UnsupportedError(
                f"{call}: this Xen {self.facts.version} was built without memory sharing",
                remedy="build the hypervisor with CONFIG_UNSUPPORTED=y and CONFIG_MEM_SHARING=y (docs/xen-host.md)",
            )

    def _need_vmx(self, call: str, status: int, domid: int) -> None:
        # Xen enables sharing on nothing but Intel's VMX. Of a PV domain it says the same.
        if status == Status.EOPNOTSUPP and (info := self._known(domid)) and domid and info.kind is not DomainKind.PV:
            raise errors.UnsupportedError(
                f"{call}: this Xen {self.facts.version} shares memory only on Intel processors, by their VMX, and this"
                " is none",
                remedy="use such a machine, or a hypervisor without that condition (docs/xen-host.md)",
            )

    def _need_first(self, domid: int, call: str) -> None:
        # Enable the domain that a one-page call names first; what is wrong then is wrong with that one.
        if (status := self._first(domid, call)) != Status.OK:
            raise self._error(call, status, domid)

    def _first(self, domid: int, call: str) -> int:
        # Naming a domain first enables sharing on it. When it cannot be enabled, Xen's memory-sharing hypercall was
        # seen to return without giving back its hold on the domain (mem_sharing_memop in tklengyel/xen 04823bea), so
        # the other call that enables goes first, once for each domain; its answer is the same.
        if domid in self._enabled:
            return Status.OK
        self.need_sharing(call)
        if not 0 < domid < _FIRST_RESERVED_DOMID:
            return Status.OK  # Xen has answers of its own for these, before it enables anything
        if self._libxc.xc_memshr_control(self._xch, domid, 1) < 0:
            status = self._status("control")
            self._need_vmx(call, status, domid)
            return status
        self._enabled.add(domid)
        return Status.OK

    @staticmethod
    def _tell(call: str, statuses: Statuses) -> None:
        # A line for many pages, not for each: a record costs as much as some hypercalls.
        if _log.isEnabledFor(logging.DEBUG):
            _log.debug("%s: %d pages, %d refused", call, len(statuses), int(np.count_nonzero(statuses)))

    def _status(self, call: str) -> int:
        # The status of the call that just failed.
        number = ctypes.get_errno()
        if number in (errno.EBADF, errno.ECHILD) and call not in _HANDLE_CALLS:
            raise errors.ConnectionLostError(f"{call}: the connection to the hypervisor is gone: {os.strerror(number)}")
        if number == errno.EACCES:
            raise errors.PermissionDeniedError(
                f"{call}: the hypervisor refuses this domain",
                remedy="run in dom0; if XSM is on, its policy must allow memory sharing",
            )
        return -number

    def _error(self, call: str, status: int, domid: int, gfn: int | None = None) -> errors.MemshrError:
        # What a status means, after looking at what the status alone does not tell.
        _log.debug("%s: status %d, domain %d, gfn %s", call, int(status), domid, gfn)
        if domid == 0 and status in (Status.EPERM, Status.EINVAL, Status.EOPNOTSUPP):
            known = error_of(call, Status.EPERM, domid=0)
            return errors.RefusedDomainError(
                str(known), reasons=(str(known),), call=call, status=Status(status), domid=0
            )
        info = self._known(domid) if status == Status.EINVAL else None
        if info is not None and info.dying:
            return self._dying(call, domid)
        if status == Status.EPERM:
            return errors.PermissionDeniedError(f"{call}: the hypervisor does not permit it", remedy="run in dom0")
        if status == Status.EINVAL and call in ("pause", "unpause", "control", "domain_resume", "ring_enable"):
            text = f"{call}: domain {domid} is in no state for it"
            return errors.RefusedDomainError(text, reasons=(text,), call=call, status=Status.EINVAL, domid=domid)
        return error_of(call, status, domid=domid, gfn=gfn)

    def _culprit(self, status: int, domids: Sequence[int]) -> int | None:
        # Which of the domains of a call the status is about, as far as they can be told apart.
        for domid in domids:
            info = self._known(domid)
            about: dict[int, bool] = {
                Status.EPERM: domid == 0,
                Status.ESRCH: info is None,
                Status.EINVAL: info is not None and info.dying,
                Status.EOPNOTSUPP: info is not None and info.kind is DomainKind.PV,
                Status.ENODEV: info is not None and info.kind is DomainKind.SHADOW,
            }
            if about.get(status):
                return domid
        return None

    def _share_error(self, call: str, status: int, source: _Place, client: _Place) -> errors.MemshrError:
        if status == Status.EBUSY:
            return self._third_domain(call, client)
        about = self._culprit(status, (source[0], client[0]))
        if about is not None:
            return self._error(call, status, *(source if about == source[0] else client))
        if status == Status.EINVAL:
            if not self.sharing_enabled(client[0]):
                return errors.SharingDisabledError(
                    f"{call}: memory sharing is not enabled on domain {client[0]}",
                    call=call,
                    status=Status.EINVAL,
                    domid=client[0],
                    remedy=f"enable it with control({client[0]}, True)",
                )
            if call == "range_share" and (reason := self._why_no_range((source[0], client[0]), client[1])):
                return errors.RefusedDomainError(
                    f"{call}: {reason}", reasons=(reason,), call=call, status=Status.EINVAL, domid=client[0]
                )
        return self._error(call, status, *(source if status == Status.S_HANDLE_INVALID else client))

    def _why_no_range(self, domids: Sequence[DomId], last: int) -> str:
        # What of the conditions of range_share does not hold; "" if all do by now.
        for domid in domids:
            if (info := self._known(domid)) and not info.pause_count:
                return f"domain {domid} is not paused, and both must be"
        for domid in domids:
            if last > (highest := self.maximum_gfn(domid)):
                return f"gfn {last} is beyond the highest of domain {domid}, {highest}"
        return ""

    @staticmethod
    def _dying(call: str, domid: int) -> errors.DomainDyingError:
        text = f"{call}: domain {domid} is being destroyed"
        return errors.DomainDyingError(text, call=call, status=Status.EINVAL, domid=domid)

    @staticmethod
    def _third_domain(call: str, client: _Place) -> errors.BusyPageError:
        return errors.BusyPageError(
            f"{call}: not issued: the frame of gfn {client[1]} of domain {client[0]} may be mapped by a third domain, "
            "and Xen 4.17 crashes when such a frame is given up",
            call=call,
            status=Status.EBUSY,
            domid=client[0],
            gfn=client[1],
            remedy="make the frame with more sharers the source",
        )


def _wire(gfn: int) -> int:
    return gfn if 0 <= gfn < _NOWHERE else _NOWHERE
