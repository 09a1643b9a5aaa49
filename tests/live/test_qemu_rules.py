"""Rules of the live core that nothing else would notice if they were broken: each was broken once in the code."""

import os
import signal
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from guests.machine import wait_until
from guests.qtest import QtestGuest
from live.qemu_host import FIRST_GFN, QtestHost, booted, process_of
from memshr.errors import BackendError, InvariantError, RefusedDomainError, Status
from memshr.indices import PageId, of_kind
from memshr.procfs import process_mappings
from memshr.qemu import agent, lock, pagemap, protection, syscalls
from memshr.qemu.attachment import Attachment, GuestState
from memshr.qemu.control_area import CONTROL_BYTES, CONTROL_NAME, ControlArea, is_ours
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.qemu.ram import Pages
from memshr.qemu.states import PageIds, PageStates
from memshr.types import PAGE_SIZE, DomId, Gfn, PageArray

FIRST, SECOND = DomId(1), DomId(2)
BOTH = (FIRST, SECOND)

Pair = tuple[QtestGuest, QtestGuest]


@pytest.fixture
def host(qtest_pair: Pair) -> Iterator[QtestHost]:
    """Two guests with eight equal pages."""
    for guest in qtest_pair:
        guest.write(FIRST_GFN * PAGE_SIZE, page(1) * 8)
    with QtestHost(qtest_pair) as made:
        yield made


def page(seed: int) -> bytes:
    """A page of its own for each seed."""
    return np.random.default_rng(seed).bytes(PAGE_SIZE)


def pages_of(domid: DomId, first: int = FIRST_GFN, count: int = 8) -> PageArray:
    """A run."""
    return PageArray.of_domain(domid, np.arange(first, first + count))


def opened(host: QtestHost, domid: DomId) -> Attachment:
    """The guest as the mechanism has it."""
    return host.hypervisor._books.guests[domid - 1]


def share(host: QtestHost, sources: PageArray, clients: PageArray) -> list[int]:
    """Nominate and share."""
    source_handles, client_handles = (host.hypervisor.nominate_gfns(each)[0] for each in (sources, clients))
    statuses: list[int] = host.hypervisor.share_gfns_many(sources, source_handles, clients, client_handles).tolist()
    return statuses


def test_writers_go_on_when_the_watch_fails(host: QtestHost, monkeypatch: pytest.MonkeyPatch) -> None:
    host.hypervisor.nominate_gfns(pages_of(FIRST))

    def fails(*_: object) -> None:
        raise RuntimeError("a defect of ours")

    monkeypatch.setattr(host.hypervisor._watches[FIRST], "_on_writes", fails)
    host.write(FIRST, Gfn(FIRST_GFN), b"goes on")
    assert host.read(FIRST, Gfn(FIRST_GFN))[:7] == b"goes on"
    wait_until(lambda: opened(host, FIRST).state is GuestState.LOST, 10, "it is given up")
    with pytest.raises(InvariantError, match="watch has failed"):
        host.hypervisor.nominate_gfns(pages_of(SECOND))
    host.write(SECOND, Gfn(FIRST_GFN), b"goes on")


