"""The Xen mechanism's own rules, on the stand-in: what it refuses, what it never issues, what it tells and maps."""

import errno
import random
import secrets
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from guests.throwaway import ThrowawayDomains, ThrowawayGuests
from memshr import errors
from memshr.content.fingerprint import SEED_BITS
from memshr.errors import MemshrError, Status
from memshr.hypervisor import Capability
from memshr.sharing.session import SharingOptions, share
from memshr.testing import FAULTS, check_hypervisor
from memshr.trust import Group
from memshr.types import PAGE_SIZE, DomainKind, DomId, Gfn, Handle, PageArray
from memshr.xen import XenHypervisor, connect, runs_xen
from memshr.xen.audit import Auditor
from memshr.xen.connection import Connection
from memshr.xen.libxc import RELEASES, DominfFlag, Libxc, Release
from memshr.xen.mappings import BATCH_PAGES
from memshr.xen.names import Names
from memshr.xen.sharers import Sharers
from standin.xen import Build, StandIn, open_stand_in

SELFTEST = Path(__file__).parents[2] / "tools" / "xen-selftest"


def calls(stand_in: StandIn, name: str) -> list[list[object]]:
    return [arguments for called, *arguments in stand_in.calls if called == name]


def host(count: int, pages: int = 16) -> tuple[StandIn, XenHypervisor, list[DomId]]:
    """A stand-in with some domains of equal contents, sharing enabled on all of them."""
    stand_in = StandIn()
    hypervisor = open_stand_in(stand_in)
    domids = [stand_in.embedded.create_domain(f"d{i}", pages) for i in range(count)]
    for domid in domids:
        hypervisor.control(domid, True)
    return stand_in, hypervisor, domids


def shared(hypervisor: XenHypervisor, *pages: tuple[DomId, int]) -> Handle:
    """Put pages on one frame, that of the first."""
    (source, *clients) = [(domid, Gfn(gfn)) for domid, gfn in pages]
    handle = hypervisor.nominate_gfn(*source)
    for client in clients:
        hypervisor.share_gfns(*source, handle, *client, hypervisor.nominate_gfn(*client))
    return handle


# -- finding and opening the hypervisor ------------------------------------------------------------------------------

REFUSED_HOSTS: dict[str, tuple[StandIn, type[MemshrError], str]] = {
    "no control interface": (
        StandIn(refuse={"xc_interface_open": errno.ENOENT}),
        errors.UnsupportedError,
        "not the control domain of a Xen host; boot",
    ),
    "not root": (StandIn(refuse={"xc_interface_open": errno.EACCES}), errors.PermissionDeniedError, "run as root"),
    "no foreign memory": (
        StandIn(refuse={"xenforeignmemory_open": errno.EACCES}),
        errors.PermissionDeniedError,
        "foreign-memory interface cannot be opened",
    ),
    "not privileged": (
        StandIn(refuse={"xc_domain_getinfolist": errno.EPERM}),
        errors.PermissionDeniedError,
        "does not let this domain list domains; run in dom0",
    ),
    "a later hypervisor": (StandIn(running=Release(4, 23)), errors.UnsupportedError, r"Xen 4\.23 is not known"),
    "another hypervisor than the library": (
        StandIn(running=Release(4, 19)),
        errors.UnsupportedError,
        r"Xen 4\.19 runs here, but the installed library is that of 4\.17; install libxenctrl\.so\.4\.19",
    ),
    "a function is missing": (
        StandIn(missing=frozenset({"xc_memshr_range_share"})),
        errors.UnsupportedError,
        "has no function xc_memshr_range_share",
    ),
    "another structure": (
        StandIn(domaininfo_bytes=120),
        errors.UnsupportedError,
        r"fills 120 bytes for a domain, Xen 4\.17 has 112",
    ),
    "an older structure": (StandIn(domaininfo_bytes=104), errors.UnsupportedError, "fills 104 bytes"),
    "dom0 is PVH": (StandIn(dom0_flags=DominfFlag.HVM_GUEST), errors.UnsupportedError, "dom0 is PVH.*; boot Xen"),
}


