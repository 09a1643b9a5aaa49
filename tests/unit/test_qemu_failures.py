"""Every call to the kernel, to QEMU and to the agent fails once, in every operation; one law holds afterwards.

The law (``standin.world``): nothing is protected that is not nominated, and the other way round. A call that raised has
nominated nothing. No writer waits. Each guest reads what it last wrote. "Stop" is heard: InvariantError and Ctrl-C come
out as they went in. No other guest was given up. The same object can be used again, and its audit is clean.

A recording of each operation says which calls there are. Each then fails in the ways that it can fail in. To keep this
short some ways are taken in turn, the same in each run: of five errnos a call gets one or two; an interrupt comes
before every other call and after the rest, before and after all of the link's; Python runs out of memory at every
third.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Iterator

import pytest

from memshr.errors import (
    ConnectionLostError,
    HostMemoryError,
    InvariantError,
    MemshrError,
    PermissionDeniedError,
    RefusedDomainError,
    Status,
)
from memshr.qemu.agent import AgentCallError
from memshr.qemu.attachment import GuestState
from memshr.qemu.monitor import MonitorError
from standin.calls import Call, Failure
from standin.world import (
    COPIED,
    FRESH,
    ODD,
    ONE,
    OPERATIONS,
    SHARED,
    SHARED_ZERO,
    TWO,
    ZERO,
    World,
    array,
    attempt,
    both,
    content,
    gfns,
)

ERRNOS = (errno.ENOMEM, errno.EPERM, errno.EIO, errno.EAGAIN, errno.ESRCH)
MONITOR = ("layout", "drain", "connect")


def os_error(number: int) -> OSError:
    return OSError(number, os.strerror(number))


def no_place() -> AgentCallError:
    return AgentCallError("QEMU did not take a descriptor", errno=errno.EMFILE, done=0)


def parts_of(call: Call) -> tuple[str, str]:
    """Whom a call asks, and what."""
    whom, _, what = call.name.rpartition(": ")[2].rpartition(".")
    return whom, what


def asks_kernel(call: Call) -> bool:
    """Whether it asks the kernel about one guest, and its failure means that the guest is lost."""
    whom, what = parts_of(call)
    if whom == "target":
        return what not in {*MONITOR, "disconnect", "split_huge_pages"}
    return whom == "link" and what in {"register", "protect", "unprotect", "wake"}


def failures_of(call: Call, turn: int) -> Iterator[tuple[str, Failure]]:
    """Every way in which a call can fail, with a name for it."""
    whom, what = parts_of(call)
    makes = what in {"connect", "lock", "create_pool", "adopt_pool", "give"}  # what it makes would be lost
    if call.name.endswith("in QEMU: close"):
        return
    if ": in QEMU: " in call.name:
        for number in (errno.ENOMEM, errno.EPERM):
            yield "in QEMU", Failure(call, os_error(number), "before")
        return
    if asks_kernel(call) or what == "split_huge_pages":
        yield "errno", Failure(call, os_error(ERRNOS[turn % 5]), "before")
        if turn % 2:
            yield "another errno", Failure(call, os_error(ERRNOS[(turn + 2) % 5]), "before")
    if what in {"protect", "unprotect", "read"} and whom != "pool":
        yield "half done", Failure(call, os_error(errno.ENOMEM), "half")
        yield "half done", Failure(call, KeyboardInterrupt(), "half")
    if whom == "target" and what in {*MONITOR, "disconnect"}:
        yield "QEMU does not answer", Failure(call, ConnectionLostError("no answer"), "before")
        yield "QEMU refuses", Failure(call, MonitorError("refused", command="x", kind="y"), "before")
        yield "errno", Failure(call, os_error(ERRNOS[turn % 5]), "before")
    if whom == "link" and what in {"post", "await_answer", "give", "drop", "end_agent"}:
        yield "QEMU does not answer", Failure(call, ConnectionLostError("no answer"), "before")
        if what == "give":
            yield "QEMU refuses", Failure(call, no_place(), "before")
    for asked, error in {
        "host.lock": RefusedDomainError("locked", reasons=["locked"]),
        "host.create_pool": PermissionDeniedError("not root"),
        "host.adopt_pool": os_error(errno.ENOENT),
        "pool.add": HostMemoryError("no memory"),
        "pool.punch": os_error(errno.ENOMEM),
        "pool.read": os_error(errno.EIO),
    }.items():
        if call.name == asked:
            yield "errno", Failure(call, error, "before")
    if whom == "link" or turn % 2 or makes:
        yield "interrupted after", Failure(call, KeyboardInterrupt(), "after")
    if whom == "link" or not turn % 2:
        yield "interrupted before", Failure(call, KeyboardInterrupt(), "before")
    yield "stop", Failure(call, InvariantError("stop"), "before")
    if whom == "link" or turn % 3 == 0:
        yield "no memory for Python", Failure(call, MemoryError(), "after" if turn % 2 and not makes else "before")


WAYS = (
    *("errno", "another errno", "half done", "QEMU does not answer", "QEMU refuses", "in QEMU"),
    *("interrupted before", "interrupted after", "stop", "no memory for Python"),
)


def recorded(operation: str) -> list[Call]:
    """The calls that an operation makes."""
    how, prepare = OPERATIONS[operation]
    with World(**how) as world:
        act = prepare(world)
        world.machine.calls.begin()
        act()
        return world.machine.calls.end()


def judge(operation: str, failure: Failure) -> None:
    """Do an operation in which one call fails, and judge what is left."""
    how, prepare = OPERATIONS[operation]
    with World(**how) as world:
        act = prepare(world)
        before = world.nominated()
        links = {guest.process.name: guest.link for guest in world.hypervisor._books.guests}
        world.machine.calls.begin(failure)
        raised = attempt(act)
        world.machine.calls.end()
        assert world.machine.calls.failed, "the call was not made again"
        if isinstance(failure.error, KeyboardInterrupt):
            assert isinstance(raised, KeyboardInterrupt), f"it came out as {raised!r}"
        elif isinstance(failure.error, (InvariantError, MemoryError)):
            assert raised is failure.error, f"it came out as {raised!r}"
        pools = parts_of(failure.call)[0] in {"pool", "host"}
        wanted = isinstance(raised, (MemshrError, KeyboardInterrupt)) or raised in (None, failure.error)
        assert wanted, f"it came out as {raised!r}"
        assert not isinstance(raised, OSError) or pools, "an OSError comes out"
        if operation == "close":
            return
        for guest in world.hypervisor._books.guests:
            other = not failure.call.name.startswith(guest.process.name)
            assert not other or guest.state is not GuestState.LOST, f"{guest.process.name} was given up"
            lost = links[guest.process.name] is not guest.link and guest.link is None
            assert not (other and lost) or (operation == "detach" and guest.domid == 1)
        if isinstance(failure.error, OSError) and asks_kernel(failure.call) and how.get("attached", True):
            states = {guest.process.name: guest.state for guest in world.hypervisor._books.guests}
            assert states[failure.call.name.partition(":")[0]] is GuestState.LOST
        world.check_all(before, raised)
        world.check_use()


def judge_all(cases: list[tuple[str, Callable[[], object]]]) -> None:
    """Judge each, then report all that broke the law."""
    broken = []
    for name, case in cases:
        found = attempt(case)
        if found is not None:
            text = (str(found) or repr(found)).splitlines()[0][:200]
            broken.append(f"{name}: {type(found).__name__}: {text}")
    assert not broken, f"{len(broken)} of {len(cases)} broke the law:\n" + "\n".join(broken)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("operation", OPERATIONS)
def test_the_law_holds_whatever_call_fails(operation: str, way: str) -> None:
    cases: list[tuple[str, Callable[[], object]]] = []
    for turn, call in enumerate(recorded(operation)):
        for name, failure in failures_of(call, turn):
            if name == way:
                what = f"{call} {failure.when} {failure.error!r}"
                cases.append((what, lambda failure=failure: judge(operation, failure)))  # type: ignore[misc]
    judge_all(cases)


# -- guests write meanwhile --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("operation", OPERATIONS)
def test_books_and_handles_are_right_at_any_moment(operation: str) -> None:
    """Right before each call what is nominated is protected, and what is not in flight is in the books."""

    def check(_: Call) -> None:
        world.check_nominations()
        world.check_books()

    how, prepare = OPERATIONS[operation]
    with World(**how) as world:
        act = prepare(world)
        world.machine.calls.begin()
        world.machine.calls.before = check
        act()


PAGES_OF = {
    "share": FRESH,
    "share onto a frame": (SHARED[0], ODD),
    "move a frame's sharers": (SHARED[1], ODD),
    "release zeros": (ZERO, SHARED_ZERO),
    "unshare": (0, *SHARED),
    "unshare, direct drives": (0, *SHARED),
    "fold back": COPIED,
}
"""the pages that an operation is about, if not the first ones"""


def writing(world: World, at: Call, page: int) -> None:
    """Have both guests write a page right before a call, and be let go if they may at that moment."""

    def write(call: Call) -> None:
        if call != at:
            return
        for domid in (ONE, TWO):
            world.begin_write(domid, page, content(500 + page + domid))
        world.await_watches()

    world.machine.calls.before = write


def judge_writes(operation: str, at: Call, page: int) -> None:
    how, prepare = OPERATIONS[operation]
    with World(**how) as world:
        act = prepare(world)
        before = world.nominated()
        world.machine.calls.begin()
        writing(world, at, page)
        raised = attempt(act)
        made = world.machine.calls.end()
        assert at in made, "the call was not made again"
        assert raised is None, repr(raised)
        if operation == "close":
            return
        world.check_all(before, raised)
        world.check_use()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_guests_may_write_at_any_moment(operation: str) -> None:
    """Right before each call both guests write a page that the operation is about; each operation meets each page."""
    pages = (*FRESH, ZERO, ODD, *SHARED, *COPIED, SHARED_ZERO)
    cases: list[tuple[str, Callable[[], object]]] = []
    for turn, call in enumerate(recorded(operation)):
        about = PAGES_OF.get(operation, FRESH)
        for page in {pages[turn % len(pages)], about[turn % len(about)], about[(turn + 1) % len(about)]}:
            cases.append((f"write {page} at {call}", lambda call=call, page=page: judge_writes(operation, call, page)))  # type: ignore[misc]
    judge_all(cases)


def judge_writes_and_failure(operation: str, failure: Failure, page: int) -> None:
    how, prepare = OPERATIONS[operation]
    with World(**how) as world:
        act = prepare(world)
        before = world.nominated()
        world.machine.calls.begin(failure)
        writing(world, failure.call, page)
        raised = attempt(act)
        world.machine.calls.end()
        assert world.machine.calls.failed, "the call was not made again"
        if isinstance(failure.error, InvariantError):
            assert raised is failure.error, f"it came out as {raised!r}"
        if operation == "close":
            return
        world.check_all(before, raised)
        world.check_use()


@pytest.mark.parametrize("operation", OPERATIONS)
def test_writers_that_wait_at_a_failure_go_on(operation: str) -> None:
    """As both above: guests write, and then the call fails in one of its ways."""
    cases: list[tuple[str, Callable[[], object]]] = []
    about = PAGES_OF.get(operation, FRESH)
    for turn, call in enumerate(recorded(operation)):
        ways = [failure for _, failure in failures_of(call, turn)]
        if ways:
            failure, page = ways[turn % len(ways)], about[turn % len(about)]
            what = f"write {page}, then {call} {failure.when} {failure.error!r}"
            cases.append((what, lambda failure=failure, page=page: judge_writes_and_failure(operation, failure, page)))  # type: ignore[misc]
    judge_all(cases)


@pytest.mark.parametrize("error", [os_error(errno.EIO), InvariantError("stop"), MemoryError()], ids=repr)
def test_a_watch_that_fails_lets_its_guest_go(error: BaseException) -> None:
    with World() as world:
        world.nominate(both(*FRESH))
        before = world.nominated()
        world.machine.calls.begin(Failure(Call("watch: one: link.unprotect", 0), error, "before"))
        world.begin_write(ONE, FRESH[0], content(1))
        world.machine.await_writers(world.writers)
        world.machine.calls.end()
        assert world.machine.calls.failed
        assert [guest.state for guest in world.hypervisor._books.guests] == [
            GuestState.LOST,
            GuestState.ATTACHED,
            GuestState.ATTACHED,
        ]
        assert "guest one" in "".join(world.hypervisor.trouble)
        if not isinstance(error, OSError):
            with pytest.raises(InvariantError, match="write watch"):
                world.hypervisor.nominate_gfns(both(*FRESH))
            return
        world.check_all(before, None)
        world.check_use()


def test_short_reads_are_no_contents() -> None:
    with World() as world:
        handles = world.nominate(array(ONE, *FRESH)), world.nominate(array(TWO, *FRESH))
        before = world.nominated()
        world.machine.guests[0].reads_short = True
        statuses = world.hypervisor.share_gfns_many(array(ONE, *FRESH), handles[0], array(TWO, *FRESH), handles[1])
        assert (statuses == Status.ESRCH).all()
        world.check_all(before, None)
        world.check_use()


def test_disk_requests_are_waited_for_between_the_protection_and_the_handles() -> None:
    """A request that began before the protection writes past it."""
    with World(direct_drives=True) as world:
        waited: list[Call] = []

        def look(call: Call) -> None:
            if call.name.endswith("target.drain"):
                guest = world.machine.guests[len(waited)]
                assert {guest.hva(gfn) for gfn in gfns(*FRESH)} <= guest.memory.protected_pages()
                assert not world.nominated()[world.hypervisor.domains()[len(waited)].domid]
                waited.append(call)

        world.machine.calls.before = look
        world.nominate(both(*FRESH))
        assert len(waited) == 2
        world.machine.calls.end()
        world.machine.calls.begin()
        world.hypervisor.unshare_gfns(array(ONE, *SHARED))
        names = [call.name for call in world.machine.calls.end()]
        first, drain = names.index("one: link.protect"), names.index("one: target.drain")
        assert first < drain < names.index("one: in QEMU: process_vm_readv")


def test_a_page_that_was_nominated_anew_is_not_shared_under_its_old_handle() -> None:
    with World() as world:
        handles = world.nominate(array(ONE, *FRESH)), world.nominate(array(TWO, *FRESH))
        anew: list[int] = []

        def again(call: Call) -> None:
            if call.name == "pool.add":
                world.machine.calls.before = lambda _: None
                world.write(ONE, FRESH[0], content(FRESH[0]))
                anew.extend(world.nominate(array(ONE, FRESH[0])).tolist())

        world.machine.calls.before = again
        statuses = world.hypervisor.share_gfns_many(array(ONE, *FRESH), handles[0], array(TWO, *FRESH), handles[1])
        assert statuses.tolist() == [Status.S_HANDLE_INVALID, 0, 0]
        assert world.nominate(array(ONE, FRESH[0])).tolist() == anew
        world.check_contents()
