"""Corners of the embedded hypervisor that no recording shows: held frames, rings, forks of forks, odd arguments."""

from collections.abc import Callable

import numpy as np
import pytest

from memshr import errors
from memshr.embedded import EmbeddedHypervisor
from memshr.embedded.hypervisor import SHARING_RING_PFN
from memshr.types import PAGE_SIZE, DomainKind, DomId, Gfn, GrantRef, Handle, P2mType, PageArray, RingRequest

FAR = Gfn((1 << 36) - 1)


def assert_clean(hypervisor: EmbeddedHypervisor) -> None:
    report = hypervisor.audit()
    assert report.findings == ()
    assert report.xen_errors == 0
    owned = sum(info.tot_pages for info in hypervisor.domains())
    assert hypervisor.memory.allocated_pages == owned + hypervisor.counters().used_frames


def family(hypervisor: EmbeddedHypervisor, generations: int, pages: int = 4) -> list[DomId]:
    """A domain and its forks, each a fork of the one before."""
    domids = [hypervisor.create_domain("d0", pages)]
    for generation in range(1, generations):
        domids.append(hypervisor.create_domain(f"d{generation}"))
        hypervisor.fork(domids[-2], domids[-1])
    return domids


# -- held frames -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("destroy_first", [False, True])
def test_a_page_given_up_while_held_counts_until_it_is_released(destroy_first: bool) -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 4)
    hypervisor.write(domid, Gfn(1), b"kept")
    mapping = hypervisor.map_foreign(domid, Gfn(1), writable=False)
    hypervisor.decrease_reservation(domid, Gfn(1))
    assert hypervisor.mem_type(domid, Gfn(1)) is P2mType.HOLE
    assert hypervisor.domain_info(domid).tot_pages == 4
    assert_clean(hypervisor)
    if destroy_first:
        hypervisor.destroy_domain(domid)
        assert hypervisor.domain_info(domid).tot_pages == 1
        assert_clean(hypervisor)
    assert mapping.read()[:4] == b"kept"
    mapping.close()
    assert [info.tot_pages for info in hypervisor.domains()] == ([] if destroy_first else [3])
    assert_clean(hypervisor)


def test_a_frame_of_a_dead_domain_is_scrubbed_although_it_was_held() -> None:
    hypervisor = EmbeddedHypervisor(limit_pages=1)
    dead = hypervisor.create_domain("A", 1)
    hypervisor.write(dead, Gfn(0), b"secret")
    mapping = hypervisor.map_foreign(dead, Gfn(0), writable=False)
    hypervisor.destroy_domain(dead)
    mapping.close()
    heir = hypervisor.create_domain("B", 1)
    assert hypervisor.read(heir, Gfn(0)) == bytes(PAGE_SIZE)


def test_a_dying_domain_gets_no_memory() -> None:
    hypervisor = EmbeddedHypervisor()
    parent = hypervisor.create_domain("P", 4)
    child = hypervisor.create_domain("C")
    hypervisor.fork(parent, child)
    hypervisor.write(child, Gfn(0), b"x")
    mapping = hypervisor.map_foreign(child, Gfn(0), writable=False)
    hypervisor.destroy_domain(child)
    with pytest.raises(errors.HostMemoryError):
        hypervisor.populate(child, Gfn(1))
    with pytest.raises(errors.NotSharableError):
        hypervisor.read(child, Gfn(2))
    assert_clean(hypervisor)
    mapping.close()
    assert [info.domid for info in hypervisor.domains()] == [parent]
    assert_clean(hypervisor)


@pytest.mark.parametrize("kind", [P2mType.RAM_RW, P2mType.RAM_SHARED])
def test_a_grant_table_takes_the_place_of_ram(kind: P2mType) -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 4)
    if kind is P2mType.RAM_SHARED:
        hypervisor.nominate_gfn(domid, Gfn(1))
    hypervisor.map_grant_frame(domid, Gfn(1))
    assert hypervisor.domain_info(domid).tot_pages == 3
    assert_clean(hypervisor)


