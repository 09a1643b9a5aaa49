"""The states of guests and pages, on the stand-in for kernel and agent."""

from __future__ import annotations

import itertools
import select
import threading
from types import SimpleNamespace

import numpy as np
import pytest

from memshr.errors import InvariantError, Status
from memshr.qemu import attachment
from memshr.qemu.attachment import GuestState
from memshr.qemu.control_area import SLOTS
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.types import PAGE_SIZE, PageArray
from standin.calls import Call
from standin.machine import StandInMachine
from standin.world import COPIED, FRESH, ONE, SHARED, THREE, TWO, ZERO, World, array, both, content, gfns

ALLOWED = {
    ("looking", "attaching"),
    ("looking", "gone"),
    ("attaching", "attached"),
    ("attaching", "looking"),
    ("attaching", "lost"),
    ("attaching", "gone"),
    ("attached", "looking"),
    ("attached", "lost"),
    ("attached", "gone"),
    ("lost", "attaching"),
    ("lost", "gone"),
}


@pytest.mark.parametrize(("before", "after"), list(itertools.product(GuestState, GuestState)))
def test_a_guest_goes_from_state_to_state_as_the_table_says(before: GuestState, after: GuestState) -> None:
    with World(attached=False) as world:
        guest = world.hypervisor._books.guests[0]
        guest.state = before
        if before is after or (before.value, after.value) in ALLOWED:
            guest._become(after)
            assert guest.state is after
        else:
            with pytest.raises(InvariantError, match=f"from {before.value} to {after.value}"):
                guest._become(after)
            assert guest.state is before
        guest.state = GuestState.LOOKING


def test_only_the_process_says_that_it_has_ended() -> None:
    with World() as world:
        guest = world.hypervisor._books.guests[0]
        seen = [guest.state]
        guest.lose(ProcessLookupError())
        seen.append(guest.state)
        world.hypervisor.control(ONE, True)
        seen.append(guest.state)
        world.machine.guests[0].end()
        assert guest.gone
        seen.append(guest.state)
        assert seen == [GuestState.ATTACHED, GuestState.LOST, GuestState.ATTACHED, GuestState.GONE]
        assert [domain.domid for domain in world.hypervisor.domains()] == [TWO, THREE]
        for domid in (TWO, THREE):
            world.hypervisor.unshare_guest(domid)


# -- other actors of the kernel ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("domid", [ONE, TWO])
@pytest.mark.parametrize("writes", [False, True])
def test_what_lost_its_protection_is_never_shared(domid: int, writes: bool) -> None:
    """As KSM does it: the entry of a nominated page is replaced, and no event tells of a write."""
    with World() as world:
        sources, clients = array(ONE, *FRESH), array(TWO, *FRESH)
        handles = world.nominate(sources), world.nominate(clients)
        guest = world.machine.guests[domid - 1]
        guest.memory.lose_protection(guest.hva(gfns(FRESH[1])[0]))
        if writes:
            world.write(world.hypervisor.domains()[domid - 1].domid, FRESH[1], content(77))
        statuses = world.hypervisor.share_gfns_many(sources, handles[0], clients, handles[1])
        assert statuses.tolist() == [0, Status.S_HANDLE_INVALID if domid == 1 else Status.C_HANDLE_INVALID, 0]
        assert "1 pages" in "".join(world.hypervisor.trouble)
        world.check_contents()
        world.hypervisor.unshare_gfns(both(*FRESH))
        world.check_all(world.nominated(), None)
        world.check_use()


@pytest.mark.parametrize("domid", [ONE, TWO])
def test_what_changes_without_an_event_is_never_shared(domid: int) -> None:
    with World() as world:
        sources, clients = array(ONE, *FRESH), array(TWO, *FRESH)
        handles = world.nominate(sources), world.nominate(clients)
        guest = world.machine.guests[domid - 1]
        guest.memory.put(guest.hva(gfns(FRESH[2])[0]), content(78))
        world.model.write(world.hypervisor.domains()[domid - 1].domid, gfns(FRESH[2])[0], content(78))
        statuses = world.hypervisor.share_gfns_many(sources, handles[0], clients, handles[1])
        assert statuses.tolist() == [0, 0, Status.C_HANDLE_INVALID]
        assert "1 pages" in "".join(world.hypervisor.trouble)
        world.check_contents()
        world.hypervisor.unshare_gfns(both(*FRESH))
        world.check_all(world.nominated(), None)
        world.check_use()


def test_a_source_that_changes_after_it_was_copied_is_never_put_on_its_frame() -> None:
    with World() as world:
        sources, clients = array(ONE, *FRESH), array(TWO, *FRESH)
        handles = world.nominate(sources), world.nominate(clients)
        guest = world.machine.guests[0]

        def change(call: Call) -> None:
            if call.name == "one: link.post":
                world.machine.calls.before = lambda _: None
                guest.memory.put(guest.hva(gfns(FRESH[2])[0]), content(79))

        world.model.write(ONE, gfns(FRESH[2])[0], content(79))
        world.machine.calls.before = change
        statuses = world.hypervisor.share_gfns_many(sources, handles[0], clients, handles[1])
        assert statuses.tolist() == [0, 0, Status.S_HANDLE_INVALID]
        assert "pages" in "".join(world.hypervisor.trouble)
        world.check_contents()
        world.hypervisor.unshare_gfns(both(*FRESH))
        world.check_all(world.nominated(), None)
        world.check_use()


