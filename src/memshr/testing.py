"""What a mechanism must pass, and what tests of one need: the contract kit, a guest model, and planted faults.

``check_hypervisor`` is the contract of ``memshr.hypervisor`` as a program. A mechanism that passes it can be put
under the sharing session. Give it a ``GuestHost``: the hypervisor, two of its domains, and a way to play their guests.
Every check leaves the host as it found it, except for the contents of the pages that it may use. So one pair of live
guests serves all checks::

    for check in CONTRACT:
        check(host)

``GuestModel`` is the second judge of a property test: it remembers what each guest last wrote (I7), which no audit
of the books can know. ``FAULTS`` break the books of the embedded hypervisor on purpose, one invariant each, to prove
that audit sees it.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Protocol

import numpy as np

from memshr import errors
from memshr.embedded import EmbeddedHypervisor
from memshr.embedded.p2m import HOLE, TYPE_BITS
from memshr.embedded.shared_frames import NO_SLOT, page_id
from memshr.errors import Status
from memshr.hypervisor import NOT_BACKED, Capability, Hypervisor
from memshr.types import PAGE_SIZE, DomId, Gfn, GrantRef, Handle, P2mType, PageArray

__all__ = [
    "CONTRACT",
    "FAULTS",
    "ContractError",
    "GuestHost",
    "GuestModel",
    "check_hypervisor",
]


class GuestHost(Protocol):
    """A hypervisor with two guests that the kit may play."""

    @property
    def hypervisor(self) -> Hypervisor:
        """The mechanism under test."""

    @property
    def domids(self) -> tuple[DomId, DomId]:
        """Two different domains of one trust group."""

    def gfns(self, domid: DomId) -> Sequence[Gfn]:
        """At least eight gfns of a domain that the kit may write and share; plain RAM, in any place."""

    def hole(self, domid: DomId) -> Gfn:
        """A gfn of the domain with nothing behind it."""

    def write(self, domid: DomId, gfn: Gfn, data: bytes, offset: int = 0) -> None:
        """What the guest does: put bytes into its page."""

    def read(self, domid: DomId, gfn: Gfn) -> bytes:
        """What the guest sees: the PAGE_SIZE bytes of its page."""


class ContractError(AssertionError):
    """The mechanism breaks a promise of the seam; the text says which."""


def _require(holds: bool, promise: str) -> None:
    if not holds:
        raise ContractError(promise)


def _page(seed: int) -> bytes:
    # A page that is not uniform, differs between seeds, and never is all zeros.
    return np.random.default_rng(seed).bytes(PAGE_SIZE)


@contextlib.contextmanager
def _raises(kind: type[errors.MemshrError], promise: str) -> Iterator[None]:
    try:
        yield
    except kind:
        return
    except errors.MemshrError as error:
        raise ContractError(f"{promise}; raised {type(error).__name__} instead") from error
    raise ContractError(f"{promise}; raised nothing")


def _nominate(host: GuestHost, page: tuple[DomId, Gfn]) -> Handle:
    return host.hypervisor.nominate_gfn(*page)


def _shared_pair(host: GuestHost, content: bytes) -> tuple[tuple[DomId, Gfn], tuple[DomId, Gfn], Handle, Handle]:
    """A page of each domain with equal contents, shared; and the handles that they were shared with."""
    first, second = host.domids
    source, client = (first, host.gfns(first)[0]), (second, host.gfns(second)[0])
    host.write(*source, content)
    host.write(*client, content)
    handles = _nominate(host, source), _nominate(host, client)
    host.hypervisor.share_gfns(*source, handles[0], *client, handles[1])
    return source, client, *handles


def handles_name_versions(host: GuestHost) -> None:
    """A handle is 2 or more, stays while the page does, and is followed by greater ones, so never used again."""
    page = host.domids[0], host.gfns(host.domids[0])[0]
    host.write(*page, _page(1))
    first = _nominate(host, page)
    _require(first >= 2, "handles 0 and 1 are never handed out")
    _require(_nominate(host, page) == first, "a nominated page keeps its handle")
    host.write(*page, b"!")
    second = _nominate(host, page)
    _require(second > first, "a write kills the handle, and the next one is greater than any before it (I5)")
    _require(host.read(*page) == b"!" + _page(1)[1:], "nominating a page changes nothing in it")
    host.hypervisor.unshare_gfn(*page)


def nominate_counts(host: GuestHost) -> None:
    """Nominating takes a page from tot_pages to shr_pages and makes one used frame; a write takes it back."""
    hypervisor, page = host.hypervisor, (host.domids[0], host.gfns(host.domids[0])[0])
    host.write(*page, _page(2))
    info, counters = hypervisor.domain_info(page[0]), hypervisor.counters()
    _require(hypervisor.names()[page[0]] == info.name, "names has the names of domain_info")
    _require(
        list(hypervisor.names()) == [each.domid for each in hypervisor.domains()], "names has all domains, in order"
    )
    _nominate(host, page)
    nominated, after = hypervisor.domain_info(page[0]), hypervisor.counters()
    _require(nominated.tot_pages == info.tot_pages - 1, "a nominated page leaves tot_pages")
    _require(nominated.shr_pages == info.shr_pages + 1, "a nominated page enters shr_pages")
    _require(after.used_frames == counters.used_frames + 1, "a nominated page is a used frame")
    _require(after.freed_pages == counters.freed_pages, "nominating frees nothing")
    host.write(*page, b"?")
    hypervisor.audit()  # on a live host writes are seen when somebody looks
    _require(hypervisor.counters() == counters, "a written page is no shared frame any more")
    _require(hypervisor.domain_info(page[0]).shr_pages == info.shr_pages, "a written page leaves shr_pages")


def share_puts_two_pages_on_one_frame(host: GuestHost) -> None:
    """After share both guests read what they read before, on one frame less."""
    hypervisor = host.hypervisor
    before = hypervisor.counters()
    source, client, handle, _ = _shared_pair(host, _page(3))
    after = hypervisor.counters()
    _require(after.freed_pages == before.freed_pages + 1, "share frees one page")
    _require(after.used_frames == before.used_frames + 1, "two nominated pages shared are one frame")
    _require(host.read(*source) == host.read(*client) == _page(3), "both guests read what they wrote (I7)")
    _require(hypervisor.debug_gfn(*source) == hypervisor.debug_gfn(*client) == 2, "two gfns are on the frame")
    _require(_nominate(host, client) == handle, "after share the source's handle stands for both")
    _require(hypervisor.audit().clean, "audit finds nothing after share")
    hypervisor.unshare_gfn(*source)
    hypervisor.unshare_gfn(*client)
    _require(hypervisor.counters() == before, "unsharing both restores the counters")


def a_write_is_seen_by_its_writer_only(host: GuestHost) -> None:
    """Copy on write: the writer gets its own page, the others keep the frame (I7, I8)."""
    source, client, handle, _ = _shared_pair(host, _page(4))
    host.write(*client, b"mine", 100)
    _require(host.read(*client) == _page(4)[:100] + b"mine" + _page(4)[104:], "the writer reads its own write")
    _require(host.read(*source) == _page(4), "nobody else sees the write")
    _require(host.hypervisor.audit().clean, "audit finds nothing after a write")
    _require(host.hypervisor.debug_gfn(*source) == 1, "the frame has one sharer left")
    with _raises(errors.NotSharableError, "debug_gfn of a page that was unshared"):
        host.hypervisor.debug_gfn(*client)
    _require(_nominate(host, source) == handle, "the frame's handle lives while a sharer is left")
    host.write(*source, b"last")
    _require(host.read(*source) == b"last" + _page(4)[4:], "the last sharer may write, too")
    _require(host.hypervisor.audit().clean, "audit finds nothing after the last sharer's write")


def the_source_may_leave_first(host: GuestHost) -> None:
    """The frame stays the client's when the source is the one that writes."""
    source, client, handle, _ = _shared_pair(host, _page(5))
    host.write(*source, b"gone")
    _require(host.read(*client) == _page(5), "the client keeps the contents")
    _require(_nominate(host, client) == handle, "and the handle")
    _require(_nominate(host, source) != handle, "the page that left gets a new one")
    for page in (source, client):
        host.hypervisor.unshare_gfn(*page)