# -- groups ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("held", [None, "source", "client"])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_small_group_takes_in_a_large_one(held: str | None, at_once: bool) -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 8)
    for gfn in map(Gfn, range(8)):
        hypervisor.write(domid, gfn, b"source" if gfn < 2 else b"client")
    handles = [hypervisor.nominate_gfn(domid, Gfn(gfn)) for gfn in range(8)]
    for gfn in map(Gfn, range(3, 7)):
        hypervisor.share_gfns(domid, Gfn(2), handles[2], domid, gfn, handles[gfn])
    mapping = None
    if held:
        mapping = hypervisor.map_foreign(domid, Gfn(0 if held == "source" else 2), writable=False)
    if at_once:
        pages = [PageArray.of_domain(domid, np.array(gfns)) for gfns in ((0, 0, 0), (4, 1, 7))]
        sources, clients = np.array([handles[0]] * 3), np.array([handles[2], handles[1], handles[7]])
        statuses = hypervisor.share_gfns_many(pages[0], sources, pages[1], clients)
        assert statuses.tolist() == [0, 0, 0]
    else:
        for gfn in map(Gfn, (4, 1, 7)):
            hypervisor.share_gfns(domid, Gfn(0), handles[0], domid, gfn, hypervisor.nominate_gfn(domid, gfn))
    assert {hypervisor.read(domid, Gfn(gfn))[:6] for gfn in range(8)} == {b"source"}
    assert {hypervisor.nominate_gfn(domid, Gfn(gfn)) for gfn in range(8)} == {handles[0]}
    assert_clean(hypervisor)
    if mapping is not None:
        assert mapping.read()[:6] == (b"source" if held == "source" else b"client")
        mapping.close()
        assert_clean(hypervisor)


# -- rings -----------------------------------------------------------------------------------------------------------


def with_ring(hypervisor: EmbeddedHypervisor, max_pages: int | None = None) -> DomId:
    domid = hypervisor.create_domain("R", 4, max_pages=max_pages)
    hypervisor.set_hvm_param(domid, SHARING_RING_PFN, 3)
    hypervisor.ring_enable(domid)
    return domid


def test_the_frame_of_a_dead_domains_ring_can_be_shared_by_its_next_owner() -> None:
    hypervisor = EmbeddedHypervisor(limit_pages=4)
    hypervisor.destroy_domain(with_ring(hypervisor))
    heir = hypervisor.create_domain("B", 4)
    _, statuses = hypervisor.nominate_gfns(PageArray.of_domain(heir, np.arange(4)))
    assert statuses.tolist() == [0] * 4
    assert_clean(hypervisor)


def test_a_ring_keeps_its_frame_when_the_guest_gives_the_page_up() -> None:
    hypervisor = EmbeddedHypervisor(limit_pages=5)
    domid = with_ring(hypervisor)
    hypervisor.decrease_reservation(domid, Gfn(3))
    other = hypervisor.create_domain("B", 1)
    assert hypervisor.nominate_gfn(other, Gfn(0)) == 2
    assert hypervisor.domain_info(domid).tot_pages == 4
    hypervisor.ring_disable(domid)
    assert hypervisor.domain_info(domid).tot_pages == 3
    assert_clean(hypervisor)


def test_only_a_failed_unshare_is_posted() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = with_ring(hypervisor, max_pages=4)
    with pytest.raises(errors.HostMemoryError):
        hypervisor.populate(domid, Gfn(9))
    assert hypervisor.ring_events(domid) == ()
    source = hypervisor.nominate_gfn(domid, Gfn(0))
    hypervisor.share_gfns(domid, Gfn(0), source, domid, Gfn(1), hypervisor.nominate_gfn(domid, Gfn(1)))
    hypervisor.set_max_pages(domid, 2)
    statuses = hypervisor.unshare_gfns(PageArray.of_domain(domid, np.array([1])))
    assert statuses.tolist() == [errors.Status.ENOMEM]
    assert hypervisor.ring_events(domid) == (1,)


