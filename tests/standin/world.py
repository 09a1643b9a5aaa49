"""Three guests in the midst of being shared, what memshr does to them, and the law that holds after each failure."""

from __future__ import annotations

import contextlib
import functools
import re
import signal
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Final, Self

import numpy as np

from memshr.errors import MemshrError
from memshr.indices import PageId, of_kind
from memshr.qemu.books import NOWHERE
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.qemu.states import _IN_FLIGHT
from memshr.testing import GuestModel
from memshr.types import PAGE_SHIFT, PAGE_SIZE, DomId, Gfn, Handles, PageArray
from standin.kernel import Writer
from standin.machine import StandInMachine

FIRST_GFN: Final = 0x100
PAGES: Final = 20
ONE, TWO, THREE = DomId(1), DomId(2), DomId(3)

FRESH: Final = (0, 1, 3)
"""pages with equal contents in guests 1 and 2 that are on no frame"""
ZERO: Final = 4
ODD: Final = 5
"""a page that is like SHARED[0] in guest 2, and like SHARED[1] in guest 1"""
SHARED: Final = (6, 7)
"""pages of guests 1 and 2 that are on one frame"""
COPIED: Final = (8, 9)
"""pages that were, and which guest 1 has written since"""
SHARED_ZERO: Final = 10
SPARE: Final = (11, 12)
"""pages with equal contents in guests 1 and 2 for a share after everything else"""


def gfns(*pages: int) -> list[Gfn]:
    """Their gfns."""
    return [Gfn(FIRST_GFN + page) for page in pages]


def array(domid: DomId, *pages: int) -> PageArray:
    """Pages of one guest."""
    return PageArray.of_domain(domid, np.array(gfns(*pages), np.int64))


def both(*pages: int) -> PageArray:
    """Pages of guests 1 and 2."""
    one, two = array(ONE, *pages), array(TWO, *pages)
    return PageArray(np.concatenate([one.domids, two.domids]), np.concatenate([one.gfns, two.gfns]))


@functools.cache
def content(seed: int) -> bytes:
    """A page that is not uniform."""
    return np.random.default_rng(seed).bytes(PAGE_SIZE)


