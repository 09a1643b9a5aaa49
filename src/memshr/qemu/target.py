"""One QEMU as the kernel shows it: everything that is asked of the kernel, or of QEMU's monitor, about a guest.

``attachment`` decides what the answers mean. It speaks to this class and to ``agent.AgentLink`` and to nothing else. So
a stand-in for the two (``tests/standin``) plays a kernel in which every call can be made to fail.

Every method raises OSError as the kernel does. A look that fails does not say whether the process is still there. Only
``has_ended`` says that, from the pidfd, which stands for this very process.
"""

from __future__ import annotations

import contextlib
import os
import select
from functools import partial
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import NoSuchDomainError, RefusedDomainError, UnsupportedError
from memshr.procfs import Vmas, count_mappings, process_mappings
from memshr.qemu import agent, control_area, guests, injection, pagemap, syscalls
from memshr.qemu.agent import AgentLink
from memshr.qemu.bounded import Bounded
from memshr.qemu.control_area import ControlArea
from memshr.qemu.guests import GuestProcess, RamRange
from memshr.qemu.identity import identity_of
from memshr.qemu.injection import Injector
from memshr.qemu.mapping_budget import map_count_limit
from memshr.qemu.monitor import Monitor
from memshr.qemu.pagemap import Pagemap
from memshr.runs import edges_at, jumps
from memshr.types import PAGE_SIZE, DomId, PageBytes

DRAIN_DEADLINE_S: Final = 10.0


