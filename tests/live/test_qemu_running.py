"""Sharing the pages of guests that run: they go on, every byte right, and the host has memory back.

The fixtures fail a test after which a guest has found a mismatch in its memory, or does not go on.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest

from guests.freestanding import FreestandingGuest
from guests.linux import LinuxGuest
from guests.machine import Machine
from live.plain_policy import share_all
from memshr.qemu.guests import inspect_process
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.types import PAGE_SIZE


@contextmanager
def together(guests: Sequence[Machine]) -> Iterator[QemuHypervisor]:
    """Guests in one trust group; at the end they are as before."""
    processes = [process for guest in guests if (process := inspect_process(guest.pid)) is not None]
    with QemuHypervisor(processes, groups={"all": range(1, len(processes) + 1)}) as hypervisor:
        try:
            yield hypervisor
        finally:
            for domain in hypervisor.domains():
                hypervisor.detach(domain.domid)


def proportional_kib(guest: Machine) -> int:
    """Memory of a process by the kernel's own count, shared pages divided by their readers."""
    rollup = Path(f"/proc/{guest.pid}/smaps_rollup").read_text()
    return next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:"))


def test_linux_guests_share_and_notice_nothing(guest_pair: tuple[LinuxGuest, LinuxGuest]) -> None:
    before = sum(map(proportional_kib, guest_pair))
    with together(guest_pair) as hypervisor:
        done = share_all(hypervisor)
        freed_kib = (done.released + hypervisor.counters().freed_pages) * PAGE_SIZE // 1024
        gained = before - sum(map(proportional_kib, guest_pair))
        assert done.shared > 2000, done
        assert gained > 0.6 * freed_kib, (done, freed_kib, gained)
        assert hypervisor.audit().clean
        for guest in guest_pair:
            guest.wait_rounds(1, ("files", "checker"))
        assert hypervisor.audit().clean
        hypervisor.fold_back()
        again = share_all(hypervisor)
        assert again.looked_at > 0
        assert hypervisor.audit().clean


def test_drives_that_write_past_the_page_tables(drive_pair: dict[str, LinuxGuest]) -> None:
    with together(list(drive_pair.values())) as hypervisor:
        for _ in range(3):
            assert share_all(hypervisor).shared > 0
            hypervisor.fold_back()
        assert hypervisor.audit().clean


@pytest.mark.usefixtures("kvm")
def test_guests_under_kvm(kvm_pair: tuple[FreestandingGuest, FreestandingGuest]) -> None:
    with together(kvm_pair) as hypervisor:
        assert share_all(hypervisor).shared > 500
        for guest in kvm_pair:
            guest.wait_rounds(1)
        assert share_all(hypervisor).looked_at > 0
        assert hypervisor.audit().clean