def test_a_vcpu_goes_on_when_its_request_is_answered_and_resumed_and_not_before() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = with_ring(hypervisor, max_pages=5)
    handles = [hypervisor.nominate_gfn(domid, Gfn(gfn)) for gfn in range(3)]
    for gfn in (1, 2):
        hypervisor.share_gfns(domid, Gfn(0), handles[0], domid, Gfn(gfn), handles[gfn])
    hypervisor.set_max_pages(domid, 1)
    for vcpu in (0, 1):
        with pytest.raises(errors.HostMemoryError):
            hypervisor.write(domid, Gfn(1 + vcpu), b"new", vcpu=vcpu)
    with pytest.raises(errors.HostMemoryError):
        hypervisor.unshare_gfn(domid, Gfn(0))
    assert hypervisor.ring_requests(domid) == (
        RingRequest(Gfn(1), 0),
        RingRequest(Gfn(2), 1),
        RingRequest(Gfn(0), None),
    )
    hypervisor.domain_resume(domid)
    assert hypervisor.waiting_vcpus(domid) == {0, 1}, "nobody has answered"
    hypervisor.ring_respond(domid, 1)
    assert hypervisor.waiting_vcpus(domid) == {0, 1}, "nobody has resumed"
    hypervisor.domain_resume(domid)
    assert hypervisor.waiting_vcpus(domid) == {1}
    assert [request.gfn for request in hypervisor.ring_requests(domid)] == [2, 0]
    with pytest.raises(errors.RefusedDomainError, match="has fewer requests"):
        hypervisor.ring_respond(domid, 3)
    hypervisor.ring_respond(domid)
    hypervisor.domain_resume(domid)
    assert (hypervisor.waiting_vcpus(domid), hypervisor.ring_requests(domid)) == (frozenset(), ())


# -- forks -----------------------------------------------------------------------------------------------------------


def test_a_fork_of_a_fork_reads_its_parents_page_even_while_that_is_held() -> None:
    hypervisor = EmbeddedHypervisor()
    oldest, middle, youngest = family(hypervisor, 3)
    hypervisor.write(oldest, Gfn(1), b"old")
    hypervisor.write(middle, Gfn(1), b"new")
    mapping = hypervisor.map_foreign(middle, Gfn(1), writable=False)
    assert hypervisor.read(youngest, Gfn(1))[:3] == b"new"
    mapping.close()
    assert_clean(hypervisor)


def test_no_domain_is_its_own_ancestor() -> None:
    hypervisor = EmbeddedHypervisor()
    first, second, third = family(hypervisor, 3)
    for parent in (first, second, third):
        with pytest.raises(errors.RefusedDomainError) as caught:
            hypervisor.fork(parent, first)
        assert caught.value.status == errors.Status.EINVAL
    with pytest.raises(errors.NotSharableError):
        hypervisor.read(third, Gfn(50))


@pytest.mark.parametrize("order", [1, -1])
def test_a_long_line_of_forks_goes_away_in_either_order(order: int) -> None:
    hypervisor = EmbeddedHypervisor()
    domids = family(hypervisor, 1500)
    assert hypervisor.read(domids[-1], Gfn(1)) == bytes(PAGE_SIZE)
    for domid in domids[::order]:
        hypervisor.destroy_domain(domid)
    assert hypervisor.domains() == []
    assert_clean(hypervisor)


def test_a_fork_respects_max_pages() -> None:
    hypervisor = EmbeddedHypervisor()
    parent = hypervisor.create_domain("P", 4, max_pages=4)
    child = hypervisor.create_domain("C")
    hypervisor.fork(parent, child)
    hypervisor.set_max_pages(child, 1)
    hypervisor.write(child, Gfn(0), b"x")
    with pytest.raises(errors.NotSharableError):  # the hole stays, and Xen does not say why
        hypervisor.write(child, Gfn(1), b"x")
    assert hypervisor.read(child, Gfn(1)) == bytes(PAGE_SIZE)
    assert hypervisor.domain_info(child).tot_pages == 1
    assert_clean(hypervisor)


def test_a_fork_that_fails_is_none_and_keeps_what_was_copied() -> None:
    hypervisor = EmbeddedHypervisor(limit_pages=5)
    parent = hypervisor.create_domain("P", 4)
    hypervisor.write(parent, Gfn(1), b"store")
    for parameter, gfn in ((1, 1), (17, 2)):
        hypervisor.set_hvm_param(parent, parameter, gfn)
    child = hypervisor.create_domain("C", max_pages=7)
    with pytest.raises(errors.HostMemoryError):
        hypervisor.fork(parent, child)
    assert hypervisor.domain_info(child).tot_pages == 1
    assert hypervisor.domain_info(child).max_pages == hypervisor.domain_info(parent).max_pages
    assert hypervisor.read(child, Gfn(1))[:5] == b"store"
    with pytest.raises(errors.NotSharableError):
        hypervisor.read(child, Gfn(2))
    hypervisor.destroy_domain(parent)
    assert [info.domid for info in hypervisor.domains()] == [child]
    assert_clean(hypervisor)


