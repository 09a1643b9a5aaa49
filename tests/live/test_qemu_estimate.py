"""``memshr estimate`` of running guests: what an exact count says, and nothing done to them."""

import socket
from pathlib import Path

import pytest

from guests.linux import LinuxGuest
from guests.pages import backed_pages, count_pages
from live.qemu_host import booted, process_of
from memshr import estimate
from memshr.errors import ConnectionLostError
from memshr.procfs import ProcessMemory
from memshr.qemu import guests as guests_module

MOST_PAGES_OUTSIDE = 2000

Pair = tuple[LinuxGuest, LinuxGuest]


def test_an_estimate_is_what_an_exact_count_says(guest_pair: Pair) -> None:
    for guest in guest_pair:
        guest.pause()
    try:
        exact = count_pages([backed_pages(guest.pid) for guest in guest_pair])
        found = estimate([f"qemu:{guest.pid}" for guest in guest_pair], groups=["all"], interval_s=0)
    finally:
        for guest in guest_pair:
            guest.resume()
    # The count has QEMU's copies of firmware and tables besides the guests' RAM: small, and most of it zeros.
    outside = exact.total_pages - (found.total_pages - found.absent_pages)
    assert 0 <= outside < MOST_PAGES_OUTSIDE
    saved_pages = found.saved_pages + found.dropped["max_sharers"]
    assert exact.saved_pages - outside <= saved_pages <= exact.saved_pages
    assert exact.zero_pages - outside <= found.zero_pages <= exact.zero_pages
    assert found.inter_pages > 0
    assert found.dropped["volatile"] == 0
    assert [domain.kind for domain in found.domains] == ["qemu", "qemu"]
    assert found.achievable is not None
    assert found.achievable.huge_pages_known


def test_an_estimate_leaves_running_guests_alone(guest_pair: Pair) -> None:
    def threads_and_files(pid: int) -> tuple[int, list[str]]:
        with ProcessMemory(pid) as memory:
            files = sorted({mapping.path for mapping in memory.mappings() if "memshr" in mapping.path})
        return len(list(Path(f"/proc/{pid}/task").iterdir())), files

    before = [threads_and_files(guest.pid) for guest in guest_pair]
    sources = [*(f"qemu:{guest.pid}" for guest in guest_pair), f"pid:{guest_pair[0].pid}"]
    found = estimate(sources, groups=["all"], interval_s=0.2)
    assert found.dropped["volatile"] > 0  # they rewrite their memory all the time
    assert [domain.kind for domain in found.domains][-1] == "process"
    assert [threads_and_files(guest.pid) for guest in guest_pair] == before
    for guest in guest_pair:
        guest.wait_rounds(1, ("files", "checker"))


def test_a_guest_that_cannot_be_reached_is_left_out_of_all(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with booted(qemu, "open", "held") as guests, socket.socket(socket.AF_UNIX) as other:
        # "All" are ours: what else runs on this host is not read, and has no say.
        monkeypatch.setattr(guests_module, "find_guests", lambda: [process_of(guest) for guest in guests])
        other.connect(str(guests[1].qmp_path))  # QEMU serves one client at a time
        notices: list[str] = []
        found = estimate(["qemu:all"], interval_s=0, notice=notices.append)
        names = [domain.name for domain in found.domains]
        assert names == ["open"]
        assert [str(guests[1].qmp_path) in notice for notice in notices] == [True]
        with pytest.raises(ConnectionLostError, match="busy"):
            estimate([f"qemu:{guests[1].pid}"], interval_s=0)


def test_memory_that_was_only_read_saves_nothing(qemu: Path) -> None:
    with booted(qemu, "reader") as (guest,):
        before = estimate([f"qemu:{guest.pid}"], interval_s=0)
        # A read of untouched memory maps the kernel's zero page: where huge pages are allowed, the huge one.
        for gpa in range(16 << 20, 48 << 20, 2 << 20):
            assert guest.read(gpa, 1) == b"\0"
        after = estimate([f"qemu:{guest.pid}"], interval_s=0)
    assert after.absent_pages == before.absent_pages > (32 << 20) // 4096
    assert (after.zero_pages, after.saved_pages) == (before.zero_pages, before.saved_pages)