class Target:
    """One QEMU process, open for looking.

    :raises OSError: it has ended, or we may not look.
    """

    def __init__(self, process: GuestProcess) -> None:
        self.process = process
        self.must_drain = False
        """whether disk requests write into its RAM past the page tables (``drain``); known after ``connect``"""
        with contextlib.ExitStack() as undo:
            self._pidfd = os.pidfd_open(process.pid)
            undo.callback(os.close, self._pidfd)
            self.identity = identity_of(process.pid)
            self._pagemap = Pagemap(process.pid)
            undo.callback(self._pagemap.close)
            self._files = undo.pop_all()
        self._last_mappings: Vmas | None = None
        self._reader = Bounded(f"reading guest {process.name} ({process.pid})")
        self._files.callback(self._reader.close)

    @property
    def pid(self) -> int:
        """Its process, as we number it."""
        return self.process.pid

    def has_ended(self) -> bool:
        """Whether the process has exited, reaped or not, or has become another program."""
        ready = select.poll()
        ready.register(self._pidfd, select.POLLIN)
        return bool(ready.poll(0)) or not self.process.running

    def is_itself(self) -> bool:
        """Whether the process still runs the very program that was looked at."""
        return self.identity.still_holds()

    def close(self) -> None:
        """Close every file."""
        self._files.close()

    # -- looking ---------------------------------------------------------------------------------------------------

    def layout(self) -> list[RamRange]:
        """Where its RAM is. :raises BackendError: QEMU does not tell."""
        with self.process.monitor() as monitor:
            return guests.memory_layout(monitor, self.mappings())

    def entries(self, hvas: NDArray[np.int64]) -> NDArray[np.uint64]:
        """The pagemap entry of the page at each address, shape ``(n,)``."""
        try:
            return self._pagemap.entries(hvas)
        except NoSuchDomainError as error:
            raise ProcessLookupError(str(error)) from error

    def zero_pages(self, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which entries are of the kernel's own zero page."""
        return self._pagemap.zero_pages(entries)

    def huge(self, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which entries are of transparent huge pages."""
        return self._pagemap.huge(entries)

    def mappings(self) -> Vmas:
        """What it has mapped now; the same object as the last time if nothing has changed since."""
        self._last_mappings = process_mappings(self.pid, last=self._last_mappings)
        return self._last_mappings

    def forget_mappings(self) -> None:
        """Have the next ``mappings`` make a new object."""
        self._last_mappings = None

    def mappings_left(self) -> int:
        """How many more mappings it may have."""
        return map_count_limit() - count_mappings(self.pid)

    def flags_at(self, hva: int) -> frozenset[str]:
        """The VmFlags of the mapping at an address."""
        return pagemap.mapping_flags(self.pid, hva)

    def read(self, hvas: NDArray[np.int64], out: PageBytes, rows: NDArray[np.int64]) -> int:
        """Contents of pages, that at ``hvas[i]`` into row ``rows[i]`` of ``out``; returns how many bytes were read."""
        edges = edges_at(jumps(hvas, PAGE_SIZE) | jumps(rows), len(hvas))
        at = edges[:-1]
        pieces = np.empty((2, len(at)), dtype=agent.IOVEC)
        pieces["length"] = np.diff(edges) * PAGE_SIZE
        pieces["base"][0], pieces["base"][1] = out.ctypes.data + rows[at] * PAGE_SIZE, hvas[at]
        read_bytes = 0
        for first in range(0, len(at), syscalls.IOV_MAX):
            local, remote = pieces[:, first : first + syscalls.IOV_MAX]
            got = self._reader.call(partial(syscalls.process_vm_readv, self.pid, local, remote))
            read_bytes += got
            if got != int(remote["length"].sum()):
                break
        return read_bytes

    def split_huge_pages(self, hvas: NDArray[np.int64]) -> None:
        """Split the huge pages at these addresses, by MADV_COLD on a part of each."""
        pieces = np.zeros(len(hvas), dtype=agent.IOVEC)
        pieces["base"] = hvas
        pieces["length"] = PAGE_SIZE
        for start in range(0, len(pieces), syscalls.IOV_MAX):
            some = np.ascontiguousarray(pieces[start : start + syscalls.IOV_MAX])
            syscalls.process_madvise(self._pidfd, some, syscalls.MADV_COLD)

    def ksm_pages(self) -> int:
        """How many of its pages KSM has merged."""
        return pagemap.ksm_pages(self.pid)

    # -- attaching -------------------------------------------------------------------------------------------------

    def has_agent(self) -> bool:
        """Whether some memshr has been at work in it."""
        found = ControlArea.find_all(self.pid)
        for control in found:
            control.close()
        return bool(found)

    def _must_drain(self, monitor: Monitor) -> bool:
        if not guests.has_direct_drives(monitor):
            return False
        try:
            monitor.require_drain()
        except UnsupportedError as error:
            name = f"guest {self.process.name} ({self.pid})"
            raise RefusedDomainError(
                f"{name} is left alone: {error.args[0]}", reasons=[str(error)], remedy=error.remedy
            ) from error
        return True

    def connect(self, layout: list[RamRange], injector: Injector, domid: DomId) -> AgentLink:
        """Find or install the agent, and open a link. From then on ``must_drain`` is known.

        :raises RefusedDomainError: the guest must not be touched; ``reasons`` says why. It also is if it has direct
            drives and its QEMU is not known to let disk requests end.
        :raises ConnectionLostError: QEMU, or its agent, does not answer.
        """
        name = self.process.name
        with self.process.monitor() as monitor:
            mappings = self.mappings()
            reasons = guests.refusals(self.process, monitor, layout, mappings)
            if reasons:
                raise RefusedDomainError(
                    f"guest {name} ({self.pid}) must not be touched: {'; '.join(map(str, reasons))}",
                    reasons=[str(reason) for reason in reasons],
                    domid=domid,
                )
            self.must_drain = self._must_drain(monitor)
            code = mappings.named(control_area.MAPPED_CONTROL.__eq__) & mappings.executable
            places = [f"{place.start:x}-{place.end:x}" for place in mappings.of(code)]
            control = ControlArea.find(self.pid, places) or self._install(monitor, injector)
            return AgentLink.open(self.pid, self._pidfd, name, control, monitor)

    def _install(self, monitor: Monitor, injector: Injector) -> ControlArea:
        control = ControlArea.create()
        try:
            monitor.hand_over(control.file)
            try:
                number = injection.descriptor_number(self.pid, self._pidfd, control.file)
                made = injection.install(self.identity, self.process.name, control, number, injector)
                control.forbidden = sorted(made.forbidden)
            finally:
                monitor.take_back()
        except BaseException:
            control.close()
            raise
        return control

    def drain(self) -> None:
        """Wait until every disk request that is under way has ended; the guest goes on.

        Nothing may be in flight meanwhile: this needs QEMU's main thread, which may itself come to wait for a page.
        """
        with self.process.monitor() as monitor:
            monitor.drain(DRAIN_DEADLINE_S)

    def disconnect(self, link: AgentLink, injector: Injector) -> None:
        """End the link and take the agent out: thread, mappings and descriptors are gone.

        :raises ConnectionLostError: QEMU does not run; the agent stays.
        """
        link.end_agent(self.pid)
        for each in ControlArea.find_all(self.pid):  # of memshrs that died while they put one in
            if each.thread_lives(self.pid):
                with self.process.monitor() as monitor:
                    AgentLink.open(self.pid, self._pidfd, self.process.name, each, monitor).end_agent(self.pid)
            else:
                each.close()
        for each in ControlArea.find_all(self.pid):
            try:
                injection.uninstall(self.identity, self.process.name, each, injector)
            finally:
                each.close()