@pytest.mark.parametrize("what", REFUSED_HOSTS)
def test_a_host_that_cannot_serve_is_refused_in_one_line(what: str) -> None:
    stand_in, kind, text = REFUSED_HOSTS[what]
    with pytest.raises(kind, match=text) as refused:
        open_stand_in(stand_in)
    assert refused.value.exit_code == 3
    assert "\n" not in str(refused.value)


def test_without_a_library_the_sonames_are_named() -> None:
    with pytest.raises(errors.UnsupportedError, match=r"libxenctrl\.so\.4\.14 to \.4\.20.*; install"):
        connect(lambda _: None)


@pytest.mark.parametrize("release", RELEASES, ids=str)
def test_every_release_opens_with_its_own_structures(release: Release) -> None:
    with open_stand_in(StandIn(release=release)) as hypervisor:
        assert hypervisor.facts.version == f"{release}.7-standin"
        assert hypervisor.domains() == []


def test_of_two_libraries_the_hypervisors_own_is_used() -> None:
    stand_ins = {
        release: StandIn(release=release, running=Release(4, 16)) for release in (Release(4, 16), Release(4, 20))
    }

    def load(release: Release) -> Libxc | None:
        return stand_ins[release].load(release) if release in stand_ins else None

    connection = connect(load)
    assert connection.libxc.release == (4, 16)
    assert calls(stand_ins[Release(4, 20)], "xc_interface_close") == [[]]
    connection.close()


def test_on_this_machine_the_real_library_says_that_there_is_no_xen() -> None:
    if runs_xen():
        pytest.skip("this machine runs Xen")
    with pytest.raises(errors.UnsupportedError, match=r"no libxenctrl found|not the control domain of a Xen host"):
        connect()


# -- looking ---------------------------------------------------------------------------------------------------------


def test_domains_are_told_with_their_kind_and_state() -> None:
    stand_in, hypervisor, (first, second) = host(2)
    kinds = [stand_in.embedded.create_domain(kind, 4, kind=kind) for kind in (DomainKind.PV, DomainKind.SHADOW)]
    hypervisor.unpause(first)
    hypervisor.nominate_gfn(second, Gfn(1))
    told = {info.domid: info for info in hypervisor.domains()}
    assert [told[domid].kind for domid in (first, second, *kinds)] == ["hvm", "hvm", "pv", "shadow"]
    assert (told[first].pause_count, told[second].pause_count) == (0, 1)
    assert (told[second].tot_pages, told[second].shr_pages, told[second].max_pages) == (15, 1, 80)
    assert told[first].name == f"dom{first}"


def test_domains_are_selected_as_users_name_them(tmp_path: Path) -> None:
    command = tmp_path / "xenstore-read"
    command.write_text("#!/bin/sh\ncase $1 in */1/name) echo web;; */2/name) echo db;; *) echo twin;; esac\n")
    command.chmod(0o755)
    stand_in = StandIn()
    for kind in (DomainKind.HVM, DomainKind.PV, DomainKind.HVM, DomainKind.SHADOW):
        stand_in.embedded.create_domain(kind, 4, kind=kind)
    with open_stand_in(stand_in, lambda: Names(str(command))) as hypervisor:
        assert [info.domid for info in hypervisor.select("all")] == [1, 2, 3, 4]
        assert [info.domid for info in hypervisor.select("web")] == [1]
        assert [info.domid for info in hypervisor.select("2")] == [2]
        for name, text in (
            ("twin", "2 domains are called"),
            ("9", "no domain 9"),
            ("mail", r"no domain is called.*web"),
        ):
            with pytest.raises(errors.NoSuchDomainError, match=text):
                hypervisor.select(name)


