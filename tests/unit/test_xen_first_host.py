"""What a first real Xen said: each fault that it showed, on a stand-in that behaves as that Xen did.

The stand-in is asked directly first where that is not obvious: it hangs, dies or miscounts as the real one.
"""

import contextlib
import errno
import json
import random
import secrets
from collections.abc import Callable, Iterator

import numpy as np
import pytest

from command_line import CommandLine
from memshr import errors
from memshr.content.fingerprint import SEED_BITS
from memshr.embedded.hypervisor import SHARING_RING_PFN
from memshr.errors import CallError, MemshrError, Status
from memshr.sharing.result import SharingReport
from memshr.sharing.session import SharingOptions, share
from memshr.trust import Group
from memshr.types import PAGE_SIZE, DomainKind, DomId, Gfn, Handle, PageArray, RingRequest
from memshr.xen import XenHypervisor, audit, connect, search
from memshr.xen.mappings import Mappings
from memshr.xen.names import Names
from standin.xen import Build, StandIn, open_stand_in

SHARING = [Build.DEBUG, Build.RELEASE]


@pytest.fixture(autouse=True)
def _small_address_spaces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (audit, search):
        monkeypatch.setattr(module, "NEAR_PAGES", 1 << 13)  # the stand-in's calls take longer than Xen's


def filled(played: StandIn, name: str, contents: list[int], **options: object) -> DomId:
    """A domain with a page for each number; equal numbers are equal pages."""
    domid = played.embedded.create_domain(name, len(contents), **options)  # type: ignore[arg-type]  # passed on
    for gfn, number in enumerate(contents):
        played.embedded.write(domid, Gfn(gfn + int(str(options.get("first_gfn", 0)))), number.to_bytes(8, "little"))
    return domid


def calls(played: StandIn, name: str) -> list[list[object]]:
    return [arguments for called, *arguments in played.calls if called == name]


def session(xen: XenHypervisor, *groups: tuple[DomId, ...], max_sharers: int = 256) -> SharingReport:
    trusted = [Group(str(domids), domids, secrets.randbits(SEED_BITS)) for domids in groups]
    return share(xen, trusted, wait=lambda _: None, options=SharingOptions(max_sharers=max_sharers, threads=1))


def enabled(played: StandIn, domid: DomId) -> bool:
    return played.embedded.books.domains[domid].sharing_enabled


def shared_pair(xen: XenHypervisor, one: tuple[DomId, int], other: tuple[DomId, int]) -> Handle:
    handles = [xen.nominate_gfn(domid, Gfn(gfn)) for domid, gfn in (one, other)]
    xen.share_gfns(one[0], Gfn(one[1]), handles[0], other[0], Gfn(other[1]), handles[1])
    return handles[0]


@pytest.fixture
def on(monkeypatch: pytest.MonkeyPatch) -> Callable[[StandIn], None]:
    """Makes a stand-in what the commands open as ``xen:``, each command anew."""

    def put(played: StandIn) -> None:
        @contextlib.contextmanager
        def opened() -> Iterator[XenHypervisor]:
            with open_stand_in(played) as xen:
                yield xen

        for module in ("cli.share", "cli.audit", "cli.status", "opening.hosts", "opening.xen"):
            monkeypatch.setattr(f"memshr.{module}.open_xen", opened)

    return put


# -- 1: hosts that cannot share --------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", Build)
def test_whether_sharing_is_built_in_is_asked_without_changing_anything(build: Build) -> None:
    played = StandIn(build=build)
    domid = filled(played, "A", [1])
    with open_stand_in(played) as xen:
        assert xen.facts.sharing == (build is not Build.WITHOUT)
    assert not enabled(played, domid)
    assert played.xc_sharing_used_frames() == 0, "the counters say nothing about it"


CANNOT_SHARE = {Build.WITHOUT: "was built without memory sharing", Build.VMX: "only on Intel processors, by their VMX"}


@pytest.mark.parametrize("build", CANNOT_SHARE)
@pytest.mark.parametrize(
    "arguments",
    [
        ["share", "xen:all"],
        ["share", "xen:1", "--json"],
        ["ctl", "xen:", "nominate", "1", "0"],
        ["ctl", "xen:", "enable", "1"],
        ["audit", "xen:"],
        ["ctl", "xen:", "audit"],
    ],
    ids=" ".join,
)
def test_a_host_that_cannot_share_says_so_in_one_line(
    build: Build, arguments: list[str], on: Callable[[StandIn], None], memshr: CommandLine
) -> None:
    played = StandIn(build=build)
    filled(played, "A", [1, 1])
    on(played)
    outcome = memshr(*arguments)
    assert (outcome.code, outcome.out) == (3, "")
    assert CANNOT_SHARE[build] in outcome.err
    assert outcome.err.count("\n") == 1


