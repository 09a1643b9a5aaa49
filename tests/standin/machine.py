"""A host with guests on it, played: what a ``QemuHypervisor`` needs of both, and what the contract kit needs."""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from typing import Self

import numpy as np
from numpy.typing import NDArray

from memshr.errors import RefusedDomainError
from memshr.procfs import Vma, Vmas
from memshr.qemu import control_area, pool, syscalls
from memshr.qemu.control_area import CONTROL_BYTES, OFFER_AT, PID_AT, ControlArea
from memshr.qemu.guests import GuestProcess, RamRange
from memshr.qemu.host import Host, Lock
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.qemu.injection import Injector
from memshr.qemu.pool import FramePool
from memshr.qemu.target import Target
from memshr.types import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn, PageBytes
from standin.agent import AgentThread, StandInLink
from standin.calls import Calls
from standin.kernel import PRESENT, ZERO_FRAME, Area, Kernel, Memory, Writer, bits_of_all

FIRST_PID = 5_000_001
"""more than any process can have (PID_MAX_LIMIT): whatever asks the real /proc finds nothing"""
_LOW_PAGES = 0xA0
_HIGH_GFN = 0x100
_LOW_HVA, _HIGH_HVA = 0x7E00_0000_0000, 0x7E00_4000_0000
_CODE = 0x7F00_0000_0000


class StandInGuest:
    """A QEMU with two ranges of RAM: below the old graphics memory, and from 1 MiB on.

    :param pages: how many pages of RAM there are from 1 MiB on.
    """

    def __init__(self, machine: StandInMachine, pid: int, name: str, pages: int) -> None:
        self.machine = machine
        self.process = GuestProcess(pid, 1, name, (), None, libvirt=False, uid=0)
        self.memory = Memory(machine.kernel)
        self.layout = [
            RamRange(Gfn(0), _LOW_PAGES, _LOW_HVA, "low"),
            RamRange(Gfn(_HIGH_GFN), pages, _HIGH_HVA, "high"),
        ]
        self.memory.areas = [Area(ram.hva >> PAGE_SHIFT, ram.end_hva >> PAGE_SHIFT) for ram in self.layout]
        self.agent: AgentThread | None = None
        self.control_file = -1
        self.has_direct_drives = False
        self.has_ended = False
        self.ksm_pages = 0
        self.reads_short = False
        """the next read of its memory is a short one"""
        self.deadline_s = 10.0

    def hva(self, gfn: int) -> int:
        """Where QEMU has a page."""
        for ram in self.layout:
            if ram.first_gfn <= gfn < ram.first_gfn + ram.pages:
                return ram.hva + (gfn - ram.first_gfn << PAGE_SHIFT)
        raise KeyError(gfn)

    def begin_write(self, gfn: int, data: bytes, offset: int = 0) -> Writer:
        """The guest writes; the write waits if the page is protected."""
        return self.memory.write(self.hva(gfn) + offset, data)

    def write(self, gfn: int, data: bytes, offset: int = 0) -> None:
        """The guest writes, and the write is let go."""
        self.machine.await_writers([self.begin_write(gfn, data, offset)])

    def read(self, gfn: int) -> bytes:
        """What the guest sees."""
        return self.memory.read(self.hva(gfn), PAGE_SIZE)

    def end(self) -> None:
        """The process ends."""
        self.has_ended = True
        if self.agent is not None and not self.agent.ended:
            self.agent.hang_up()
        self.memory.areas, self.memory.entries = [], {}

    def forget_agent(self) -> None:
        """The mapping of the control area is gone."""
        self.agent = None
        if self.control_file >= 0:
            os.close(self.control_file)
            self.control_file = -1


class StandInControl(ControlArea):
    """A real control area, whose thread is a stand-in."""

    guest: StandInGuest

    def thread_lives(self, pid: int) -> bool:
        return self.guest.agent is not None and not self.guest.agent.ended


