"""Others that change the pages of a guest while memshr works on it: KSM, QEMU itself, and a QEMU that cheats.

What the kernel does to a write protection is in test_kernel_actors; here is what becomes of a nomination of memshr.
"""

import errno
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from guests.ksm import SETTINGS, ksm_at_work
from guests.machine import wait_until
from guests.peculiar import ram_mapping
from guests.qtest import QtestGuest
from live.parts import needed_parts
from live.qemu_host import FIRST_GFN, QtestHost
from memshr.errors import RefusedDomainError, Status
from memshr.qemu import pagemap, syscalls
from memshr.qemu.attachment import Attachment
from memshr.types import PAGE_SIZE, DomId, Gfn, PageArray

FIRST, SECOND = DomId(1), DomId(2)
BOTH = (FIRST, SECOND)
COUNT = 64

Pair = tuple[QtestGuest, QtestGuest]


@pytest.fixture
def host(qtest_pair: Pair) -> Iterator[QtestHost]:
    """Two guests with 64 pages that are equal between them."""
    for guest in qtest_pair:
        fill(guest)
    with QtestHost(qtest_pair) as made:
        yield made


def fill(guest: QtestGuest) -> None:
    """The same 64 different pages in each guest."""
    guest.write(FIRST_GFN * PAGE_SIZE, b"".join(page(seed) for seed in range(COUNT)))


def page(seed: int) -> bytes:
    """A page of its own for each seed."""
    return np.random.default_rng(seed + 100).bytes(PAGE_SIZE)


def pages_of(domid: DomId) -> PageArray:
    """The 64."""
    return PageArray.of_domain(domid, np.arange(FIRST_GFN, FIRST_GFN + COUNT))


def opened(host: QtestHost, domid: DomId) -> Attachment:
    """The guest as the mechanism has it."""
    return host.hypervisor._books.guests[domid - 1]


def hva_of(host: QtestHost, domid: DomId, gfn: int) -> int:
    """Where QEMU has a page."""
    guest = opened(host, domid)
    return int(guest.hvas[guest.pages_of_gfns(np.array([gfn]))[0]])


def frames_are_its_own(host: QtestHost, domid: DomId) -> bool:
    """Whether nobody else has the 64 pages mapped: bit 56 of the pagemap."""
    guest = opened(host, domid)
    entries = guest.entries(guest.pages_of_gfns(pages_of(domid).gfns))
    return bool((entries >> np.uint64(56) & np.uint64(1)).all())


def scan_twice() -> None:
    """Wait until KSM has looked at everything that it may look at, twice from its beginning to its end."""
    full_scans = SETTINGS / "full_scans"
    wanted = int(full_scans.read_text()) + 3
    wait_until(lambda: int(full_scans.read_text()) >= wanted, 60, "KSM scans")


def test_ksm_undoes_no_nomination(host: QtestHost) -> None:
    """KSM writes a page table entry without the protection when it merges a page: a write would go unheard."""
    handles = [host.hypervisor.nominate_gfns(pages_of(domid))[0] for domid in BOTH]
    with needed_parts(), ksm_at_work():
        scan_twice()
        for domid in BOTH:
            guest = opened(host, domid)
            entries = guest.entries(guest.pages_of_gfns(pages_of(domid).gfns))
            assert pagemap.is_protected(entries).all()
        host.write(SECOND, Gfn(FIRST_GFN + 3), b"written in the meantime")
        statuses = host.hypervisor.share_gfns_many(pages_of(FIRST), handles[0], pages_of(SECOND), handles[1])
    assert np.flatnonzero(statuses).tolist() == [3]
    assert statuses[3] == Status.C_HANDLE_INVALID
    assert host.read(SECOND, Gfn(FIRST_GFN + 3))[:23] == b"written in the meantime"
    assert host.hypervisor.trouble == ()
    assert host.hypervisor.audit().clean


def test_pages_that_ksm_had_merged_are_taken_back_first(qtest_pair: Pair) -> None:
    for guest in qtest_pair:
        fill(guest)
    with needed_parts(), ksm_at_work():
        wait_until(lambda: all(pagemap.ksm_pages(guest.pid) >= COUNT for guest in qtest_pair), 60, "KSM merges them")
        with QtestHost(qtest_pair) as host:
            for _ in range(2):
                assert all(frames_are_its_own(host, domid) for domid in BOTH)
                scan_twice()
            assert host.read(SECOND, Gfn(FIRST_GFN + 5)) == page(5)
            for domid in BOTH:
                host.hypervisor.detach(domid)
        wait_until(lambda: all(pagemap.ksm_pages(guest.pid) >= COUNT for guest in qtest_pair), 60, "KSM has them again")