def test_a_zero_page_that_lost_its_protection_is_not_given_back() -> None:
    with World() as world:
        handles = world.nominate(both(ZERO))
        guest = world.machine.guests[0]
        guest.memory.lose_protection(guest.hva(gfns(ZERO)[0]))
        world.write(ONE, ZERO, content(80))
        statuses = world.hypervisor.release_zero_pages(both(ZERO), handles)
        assert statuses.tolist() == [Status.S_HANDLE_INVALID, 0]
        assert world.hypervisor.trouble
        world.check_contents()


@pytest.mark.parametrize("what", ["fold back", "unshare", "unshare guest"])
def test_what_is_written_unseen_until_it_is_copied_is_copied(what: str) -> None:
    """A page loses its protection, and is written, right before the agent copies it."""
    with World() as world:
        guest = world.machine.guests[0]

        def strike(call: Call) -> None:
            if call.name == "one: link.post":
                world.machine.calls.before = lambda _: None
                for page in (*COPIED, SHARED[0]):
                    guest.memory.lose_protection(guest.hva(gfns(page)[0]))
                    world.begin_write(ONE, page, content(81 + page))

        world.hypervisor.read_pages(both(*SHARED, *COPIED), np.empty((8, PAGE_SIZE), np.uint8))
        world.machine.calls.before = strike
        if what == "fold back":
            world.hypervisor.fold_back()
        elif what == "unshare":
            world.hypervisor.unshare_gfns(both(*SHARED, *COPIED))
        else:
            world.hypervisor.unshare_guest(ONE)
        world.machine.await_writers(world.writers)
        world.check_contents()


def test_swapping_out_leaves_a_nomination_alone() -> None:
    with World() as world:
        handles = world.nominate(array(ONE, *FRESH)), world.nominate(array(TWO, *FRESH))
        for guest in world.machine.guests[:2]:
            for gfn in gfns(*FRESH):
                guest.memory.swap_out(guest.hva(gfn))
        statuses = world.hypervisor.share_gfns_many(array(ONE, *FRESH), handles[0], array(TWO, *FRESH), handles[1])
        assert not statuses.any()
        world.check_contents()
        assert world.hypervisor.trouble == ()


# -- agents that do not answer -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("how", ["silent", "stuck"])
def test_a_silent_agent_holds_nobody_but_its_own_guest(how: str) -> None:
    """``silent``: its QEMU is stopped. ``stuck``: it has begun a table and does not end it, which maps frames later."""
    with World() as world:
        for page in FRESH:
            world.write(THREE, page, content(page))
        sources = PageArray(np.array([ONE] * 6, np.uint16), np.array(gfns(*FRESH) * 2, np.int64))
        clients = PageArray(np.array([TWO] * 3 + [THREE] * 3, np.uint16), np.array(gfns(*FRESH) * 2, np.int64))
        handles = world.nominate(sources), world.nominate(clients)
        world.nominate(array(ONE, 11))
        link = world.hypervisor._books.guests[1].link
        silent = world.machine.guests[1].agent
        assert link is not None
        assert silent is not None
        link.deadline_s = 2.0  # a hundred times what the others need
        others: list[bool] = []
        returned = threading.Event()

        def write() -> None:
            # Pages that are in flight in the same moment, landed by now; one that is nominated; one that is plain.
            written = [(THREE, FRESH[0]), (THREE, 2), (ONE, 11), (ONE, 12)]
            for domid, page in written:
                world.begin_write(domid, page, content(90 + page))
            world.machine.await_writers(world.writers)
            others.append(returned.is_set())

        writing = threading.Thread(target=write)

        def hold_back(call: Call) -> None:
            if call.name == "two: link.post":
                setattr(silent, how, True)
            if call.name == "three: link.await_answer" and not writing.ident:
                writing.start()

        world.machine.calls.before = hold_back
        # Guest 3 answers and goes on; then the answer of guest 2 is waited for, until the deadline of its link.
        statuses = world.hypervisor.share_gfns_many(sources, handles[0], clients, handles[1])
        returned.set()
        writing.join(10)
        world.machine.calls.before = lambda _: None
        assert others == [False], "the other guests waited for the silent one"
        assert statuses.tolist() == [Status.ESRCH] * 3 + [0] * 3
        assert world.hypervisor._books.guests[1].state is GuestState.LOST
        assert "guest two" in "".join(world.hypervisor.trouble)
        world.begin_write(TWO, FRESH[1], content(95))
        silent.silent = silent.stuck = False
        world.machine.await_writers(world.writers)
        world.check_contents()
        world.hypervisor.control(TWO, True)
        world.check_contents()
        assert world.hypervisor.audit().clean
        world.hypervisor.unshare_gfns(
            PageArray(np.concatenate([sources.domids, clients.domids]), np.concatenate([sources.gfns, clients.gfns]))
        )
        world.check_all(world.nominated(), None)
        world.check_use()