def dead_handles_are_refused(host: GuestHost) -> None:
    """share says which side's handle is dead, source first, and changes nothing (I9)."""
    hypervisor = host.hypervisor
    first, second = host.domids
    source, client = (first, host.gfns(first)[0]), (second, host.gfns(second)[0])
    host.write(*source, _page(6))
    host.write(*client, _page(6))
    handles = _nominate(host, source), _nominate(host, client)
    before = hypervisor.counters()
    for source_handle, client_handle, side in (
        (Handle(handles[0] + 1000), handles[1], "source"),
        (handles[0], Handle(handles[1] + 1000), "client"),
        (Handle(0), Handle(0), "source"),
    ):
        try:
            hypervisor.share_gfns(*source, source_handle, *client, client_handle)
        except errors.StaleHandleError as error:
            _require(error.side == side, f"the {side}'s handle is named")
        else:
            raise ContractError("share with a handle that was never given out")
    _require(hypervisor.counters() == before, "a refused share changes nothing")
    host.write(*client, b"late")
    with _raises(errors.StaleHandleError, "share after the client was written"):
        hypervisor.share_gfns(*source, handles[0], *client, handles[1])
    _require(host.read(*client)[:4] == b"late", "a refused share does not touch contents")
    for page in (source, client):
        hypervisor.unshare_gfn(*page)


