"""Which guests memshr touches, which it leaves alone and why, and what it leaves behind."""

import ctypes
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from guests.machine import Machine
from guests.peculiar import PECULIARITIES, ram_mapping
from guests.qtest import QtestGuest
from live.parts import needed_parts
from live.qemu_host import QtestHost, booted, process_of
from memshr.errors import BackendError, NoSuchDomainError, RefusedDomainError
from memshr.qemu.guests import (
    GuestProcess,
    find_guests,
    inspect_process,
    memory_layout,
    refusals,
    select_guests,
    status_refusals,
)
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.qemu.monitor import Monitor
from memshr.qemu.status import status_of
from memshr.types import PAGE_SIZE, DomId, Gfn, PageArray

CLONE_NEWPID = 0x20000000
"""sched.h"""

REFUSED = {
    "shared-ram": "shared memory",
    "memfd": "shared memory",
    "private-memfd": "mapped file",
    "private-file": "mapped file",
    "huge-pages": "hugetlbfs",
    "mem-lock": "locked",
    "virtio-mem": "virtio-mem",
    "free-page-reporting": "reports free pages",
    "incoming": "migrated",
    "outgoing": "migrated",
    "background-snapshot": "migrated",
}


def attached_to(machine: Machine) -> QemuHypervisor:
    """The mechanism on one guest, not attached yet."""
    process = inspect_process(machine.pid)
    assert process is not None
    return QemuHypervisor([process])


@pytest.mark.parametrize("kind", REFUSED)
def test_guest_is_refused_with_reason_and_remedy(kind: str) -> None:
    with needed_parts(), PECULIARITIES[kind].started(f"refused-{kind}") as machine:
        assert PECULIARITIES[kind].in_effect(machine)
        with attached_to(machine) as hypervisor, pytest.raises(RefusedDomainError) as caught:
            hypervisor.control(DomId(1), True)
        assert any(REFUSED[kind] in reason and "; " in reason for reason in caught.value.reasons), caught.value.reasons
        assert "memshr" not in Path(f"/proc/{machine.pid}/maps").read_text(), "a refused guest was touched"
        assert machine.alive


@pytest.mark.parametrize("kind", sorted(set(PECULIARITIES) - set(REFUSED)))
def test_guest_is_shared_and_left_as_it_was(kind: str) -> None:
    """Share two pages inside the guest, see that its flags come back, and that nothing is left after detach."""
    with needed_parts(), PECULIARITIES[kind].started(f"shared-{kind}") as machine:
        flags = ram_mapping(machine)["VmFlags"].split()
        descriptors = _count(f"/proc/{machine.pid}/fd")
        threads = _count(f"/proc/{machine.pid}/task")
        with attached_to(machine) as hypervisor:
            pages = PageArray.of_domain(DomId(1), np.array([0x1000, 0x1001], np.int64))
            handles, statuses = hypervisor.nominate_gfns(pages)
            if statuses.any():
                hypervisor.control(DomId(1), True)  # says why
            assert not hypervisor.share_gfns_many(pages[:1], handles[:1], pages[1:], handles[1:]).any()
            assert hypervisor.counters().freed_pages == 1
            for advice in ("dd", "dc"):
                assert _frame_mapping_has(machine, advice) == (advice in flags), advice
            assert not _frame_mapping_has(machine, "mg"), "KSM must not touch what may be nominated"
            assert "mg" not in ram_mapping(machine)["VmFlags"].split()
            hypervisor.detach(DomId(1))
            assert machine.execute("query-status")["status"] in {"running", "paused", "prelaunch"}
        maps = Path(f"/proc/{machine.pid}/maps").read_text()
        assert "memshr" not in maps
        assert _count(f"/proc/{machine.pid}/task") <= threads
        machine.wait(lambda: _count(f"/proc/{machine.pid}/fd") <= descriptors, 10, "descriptors are closed")
        assert set(ram_mapping(machine)["VmFlags"].split()) - {"nh", "hg", "sd"} == set(flags) - {"nh", "hg", "sd"}
        assert machine.alive


def _count(folder: str) -> int:
    return len(list(Path(folder).iterdir()))


def _frame_mapping_has(machine: Machine, flag: str) -> bool:
    inside = False
    for line in Path(f"/proc/{machine.pid}/smaps").read_text().splitlines():
        if "-" in line.split(" ")[0]:
            inside = "memfd:memshr-pool:" in line
        elif inside and line.startswith("VmFlags:"):
            return flag in line.split()
    raise AssertionError("no mapping of a pool")


