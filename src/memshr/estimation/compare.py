"""The second look of an estimate: pages of one fingerprint are compared, byte for byte, with the first page of it.

What makes this hard: candidates lie anywhere in sources that do not fit into memory, and live pages go on changing. The
rules:

1. Batches take candidates class by class, and classes come in the order of their first pages. So where memory repeats
   other memory in runs, both sides of a batch are read in runs.
2. Each batch stands alone, so batches may be done in any order: if its first class began in an earlier batch, the first
   page of that class is read once more.
3. A page that no longer has the fingerprint that it had is VOLATILE if its source is live. Pages of live sources are
   therefore fingerprinted anew, whatever they equal; this is the second of their two samples.
4. A page that still has it and differs is a collision. Collisions, and pages whose class has lost its first page, are
   classified anew by ``universal_fingerprints`` and compared again.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from memshr.content.classes import BatchRows, PackedClasses, packed_classes
from memshr.content.fingerprint import FingerprintPages, Fingerprints, universal_fingerprints
from memshr.errors import MemshrError
from memshr.estimation.look import Findings, Verdict
from memshr.estimation.population import Population
from memshr.estimation.readers import Readers
from memshr.indices import Row, of_kind
from memshr.pagesource import Rows
from memshr.runs import consecutive
from memshr.types import PAGE_SIZE, PageBytes, page_buffer

_BATCH_PAGES = 4096
"""16 MiB: long enough for runs of many copies, and for threads not to wait for each other's interpreter lock."""
_BLOCK_PAGES = 512
_MEAN_RUN_PAGES = 4
"""Pairs of runs that are shorter than this on average are gathered and compared in one go."""

_GONE = np.iinfo(np.int64).max
"""The key of a page that is no candidate any more: sorts behind all others."""