def the_clients_handle_dies(host: GuestHost) -> None:
    """After share the client's handle is dead in both roles."""
    hypervisor = host.hypervisor
    source, client, handle, dead = _shared_pair(host, _page(7))
    third = host.domids[0], host.gfns(host.domids[0])[1]
    host.write(*third, _page(7))
    fresh = _nominate(host, third)
    with _raises(errors.StaleHandleError, "a dead handle as source"):
        hypervisor.share_gfns(*client, dead, *third, fresh)
    with _raises(errors.StaleHandleError, "a dead handle as client"):
        hypervisor.share_gfns(*third, fresh, *client, dead)
    hypervisor.share_gfns(*client, handle, *third, fresh)
    _require(hypervisor.debug_gfn(*third) == 3, "the living handle works through any of the frame's gfns")
    hypervisor.share_gfns(*source, Handle(99), *third, Handle(98))
    _require(hypervisor.debug_gfn(*third) == 3, "sharing pages of one frame is no error and no change")
    for page in (source, client, third):
        hypervisor.unshare_gfn(*page)


def groups_share_whole(host: GuestHost) -> None:
    """share moves all the gfns of the client's frame to the source's."""
    hypervisor = host.hypervisor
    first, second = host.domids
    before = hypervisor.counters()
    pages = [(first, host.gfns(first)[i]) for i in (0, 1)] + [(second, host.gfns(second)[i]) for i in (0, 1)]
    handles = []
    for page in pages:
        host.write(*page, _page(8))
        handles.append(_nominate(host, page))
    hypervisor.share_gfns(*pages[0], handles[0], *pages[1], handles[1])
    hypervisor.share_gfns(*pages[2], handles[2], *pages[3], handles[3])
    hypervisor.share_gfns(*pages[1], handles[0], *pages[3], handles[2])
    _require(hypervisor.debug_gfn(*pages[2]) == 4, "both groups are on one frame")
    _require(all(host.read(*page) == _page(8) for page in pages), "every guest reads what it wrote (I7)")
    after = hypervisor.counters()
    _require(after.freed_pages == before.freed_pages + 3, "four pages on one frame free three")
    _require(hypervisor.audit().clean, "audit finds nothing after a group moved")
    for page in pages:
        hypervisor.unshare_gfn(*page)
    _require(hypervisor.counters() == before, "unsharing all restores the counters")


def what_cannot_be_nominated(host: GuestHost) -> None:
    """A hole, a gfn beyond the address width, an unknown domain."""
    domid = host.domids[0]
    for gfn in (host.hole(domid), Gfn(1 << 40)):
        with _raises(errors.NotSharableError, f"nominating gfn {gfn:#x}, where nothing is"):
            host.hypervisor.nominate_gfn(domid, gfn)
        with _raises(errors.NotSharableError, f"unsharing gfn {gfn:#x}, where nothing is"):
            host.hypervisor.unshare_gfn(domid, gfn)
    with _raises(errors.NoSuchDomainError, "nominating a page of an unknown domain"):
        host.hypervisor.nominate_gfn(DomId(0x7FE0), Gfn(0))
    with _raises(errors.NoSuchDomainError, "the figures of an unknown domain"):
        host.hypervisor.domain_info(DomId(0x7FE0))