def test_a_second_fork_and_a_reset_of_the_state_copy_special_pages_again() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child = hypervisor.create_domain("P", 4), hypervisor.create_domain("C")
    hypervisor.set_hvm_param(parent, 1, 2)
    hypervisor.fork(parent, child)
    for text in (b"again", b"state"):
        hypervisor.write(parent, Gfn(2), text)
        assert hypervisor.read(child, Gfn(2))[:5] != text
        if text == b"again":
            hypervisor.fork(parent, child)
        else:
            hypervisor.fork_reset(child, state=True)
        assert hypervisor.read(child, Gfn(2))[:5] == text
    assert hypervisor.domain_info(child).tot_pages == 1


def test_a_reset_of_the_state_does_not_write_into_a_frame_that_others_read() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child, other = (
        hypervisor.create_domain("P", 4),
        hypervisor.create_domain("C"),
        hypervisor.create_domain("O", 4),
    )
    hypervisor.set_hvm_param(parent, 1, 2)
    hypervisor.fork(parent, child)
    for domid in (child, other):
        hypervisor.write(domid, Gfn(2), b"both")
    handles = [hypervisor.nominate_gfn(domid, Gfn(2)) for domid in (child, other)]
    hypervisor.share_gfns(child, Gfn(2), handles[0], other, Gfn(2), handles[1])
    hypervisor.fork_reset(child, state=True)
    assert hypervisor.read(child, Gfn(2)) == bytes(PAGE_SIZE)
    assert hypervisor.read(other, Gfn(2))[:4] == b"both"
    assert_clean(hypervisor)


@pytest.mark.parametrize(("held", "status"), [(1, 0), (2, errors.Status.E2BIG)])
def test_a_reset_of_the_memory_answers_for_the_page_that_came_last(held: int, status: int) -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child = family(hypervisor, 2)
    for gfn in (0, 1, 2):
        hypervisor.write(child, Gfn(gfn), b"child")
    mapping = hypervisor.map_foreign(child, Gfn(held), writable=False)
    if status:
        with pytest.raises(errors.RefusedDomainError, match="came last") as caught:
            hypervisor.fork_reset(child, memory=True)
        assert caught.value.status == status
    else:
        hypervisor.fork_reset(child, memory=True)
    assert hypervisor.domain_info(child).tot_pages == 1
    assert hypervisor.read(child, Gfn(held))[:5] == b"child"
    mapping.close()
    hypervisor.fork_reset(child, memory=True)
    assert hypervisor.domain_info(child).tot_pages == 0
    assert hypervisor.read(child, Gfn(held)) == hypervisor.read(parent, Gfn(held))


def test_a_reset_drops_memory_that_nobody_has_looked_at_yet() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child = hypervisor.create_domain("P", 4), hypervisor.create_domain("C", 5000)
    hypervisor.fork(parent, child)
    hypervisor.fork_reset(child, memory=True)
    assert hypervisor.domain_info(child).tot_pages == 0
    assert_clean(hypervisor)


def test_a_dying_fork_lets_go_of_its_parent() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child = family(hypervisor, 2)
    hypervisor.write(child, Gfn(0), b"x")
    mapping = hypervisor.map_foreign(child, Gfn(0), writable=False)
    hypervisor.destroy_domain(child)
    hypervisor.destroy_domain(parent)
    assert [info.domid for info in hypervisor.domains()] == [child]
    mapping.close()
    assert hypervisor.domains() == []


def test_the_pause_of_a_fork_on_its_parent_counts_for_range_share() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, other, child = (hypervisor.create_domain(name, 4) for name in "POC")
    for domid in (parent, other):
        hypervisor.control(domid, True)
    hypervisor.unpause(parent)
    with pytest.raises(errors.RefusedDomainError):
        hypervisor.range_share(parent, other, Gfn(0), Gfn(3))
    hypervisor.fork(parent, child)
    hypervisor.range_share(parent, other, Gfn(0), Gfn(3))
    assert hypervisor.counters().freed_pages == 4


def test_a_fork_reads_its_parent_beyond_its_own_last_gfn() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child = family(hypervisor, 2)
    hypervisor.populate(parent, Gfn(40))
    hypervisor.write(parent, Gfn(40), b"late")
    assert hypervisor.read(child, Gfn(40))[:4] == b"late"
    assert hypervisor.max_gpfn(child) == 40


# -- types of pages, log-dirty mode, holes ---------------------------------------------------------------------------


