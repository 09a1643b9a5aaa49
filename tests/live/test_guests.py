"""The guests themselves: they come up, find a fault that is put into their memory, and never outlive a test run."""

import contextlib
import os
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from guests.freestanding import FreestandingGuest
from guests.kit import BLOB_BYTES, find_qemu, need_root
from guests.linux import LinuxGuest, drive_arguments
from guests.machine import GuestFailedError, Machine, wait_until
from guests.pages import PAGE_SIZE
from guests.qtest import QtestGuest
from live.parts import needed_parts

DEADLINE_S = 30.0
GIB = 1 << 30
FIRST_WORD_OF_PATTERN_1 = 0x910A2DEC89025CC1
"""what programs/pattern.h makes of it"""


def spoil_pages(machine: Machine, beginning: bytes) -> int:
    """Change one word in the middle of every page of guest RAM that begins so, behind the guest's back.

    :returns: how many pages that were.
    """
    hva = int(machine.hmp("gpa2hva 0").split()[-1], 16)
    with Path(f"/proc/{machine.pid}/mem").open("r+b", buffering=0) as memory:
        memory.seek(hva)
        ram = np.frombuffer(memory.read(machine.memory_mib << 20), np.uint8).reshape(-1, PAGE_SIZE)
        found = np.flatnonzero((ram[:, : len(beginning)] == np.frombuffer(beginning, np.uint8)).all(axis=1))
        for gfn in found.tolist():
            memory.seek(hva + gfn * PAGE_SIZE + PAGE_SIZE // 2)
            memory.write(b"spoiled!")
    return len(found)


def test_checker_times_its_writes(guest_pair: tuple[LinuxGuest, LinuxGuest]) -> None:
    for guest in guest_pair:
        before = guest.checker()
        guest.wait_rounds(2)
        after = guest.checker()
        assert after.writes - before.writes == 256 * (after.round - before.round)
        assert 0 < after.median_ns <= after.p99_ns <= 1.2 * after.longest_ns
        guest.forget_times()
        guest.wait_rounds(2)
        assert guest.checker().writes < 256 * guest.checker().round


def test_command_that_fails_is_an_error(guest_pair: tuple[LinuxGuest, LinuxGuest]) -> None:
    with pytest.raises(GuestFailedError, match=r"status 3 of: echo why; exit 3; why"):
        guest_pair[0].run("echo why; exit 3")


def test_programs_find_what_is_changed_behind_their_back(boot: Callable[..., LinuxGuest]) -> None:
    guest = boot("spoiled", drive_arguments("native")).wait_ready()
    guest.start_files(8)
    guest.start_checker(4096)
    guest.start_reader()
    guest.wait_rounds(1, ("files", "checker", "reader1"))
    assert guest.mismatches() == []
    assert spoil_pages(guest, random.Random(0).randbytes(BLOB_BYTES)[:64]) >= 2
    assert spoil_pages(guest, FIRST_WORD_OF_PATTERN_1.to_bytes(8, "little")) >= 20

    def all_complain() -> bool:
        complaints = "\n".join(guest.mismatches())
        return all(f"MISMATCH {program} " in complaints for program in ("files", "checker", "reader"))

    guest.wait(all_complain, DEADLINE_S, "all three programs complain")


def test_freestanding_guest_finds_what_is_changed_behind_its_back(qemu: Path) -> None:
    with needed_parts(), FreestandingGuest("spoiled", qemu) as guest:
        guest.boot(accelerator="tcg").wait_rounds(3)
        assert guest.mismatches() == 0
        assert spoil_pages(guest, (1).to_bytes(4, "little") * 64) >= 10
        guest.wait(lambda: guest.mismatches() > 0, DEADLINE_S, "a complaint")


def test_kvm_guests_go_on(kvm_pair: tuple[FreestandingGuest, FreestandingGuest]) -> None:
    for guest in kvm_pair:
        assert guest.execute("query-kvm")["enabled"]
        guest.wait_rounds(1)


def test_qtest_guest_holds_what_was_written(qtest_pair: tuple[QtestGuest, QtestGuest]) -> None:
    left, right = qtest_pair
    content = random.Random(1).randbytes(3 * PAGE_SIZE)
    left.write(0x200800, content)
    right.fill(0x200000, PAGE_SIZE, 7)
    assert left.read(0x200800, len(content)) == content
    assert right.read(0x200000, PAGE_SIZE + 1) == b"\7" * PAGE_SIZE + b"\0"


def test_large_guest_has_a_hole_below_4_gib_and_costs_nothing_until_touched(qemu: Path) -> None:
    with QtestGuest("large", qemu, memory_mib=4096).boot() as guest:
        below = guest.hmp(f"gpa2hva {3 * GIB - PAGE_SIZE:#x}").split()[-1]
        above = guest.hmp(f"gpa2hva {4 * GIB:#x}").split()[-1]
        assert int(above, 16) - int(below, 16) == PAGE_SIZE
        assert "pc.ram" not in guest.hmp(f"gpa2hva {3 * GIB:#x}")
        guest.write(5 * GIB - 8, b"the last")
        assert guest.read(5 * GIB - 8, 8) == b"the last"
        resident_bytes = int(Path(f"/proc/{guest.pid}/statm").read_text().split()[1]) * PAGE_SIZE
        assert resident_bytes < GIB // 4


def open_files(pid: int) -> set[str]:
    """What a process has open; it may close some while we look."""
    found = set()
    for file in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(FileNotFoundError):
            found.add(str(file.readlink()))
    return found


def test_drives_are_read_past_the_page_cache(drive_pair: dict[str, LinuxGuest]) -> None:
    for guest in drive_pair.values():
        (drive,) = guest.execute("query-block")
        assert drive["inserted"]["cache"]["direct"]
    native, io_uring = drive_pair["native"].pid, drive_pair["io_uring"].pid
    assert "/[aio]" in Path(f"/proc/{native}/maps").read_text()
    assert "anon_inode:[io_uring]" in open_files(io_uring)


@pytest.mark.parametrize("user", [None, "nobody"])
def test_guest_ends_with_the_process_that_started_it(user: str | None) -> None:
    with needed_parts():
        find_qemu()
        if user is not None:
            need_root("a guest of another user")
    program = f"""
import signal
from guests.kit import find_qemu
from guests.machine import Machine
machine = Machine("orphan", find_qemu(), memory_mib=16, user={user!r}).start()
print(machine.pid, machine.folder, flush=True)
signal.pause()
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True, env=environment
    ) as parent:
        assert parent.stdout is not None
        pid, folder = parent.stdout.readline().split()
        assert Path(f"/proc/{pid}").exists()
        parent.send_signal(signal.SIGKILL)
    wait_until(lambda: not Path(f"/proc/{pid}").exists(), DEADLINE_S, "QEMU ends")
    for left in Path(folder).iterdir():
        left.unlink()
    Path(folder).rmdir()


def test_qemu_that_refuses_its_options_is_quoted(qemu: Path) -> None:
    with pytest.raises(GuestFailedError, match="no-such-device"), Machine("wrong", qemu, memory_mib=16) as machine:
        machine.start(["-device", "no-such-device"])