def unshare_gives_a_page_of_its_own(host: GuestHost) -> None:
    """unshare_gfn keeps the contents, kills a nomination, and does nothing to a private page."""
    hypervisor = host.hypervisor
    before = hypervisor.counters()
    source, client, *_ = _shared_pair(host, _page(9))
    hypervisor.unshare_gfn(*client)
    _require(host.read(*client) == _page(9), "an unshared page keeps its contents")
    with _raises(errors.NotSharableError, "debug_gfn of an unshared page"):
        hypervisor.debug_gfn(*client)
    hypervisor.unshare_gfn(*client)
    hypervisor.unshare_gfn(*source)
    _require(hypervisor.counters() == before, "nothing is shared any more")


def many_pages_answer_as_one(host: GuestHost) -> None:
    """The many-page calls: the same answers in the order of the rows, errors included."""
    hypervisor = host.hypervisor
    first, second = host.domids
    for i in range(4):
        host.write(first, host.gfns(first)[i], _page(20 + i))
        host.write(second, host.gfns(second)[i], _page(20 + i))
    before = hypervisor.counters()
    sources = PageArray(
        np.array([first] * 5 + [0x7FE0], np.uint16),
        np.array([*host.gfns(first)[:4], host.hole(first), 0], np.int64),
    )
    clients = PageArray.of_domain(second, np.array([*host.gfns(second)[:4], *host.gfns(second)[:2]], np.int64))
    source_handles, statuses = hypervisor.nominate_gfns(sources)
    _require(
        statuses.tolist() == [0, 0, 0, 0, Status.EINVAL, Status.ESRCH], "nominate_gfns tells the status of each page"
    )
    _require(
        [_nominate(host, (first, gfn)) for gfn in host.gfns(first)[:4]] == source_handles[:4].tolist(),
        "nominate_gfns hands out the pages' handles",
    )
    client_handles, _ = hypervisor.nominate_gfns(clients)
    _require(client_handles[4] == client_handles[0], "a page that comes twice has one handle")
    wrong = client_handles.copy()
    wrong[1] += np.uint64(1000)
    statuses = hypervisor.share_gfns_many(sources, source_handles, clients, wrong)
    _require(statuses[:4].tolist() == [0, Status.C_HANDLE_INVALID, 0, 0], "share_gfns_many: the status of each row")
    _require(statuses[5] == Status.ESRCH and statuses[4] < 0, "share_gfns_many: rows that cannot be shared")
    _require(hypervisor.counters().freed_pages == before.freed_pages + 3, "three of the rows were shared")
    buffer = np.empty((6, PAGE_SIZE), np.uint8)
    _require(hypervisor.read_pages(clients, buffer).tolist() == [0] * 6, "read_pages reads shared pages")
    for row in range(4):
        _require(buffer[row].tobytes() == _page(20 + row), "read_pages: row i holds page i")
        _require(host.read(second, Gfn(int(clients.gfns[row]))) == _page(20 + row), "the guests read what they wrote")
    _require(hypervisor.audit().clean, "audit finds nothing after share_gfns_many")
    _require(hypervisor.audit().counters == hypervisor.counters(), "an audit has the counters of the books it audited")
    _require(hypervisor.debug_gfns(sources).tolist() == [2, 1, 2, 2, 0, 0], "debug_gfns counts the gfns of each frame")
    _require(hypervisor.debug_gfns(clients).tolist() == [2, 1, 2, 2, 2, 1], "debug_gfns: the same through any of them")
    statuses = hypervisor.unshare_gfns(sources)
    _require(statuses.tolist() == [0, 0, 0, 0, Status.EINVAL, Status.ESRCH], "unshare_gfns: the status of each page")
    _require(not hypervisor.debug_gfns(sources).any(), "debug_gfns: 0 for pages that are not shared")
    hypervisor.unshare_gfns(clients)
    _require(hypervisor.counters() == before, "unshare_gfns restores the counters")