def test_modified_memory_acts_in_log_dirty_mode_only() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 4)
    first, second = (hypervisor.nominate_gfn(domid, Gfn(gfn)) for gfn in (0, 1))
    hypervisor.share_gfns(domid, Gfn(0), first, domid, Gfn(1), second)
    hypervisor.modified_memory(domid, Gfn(0))
    hypervisor.modified_memory(domid, Gfn(99))
    assert hypervisor.counters().freed_pages == 1
    hypervisor.set_log_dirty(domid, True)
    with pytest.raises(errors.RefusedDomainError, match="on already"):
        hypervisor.set_log_dirty(domid, True)
    with pytest.raises(errors.NotSharableError):
        hypervisor.modified_memory(domid, Gfn(3))  # its last gfn
    hypervisor.set_max_pages(domid, 2)
    hypervisor.modified_memory(domid, Gfn(0))  # no memory: nobody is told
    assert hypervisor.counters().freed_pages == 1
    hypervisor.set_max_pages(domid, 9)
    hypervisor.modified_memory(domid, Gfn(0))
    assert hypervisor.counters().freed_pages == 0


def test_read_only_memory_is_written_by_dom0_and_not_by_its_guest() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 4)
    hypervisor.set_mem_type(domid, Gfn(1), P2mType.RAM_RO)
    hypervisor.write(domid, Gfn(1), b"dom0")
    hypervisor.write(domid, Gfn(1), b"lost", vcpu=0)
    assert hypervisor.read(domid, Gfn(1))[:4] == b"dom0"
    hypervisor.map_foreign(domid, Gfn(1), writable=True).close()


def test_the_type_of_a_page_that_cannot_be_unshared_is_not_changed() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 4)
    first, second = (hypervisor.nominate_gfn(domid, Gfn(gfn)) for gfn in (0, 1))
    hypervisor.share_gfns(domid, Gfn(0), first, domid, Gfn(1), second)
    hypervisor.set_max_pages(domid, 2)
    with pytest.raises(errors.HostMemoryError) as caught:
        hypervisor.set_mem_type(domid, Gfn(0), P2mType.RAM_RO)
    assert caught.value.status == errors.Status.EAGAIN
    with pytest.raises(errors.NotSharableError):
        hypervisor.set_mem_type(domid, Gfn(4), P2mType.MMIO_DM)  # beyond its last gfn


def test_two_gfns_that_were_made_mmio_are_equal_holes() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 4)
    for gfn in (0, 1):
        hypervisor.set_mem_type(domid, Gfn(gfn), P2mType.MMIO_DM)
    hypervisor.share_gfns(domid, Gfn(0), Handle(5), domid, Gfn(1), Handle(6))
    assert hypervisor.counters().used_frames == 0


def test_beyond_the_address_width_the_handle_is_looked_at_first() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 4)
    handle = hypervisor.nominate_gfn(domid, Gfn(0))
    for given, status in ((handle + 1, errors.Status.S_HANDLE_INVALID), (handle, errors.Status.ENOENT)):
        with pytest.raises(errors.CallError) as caught:
            hypervisor.add_to_physmap(domid, Gfn(0), Handle(given), domid, Gfn(1 << 36))
        assert caught.value.status == status


def test_what_the_ring_calls_refuse_in_xens_order() -> None:
    hypervisor = EmbeddedHypervisor()
    shadow, domid = hypervisor.create_domain("S", 4, kind=DomainKind.SHADOW), hypervisor.create_domain("A", 4)

    def status_of(call: Callable[[DomId], object], on: DomId) -> int:
        try:
            call(on)
        except errors.CallError as error:
            return int(error.status)
        return 0

    assert status_of(hypervisor.ring_enable, shadow) == errors.Status.ENODEV
    assert status_of(hypervisor.domain_resume, domid) == errors.Status.ENODEV
    hypervisor.set_hvm_param(domid, 29, 0)
    assert status_of(hypervisor.ring_enable, domid) == errors.Status.EOPNOTSUPP
    hypervisor.set_hvm_param(domid, 29, 2)
    assert status_of(hypervisor.ring_enable, domid) == 0
    hypervisor.set_hvm_param(domid, 29, 0)
    assert status_of(hypervisor.ring_enable, domid) == errors.Status.EBUSY
    mapping = hypervisor.map_foreign(domid, Gfn(0), writable=False)
    hypervisor.destroy_domain(domid)
    calls = (hypervisor.ring_enable, hypervisor.ring_respond, hypervisor.ring_disable, hypervisor.domain_resume)
    for call in calls:
        assert status_of(call, domid) == 0
    mapping.close()


