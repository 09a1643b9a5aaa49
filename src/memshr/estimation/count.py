"""Counting: from classes of equal contents to every figure of an estimate that is about contents.

Contents are taken in pieces that end where a class ends, so each content is seen whole, and the memory that counting
takes does not depend on how many pages there are.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memshr.content.classes import PackedClasses
from memshr.content.overlap import overlap
from memshr.estimation.population import Population
from memshr.indices import Row, of_kind
from memshr.pagesource import Rows
from memshr.runs import alike, run_starts

_PIECE_PAGES = 1 << 18
TOP_CONTENTS = 20
_LAST_BAND_COPIES = 1024

Counts = NDArray[np.int64]
Frames = NDArray[np.uint32]
"""For each row the number of the frame that it would be on, in its group, counted from 1; 0: it shares with nobody."""


@dataclass(frozen=True, slots=True)
class TopContent:
    """One content that saves much. ``row`` is the first page that holds it."""

    row: int
    copies: int
    domains: int
    saved_pages: int


class Tally:
    """The figures; arrays by subject, by group, or by pair of subjects, in their order.

    :param group_of: the number of each subject's group, shape ``(subjects,)``.
    """

    def __init__(self, population: Population, group_of: Sequence[int], max_sharers: int) -> None:
        self._population = population
        self._group_of = np.asarray(group_of, np.int64)
        self._max_sharers = max_sharers
        subjects, groups = len(population.subjects), max(group_of, default=-1) + 1
        self.shared_pages: Counts = np.zeros(subjects, np.int64)
        self.intra_pages: Counts = np.zeros(subjects, np.int64)
        self.inter_pages: Counts = np.zeros(groups, np.int64)
        self.saved_pages: Counts = np.zeros(groups, np.int64)
        self.lost_to_max_sharers: Counts = np.zeros(groups, np.int64)
        self.used_frames = 0
        self.saved_in_one_group = 0
        self.common_contents = np.zeros((subjects, subjects), np.int64)
        self.pages_of_common = np.zeros((subjects, subjects), np.int64)
        bands = len(band_edges())
        self.band_contents: Counts = np.zeros(bands, np.int64)
        self.band_pages: Counts = np.zeros(bands, np.int64)
        self.band_saved: Counts = np.zeros(bands, np.int64)
        self.top: list[TopContent] = []
        self.frames: Frames = np.zeros(population.rows, np.uint32)
        self.frames_of_group: Counts = np.zeros(groups, np.int64)

    def count(self, classes: PackedClasses) -> None:
        """Count these classes of equal contents, none of zeros. Contents of one page count as unique."""
        for piece in _pieces(classes):
            leaders, content, subject, copies = self._holdings(classes, piece)
            self._count_contents(leaders, content, subject, copies)
            self._count_pairs(content, subject, copies)
            totals = np.zeros((len(leaders), len(self.inter_pages)), np.int64) if len(leaders) == 1 else None
            if totals is not None:
                np.add.at(totals, (content, self._group_of[subject]), copies)
            self._give_frames(classes, piece, totals)

    def _holdings(self, classes: PackedClasses, piece: slice) -> tuple[Rows, Counts, Counts, Counts]:
        # The first row of each content; and content, subject, number of copies for all who hold one, in that order.
        keys, bases = classes.keys[piece], self._population.bases
        first, last = (int(keys[i]) >> classes.bits for i in (0, -1))
        if first == last:
            copies = np.diff(np.searchsorted(keys, (first << classes.bits) + bases))
            (subject,) = np.nonzero(copies)
            return of_kind(Row, np.array([first - 1])), np.zeros(len(subject), np.int64), subject, copies[subject]
        leaders = of_kind(Row, classes.leaders(piece))
        new = run_starts(leaders)
        subjects = self._population.subjects_of(of_kind(Row, classes.rows(piece)))
        content = np.cumsum(new) - 1
        held = np.flatnonzero(new | run_starts(subjects))
        return leaders[new], content[held], subjects[held], np.diff(held, append=len(content))

    def _count_contents(self, leaders: Rows, content: Counts, subject: Counts, copies: Counts) -> None:
        subjects, groups = len(self.shared_pages), len(self.inter_pages)
        limit = self._max_sharers
        in_group, which = _distinct(content * groups + self._group_of[subject])
        pages = _sums(which, copies, len(in_group))
        holders = np.bincount(which)
        group = in_group % groups
        shared = pages > 1
        ours = shared[which]
        self.shared_pages += _sums(subject[ours], copies[ours], subjects)
        self.intra_pages += _sums(subject, copies - 1, subjects)
        frames = -(-pages // limit)
        saved = pages - frames
        self.inter_pages += _sums(group, holders - 1, groups)
        self.saved_pages += _sums(group, saved, groups)
        self.lost_to_max_sharers += _sums(group, frames - 1, groups)
        # A page that is alone on the last frame of its content shares with nobody.
        self.used_frames += int((frames - (pages % limit == 1))[shared].sum())
        band = _band_of(pages[shared])
        bands = len(self.band_contents)
        self.band_contents += np.bincount(band, minlength=bands)
        self.band_pages += _sums(band, pages[shared], bands)
        self.band_saved += _sums(band, saved[shared], bands)
        total = _sums(content, copies, len(leaders))
        self.saved_in_one_group += int((total - -(-total // limit)).sum())
        self._keep_top(leaders, total, np.bincount(content), _sums(in_group // groups, saved, len(leaders)))

    def _keep_top(self, leaders: Rows, copies: Counts, holders: Counts, saved: Counts) -> None:
        best = np.arange(len(saved))
        if len(best) > TOP_CONTENTS:
            best = np.argpartition(-saved, TOP_CONTENTS)[:TOP_CONTENTS]
        found = [
            TopContent(int(leaders[i]), int(copies[i]), int(holders[i]), int(saved[i]))
            for i in best.tolist()
            if saved[i]
        ]
        self.top = sorted([*self.top, *found], key=lambda each: (-each.saved_pages, each.row))[:TOP_CONTENTS]

    def _count_pairs(self, content: Counts, subject: Counts, copies: Counts) -> None:
        # Contents of one subject are left out.
        several = np.bincount(content)[content] > 1
        both, pages = overlap(content[several], subject[several], copies[several], len(self.shared_pages))
        self.common_contents += both
        self.pages_of_common += pages

    def _give_frames(self, classes: PackedClasses, piece: slice, totals: Counts | None) -> None:
        # A content that is larger than a piece is taken in strides; ``given`` is how many of its pages have a frame.
        given = np.zeros(len(self.inter_pages), np.int64)
        for first in range(piece.start, piece.stop, _PIECE_PAGES):
            part = slice(first, min(first + _PIECE_PAGES, piece.stop))
            rows, leaders = of_kind(Row, classes.rows(part)), of_kind(Row, classes.leaders(part))
            group_of_row = self._group_of[self._population.subjects_of(rows)]
            for group in np.flatnonzero(np.bincount(group_of_row)).tolist():
                ours = group_of_row == group
                self._number(rows[ours], leaders[ours], group, totals, given)

    def _number(self, rows: Rows, leaders: Rows, group: int, totals: Counts | None, given: Counts) -> None:
        edges = alike(leaders)
        starts, lengths = edges[:-1], np.diff(edges)
        rank = np.arange(len(rows)) - np.repeat(starts, lengths)
        if totals is None:
            several = np.repeat(lengths > 1, lengths)
        else:
            several = np.full(len(rows), totals[0, group] > 1)
            rank += given[group]
            given[group] += len(rows)
        rows, rank = rows[several], rank[several]
        frame = self.frames_of_group[group] + np.cumsum(rank % self._max_sharers == 0)
        self.frames[rows] = frame
        if len(frame):
            self.frames_of_group[group] = frame[-1]


def band_edges() -> list[tuple[int, int | None]]:
    """The bands of numbers of copies: 2, 3, 4 to 7, 8 to 15 and so on, and the last without an end."""
    edges: list[tuple[int, int | None]] = [(2, 2), (3, 3)]
    first = 4
    while first < _LAST_BAND_COPIES:
        edges.append((first, 2 * first - 1))
        first *= 2
    return [*edges, (first, None)]


def _band_of(copies: Counts) -> NDArray[np.intp]:
    firsts = np.array([first for first, _ in band_edges()])
    return np.searchsorted(firsts, copies, side="right") - 1


def _distinct(numbers: Counts) -> tuple[Counts, NDArray[np.intp]]:
    # The numbers that there are, ascending, and which of them each is.
    if (numbers[1:] < numbers[:-1]).any():
        return np.unique(numbers, return_inverse=True)
    starts = run_starts(numbers)
    return numbers[starts], np.cumsum(starts) - 1


def _sums(which: NDArray[np.integer], weights: Counts, length: int) -> Counts:
    # Exact: no sum comes near 2**53.
    return np.bincount(which, weights, length).astype(np.int64)


def _pieces(classes: PackedClasses) -> Iterator[slice]:
    keys, bits = classes.keys, classes.bits
    first = 0
    while first < len(keys):
        end = min(first + _PIECE_PAGES, len(keys))
        if end < len(keys):
            class_starts = int(np.searchsorted(keys, int(keys[end]) >> bits << bits))
            end = (
                class_starts
                if class_starts > first
                else int(np.searchsorted(keys, ((int(keys[first]) >> bits) + 1) << bits))
            )
        yield slice(first, end)
        first = end