@pytest.mark.parametrize("calls", [0, 1])
def test_frames_that_a_table_may_yet_map_are_not_given_back(calls: int) -> None:
    """The guest of a table that does not end is given up; the table maps its frames afterwards."""
    with World() as world:
        sources, clients = array(ONE, *FRESH), array(TWO, *FRESH)
        handles = world.nominate(sources), world.nominate(clients)
        link, agent = world.hypervisor._books.guests[0].link, world.machine.guests[0].agent
        assert link is not None
        assert agent is not None
        link.deadline_s = 0.2
        agent.stuck, agent.stuck_after = True, calls
        statuses = world.hypervisor.share_gfns_many(sources, handles[0], clients, handles[1])
        assert (statuses == Status.ESRCH).all()
        world.hypervisor.punch_unread()
        agent.stuck = False
        agent.go_on()
        world.check_contents()
        world.check_all(world.nominated(), None)
        world.hypervisor.control(ONE, True)
        world.hypervisor.unshare_gfns(both(*FRESH))
        world.check_use()


class _FailingPoll:
    """select.poll, whose waiting fails."""

    def register(self, _file: int, _events: int) -> None:
        pass

    def poll(self, _timeout_ms: float) -> list[tuple[int, int]]:
        raise MemoryError


def test_nobody_goes_on_while_a_table_is_under_way_whoever_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wait for the agents fails, while a table is being carried out that maps frames over protected pages."""
    with World() as world:
        sources, clients = array(ONE, *FRESH), array(TWO, *FRESH)
        handles = world.nominate(sources), world.nominate(clients)
        before = world.nominated()
        agent = world.machine.guests[0].agent
        assert agent is not None

        def hold_back(call: Call) -> None:
            if call.name == "one: link.post":
                agent.stuck = True
            if call.name == "one: link.await_answer":
                agent.stuck = False

        world.machine.calls.before = hold_back
        monkeypatch.setattr(attachment, "select", SimpleNamespace(poll=_FailingPoll, POLLIN=select.POLLIN))
        with pytest.raises(MemoryError) as failed:
            world.hypervisor.share_gfns_many(sources, handles[0], clients, handles[1])
        monkeypatch.undo()
        for page in FRESH:
            world.begin_write(ONE, page, content(96 + page))
        agent.stuck = False
        agent.go_on()
        world.check_pages()
        del failed
        world.machine.await_writers(world.writers)
        world.check_contents()
        world.check_all(before, MemoryError())
        world.check_use()


# -- many pools --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [7, 12])
def test_guests_that_were_shared_one_by_one_are_shared_together(count: int) -> None:
    """Each run makes a pool of its own, as it has nobody in hand who reads those of the others."""
    with StandInMachine(*(f"guest {number}" for number in range(count))) as machine:
        shared = gfns(0, 1)

        def share_all(hypervisor: QemuHypervisor, domids: list[int], pages: list[int]) -> None:
            array_ = PageArray(np.array(domids, np.uint16), np.array(pages, np.int64))
            handles, statuses = hypervisor.nominate_gfns(array_)
            assert not statuses.any()
            rest = len(domids) - 1
            first = PageArray(np.array(domids[:1] * rest, np.uint16), np.array(pages[:1] * rest, np.int64))
            clients = PageArray(array_.domids[1:], array_.gfns[1:])
            statuses = hypervisor.share_gfns_many(first, np.repeat(handles[:1], rest), clients, handles[1:])
            assert not statuses.any(), statuses

        for guest in machine.guests:
            for gfn in shared:
                guest.write(gfn, content(5))
            with QemuHypervisor([guest.process], groups={"all": [1]}, host=machine) as alone:
                share_all(alone, [1, 1], [int(gfn) for gfn in shared])
        used: list[int] = []

        def count_slots(call: Call) -> None:
            agents = [guest.agent for guest in machine.guests if guest.agent is not None and not guest.agent.ended]
            used.extend(SLOTS - agent.control.slots.count(-1) for agent in agents)

        machine.calls.before = count_slots
        with machine.hypervisor() as together:
            assert len({sample.group for sample in together.pool_figures()}) == 1
            assert len(together.pool_figures()) == count
            for number in range(1, count + 1):  # each of them as the source once
                client = number % count + 1
                machine.guests[client - 1].write(gfns(3)[0], content(5))
                share_all(together, [number, number, client], [*map(int, shared), int(gfns(3)[0])])
            together.unshare_gfns(PageArray(np.arange(1, count + 1, dtype=np.uint16), np.array(gfns(3) * count)))
            for _ in range(2):
                everybody = [domid for domid in range(1, count + 1) for _ in shared]
                share_all(together, everybody, [int(gfn) for gfn in shared] * count)
            assert together.debug_gfn(ONE, shared[0]) == 2 * count
            assert together.audit().clean
            figures = [pool.used_frames for pool in together.pool_figures()]
            assert sum(figures) == 1
        assert max(used) < 8
        assert all(guest.read(gfn) == content(5) for guest in machine.guests for gfn in shared)
