"""The pages of all sources of an estimate side by side, numbered in one count: its *rows*.

The rows of the first source come first, each source along its ranges. So what is known of pages is an array over rows,
and a domain is a slice of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import count, pairwise

import numpy as np
from numpy.typing import NDArray

from memshr.content.classes import MAX_ROWS
from memshr.errors import MemshrError
from memshr.pagesource import Rows, Subject
from memshr.runs import consecutive
from memshr.types import DomId, Gfn, PageBytes

_SCATTERED_RUN_PAGES = 8
"""Runs that are shorter than this on average are read in one call for all of them, not in one for each."""
_STATES_STRIDE = 1 << 20


class Population:
    """The pages of ``subjects``. May be used by several threads at once.

    Subjects that have a domid keep it. The others get the smallest numbers from 1 on that no subject has.

    :raises MemshrError: there are more pages than an estimate can number.
    """

    def __init__(self, subjects: Sequence[Subject]) -> None:
        self.subjects = tuple(subjects)
        sizes = [subject.pages.total_pages for subject in subjects]
        self.bases: NDArray[np.int64] = np.concatenate([[0], np.cumsum(sizes, dtype=np.int64)]).astype(np.int64)
        """the first row of each subject, and the end of the last; shape ``(subjects + 1,)``"""
        self.rows = int(self.bases[-1])
        if self.rows >= MAX_ROWS:
            raise MemshrError(
                f"{self.rows} pages are more than one estimate can number ({MAX_ROWS - 1})",
                remedy="estimate fewer sources at a time",
            )
        taken = {subject.domid for subject in subjects}
        free = (DomId(number) for number in count(1) if number not in taken)
        self.domids = [next(free) if subject.domid is None else subject.domid for subject in subjects]
        """the domid of each subject; no two are the same"""
        self.live = np.array([subject.pages.live for subject in subjects], np.bool_)

    def domid(self, subject: int) -> DomId:
        """The domid of the subject with this number (from 0 on)."""
        return self.domids[subject]

    def subjects_of(self, rows: Rows) -> NDArray[np.int64]:
        """The number of the subject that each row is of."""
        return np.searchsorted(self.bases, rows, side="right") - 1

    def slice_of(self, subject: int) -> slice:
        """The rows of a subject."""
        return slice(int(self.bases[subject]), int(self.bases[subject + 1]))

    def place(self, row: int) -> tuple[DomId, Gfn]:
        """Domain and gfn of a row."""
        subject = int(np.searchsorted(self.bases, row, side="right")) - 1
        ranges = self.subjects[subject].pages.ranges
        ends = np.cumsum(ranges[:, 1])
        local = row - int(self.bases[subject])
        which = int(np.searchsorted(ends, local, side="right"))
        return self.domid(subject), Gfn(int(ranges[which, 0]) + local - int(ends[which] - ranges[which, 1]))

    def states(self) -> NDArray[np.uint8]:
        """The ``PageState`` of every row, as of now."""
        states = np.empty(self.rows, np.uint8)
        for number, subject in enumerate(self.subjects):
            ours = states[self.slice_of(number)]
            for first in range(0, len(ours), _STATES_STRIDE):
                part = ours[first : first + _STATES_STRIDE]
                part[:] = subject.pages.states(first, len(part))
        return states

    def read(self, rows: Rows, out: PageBytes) -> NDArray[np.bool_]:
        """Contents of pages, cheapest where they come in runs.

        :param rows: ascending and distinct, shape ``(n,)``; page i goes into row i of ``out``.
        :returns: which of them could be read.
        """
        readable = np.empty(len(rows), np.bool_)
        cuts = np.searchsorted(rows, self.bases)
        for number in np.flatnonzero(np.diff(cuts)).tolist():
            part = slice(int(cuts[number]), int(cuts[number + 1]))
            source = self.subjects[number].pages
            local = rows[part] - self.bases[number]
            edges = consecutive(local)
            runs = len(edges) - 1
            if runs > 1 and runs * _SCATTERED_RUN_PAGES > len(local):
                readable[part] = source.read(local, out[part])
                continue
            for start, end in pairwise(edges.tolist()):
                inside = slice(part.start + start, part.start + end)
                readable[inside] = source.read_run(int(local[start]), out[inside])
        return readable