def ranges_are_read_as_the_guest_sees_them(host: GuestHost) -> None:
    """populated_ranges holds the guests' pages, ascending and apart; read_range and read_pages read them."""
    hypervisor = host.hypervisor
    buffer = np.empty((64, PAGE_SIZE), np.uint8)
    for domid in host.domids:
        ranges = hypervisor.populated_ranges(domid)
        ends = ranges[:, 0] + ranges[:, 1]
        _require(bool((ranges[:, 1] > 0).all() and (ranges[1:, 0] > ends[:-1]).all()), "ranges ascend and do not touch")
        for i, gfn in enumerate(host.gfns(domid)):
            host.write(domid, gfn, _page(40 + i))
            inside = (ranges[:, 0] <= gfn) & (gfn < ends)
            _require(bool(inside.any()), "every gfn of RAM is in populated_ranges")
            _require(
                hypervisor.read_range(domid, gfn, 1, buffer)[0].tobytes() == _page(40 + i), "read_range: the contents"
            )
        hole = host.hole(domid)
        _require(not ((ranges[:, 0] <= hole) & (hole < ends)).any(), "a hole is in no range")
        with _raises(errors.NotSharableError, "read_range over a hole"):
            hypervisor.read_range(domid, hole, 1, buffer)
    pages = PageArray(
        np.array([*host.domids, host.domids[0]], np.uint16),
        np.array([host.gfns(host.domids[0])[1], host.gfns(host.domids[1])[2], host.hole(host.domids[0])], np.int64),
    )
    _require(hypervisor.read_pages(pages, buffer).tolist() == [0, 0, Status.EINVAL], "read_pages: statuses")
    _require(buffer[0].tobytes() == _page(41) and buffer[1].tobytes() == _page(42), "read_pages: the contents")


def zero_pages_are_given_back(host: GuestHost) -> None:
    """release_zero_pages, where there is such a thing: the page costs nothing, reads as zeros, and can be written."""
    hypervisor = host.hypervisor
    domid = host.domids[0]
    gfns = host.gfns(domid)[:2]
    pages = PageArray.of_domain(domid, np.array(gfns, np.int64))
    if Capability.ZERO not in hypervisor.capabilities:
        with _raises(errors.UnsupportedError, "release_zero_pages without the capability"):
            hypervisor.release_zero_pages(pages, np.zeros(2, np.uint64))
        return
    before = hypervisor.counters()
    for gfn in gfns:
        host.write(domid, gfn, bytes(PAGE_SIZE))
    handles, _ = hypervisor.nominate_gfns(pages)
    host.write(domid, gfns[1], b"changed")
    statuses = hypervisor.release_zero_pages(pages, handles)
    _require(statuses.tolist() == [0, Status.S_HANDLE_INVALID], "a page with a dead handle is left alone")
    _require(host.read(domid, gfns[1])[:7] == b"changed", "and keeps its contents")
    _require(not hypervisor.backed(pages)[0], "a released page is backed no more")
    if Capability.FRAMES in hypervisor.capabilities:
        _require(hypervisor.frames_of(pages).tolist() == [NOT_BACKED, -1], "and frames_of says so, too")
    _require(host.read(domid, gfns[0]) == bytes(PAGE_SIZE), "a released page reads as zeros")
    host.write(domid, gfns[0], b"again", 8)
    _require(host.read(domid, gfns[0])[:13] == bytes(8) + b"again", "a released page can be written")
    hypervisor.unshare_gfns(pages)
    _require(hypervisor.audit().clean and hypervisor.counters() == before, "the books are as before")