class StandInTarget(Target):
    """A stand-in guest, as memshr sees it."""

    def __init__(self, guest: StandInGuest) -> None:
        self.process = guest.process
        self.must_drain = False
        self._guest = guest
        self._calls = guest.machine.calls.of(guest.process.name)
        self._last: Vmas | None = None

    def has_ended(self) -> bool:
        return self._guest.has_ended

    def is_itself(self) -> bool:
        return self._calls("target.is_itself", lambda: not self._guest.has_ended)

    def close(self) -> None:
        pass

    def layout(self) -> list[RamRange]:
        return self._calls("target.layout", lambda: list(self._guest.layout))

    def entries(self, hvas: NDArray[np.int64]) -> NDArray[np.uint64]:
        def look() -> NDArray[np.uint64]:
            if self._guest.has_ended:
                raise ProcessLookupError
            return np.fromiter(bits_of_all(self._guest.memory, hvas), dtype=np.uint64, count=len(hvas))

        return self._calls("target.entries", look)

    def zero_pages(self, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
        there = (entries & np.uint64(PRESENT)) != 0
        zero = (entries & np.uint64((1 << 55) - 1)) == ZERO_FRAME
        return self._calls("target.zero_pages", lambda: np.asarray(there & zero))

    def huge(self, entries: NDArray[np.uint64]) -> NDArray[np.bool_]:
        return self._calls("target.huge", lambda: np.zeros(len(entries), dtype=np.bool_))

    def mappings(self) -> Vmas:
        def look() -> Vmas:
            maps = self._guest.memory.maps()
            if self._last is None or self._last.maps != maps:
                self._last = Vmas(maps)
            return self._last

        return self._calls("target.mappings", look)

    def forget_mappings(self) -> None:
        self._last = None

    def mappings_left(self) -> int:
        memory = self._guest.memory
        return self._calls("target.mappings_left", lambda: memory.kernel.most_mappings - len(memory.areas))

    def flags_at(self, hva: int) -> frozenset[str]:
        def look() -> frozenset[str]:
            area = self._guest.memory.area_at(hva >> PAGE_SHIFT)
            return area.flags if area is not None else frozenset()

        return self._calls("target.flags_at", look)

    def read(self, hvas: NDArray[np.int64], out: PageBytes, rows: NDArray[np.int64]) -> int:
        def some(count: int) -> int:
            for hva, row in zip(hvas[:count].tolist(), rows[:count].tolist(), strict=True):
                out[row] = np.frombuffer(self._guest.memory.read(hva, PAGE_SIZE), dtype=np.uint8)
            return count * PAGE_SIZE

        if self._guest.reads_short:
            self._guest.reads_short = False
            return some(len(hvas) - 1)
        return self._calls("target.read", lambda: some(len(hvas)), lambda: some(len(hvas) // 2))

    def split_huge_pages(self, hvas: NDArray[np.int64]) -> None:
        self._calls("target.split_huge_pages", lambda: None)

    def ksm_pages(self) -> int:
        return self._calls("target.ksm_pages", lambda: self._guest.ksm_pages)

    def has_agent(self) -> bool:
        return self._calls("target.has_agent", lambda: self._guest.control_file >= 0)

    def drain(self) -> None:
        self._calls("target.drain", lambda: None)

    def connect(self, layout: list[RamRange], injector: Injector, domid: DomId) -> StandInLink:
        return self._calls("target.connect", self._connect)

    def _connect(self) -> StandInLink:
        guest = self._guest
        self.must_drain = guest.has_direct_drives
        if guest.agent is not None:
            guest.agent.go_on()
        if guest.agent is not None and not guest.agent.ended:
            raise RefusedDomainError("another memshr is at work", reasons=["another memshr is at work on it"])
        if guest.control_file < 0:
            guest.control_file = os.memfd_create("agent")
            os.ftruncate(guest.control_file, CONTROL_BYTES)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        control, mine = (StandInControl(os.dup(guest.control_file), _CODE) for _ in range(2))
        control.guest = guest
        control.slots = [theirs.fileno(), *[-1] * (control_area.SLOTS - 1)]
        control.put(OFFER_AT, "<i", -1)
        control.put(PID_AT, "<i", guest.process.pid)
        guest.agent = AgentThread(guest.memory, mine, theirs, guest.process.pid, self._calls)
        link = StandInLink(control, ours, guest.agent, self._calls)
        link.deadline_s = guest.deadline_s
        made = guest.memory.open_userfaultfd()
        control.set_slot(1, made)
        link._kept(made)
        link.uffd = os.dup(made)
        link.features = syscalls.UFFD_FEATURE_PAGEFAULT_FLAG_WP | syscalls.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
        if guest.machine.kernel.protects_what_is_not_there:
            link.features |= syscalls.UFFD_FEATURE_WP_UNPOPULATED
        return link

    def disconnect(self, link: object, injector: Injector) -> None:
        assert isinstance(link, StandInLink)
        link.end_agent(self.pid)
        self._calls("target.disconnect", self._guest.forget_agent)


class StandInPool(FramePool):
    """A real frame pool without root's mark."""

    calls: Calls

    def add(self, pages: PageBytes, policy: tuple[int, bytes] = (0, b"")) -> int:
        return self.calls("pool.add", lambda: super(StandInPool, self).add(pages, policy))

    def punch(self, frames: NDArray[np.int64]) -> None:
        self.calls("pool.punch", lambda: super(StandInPool, self).punch(frames))

    def read(self, frames: NDArray[np.int64], out: PageBytes) -> None:
        self.calls("pool.read", lambda: super(StandInPool, self).read(frames, out))


class _Held:
    """The lock of a guest."""

    def __init__(self, held: set[int], pid: int) -> None:
        self._held, self._pid = held, pid

    def release(self) -> None:
        """Give it up."""
        self._held.discard(self._pid)


class StandInMachine(Host):
    """A host with some guests. A context manager.

    :param names: of the guests.
    :param pages: how many pages of RAM each has from 1 MiB on.
    """

    def __init__(self, *names: str, pages: int = 64) -> None:
        self.kernel = Kernel()
        self.calls = Calls()
        self.free_bytes = 1 << 40
        self.locked: set[int] = set()
        self._pool_files: dict[tuple[int, int], tuple[str, int, str]] = {}
        self.guests = [StandInGuest(self, FIRST_PID + at, name, pages) for at, name in enumerate(names)]

    def hypervisor(self, groups: Mapping[str, Collection[int]] | None = None) -> QemuHypervisor:
        """A new memshr that has all guests, in one trust group unless ``groups`` says otherwise."""
        everybody = {"all": range(1, len(self.guests) + 1)}
        processes = [guest.process for guest in self.guests]
        return QemuHypervisor(
            processes, groups=everybody if groups is None else groups, reserve_bytes=1 << 20, host=self
        )

    def await_writers(self, writers: Sequence[Writer], deadline_s: float = 10.0) -> None:
        """Wait until all have written."""
        end_s = time.monotonic() + deadline_s
        while not all(writer.done for writer in writers):
            assert time.monotonic() < end_s, (
                f"writers wait: {[f'{each.address:#x}' for each in writers if not each.done]}"
            )
            for guest in self.guests:
                if guest.agent is not None:
                    guest.agent.go_on()
                guest.memory.settle()
            time.sleep(0)

    # -- as memshr sees it ---------------------------------------------------------------------------------------------

    def _guest(self, pid: int) -> StandInGuest:
        return self.guests[pid - FIRST_PID]

    def target(self, process: GuestProcess) -> Target:
        return StandInTarget(self._guest(process.pid))

    def lock(self, process: GuestProcess) -> Lock:
        def locked() -> Lock:
            if process.pid in self.locked:
                raise RefusedDomainError("another memshr is at work", reasons=["it is locked"])
            self.locked.add(process.pid)
            return _Held(self.locked, process.pid)

        return self.calls("host.lock", locked)

    def available_bytes(self) -> int:
        return self.calls("host.available_bytes", lambda: self.free_bytes)

    def create_pool(self, group: str, owner: str = "") -> FramePool:
        return self.calls("host.create_pool", lambda: self._create_pool(group, owner))

    def _create_pool(self, group: str, owner: str) -> FramePool:
        made = os.memfd_create(group)
        status = os.fstat(made)
        file = status.st_dev, status.st_ino
        self._pool_files[file] = group, made, owner
        self.kernel.names[file] = f"/memfd:{pool.NAME_PREFIX}{group} (deleted)"
        return self._open_pool(file)

    def _open_pool(self, file: tuple[int, int]) -> FramePool:
        group, made, owner = self._pool_files[file]
        opened = StandInPool(group, os.open(f"/proc/self/fd/{made}", os.O_RDWR | os.O_CLOEXEC), owner)
        opened.calls = self.calls
        return opened

    def adopt_pool(self, pid: int, mapping: Vma) -> FramePool | None:
        def adopted() -> FramePool | None:
            area = self._guest(pid).memory.area_at(mapping.start >> PAGE_SHIFT)
            if area is None or area.file is None:
                raise FileNotFoundError
            return self._open_pool(area.file) if area.file in self._pool_files else None

        return self.calls("host.adopt_pool", adopted)

    def is_read_by_others(self, pool: FramePool, ours: Collection[int]) -> bool:
        return any(
            area.file == pool.file
            for guest in self.guests
            if guest.process.pid not in ours
            for area in guest.memory.areas
        )

    def close(self) -> None:
        """End all guests."""
        for guest in self.guests:
            guest.end()
            guest.forget_agent()
        for _, file, _ in self._pool_files.values():
            os.close(file)
        self.kernel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class StandInHost:
    """Two guests or more under the mechanism, as the contract kit wants them."""

    def __init__(self, machine: StandInMachine, groups: Mapping[str, Sequence[int]] | None = None) -> None:
        self.machine = machine
        self.hypervisor = machine.hypervisor(groups)
        for domain in self.hypervisor.domains():
            self.hypervisor.control(domain.domid, True)

    @property
    def domids(self) -> tuple[DomId, DomId]:
        """The first two."""
        return DomId(1), DomId(2)

    def gfns(self, domid: DomId) -> Sequence[Gfn]:
        """Sixteen pages: some in a row, some apart, some below 640 KiB."""
        spread = [*range(6), 8, 10, 13, 40, 41, 60, 61, 63]
        return [*(Gfn(_HIGH_GFN + each) for each in spread), Gfn(0x10), Gfn(0x11)]

    def hole(self, domid: DomId) -> Gfn:
        """The old graphics memory, 640 KiB and up."""
        return Gfn(0xC0)

    def write(self, domid: DomId, gfn: Gfn, data: bytes, offset: int = 0) -> None:
        """As the guest would."""
        self.machine.guests[domid - 1].write(gfn, data, offset)

    def read(self, domid: DomId, gfn: Gfn) -> bytes:
        """As the guest would."""
        return self.machine.guests[domid - 1].read(gfn)


@contextlib.contextmanager
def running(machine: StandInMachine) -> Iterator[StandInHost]:
    """All guests under one hypervisor, which is closed at the end."""
    host = StandInHost(machine)
    with host.hypervisor:
        yield host