def test_more_domains_than_one_call_lists_are_all_listed() -> None:
    _, hypervisor, domids = host(600, 1)
    assert [info.domid for info in hypervisor.domains()] == domids


def test_names_come_from_xenstore_read(tmp_path: Path) -> None:
    command = tmp_path / "xenstore-read"
    command.write_text('#!/bin/sh\ntest "$1" = /local/domain/7/name && echo web\n')
    command.chmod(0o755)
    names = Names(str(command))
    assert (names[7], names[8]) == ("web", "dom8")
    command.write_text("#!/bin/sh\necho other\n")
    assert names[7] == "web"
    names.forget_all_but([8])
    assert names[7] == "other"


def test_reading_takes_one_mapping_for_many_pages_and_keeps_none() -> None:
    pages = 2 * BATCH_PAGES + 100
    stand_in, hypervisor, (domid,) = host(1, pages)
    stand_in.embedded.write(domid, Gfn(pages - 1), b"last")
    stand_in.embedded.decrease_reservation(domid, Gfn(5000))
    stand_in.calls.clear()
    assert hypervisor.populated_ranges(domid).tolist() == [[0, 5000], [5001, pages - 5001]]
    assert len(calls(stand_in, "xenforeignmemory_map")) == 3
    buffer = np.empty((pages, PAGE_SIZE), np.uint8)
    read = hypervisor.read_range(domid, Gfn(5001), pages - 5001, buffer)
    assert read[-1, :4].tobytes() == b"last"
    assert len(calls(stand_in, "xenforeignmemory_map")) == 4
    assert stand_in.mapped_pages == 0
    _, statuses = hypervisor.nominate_gfns(PageArray.of_domain(domid, np.arange(100)))
    assert not statuses.any()


def test_scattered_pages_land_in_their_rows() -> None:
    stand_in, hypervisor, (first, second) = host(2, 64)
    order = np.random.default_rng(1).permutation(128)
    for i in range(128):
        stand_in.embedded.write((first, second)[i & 1], Gfn(i >> 1), bytes([i]) * 16)
    pages = PageArray(np.array([first, second], np.uint16)[order & 1], order >> 1)
    stand_in.calls.clear()
    out = np.zeros((128, PAGE_SIZE), np.uint8)
    assert not hypervisor.read_pages(pages, out).any()
    assert out[:, 0].tolist() == order.tolist()
    assert len(calls(stand_in, "xenforeignmemory_map")) == 2


def test_a_gfn_beyond_the_address_width_never_reaches_a_mapping() -> None:
    stand_in, hypervisor, (domid,) = host(1)
    hypervisor.nominate_gfn(domid, Gfn(0))
    for gfn in (1 << 52, 1 << 40, -1, 1 << 62):  # 1 << 52 would be gfn 0 in a page table entry, 1 << 62 a grant
        with pytest.raises(errors.NotSharableError):
            hypervisor.unshare_gfn(domid, Gfn(gfn))
        with pytest.raises(errors.NotSharableError):
            hypervisor.nominate_gfn(domid, Gfn(gfn))
    assert calls(stand_in, "xenforeignmemory_map") == []
    assert hypervisor.debug_gfn(domid, Gfn(0)) == 1


def test_a_domain_that_goes_away_in_mid_scan_says_so() -> None:
    stand_in, hypervisor, (first, second) = host(2)
    buffer = np.empty((16, PAGE_SIZE), np.uint8)
    hypervisor.read_range(first, Gfn(0), 16, buffer)
    stand_in.embedded.destroy_domain(first)
    with pytest.raises(errors.NoSuchDomainError, match=f"no domain {first}"):
        hypervisor.read_range(first, Gfn(0), 16, buffer)
    pages = PageArray(np.array([first, second], np.uint16), np.array([0, 0]))
    assert hypervisor.read_pages(pages, buffer).tolist() == [Status.ESRCH, 0]
    assert hypervisor.unshare_gfns(pages).tolist() == [Status.ESRCH, 0]
    assert hypervisor.nominate_gfns(pages)[1].tolist() == [Status.ESRCH, 0]
    with pytest.raises(errors.NoSuchDomainError):
        hypervisor.populated_ranges(first)