def test_no_handle_is_seen_before_the_page_is_protected_and_disk_requests_have_ended(
    host: QtestHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    guest = opened(host, FIRST)
    guest.must_drain = True
    states = host.hypervisor._states
    ids = of_kind(PageId, np.arange(guest.pages))
    local = guest.pages_of_gfns(pages_of(FIRST).gfns)
    drained: list[bool] = []

    def drain() -> None:
        assert pagemap.is_protected(guest.entries(local)).all(), "a request that begins now must wait"
        assert not states.nominated(ids).any()
        host.write(FIRST, Gfn(FIRST_GFN + 2), b"meanwhile")
        drained.append(True)

    monkeypatch.setattr(guest.target, "drain", drain)
    handles, statuses = host.hypervisor.nominate_gfns(pages_of(FIRST))
    assert drained == [True]
    assert not statuses.any()
    assert states.nominated(ids[local]).tolist() == [True, True, False, True, True, True, True, True]
    client_handles, _ = host.hypervisor.nominate_gfns(pages_of(SECOND))
    answers = host.hypervisor.share_gfns_many(pages_of(FIRST), handles, pages_of(SECOND), client_handles)
    assert np.flatnonzero(answers).tolist() == [2], "what was written meanwhile has a dead handle"
    assert host.read(FIRST, Gfn(FIRST_GFN + 2))[:9] == b"meanwhile"


def test_guest_with_direct_drives_is_unshared_under_nominations(
    host: QtestHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert not any(share(host, pages_of(FIRST), pages_of(SECOND)))
    guest = opened(host, SECOND)
    guest.must_drain = True
    rounds: list[int] = []

    def drain() -> None:
        rounds.append(len(rounds))
        if len(rounds) == 1:  # what is written now is left for the next round
            host.write(SECOND, Gfn(FIRST_GFN + 5), b"meanwhile")

    monkeypatch.setattr(guest.target, "drain", drain)
    assert host.hypervisor.unshare_guest(SECOND) == 8
    assert len(rounds) == 2, "once for all pages, and once for the one that was written"
    assert not guest.in_pool.any()
    assert host.read(SECOND, Gfn(FIRST_GFN + 5)) == b"meanwhile" + page(1)[9:]
    assert host.hypervisor.audit().clean


def test_frame_of_a_foreign_group_takes_no_new_sharers(host: QtestHost) -> None:
    """The two shared; now they are apart. A page of the same guest must not join what the other one still reads."""
    assert not any(share(host, pages_of(FIRST), pages_of(SECOND)))
    host.hypervisor.close()
    host.guests[0].write((FIRST_GFN + 100) * PAGE_SIZE, page(1))
    with QtestHost(host.guests, groups={}) as apart:
        on_frame, own = pages_of(FIRST, count=1), pages_of(FIRST, FIRST_GFN + 100, 1)
        assert share(apart, on_frame, own) == [Status.EXDEV]
        assert share(apart, own, on_frame) == [Status.EXDEV]
        assert apart.hypervisor.frames_of(own).tolist() == [-1]


def test_control_area_that_only_looks_like_one_is_not_trusted() -> None:
    real = ControlArea.create()
    forged = os.memfd_create(CONTROL_NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(forged, CONTROL_BYTES)
    os.pwrite(forged, bytes(real.memory), 0)
    syscalls.add_seals(forged, syscalls.get_seals(real.file))
    unsealed = os.memfd_create(CONTROL_NAME, os.MFD_ALLOW_SEALING)
    os.ftruncate(unsealed, CONTROL_BYTES)
    os.setxattr(unsealed, "trusted.memshr", b"agent")
    assert is_ours(real.file)
    assert not is_ours(forged), "it has root's owner and mode, but not the mark"
    assert not is_ours(unsealed), "it could be cut short under our feet"
    with pytest.raises(PermissionError):
        os.ftruncate(real.file, 4096)
    real.close()
    os.close(forged)
    os.close(unsealed)


def test_zombie_is_left_out(host: QtestHost) -> None:
    handles = [host.hypervisor.nominate_gfns(pages_of(domid))[0] for domid in BOTH]
    os.kill(host.guests[1].pid, signal.SIGKILL)
    stat = Path(f"/proc/{host.guests[1].pid}/stat")
    wait_until(lambda: stat.read_text().rpartition(")")[2].split()[0] == "Z", 10, "it is a zombie")
    assert list(host.hypervisor.names()) == [FIRST]
    assert opened(host, SECOND).state is GuestState.GONE
    statuses = host.hypervisor.share_gfns_many(pages_of(FIRST), handles[0], pages_of(SECOND), handles[1])
    assert statuses.tolist() == [Status.ESRCH] * 8
    host.write(FIRST, Gfn(FIRST_GFN), b"goes on")
    assert host.hypervisor.audit().clean


def test_close_lets_everything_go_also_if_one_part_fails(qtest_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    hypervisor = QemuHypervisor([process_of(guest) for guest in qtest_pair], groups={})
    for domid in BOTH:
        hypervisor.control(domid, True)
        hypervisor.nominate_gfns(pages_of(domid))
    before = sys.getswitchinterval()
    first = hypervisor._books.guests[0]
    injector = hypervisor._injector._process

    def fails() -> None:
        raise OSError(5, "a defect of the host")

    monkeypatch.setattr(first.target, "close", fails)
    with pytest.raises(OSError, match="defect of the host"):
        hypervisor.close()
    monkeypatch.undo()
    first.target.close()
    for guest in qtest_pair:
        guest.write(FIRST_GFN * PAGE_SIZE, b"goes on")
        assert lock.holder_of(guest.pid) is None
    assert injector is not None
    assert injector.poll() is not None
    assert before == pytest.approx(protection.SWITCH_INTERVAL_S)
    assert sys.getswitchinterval() > 2 * before


def test_switch_interval_is_put_back_in_whatever_order_hosts_are_closed(qtest_pair: Pair) -> None:
    before = sys.getswitchinterval()
    hosts = [QtestHost([guest], groups={}).hypervisor for guest in qtest_pair]
    assert sys.getswitchinterval() == pytest.approx(protection.SWITCH_INTERVAL_S)
    for host in hosts:
        assert sys.getswitchinterval() == pytest.approx(protection.SWITCH_INTERVAL_S)
        host.close()
    assert sys.getswitchinterval() == before


def test_books_that_contradict_themselves_stop_everything(qtest_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    qtest_pair[0].write(FIRST_GFN * PAGE_SIZE, page(1) * 8)
    with QemuHypervisor([process_of(qtest_pair[0])], groups={}) as hypervisor:

        def fails(*_: object) -> None:
            raise InvariantError("the guest's QEMU pretends to share")

        monkeypatch.setattr(hypervisor._books, "rebuild", fails)
        for _ in range(2):
            with pytest.raises(InvariantError, match="pretends"):
                hypervisor.nominate_gfns(pages_of(FIRST))
        assert hypervisor._books.guests[0].link is None
        qtest_pair[0].write(FIRST_GFN * PAGE_SIZE, b"goes on")


def test_guest_that_cannot_be_attached_is_tried_once(qtest_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    with QemuHypervisor([process_of(guest) for guest in qtest_pair], groups={"all": BOTH}) as hypervisor:
        tries: list[int] = []
        target = hypervisor._books.guests[0].target

        def refuses(*_: object) -> None:
            tries.append(1)
            raise RefusedDomainError("not this one", reasons=["a reason"])

        monkeypatch.setattr(target, "connect", refuses)
        both = PageArray(np.array([1, 1, 2, 2], np.uint16), np.tile(np.arange(FIRST_GFN, FIRST_GFN + 2), 2))
        for _ in range(3):
            _, statuses = hypervisor.nominate_gfns(both)
            assert statuses.tolist() == [Status.EXDEV, Status.EXDEV, 0, 0]
        assert len(tries) == 1
        monkeypatch.undo()
        hypervisor.control(FIRST, True)
        assert not hypervisor.nominate_gfns(both)[1].any()


def test_half_made_attachment_is_none(qtest_pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    guest = qtest_pair[0]
    with QemuHypervisor([process_of(guest)], groups={}) as hypervisor:
        attachment = hypervisor._books.guests[0]

        def fails() -> None:
            raise KeyboardInterrupt

        monkeypatch.setattr(attachment, "register", fails)
        with pytest.raises(KeyboardInterrupt):
            hypervisor.nominate_gfns(pages_of(FIRST))
        monkeypatch.undo()
        assert (attachment.state, attachment.link) == (GuestState.LOOKING, None)
        assert lock.holder_of(guest.pid) is None
        assert not hypervisor._watches
        guest.write(FIRST_GFN * PAGE_SIZE, b"goes on")
        assert not hypervisor.nominate_gfns(pages_of(FIRST))[1].any()
        guest.write(FIRST_GFN * PAGE_SIZE, b"goes on too")


def test_interrupted_nomination_of_two_guests_leaves_none_of_either(
    host: QtestHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    nominate = PageStates.nominate

    def interrupted(states: PageStates, guest: Attachment, ids: PageIds) -> object:
        if guest.domid == SECOND:
            raise KeyboardInterrupt
        return nominate(states, guest, ids)

    monkeypatch.setattr(PageStates, "nominate", interrupted)
    both = PageArray(np.array([1, 2], np.uint16), np.array([FIRST_GFN, FIRST_GFN]))
    with pytest.raises(KeyboardInterrupt):
        host.hypervisor.nominate_gfns(both)
    monkeypatch.undo()
    assert host.hypervisor.counters().used_frames == 0
    assert not len(host.hypervisor._states.all_nominated())
    guest = opened(host, FIRST)
    assert not pagemap.is_protected(guest.entries(guest.pages_of_gfns(pages_of(FIRST).gfns))).any()
    written = threading.Event()

    def write() -> None:
        host.write(FIRST, Gfn(FIRST_GFN), b"x")
        written.set()

    writer = threading.Thread(target=write)
    writer.start()
    assert written.wait(20)
    writer.join()
    assert not any(share(host, pages_of(FIRST)[1:], pages_of(SECOND)[1:]))


def pools_of(guest: QtestGuest) -> set[int]:
    """The inodes of all pools that a QEMU has mapped or open."""
    mapped = {each.inode for each in process_mappings(guest.pid) if "memshr-pool" in each.path}
    links = [path for path in Path(f"/proc/{guest.pid}/fd").iterdir() if "memshr-pool" in os.fspath(path.readlink())]
    return mapped | {path.stat().st_ino for path in links}


def test_frame_that_only_one_guest_is_on_is_not_for_the_others_to_read(host: QtestHost) -> None:
    """A QEMU can read all of a pool that it has been given. What another guest has twice is not its business."""
    one, two = host.guests
    for guest in host.guests:
        guest.write((FIRST_GFN + 100) * PAGE_SIZE, page(7 + guest.pid) * 2)
    for domid in BOTH:
        secret = pages_of(domid, FIRST_GFN + 100, 2)
        assert not any(share(host, secret[:1], secret[1:]))
    secrets = {each.pool.file[1]: each.pool.owner for each in host.hypervisor._books.pools if each.pool.owner}
    assert len(secrets) == 2
    assert pools_of(one) & pools_of(two) & set(secrets) == set()
    assert not any(share(host, pages_of(FIRST), pages_of(SECOND))), "the others are shared as before"
    assert pools_of(one) & pools_of(two)
    assert pools_of(one) & pools_of(two) & set(secrets) == set()
    assert host.hypervisor.audit().clean


def test_frame_of_one_guest_moves_when_another_joins_it(host: QtestHost) -> None:
    twins = pages_of(FIRST, count=2)
    assert not any(share(host, twins[:1], twins[1:]))
    owned = host.hypervisor.frames_of(twins)
    handle = host.hypervisor.nominate_gfn(FIRST, Gfn(FIRST_GFN))
    joining = pages_of(SECOND, count=3)
    assert not any(share(host, twins[np.array([0, 0, 0])], joining))
    assert host.hypervisor.nominate_gfn(FIRST, Gfn(FIRST_GFN)) == handle, "its handle goes with it"
    together = host.hypervisor.frames_of(PageArray.of_domain(FIRST, twins.gfns)).tolist()
    assert len({*together, *host.hypervisor.frames_of(joining).tolist()}) == 1
    assert together[0] != owned[0]
    assert host.hypervisor.debug_gfn(SECOND, Gfn(FIRST_GFN)) == 5
    assert [figures.used_frames for figures in host.hypervisor.pool_figures()].count(1) == 1
    assert sum(figures.backed_bytes for figures in host.hypervisor.pool_figures()) == PAGE_SIZE
    assert host.hypervisor.audit().clean
    host.hypervisor.close()
    with QtestHost(host.guests) as later:  # and the other way round: two frames of one guest each become one
        for domid in BOTH:
            fresh = pages_of(domid, FIRST_GFN + 4, 2)
            assert not any(share(later, fresh[:1], fresh[1:]))
        assert not any(share(later, pages_of(FIRST, FIRST_GFN + 4, 1), pages_of(SECOND, FIRST_GFN + 4, 1)))
        assert later.hypervisor.debug_gfn(SECOND, Gfn(FIRST_GFN + 5)) == 4
        assert later.hypervisor.audit().clean
        for domid in BOTH:
            assert later.read(domid, Gfn(FIRST_GFN + 5)) == page(1)


def test_pool_of_another_guest_alone_is_a_finding(host: QtestHost) -> None:
    twins = pages_of(FIRST, count=2)
    assert not any(share(host, twins[:1], twins[1:]))
    key = opened(host, FIRST).process.key
    (own,) = [each.pool for each in host.hypervisor._books.pools if each.pool.owner == key]
    thief = opened(host, SECOND)
    link = thief.working_link()
    readable = own.readable()
    number = link.give(readable)
    os.close(readable)
    hva = int(thief.hvas[thief.pages_of_gfns(np.array([FIRST_GFN + 50]))[0]])
    assert link.call(syscalls.NR_MMAP, hva, PAGE_SIZE, 3, syscalls.MAP_PRIVATE | syscalls.MAP_FIXED, number, 0) == hva
    findings = {(each.invariant, each.domid) for each in host.hypervisor.audit().findings}
    assert ("I10", SECOND) in findings


def test_guests_of_one_group_that_were_shared_one_by_one_are_shared_together(qemu: Path) -> None:
    """Each run over one guest alone makes a pool of its own, as it cannot know who reads the others."""
    count = 7
    with booted(qemu, *(f"one-of-{number}" for number in range(count)), memory_mib=16) as guests:
        for guest in guests:
            guest.write(FIRST_GFN * PAGE_SIZE, page(1) * 8)
            with QtestHost([guest], groups={"all": [FIRST]}) as alone:
                assert not any(share(alone, pages_of(FIRST, count=4), pages_of(FIRST, FIRST_GFN + 4, 4)))
        with QtestHost(guests) as together:
            assert len(together.hypervisor._books.pools) == count
            for number in range(2, count + 1):
                sources, clients = pages_of(FIRST), pages_of(DomId(number))
                assert not any(share(together, sources, clients))
            assert len(np.unique(together.hypervisor.frames_of(pages_of(DomId(count))))) == 4
            assert together.hypervisor.audit().clean
            for guest in guests:
                given = [
                    link for link in Path(f"/proc/{guest.pid}/fd").iterdir() if "pool" in os.fspath(link.readlink())
                ]
                assert len(given) <= 3, "those that it needs"
            for number in range(1, count + 1):
                together.hypervisor.detach(DomId(number))
        for guest in guests:
            assert guest.read(FIRST_GFN * PAGE_SIZE, 8 * PAGE_SIZE) == page(1) * 8
            assert "memshr" not in Path(f"/proc/{guest.pid}/maps").read_text()


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(12, "no memory"), BackendError("a defect")])
def test_nomination_that_fails_half_way_leaves_none(
    host: QtestHost, monkeypatch: pytest.MonkeyPatch, error: BaseException | type[BaseException]
) -> None:
    guest = opened(host, FIRST)
    protect = guest.protect

    def fails(pages: Pages) -> None:
        protect(pages[:4])
        monkeypatch.undo()
        raise error

    monkeypatch.setattr(guest, "protect", fails)
    with pytest.raises(error if isinstance(error, type) else type(error)):
        host.hypervisor.nominate_gfns(pages_of(FIRST))
    assert not len(host.hypervisor._states.all_nominated())
    assert not pagemap.is_protected(guest.entries(guest.pages_of_gfns(pages_of(FIRST).gfns))).any()
    handles = [host.hypervisor.nominate_gfns(pages_of(domid))[0] for domid in BOTH]
    host.write(FIRST, Gfn(FIRST_GFN + 1), b"after the comparison")
    statuses = host.hypervisor.share_gfns_many(pages_of(FIRST), handles[0], pages_of(SECOND), handles[1])
    assert np.flatnonzero(statuses).tolist() == [1]
    assert host.read(FIRST, Gfn(FIRST_GFN + 1))[:20] == b"after the comparison"


def test_page_that_lost_its_protection_is_left_alone_also_if_nobody_wrote(host: QtestHost) -> None:
    """As KSM would do it. Its bytes are still equal, but a write between comparison and mapping would be lost."""
    handles = [host.hypervisor.nominate_gfns(pages_of(domid))[0] for domid in BOTH]
    guest = opened(host, SECOND)
    hva = int(guest.hvas[guest.pages_of_gfns(np.array([FIRST_GFN + 3]))[0]])
    guest.working_link().unprotect([(hva, PAGE_SIZE)])
    statuses = host.hypervisor.share_gfns_many(pages_of(FIRST), handles[0], pages_of(SECOND), handles[1])
    assert np.flatnonzero(statuses).tolist() == [3]
    assert "1 pages were no longer protected" in host.hypervisor.trouble[0]


def test_bytes_of_another_program_are_nobody_elses_to_see(host: QtestHost, monkeypatch: pytest.MonkeyPatch) -> None:
    """A QEMU may execute a set-uid program while its memory is read."""
    monkeypatch.setattr(opened(host, FIRST).target, "is_itself", lambda: False)
    assert share(host, pages_of(FIRST), pages_of(SECOND)) == [Status.ESRCH] * 8
    assert opened(host, FIRST).state is GuestState.LOST
    assert sum(figures.backed_bytes for figures in host.hypervisor.pool_figures()) == 0
    host.write(SECOND, Gfn(FIRST_GFN), b"goes on")


def test_what_a_dead_memshr_was_building_is_cleared_away(host: QtestHost) -> None:
    link = opened(host, FIRST).working_link()
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED
    side = link.side_address
    assert link.call(syscalls.NR_MMAP, side, 4 * PAGE_SIZE, 3, flags, 2**64 - 1, 0) == side
    host.hypervisor.close()
    place = f"{side:x}-{side + 4 * PAGE_SIZE:x} "
    maps = Path(f"/proc/{host.guests[0].pid}/maps")
    assert place in maps.read_text()
    with QtestHost(host.guests):
        assert place not in maps.read_text()


def test_frames_of_a_guest_that_was_given_up_are_kept(host: QtestHost) -> None:
    assert not any(share(host, pages_of(FIRST), pages_of(SECOND)))
    opened(host, SECOND).lose(OSError(5, "a defect of the host"))
    host.hypervisor.unshare_guest(FIRST)
    host.hypervisor.punch_unread()
    assert host.read(SECOND, Gfn(FIRST_GFN + 2)) == page(1), "it reads its frames as before"
    assert host.hypervisor.audit().clean


def test_guest_that_is_attached_only_because_it_reads_a_frame_gets_the_pool_too(qemu: Path) -> None:
    """Two frames become one. A third guest is on one of them, and nobody has named it."""
    with booted(qemu, "first", "second", "third", memory_mib=16) as guests:
        for guest in guests:
            guest.write(FIRST_GFN * PAGE_SIZE, page(1) * 2)
        third = DomId(3)
        with QtestHost(guests) as host:
            for domid in (SECOND, third):
                assert not any(share(host, pages_of(FIRST, count=1), pages_of(domid, count=1)))
            assert not any(share(host, pages_of(FIRST, FIRST_GFN + 1, 1), pages_of(SECOND, FIRST_GFN + 1, 1)))
        with QemuHypervisor([process_of(guest) for guest in guests], groups={"all": (1, 2, 3)}) as later:
            source, client = pages_of(FIRST, FIRST_GFN + 1, 1), pages_of(SECOND, count=1)
            handles = [later.nominate_gfns(each)[0] for each in (source, client)]
            assert later._books.guests[2].link is None
            assert later.share_gfns_many(source, handles[0], client, handles[1]).tolist() == [0]
            assert later.debug_gfn(third, Gfn(FIRST_GFN)) == 5
            assert later.audit().clean
            for domid in (FIRST, SECOND, third):
                later.detach(domid)
        for guest in guests:
            assert guest.read(FIRST_GFN * PAGE_SIZE, 2 * PAGE_SIZE) == page(1) * 2


@pytest.mark.parametrize("when", [1, 2, 3])
def test_descriptor_that_the_agent_has_just_got_ends_with_us(
    qtest_pair: Pair, monkeypatch: pytest.MonkeyPatch, when: int
) -> None:
    """We die between its getting one and our noting that: the device, the userfaultfd, a pool."""
    guest = qtest_pair[0]

    def descriptors() -> list[str]:
        found = [path.readlink() for path in Path(f"/proc/{guest.pid}/fd").iterdir()]
        return sorted(str(link) for link in found if "memfd:memshr" in str(link) or "userfaultfd" in str(link))

    guest.write(FIRST_GFN * PAGE_SIZE, page(1) * 8)
    with QtestHost([guest], groups={}):
        pass
    wait_until(lambda: not descriptors(), 10, "the agent has closed what it had")
    kept = agent.AgentLink._kept
    times: list[int] = []

    def dies(link: agent.AgentLink, number: int) -> None:
        times.append(number)
        if len(times) == when:
            raise KeyboardInterrupt
        kept(link, number)

    monkeypatch.setattr(agent.AgentLink, "_kept", dies)
    with pytest.raises(KeyboardInterrupt), QtestHost([guest], groups={}) as host:
        share(host, pages_of(FIRST, count=4), pages_of(FIRST, FIRST_GFN + 4, 4))
    monkeypatch.undo()
    assert len(times) == when
    wait_until(lambda: not descriptors(), 10, "the agent has closed what it had")
    guest.write(FIRST_GFN * PAGE_SIZE, b"goes on")
