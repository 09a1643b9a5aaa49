"""The books of running guests: what the kernel says of their pages, and the little that nobody but us can know.

Who is on which frame is known to the kernel alone, because it does copy-on-write without telling anybody. So these
books keep as little as they can and ask for the rest:

* ``frame``: the frame that is mapped at each page, as /proc/PID/maps says; rebuilt from there at every start (I11).
  Whether the page still *is* the frame, or already the guest's own copy, is read from the pagemap whenever it matters.
* ``states``: which pages are nominated, and in flight (``PageStates``). They live and die with this process: handles
  are names of versions, and nobody can know what happened to a page while nobody watched.

Pages of all guests are in one count, their *ids*. Nobody but ``hypervisor`` and ``remapping`` changes these books.

Frame numbers (mfn) are ``pool << 32 | frame`` with the pool's place in ``pools``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import errno
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import BackendError, DomainError, InvariantError, NoSuchDomainError, Status
from memshr.hypervisor import error_of
from memshr.indices import GuestPage, PageId, of_kind
from memshr.procfs import Vmas
from memshr.qemu import pagemap
from memshr.qemu.attachment import Attachment, GuestState
from memshr.qemu.guests import GuestProcess
from memshr.qemu.host import Host
from memshr.qemu.pool import FramePool, fits_pool
from memshr.qemu.ram import Pages
from memshr.qemu.states import PageIds, PageStates
from memshr.runs import range_members
from memshr.types import (
    PAGE_SIZE,
    AuditFinding,
    AuditReport,
    Counters,
    DomId,
    Gfn,
    Handles,
    Mfn,
    PageArray,
    PageBytes,
    Statuses,
    page_buffer,
)

POOL_SHIFT: Final = 32
NOWHERE: Final = -1
_FEW_PAGES: Final = 1 << 16
"""So many pages may always be remapped before the index by frame is made anew; more if it is large."""
_SPARSE: Final = 16
"""If the largest number is more than this many times the count of the numbers, sorting them is faster than counting."""


@dataclass(frozen=True, slots=True)
class GuestFigures:
    """What one guest shares, as the kernel says. Pages.

    ``sharing_pages`` lie on a frame; ``copied_pages`` lie in a pool's mapping but were written since, so they cost a
    mapping (``fold_back`` puts that right); ``absent_pages`` cost the host nothing: never touched, or given back as
    zeros.
    """

    domid: DomId
    name: str
    pid: int
    group: str
    sharing_pages: int
    copied_pages: int
    nominated_pages: int
    absent_pages: int
    mappings_left: int


@dataclass(frozen=True, slots=True)
class PoolFigures:
    """One frame pool. ``used_frames`` are read by somebody, ``backed_bytes`` is what the host spends on it."""

    group: str
    used_frames: int
    sharing_pages: int
    backed_bytes: int


class PoolBooks:
    """A pool with what is known of each of its frames: its handle and the sum of its contents (0: none)."""

    def __init__(self, pool: FramePool) -> None:
        self.pool = pool
        self.whole = False
        """see GuestBooks.whole, which judges; right for the guests in ``judged_for``"""
        self.judged_for: frozenset[DomId] | None = None
        self.seen_in: set[DomId] = set()
        """guests in which it was mapped when we looked, and from which we have not taken it since"""
        self.handles = np.zeros(0, dtype=np.uint64)
        self.sums = np.zeros(0, dtype=np.uint64)
        self.grow()

    def grow(self) -> None:
        """Make room for every frame number that was given out. Most are of frames long gone: they cost nothing."""
        if self.pool.frames > len(self.handles):
            room = max(self.pool.frames, 2 * len(self.handles))
            self.handles, self.sums = _enlarged(self.handles, room), _enlarged(self.sums, room)


class GuestBooks:
    """The books of some guests, who get the domids 1, 2, ... in this order.

    :param groups: name of a trust group -> domids of its guests.
    :param host: the machine that they run on.
    :raises NoSuchDomainError: a guest has ended, or ``groups`` names one that is not there.
    :raises BackendError: a guest's monitor cannot be used.
    """

    def __init__(self, processes: Sequence[GuestProcess], groups: Mapping[str, Collection[int]], host: Host) -> None:
        self._host = host
        self.guests: list[Attachment] = []
        self.pools: list[PoolBooks] = []
        try:
            for number, process in enumerate(processes, start=1):
                self.guests.append(Attachment(DomId(number), process, host.target))
            self.groups = _group_of_each(processes, groups)
            self.base = np.concatenate([[0], np.cumsum([guest.pages for guest in self.guests])]).astype(np.int64)
            total = int(self.base[-1])
            self.frame = np.full(total, NOWHERE, dtype=np.int64)
            self.states = PageStates(self.guests)
            self._weights = np.random.default_rng().integers(1, 1 << 63, PAGE_SIZE // 8, dtype=np.uint64) * np.uint64(2)
            self._weights += np.uint64(1)
            self._buffer = page_buffer(512)
            self._read_from: dict[DomId, Vmas] = {}
            self._by_frame: tuple[NDArray[np.int64], PageIds] | None = None
            self._remapped: list[PageIds] = []
            self._remapped_pages = 0
            for guest in self.guests:
                self.rebuild(guest, guest.mappings())
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """End every link and close every file."""
        with contextlib.ExitStack() as closing:  # each, whatever the others do
            for pool in self.pools:
                closing.callback(pool.pool.close)
            for guest in self.guests:
                closing.callback(guest.close)
            self.guests, self.pools = [], []

    # -- the truth of the host ----------------------------------------------------------------------------------------

    def rebuild(self, guest: Attachment, mappings: Vmas) -> None:
        """Read from what QEMU has mapped which frame is at each page of a guest that we have not changed since."""
        if mappings is self._read_from.get(guest.domid):
            return
        self._read_from.pop(guest.domid, None)  # if this fails half-way, the next one reads anew
        frames, findings = self._mapped_frames(guest, mappings)
        if findings:
            raise InvariantError("; ".join(str(finding) for finding in findings))
        self.note_frames(guest, self.ids_of(guest, np.arange(guest.pages)), frames)
        self.give_frame_handles(frames[guest.in_pool])  # older, and so smaller, than any that is yet to come
        self._read_from[guest.domid] = mappings

    def forget(self, guest: Attachment) -> None:
        """A guest's link has been given up: what is mapped there is to be read anew, and nothing is nominated."""
        self._read_from.pop(guest.domid, None)
        self.states.forget(guest)

    def note_frames(self, guest: Attachment, ids: PageIds, frames: NDArray[np.int64]) -> None:
        """Note which frames are mapped at these pages of a guest now (NOWHERE: none)."""
        self.frame[ids] = frames
        guest.in_pool[self.local(guest, ids)] = frames != NOWHERE
        if self._by_frame is not None:
            self._remapped.append(ids)
            self._remapped_pages += len(ids)
            if self._remapped_pages > max(_FEW_PAGES, len(self._by_frame[1]) // 4):
                self._by_frame = None

    def holders(self, frames: NDArray[np.int64]) -> PageIds:
        """Every page, ascending, at which one of these frames is mapped, also if the guest has a copy there.

        There is an index of all pages by frame, and a list of the pages that were remapped since the index was made. A
        search through all pages of all guests for each batch would cost the square of their number.

        An example, frames 8 and 9 wanted::

            frame of the index    7  8  8  9       page ids there    30  4  11  5
            remapped since                         page ids          4, 40
            looked at             4  11  5  40     of these, on frame 8 or 9 now: 5, 11, 40 (4 has left)
        """
        wanted = np.unique(frames)
        if not len(wanted):
            return of_kind(PageId, wanted)
        if self._by_frame is None:
            ids = of_kind(PageId, np.flatnonzero(self.frame != NOWHERE))
            order = np.argsort(self.frame[ids], kind="stable")
            self._by_frame = self.frame[ids[order]], ids[order]
            self._remapped, self._remapped_pages = [], 0
        mapped, ids = self._by_frame
        first, end = (np.searchsorted(mapped, wanted, side) for side in ("left", "right"))
        rows = range_members(first, end - first)
        found = np.unique(np.concatenate([ids[rows], *self._remapped]))
        return found[np.isin(self.frame[found], wanted)]

    def _mapped_frames(self, guest: Attachment, mappings: Vmas) -> tuple[NDArray[np.int64], list[AuditFinding]]:
        frames = np.full(guest.pages, NOWHERE, dtype=np.int64)
        findings = []
        known = {books.pool.file: number for number, books in enumerate(self.pools)}
        try:
            pool_mappings = list(guest.pool_mappings(mappings))
        except BackendError as error:
            raise guest.failed(OSError(errno.E2BIG, error.args[0])) from error
        for mapped in pool_mappings:
            sample = mapped.sample
            number = known.get(mapped.file)
            if number is None:
                try:
                    pool = self._host.adopt_pool(guest.process.pid, sample)
                except OSError as error:
                    raise guest.failed(error) from error
                if pool is None:
                    findings.append(
                        AuditFinding(
                            "I10",
                            guest.domid,
                            None,
                            None,
                            "frame pools that memshr made",
                            f"a mapping at {sample.start:#x} that only calls itself one: {sample.path}",
                            "the guest's QEMU pretends to share",
                        )
                    )
                    continue
                # The mapping may have become another since it was looked at: what was opened is what counts.
                number = known.get(pool.file)
                if number is not None or pool.file != mapped.file:
                    pool.close()
                    raise guest.failed(OSError(errno.EAGAIN, "it changed its mappings"))
                number = len(self.pools)
                known[pool.file] = number
                self.pools.append(PoolBooks(pool))
            self.pools[number].seen_in.add(guest.domid)
            pages = guest.ram.pages_of_hvas(mapped.hvas)
            inside = pages >= 0
            frames[pages[inside]] = (number << POOL_SHIFT) + mapped.frames[inside]
        return frames, findings

    def on_frame(self, ids: PageIds) -> NDArray[np.bool_]:
        """Which pages are on a frame now, by the pagemap. The pages of guests that have ended are not."""
        found = np.asarray(self.frame[ids] != NOWHERE)
        mapped = np.flatnonzero(found)
        for guest, rows in self.by_guest(ids[mapped]):
            some = mapped[rows]
            try:
                found[some] = pagemap.on_frame(guest.entries(self.local(guest, ids[some])))
            except NoSuchDomainError:
                found[some] = False  # nobody reads there any more
            except DomainError:
                continue  # it was given up just now: it may still read all that is mapped in it
        return found

    def readers(self) -> tuple[PageIds, NDArray[np.int64]]:
        """Every page that is on a frame now, and its frame."""
        ids = of_kind(PageId, np.flatnonzero(self.frame != NOWHERE))
        ids = ids[self.on_frame(ids)]
        return ids, self.frame[ids]

    def by_guest(self, ids: PageIds) -> list[tuple[Attachment, NDArray[np.int64]]]:
        # Each guest that has some of these pages, with the rows of ``ids`` that are its.
        row = np.searchsorted(self.base, ids, side="right") - 1
        return [(self.guests[each], np.flatnonzero(row == each)) for each in _present(row)]

    def local(self, guest: Attachment, ids: PageIds) -> Pages:
        """The numbers of pages in their guest."""
        return of_kind(GuestPage, ids - self.base[guest.domid - 1])

    def ids_of(self, guest: Attachment, pages: NDArray[np.integer]) -> PageIds:
        """The page ids of pages of one guest."""
        return of_kind(PageId, pages + self.base[guest.domid - 1])

    def guest(self, domid: int, call: str) -> Attachment:
        """The guest with this domid.

        :raises NoSuchDomainError: there is none, or it has ended. :raises RefusedDomainError: it was given up, or it is
            dom0's number.
        """
        guest = self.present_guest(domid, call)
        if guest.state is GuestState.LOST:
            raise guest.lost_error()
        return guest

    def present_guest(self, domid: int, call: str) -> Attachment:
        """``guest``, also one that was given up."""
        if 0 < domid <= len(self.guests) and self.guests[domid - 1].state is not GuestState.GONE:
            return self.guests[domid - 1]
        raise error_of(call, Status.EPERM if domid == 0 else Status.ESRCH, domid=domid)

    def ids(self, pages: PageArray) -> tuple[PageIds, Statuses]:
        """The ids of pages (-1 where there is none), and ESRCH, EPERM or EINVAL for those."""
        ids = np.full(len(pages), -1, dtype=np.int64)
        statuses = np.full(len(pages), Status.ESRCH, dtype=np.int32)
        statuses[pages.domids == 0] = Status.EPERM
        for domid in _present(pages.domids):
            if not 0 < domid <= len(self.guests) or self.guests[domid - 1].dead:
                continue
            rows = np.flatnonzero(pages.domids == domid)
            local = self.guests[domid - 1].pages_of_gfns(pages.gfns[rows])
            ids[rows] = np.where(local >= 0, local + self.base[domid - 1], -1)
            statuses[rows] = np.where(local >= 0, Status.OK, Status.EINVAL)
        return of_kind(PageId, ids), statuses

    def has_ended(self, ids: PageIds) -> NDArray[np.bool_]:
        """Which pages are of guests that have ended, or were given up."""
        dead = np.array([guest.dead for guest in self.guests])
        return np.asarray(dead[np.searchsorted(self.base, ids, side="right") - 1])

    def place(self, page: int) -> tuple[DomId, Gfn]:
        guest = self.guests[int(np.searchsorted(self.base, page, side="right")) - 1]
        return guest.domid, Gfn(int(guest.ram.gfns_of_pages(np.array([page - self.base[guest.domid - 1]]))[0]))

    # -- handles of frames --------------------------------------------------------------------------------------------

    def give_frame_handles(self, frames: NDArray[np.int64]) -> Handles:
        # A frame that was shared by an earlier memshr has no handle yet.
        handles = np.zeros(len(frames), dtype=np.uint64)
        for books, rows, numbers in self.by_pool(frames):
            without = _distinct(numbers[books.handles[numbers] == 0])
            books.handles[without] = self.states.new_handles(len(without))
            handles[rows] = books.handles[numbers]
        return handles

    def frame_handles(self, ids: PageIds, shared: NDArray[np.bool_]) -> Handles:
        handles = np.zeros(len(ids), dtype=np.uint64)
        mapped = np.flatnonzero(shared)
        for books, rows, numbers in self.by_pool(self.frame[ids[mapped]]):
            handles[mapped[rows]] = books.handles[numbers]
        return handles

    def _distinct_frames(self, frames: NDArray[np.int64]) -> NDArray[np.int64]:
        # These frames, each once, ascending.
        parts = [frames[rows[0]] - numbers[0] + _distinct(numbers) for _, rows, numbers in self.by_pool(frames)]
        return np.concatenate([frames[:0], *parts])

    def by_pool(self, frames: NDArray[np.int64]) -> list[tuple[PoolBooks, NDArray[np.int64], NDArray[np.int64]]]:
        # Each pool that has some of these frames, with the rows of ``frames`` that are its and their numbers in it.
        pools = frames >> POOL_SHIFT
        found = []
        for number in _present(pools):
            rows = np.flatnonzero(pools == number)
            self.pools[number].grow()
            found.append((self.pools[number], rows, frames[rows] & ((1 << POOL_SHIFT) - 1)))
        return found

    # -- pools --------------------------------------------------------------------------------------------------------

    def on_foreign_frame(self, ids: PageIds) -> NDArray[np.bool_]:
        # Which pages are on frames that are not for their guest (any more): these get no new sharers.
        frames = self.frame[ids]
        foreign = frames != NOWHERE
        for guest, rows in self.by_guest(ids):
            mine = np.array([self.is_for(books, guest) for books in self.pools] or [False])
            mapped = rows[foreign[rows]]
            foreign[mapped] = ~mine[frames[mapped] >> POOL_SHIFT]
        some = np.flatnonzero(foreign)
        foreign[some] = self.on_frame(ids[some])
        return np.asarray(foreign)

    def is_for(self, books: PoolBooks, guest: Attachment) -> bool:
        """Whether a guest may have a pool: it is of its group, and of no other guest alone."""
        pool = books.pool
        return pool.group == self.groups[guest.domid - 1] and pool.owner in {"", guest.process.key}

    def is_alone(self, guest: Attachment) -> bool:
        """Whether a guest's trust group is itself."""
        return self.groups.count(self.groups[guest.domid - 1]) == 1

    def in_own_pool(self, frames: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Which frames (NOWHERE: none) are in pools of one guest alone."""
        own = np.array([*(bool(books.pool.owner) for books in self.pools), False])
        return np.asarray(own[np.where(frames == NOWHERE, len(self.pools), frames >> POOL_SHIFT)])

    def sums(self, contents: PageBytes) -> NDArray[np.uint64]:
        # A sum with secret odd weights: any change of a page changes it, and nobody can plan one that does not.
        words = contents.reshape(len(contents), PAGE_SIZE).view(np.uint64)
        mixed = words ^ (words >> np.uint64(32))
        return np.asarray((mixed * self._weights).sum(axis=1, dtype=np.uint64)) | np.uint64(1)

    def has_all_readers(self, books: PoolBooks) -> bool:
        """Whether every QEMU that reads a pool, or may be about to, is one that we have a link with: only then may
        frames be added or given back.

        It stays so while the links last: a memshr finds a pool only in a guest that it has in hand. It is judged again
        whenever there are other links than before. A guest in which we have only looked may be in somebody else's
        hand, who knows the pool from there even while nothing of it is mapped.
        """
        if any(self.guests[domid - 1].link is None and not self.guests[domid - 1].gone for domid in books.seen_in):
            return False
        attached = frozenset(guest.domid for guest in self.guests if guest.link is not None)
        if books.judged_for != attached:
            ours = {self.guests[domid - 1].process.pid for domid in attached}
            books.whole = not self._host.is_read_by_others(books.pool, ours)
            books.judged_for = attached
        return books.whole

    def look_again(self) -> None:
        # At guests without a link somebody else may be at work: there are no beliefs about them, only looks.
        for guest in self.guests:
            if guest.link is None and not guest.gone:
                with contextlib.suppress(NoSuchDomainError):
                    self.rebuild(guest, guest.mappings())

    # -- figures ------------------------------------------------------------------------------------------------------

    def figures(self, guest: Attachment) -> GuestFigures:
        in_pool = np.flatnonzero(guest.in_pool)
        sharing = int(self.on_frame(self.ids_of(guest, in_pool)).sum()) if len(in_pool) else 0
        if guest.gone:
            raise guest.ended()
        return GuestFigures(
            domid=guest.domid,
            name=guest.process.name,
            pid=guest.process.pid,
            group=self.groups[guest.domid - 1],
            sharing_pages=sharing,
            copied_pages=len(in_pool) - sharing,
            nominated_pages=int(self.states.nominated(self.ids_of(guest, np.arange(guest.pages))).sum()),
            absent_pages=0,
            mappings_left=guest.mappings_left,
        )

    def guest_figures(self, domid: DomId) -> GuestFigures:
        """What one guest shares; reads the pagemap of all its RAM."""
        guest = self.guest(domid, "guest_figures")
        figures = self.figures(guest)
        entries = guest.entries(of_kind(GuestPage, np.arange(guest.pages)))
        absent = ~pagemap.is_there(entries) | guest.zero_pages(entries)
        guest.count_mappings()
        return dataclasses.replace(
            figures, absent_pages=int((absent & ~guest.in_pool).sum()), mappings_left=guest.mappings_left
        )

    def pool_figures(self) -> list[PoolFigures]:
        """The frame pools of the guests."""
        _, frames = self.readers()
        found = []
        for number, books in enumerate(self.pools):
            mine = frames[frames >> POOL_SHIFT == number]
            used = len(self._distinct_frames(mine))
            found.append(PoolFigures(books.pool.group, used, len(mine), books.pool.backed_bytes))
        return found

    # -- audit --------------------------------------------------------------------------------------------------------

    def counters(self) -> Counters:
        """As the seam says; costs a look at the pagemap of every shared page."""
        self.look_again()
        _, frames = self.readers()
        return self._counters(len(frames), len(self._distinct_frames(frames)))

    def _counters(self, sharing_pages: int, frames: int) -> Counters:
        nominated = len(self.states.all_nominated())
        return Counters(freed_pages=sharing_pages - frames, used_frames=frames + nominated)

    def audit(self) -> AuditReport:
        """Check what this object believes against what the kernel says, in both directions.

        maps and pagemap of every guest are read anew: a page that we think is on a frame and maps does not show there,
        and the other way round (I3); frames of a foreign trust group (I10); frames whose contents are no longer what
        was shared (I8); a nominated page that is on a frame (I5). ``xen_errors`` counts the findings that Xen's own
        walk, from reverse map to p2m, would have counted.
        """
        findings: list[AuditFinding] = []
        xen_errors = 0
        for guest in self.guests:
            if guest.gone:
                continue
            try:
                mappings = guest.mappings()
                base = int(self.base[guest.domid - 1])
                believed = self.frame[base : base + guest.pages]
                if guest.link is None:
                    self.rebuild(guest, mappings)  # as look_again: there is nothing that we believe
                    mapped = believed
                else:
                    mapped, foreign = self._mapped_frames(guest, mappings)
                    findings += foreign
            except NoSuchDomainError:
                continue
            for page in np.flatnonzero(mapped != believed).tolist():
                xen_errors += int(believed[page] != NOWHERE)
                findings.append(self._finding("I3", base + page, int(believed[page]), int(mapped[page])))
            own = self.groups[guest.domid - 1]
            for number in _present(mapped[mapped != NOWHERE] >> POOL_SHIFT):
                if not self.is_for(self.pools[number], guest):
                    page = base + int(np.flatnonzero(mapped >> POOL_SHIFT == number)[0])
                    domid, gfn = self.place(page)
                    findings.append(
                        AuditFinding(
                            "I10",
                            domid,
                            gfn,
                            Mfn(int(mapped[page - base])),
                            f"frames of trust group {own}",
                            f"frames of trust group {self.pools[number].pool.group}"
                            + (" that are another guest's alone" if self.pools[number].pool.owner else ""),
                            "the group was changed while pages were shared; unshare the guest",
                        )
                    )
        ids, frames = self.readers()
        both = ids[self.states.nominated(ids)]
        for page in both.tolist():
            domid, gfn = self.place(page)
            findings.append(
                AuditFinding(
                    "I5", domid, gfn, Mfn(int(self.frame[page])), "one handle", "two", "nominated while on a frame"
                )
            )
        read = self._distinct_frames(frames)
        changed = self._changed_frames(read)
        findings += changed
        return AuditReport(tuple(findings), xen_errors + len(changed), self._counters(len(frames), len(read)))

    def _finding(self, invariant: str, page: int, believed: int, mapped: int) -> AuditFinding:
        domid, gfn = self.place(page)
        words = [f"frame {each:#x}" if each != NOWHERE else "no frame" for each in (believed, mapped)]
        mfn = Mfn(believed if believed != NOWHERE else mapped)
        cause = "somebody else remapped guest memory, or memshr lost count"
        return AuditFinding(invariant, domid, gfn, mfn, words[0], words[1], cause)

    def _changed_frames(self, frames: NDArray[np.int64]) -> list[AuditFinding]:
        findings = []
        for start in range(0, len(frames), len(self._buffer)):
            some = frames[start : start + len(self._buffer)]
            for books, rows, numbers in self.by_pool(some):
                contents = self._buffer[: len(rows)]
                books.pool.read(numbers, contents)
                sums = self.sums(contents)
                known = books.sums[numbers]
                books.sums[numbers] = np.where(known == 0, sums, known)
                findings += [
                    AuditFinding(
                        "I8",
                        None,
                        None,
                        Mfn(frame),
                        "the contents that were shared",
                        "other contents",
                        "somebody wrote into the frame pool, or memory is faulty",
                    )
                    for frame in some[rows[(known != 0) & (known != sums)]].tolist()
                ]
        return findings


def _enlarged(values: NDArray[np.uint64], size: int) -> NDArray[np.uint64]:
    # Zeros that nobody has written to take no memory.
    enlarged = np.zeros(size, dtype=np.uint64)
    (used,) = np.nonzero(values)
    enlarged[used] = values[used]
    return enlarged


def _distinct(numbers: NDArray[np.integer]) -> NDArray[np.integer]:
    # These numbers, each once, ascending; numpy.unique would sort all of them.
    if len(numbers) and int(numbers.max()) > _SPARSE * len(numbers):
        return np.unique(numbers)
    return np.flatnonzero(np.bincount(numbers))


def _present(numbers: NDArray[np.integer]) -> list[int]:
    found: list[int] = _distinct(numbers).tolist()
    return found


def _group_of_each(processes: Sequence[GuestProcess], groups: Mapping[str, Collection[int]]) -> list[str]:
    found: dict[int, str] = {}
    for group, members in groups.items():
        if not fits_pool(group):
            raise BackendError(f"the name of trust group {group[:32]}... is too long", remedy="give it a shorter one")
        for domid in members:
            if not 0 < domid <= len(processes):
                raise NoSuchDomainError(f"group {group} names domain {domid}, which is no guest here")
            if domid in found:
                raise BackendError(f"domain {domid} is in two trust groups, {found[domid]} and {group}")
            found[domid] = group
    return [found.get(number) or _own_group(process) for number, process in enumerate(processes, start=1)]


def _own_group(process: GuestProcess) -> str:
    named = f"guest {process.name} {process.pid}"
    return named if fits_pool(named) else f"guest {process.pid}"