def test_domains_that_a_look_would_harm_are_not_looked_at() -> None:
    stand_in, hypervisor, (domid,) = host(1)
    paravirtualised = stand_in.embedded.create_domain("pv", 4, kind=DomainKind.PV)
    stand_in.pod_entries[domid] = 12
    buffer = np.empty((4, PAGE_SIZE), np.uint8)
    for refused, text in (
        (domid, "12 populate-on-demand pages.*; start it with memory = maxmem"),
        (paravirtualised, "paravirtualised"),
        (DomId(0), "control domain"),
    ):
        with pytest.raises(errors.RefusedDomainError, match=text):
            hypervisor.populated_ranges(refused)
        with pytest.raises(errors.RefusedDomainError, match=text):
            hypervisor.read_range(refused, Gfn(0), 4, buffer)
    assert calls(stand_in, "xenforeignmemory_map") == []


# -- answers ---------------------------------------------------------------------------------------------------------


def test_without_memory_sharing_a_host_can_be_read_and_nothing_else() -> None:
    stand_in = StandIn(build=Build.WITHOUT)
    with open_stand_in(stand_in) as hypervisor:
        domid = stand_in.embedded.create_domain("A", 8)
        assert hypervisor.capabilities == {Capability.LIVE}
        assert hypervisor.populated_ranges(domid).tolist() == [[0, 8]]
        for call in (
            lambda: hypervisor.control(domid, True),
            lambda: hypervisor.nominate_gfn(domid, Gfn(0)),
            lambda: hypervisor.nominate_gfns(PageArray.of_domain(domid, np.arange(2))),
            hypervisor.audit,
            hypervisor.counters,
            lambda: hypervisor.unshare_gfn(domid, Gfn(0)),
            lambda: hypervisor.fork(domid, domid),
        ):
            with pytest.raises(errors.UnsupportedError, match="built without memory sharing; build the hypervisor"):
                call()


def test_errno_9_and_10_are_handles_in_a_share_and_a_lost_connection_elsewhere() -> None:
    stand_in, hypervisor, (first, second) = host(2)
    pages = (first, Gfn(1)), (second, Gfn(1))
    handles = [hypervisor.nominate_gfn(*page) for page in pages]
    for wrong, status, side in (((77, handles[1]), -10, "source"), ((handles[0], 77), -9, "client")):
        with pytest.raises(errors.StaleHandleError) as stale:
            hypervisor.share_gfns(*pages[0], Handle(wrong[0]), *pages[1], Handle(wrong[1]))
        assert (stale.value.status, stale.value.side) == (status, side)
    stand_in.refuse["xc_memshr_nominate_gfn"] = errno.EBADF
    with pytest.raises(errors.ConnectionLostError, match=r"nominate_gfn.*Bad file descriptor"):
        hypervisor.nominate_gfn(first, Gfn(2))
    stand_in.refuse["xc_memshr_nominate_gfn"] = errno.EACCES
    with pytest.raises(errors.PermissionDeniedError, match="XSM"):
        hypervisor.nominate_gfn(first, Gfn(2))