def test_a_guest_whose_merged_pages_do_not_fit_into_memory_is_left_to_ksm(
    qtest_pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    for guest in qtest_pair:
        fill(guest)
    with needed_parts(), ksm_at_work():
        wait_until(lambda: pagemap.ksm_pages(qtest_pair[0].pid) >= COUNT, 60, "KSM merges them")
        monkeypatch.setattr(pagemap, "host_available_bytes", lambda: 0)
        with pytest.raises(RefusedDomainError, match=r"KSM has merged \d+ of its pages"), QtestHost(qtest_pair[:1]):
            pass
        assert pagemap.ksm_pages(qtest_pair[0].pid) >= COUNT
        assert "mg" in ram_mapping(qtest_pair[0])["VmFlags"].split()


def test_what_a_memshr_took_from_ksm_the_next_one_gives_back(qtest_pair: Pair) -> None:
    guest = qtest_pair[0]
    fill(guest)
    assert "mg" in ram_mapping(guest)["VmFlags"].split()
    with QtestHost([guest], groups={}) as host:
        host.hypervisor.nominate_gfns(pages_of(FIRST))
        assert "mg" not in ram_mapping(guest)["VmFlags"].split()
    assert "mg" not in ram_mapping(guest)["VmFlags"].split(), "it stays so for as long as pages may be shared"
    with QtestHost([guest], groups={}) as later:
        later.hypervisor.detach(FIRST)
    assert "mg" in ram_mapping(guest)["VmFlags"].split()


def test_page_that_qemu_discards_after_its_nomination_is_left_alone(host: QtestHost) -> None:
    """A discard takes the protection with it: what the guest writes then gives no event (balloon, virtio-mem)."""
    handles = [host.hypervisor.nominate_gfns(pages_of(domid))[0] for domid in BOTH]
    hva = hva_of(host, SECOND, FIRST_GFN + 7)
    link = opened(host, SECOND).working_link()
    assert link.call(syscalls.NR_MADVISE, hva, PAGE_SIZE, syscalls.MADV_DONTNEED) == 0
    host.write(SECOND, Gfn(FIRST_GFN + 7), b"unheard")
    statuses = host.hypervisor.share_gfns_many(pages_of(FIRST), handles[0], pages_of(SECOND), handles[1])
    assert np.flatnonzero(statuses).tolist() == [7]
    assert statuses[7] == Status.C_HANDLE_INVALID
    assert host.read(SECOND, Gfn(FIRST_GFN + 7))[:7] == b"unheard"
    assert "1 pages were no longer protected" in host.hypervisor.trouble[0]
    host.write(SECOND, Gfn(FIRST_GFN + 7), b"goes on")
    assert host.hypervisor.audit().clean


@pytest.mark.parametrize("cheat", [FIRST, SECOND])
def test_page_that_changes_behind_its_protection_is_not_put_on_a_frame(host: QtestHost, cheat: DomId) -> None:
    """A QEMU holds the userfaultfd of its own memory: it may unprotect a page, write to it, and protect it again."""
    handles = [host.hypervisor.nominate_gfns(pages_of(domid))[0] for domid in BOTH]
    hva = hva_of(host, cheat, FIRST_GFN + 9)
    link = opened(host, cheat).working_link()
    link.unprotect([(hva, PAGE_SIZE)])
    host.write(cheat, Gfn(FIRST_GFN + 9), b"behind our back")
    link.protect([(hva, PAGE_SIZE)])
    statuses = host.hypervisor.share_gfns_many(pages_of(FIRST), handles[0], pages_of(SECOND), handles[1])
    other = SECOND if cheat is FIRST else FIRST
    assert host.read(cheat, Gfn(FIRST_GFN + 9)) == b"behind our back" + page(9)[15:]
    assert host.read(other, Gfn(FIRST_GFN + 9)) == page(9), "what one guest says is no evidence about another"
    assert np.flatnonzero(statuses).tolist() == [9]
    assert statuses[9] == Status.C_HANDLE_INVALID
    assert host.hypervisor.trouble
    assert host.hypervisor.audit().clean
    for domid in BOTH:
        host.write(domid, Gfn(FIRST_GFN + 9), b"goes on")


def test_a_file_of_its_own_in_place_of_a_frame_harms_nobody_else(host: QtestHost) -> None:
    """A QEMU maps a file of its own where a frame was: the pagemap shows the two alike."""
    handles = [host.hypervisor.nominate_gfns(pages_of(domid))[0] for domid in BOTH]
    assert not host.hypervisor.share_gfns_many(pages_of(FIRST), handles[0], pages_of(SECOND), handles[1]).any()
    forged = os.memfd_create("memshr-pool:all")
    os.pwrite(forged, page(999), 0)
    link = opened(host, FIRST).working_link()
    number = link.give(forged)
    hva = hva_of(host, FIRST, FIRST_GFN + 11)
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED
    assert link.call(syscalls.NR_MMAP, hva, PAGE_SIZE, 3, flags, number, 0) == hva
    os.close(forged)
    assert host.read(FIRST, Gfn(FIRST_GFN + 11)) == page(999)
    # Another page of the second guest joins the frame that the first one pretends to be on.
    host.write(SECOND, Gfn(FIRST_GFN + 200), page(11))
    client = PageArray.of_domain(SECOND, np.array([FIRST_GFN + 200]))
    source = PageArray.of_domain(FIRST, np.array([FIRST_GFN + 11]))
    source_handles, client_handles = (host.hypervisor.nominate_gfns(each)[0] for each in (source, client))
    host.hypervisor.share_gfns_many(source, source_handles, client, client_handles)
    assert host.read(SECOND, Gfn(FIRST_GFN + 200)) == page(11)
    assert {finding.invariant for finding in host.hypervisor.audit().findings} >= {"I10"}


def test_failed_look_gives_a_living_guest_up_and_its_writers_go_on(
    host: QtestHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    host.hypervisor.nominate_gfns(pages_of(FIRST))
    target = opened(host, FIRST).target

    def fails(hvas: object) -> None:
        monkeypatch.undo()
        raise OSError(errno.ENOMEM, "no memory for a look")

    monkeypatch.setattr(target, "entries", fails)
    assert host.hypervisor.read_pages(pages_of(SECOND), np.empty((COUNT, PAGE_SIZE), np.uint8)).tolist() == [0] * COUNT
    with pytest.raises(RefusedDomainError, match=r"given up: .*no memory for a look"):
        host.hypervisor.frames_of(pages_of(FIRST))
    host.write(FIRST, Gfn(FIRST_GFN), b"goes on")
    assert "no memory for a look" in host.hypervisor.trouble[0]
    assert list(host.hypervisor.names()) == [SECOND]
    host.hypervisor.control(FIRST, True)
    assert host.hypervisor.audit().clean
    assert Path(f"/proc/{host.guests[0].pid}").exists()