def test_a_host_without_sharing_is_looked_at_all_the_same(on: Callable[[StandIn], None], memshr: CommandLine) -> None:
    played = StandIn(build=Build.WITHOUT)
    filled(played, "A", [1, 1])
    on(played)
    assert "memory sharing is not built in" in memshr("status", "xen:").out
    assert json.loads(memshr("estimate", "xen:all", "--json").out)["intra_pages"] == 1
    for arguments in (["audit", "xen:"], ["ctl", "xen:", "audit"], ["ctl", "xen:", "info"]):
        outcome = memshr(*arguments)
        assert (outcome.code, outcome.err.count("\n")) == (3, 1)


# -- 2: frames of other processes ------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", SHARING)
def test_a_second_process_joins_the_frames_of_the_first(build: Build) -> None:
    played = StandIn(build=build)
    one = filled(played, "A", [1] * 100 + [2] * 40 + [3])
    two = filled(played, "B", [1] * 90 + [2] * 50 + [4])
    with open_stand_in(played) as xen:
        session(xen, (one,), (two,))
    with open_stand_in(played) as xen:
        report = session(xen, (one, two))
        assert report.counters.freed_pages == report.saved_pages == 189 + 89
        assert report.dropped == {}
    assert played.crashes == []


@pytest.mark.parametrize("domains", [1, 2])
def test_a_second_process_joins_frames_that_had_room_for_few(domains: int) -> None:
    played = StandIn()
    domids = tuple(filled(played, f"D{i}", [1] * (60 // domains) + [8 + i, 18 + i]) for i in range(domains))
    with open_stand_in(played) as xen:
        assert session(xen, *[(domid,) for domid in domids], max_sharers=2).saved_pages == 30
    with open_stand_in(played) as xen:
        report = session(xen, domids)
        assert report.counters.freed_pages == report.saved_pages == 59
        assert report.shared_pages == 60
    assert played.crashes == []


def test_the_figures_add_up_where_a_frame_cannot_be_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    played = StandIn()
    one, two = (filled(played, name, [1] * 20) for name in "AB")
    with open_stand_in(played) as xen:
        session(xen, (one,), (two,), max_sharers=4)
    monkeypatch.setattr(XenHypervisor, "_see_frames", lambda *_: None)
    with open_stand_in(played) as xen:
        report = session(xen, (one, two))
        assert report.counters.freed_pages == report.saved_pages == 30
        assert report.dropped == {"separate_frames": 9}
        assert report.shared_pages == 40


def test_a_frame_is_learnt_page_by_page() -> None:
    played = StandIn()
    one, two = filled(played, "A", [1] * 3), filled(played, "B", [1])
    with open_stand_in(played) as xen:
        handle = shared_pair(xen, (one, 0), (one, 1))
        xen.share_gfns(one, Gfn(0), handle, one, Gfn(2), xen.nominate_gfn(one, Gfn(2)))
    with open_stand_in(played) as xen:
        source = xen.nominate_gfn(two, Gfn(0))
        for gfn in (1, 2):
            with pytest.raises(errors.BusyPageError):
                xen.share_gfns(two, Gfn(0), source, one, Gfn(0), handle)
            xen.nominate_gfns(PageArray.of_domain(one, np.array([gfn])))
        xen.share_gfns(two, Gfn(0), source, one, Gfn(0), handle)
        assert xen.debug_gfn(one, Gfn(1)) == 4
    assert played.crashes == []


@pytest.mark.parametrize("seed", range(12))
def test_whoever_shared_what_before_the_report_agrees_with_the_counters(seed: int) -> None:
    chance = random.Random(seed)
    played = StandIn(build=chance.choice(SHARING))
    domids = [filled(played, name, [chance.choice([0, 1, 1, 2, 3, 4 + gfn]) for gfn in range(40)]) for name in "ABC"]
    alone: list[tuple[DomId, ...]] = [(domid,) for domid in domids]
    wider = [alone, [(domids[0], domids[2]), (domids[1],)], [tuple(domids)], [tuple(domids)]]
    for groups in wider:
        with open_stand_in(played) as xen:
            report = session(xen, *groups, max_sharers=chance.choice([2, 3, 7, 256]))
            assert report.saved_pages == report.counters.freed_pages
            assert (report.audit_findings, report.left_out) == ((), ())
        for _ in range(chance.choice([0, 5])):
            place = chance.choice(domids), Gfn(chance.randrange(40))
            played.embedded.write(*place, chance.choice([0, 1, 2]).to_bytes(8, "little"))
    assert (played.crashes, played.deaths, played.mapped_pages) == ([], [], 0)


def test_the_third_domain_is_kept_off_also_when_frames_are_learnt() -> None:
    played = StandIn()
    domids = [filled(played, name, [1] * 8) for name in "ABC"]
    with open_stand_in(played) as xen:
        session(xen, (domids[1], domids[2]), max_sharers=4)
    with open_stand_in(played) as xen:
        session(xen, tuple(domids), max_sharers=24)
        xen.nominate_gfns(PageArray.of_domain(domids[1], np.arange(8)))
        report = session(xen, tuple(domids))
        assert report.counters.freed_pages == report.saved_pages
    assert played.crashes == []


# -- 3, 4, 14: what hangs, kills or miscounts -------------------------------------------------------------------------


def test_no_domain_becomes_its_own_ancestor() -> None:
    played = StandIn()
    library = played.load(played.release)
    assert library is not None
    parent = filled(played, "P", [1, 2])
    assert library.xc_memshr_fork(0, parent, parent, False, False) == 0, "Xen says nothing"
    assert played.deaths.pop().startswith("fork")
    child, other = played.embedded.create_domain("C"), played.embedded.create_domain("E")
    with open_stand_in(played) as xen:
        with pytest.raises(errors.RefusedDomainError, match="would be its own ancestor"):
            xen.fork(parent, parent)
        xen.fork(parent, child)
        xen.fork(parent, child)
        for again in (xen, open_stand_in(played)):
            with pytest.raises(
                errors.RefusedDomainError, match=f"domain {parent} has memory of its own, and may be an"
            ):
                again.fork(child, parent)
        with pytest.raises(errors.RefusedDomainError, match="nothing to fork"):
            xen.fork(other, played.embedded.create_domain("F"))
        grandchild = played.embedded.create_domain("G")
        xen.fork(child, grandchild)
        played.embedded.write(grandchild, Gfn(0), b"its own")
        xen.fork(child, grandchild)
    assert played.deaths == []


@pytest.mark.parametrize("build", SHARING)
def test_a_domain_without_room_is_not_mapped_writably(build: Build) -> None:
    played = StandIn(build=build)
    domid, other = filled(played, "A", [1] * 6), filled(played, "B", [1])
    connection = connect(played.load)
    xen = XenHypervisor(connection, Names(""))
    handles = [xen.nominate_gfn(domid, Gfn(gfn)) for gfn in range(6)]
    for gfn in (1, 2):
        xen.share_gfns(domid, Gfn(0), handles[0], domid, Gfn(gfn), handles[gfn])
    xen.share_gfns(domid, Gfn(3), handles[3], other, Gfn(0), xen.nominate_gfn(other, Gfn(0)))
    played.embedded.set_max_pages(domid, played.embedded.domain_info(domid).tot_pages)
    xen.control(domid, True)
    with pytest.raises(errors.HostMemoryError, match=f"gfn 1 of domain {domid}"):
        xen.unshare_gfn(domid, Gfn(1))
    # 4 and 5 are alone on their frames, 0 to 3 are not; 9 is a hole.
    pages = PageArray.of_domain(domid, np.array([0, 4, 1, 9, 3, 5]))
    assert xen.unshare_gfns(pages).tolist() == [Status.ENOMEM, 0, Status.ENOMEM, Status.EINVAL, Status.ENOMEM, 0]
    assert Mappings(connection).write(domid, Gfn(0), b"x") == Status.ENOMEM
    played.embedded.set_max_pages(domid, played.embedded.domain_info(domid).tot_pages + 1)
    assert xen.unshare_gfns(pages).tolist() == [0, 0, Status.ENOMEM, Status.EINVAL, Status.ENOMEM, 0]
    played.embedded.set_max_pages(domid, 100)
    assert xen.unshare_gfns(pages).tolist() == [0, 0, 0, Status.EINVAL, 0, 0]
    assert played.deaths == []
    assert xen.audit().clean


def test_where_the_host_has_no_memory_nothing_is_mapped_writably_either() -> None:
    played = StandIn()
    one = filled(played, "A", [1] * 4)
    with open_stand_in(played) as xen:
        shared_pair(xen, (one, 0), (one, 1))
        played.free_pages = 0
        with pytest.raises(errors.HostMemoryError):
            xen.unshare_gfn(one, Gfn(0))
        assert calls(played, "xenforeignmemory_map") == []
        played.refuse["xc_availheap"] = (
            errno.EACCES
        )  # a security module; what the domain may have is known all the same
        xen.unshare_gfn(one, Gfn(0))


def test_a_debug_build_dies_of_a_mapping_that_finds_no_memory_and_a_release_build_says_so() -> None:
    for build in SHARING:
        played = StandIn(build=build)
        domid = filled(played, "A", [1] * 4)
        with open_stand_in(played) as xen:
            shared_pair(xen, (domid, 0), (domid, 1))
            played.embedded.set_max_pages(domid, 0)
            gfn, errs = np.array([0], np.uint64), np.zeros(1, np.int32)
            address = played.xenforeignmemory_map(domid, 3, 1, gfn.ctypes.data, errs.ctypes.data)
            played.xenforeignmemory_unmap(address, 1)
        assert errs[0] == -errno.ENOMEM
        assert len(played.deaths) == (build is Build.DEBUG)


def test_unsharing_without_room_does_not_switch_sharing_on() -> None:
    played = StandIn()
    domid = filled(played, "A", [1] * 4)
    with open_stand_in(played) as xen:
        shared_pair(xen, (domid, 0), (domid, 1))
        xen.control(domid, False)
    played.embedded.set_max_pages(domid, 0)
    with open_stand_in(played) as xen, pytest.raises(errors.HostMemoryError):
        xen.unshare_gfn(domid, Gfn(0))
    assert not enabled(played, domid)
    assert played.deaths == []
    assert [info.domid for info in played.embedded.domains()] == [domid], "nobody is left who was made to ask"


def test_a_plug_beyond_the_address_width_is_not_issued() -> None:
    played = StandIn()
    one, two = filled(played, "A", [1]), filled(played, "B", [1])
    with open_stand_in(played) as xen:
        xen.control(two, True)
        handle = xen.nominate_gfn(one, Gfn(0))
        for gfn in (1 << 36, 1 << 37, 1 << 52, 1 << 60, -1):
            with pytest.raises(errors.NotSharableError) as refused:
                xen.add_to_physmap(one, Gfn(0), handle, two, Gfn(gfn))
            assert (refused.value.status, refused.value.domid) == (Status.ENOENT, two)
        assert calls(played, "xc_memshr_add_to_physmap") == []
        with pytest.raises(CallError):
            played.xc_memshr_add_to_physmap(one, 0, handle, two, 1 << 36)
        assert xen.counters().freed_pages == 1, "Xen counts it, for good"


# -- 5, 11: who is refused, and why -----------------------------------------------------------------------------------


def with_odd_domains(*, good: bool = True) -> tuple[StandIn, dict[str, DomId]]:
    """A host with a domain of every kind that cannot be shared, and perhaps one that can."""
    played = StandIn()
    domids = {
        "good": filled(played, "good", [1, 1, 2]) if good else DomId(0),
        "pv": filled(played, "pv", [1], kind=DomainKind.PV),
        "shadow": filled(played, "shadow", [1, 1], kind=DomainKind.SHADOW),
        "pod": filled(played, "pod", [1, 1]),
        "dying": filled(played, "dying", [1, 1]),
    }
    played.pod_entries[domids["pod"]] = 7
    played.embedded.map_foreign(domids["dying"], Gfn(0), writable=False)
    played.embedded.destroy_domain(domids["dying"])
    return played, domids


WHY = {
    "pv": "paravirtualised; only HVM and PVH share",
    "shadow": "has no hardware-assisted paging (HAP)",
    "pod": "has 7 populate-on-demand pages",
    "dying": "is being destroyed",
}


@pytest.mark.parametrize("kind", WHY)
def test_a_domain_that_cannot_be_shared_is_refused_with_its_reason(
    kind: str, on: Callable[[StandIn], None], memshr: CommandLine
) -> None:
    played, domids = with_odd_domains()
    on(played)
    outcome = memshr("share", f"xen:{domids[kind]}")
    assert (outcome.code, outcome.out) == (3, "")
    assert f"domain dom{domids[kind]} ({domids[kind]}) is left alone" in outcome.err
    assert WHY[kind] in outcome.err
    assert outcome.err.count("\n") == 1


def test_dom0_is_refused_with_its_reason(on: Callable[[StandIn], None], memshr: CommandLine) -> None:
    on(with_odd_domains()[0])
    outcome = memshr("share", "xen:0")
    assert (outcome.code, outcome.out) == (3, "")
    assert "domain 0 is the control domain" in outcome.err


@pytest.mark.parametrize("command", ["share", "estimate"])
def test_the_others_go_on_without_those_that_are_refused(
    command: str, on: Callable[[StandIn], None], memshr: CommandLine
) -> None:
    played, domids = with_odd_domains()
    on(played)
    outcome = memshr(command, "xen:all", "--json")
    report = json.loads(outcome.out)
    refused = [kind for kind in WHY if command == "share" or kind != "shadow"]
    left = {domids["good"]} | ({domids["shadow"]} if command == "estimate" else set())
    assert outcome.code == 0
    assert {domain["domid"] for domain in report["domains"]} == left
    assert outcome.err.count("is left alone") == outcome.err.count("\n") == len(refused)
    for kind in refused:
        assert WHY[kind] in outcome.err


@pytest.mark.parametrize("command", ["share", "estimate"])
def test_where_nobody_is_left_the_exit_code_says_so(
    command: str, on: Callable[[StandIn], None], memshr: CommandLine
) -> None:
    played = StandIn()
    for name in "AB":
        filled(played, name, [1], kind=DomainKind.PV)
    on(played)
    outcome = memshr(command, "xen:all")
    assert (outcome.code, outcome.out, outcome.err.count("\n")) == (3, "", 1)
    assert outcome.err.count("paravirtualised") == 2


def test_a_refusal_in_the_session_is_not_taken_for_a_domain_that_is_gone() -> None:
    played, domids = with_odd_domains()
    with open_stand_in(played) as xen:
        report = session(xen, (domids["good"], domids["pod"], domids["pv"]))
    assert [line.split(":")[0] for line in report.left_out] == [
        f"dom{domids[kind]} ({domids[kind]})" for kind in ("pod", "pv")
    ]
    assert report.dropped == {}
    assert report.saved_pages == 1


def culprit_of(call: Callable[[], object]) -> tuple[str, int | None, str]:
    with pytest.raises(MemshrError) as refused:
        call()
    text = str(refused.value)
    assert "None" not in text
    assert isinstance(refused.value, CallError), text
    return type(refused.value).__name__, refused.value.domid, text


def test_the_domain_at_fault_is_the_one_that_is_named() -> None:
    played, domids = with_odd_domains()
    good, pv, shadow = domids["good"], domids["pv"], domids["shadow"]
    dying, off = domids["dying"], filled(played, "off", [1, 2, 3])
    awake = filled(played, "awake", [1, 2, 3])
    child = played.embedded.create_domain("child")
    with open_stand_in(played) as xen:
        handle = xen.nominate_gfn(good, Gfn(0))
        xen.control(awake, True)
        xen.unpause(awake)
        nowhere = DomId(77)

        def sharing(source: DomId, client: DomId) -> Callable[[], object]:
            return lambda: xen.share_gfns(source, Gfn(0), handle, client, Gfn(0), Handle(3))

        expected: list[tuple[Callable[[], object], str, DomId, str]] = [
            (sharing(pv, good), "RefusedDomainError", pv, "paravirtualised"),
            (sharing(shadow, good), "RefusedDomainError", shadow, "hardware-assisted paging"),
            (sharing(dying, good), "DomainDyingError", dying, "being destroyed"),
            (sharing(good, dying), "DomainDyingError", dying, "being destroyed"),
            (sharing(nowhere, good), "NoSuchDomainError", nowhere, "no domain 77"),
            (sharing(good, nowhere), "NoSuchDomainError", nowhere, "no domain 77"),
            (sharing(good, pv), "SharingDisabledError", pv, "not enabled"),
            (sharing(good, off), "SharingDisabledError", off, "not enabled"),
            (sharing(DomId(0), good), "RefusedDomainError", DomId(0), "control domain"),
            (sharing(good, DomId(0)), "RefusedDomainError", DomId(0), "control domain"),
            (lambda: xen.fork(pv, child), "RefusedDomainError", pv, "paravirtualised"),
            (lambda: xen.fork(shadow, child), "RefusedDomainError", shadow, "hardware-assisted paging"),
            (lambda: xen.fork(dying, child), "DomainDyingError", dying, "being destroyed"),
            (lambda: xen.fork(nowhere, child), "NoSuchDomainError", nowhere, "no domain 77"),
            (lambda: xen.fork(DomId(0), child), "RefusedDomainError", DomId(0), "control domain"),
            (lambda: xen.fork(good, DomId(0)), "RefusedDomainError", DomId(0), "control domain"),
            (lambda: xen.fork(good, pv), "RefusedDomainError", pv, "paravirtualised"),
            (lambda: xen.ring_enable(DomId(0)), "RefusedDomainError", DomId(0), "control domain"),
            (lambda: xen.ring_disable(DomId(0)), "RefusedDomainError", DomId(0), "control domain"),
            (lambda: xen.domain_resume(DomId(0)), "RefusedDomainError", DomId(0), "control domain"),
            (lambda: xen.ring_enable(good), "RefusedDomainError", good, "no page for the sharing ring"),
            (lambda: xen.ring_enable(nowhere), "NoSuchDomainError", nowhere, "no domain 77"),
            (lambda: xen.pause(DomId(0)), "RefusedDomainError", DomId(0), "control domain"),
            (lambda: xen.control(DomId(0), True), "RefusedDomainError", DomId(0), "control domain"),
            (lambda: xen.control(pv, True), "RefusedDomainError", pv, "paravirtualised"),
            (lambda: xen.control(shadow, True), "RefusedDomainError", shadow, "hardware-assisted paging"),
            (lambda: xen.range_share(good, off, Gfn(0), Gfn(1)), "SharingDisabledError", off, "not enabled"),
            (lambda: xen.range_share(good, awake, Gfn(0), Gfn(1)), "RefusedDomainError", awake, "is not paused"),
            (lambda: xen.range_share(good, good, Gfn(0), Gfn(9)), "RefusedDomainError", good, "beyond the highest"),
            (lambda: xen.range_share(pv, good, Gfn(0), Gfn(1)), "RefusedDomainError", pv, "paravirtualised"),
        ]
        for number, (call, error, domid, words) in enumerate(expected):
            name, about, text = culprit_of(call)
            assert (number, name) == (number, error), text
            assert words in text
            assert f"domain {domid}" in text, (number, text)
            assert error == "RefusedDomainError" or about == domid
    assert not enabled(played, off)


# -- 6, 10, 15: status and top ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("build", Build)
def test_a_host_without_guests_has_facts(build: Build, on: Callable[[StandIn], None], memshr: CommandLine) -> None:
    on(StandIn(build=build))
    for arguments in (["status", "xen:"], ["status", "xen:all"], ["top", "xen:", "--count", "1"]):
        outcome = memshr(*arguments)
        assert (outcome.code, outcome.err) == (0, "")
        assert "Xen 4.17.7-standin" in outcome.out
    assert json.loads(memshr("status", "xen:", "--json").out)["domains"] == []
    assert memshr("share", "xen:all").code == (3 if build is Build.WITHOUT else 2)


@pytest.mark.parametrize("source", ["xen:", "xen:2"])
def test_the_row_of_a_domain_that_ends_goes(source: str, on: Callable[[StandIn], None], memshr: CommandLine) -> None:
    played = StandIn()
    for name in "AB":
        filled(played, name, [1])

    def end() -> None:
        with contextlib.suppress(CallError):
            played.embedded.destroy_domain(DomId(2))

    on(played)
    played.before["xc_domain_getinfolist"] = [lambda: None] * 4 + [end]
    outcome = memshr("top", source, "--count", "4", "--interval", "0.1")
    assert (outcome.code, outcome.err) == (0, "")
    assert 0 < outcome.out.count("dom2") < 4
    assert outcome.out.count("Xen 4.17.7") == 4
    assert memshr("top", "xen:2", "--count", "1").code == 2, "but who is not there to begin with is an error"


def test_a_domain_that_ends_while_status_looks_is_left_out(on: Callable[[StandIn], None], memshr: CommandLine) -> None:
    played = StandIn()
    for name in "AB":
        filled(played, name, [1])
    on(played)
    played.before["xc_domain_getinfolist"] = [lambda: None] * 2 + [lambda: played.embedded.destroy_domain(DomId(2))]
    outcome = memshr("status", "xen:all", "--json")
    assert [domain["domid"] for domain in json.loads(outcome.out)["domains"]] == [1]


def test_a_crashed_guest_is_shown_and_zero_pages_are_not_said_to_be_given_back(
    on: Callable[[StandIn], None], memshr: CommandLine
) -> None:
    played = StandIn()
    domid = filled(played, "A", [0, 0, 0, 1])
    filled(played, "B", [5])
    played.embedded.books.domains[domid].crashed = True
    on(played)
    rows = dict(line.split()[:: len(line.split()) - 1] for line in memshr("status", "xen:").out.splitlines()[3:5])
    assert (rows["dom1"], rows["dom2"]) == ("crashed", "paused")
    text = memshr("share", "xen:all").out
    assert "zero pages, on 1 frame" in text
    assert "without a frame" not in text + memshr("share", "xen:2").out


# -- 7, 8: the audit --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("arguments", [["audit", "xen:"], ["ctl", "xen:", "audit"]], ids=" ".join)
def test_an_audit_switches_nothing_on_and_says_what_it_left_out(
    arguments: list[str], on: Callable[[StandIn], None], memshr: CommandLine
) -> None:
    played = StandIn()
    one, two = (filled(played, name, [1] * 4) for name in "AB")
    with open_stand_in(played) as xen:
        session(xen, (one,), (two,))
        xen.control(one, False)
    on(played)
    outcome = memshr(*arguments)
    assert outcome.code == 0
    assert not enabled(played, one), "it is the first domain that an audit would name"
    assert f"the 4 shared pages of domain {one}: sharing was switched off on it" in outcome.out
    assert f"domain {two}:" not in outcome.out
    assert [info.domid for info in played.embedded.domains()] == [one, two], "nobody is left who was made to ask"


def test_where_nobody_can_be_asked_nothing_is_claimed() -> None:
    played = StandIn()
    one = filled(played, "A", [1] * 4)
    with open_stand_in(played) as xen:
        session(xen, (one,))
    played.refuse["xc_domain_create"] = errno.ENOMEM
    with open_stand_in(played) as xen:
        audited = xen.audit()
    assert audited.findings == ()
    assert [f"shared pages of domain {one}: to ask might switch sharing on" in line for line in audited.unchecked] == [
        True
    ]


@pytest.mark.parametrize("build", SHARING)
def test_an_audit_counts_in_a_new_process_and_says_if_xens_own_is_not_there(build: Build) -> None:
    played = StandIn(build=build)
    one = filled(played, "A", [1] * 4)
    with open_stand_in(played) as xen:
        session(xen, (one,))
    with open_stand_in(played) as xen:
        audited = xen.audit()
        assert (audited.xen_errors is None) == (build is Build.RELEASE)
        assert [line.split(":")[0] for line in audited.unchecked] == ["Xen's own audit"] * (build is Build.RELEASE)
        assert [info.domid for info in xen.domains()] == [one], "nobody is left who was made to ask"
        played.embedded.books.domains[one].shr_pages += 1
        assert xen.audit().findings, "the count is made"


def test_an_audit_whose_time_is_up_says_what_it_has_not_counted() -> None:
    played = StandIn()
    one = filled(played, "A", list(range(1, 9000)) + [7] * 100)
    with open_stand_in(played) as xen:
        session(xen, (one,))
        patient, hasty = xen.audit(), xen.audit(patience_s=-1)
    assert patient.unchecked == ()
    assert [line.split(":")[-1] for line in hasty.unchecked] == [" time was up"]
    assert hasty.findings == ()


def test_a_release_build_has_no_audit_and_ctl_says_what_was_checked(
    on: Callable[[StandIn], None], memshr: CommandLine
) -> None:
    played = StandIn(build=Build.RELEASE)
    on(played)
    outcome = memshr("ctl", "xen:", "audit")
    assert outcome.out.startswith("-1 findings=[] unchecked=[")
    assert "ENOSYS" in outcome.out
    told = memshr("audit", "xen:")
    assert told.out.splitlines()[-1].startswith("0 findings in what was checked;")
    assert json.loads(memshr("audit", "xen:", "--json").out)["xen_errors"] is None


@pytest.mark.parametrize("first_gfn", [1 << 15, 3 << 20, 1 << 30])
def test_pages_far_out_in_the_address_space_are_found(first_gfn: int) -> None:
    played = StandIn()
    domid = filled(played, "far", [1] * 20 + [2], first_gfn=first_gfn)
    with open_stand_in(played) as xen:
        assert xen.populated_ranges(domid).tolist() == [[first_gfn, 21]]
        report = session(xen, (domid,))
        assert (report.total_pages, report.saved_pages) == (21, 19)
        assert (report.audit_findings, report.audit_unchecked) == ((), ())


def test_pages_in_the_middle_of_nowhere_are_found_and_what_is_not_is_told(
    on: Callable[[StandIn], None], memshr: CommandLine
) -> None:
    played = StandIn()
    domid = filled(played, "scattered", [1] * 20)
    for first in range(5 << 20, (5 << 20) + 4096):
        played.embedded.populate(domid, Gfn(first)) if first % 64 == 0 else None
    lonely = Gfn((3 << 20) + 77)
    played.embedded.set_max_pages(domid, 1000)
    played.embedded.populate(domid, lonely)
    played.embedded.populate(domid, Gfn(1 << 24))
    with open_stand_in(played) as xen:
        found = xen.populated_ranges(domid)
        assert found[0].tolist() == [0, 20]
        assert found[-1].tolist() == [1 << 24, 1]
        assert len(found) == 2 + 64
        assert xen.unseen_pages == {domid: 1}
    on(played)
    for command in ("share", "estimate"):
        assert "1 of its pages were not found" in memshr(command, "xen:all").err


# -- 9: stopped in the middle -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stop", [SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("nth", [1, 7, 40])
def test_a_session_that_is_stopped_while_it_nominates_leaves_nothing_nominated(
    stop: type[BaseException], nth: int
) -> None:
    played = StandIn()
    one, two = (filled(played, name, [1 + gfn // 2 for gfn in range(30)]) for name in "AB")
    with open_stand_in(played) as xen:
        nominate, seen = xen._libxc.xc_memshr_nominate_gfn, []

        def stopped(*arguments: object) -> object:
            answer = nominate(*arguments)
            seen.append(answer)
            if len(seen) == nth:
                raise stop
            return answer

        xen._libxc.xc_memshr_nominate_gfn = stopped
        with pytest.raises(stop):
            session(xen, (one, two))
        assert xen.counters().used_frames == 0


# -- 13: the ring -----------------------------------------------------------------------------------------------------


def with_ring(played: StandIn, vcpus: int = 2) -> DomId:
    """A domain whose ring page holds garbage, with three pages on one frame and no room to take them apart."""
    domid = filled(played, "R", [1] * 6, vcpus=vcpus)
    played.embedded.write(domid, Gfn(5), b"\xc2" * PAGE_SIZE)
    played.embedded.set_hvm_param(domid, SHARING_RING_PFN, 5)
    return domid


def write(played: StandIn, domid: DomId, gfn: int, vcpu: int | None) -> None:
    with pytest.raises(errors.HostMemoryError):
        played.embedded.write(domid, Gfn(gfn), b"new", vcpu=vcpu)


def test_resuming_a_ring_of_garbage_is_what_xen_does_not_survive() -> None:
    played = StandIn()
    domid = with_ring(played)
    library = played.load(played.release)
    assert library is not None
    port = np.zeros(1, np.uint32)
    played.xc_memshr_ring_enable(domid, port)
    played.xc_memshr_domain_resume(domid)
    assert played.deaths.pop().startswith("domain_resume: prints about 3267543746 responses")
    with open_stand_in(played) as xen:
        for call in (xen.domain_resume, xen.ring_respond, xen.ring_requests):
            with pytest.raises(
                errors.RefusedDomainError, match="no sharing ring that memshr has enabled; enable it anew"
            ):
                call(domid)
        with pytest.raises(errors.RefusedDomainError, match="enabled already"):
            xen.ring_enable(domid)
    assert played.deaths == []


@pytest.mark.parametrize("anew", [False, True], ids=["one process", "a process for each call"])
def test_the_vcpu_whose_request_is_answered_goes_on(anew: bool) -> None:
    played = StandIn()
    domid = with_ring(played)
    kept = open_stand_in(played)

    def xen() -> XenHypervisor:
        return open_stand_in(played) if anew else kept

    assert xen().ring_enable(domid) == 1
    assert played.embedded.domain_info(domid).pause_count == 1, "as before"
    assert xen().ring_requests(domid) == []
    for gfn in (1, 2):
        shared_pair(kept, (domid, 0), (domid, gfn))
    played.embedded.set_max_pages(domid, 0)
    write(played, domid, 1, 0)
    write(played, domid, 2, 1)
    assert xen().ring_requests(domid) == [RingRequest(Gfn(1), 0), RingRequest(Gfn(2), 1)]
    xen().domain_resume(domid)
    assert played.embedded.waiting_vcpus(domid) == {0, 1}, "to resume alone is not enough"
    xen().ring_respond(domid, 1)
    xen().domain_resume(domid)
    assert played.embedded.waiting_vcpus(domid) == {1}
    assert xen().ring_requests(domid) == [RingRequest(Gfn(2), 1)]
    with pytest.raises(errors.RefusedDomainError, match="has fewer requests"):
        xen().ring_respond(domid, 2)
    played.embedded.set_max_pages(domid, 100)
    xen().ring_respond(domid)
    xen().domain_resume(domid)
    assert played.embedded.waiting_vcpus(domid) == frozenset()
    played.embedded.write(domid, Gfn(2), b"new", vcpu=1)
    assert played.deaths == []


def test_more_requests_than_the_ring_holds_come_one_after_the_other() -> None:
    played = StandIn()
    domid = with_ring(played, vcpus=20)
    with open_stand_in(played) as xen:
        xen.ring_enable(domid)
        shared_pair(xen, (domid, 0), (domid, 1))
        played.embedded.set_max_pages(domid, 0)
        answered = []
        for vcpu in range(20):
            write(played, domid, vcpu % 2, vcpu)
        while requests := xen.ring_requests(domid):
            assert len(requests) <= 8
            answered += [request.vcpu for request in requests]
            xen.ring_respond(domid)
            xen.domain_resume(domid)
        assert answered == list(range(20))
        assert played.embedded.waiting_vcpus(domid) == frozenset()


def test_a_guest_that_writes_into_its_ring_does_not_reach_xen_through_us() -> None:
    for words in ({8: 5}, {0: 9}, {8: 0xFFFFFFF0}, {0: 0x10000000, 8: 0x10000000}):
        played = StandIn()
        domid = with_ring(played)
        with open_stand_in(played) as xen:
            xen.ring_enable(domid)
            for offset, word in words.items():
                played.embedded.write(domid, Gfn(5), word.to_bytes(4, "little"), offset)
            with pytest.raises(errors.RefusedDomainError, match="sharing ring"):
                xen.domain_resume(domid)
        assert played.deaths == []


def test_an_entry_of_another_layout_is_not_answered() -> None:
    played = StandIn()
    domid = with_ring(played)
    with open_stand_in(played) as xen:
        xen.ring_enable(domid)
        shared_pair(xen, (domid, 0), (domid, 1))
        played.embedded.set_max_pages(domid, 0)
        write(played, domid, 1, 0)
        xen.ring_requests(domid)
        played.embedded.write(domid, Gfn(5), b"\x08", 64)
        for call in (xen.ring_requests, xen.ring_respond):
            with pytest.raises(errors.UnsupportedError, match=r"version 8 of Xen's vm_event\.h"):
                call(domid)


def test_a_ring_whose_page_cannot_be_had_is_not_enabled() -> None:
    played = StandIn()
    domid = with_ring(played)
    with open_stand_in(played) as xen:
        shared_pair(xen, (domid, 4), (domid, 5))
        played.embedded.set_max_pages(domid, 0)
        with pytest.raises(errors.HostMemoryError):
            xen.ring_enable(domid)
        assert played.embedded.domain_info(domid).pause_count == 1
        assert calls(played, "xc_memshr_ring_enable") == []
        played.embedded.set_max_pages(domid, 100)
        played.refuse["xenforeignmemory_map"] = errno.EFAULT
        with pytest.raises(MemshrError):
            xen.ring_enable(domid)
        assert played.embedded.books.domains[domid].ring_mfn is None