def test_what_an_errno_means_is_looked_up() -> None:
    stand_in, hypervisor, (first, second) = host(2)
    handle = hypervisor.nominate_gfn(first, Gfn(1))
    off = stand_in.embedded.create_domain("off", 4)
    with pytest.raises(errors.SharingDisabledError, match=f"not enabled on domain {off}"):
        hypervisor.share_gfns(first, Gfn(1), handle, off, Gfn(1), Handle(2))
    assert not stand_in.embedded.books.domains[off].sharing_enabled, "a refused share enables nothing"
    for pair in ((first, DomId(99)), (DomId(99), first)):
        with pytest.raises(errors.NoSuchDomainError, match="no domain 99"):
            hypervisor.share_gfns(pair[0], Gfn(1), handle, pair[1], Gfn(1), handle)
    with pytest.raises(errors.RefusedDomainError, match="domain 0 is the control domain"):
        hypervisor.share_gfns(first, Gfn(1), handle, DomId(0), Gfn(1), handle)
    stand_in.refuse["xc_memshr_control"] = errno.EOPNOTSUPP
    another = stand_in.embedded.create_domain("amd", 4)
    with pytest.raises(errors.UnsupportedError, match="only on Intel processors"):
        hypervisor.nominate_gfn(another, Gfn(1))
    mapping = stand_in.embedded.map_foreign(second, Gfn(3), writable=False)
    stand_in.embedded.destroy_domain(second)
    with pytest.raises(errors.DomainDyingError, match=f"domain {second} is being destroyed"):
        hypervisor.nominate_gfn(second, Gfn(1))
    mapping.close()


def test_a_domain_that_cannot_share_is_never_named_first_in_a_sharing_hypercall() -> None:
    stand_in, hypervisor, _ = host(1)
    paravirtualised = stand_in.embedded.create_domain("pv", 4, kind=DomainKind.PV)
    with pytest.raises(errors.RefusedDomainError, match="paravirtualised"):
        hypervisor.nominate_gfn(paravirtualised, Gfn(0))
    assert calls(stand_in, "xc_memshr_nominate_gfn") == []


def test_an_old_fork_reset_is_not_given_flags_that_it_ignores() -> None:
    hypervisor = open_stand_in(StandIn(release=Release(4, 16)))
    with pytest.raises(errors.UnsupportedError, match=r"Xen 4\.16 resets state and memory together"):
        hypervisor.fork_reset(DomId(1), memory=True)


def test_unshare_writes_nothing() -> None:
    stand_in, hypervisor, (first, second) = host(2)
    stand_in.embedded.write(first, Gfn(1), b"same")
    stand_in.embedded.write(second, Gfn(1), b"same")
    shared(hypervisor, (first, 1), (second, 1))
    hypervisor.unshare_gfn(second, Gfn(1))
    assert stand_in.embedded.read(second, Gfn(1))[:4] == b"same"
    assert hypervisor.counters().freed_pages == 0
    assert [arguments[1] for arguments in calls(stand_in, "xenforeignmemory_map")] == [3]


# -- the share that Xen 4.17 does not survive -------------------------------------------------------------------------


def test_a_frame_whose_sharers_are_not_known_is_not_given_up() -> None:
    stand_in, hypervisor, (first, second) = host(2)
    group = shared(hypervisor, (second, 1), (second, 2))
    alone = hypervisor.nominate_gfn(first, Gfn(1))
    restarted = open_stand_in(stand_in)  # it did not see the group being made
    with pytest.raises(errors.BusyPageError) as refused:
        restarted.share_gfns(first, Gfn(1), alone, second, Gfn(1), group)
    assert refused.value.status == Status.EBUSY
    pages = PageArray.of_domain(first, np.array([1])), PageArray.of_domain(second, np.array([1]))
    handles = np.array([alone], np.uint64), np.array([group], np.uint64)
    assert restarted.share_gfns_many(pages[0], handles[0], pages[1], handles[1]).tolist() == [Status.EBUSY]
    restarted.share_gfns(second, Gfn(1), group, first, Gfn(1), alone)
    assert hypervisor.debug_gfn(first, Gfn(1)) == 3
    assert stand_in.crashes == []