@dataclass(slots=True)
class _Room:
    # What a thread works in.
    pages: PageBytes = field(default_factory=lambda: page_buffer(_BATCH_PAGES + 1))
    unequal: NDArray[np.bool_] = field(default_factory=lambda: np.empty((_BLOCK_PAGES, PAGE_SIZE // 8), np.bool_))


@dataclass(slots=True)
class _Deferred:
    # Pages that are to be classified anew, by several threads.
    rows: list[Rows] = field(default_factory=list)
    fingerprints: list[Fingerprints] = field(default_factory=list)
    collisions: int = 0
    pages_read: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)


def compare(
    population: Population,
    findings: Findings,
    fingerprint_pages: FingerprintPages,
    seed: int,
    readers: Readers,
    begin: Callable[[int], Callable[[int], None]],
) -> tuple[PackedClasses, int]:
    """Find out which OPEN pages hold the same.

    Pages that changed since their fingerprint was taken become VOLATILE, or UNREADABLE.

    :param seed: of the fingerprints by which collisions are told apart.
    :param begin: called with the number of candidates; what it returns is told after each batch how many it had.
    :returns: classes of equal contents, none of zeros; some may have one page only. And the number of collisions.
    :raises MemshrError: a source is gone, or has changed although it is not live.

    Cost: each candidate is read once, and the first of a class again for each batch that the class goes on in. Memory:
    8 bytes a candidate after ``packed_classes`` has had its peak, and 16 MiB for each thread; up to 8 bytes more, and
    up to 48 MiB, where fingerprints collide.
    """
    classes = packed_classes(findings.fingerprints, zero_pages=False)
    advance = begin(len(classes.keys))
    keys, attempt, collisions = [], 0, 0
    while len(classes.keys):
        attempt += 1
        deferred = _Deferred()
        _compare_once(population, findings, fingerprint_pages, classes, seed + attempt, deferred, readers, advance)
        findings.pages_read += deferred.pages_read
        collisions += deferred.collisions
        keys.append(classes.keys if not (classes.keys == _GONE).any() else classes.keys[classes.keys != _GONE])
        classes, advance = _classified_anew(deferred, classes.bits), lambda _: None
    everything = keys[0] if len(keys) == 1 else np.concatenate([*keys, np.empty(0, np.int64)])
    if len(keys) > 1:
        everything.sort()
    return PackedClasses(everything, population.rows.bit_length()), collisions


def _classified_anew(deferred: _Deferred, bits: int) -> PackedClasses:
    if not deferred.rows:
        return PackedClasses(np.empty(0, np.int64), bits)
    rows = np.concatenate(deferred.rows)
    order = np.argsort(rows)
    rows = rows[order]
    found = packed_classes(np.concatenate(deferred.fingerprints)[order] | np.uint64(1))
    everything = slice(None)
    return PackedClasses((rows[found.leaders(everything)] + 1) << bits | rows[found.rows(everything)], bits)


def _compare_once(
    population: Population,
    findings: Findings,
    fingerprint_pages: FingerprintPages,
    classes: PackedClasses,
    seed: int,
    deferred: _Deferred,
    readers: Readers,
    advance: Callable[[int], None],
) -> None:
    def work(part: slice, room: _Room) -> None:
        rows, leaders = of_kind(Row, classes.rows(part)), of_kind(Row, classes.leaders(part))
        count = len(rows)
        if rows[0] != leaders[0]:  # a class that began in an earlier batch: its first page comes along
            rows = np.concatenate([leaders[:1], rows])
            leaders = np.concatenate([leaders[:1], leaders])
        order = np.argsort(rows)
        place = np.empty(len(order), np.int64)
        place[order] = np.arange(len(order))
        pages = room.pages[: len(rows)]
        readers.before_reading(pages.nbytes)
        in_order = population.read(rows[order], pages)
        batch = _Batch(rows, leaders, place, in_order[place], pages.view(np.uint64))
        gone, again = batch.judge(population, findings, fingerprint_pages, room.unequal)
        settled = gone | again
        if settled.any():
            classes.keys[part][settled[len(rows) - count :]] = _GONE
        with deferred.lock:
            deferred.pages_read += len(rows)
            again[: len(rows) - count] = False  # it is a candidate of the batch in which its class began
            if again.any():
                deferred.rows.append(rows[again])
                deferred.fingerprints.append(universal_fingerprints(pages[place[again]], seed))
                deferred.collisions += batch.collisions
        advance(count)

    readers.run(_batches(len(classes.keys)), work, _Room)


class _Batch:
    # Candidates class by class; ``place[i]`` is where in ``words`` the page of candidate i is.

    def __init__(
        self, rows: Rows, leaders: Rows, place: BatchRows, readable: NDArray[np.bool_], words: NDArray[np.uint64]
    ) -> None:
        self._rows = rows
        self._readable = readable
        self._words = words
        self._place = place
        starts = np.ones(len(rows), np.bool_)
        np.not_equal(leaders[1:], leaders[:-1], out=starts[1:])
        self._leader = np.maximum.accumulate(np.where(starts, np.arange(len(rows)), 0))
        self.collisions = 0

    def judge(
        self,
        population: Population,
        findings: Findings,
        fingerprint_pages: FingerprintPages,
        unequal: NDArray[np.bool_],
    ) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
        """Which candidates are gone, and which must be classified anew; what is gone has got its verdict."""
        equal = self._equal_to_leader(unequal)
        subjects = population.subjects_of(self._rows)
        doubtful = population.live[subjects]
        if not equal.all():
            suspects = np.zeros(len(equal), np.bool_)
            suspects[self._leader[~equal]] = True
            doubtful = doubtful | suspects[self._leader]
        nobody = np.zeros(len(equal), np.bool_)
        gone = ~self._readable
        if not doubtful.any() and not gone.any():
            return nobody, nobody
        (looked_at,) = np.nonzero(doubtful & self._readable)
        now = fingerprint_pages(self._words[self._place[looked_at]].view(np.uint8))
        changed = looked_at[now != findings.fingerprints[self._rows[looked_at]]]
        # The fingerprint of a page that has been dropped is 0: another batch has seen it change, as a leader.
        for subject in np.unique(subjects[changed]).tolist():
            if not population.live[subject]:
                name = population.subjects[subject].pages.name
                raise MemshrError(f"{name}: its contents changed while it was read", remedy="work on a copy of it")
        findings.drop(self._rows[gone], Verdict.UNREADABLE)
        findings.drop(self._rows[changed], Verdict.VOLATILE)
        gone[changed] = True
        orphans = gone[self._leader] & ~gone
        differ = ~equal & ~gone & ~orphans
        self.collisions = int(np.count_nonzero(differ))
        return gone, orphans | differ

    def _equal_to_leader(self, unequal: NDArray[np.bool_]) -> NDArray[np.bool_]:
        (clients,) = np.nonzero(self._leader != np.arange(len(self._leader)))
        equal = np.ones(len(self._leader), np.bool_)
        clients = clients[np.argsort(self._place[clients])]
        ours, theirs = self._place[clients], self._place[self._leader[clients]]
        edges = consecutive(ours, theirs)
        in_runs = (len(edges) - 1) * _MEAN_RUN_PAGES <= len(clients)
        for start, end in pairwise(edges.tolist() if in_runs else [0, len(clients)]):
            for first in range(start, end, _BLOCK_PAGES):
                block = slice(first, min(first + _BLOCK_PAGES, end))
                count = block.stop - first
                if in_runs:
                    a = self._words[ours[first] : ours[first] + count]
                    b = self._words[theirs[first] : theirs[first] + count]
                else:
                    a, b = self._words[ours[block]], self._words[theirs[block]]
                found = np.not_equal(a, b, out=unequal[:count])
                if found.any():
                    equal[clients[block]] = ~found.any(axis=1)
        return equal


def _batches(count: int) -> Iterator[slice]:
    for first in range(0, count, _BATCH_PAGES):
        yield slice(first, min(first + _BATCH_PAGES, count))