def frames_say_who_is_together(host: GuestHost) -> None:
    """frames_of, where there is such a thing: equal for pages of one frame, other for another, gone with a write."""
    hypervisor, (first, second) = host.hypervisor, host.domids
    domids = np.array([first, second, first, second], np.uint16)
    gfns = np.array([host.gfns(first)[0], host.gfns(second)[0], host.gfns(first)[1], host.gfns(second)[1]], np.int64)
    pages = PageArray(domids, gfns)
    if Capability.FRAMES not in hypervisor.capabilities:
        with _raises(errors.UnsupportedError, "frames_of without the capability"):
            hypervisor.frames_of(pages)
        return
    for (domid, gfn), seed in zip(zip(domids.tolist(), gfns.tolist(), strict=True), (20, 20, 21, 21), strict=True):
        host.write(domid, gfn, _page(seed))
    _require(hypervisor.frames_of(pages).tolist() == [-1] * 4, "pages that share nothing are on no frame")
    handles, _ = hypervisor.nominate_gfns(pages)
    hypervisor.share_gfns_many(pages[:4:2], handles[::2], pages[1:4:2], handles[1::2])
    frames = hypervisor.frames_of(pages).tolist()
    _require(min(frames) >= 0, "shared pages are on frames")
    _require(frames[0] == frames[1] and frames[2] == frames[3], "pages that were shared with each other are on one")
    _require(frames[0] != frames[2], "and others on another")
    host.write(DomId(int(domids[1])), Gfn(int(gfns[1])), b"changed")
    after = hypervisor.frames_of(pages).tolist()
    _require(after[1] == -1, "a page that was written is on none")
    _require(after[0] in (-1, frames[0]) and after[2:] == frames[2:], "and the others stay where they are")
    hypervisor.unshare_gfns(pages)


def what_is_not_there_says_so(host: GuestHost) -> None:
    """A call outside the capabilities raises UnsupportedError, and nothing else."""
    hypervisor, (first, second) = host.hypervisor, host.domids
    calls: dict[Capability, list[Callable[[], object]]] = {
        Capability.GREF: [
            lambda: hypervisor.nominate_gref(first, GrantRef(8)),
            lambda: hypervisor.debug_gref(first, GrantRef(8)),
            lambda: hypervisor.share_grefs(first, GrantRef(8), Handle(2), second, GrantRef(8), Handle(2)),
        ],
        Capability.PHYSMAP: [lambda: hypervisor.add_to_physmap(first, Gfn(0), Handle(2), second, Gfn(0))],
        Capability.RANGE: [lambda: hypervisor.range_share(first, second, Gfn(0), Gfn(0))],
        Capability.RING: [
            lambda: hypervisor.ring_enable(first),
            lambda: hypervisor.ring_disable(first),
            lambda: hypervisor.ring_requests(first),
            lambda: hypervisor.ring_respond(first),
            lambda: hypervisor.domain_resume(first),
        ],
        Capability.FORK: [
            lambda: hypervisor.fork(first, second),
            lambda: hypervisor.fork_reset(first, memory=True),
        ],
    }
    for capability, attempts in calls.items():
        if capability not in hypervisor.capabilities:
            for attempt in attempts:
                with _raises(errors.UnsupportedError, f"a call without the capability {capability}"):
                    attempt()


CONTRACT: tuple[Callable[[GuestHost], None], ...] = (
    handles_name_versions,
    nominate_counts,
    share_puts_two_pages_on_one_frame,
    a_write_is_seen_by_its_writer_only,
    the_source_may_leave_first,
    dead_handles_are_refused,
    the_clients_handle_dies,
    groups_share_whole,
    what_cannot_be_nominated,
    unshare_gives_a_page_of_its_own,
    many_pages_answer_as_one,
    ranges_are_read_as_the_guest_sees_them,
    zero_pages_are_given_back,
    frames_say_who_is_together,
    what_is_not_there_says_so,
)
"""The promises of the seam, each a function that raises ContractError when it is broken."""


def check_hypervisor(host: GuestHost) -> None:
    """Run the whole contract on one host.

    :raises ContractError: a promise is broken; the text names it and the check.
    """
    for check in CONTRACT:
        try:
            check(host)
        except ContractError as error:
            raise ContractError(f"{check.__name__}: {error}") from error


