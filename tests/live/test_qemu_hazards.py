"""One test for each way in which sharing live memory goes wrong when it is done carelessly."""

import fcntl
import mmap
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from guests.machine import wait_until
from guests.qtest import QtestGuest
from live.gate import READY, Gate, main_thread_waits, waiting_call
from live.qemu_host import FIRST_GFN, QtestHost, booted, process_of
from memshr.errors import (
    HostMemoryError,
    MemshrError,
    NoSuchDomainError,
    NotSharableError,
    RefusedDomainError,
    Status,
)
from memshr.procfs import process_mappings
from memshr.qemu import attachment, books, syscalls, target
from memshr.qemu.agent import AgentLink, entries, is_linked
from memshr.qemu.control_area import IF_EQUAL, ControlArea
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.qemu.mapping_budget import DEFAULT_MAP_COUNT, MAP_RESERVE
from memshr.qemu.pool import FramePool
from memshr.qemu.ram import Pages
from memshr.sharing.session import SharingOptions
from memshr.sharing.session import share as share_session
from memshr.trust import trust_groups
from memshr.types import HUGE_PAGE_PAGES, PAGE_SIZE, Counters, DomId, Gfn, PageArray

FIRST, SECOND = DomId(1), DomId(2)


@pytest.fixture
def host(qtest_pair: tuple[QtestGuest, QtestGuest]) -> Iterator[QtestHost]:
    """Two fresh guests in one trust group."""
    with QtestHost(qtest_pair) as made:
        yield made


