"""A sharing session: scan, find candidates, and share them in the race-free order. Works on any mechanism.

What makes this hard: guests go on writing, and pages and domains vanish. Still no page may be lost from the figures,
two pages that differ may never be shared, and no page may stay nominated without sharing. The rules:

1. A trust group is worked through alone. Nothing that the session holds is common to two groups (I10).
2. A page is nominated before it is compared. It is shared only with the handle under which it was compared. A page that
   is written in between has a dead handle, and the hypervisor refuses it.
3. A fingerprint only suggests. Every page of a class is compared, byte for byte, with one page of the class. Pages that
   differ are classified again, by `universal_fingerprints`, and get their own turn. So equal pages always meet.
4. The client of a share is a page that this session has nominated, so its frame has one gfn; or it is a frame of an
   earlier session, and all of its gfns are known to be in one domain. (Xen dies if a third domain maps the client's
   frame.) A frame of an earlier session that has gfns outside the class is left alone: those gfns may be in another
   trust group now.
5. Pages that this session nominated and could not share are taken back, whatever happens, also if an exception strikes
   before an answer of the hypervisor is noted. No handle is needed for that: the pages of a batch are known before they
   are nominated, and those that are alone on a frame afterwards are unshared.

A handle tells whether a nomination is fresh: a new handle is greater than any before it. If no page is shared at the
start, all handles are new. Otherwise one page that is not shared is nominated first, to see where new handles begin. If
there is no such page, the growth of used_frames tells how many handles of a batch were new.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import partial

import numpy as np
from numpy.typing import NDArray

from memshr.content.classes import BatchRows, Classes, Indices, classify, one_of_each, refined, repeated
from memshr.content.fingerprint import (
    ZERO_PAGE_FINGERPRINT,
    Fingerprinter,
    Fingerprinting,
    FingerprintPages,
    Fingerprints,
    universal_fingerprints,
)
from memshr.errors import (
    CallError,
    DomainDyingError,
    DomainError,
    InvariantError,
    MemshrError,
    NoSuchDomainError,
    NotSharableError,
    Status,
)
from memshr.hypervisor import Capability, Hypervisor, error_of
from memshr.runs import run_starts
from memshr.sharing.figures import GroupFigures, sharing_report
from memshr.sharing.plan import who_goes_where
from memshr.sharing.result import SharingReport
from memshr.sharing.scan import Scan, Scanner
from memshr.trust import Group
from memshr.types import (
    HUGE_PAGE_PAGES,
    PAGE_SIZE,
    DomId,
    Handles,
    PageArray,
    PageBytes,
    Statuses,
    page_buffer,
)

__all__ = [
    "SharingOptions",
    "SharingProgress",
    "share",
]

Mask = NDArray[np.bool_]

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class SharingOptions:
    """How a session works; none of this changes which pages are equal.

    :param max_sharers: gfns that one frame takes at most; further copies get further frames. At least 2.
    :param batch_pages: pages that are nominated, read and shared in one go; rounded up to whole frames of max_sharers.
    :param scan_pages: pages that are read and fingerprinted in one go.
    :param sample_interval_s: seconds at least between the two samples of running guests: long enough to tell pages that
        are written all the time. Zero pages are sampled once: writing to one that was given back too soon costs the
        guest no more than first touching any page does.
    :param huge_page_pages: how many pages of a huge page must be worth sharing for it to be split. 0: split always;
        more than HUGE_PAGE_PAGES: never. A huge page saves the processor work, so it is not worth splitting for a few
        pages.
    :param threads: threads that fingerprint; None: one for each core.
    """

    max_sharers: int = 256
    batch_pages: int = 8192
    scan_pages: int = 2048
    sample_interval_s: float = 0.25
    huge_page_pages: int = 16
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.max_sharers < 2:
            raise MemshrError(f"max_sharers is {self.max_sharers}, but sharing takes at least 2")
        if self.batch_pages < 2 or self.scan_pages < 1:
            raise MemshrError("batch_pages must be at least 2 and scan_pages at least 1")


@dataclass(frozen=True, slots=True)
class SharingProgress:
    """How far a session is. ``phase`` is ``scan``, ``zero pages`` or ``share``, for one group."""

    group: str
    phase: str
    done_pages: int
    total_pages: int


def share(
    hypervisor: Hypervisor,
    groups: Sequence[Group],
    *,
    wait: Callable[[float], None],
    clock: Callable[[], float] = time.monotonic,
    options: SharingOptions | None = None,
    progress: Callable[[SharingProgress], None] = lambda _: None,
    fingerprinting: Fingerprinting | None = None,
) -> SharingReport:
    """Share the equal pages within each of ``groups``, audit the books, and report.

    :param groups: no domain may be in two of them.
    :param wait: called with seconds to wait between two samples of running guests; never called on other mechanisms.
    :param clock: gives seconds; only differences count. The time that work takes between the two samples counts as
        waiting.
    :param progress: called after each batch.
    :param fingerprinting: makes what fingerprints pages, from a group's seed; Fingerprinter unless given.
    :raises BackendError: the host cannot go on; what was nominated and not shared has been taken back as far as the
        host still answers.

    A domain that goes away in mid-run is skipped. So is one that the hypervisor refuses; the report has the reason.
    When the host runs out of memory, the session stops, and the report says so. A second run over the same domains
    finds what is new.

    Cost: reading all memory once, plus nominating, comparing and sharing the candidates. Memory: two buffers, some 40
    bytes for each page of the group that is under way, and some 100 for each candidate while they are counted.
    """
    options = options or SharingOptions()
    fingerprinting = fingerprinting or partial(Fingerprinter, threads=options.threads)
    figures: list[GroupFigures] = []
    stopped: str | None = None
    for group in groups:
        _log.info("group %s: %d domains", group.name, len(group.domids))
        with fingerprinting(group.seed) as fingerprint_pages:
            session = _GroupSession(hypervisor, group, options, fingerprint_pages, wait, clock, progress, stopped)
            figures.append(session.run())
        stopped = session.stopped
        _log.info("group %s: done%s", group.name, "" if stopped is None else f", stopped: {stopped}")
    return sharing_report(figures, hypervisor.audit(), stopped)


@dataclass(slots=True)
class _Nominated:
    # The pages of a batch that could be nominated. ``places`` says which pages of the batch they are.
    pages: PageArray
    handles: Handles
    fresh: Mask
    places: BatchRows

    def __getitem__(self, mask: Mask) -> _Nominated:
        return _Nominated(self.pages[mask], self.handles[mask], self.fresh[mask], self.places[mask])


@dataclass(slots=True)
class _Reference:
    # The contents with which the pages of one class are compared, carried from batch to batch.
    content: int
    page: NDArray[np.uint64]


@dataclass(slots=True)
class _Scanned:
    # Pages as the scan saw them. ``frames`` is what ``Hypervisor.frames_of`` said, None if no page is on a frame.
    pages: PageArray
    fingerprints: Fingerprints
    frames: NDArray[np.int64] | None = None

    def __len__(self) -> int:
        return len(self.pages)

    def __getitem__(self, which: Mask | Indices) -> _Scanned:
        frames = None if self.frames is None else self.frames[which]
        return _Scanned(self.pages[which], self.fingerprints[which], frames)


# What became of a candidate: its content number, or one of these.
_NOT_REACHED = -1
_OUT = -2

_NONE: Fingerprints = np.empty(0, np.uint64)

_REASONS = {
    Status.EINVAL: "not_sharable",
    Status.E2BIG: "busy",
    Status.ENOMEM: "no_memory",
    Status.ESRCH: "domain_gone",
    Status.S_HANDLE_INVALID: "written",
    Status.C_HANDLE_INVALID: "written",
}
_SHARE_REASONS = _REASONS | {Status.EINVAL: "refused"}


class _GroupSession:
    """One trust group, from its scan to its figures."""

    def __init__(
        self,
        hypervisor: Hypervisor,
        group: Group,
        options: SharingOptions,
        fingerprint_pages: FingerprintPages,
        wait: Callable[[float], None],
        clock: Callable[[], float],
        progress: Callable[[SharingProgress], None],
        stopped: str | None,
    ) -> None:
        self._hypervisor = hypervisor
        self._group = group
        self._options = options
        self._fingerprint_pages = fingerprint_pages
        self._wait = wait
        self._clock = clock
        self._progress = progress
        self.stopped = stopped
        self._figures = GroupFigures(group)
        self._batch_pages = -(-options.batch_pages // options.max_sharers) * options.max_sharers
        self._scanner = Scanner(hypervisor, fingerprint_pages, options.scan_pages)
        self._scanned_s = 0.0
        self._buffer: PageBytes = page_buffer(self._batch_pages)
        self._oldest_fresh: int | None = None
        # Every page that was scanned; then the candidates only, in order of their classes, with what became of each and
        # the handle that its frame had last.
        self._scanned = _Scanned(PageArray.empty(), _NONE)
        self._probes = PageArray.empty()
        self._pages = PageArray.empty()
        self._contents: Classes = np.empty(0, np.int64)
        self._frames: Handles = np.empty(0, np.uint64)
        self._zero_content: int | None = None

    def run(self) -> GroupFigures:
        """Scan, share and count. If the host runs out of memory, ``stopped`` says so and the rest is counted."""
        populated = self._survey()
        if self.stopped is None:
            self._scan(populated)
            self._spare_huge_pages()
            if Capability.ZERO in self._hypervisor.capabilities:
                self._take_zeros()
        reached = self.stopped is None
        if reached:
            self._keep_single_zero()
            self._share()
            self._count_candidates()
        self._figures.close(reached=reached)
        return self._figures

    # -- looking -----------------------------------------------------------------------------------------------------

    def _survey(self) -> dict[DomId, NDArray[np.int64]]:
        # The populated ranges of every domain that is there.
        populated = {}
        names = self._hypervisor.names()
        for domid, figures in self._figures.domains.items():
            figures.name = names.get(domid, "")
            try:
                populated[domid] = self._hypervisor.populated_ranges(domid)
                figures.total_pages = int(populated[domid][:, 1].sum())
            except (NoSuchDomainError, DomainDyingError):
                figures.gone = True
            except DomainError as error:
                figures.refusal = str(error)
        return populated

    def _shares_already(self) -> bool:
        # Whether any page of the group is nominated or shared before we begin. Frames say it at no cost.
        if self._scanned.frames is not None:
            return True
        for domid, figures in self._figures.domains.items():
            with suppress(DomainError):
                if not figures.gone and self._hypervisor.domain_info(domid).shr_pages:
                    return True
        return False

    def _scan(self, populated: dict[DomId, NDArray[np.int64]]) -> None:
        # Every backed page of the group, by domain and gfn.
        scanner = self._scanner
        tells_frames = Capability.FRAMES in self._hypervisor.capabilities
        advance = self._advancing("scan", sum(figures.total_pages for figures in self._figures.domains.values()))
        found = []
        for domid in sorted(populated):
            figures = self._figures.domains[domid]
            try:
                frames = None
                if tells_frames:
                    gfns, frames = scanner.backed_frames(domid, populated[domid])
                else:
                    gfns = scanner.backed_gfns(domid, populated[domid])
                figures.absent_pages = figures.total_pages - len(gfns)
                advance(figures.absent_pages)
                if frames is None:
                    scan = scanner.scan(domid, gfns, advance)
                else:
                    scan = scanner.scan_sharing(domid, gfns, frames, advance)
            except (NoSuchDomainError, DomainDyingError):
                figures.gone = True
                continue
            except DomainError as error:
                figures.refusal = str(error)
                continue
            figures.dropped["not_sharable"] += int(np.count_nonzero(~scan.readable))
            found.append(_scanned(domid, scan, frames))
        self._scanned = _joined(found)
        if self._scanned.frames is not None and (self._scanned.frames < 0).all():
            self._scanned.frames = None
        self._scanned_s = self._clock()
        if not self._shares_already():
            self._oldest_fresh = 0
        else:
            self._probes = self._scanned.pages[~repeated(self._scanned.fingerprints)][:_PROBES]

    def _probe(self) -> None:
        # Nominate, for a moment, one page that surely is not shared: every fresh handle from now on is greater.
        for domid, gfn in zip(self._probes.domids.tolist(), self._probes.gfns.tolist(), strict=True):
            try:
                self._hypervisor.debug_gfn(domid, gfn)
            except NotSharableError:
                pass
            except DomainError:
                continue
            else:
                continue  # it is shared
            try:
                self._oldest_fresh = int(self._hypervisor.nominate_gfn(domid, gfn))
                self._hypervisor.unshare_gfn(domid, gfn)
            except CallError:
                continue
            except BaseException:
                self._take_back(PageArray(np.array([domid], np.uint16), np.array([gfn], np.int64)))
                raise
            return

    def _spare_huge_pages(self) -> None:
        # Leave out what lies in huge pages of which too few pages could be shared or released.
        if not self._options.huge_page_pages:
            return
        scanned = self._scanned
        sharable = repeated(scanned.fingerprints) | (scanned.fingerprints == ZERO_PAGE_FINGERPRINT)
        if scanned.frames is not None:
            sharable &= scanned.frames < 0
        (rows,) = np.nonzero(sharable)
        rows = rows[self._hypervisor.huge(scanned.pages[rows])]
        if not len(rows):
            return
        pages = scanned.pages[rows]
        huge_pages = pages.gfns // HUGE_PAGE_PAGES << _DOMID_BITS | pages.domids
        _, which, counts = np.unique(huge_pages, return_inverse=True, return_counts=True)
        spared = counts[which] < self._options.huge_page_pages
        self._figures.drop("huge_page", pages[spared])
        keep = np.ones(len(scanned), np.bool_)
        keep[rows[spared]] = False
        self._scanned = scanned[keep]

    def _advancing(self, phase: str, total_pages: int) -> Callable[[int], None]:
        done_pages = 0
        _log.info("group %s: %s, %d pages", self._group.name, phase, total_pages)

        def advance(pages: int) -> None:
            nonlocal done_pages
            done_pages += pages
            self._progress(SharingProgress(self._group.name, phase, done_pages, total_pages))

        return advance

    # -- the steps that every page takes -----------------------------------------------------------------------------

    def _nominate(self, pages: PageArray) -> _Nominated:
        if self._oldest_fresh is None:
            self._probe()
        unknown = self._oldest_fresh is None  # counting can cost more than nominating
        used_before = self._hypervisor.counters().used_frames if unknown else 0
        handles, statuses = self._hypervisor.nominate_gfns(pages)
        good = statuses == Status.OK
        handles = handles[good]
        if unknown and len(handles):
            new_frames = self._hypervisor.counters().used_frames - used_before
            if new_frames > 0:
                self._oldest_fresh = int(np.unique(handles)[-new_frames:][0])
        fresh = np.zeros(len(handles), np.bool_) if self._oldest_fresh is None else handles >= self._oldest_fresh
        self._drop_by_status(pages, statuses, _REASONS)
        return _Nominated(pages[good], handles, fresh, np.flatnonzero(good))

    def _read(self, nominated: _Nominated) -> tuple[_Nominated, NDArray[np.uint64]]:
        # The contents of nominated pages; those that cannot be read any more have dropped out.
        statuses = self._hypervisor.read_pages(nominated.pages, self._buffer)
        words: NDArray[np.uint64] = self._buffer[: len(statuses)].view(np.uint64)
        good = statuses == Status.OK
        if good.all():
            return nominated, words
        self._drop_by_status(nominated.pages, statuses, _REASONS)
        self._unshare(nominated.pages[nominated.fresh & ~good])
        return nominated[good], words[good]

    def _steady(
        self, nominated: _Nominated, words: NDArray[np.uint64], scanned: Fingerprints
    ) -> tuple[_Nominated, NDArray[np.uint64]]:
        # The pages that have not changed since the first sample; the others drop out.
        steady = self._fingerprint_pages(words.view(np.uint8)) == scanned
        if steady.all():
            return nominated, words
        self._figures.drop("volatile", nominated.pages[~steady])
        self._unshare(nominated.pages[nominated.fresh & ~steady])
        return nominated[steady], words[steady]

    def _drop_by_status(self, pages: PageArray, statuses: Statuses, reasons: Mapping[Status, str]) -> None:
        failed = statuses != Status.OK
        if not failed.any():
            return
        for status in np.unique(statuses[failed]).tolist():
            affected = pages[statuses == status]
            self._figures.drop(reasons.get(status, "refused"), affected)
            if status == Status.ENOMEM:
                domid, gfn = int(affected.domids[0]), int(affected.gfns[0])
                self.stopped = str(error_of("sharing", status, domid=domid, gfn=gfn))

    def _unshare(self, pages: PageArray) -> None:
        # A page that cannot be unshared is gone or private already: the last sharer of a frame needs no memory.
        if len(pages):
            self._hypervisor.unshare_gfns(pages)

    def _take_back(self, pages: PageArray) -> None:
        # After an exception: leave nothing of a batch nominated, however far nominating and sharing it had come. If
        # another exception strikes meanwhile, once more from the start; the caller then lets the first one through.
        for _ in range(_ATTEMPTS_TO_TAKE_BACK):
            try:
                self._unshare_alone(pages)
            except InvariantError:
                raise
            except BaseException:  # the first exception is the one that the user sees
                continue
            return

    def _unshare_alone(self, pages: PageArray) -> None:
        # Unshare the pages that are alone on a frame. Where handles tell fresh nominations from old ones, those that
        # somebody else had nominated before stay so; where they do not, to unshare them costs nobody anything.
        alone = pages[self._hypervisor.debug_gfns(pages) == 1]
        if self._oldest_fresh and len(alone):
            handles, statuses = self._hypervisor.nominate_gfns(alone)  # they are: this asks for their handles
            alone = alone[(statuses == Status.OK) & (handles >= self._oldest_fresh)]
        self._unshare(alone)

    # -- zero pages --------------------------------------------------------------------------------------------------

    def _take_zeros(self) -> None:
        # Zero pages need no frame, where the mechanism can do without; elsewhere they share one like other pages.
        zero = self._scanned.fingerprints == ZERO_PAGE_FINGERPRINT
        zeros = self._scanned.pages[zero]
        self._scanned = self._scanned[~zero]
        self._release_zeros(zeros)

    def _keep_single_zero(self) -> None:
        # Where zero pages share a frame: without a partner it is no candidate, but a zero page that keeps its frame.
        zero = self._scanned.fingerprints == ZERO_PAGE_FINGERPRINT
        if np.count_nonzero(zero) == 1:
            self._figures.keep_zero_frame(DomId(int(self._scanned.pages[zero].domids[0])))

    def _release_zeros(self, pages: PageArray) -> None:
        advance = self._advancing("zero pages", len(pages))
        for first in range(0, len(pages), self._batch_pages):
            batch = pages[first : first + self._batch_pages]
            try:
                self._release_nominated(self._nominate(batch))
            except BaseException:
                self._take_back(batch)
                raise
            advance(len(batch))
            if self.stopped is not None:
                return

    def _release_nominated(self, nominated: _Nominated) -> None:
        nominated, words = self._read(nominated)
        zero = np.maximum.reduce(words, axis=1) == 0
        statuses = np.full(len(zero), Status.C_HANDLE_INVALID, np.int32)
        statuses[zero] = self._hypervisor.release_zero_pages(nominated.pages[zero], nominated.handles[zero])
        released = statuses == Status.OK
        self._drop_by_status(nominated.pages, statuses, _REASONS)
        self._unshare(nominated.pages[nominated.fresh & ~released])
        self._figures.release(nominated.pages[released])

    # -- pages with contents -----------------------------------------------------------------------------------------

    def _share(self) -> None:
        candidates = classify(self._scanned.fingerprints)
        rows, classes = np.arange(len(candidates)), candidates.classes
        scanned = self._scanned[candidates.rows]
        self._pages, of_class = scanned.pages, scanned.fingerprints[run_starts(classes)]
        self._scanned = _Scanned(PageArray.empty(), _NONE)
        if len(rows) and of_class[0] == ZERO_PAGE_FINGERPRINT:
            self._zero_content = 0  # classify puts them first
        self._contents = np.full(len(rows), _NOT_REACHED, np.int64)
        self._frames = np.zeros(len(rows), np.uint64)
        del candidates
        advance = self._advancing("share", len(rows))
        reference = _Reference(0 if self._zero_content == 0 else -1, np.zeros(PAGE_SIZE // 8, np.uint64))
        attempt = 0
        next_class = len(of_class)
        if scanned.frames is not None and len(rows):
            rows, classes = self._with_something_to_gain(rows, classes, scanned.frames)
            if 0 < len(rows) <= self._batch_pages and self._zero_content is None:
                rows, classes, old_classes = self._alike_on_a_second_look(rows, classes, of_class[classes], next_class)
                of_class = np.concatenate([of_class, of_class[old_classes]])
                next_class = len(of_class)
                rows, classes = self._with_something_to_gain(rows, classes, scanned.frames)
            advance(len(scanned) - len(rows))
        del scanned
        live = Capability.LIVE in self._hypervisor.capabilities
        if live and len(rows):
            self._wait_for_second_sample()
        while len(rows):
            attempt += 1
            deferred_rows, deferred_fingerprints = [rows[:0]], [_NONE]
            for first, end in _batches(classes, self._batch_pages):
                sample = of_class[classes[first:end]] if live and attempt == 1 else None
                differ = self._share_batch(
                    rows[first:end], classes[first:end], sample, reference, self._group.seed + attempt
                )
                deferred_rows.append(differ[0])
                deferred_fingerprints.append(differ[1])
                advance(end - first if attempt == 1 else 0)
                if self.stopped is not None:
                    return
            rows = np.concatenate(deferred_rows)
            again = classify(np.concatenate(deferred_fingerprints))
            self._figures.collisions += len(rows)
            self._contents[rows] = _OUT
            rows, classes = rows[again.rows], again.classes + next_class
            next_class += int(again.classes[-1]) + 1 if len(again) else 0
            self._contents[rows] = _NOT_REACHED

    def _with_something_to_gain(
        self, rows: Indices, classes: Classes, frames: NDArray[np.int64]
    ) -> tuple[Indices, Classes]:
        # Those of the candidates ``rows``, with their classes, that may share more than they do. ``frames`` has the
        # frames of all candidates. A class is settled, and left out, if
        # 1. its pages are on no more frames than max_sharers asks for, and
        # 2. all of these frames hold the same bytes. A frame's contents cannot change, so nothing need be nominated.
        #
        #     max_sharers 4    pages   a b c d e    on frames   X X X X Y    2 frames, 2 needed: settled if X equals Y
        #                              f g h                    X - -        3 frames, 1 needed: something to gain
        #
        # A page without a frame counts as one.
        frames = np.where(frames[rows] < 0, rows | _ALONE, frames[rows])
        ones = one_of_each(classes, frames)
        needed = -(-np.bincount(classes) // self._options.max_sharers)
        settled = np.bincount(classes[ones], minlength=len(needed)) <= needed
        to_compare = ones[(settled & (needed > 1))[classes[ones]]]
        settled[classes[to_compare[~self._equal_in_class(rows[to_compare], classes[to_compare])]]] = False
        mask: Mask = settled[classes]
        self._contents[rows[mask]] = classes[mask]
        # Names for the frames, as good as handles where there are none: no handle is that large.
        self._frames[rows[mask]] = frames[mask].astype(np.uint64) | _FRAME_NAME
        return rows[~mask], classes[~mask]

    def _equal_in_class(self, rows: Indices, classes: Classes) -> Mask:
        # Which of these pages could be read and hold what the first page of their class holds. ``classes`` ascends.
        equal = np.empty(len(rows), np.bool_)
        reference = _Reference(-1, np.zeros(PAGE_SIZE // 8, np.uint64))
        for begin in range(0, len(rows), self._batch_pages):
            batch = slice(begin, min(begin + self._batch_pages, len(rows)))
            statuses = self._hypervisor.read_pages(self._pages[rows[batch]], self._buffer)
            words = self._buffer[: len(statuses)].view(np.uint64)
            equal[batch] = _equal_to_reference(words, classes[batch], reference) & (statuses == Status.OK)
        return equal

    def _alike_on_a_second_look(
        self, rows: Indices, classes: Classes, scanned: Fingerprints, next_class: int
    ) -> tuple[Indices, Classes, Classes]:
        # Reads a few candidates once more. Returns those that have not changed since they were scanned (``scanned`` are
        # their fingerprints) and that have another page like them by a second hash, their new classes, from
        # ``next_class`` on, and the old class of each new one. Without this look, pages that only collide would be
        # nominated for nothing in every session over the same guests.
        statuses = self._hypervisor.read_pages(self._pages[rows], self._buffer)
        self._drop_by_status(self._pages[rows], statuses, _REASONS)
        self._contents[rows] = _OUT
        good = statuses == Status.OK
        steady = self._fingerprint_pages(self._buffer[: len(rows)]) == scanned
        self._figures.drop("volatile", self._pages[rows[good & ~steady]])
        second = universal_fingerprints(self._buffer[: len(rows)], self._group.seed + 1)
        (readable,) = np.nonzero(good & steady)
        first = np.maximum.accumulate(np.where(run_starts(classes), np.arange(len(classes)), 0))
        self._figures.collisions += int(np.count_nonzero((second != second[first])[readable]))
        alike, new_classes = refined(classes[readable], second[readable])
        alike = readable[alike]
        self._contents[rows[alike]] = _NOT_REACHED
        return rows[alike], new_classes + next_class, classes[alike[run_starts(new_classes)]]

    def _wait_for_second_sample(self) -> None:
        rest_s = self._scanned_s + self._options.sample_interval_s - self._clock()
        if rest_s > 0:
            self._wait(rest_s)

    def _share_batch(
        self, rows: Indices, classes: Classes, scanned: Fingerprints | None, reference: _Reference, seed: int
    ) -> tuple[Indices, Fingerprints]:
        # One batch from nominate to share. ``scanned`` has the fingerprints of the first sample, if what is read now is
        # a second one. Returns the rows whose contents are not those of their class, not shared and not nominated any
        # more, with fingerprints by which to find them partners.
        batch = self._pages[rows]
        try:
            nominated = self._nominate(batch)
            self._contents[rows] = _OUT
            readable, words = self._read(nominated)
            if scanned is not None:
                readable, words = self._steady(readable, words, scanned[readable.places])
            rows, classes = rows[readable.places], classes[readable.places]
            equal = _equal_to_reference(words, classes, reference)
            differing = rows[~equal]
            fingerprints = universal_fingerprints(words[~equal].view(np.uint8), seed) if len(differing) else _NONE
            self._contents[differing] = _NOT_REACHED
            self._unshare(readable.pages[readable.fresh & ~equal])
            if not equal.all():
                readable, rows, classes = readable[equal], rows[equal], classes[equal]
            frames, kept = self._share_nominated(readable, classes)
        except BaseException:
            self._take_back(batch)
            raise
        self._contents[rows[kept]] = classes[kept]
        self._frames[rows[kept]] = frames[kept]
        return differing, fingerprints

    def _share_nominated(self, batch: _Nominated, classes: Classes) -> tuple[Handles, Mask]:
        # Share pages that have been compared. Returns the handle of each page's frame, and which pages still hold
        # what was compared; those that share with nobody have been taken back.
        pages, frames = batch.pages, batch.handles.copy()
        kept = np.ones(len(frames), np.bool_)
        leaders = who_goes_where(
            *(frames, batch.fresh, pages.domids, classes, self._options.max_sharers),
            lambda places: self._hypervisor.debug_gfns(pages[places]),
        )
        clients = np.flatnonzero(leaders != np.arange(len(leaders)))
        while len(clients):
            sources = leaders[clients]
            statuses = self._hypervisor.share_gfns_many(
                pages[sources], frames[sources], pages[clients], frames[clients]
            )
            shared = statuses == Status.OK
            frames = _replaced(frames, frames[clients[shared]], frames[sources[shared]])
            lost = statuses == Status.S_HANDLE_INVALID
            if (statuses == Status.ESRCH).any():
                lost |= (statuses == Status.ESRCH) & np.isin(pages.domids[sources], self._gone_domids(pages))
            # A frame of an earlier session that the hypervisor does not give up: nothing has happened to it, and its
            # contents were compared. It is counted as what it is, a frame more than is needed.
            unmoved = (statuses == Status.EBUSY) & ~batch.fresh[clients]
            failed = ~shared & ~lost & ~unmoved
            kept[clients[failed]] = False
            self._drop_by_status(pages[clients[failed]], statuses[failed], _SHARE_REASONS)
            clients = clients[lost]
            if len(clients):
                clients = self._elect(clients, leaders, frames, kept, pages)
        # A page alone on a fresh frame shares with no other, and a page that is not kept may still be nominated.
        _, frame_of, sharers = np.unique(frames, return_inverse=True, return_counts=True)
        sharers -= np.bincount(frame_of[~kept], minlength=len(sharers))
        self._unshare(pages[batch.fresh & (~kept | (sharers[frame_of] == 1))])
        return frames, kept

    def _elect(
        self, clients: BatchRows, leaders: BatchRows, frames: Handles, kept: Mask, pages: PageArray
    ) -> BatchRows:
        # The leaders of these clients were written: put another page of the same frame in their place, or, if none
        # is left, the first client. Cost: a pass over the batch for each written leader.
        lost = np.unique(leaders[clients])
        kept[lost] = False
        self._figures.drop("written", pages[lost])
        for leader in lost.tolist():
            waiting = clients[leaders[clients] == leader]
            fellows = np.flatnonzero(kept & (frames == frames[leader]))
            leaders[waiting] = fellows[0] if len(fellows) else waiting[0]
        remaining: BatchRows = clients[leaders[clients] != clients]
        return remaining

    def _gone_domids(self, pages: PageArray) -> list[int]:
        gone = []
        for domid in np.unique(pages.domids).tolist():
            try:
                self._hypervisor.domain_info(domid)
            except (NoSuchDomainError, DomainDyingError):
                self._figures.domains[domid].gone = True
                gone.append(domid)
        return gone

    # -- the end -----------------------------------------------------------------------------------------------------

    def _count_candidates(self) -> None:
        gone = [domid for domid, figures in self._figures.domains.items() if figures.gone]
        if gone:
            self._contents[np.isin(self._pages.domids, gone)] = _OUT
        self._figures.drop("no_memory", self._pages[self._contents == _NOT_REACHED])
        kept = self._contents >= 0
        self._figures.count_sharing(
            self._pages.domids[kept],
            self._contents[kept],
            self._frames[kept],
            zero_content=self._zero_content,
            max_sharers=self._options.max_sharers,
        )


_DOMID_BITS = 16
_FRAME_NAME = np.uint64(1 << 63)
_ALONE = 1 << 62
_PROBES = 16
_ATTEMPTS_TO_TAKE_BACK = 3


def _scanned(domid: DomId, scan: Scan, frames: NDArray[np.int64] | None) -> _Scanned:
    # What could be read.
    found = _Scanned(PageArray.of_domain(domid, scan.gfns), scan.fingerprints, frames)
    return found if scan.readable.all() else found[scan.readable]


def _joined(found: list[_Scanned]) -> _Scanned:
    if len(found) == 1:
        return found[0]
    domids = [part.pages.domids for part in found] or [np.empty(0, np.uint16)]
    gfns = [part.pages.gfns for part in found] or [np.empty(0, np.int64)]
    fingerprints = [part.fingerprints for part in found] or [_NONE]
    frames = [part.frames for part in found if part.frames is not None]
    return _Scanned(
        PageArray(np.concatenate(domids), np.concatenate(gfns)),
        np.concatenate(fingerprints),
        np.concatenate(frames) if frames else None,
    )


def _batches(classes: Classes, batch_pages: int) -> Iterator[tuple[int, int]]:
    # Slices of at most batch_pages rows that end where a class ends; only a class that is larger is cut.
    first, count = 0, len(classes)
    while first < count:
        end = min(first + batch_pages, count)
        if end < count and classes[end] == classes[end - 1] and classes[end - 1] != classes[first]:
            end = first + int(np.searchsorted(classes[first:end], classes[end - 1]))
        yield first, end
        first = end


def _equal_to_reference(words: NDArray[np.uint64], classes: Classes, reference: _Reference) -> Mask:
    # Which pages hold what the first page of their class holds (or the reference, for the class that it is of). The
    # reference becomes that of the last class. Neighbours are compared first: if all are equal, nothing is copied.
    count = len(classes)
    equal = np.ones(count, np.bool_)
    if not count:
        return equal
    starts = run_starts(classes)
    equal[1:] = (words[1:] == words[:-1]).all(axis=1)
    equal |= starts
    continued = classes[0] == reference.content
    if continued:
        equal[0] = (words[0] == reference.page).all()
    first = np.maximum.accumulate(np.where(starts, np.arange(count), 0))
    if not equal.all():
        (suspects,) = np.nonzero(np.isin(classes, classes[~equal]))
        expected = words[first[suspects]]
        if continued:
            expected[classes[suspects] == reference.content] = reference.page
        equal[suspects] = (words[suspects] == expected).all(axis=1)
    if not (continued and classes[-1] == reference.content):
        reference.content, reference.page = int(classes[-1]), words[first[-1]].copy()
    return equal


def _replaced(values: Handles, old: Handles, new: Handles) -> Handles:
    # ``values`` with each of ``old`` replaced by its ``new``.
    if not len(old):
        return values
    order = np.argsort(old)
    found = np.minimum(np.searchsorted(old, values, sorter=order), len(old) - 1)
    replacements: Handles = np.where(old[order[found]] == values, new[order[found]], values)
    return replacements