def test_a_page_of_a_third_domain_that_came_by_itself_is_counted() -> None:
    stand_in, hypervisor, (first, second, third) = host(3)
    group = shared(hypervisor, (second, 1), (second, 2), (second, 3))
    alone = hypervisor.nominate_gfn(first, Gfn(1))
    # One of ours leaves, and one of somebody else's comes: the number of gfns is what it was.
    stand_in.embedded.write(second, Gfn(3), b"away")
    stand_in.embedded.add_to_physmap(second, Gfn(1), group, third, Gfn(50))
    assert hypervisor.debug_gfn(second, Gfn(1)) == 3
    with pytest.raises(errors.BusyPageError):
        hypervisor.share_gfns(first, Gfn(1), alone, second, Gfn(1), group)
    assert stand_in.crashes == []


def test_a_range_is_not_shared_over_frames_of_a_third_domain() -> None:
    stand_in, hypervisor, (first, second, third) = host(3)
    shared(hypervisor, (third, 5), (second, 5))
    with pytest.raises(errors.BusyPageError, match=f"gfn 5 of domain {second}"):
        hypervisor.range_share(first, second, Gfn(0), Gfn(15))
    assert calls(stand_in, "xc_memshr_range_share") == []
    hypervisor.range_share(first, second, Gfn(6), Gfn(15))
    hypervisor.range_share(first, second, Gfn(6), Gfn(15))  # again: every page is on its frame already
    assert hypervisor.counters().freed_pages == 11
    assert stand_in.crashes == []


def test_a_range_whose_steps_would_put_a_third_domain_on_a_frame_is_refused() -> None:
    # Two gfns of the client on one frame: the first step moves both to the source's frame, which a third domain has;
    # the second step would give that one up.
    stand_in, hypervisor, (first, second, third) = host(3)
    shared(hypervisor, (first, 1), (third, 1))
    shared(hypervisor, (second, 1), (second, 2))
    with pytest.raises(errors.BusyPageError):
        hypervisor.range_share(first, second, Gfn(1), Gfn(2))
    stand_in.embedded.range_share(first, second, Gfn(1), Gfn(2))
    assert stand_in.crashes == [(second, 2)]


def test_the_frames_of_a_forks_parent_are_not_given_up() -> None:
    stand_in, hypervisor, (parent, other) = host(2)
    child = stand_in.embedded.create_domain("child")
    hypervisor.fork(parent, child)
    handles = [hypervisor.nominate_gfn(domid, Gfn(1)) for domid in (parent, other)]
    with pytest.raises(errors.BusyPageError):
        hypervisor.share_gfns(other, Gfn(1), handles[1], parent, Gfn(1), handles[0])
    hypervisor.share_gfns(parent, Gfn(1), handles[0], other, Gfn(1), handles[1])
    stand_in.embedded.destroy_domain(child)
    handles = [hypervisor.nominate_gfn(domid, Gfn(2)) for domid in (parent, other)]
    hypervisor.share_gfns(other, Gfn(2), handles[1], parent, Gfn(2), handles[0])
    assert stand_in.crashes == []


@pytest.mark.parametrize("seed", range(4))
def test_no_walk_ever_gives_up_what_a_third_domain_maps(seed: int) -> None:
    stand_in, hypervisor, domids = host(4, 6)
    walk = random.Random(seed)
    handles: list[Handle] = [Handle(2)]
    refused = 0
    for _ in range(600):
        source, client = [(walk.choice(domids), Gfn(walk.randrange(8))) for _ in range(2)]
        handle, other = walk.choice(handles[-12:]), walk.choice(handles[-12:])
        try:
            match walk.randrange(8):
                case 0 | 1 | 2:
                    handles.append(hypervisor.nominate_gfn(*source))
                case 3 | 4:
                    handle, other = hypervisor.nominate_gfn(*source), hypervisor.nominate_gfn(*client)
                    hypervisor.share_gfns(*source, handle, *client, other)
                case 5:
                    hypervisor.share_gfns(*source, handle, *client, other)
                case 6:
                    hypervisor.range_share(source[0], client[0], Gfn(0), client[1])
                case 7:
                    stand_in.embedded.write(*client, bytes([walk.randrange(256)]))
        except errors.CallError as error:
            refused += error.status == Status.EBUSY
        assert stand_in.crashes == []
    assert refused
    assert hypervisor.audit().clean