class World:
    """The three guests. ``attached``: all are attached; else none is, by this memshr."""

    def __init__(self, *, attached: bool = True, direct_drives: bool = False) -> None:
        self.files = _open_files()
        self.machine = StandInMachine("one", "two", "three", pages=PAGES)
        for guest in self.machine.guests:
            guest.has_direct_drives = direct_drives
        self.model = GuestModel()
        self.writers: list[Writer] = []
        self.hypervisor: QemuHypervisor = self.machine.hypervisor()
        for domid in (ONE, TWO, THREE):
            for page in range(13):
                self.write(domid, page, bytes(PAGE_SIZE) if page in (ZERO, SHARED_ZERO) else content(page))
        self.write(ONE, 2, content(100))
        self.write(ONE, ODD, content(SHARED[1]))
        self.write(TWO, ODD, content(SHARED[0]))
        self.share(array(ONE, *SHARED, *COPIED, SHARED_ZERO), array(TWO, *SHARED, *COPIED, SHARED_ZERO))
        self.write(THREE, 1, content(0))
        self.share(array(THREE, 0), array(THREE, 1))
        for page in COPIED:
            self.write(ONE, page, content(200 + page))
        if not attached:
            self.hypervisor.close()
            self.hypervisor = self.machine.hypervisor()
        else:
            self.third_handle = int(self.hypervisor.nominate_gfns(array(THREE, 2))[0][0])

    def write(self, domid: DomId, page: int, data: bytes, offset: int = 0) -> None:
        """A guest writes, and is let go."""
        self.model.write(domid, gfns(page)[0], data, offset)
        self.machine.guests[domid - 1].write(gfns(page)[0], data, offset)

    def begin_write(self, domid: DomId, page: int, data: bytes) -> None:
        """A guest writes, and may wait."""
        self.model.write(domid, gfns(page)[0], data)
        self.writers.append(self.machine.guests[domid - 1].begin_write(gfns(page)[0], data))

    def nominate(self, pages: PageArray) -> Handles:
        """Nominate pages, which must work."""
        handles, statuses = self.hypervisor.nominate_gfns(pages)
        assert not statuses.any(), statuses
        return handles

    def share(self, sources: PageArray, clients: PageArray) -> None:
        """Share pages, which must work."""
        handles = self.nominate(sources), self.nominate(clients)
        statuses = self.hypervisor.share_gfns_many(sources, handles[0], clients, handles[1])
        assert not statuses.any(), statuses

    # -- judging -------------------------------------------------------------------------------------------------------

    def nominated(self) -> dict[DomId, set[int]]:
        """The addresses of the nominated pages of each guest."""
        books = self.hypervisor._books
        found = {}
        for guest in books.guests:
            ids = np.arange(books.base[guest.domid - 1], books.base[guest.domid])
            found[guest.domid] = set(guest.hvas[books.states.nominated(ids)].tolist())
        return found

    def check_pages(self) -> None:
        """What is protected is nominated, what is nominated is protected, and nothing is half-way."""
        books = self.hypervisor._books
        for guest, nominated in zip(self.machine.guests, self.nominated().values(), strict=False):
            protected = guest.memory.protected_pages()
            assert protected == nominated, f"{guest.process.name}: protected {protected}, nominated {nominated}"
        ids = of_kind(PageId, np.arange(len(books.frame)))
        assert (books.states.nominated(ids) | books.states.plain(ids)).all(), "pages are in flight"

    def check_nominations(self) -> None:
        """What is nominated is protected: at any moment, also in the midst of a call."""
        for guest, nominated in zip(self.machine.guests, self.nominated().values(), strict=False):
            assert nominated <= guest.memory.protected_pages(), f"{guest.process.name}: a handle without protection"

    def check_books(self) -> None:
        """Of each page that is not in flight the books know whether a frame is mapped there: at any moment."""
        books = self.hypervisor._books
        for guest, machine in zip(books.guests, self.machine.guests, strict=False):
            for area in machine.memory.areas:
                pages = guest.ram.pages_of_hvas(np.arange(area.start, area.end, dtype=np.int64) << PAGE_SHIFT)
                ids = books.ids_of(guest, pages[pages >= 0])
                ids = ids[books.states.plain(ids) | books.states.nominated(ids)]
                assert ((books.frame[ids] != NOWHERE) == (area.file is not None)).all(), f"{area} is not in the books"

    def check_contents(self) -> None:
        """Every guest reads what it last wrote."""
        wrong = self.model.wrong_pages(lambda domid, gfn: self.machine.guests[domid - 1].read(gfn))
        assert not wrong, f"wrong contents: {wrong}"

    def check_all(self, before: dict[DomId, set[int]], raised: BaseException | None) -> None:
        """The law: what holds after whatever has failed."""
        self.machine.await_writers(self.writers, 5.0)
        self.settle_watches()
        self.check_pages()
        self.check_contents()
        if raised is not None:
            for domid, addresses in self.nominated().items():
                assert addresses <= before[domid], "a call that failed has nominated pages"
        for domid in (ONE, TWO, THREE):
            for page in range(13):
                self.begin_write(domid, page, content(page if page in SPARE else 300 + page))
        self.machine.await_writers(self.writers, 5.0)
        self.settle_watches()
        self.check_pages()
        self.check_contents()

    def check_use(self) -> None:
        """The same object can be used again."""
        for domid in (ONE, TWO, THREE):
            self.hypervisor.control(domid, True)
        self.share(array(ONE, *SPARE), array(TWO, *SPARE))
        assert [self.hypervisor.debug_gfn(domid, gfns(SPARE[0])[0]) for domid in (ONE, TWO)] == [2, 2]
        report = self.hypervisor.audit()
        assert report.clean, report
        self.check_contents()
        self.write(TWO, SPARE[0], content(400))
        for domid in (ONE, TWO, THREE):
            self.hypervisor.unshare_guest(domid)
        self.check_pages()
        self.check_contents()
        assert not any(area.file for guest in self.machine.guests for area in guest.memory.areas), "still in pools"

    def settle_watches(self) -> None:
        """Wait until the watches have done what they are at: a writer goes on a little before."""
        for lock in self.hypervisor._states._locks:
            with lock:
                pass

    def await_watches(self) -> None:
        """Wait until everybody who waits does so at a page that is in flight."""
        end_s = time.monotonic() + 5.0
        while not all(writer.done or self._is_in_flight(writer.address) for writer in self.writers):
            assert time.monotonic() < end_s, "a writer waits at a page that is not in flight"
            for guest in self.machine.guests:
                guest.memory.settle()
            time.sleep(0)

    def _is_in_flight(self, address: int) -> bool:
        # In which guest does not matter: those that write do so at the same addresses.
        books = self.hypervisor._books
        ids = np.concatenate(
            [books.base[guest.domid - 1] + np.flatnonzero(guest.hvas == address & ~0xFFF) for guest in books.guests]
        )
        return bool((books.states._phase[ids] == _IN_FLIGHT).any())

    def __enter__(self) -> Self:
        # Who starts the tests in the background has them ignore Ctrl-C.
        self._handler = signal.signal(signal.SIGINT, signal.default_int_handler)
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        self.machine.calls.end()
        signal.signal(signal.SIGINT, self._handler)
        self.hypervisor.close()
        for guest in self.machine.guests:
            if kind is None:
                assert not guest.memory.protected_pages(), "protected after the end"
        locked = set(self.machine.locked)
        self.machine.close()
        if kind is None:
            assert not locked, "still locked"
            left = _open_files() - self.files
            assert not left, f"files were left open: {left}"