def test_reasons_that_only_text_can_show() -> None:
    """Pinned memory and shadow stacks cannot be had on the test machines: the text of /proc/PID/status is made up."""
    assert status_refusals("VmLck:\t       0 kB\nVmPin:\t       0 kB\n") == []
    assert "pinned" in str(status_refusals("VmLck:\t       0 kB\nVmPin:\t    4096 kB\n")[0])
    assert "shadow stack" in str(status_refusals("x86_Thread_features:\tshstk wrss\n")[0])


def test_guests_are_found_by_name_and_pid(qemu: Path) -> None:
    first, second = (f"found-{number}-{os.getpid()}" for number in (1, 2))  # nobody else's guest is called so
    with booted(qemu, first, second) as guests:
        assert {guest.pid for guest in guests} <= {process.pid for process in find_guests()}
        assert [process.pid for process in select_guests(second)] == [guests[1].pid]
        assert [process.name for process in select_guests(str(guests[0].pid))] == [first]
        given = select_guests(f"{first}@{guests[0].qmp_path}")[0]
        with given.monitor() as monitor:
            assert monitor.execute("query-name") == {"name": first}
        with pytest.raises(NoSuchDomainError, match=first):
            select_guests(f"not-{first}")


def test_layout_goes_round_the_hole_below_4_gib(qemu: Path) -> None:
    with booted(qemu, "large", memory_mib=4096) as (guest,):
        with process_of(guest).monitor() as monitor:
            layout = memory_layout(monitor, process_of(guest).mappings())
            assert refusals(process_of(guest), monitor, layout) == ()
        assert sum(ram.pages for ram in layout) * PAGE_SIZE >= (4096 << 20) - (1 << 20)
        high = Gfn(0x100000 + 5)
        guest.write(high * PAGE_SIZE, b"beyond the hole")
        with QemuHypervisor([process_of(guest)]) as hypervisor:
            buffer = np.empty((4, PAGE_SIZE), np.uint8)
            assert bytes(hypervisor.read_range(DomId(1), Gfn(high - 1), 3, buffer)[1, :15]) == b"beyond the hole"
            pages = PageArray.of_domain(DomId(1), np.array([0x100, high, 0xDFFFF], np.int64))
            assert hypervisor.backed(pages).tolist() == [False, True, False]
            assert hypervisor.read_pages(pages, buffer).tolist()[:2] == [0, 0]
            assert hypervisor.read_pages(pages, buffer)[2] < 0


def test_second_memshr_is_told_who_is_at_work(qemu: Path) -> None:
    with booted(qemu, "busy-1", "busy-2") as guests, QtestHost(guests):
        with (
            pytest.raises(RefusedDomainError, match=f"process {os.getpid()} "),
            QemuHypervisor([process_of(guests[0])]) as second,
        ):
            second.control(DomId(1), True)
        program = (
            "import sys; from memshr.qemu.guests import inspect_process as i; "
            "from memshr.qemu.hypervisor import QemuHypervisor as Q; Q([i(int(sys.argv[1]))]).control(1, True)"
        )
        done = subprocess.run(
            [sys.executable, "-c", program, str(guests[0].pid)], capture_output=True, text=True, check=False
        )
        assert done.returncode != 0
        assert f"process {os.getpid()} " in done.stderr


def test_agent_is_scheduled_before_the_guest(qemu: Path) -> None:
    with booted(qemu, "urgent") as (guest,), QtestHost([guest]):
        threads = [int(task.name) for task in Path(f"/proc/{guest.pid}/task").iterdir()]
        nice = [os.getpriority(os.PRIO_PROCESS, thread) for thread in threads]
        assert sorted(nice) == [-20, *[0] * (len(threads) - 1)]


def test_qemu_in_a_pid_namespace_of_its_own(qemu: Path) -> None:
    """As in a container: QEMU's threads have other numbers there than the host knows them by."""

    def boot() -> QtestGuest:
        # Of a thread only the children to come are in the new namespace (unshare(2), CLONE_NEWPID).
        if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWPID):
            raise OSError(ctypes.get_errno(), "unshare")
        return QtestGuest("contained", qemu).boot()

    with ThreadPoolExecutor(1) as outside:  # which lives as long as the guest: it is the guest's parent
        guest = outside.submit(boot).result()
        try:
            assert Path(f"/proc/{guest.pid}/status").read_text().split("NSpid:")[1].split()[:2][1] == "1"
            threads_before = threads_of(guest)
            for round_ in (1, 2):
                guest.write(0x400 * PAGE_SIZE, bytes([round_]) * 2 * PAGE_SIZE)
                with QemuHypervisor([process_of(guest)]) as hypervisor:
                    pages = PageArray.of_domain(DomId(1), np.array([0x400, 0x401]))
                    handles, _ = hypervisor.nominate_gfns(pages)
                    assert not hypervisor.share_gfns_many(pages[:1], handles[:1], pages[1:], handles[1:]).any()
                assert threads_of(guest) == threads_before + 1, "one agent, however often"
            with QemuHypervisor([process_of(guest)]) as hypervisor:
                hypervisor.detach(DomId(1))
            assert threads_of(guest) == threads_before
            assert "memfd:memshr" not in Path(f"/proc/{guest.pid}/maps").read_text()
            assert guest.read(0x400 * PAGE_SIZE, 1) == bytes([2])
        finally:
            guest.kill()