def test_knowledge_of_groups_is_bounded() -> None:
    groups = Sharers(max_frames=2)
    page = DomId(1), Gfn(0)
    for handle in (2, 3, 4):
        groups.join(page, Handle(handle), (DomId(1), Gfn(handle)), Handle(90 + handle))
    assert groups.pages(Handle(2)) == frozenset()
    assert groups.pages(Handle(4)) == {page, (DomId(1), Gfn(4))}
    for gfn in range(2000):
        groups.plug(page, Handle(4), (DomId(2), Gfn(gfn)))
    assert len(groups.pages(Handle(4))) < 2000


# -- audit -----------------------------------------------------------------------------------------------------------


def test_our_count_agrees_with_the_books_however_they_are_shared() -> None:
    stand_in, hypervisor, (first, second, third) = host(3)
    shared(hypervisor, (first, 1), (second, 1), (third, 1))
    shared(hypervisor, (first, 2), (first, 3))
    hypervisor.nominate_gfn(second, Gfn(9))
    hypervisor.control(third, False)
    assert hypervisor.audit().clean
    assert not stand_in.embedded.books.domains[third].sharing_enabled, "an audit enables nothing"


SEEN_FROM_OUTSIDE = {"p2m entry changed under the reverse map", "freed_pages too high", "reference count too high"}


@pytest.mark.parametrize("fault", sorted(SEEN_FROM_OUTSIDE))
@pytest.mark.parametrize("audits", [True, False], ids=["with Xen's audit", "without"])
@pytest.mark.parametrize("bulk", [True, False], ids=["many at once", "one by one"])
def test_planted_faults_are_found(fault: str, audits: bool, bulk: bool) -> None:
    stand_in = StandIn(missing=frozenset() if bulk else frozenset({"xencall_open"}))
    hypervisor = open_stand_in(stand_in)
    first, second = (stand_in.embedded.create_domain(name, 16) for name in "AB")
    stand_in.build = Build.DEBUG if audits else Build.RELEASE
    shared(hypervisor, (first, 1), (second, 1))
    assert hypervisor.audit().clean
    FAULTS[fault][1](stand_in.embedded, second, Gfn(1))
    report = hypervisor.audit()
    assert report.findings
    assert report.xen_errors == (stand_in.embedded.audit().xen_errors if audits else None)


def test_what_xen_says_on_its_console_is_in_the_report() -> None:
    stand_in, hypervisor, (first, second) = host(2)
    stand_in.console = b"(XEN) something of long ago in mem_sharing.c\n" * 5000
    shared(hypervisor, (first, 1), (second, 1))
    FAULTS["frame owned by a domain"][1](stand_in.embedded, second, Gfn(1))
    said = [finding.found for finding in hypervisor.audit().findings]
    assert any("I1" in line for line in said)
    assert not any("long ago" in line for line in said)


def test_errors_that_an_unreadable_console_hides_are_told_all_the_same() -> None:
    stand_in, hypervisor, (first, second) = host(2)
    shared(hypervisor, (first, 1), (second, 1))
    stand_in.refuse["xc_readconsolering"] = errno.EPERM
    FAULTS["frame owned by a domain"][1](stand_in.embedded, second, Gfn(1))
    audited = hypervisor.audit()
    told = [finding for finding in audited.findings if "cannot be read" in finding.cause]
    assert [(finding.invariant, finding.found) for finding in told] == [("I3", str(audited.xen_errors))]
    assert audited.xen_errors