@pytest.fixture(params=["this kernel", "older kernel"])
def any_kernel(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Once as this kernel wants it, and once with the ways that older kernels need (see test_qemu_contract)."""
    if request.param == "older kernel":
        monkeypatch.setattr(syscalls, "UFFD_FEATURE_WP_UNPOPULATED", 0)
        monkeypatch.setattr(attachment, "MAPPING_OVER_IS_SAFE", False)


def run_of(domid: DomId, count: int, step: int = 1) -> PageArray:
    """Every ``step``-th page from FIRST_GFN on."""
    return PageArray.of_domain(domid, np.arange(FIRST_GFN, FIRST_GFN + count * step, step))


def share(host: QtestHost, sources: PageArray, clients: PageArray) -> np.ndarray[tuple[int], np.dtype[np.int32]]:
    """Nominate, compare and share, row by row; the statuses, 1 where the pages differ."""
    source_handles, _ = host.hypervisor.nominate_gfns(sources)
    client_handles, _ = host.hypervisor.nominate_gfns(clients)
    contents = np.zeros((2, len(sources), PAGE_SIZE), np.uint8)
    host.hypervisor.read_pages(sources, contents[0])
    host.hypervisor.read_pages(clients, contents[1])
    equal = np.asarray((contents[0] == contents[1]).all(axis=1))
    statuses = np.ones(len(sources), np.int32)
    statuses[equal] = host.hypervisor.share_gfns_many(
        sources[equal], source_handles[equal], clients[equal], client_handles[equal]
    )
    return statuses


def fill(guest: QtestGuest, content: bytes, count: int = 1, first: int = FIRST_GFN) -> None:
    """Write the same page ``count`` times."""
    guest.write(first * PAGE_SIZE, content * count)


def page(seed: int) -> bytes:
    """A page of its own for each seed."""
    return np.random.default_rng(seed).bytes(PAGE_SIZE)


def pool_mappings(guest: QtestGuest) -> int:
    """How many mappings of pools QEMU has."""
    return Path(f"/proc/{guest.pid}/maps").read_text().count("/memfd:memshr-pool:")


def test_a_shared_piece_splits_its_huge_page(host: QtestHost) -> None:
    """Without the split the host gets nothing back: the huge page stays as long as one piece of it is used."""
    for guest in host.guests:
        fill(guest, page(1), 1024)
    everything = run_of(FIRST, 1024)
    if not host.hypervisor.huge(everything).any():
        pytest.fail("guest RAM has no transparent huge pages here; set /sys/kernel/mm/transparent_hugepage to madvise")
    odd = PageArray.of_domain(FIRST, everything.gfns[1::2])
    assert not share(host, PageArray.of_domain(FIRST, np.full(len(odd), FIRST_GFN)), odd).any()
    assert not host.hypervisor.huge(PageArray.of_domain(FIRST, everything.gfns[2::2])).any()


@pytest.mark.parametrize(("needed_pages", "split"), [(2, True), (3, False), (HUGE_PAGE_PAGES + 1, False)])
def test_a_session_splits_a_huge_page_only_where_it_pays(host: QtestHost, needed_pages: int, split: bool) -> None:
    for number, guest in enumerate(host.guests):
        contents = [page(1), page(1), *(page(10 + number * 2000 + seed) for seed in range(1022))]
        guest.write(FIRST_GFN * PAGE_SIZE, b"".join(contents))
    neighbours = PageArray.of_domain(FIRST, np.arange(FIRST_GFN + 2, FIRST_GFN + HUGE_PAGE_PAGES))
    assert host.hypervisor.huge(neighbours).all()
    groups = trust_groups(host.hypervisor.names(), ["all"], lambda: 1)
    options = SharingOptions(huge_page_pages=needed_pages, threads=1)
    report = share_session(host.hypervisor, groups, wait=lambda _: None, options=options)
    assert (host.hypervisor.frames_of(run_of(FIRST, 2)) >= 0).tolist() == [split, split]
    assert ("huge_page" in report.dropped) is not split
    assert host.hypervisor.huge(neighbours).all() == (not split)


@pytest.mark.usefixtures("any_kernel")
def test_runs_of_pages_share_in_one_mapping(host: QtestHost) -> None:
    for guest in host.guests:
        guest.write(FIRST_GFN * PAGE_SIZE, b"".join(page(seed) for seed in range(300)))
    assert not share(host, run_of(FIRST, 300), run_of(SECOND, 300)).any()
    assert [pool_mappings(guest) for guest in host.guests] == [1, 1]


def test_pages_that_were_never_touched_are_told_apart(host: QtestHost) -> None:
    fill(host.guests[0], bytes(PAGE_SIZE), 4)
    touched, untouched = run_of(FIRST, 4), PageArray.of_domain(FIRST, np.arange(0x2000, 0x2004))
    assert host.hypervisor.backed(touched).tolist() == [True] * 4
    assert host.hypervisor.backed(untouched).tolist() == [False] * 4
    buffer = np.ones((4, PAGE_SIZE), np.uint8)
    assert not host.hypervisor.read_range(FIRST, Gfn(0x2000), 4, buffer).any()
    assert host.hypervisor.backed(untouched).tolist() == [False] * 4, "reading made them"


@pytest.mark.usefixtures("any_kernel")
def test_write_to_a_nominated_page_that_was_never_touched(host: QtestHost) -> None:
    """There is nothing to protect, and yet the write must kill the handle."""
    pages = PageArray.of_domain(FIRST, np.array([0x2000, 0x2001]))
    handles, _ = host.hypervisor.nominate_gfns(pages)
    host.write(FIRST, Gfn(0x2000), b"first write")
    assert host.hypervisor.release_zero_pages(pages, handles).tolist() == [Status.S_HANDLE_INVALID, 0]
    assert host.read(FIRST, Gfn(0x2000))[:11] == b"first write"


@pytest.mark.usefixtures("any_kernel")
def test_write_to_an_empty_page_just_before_its_neighbours_are_copied_back(
    host: QtestHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whole pieces of RAM are copied back; which pages of them are empty is known only when no write can come."""
    for guest in host.guests:
        fill(guest, page(1), 2)
    assert not share(host, run_of(FIRST, 2), run_of(SECOND, 2)).any()
    attachment = host.hypervisor._books.guests[SECOND - 1]
    protect = attachment.protect

    def write_first(pages: Pages) -> None:
        host.write(SECOND, Gfn(FIRST_GFN + 100), b"late")
        protect(pages)

    monkeypatch.setattr(attachment, "protect", write_first)
    assert host.hypervisor.unshare_guest(SECOND) == 2
    assert host.read(SECOND, Gfn(FIRST_GFN + 100))[:4] == b"late"


def test_zero_page_that_was_copied_from_a_frame(host: QtestHost) -> None:
    """Dropping such a page would bring the frame back: it needs a mapping of its own."""
    for guest in host.guests:
        fill(guest, page(1))
    assert not share(host, run_of(FIRST, 1), run_of(SECOND, 1)).any()
    fill(host.guests[1], bytes(PAGE_SIZE))
    handles, _ = host.hypervisor.nominate_gfns(run_of(SECOND, 1))
    assert not host.hypervisor.release_zero_pages(run_of(SECOND, 1), handles).any()
    assert host.read(SECOND, Gfn(FIRST_GFN)) == bytes(PAGE_SIZE)
    assert not host.hypervisor.backed(run_of(SECOND, 1))[0]
    assert host.hypervisor.audit().clean


@pytest.mark.usefixtures("any_kernel")
def test_zeros_that_are_shared_can_be_released(host: QtestHost) -> None:
    for guest in host.guests:
        fill(guest, bytes(PAGE_SIZE), 2)
    assert not share(host, run_of(FIRST, 2), run_of(SECOND, 2)).any()
    handles, _ = host.hypervisor.nominate_gfns(run_of(SECOND, 2))
    assert not host.hypervisor.release_zero_pages(run_of(SECOND, 2), handles).any()
    assert host.read(SECOND, Gfn(FIRST_GFN)) == host.read(FIRST, Gfn(FIRST_GFN)) == bytes(PAGE_SIZE)
    assert host.hypervisor.counters() == Counters(freed_pages=0, used_frames=2)


@pytest.mark.usefixtures("any_kernel")
def test_frames_are_given_back_when_nobody_reads_them(host: QtestHost) -> None:
    for guest in host.guests:
        guest.write(FIRST_GFN * PAGE_SIZE, b"".join(page(seed) for seed in range(64)))
    assert not share(host, run_of(FIRST, 64), run_of(SECOND, 64)).any()
    assert host.hypervisor.pool_figures()[0].backed_bytes == 64 * PAGE_SIZE
    seen = host.hypervisor.counters()
    for guest in host.guests:
        guest.write(FIRST_GFN * PAGE_SIZE, b"".join(page(seed) for seed in range(100, 164)))
    assert host.hypervisor.fold_back(seen=seen) == 0, "what was copied after the look is left"
    assert host.hypervisor.pool_figures()[0].backed_bytes == 64 * PAGE_SIZE, "doubled until somebody looks"
    host.hypervisor.fold_back(seen=host.hypervisor.counters())
    assert host.hypervisor.pool_figures()[0].backed_bytes == 0
    assert [pool_mappings(guest) for guest in host.guests] == [0, 0]
    for guest in host.guests:
        assert guest.read(FIRST_GFN * PAGE_SIZE, 64 * PAGE_SIZE) == b"".join(page(seed) for seed in range(100, 164))


def test_holders_of_frames_are_found_however_often_they_change(
    host: QtestHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The index by frame is made anew now and then; between that it knows of every page that was remapped."""
    monkeypatch.setattr(books, "_FEW_PAGES", 12)
    both = PageArray(
        np.repeat(np.array([FIRST, SECOND], np.uint16), 16), np.tile(np.arange(FIRST_GFN, FIRST_GFN + 16), 2)
    )
    rng = np.random.default_rng(3)
    for _ in range(12):
        for guest in host.guests:
            for gfn in rng.choice(16, 6, replace=False).tolist():
                guest.write((FIRST_GFN + gfn) * PAGE_SIZE, page(int(rng.integers(4))))
        pairs = rng.permutation(32)
        share(host, both[pairs[:16]], both[pairs[16:]])
        host.hypervisor.unshare_gfns(both[rng.integers(32, size=3)])
        frames = host.hypervisor.frames_of(both)
        expected = np.where(frames < 0, 0, (frames[:, None] == frames[None, :]).sum(axis=1))
        nominated = host.hypervisor.counters().used_frames - len(np.unique(frames[frames >= 0]))
        found = host.hypervisor.debug_gfns(both)
        assert (found[frames >= 0] == expected[frames >= 0]).all()
        assert found[frames < 0].sum() == nominated
        assert not host.hypervisor.audit().findings


def test_a_frame_number_is_never_used_again(host: QtestHost) -> None:
    """Also not by the next memshr, which knows only what the kernel kept."""
    for guest in host.guests:
        fill(guest, page(1), 8)
    assert not share(host, run_of(FIRST, 8), run_of(SECOND, 8)).any()
    host.hypervisor.close()
    with QtestHost(host.guests) as later:
        fill(host.guests[0], page(2), 1, FIRST_GFN + 100)
        fill(host.guests[1], page(2), 1, FIRST_GFN + 100)
        some = PageArray.of_domain(FIRST, np.array([FIRST_GFN + 100]))
        assert not share(later, some, PageArray.of_domain(SECOND, some.gfns)).any()
        offsets = [
            mapping.offset // PAGE_SIZE
            for mapping in process_mappings(host.guests[0].pid)
            if "memshr-pool" in mapping.path
        ]
        assert len(offsets) == len(set(offsets))
        assert max(offsets) == 8
        assert later.hypervisor.audit().clean


def test_qemu_cannot_write_into_the_pool(host: QtestHost) -> None:
    for guest in host.guests:
        fill(guest, page(1))
    assert not share(host, run_of(FIRST, 1), run_of(SECOND, 1)).any()
    for guest in host.guests:
        held = [path for path in Path(f"/proc/{guest.pid}/fd").iterdir() if "memshr-pool" in os.fspath(path.readlink())]
        assert held
        for path in held:
            flags = next(
                line
                for line in Path(f"/proc/{guest.pid}/fdinfo/{path.name}").read_text().splitlines()
                if "flags" in line
            )
            assert int(flags.split()[1], 8) & os.O_ACCMODE == os.O_RDONLY
            assert path.stat().st_mode & 0o777 == 0o400


def test_pool_that_only_has_the_name_is_not_trusted() -> None:
    """A QEMU that was broken out of could make itself a file that is called like a pool."""
    forged = os.memfd_create("memshr-pool:all", os.MFD_ALLOW_SEALING)
    os.ftruncate(forged, PAGE_SIZE)
    real = FramePool.create("all")
    real.add(np.ones((1, PAGE_SIZE), np.uint8))
    readable = real.readable()
    with (
        mmap.mmap(forged, PAGE_SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ),
        mmap.mmap(readable, PAGE_SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ),
    ):
        claims = [each for each in process_mappings(os.getpid()) if "memshr-pool" in each.path]
        adopted = [FramePool.adopt(os.getpid(), mapping) for mapping in claims]
    assert len(adopted) == 2
    assert {pool.file for pool in adopted if pool is not None} == {real.file}
    assert fcntl.fcntl(readable, syscalls.F_GET_SEALS) & syscalls.F_SEAL_SHRINK
    for pool in [real, *filter(None, adopted)]:
        pool.close()
    os.close(forged)
    os.close(readable)


@pytest.mark.parametrize("group", ["web", "two\nlines", "caf\u00e9 100%", "tab\tand\\slash", "g" * 200, "a (deleted)"])
def test_pool_is_found_again_under_the_name_of_its_group(group: str) -> None:
    pool = FramePool.create(group)
    pool.add(np.ones((1, PAGE_SIZE), np.uint8))
    readable = pool.readable()
    with mmap.mmap(readable, PAGE_SIZE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ):
        claims = [each for each in process_mappings(os.getpid()) if "memshr-pool" in each.path]
        adopted = [FramePool.adopt(os.getpid(), mapping) for mapping in claims]
    assert [each.group for each in adopted if each is not None] == [group]
    for each in [pool, *filter(None, adopted)]:
        each.close()
    os.close(readable)


@pytest.mark.parametrize("group", ["g" * 300, "%" * 100])
def test_name_too_long_for_a_pool_is_refused(qtest_pair: tuple[QtestGuest, QtestGuest], group: str) -> None:
    with pytest.raises(MemshrError, match="too long"), QtestHost(qtest_pair, groups={group: [FIRST, SECOND]}):
        pass


def test_equal_pages_of_two_trust_groups_never_meet(qtest_pair: tuple[QtestGuest, QtestGuest]) -> None:
    with QtestHost(qtest_pair, groups={"red": [FIRST], "blue": [SECOND]}) as host:
        for guest in host.guests:
            fill(guest, page(1), 4)
        assert share(host, run_of(FIRST, 2), run_of(SECOND, 2)).tolist() == [Status.EXDEV] * 2
        with pytest.raises(RefusedDomainError, match="different trust groups"):
            host.hypervisor.share_gfns(
                FIRST,
                Gfn(FIRST_GFN),
                host.hypervisor.nominate_gfn(FIRST, Gfn(FIRST_GFN)),
                SECOND,
                Gfn(FIRST_GFN),
                host.hypervisor.nominate_gfn(SECOND, Gfn(FIRST_GFN)),
            )
        for domid in (FIRST, SECOND):
            inside = run_of(domid, 4)
            assert not share(host, inside[:1], inside[1:2]).any()
        inodes = [
            {each.inode for each in process_mappings(guest.pid) if "memshr-pool" in each.path} for guest in host.guests
        ]
        assert len(inodes[0]) == len(inodes[1]) == 1
        assert inodes[0] != inodes[1]
        assert host.hypervisor.audit().clean


@pytest.mark.usefixtures("any_kernel")
def test_writers_in_the_midst_of_sharing_lose_nothing(host: QtestHost) -> None:
    """A guest writes into the very pages that are nominated and shared, all the time."""
    count = 400
    for guest in host.guests:
        fill(guest, page(1), count)
    stop = threading.Event()
    wrong: list[int] = []

    def play() -> None:
        chance = np.random.default_rng(3)
        while not stop.is_set():
            gfn = FIRST_GFN + int(chance.integers(count))
            mark = chance.bytes(16)
            host.guests[1].write(gfn * PAGE_SIZE + 64, mark)
            if host.guests[1].read(gfn * PAGE_SIZE + 64, 16) != mark:
                wrong.append(gfn)
            host.guests[1].write(gfn * PAGE_SIZE, page(1))

    player = threading.Thread(target=play)
    player.start()
    shared = 0
    for _ in range(15):
        statuses = share(host, run_of(FIRST, count), run_of(SECOND, count))
        shared += int((statuses == 0).sum())
        host.hypervisor.fold_back()
    stop.set()
    player.join()
    assert not wrong
    assert shared > 0
    assert host.guests[1].read(FIRST_GFN * PAGE_SIZE, count * PAGE_SIZE) == page(1) * count
    assert host.hypervisor.audit().clean


def test_mappings_are_a_budget(qemu: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Sharing every second page of a large guest needs more mappings than a process may have."""
    limit = min(int(Path("/proc/sys/vm/max_map_count").read_text()), DEFAULT_MAP_COUNT)
    monkeypatch.setattr(target, "map_count_limit", lambda: limit)  # many hosts allow more than a small guest can use
    pages = limit + 4000
    with booted(qemu, "mapped", memory_mib=(pages + 2 * FIRST_GFN) * PAGE_SIZE // (1 << 20) + 32) as (guest,):
        fill(guest, page(1), 2)
        for first in range(0, pages, 1 << 14):
            guest.fill((FIRST_GFN + first) * PAGE_SIZE, min(1 << 14, pages - first) * PAGE_SIZE, 7)
        with QtestHost([guest], groups={}) as host:
            clients = run_of(FIRST, pages // 2, 2)[1:]
            source = PageArray.of_domain(FIRST, np.full(len(clients), FIRST_GFN))
            source_handles, _ = host.hypervisor.nominate_gfns(source)
            client_handles, _ = host.hypervisor.nominate_gfns(clients)
            statuses = host.hypervisor.share_gfns_many(source, source_handles, clients, client_handles)
            assert set(statuses.tolist()) == {0, Status.ENOMEM}
            most = limit - MAP_RESERVE
            assert most - 1000 < len(Path(f"/proc/{guest.pid}/maps").read_text().splitlines()) <= most
            assert guest.read((FIRST_GFN + 1) * PAGE_SIZE, 64) == bytes([7]) * 64
            assert host.hypervisor.audit().clean
            assert host.hypervisor.unshare_guest(FIRST) == int((statuses == 0).sum()) + 1
            assert pool_mappings(guest) == 0


def test_a_guest_that_dies_is_left_out(host: QtestHost) -> None:
    for guest in host.guests:
        fill(guest, page(1), 8)
    assert not share(host, run_of(FIRST, 4), run_of(SECOND, 4)).any()
    handles, _ = host.hypervisor.nominate_gfns(run_of(SECOND, 8))
    host.guests[1].kill()
    mine, _ = host.hypervisor.nominate_gfns(run_of(FIRST, 8))
    statuses = host.hypervisor.share_gfns_many(run_of(FIRST, 8), mine, run_of(SECOND, 8), handles)
    assert (statuses[4:] < 0).all()
    with pytest.raises(NoSuchDomainError):
        host.hypervisor.domain_info(SECOND)
    assert [info.domid for info in host.hypervisor.domains()] == [FIRST]
    assert host.hypervisor.audit().clean
    assert host.read(FIRST, Gfn(FIRST_GFN)) == page(1)
    host.hypervisor.detach(FIRST)


def test_memory_for_unsharing_is_kept(host: QtestHost) -> None:
    for guest in host.guests:
        fill(guest, page(1), 8)
    assert not share(host, run_of(FIRST, 8), run_of(SECOND, 8)).any()
    host.hypervisor.close()
    with QemuHypervisor(
        list(map(process_of, host.guests)), groups={"all": [FIRST, SECOND]}, reserve_bytes=1 << 60
    ) as poor:
        with pytest.raises(HostMemoryError, match="needs 0 MiB"):
            poor.unshare_guest(FIRST)
        assert poor.unshare_gfns(run_of(FIRST, 1)).tolist() == [Status.ENOMEM]
        assert poor.audit().clean
        assert poor.debug_gfn(FIRST, Gfn(FIRST_GFN)) == 2


def test_stopped_qemu_is_given_up_and_keeps_its_memory(host: QtestHost) -> None:
    """QEMU as a process is stopped while a table waits for it: the table is withdrawn."""
    for guest in host.guests:
        fill(guest, page(1), 4)
    source_handles, _ = host.hypervisor.nominate_gfns(run_of(FIRST, 4))
    client_handles, _ = host.hypervisor.nominate_gfns(run_of(SECOND, 4))
    share(host, run_of(FIRST, 1), run_of(SECOND, 1))
    for opened in host.hypervisor._books.guests:
        assert opened.link is not None
        opened.link.deadline_s = 0.2
    os.kill(host.guests[1].pid, signal.SIGSTOP)
    try:
        statuses = host.hypervisor.share_gfns_many(run_of(FIRST, 4), source_handles, run_of(SECOND, 4), client_handles)
    finally:
        os.kill(host.guests[1].pid, signal.SIGCONT)
    assert statuses.tolist()[1:] == [Status.ESRCH] * 3
    (trouble,) = host.hypervisor.trouble
    assert "right" in trouble
    assert "did not run" in trouble
    assert list(host.hypervisor.names()) == [FIRST]
    wait_until(lambda: host.read(SECOND, Gfn(FIRST_GFN + 1)) == page(1), 10, "the guest goes on")
    fill(host.guests[1], page(2), 4)
    assert host.read(SECOND, Gfn(FIRST_GFN + 3)) == page(2)
    assert host.hypervisor.audit().clean
    host.hypervisor.control(SECOND, True)
    assert host.hypervisor.trouble == ()
    assert not share(host, run_of(SECOND, 1), run_of(SECOND, 4)[3:]).any()


def shared_pair(host: QtestHost) -> None:
    """One page of each guest on one frame."""
    for guest in host.guests:
        fill(guest, page(1))
    assert not share(host, run_of(FIRST, 1), run_of(SECOND, 1)).any()
    assert host.hypervisor.audit().clean


def test_audit_sees_a_mapping_that_somebody_else_changed(host: QtestHost) -> None:
    shared_pair(host)
    opened = host.hypervisor._books.guests[0]
    hva = int(opened.hvas[opened.pages_of_gfns(np.array([FIRST_GFN]))[0]])
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED
    assert opened.working_link().call(syscalls.NR_MMAP, hva, PAGE_SIZE, 3, flags, 2**64 - 1, 0) == hva
    (finding,) = host.hypervisor.audit().findings
    assert (finding.invariant, finding.domid, finding.gfn) == ("I3", FIRST, FIRST_GFN)


def test_audit_sees_a_frame_whose_contents_changed(host: QtestHost) -> None:
    shared_pair(host)
    os.pwrite(host.hypervisor._books.pools[0].pool._file, b"x", 100)
    (finding,) = host.hypervisor.audit().findings
    assert (finding.invariant, finding.mfn) == ("I8", 0)


def test_audit_sees_frames_of_a_group_that_was_changed(host: QtestHost) -> None:
    """What was shared under wider groups stays shared until it is unshared, and audit says so."""
    shared_pair(host)
    host.hypervisor.close()
    with QtestHost(host.guests, groups={}) as apart:
        assert {finding.invariant for finding in apart.hypervisor.audit().findings} == {"I10"}
        for domid in (FIRST, SECOND):
            apart.hypervisor.unshare_guest(domid)
        assert apart.hypervisor.audit().clean
        assert apart.read(SECOND, Gfn(FIRST_GFN)) == page(1)


def test_frames_that_a_guest_outside_reads_are_kept(host: QtestHost) -> None:
    """A run over some of the guests of a pool must not give back what the others read."""
    shared_pair(host)
    host.hypervisor.close()
    with QtestHost(host.guests[:1], groups={"all": [FIRST]}) as part:
        part.hypervisor.unshare_guest(FIRST)
        part.hypervisor.punch_unread()
        for guest in host.guests[:1]:
            fill(guest, page(2), 2, FIRST_GFN + 8)
        inside = PageArray.of_domain(FIRST, np.array([FIRST_GFN + 8, FIRST_GFN + 9]))
        assert not share(part, inside[:1], inside[1:]).any()
        assert host.guests[1].read(FIRST_GFN * PAGE_SIZE, PAGE_SIZE) == page(1)


def test_no_writer_waits_for_a_child_of_a_dead_memshr(qtest_pair: tuple[QtestGuest, QtestGuest]) -> None:
    """A forked child has copies of every descriptor; if it kept ours, nobody would learn that memshr has died."""
    program = (
        "import os, signal, sys, time\n"
        "from memshr.qemu.guests import inspect_process\n"
        "from memshr.qemu.hypervisor import QemuHypervisor\n"
        "hypervisor = QemuHypervisor([inspect_process(int(sys.argv[1]))])\n"
        f"hypervisor.nominate_gfn(1, {FIRST_GFN})\n"
        "child = os.fork()\n"
        "if child == 0:\n"
        "    os.close(1)\n"
        "    signal.alarm(60)\n"
        "    signal.pause()\n"
        "print(child, flush=True)\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, str(qtest_pair[0].pid)], stdout=subprocess.PIPE, text=True, check=False
    )
    assert done.returncode == -signal.SIGKILL
    try:
        fill(qtest_pair[0], page(3))
        assert qtest_pair[0].read(FIRST_GFN * PAGE_SIZE, PAGE_SIZE) == page(3)
    finally:
        os.kill(int(done.stdout), signal.SIGKILL)


def die_with_a_waiting_table(guest: QtestGuest) -> Gate:
    """A memshr dies whose last table waits for the gate, then maps a frame with the same contents over FIRST_GFN."""
    gate = Gate(guest)
    program = (
        "import os, signal, sys\n"
        "import numpy as np\n"
        "from live.gate import READY, waiting_call\n"
        "from memshr.qemu import agent\n"
        "from memshr.qemu.guests import inspect_process\n"
        "from memshr.qemu.hypervisor import QemuHypervisor\n"
        "hypervisor = QemuHypervisor([inspect_process(int(sys.argv[1]))])\n"
        f"hypervisor.nominate_gfn(1, {FIRST_GFN})\n"
        "opened = hypervisor._books.guests[0]\n"
        f"(row,) = opened.pages_of_gfns(np.array([{FIRST_GFN}]))\n"
        "hypervisor._hand_over_pools([opened], np.array([row]))\n"
        "(frame,) = hypervisor._new_frames(np.array([row]), np.array([True]))\n"
        "pool = hypervisor._books.pools[int(frame) >> 32].pool\n"
        "hva = int(opened.hvas[row])\n"
        "table = [waiting_call(opened.link.control, int(sys.argv[2]))]\n"
        "table += [(9, hva, 4096, 3, 0x4012, opened.pool_number(pool), int(frame) % (1 << 32) * 4096)]\n"
        "opened.link.post(agent.entries(table, results=[READY, hva]))\n"
        "os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    path = os.pathsep.join(filter(None, [os.fspath(Path(__file__).parents[1]), os.environ.get("PYTHONPATH")]))
    command = [sys.executable, "-c", program, str(guest.pid), str(gate.number)]
    done = subprocess.run(command, env=os.environ | {"PYTHONPATH": path}, check=False)
    assert done.returncode == -signal.SIGKILL
    return gate


def write_while_a_table_waits(guest: QtestGuest, gate: Gate) -> None:
    """Write into FIRST_GFN before the table that maps a frame over it goes on: the write must wait for that."""
    writer = threading.Thread(target=guest.write, args=(FIRST_GFN * PAGE_SIZE + 8, b"in between"))
    writer.start()
    try:
        wait_until(lambda: main_thread_waits(guest) or not writer.is_alive(), 10, "the write waits, or is done")
        assert writer.is_alive(), "the write did not wait for the table"
    finally:
        gate.open()
        writer.join()


def test_protection_outlives_memshr_until_its_last_table_is_done(qtest_pair: tuple[QtestGuest, QtestGuest]) -> None:
    """memshr dies with a table under way: a write in between must wait for the remap, or it would be lost under it."""
    guest = qtest_pair[0]
    fill(guest, page(4))
    write_while_a_table_waits(guest, die_with_a_waiting_table(guest))
    wait_until(lambda: pool_mappings(guest) == 1, 10, "the table is done")
    assert guest.read(FIRST_GFN * PAGE_SIZE, PAGE_SIZE) == page(4)[:8] + b"in between" + page(4)[18:]
    with QtestHost([guest], groups={}) as later:
        assert later.hypervisor.counters() == Counters(0, 0)
        assert later.hypervisor.audit().clean


def copied_since_it_was_shared(host: QtestHost, domid: DomId) -> None:
    """The first page of both guests has been shared; this one has written to its own, which is in the mapping still."""
    for guest in host.guests:
        fill(guest, page(1))
    assert not share(host, run_of(FIRST, 1), run_of(SECOND, 1)).any()
    fill(host.guests[domid - 1], page(2))


def test_source_that_gets_no_frame_gives_nobody_the_frame_that_it_was_on(host: QtestHost) -> None:
    copied_since_it_was_shared(host, FIRST)
    fill(host.guests[1], page(2), first=FIRST_GFN + 8)
    client = PageArray.of_domain(SECOND, np.array([FIRST_GFN + 8]))
    handles = [host.hypervisor.nominate_gfns(pages)[0] for pages in (run_of(FIRST, 1), client)]
    host.hypervisor._reserve_bytes = 1 << 60
    statuses = host.hypervisor.share_gfns_many(run_of(FIRST, 1), handles[0], client, handles[1])
    assert statuses.tolist() == [Status.ENOMEM]
    assert host.read(SECOND, Gfn(FIRST_GFN + 8)) == page(2)
    assert host.read(FIRST, Gfn(FIRST_GFN)) == page(2)
    assert host.hypervisor.audit().clean


def test_client_that_was_not_remapped_is_not_said_to_be_on_the_frame(
    host: QtestHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    copied_since_it_was_shared(host, SECOND)
    fill(host.guests[1], page(1))
    handles = [host.hypervisor.nominate_gfns(run_of(domid, 1))[0] for domid in (FIRST, SECOND)]
    # As if it were written just before it is taken in flight.
    monkeypatch.setattr(host.hypervisor._remapping, "take", lambda ids, _: np.zeros(len(ids), np.bool_))
    statuses = host.hypervisor.share_gfns_many(run_of(FIRST, 1), handles[0], run_of(SECOND, 1), handles[1])
    assert statuses.all()
    host.hypervisor.unshare_gfn(SECOND, Gfn(FIRST_GFN))  # takes the nomination back
    with pytest.raises(NotSharableError):
        host.hypervisor.debug_gfn(SECOND, Gfn(FIRST_GFN))


def test_ctrl_c_lets_nobody_write_under_a_table(
    host: QtestHost, qtest_pair: tuple[QtestGuest, QtestGuest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Our wait for the agent can be interrupted, its table cannot: until that has ended writers must wait."""
    guest = qtest_pair[0]
    for each in qtest_pair:
        fill(each, page(4))
    both = [run_of(domid, 1) for domid in (FIRST, SECOND)]
    handles = [host.hypervisor.nominate_gfns(pages)[0] for pages in both]
    post = AgentLink.post
    posted = threading.Event()
    gate = Gate(guest)

    def post_slowly(link: AgentLink, table: np.ndarray[tuple[int, int], np.dtype[np.uint64]]) -> None:
        if table[0, 0] == syscalls.NR_MMAP | IF_EQUAL:
            waiting = entries([waiting_call(link.control, gate.number)], results=[READY])
            post(link, np.concatenate([waiting, table]))
            posted.set()
        else:
            post(link, table)

    def write() -> None:
        posted.wait()
        signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        write_while_a_table_waits(guest, gate)

    monkeypatch.setattr(AgentLink, "post", post_slowly)
    writer = threading.Thread(target=write)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        writer.start()
        with pytest.raises(KeyboardInterrupt):
            host.hypervisor.share_gfns_many(both[0], handles[0], both[1], handles[1])
    finally:
        writer.join()
        signal.signal(signal.SIGINT, before)
    assert pool_mappings(guest) == 1, "the table has done its work"
    assert guest.read(FIRST_GFN * PAGE_SIZE, PAGE_SIZE) == page(4)[:8] + b"in between" + page(4)[18:]


def test_next_memshr_waits_for_the_last_table_of_a_dead_one(
    qtest_pair: tuple[QtestGuest, QtestGuest], monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it believed of the guest before that would be wrong: it would take the frame for anonymous memory."""
    guest = qtest_pair[0]
    fill(guest, bytes(PAGE_SIZE))
    gate = die_with_a_waiting_table(guest)
    looks = threading.Event()
    is_taken = ControlArea.is_taken

    def look(control: ControlArea) -> bool:
        looks.set()
        return is_taken(control)

    def let_it_go_on() -> None:
        looks.wait(10)
        gate.open()

    monkeypatch.setattr(ControlArea, "is_taken", look)
    releasing = threading.Thread(target=let_it_go_on)
    with QemuHypervisor([process_of(guest)]) as later:
        assert pool_mappings(guest) == 0, "opening has waited"
        releasing.start()
        later.control(FIRST, True)
        releasing.join()
        assert later.debug_gfn(FIRST, Gfn(FIRST_GFN)) == 1
        assert later.audit().clean
        guest.write(FIRST_GFN * PAGE_SIZE + 8, b"mine")
        guest.write(FIRST_GFN * PAGE_SIZE + 8, bytes(4))
        handles, _ = later.nominate_gfns(run_of(FIRST, 1))
        assert not later.release_zero_pages(run_of(FIRST, 1), handles).any()
        assert not later.backed(run_of(FIRST, 1))[0]
        assert guest.read(FIRST_GFN * PAGE_SIZE, PAGE_SIZE) == bytes(PAGE_SIZE)


def test_frame_that_another_memshr_is_about_to_map_is_kept(host: QtestHost) -> None:
    """Nobody has the pool mapped just now; but another memshr, that has the guests in hand, still has it."""
    shared_pair(host)
    with QemuHypervisor([process_of(guest) for guest in host.guests], groups={"all": [FIRST, SECOND]}) as onlooker:
        for domid in (FIRST, SECOND):
            host.hypervisor.unshare_guest(domid)
        pool = host.hypervisor._books.pools[0].pool
        frame = pool.add(np.frombuffer(page(7), np.uint8).reshape(1, PAGE_SIZE))
        assert onlooker.punch_unread() == 0
        contents = np.empty((1, PAGE_SIZE), np.uint8)
        pool.read(np.array([frame]), contents)
        assert contents.tobytes() == page(7)


def test_frame_that_a_dead_memshr_is_about_to_map_is_kept(qtest_pair: tuple[QtestGuest, QtestGuest]) -> None:
    """Nobody reads the frame yet, but a table that maps it is still under way in another guest."""
    with QtestHost(qtest_pair) as host:
        shared_pair(host)
        host.hypervisor.unshare_guest(FIRST)
    assert pool_mappings(qtest_pair[0]) == 0
    gate = die_with_a_waiting_table(qtest_pair[0])
    with QtestHost(qtest_pair[1:], groups={"all": [FIRST]}) as part:
        part.hypervisor.unshare_guest(FIRST)
        assert part.hypervisor.punch_unread() == 0
        assert [pool.backed_bytes for pool in part.hypervisor.pool_figures()] == [PAGE_SIZE]
    gate.open()
    wait_until(lambda: not is_linked(qtest_pair[0].pid), 10, "the table is done")
    assert qtest_pair[0].read(FIRST_GFN * PAGE_SIZE, PAGE_SIZE) == page(1)