# -- forks, who may be named -----------------------------------------------------------------------------------------


def test_a_parent_with_other_vcpus_is_not_enabled() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child = hypervisor.create_domain("P", 4, vcpus=2), hypervisor.create_domain("C", 4)
    with pytest.raises(errors.RefusedDomainError):
        hypervisor.fork(parent, child)
    with pytest.raises(errors.SharingDisabledError):
        hypervisor.share_gfns(child, Gfn(0), hypervisor.nominate_gfn(child, Gfn(0)), parent, Gfn(0), 1)  # type: ignore[arg-type]  # any number


def test_special_pages_may_be_named_beyond_the_address_width() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, other = hypervisor.create_domain("P", 4), hypervisor.create_domain("O", 4)
    hypervisor.set_hvm_param(parent, 1, (other - parent) << 36)  # gfn 0 of the other domain, if nobody looks
    child = hypervisor.create_domain("C")
    hypervisor.fork(parent, child)
    assert hypervisor.domain_info(child).tot_pages == 0
    assert_clean(hypervisor)


def test_reset_drops_pages_whose_writes_are_logged() -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child = family(hypervisor, 2)
    hypervisor.write(child, Gfn(1), b"x")
    hypervisor.set_log_dirty(child, True)
    hypervisor.fork_reset(child, memory=True)
    assert hypervisor.domain_info(child).tot_pages == 0
    assert hypervisor.read(child, Gfn(1)) == hypervisor.read(parent, Gfn(1))


# -- odd arguments ---------------------------------------------------------------------------------------------------


def test_a_grant_of_a_gfn_beyond_the_address_width_reaches_no_other_domain() -> None:
    hypervisor = EmbeddedHypervisor()
    first, second = hypervisor.create_domain("A", 4), hypervisor.create_domain("B", 4)
    hypervisor.grant(first, GrantRef(8), Gfn((second - first) << 36))
    for _ in range(3):
        hypervisor.map_foreign(second, Gfn(0), writable=False)
    with pytest.raises(errors.NotSharableError):
        hypervisor.nominate_gref(first, GrantRef(8))
    assert_clean(hypervisor)


def test_range_share_of_domains_with_a_far_page() -> None:
    hypervisor = EmbeddedHypervisor()
    domids = [hypervisor.create_domain(name, 4) for name in "AB"]
    for domid in domids:
        hypervisor.populate(domid, FAR)
        hypervisor.control(domid, True)
    hypervisor.range_share(domids[0], domids[1], Gfn(2), FAR)
    assert hypervisor.counters().freed_pages == 3
    assert_clean(hypervisor)


def test_a_negative_number_of_pages() -> None:
    with pytest.raises(ValueError, match="pages"):
        EmbeddedHypervisor().create_domain("A", -1)


SHAPES: dict[str, Callable[[EmbeddedHypervisor, DomId, DomId], object]] = {
    "a fork's hole": lambda hypervisor, parent, child: hypervisor.unshare_gfn(child, Gfn(2)),
    "a fork's hole, with others": lambda hypervisor, parent, child: hypervisor.unshare_gfns(
        PageArray(np.array([child, child], np.uint16), np.array([2, 40]))
    ),
}


@pytest.mark.parametrize("shape", SHAPES)
def test_unsharing_a_hole_of_a_fork_copies_the_parents_page(shape: str) -> None:
    hypervisor = EmbeddedHypervisor()
    parent, child = family(hypervisor, 2)
    hypervisor.write(parent, Gfn(2), b"parent")
    SHAPES[shape](hypervisor, parent, child)
    assert hypervisor.domain_info(child).tot_pages == 1
    assert hypervisor.read(child, Gfn(2))[:6] == b"parent"


def test_many_pages_are_unshared_in_their_order_when_there_is_not_room_for_all() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("A", 3, max_pages=3)
    handles = [hypervisor.nominate_gfn(domid, Gfn(gfn)) for gfn in range(3)]
    hypervisor.share_gfns(domid, Gfn(0), handles[0], domid, Gfn(1), handles[1])
    hypervisor.set_max_pages(domid, 1)
    statuses = hypervisor.unshare_gfns(PageArray.of_domain(domid, np.array([1, 2, 0])))
    assert statuses.tolist() == [0, 0, 0]  # the copy first, while there is room; then last sharers need none
    assert_clean(hypervisor)