def _open_files() -> Counter[str]:
    # Each by what it is; the file of the listing itself is gone by the time that it is looked at.
    found: Counter[str] = Counter()
    for each in Path("/proc/self/fd").iterdir():
        with contextlib.suppress(OSError):
            found[re.sub(r"\d+", "", str(each.readlink()))] += 1
    return found


Operation = Callable[[World], Callable[[], object]]
"""Prepares a world, and returns what is then done to it."""


def _of(act: Callable[[World], object]) -> Operation:
    return lambda world: lambda: act(world)


def _sharing(sources: PageArray, clients: PageArray) -> Operation:
    def prepare(world: World) -> Callable[[], object]:
        handles = world.nominate(sources), world.nominate(clients)
        return lambda: world.hypervisor.share_gfns_many(sources, handles[0], clients, handles[1])

    return prepare


def _releasing(world: World) -> Callable[[], object]:
    pages = both(ZERO, SHARED_ZERO)
    handles = world.nominate(pages)
    return lambda: world.hypervisor.release_zero_pages(pages, handles)


def _unsharing(world: World) -> Callable[[], object]:
    world.nominate(both(0))
    return lambda: world.hypervisor.unshare_gfns(both(0, *SHARED))


def _read(world: World) -> object:
    pages = both(*range(12))
    return world.hypervisor.read_pages(pages, np.empty((len(pages), PAGE_SIZE), np.uint8))


OPERATIONS: Final[dict[str, tuple[dict[str, bool], Operation]]] = {
    "attach": ({"attached": False}, _of(lambda world: world.hypervisor.control(ONE, True))),
    "nominate": ({}, _of(lambda world: world.hypervisor.nominate_gfns(both(*FRESH, ZERO, SHARED[0])))),
    "attach and nominate": ({"attached": False}, _of(lambda world: world.hypervisor.nominate_gfns(both(*FRESH)))),
    "nominate, direct drives": (
        {"direct_drives": True},
        _of(lambda world: world.hypervisor.nominate_gfns(both(*FRESH))),
    ),
    "share": ({}, _sharing(array(ONE, *FRESH), array(TWO, *FRESH))),
    "share onto a frame": ({}, _sharing(array(ONE, SHARED[0]), array(TWO, ODD))),
    "move a frame's sharers": ({}, _sharing(array(ONE, ODD), array(TWO, SHARED[1]))),
    "release zeros": ({}, _releasing),
    "unshare": ({}, _unsharing),
    "unshare, direct drives": ({"direct_drives": True}, _unsharing),
    "unshare guest": ({}, _of(lambda world: world.hypervisor.unshare_guest(ONE))),
    "attach and unshare guest": ({"attached": False}, _of(lambda world: world.hypervisor.unshare_guest(ONE))),
    "fold back": ({}, _of(lambda world: world.hypervisor.fold_back())),
    "detach": ({}, _of(lambda world: world.hypervisor.detach(ONE))),
    "close": ({}, _of(lambda world: world.hypervisor.close())),
    "read": ({}, _of(_read)),
    "audit": ({}, _of(lambda world: world.hypervisor.audit())),
    "figures": ({}, _of(lambda world: [world.hypervisor.guest_figures(ONE), world.hypervisor.domains()])),
}
"""name -> how the world is made, and the operation"""


def attempt(act: Callable[[], object]) -> BaseException | None:
    """What it raises."""
    try:
        act()
    except BaseException as error:
        return error
    return None


def is_for_the_user(error: BaseException) -> bool:
    """Whether an error is one that memshr may raise of its own."""
    return isinstance(error, MemshrError)
