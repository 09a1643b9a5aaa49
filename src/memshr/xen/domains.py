"""Domains that memshr makes itself: they are there to be named in calls that need a second domain, and never run.

They are HVM with hardware-assisted paging, have one vCPU, no devices and no emulation but a local APIC (what a PVH
guest has), stay paused, and are destroyed in the end.
"""

from __future__ import annotations

import ctypes
import os
from types import TracebackType
from typing import Self

import numpy as np

from memshr.errors import BackendError
from memshr.types import PAGE_SIZE, DomId
from memshr.xen import libxc
from memshr.xen.connection import Connection
from memshr.xen.libxc import CreateFlag, Release

_PAGE_TABLE_MIB = 4
_MAX_PAGES = 64


class EmptyDomains:
    """Makes domains and destroys them all when it is left.

    :param connection: as the hypervisor uses it.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self.domids: list[DomId] = []

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for domid in reversed(self.domids):  # a fork before its parent, which stays dying until then
            self._connection.libxc.xc_domain_destroy(self._connection.xch, domid)
        self.domids.clear()

    def create_empty(self, max_pages: int = _MAX_PAGES, *, hap: bool = True) -> DomId:
        """A new domain, paused, without memory.

        :param max_pages: how many frames it may own.
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
        self.limit(domid, max_pages)
        return domid

    def limit(self, domid: DomId, max_pages: int) -> None:
        """Set how many frames a domain may own."""
        answer = self._connection.libxc.xc_domain_setmaxmem(self._connection.xch, domid, max_pages * PAGE_SIZE // 1024)
        self._step("given its limit", answer)

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