def threads_of(guest: QtestGuest) -> int:
    """How many threads QEMU has."""
    return len(list(Path(f"/proc/{guest.pid}/task").iterdir()))


def test_guest_without_qmp_says_how_to_give_it_one(qemu: Path) -> None:
    with booted(qemu, "mute") as (guest,):
        process = process_of(guest)
        without = replace(process, qmp_path=None)
        assert "-qmp unix:" in str(status_of(without).refusals[-1])
        with pytest.raises(BackendError, match=r"mute .*: it has no QMP socket; start QEMU with -qmp unix:"):
            without.monitor()


def test_seccomp_filter_that_forbids_a_call_of_the_agent(qemu: Path, tmp_path: Path) -> None:
    """A real filter, put on by a program that then becomes QEMU: everything is allowed but process_vm_readv."""
    wrapper = tmp_path / "qemu-with-filter"
    wrapper.write_text(f"#!{sys.executable}\n" + FILTERING.format(qemu=os.fspath(qemu)))
    wrapper.chmod(0o755)
    with booted(wrapper, "filtered") as (guest,):
        refused = pytest.raises(RefusedDomainError, match="seccomp filter forbids system call 310")
        with QemuHypervisor([process_of(guest)]) as hypervisor, refused:
            hypervisor.control(DomId(1), True)
        assert "memshr" not in Path(f"/proc/{guest.pid}/maps").read_text()


FILTERING = """
import ctypes, os, struct, sys
program = struct.pack("<" + "HBBI" * 4, 0x20, 0, 0, 0, 0x15, 0, 1, 310, 0x06, 0, 0, 0x00050001, 0x06, 0, 0, 0x7FFF0000)
buffer = ctypes.create_string_buffer(program, len(program))
header = struct.pack("<HxxxxxxQ", 4, ctypes.addressof(buffer))
libc = ctypes.CDLL(None)
assert libc.prctl(38, 1, 0, 0, 0) == 0
assert libc.prctl(22, 2, ctypes.c_char_p(header), 0, 0) == 0
os.execv({qemu!r}, [{qemu!r}, *sys.argv[1:]])
"""


def test_a_guest_is_asked_once_when_it_is_opened_and_once_when_it_is_attached(
    qemu: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """QEMU serves one client of a monitor at a time: each connection keeps others waiting."""
    connections: list[str] = []
    monitor = GuestProcess.monitor

    def counted(process: GuestProcess) -> Monitor:
        connections.append(process.name)
        return monitor(process)

    with booted(qemu, "asked") as (guest,):
        process = process_of(guest)
        monkeypatch.setattr(GuestProcess, "monitor", counted)
        with QemuHypervisor([process]) as hypervisor:
            assert connections == ["asked"]
            hypervisor.control(DomId(1), True)
            assert connections == ["asked"] * 2


def test_status_tells_what_the_kernel_knows(qemu: Path) -> None:
    """Also when no memshr is at work."""
    with booted(qemu, "status-1", "status-2") as guests:
        for guest in guests:
            guest.fill(0x1000 * PAGE_SIZE, 8 * PAGE_SIZE, 9)
        with QtestHost(guests) as host:
            pages = PageArray.of_domain(DomId(1), np.arange(0x1000, 0x1008))
            handles, _ = host.hypervisor.nominate_gfns(pages)
            one = PageArray.of_domain(DomId(1), np.full(7, 0x1000))
            shared = host.hypervisor.share_gfns_many(one, np.repeat(handles[:1], 7), pages[1:], handles[1:])
            assert not shared.any()
            assert len(set(host.hypervisor.frames_of(pages).tolist())) == 1
            figures = host.hypervisor.guest_figures(DomId(1))
            assert (figures.sharing_pages, figures.copied_pages) == (8, 0)
            assert figures.absent_pages > 15_000
        guests[0].fill(0x1002 * PAGE_SIZE, 3 * PAGE_SIZE, 1)
        first, second = (status_of(process_of(guest)) for guest in guests)
        assert (first.sharing_pages, first.copied_pages, first.groups) == (5, 3, ("all",))
        assert (second.sharing_pages, second.groups) == (0, ())
        assert first.refusals == second.refusals == ()
        assert first.ram_bytes == (64 << 20) - 0x40 * PAGE_SIZE
        with first.process.monitor():
            assert "busy" in str(status_of(first.process).refusals[-1])
