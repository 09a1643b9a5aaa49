"""What is left of a saving within the limits of a running host: its budget of mappings, and its huge pages.

The model is that of sharing running QEMU guests (``docs/qemu-guests.md``). Frames are given out content by content, in
the order of their first pages. Each page that shares is mapped onto its frame. A run of consecutive gfns on consecutive
frames is one mapping. If the run lies between pages that do not share, it cuts their mapping in two, which is one more.
Zero pages are given back and need no mapping. If the budget does not suffice for all mappings, the longest runs come
first.

A huge page must be split before a part of it can be shared or given back. One that is zero from end to end can be given
back whole.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memshr.estimation.count import Frames, Tally
from memshr.estimation.look import Findings, Verdict
from memshr.estimation.population import Population
from memshr.indices import Row, of_kind
from memshr.pagesource import Rows
from memshr.runs import jumps
from memshr.types import HUGE_PAGE_PAGES

_BLOCKS_STRIDE = 2048


@dataclass(slots=True)
class Limits:
    """What the limits leave. ``mappings``: of each subject, all that it would take, whatever the budget."""

    mappings: list[int] = field(default_factory=list)
    used_mappings: int = 0
    saved_pages: int = 0
    huge_pages_only: int = 0
    split_huge_pages: int = 0


def limits(
    population: Population, findings: Findings, tally: Tally, groups: Sequence[Sequence[int]], budget: int
) -> Limits:
    """What can be had with ``budget`` mappings for each subject, and without splitting huge pages.

    :param groups: the numbers of the subjects of each group.

    Cost: a pass over all rows. Memory: some 30 bytes for each page of the largest subject, and 8 for each frame.
    """
    found = Limits(mappings=[0] * len(population.subjects))
    for group, members in enumerate(groups):
        frames = int(tally.frames_of_group[group]) + 1
        sharers = _sharers([tally.frames[population.slice_of(each)] for each in members], frames)
        alone = sharers < 2
        kept, unsplit = np.zeros(frames, np.int64), np.zeros(frames, np.int64)
        for number in members:
            ours = population.slice_of(number)
            numbers = tally.frames[ours]
            numbers[alone[numbers]] = 0
            found.mappings[number], used, lost = _within_budget(numbers, _range_starts(population, number), budget)
            found.used_mappings += used
            kept += _sharers([numbers], frames)
            kept -= _sharers([numbers[lost]], frames)
            verdicts = findings.verdicts[ours]
            huge = findings.huge[ours] if population.subjects[number].huge_pages_known else None
            zero_pages, in_blocks, splits = _unsplit(population, number, numbers, verdicts, huge)
            unsplit += _sharers([numbers], frames) - in_blocks(frames)
            found.huge_pages_only += zero_pages
            found.split_huge_pages += splits
            found.saved_pages += int(np.count_nonzero((verdicts == Verdict.ZERO) | (verdicts == Verdict.HOLE)))
        found.saved_pages += int(np.maximum(kept[1:] - 1, 0).sum())
        found.huge_pages_only += int(np.maximum(unsplit[1:] - 1, 0).sum())
    return found


def _sharers(numbers: Sequence[Frames], frames: int) -> NDArray[np.int64]:
    counts = np.zeros(frames, np.int64)
    for part in numbers:
        counts += np.bincount(part, minlength=frames)
    return counts


def _range_starts(population: Population, number: int) -> Rows:
    ranges = population.subjects[number].pages.ranges
    return of_kind(Row, np.cumsum(ranges[:, 1]) - ranges[:, 1])


def _within_budget(numbers: Frames, range_starts: Rows, budget: int) -> tuple[int, int, Rows]:
    # All the mappings that it takes, those that fit, and the rows that have to do without.
    rows = of_kind(Row, np.flatnonzero(numbers))
    if not len(rows):
        return 0, 0, rows
    apart = np.append(True, jumps(rows))
    boundary = np.searchsorted(rows, range_starts)
    boundary = boundary[boundary < len(rows)]
    apart[boundary] = True
    new = apart.copy()
    frames = numbers[rows].astype(np.int64)
    new[1:] |= jumps(frames)
    del frames
    starts = np.flatnonzero(new)
    apart = apart[starts]
    lengths = np.diff(starts, append=len(rows))
    needed = _cost(apart, np.ones(len(starts), np.bool_))
    if needed <= budget:
        return needed, needed, rows[:0]
    order = np.argsort(-lengths, kind="stable")
    fits, too_many = 0, len(starts)
    while too_many - fits > 1:
        middle = (fits + too_many) // 2
        if _cost(apart, _chosen(order[:middle], len(starts))) <= budget:
            fits = middle
        else:
            too_many = middle
    chosen = _chosen(order[:fits], len(starts))
    return needed, _cost(apart, chosen), rows[np.repeat(~chosen, lengths)]


def _chosen(which: NDArray[np.intp], count: int) -> NDArray[np.bool_]:
    chosen = np.zeros(count, np.bool_)
    chosen[which] = True
    return chosen


def _cost(apart: NDArray[np.bool_], chosen: NDArray[np.bool_]) -> int:
    # A mapping for each run, and one more for what a run cuts off, unless the next run follows it directly.
    joined = ~apart & chosen
    joined[1:] &= chosen[:-1]
    runs = int(np.count_nonzero(chosen))
    return 2 * runs - int(np.count_nonzero(joined))


class _InBlocks:
    # Counts the pages of each frame that lie in huge pages.

    def __init__(self) -> None:
        self._parts: list[Frames] = []

    def add(self, numbers: Frames) -> None:
        self._parts.append(numbers[numbers > 0])

    def __call__(self, frames: int) -> NDArray[np.int64]:
        return _sharers(self._parts, frames)


def _unsplit(
    population: Population,
    number: int,
    numbers: Frames,
    verdicts: NDArray[np.uint8],
    huge: NDArray[np.bool_] | None,
) -> tuple[int, _InBlocks, int]:
    # The zero pages that need no split, the pages that share and lie in huge pages, and how many must be split for all.
    zero = (verdicts == Verdict.ZERO) | (verdicts == Verdict.HOLE)
    zero_pages = int(np.count_nonzero(zero))
    shared, splits = _InBlocks(), 0
    for first_rows in _blocks(population.subjects[number].pages.ranges):
        index = first_rows[:, None] + np.arange(HUGE_PAGE_PAGES)
        is_huge = huge[index].all(axis=1) if huge is not None else ~(verdicts[index] == Verdict.ABSENT).any(axis=1)
        index = index[is_huge]
        zeros = np.count_nonzero(zero[index], axis=1)
        frames = numbers[index]
        cut = zeros < HUGE_PAGE_PAGES
        splits += int(np.count_nonzero(cut & ((zeros > 0) | (frames > 0).any(axis=1))))
        zero_pages -= int(zeros[cut].sum())
        shared.add(frames)
    return zero_pages, shared, splits


def _blocks(ranges: NDArray[np.int64]) -> Iterator[Rows]:
    # The first row of each aligned 2 MiB of gfns that is wholly inside a range, some at a time.
    starts = np.cumsum(ranges[:, 1]) - ranges[:, 1]
    skipped = -ranges[:, 0] % HUGE_PAGE_PAGES
    counts = np.maximum(ranges[:, 1] - skipped, 0) // HUGE_PAGE_PAGES
    before = np.cumsum(counts) - counts
    for first in range(0, int(counts.sum()), _BLOCKS_STRIDE):
        block = np.arange(first, min(first + _BLOCKS_STRIDE, int(counts.sum())))
        which = np.searchsorted(before, block, side="right") - 1
        yield starts[which] + skipped[which] + (block - before[which]) * HUGE_PAGE_PAGES