class GuestModel:
    """What each guest last wrote to each of its pages: the judge of I7. Pages never written are not judged."""

    def __init__(self) -> None:
        self._pages: dict[tuple[DomId, Gfn], bytearray] = {}

    def write(self, domid: DomId, gfn: Gfn, data: bytes, offset: int = 0) -> None:
        """Note a write. The first one to a page must fill it whole."""
        if (domid, gfn) not in self._pages:
            assert offset == 0
            assert len(data) == PAGE_SIZE
            self._pages[domid, gfn] = bytearray(data)
        self._pages[domid, gfn][offset : offset + len(data)] = data

    def forget(self, domid: DomId, gfn: Gfn | None = None) -> None:
        """A page went away, or a whole domain."""
        self._pages = {
            page: data for page, data in self._pages.items() if page[0] != domid or gfn not in (None, page[1])
        }

    def content(self, domid: DomId, gfn: Gfn) -> bytes | None:
        """What the guest should read; None if it is not known."""
        page = self._pages.get((domid, gfn))
        return None if page is None else bytes(page)

    def wrong_pages(self, read: Callable[[DomId, Gfn], bytes]) -> list[tuple[DomId, Gfn]]:
        """The pages that do not read as they were last written."""
        return [page for page, data in self._pages.items() if read(*page) != data]


# -- planted faults --------------------------------------------------------------------------------------------------
#
# Each takes the embedded hypervisor and two pages that share a frame, (domid, gfn) the second, and breaks one book.


def _slot(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> int:
    frames = hypervisor.books.frames
    return frames.slot_of_mfn.get(hypervisor.books.entries.get(page_id(domid, gfn)) >> TYPE_BITS)


def _fault_owner(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    hypervisor.memory.owner.set(hypervisor.books.frames.mfn.item(_slot(hypervisor, domid, gfn)), domid)


def _fault_no_sharers(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    hypervisor.books.frames.count[_slot(hypervisor, domid, gfn)] = 0


def _fault_p2m(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    hypervisor.books.entries.set(page_id(domid, gfn), HOLE)


def _fault_other_frame(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    hypervisor.books.entries.set(page_id(domid, gfn), 1 << TYPE_BITS | P2mType.RAM_SHARED)


def _fault_type(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    pid = page_id(domid, gfn)
    mfn = hypervisor.books.entries.get(pid) >> TYPE_BITS
    hypervisor.books.entries.set(pid, mfn << TYPE_BITS | P2mType.RAM_RW)


def _fault_domain(hypervisor: EmbeddedHypervisor, domid: DomId, _gfn: Gfn) -> None:
    del hypervisor.books.domains[domid]


def _fault_record(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    mfn = hypervisor.books.entries.get(page_id(domid, gfn)) >> TYPE_BITS
    hypervisor.books.frames.slot_of_mfn.set(mfn, NO_SLOT)


def _fault_unlisted(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    hypervisor.books.frames.unlink(_slot(hypervisor, domid, gfn), page_id(domid, gfn))


def _fault_count(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    hypervisor.books.frames.count[_slot(hypervisor, domid, gfn)] += 1


def _fault_handle(hypervisor: EmbeddedHypervisor, domid: DomId, gfn: Gfn) -> None:
    frames = hypervisor.books.frames
    frames.handle[_slot(hypervisor, domid, gfn)] = frames.next_handle + 7


def _fault_counter(hypervisor: EmbeddedHypervisor, _domid: DomId, _gfn: Gfn) -> None:
    hypervisor.books.freed_pages += 1


def _fault_total(hypervisor: EmbeddedHypervisor, _domid: DomId, _gfn: Gfn) -> None:
    hypervisor.books.used_frames += 1


FAULTS: dict[str, tuple[str, Callable[[EmbeddedHypervisor, DomId, Gfn], None]]] = {
    "frame that does not know that it is shared": ("I1", _fault_record),
    "frame owned by a domain": ("I1", _fault_owner),
    "frame without sharers": ("I2", _fault_no_sharers),
    "p2m entry changed under the reverse map": ("I3", _fault_p2m),
    "p2m entry of another frame": ("I3", _fault_other_frame),
    "p2m entry of another type": ("I3", _fault_type),
    "page of a domain that is gone": ("I3", _fault_domain),
    "page missing from the reverse map": ("I3", _fault_unlisted),
    "reference count too high": ("I4", _fault_count),
    "handle that was never given out": ("I5", _fault_handle),
    "freed_pages too high": ("I6", _fault_counter),
    "used_frames too high": ("I6", _fault_total),
}
"""Name of a fault -> the invariant that it breaks, and what plants it: called with a shared page."""