@pytest.mark.parametrize(
    ("line", "invariant"),
    [
        ("mfn 12 shared, but wrong owner (d1)!", "I1"),
        ("mfn 12 in audit list, but not PGT_shared_page (0)", "I1"),
        ("mfn 12 in audit list, but cannot be locked (0)!", "I1"),
        ("mfn 12 shared, but empty gfn list!", "I2"),
        ("Unknown dom: 7, for PFN=1, MFN=12", "I3"),
        ("Incorrect P2M for d2, PFN=1.Expecting MFN=12, got 13", "I3"),
        ("Mismatched counts for MFN=12.nr_gfns in list 1, in type_info 2", "I4"),
        ("Expected 1 shared mfns, found 2.", "I6"),
    ],
)
def test_what_xen_says_is_put_under_the_invariant_that_is_broken(line: str, invariant: str) -> None:
    assert Auditor._finding(f"arch/x86/mm/mem_sharing.c:613:d0v0 {line}").invariant == invariant


# -- above the seam --------------------------------------------------------------------------------------------------


def test_a_session_over_four_domains_shares_all_and_crashes_nothing() -> None:
    stand_in, hypervisor, domids = host(4, 300)
    generator = np.random.default_rng(3)
    contents = [generator.bytes(PAGE_SIZE) for _ in range(100)]
    for domid in domids:
        for gfn in range(300):
            stand_in.embedded.write(domid, Gfn(gfn), contents[gfn % 100])
    held = stand_in.embedded.map_foreign(domids[2], Gfn(7), writable=False)
    group = Group("all", tuple(domids), seed=secrets.randbits(SEED_BITS))
    options = SharingOptions(max_sharers=8, batch_pages=64)
    report = share(hypervisor, [group], wait=lambda _: None, options=options)
    held.close()
    assert stand_in.crashes == []
    assert stand_in.mapped_pages == 0
    assert report.dropped["busy"] == 1
    freed = hypervisor.counters().freed_pages
    assert freed == report.saved_pages
    share(hypervisor, [group], wait=lambda _: None, options=options)
    assert stand_in.crashes == []
    assert hypervisor.counters().freed_pages == freed + 1, "the page that was busy, and nothing else"
    for domid in domids:
        for gfn in range(300):
            assert stand_in.embedded.read(domid, Gfn(gfn)) == contents[gfn % 100]


def test_the_throw_away_domains_are_destroyed() -> None:
    stand_in = StandIn()
    connection: Connection = connect(stand_in.load)
    with XenHypervisor(connection, Names("")) as hypervisor:
        with ThrowawayDomains(connection) as domains:
            check_hypervisor(ThrowawayGuests(hypervisor, domains))
            assert len(hypervisor.domains()) == 2
        assert hypervisor.domains() == []


# -- the self-test ---------------------------------------------------------------------------------------------------


def selftest(*options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-W", "error", str(SELFTEST), *options]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("build", [Build.DEBUG, Build.RELEASE])
def test_the_self_test_passes_on_the_stand_in(build: Build) -> None:
    done = selftest(f"--stand-in={build}")
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    unchecked = [line for line in lines if line.startswith("not checked: ")]
    assert lines[-1] == f"{len(lines) - 2 - len(unchecked)} passed, 0 failed"
    assert all(line.startswith("ok    ") for line in lines[1 : -1 - len(unchecked)])
    assert any("Xen's own audit" in line for line in unchecked) == (build is Build.RELEASE)


@pytest.mark.parametrize("build", [Build.VMX, Build.WITHOUT])
def test_the_self_test_says_in_one_line_that_a_host_cannot_share(build: Build) -> None:
    done = selftest(f"--stand-in={build}")
    assert (done.returncode, len(done.stderr.splitlines())) == (3, 1)
    assert "FAIL" not in done.stdout
    assert {Build.VMX: "Intel", Build.WITHOUT: "built without memory sharing"}[build] in done.stderr


def test_the_self_test_says_in_one_line_that_there_is_no_xen() -> None:
    if runs_xen():
        pytest.skip("this machine runs Xen")
    done = selftest()
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr.startswith("xen-selftest: ")
    assert len(done.stderr.splitlines()) == 1
