"""The first look of an estimate: the fingerprint of every page that has contents."""

from __future__ import annotations

import enum
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memshr.content.fingerprint import ZERO_PAGE_FINGERPRINT, FingerprintPages, Fingerprints
from memshr.estimation.population import Population
from memshr.estimation.readers import Readers
from memshr.indices import Row, of_kind
from memshr.pagesource import PageState, Rows
from memshr.types import PAGE_SIZE, PageBytes, page_buffer

_TASK_PAGES = 4096
"""16 MiB: what a thread takes at once."""
_PIECE_PAGES = 1024
"""4 MiB is read and then fingerprinted, out of a cache. Smaller pieces would stay in a nearer cache, but threads would
pass the interpreter lock on so often that two of them are little faster than one."""


class Verdict(enum.IntEnum):
    """What is known of a page. Pages with contents are OPEN until they are found unique or shared."""

    OPEN = 0
    ZERO = 1
    HOLE = 2
    ABSENT = 3
    VOLATILE = 4
    UNREADABLE = 5
    NOT_LOOKED_AT = 6
    """Not in the sample."""


@dataclass(slots=True)
class Findings:
    """What is known of all rows, shape ``(rows,)`` each.

    :param fingerprints: 0 for every page that is not OPEN.
    :param huge: parts of huge pages, where that is known.
    """

    verdicts: NDArray[np.uint8]
    fingerprints: Fingerprints
    huge: NDArray[np.bool_]
    pages_read: int = 0

    def drop(self, rows: Rows, verdict: Verdict) -> None:
        """These pages are not OPEN any more."""
        self.verdicts[rows] = verdict
        self.fingerprints[rows] = ZERO_PAGE_FINGERPRINT


_VERDICTS = np.array(
    [
        {PageState.HOLE: Verdict.HOLE, PageState.ABSENT: Verdict.ABSENT}.get(state, Verdict.OPEN)
        for state in sorted(PageState)
    ],
    np.uint8,
)


def survey(population: Population) -> Findings:
    """What can be known without reading pages.

    :raises MemshrError: a source is gone.
    """
    states = population.states()
    return Findings(_VERDICTS[states], np.zeros(population.rows, np.uint64), states == PageState.HUGE)


def look(
    population: Population,
    findings: Findings,
    fingerprint_pages: FingerprintPages,
    readers: Readers,
    advance: Callable[[int], None],
) -> None:
    """Fingerprint every OPEN page; zero pages and those that cannot be read get their verdict.

    :param fingerprint_pages: with one thread, since this has its own.
    :raises MemshrError: a source is gone, or has changed although it is not live.

    Cost: the bandwidth of reading; pages that are not OPEN are not read.
    """
    verdicts, fingerprints = findings.verdicts, findings.fingerprints

    def look(task: _Task, buffer: PageBytes) -> None:
        source = population.subjects[task.subject].pages
        for first in range(task.first_row, task.end_row, _PIECE_PAGES):
            piece = slice(first, min(first + _PIECE_PAGES, task.end_row))
            is_open = verdicts[piece] == Verdict.OPEN
            if is_open.all():  # the common case, without arrays of row numbers
                contents = buffer[: piece.stop - first]
                readers.before_reading(contents.nbytes)
                note(piece, source.read_run(first - task.base, contents), contents)
            elif is_open.any():
                chosen = of_kind(Row, np.flatnonzero(is_open) + first)
                contents = buffer[: len(chosen)]
                readers.before_reading(contents.nbytes)
                note(chosen, population.read(chosen, contents), contents)
        advance(task.end_row - task.first_row)

    def note(rows: slice | Rows, readable: NDArray[np.bool_], contents: PageBytes) -> None:
        found = fingerprint_pages(contents)
        if found.all() and readable.all():
            fingerprints[rows] = found
            return
        new = np.where(found == ZERO_PAGE_FINGERPRINT, np.uint8(Verdict.ZERO), np.uint8(Verdict.OPEN))
        new[~readable] = Verdict.UNREADABLE
        found[~readable] = ZERO_PAGE_FINGERPRINT
        verdicts[rows] = new
        fingerprints[rows] = found

    findings.pages_read += int(np.count_nonzero(verdicts == Verdict.OPEN))
    readers.run(_tasks(population), look, lambda: page_buffer(_PIECE_PAGES))


def look_again_at_zeros(
    population: Population,
    findings: Findings,
    fingerprint_pages: FingerprintPages,
    readers: Readers,
) -> None:
    """Read the zero pages of live sources once more; those that are zero no longer are VOLATILE."""
    for number in np.flatnonzero(population.live).tolist():
        ours = population.slice_of(number)
        zeros = of_kind(Row, np.flatnonzero(findings.verdicts[ours] == Verdict.ZERO) + ours.start)
        findings.pages_read += len(zeros)

        def look(part: slice, buffer: PageBytes, zeros: Rows = zeros) -> None:
            rows = zeros[part]
            readers.before_reading(len(rows) * PAGE_SIZE)
            readable = population.read(rows, buffer[: len(rows)])
            changed = fingerprint_pages(buffer[: len(rows)]) != ZERO_PAGE_FINGERPRINT
            findings.verdicts[rows[changed]] = Verdict.VOLATILE
            findings.verdicts[rows[~readable]] = Verdict.UNREADABLE

        parts = [slice(first, first + _PIECE_PAGES) for first in range(0, len(zeros), _PIECE_PAGES)]
        readers.run(parts, look, lambda: page_buffer(_PIECE_PAGES))


@dataclass(frozen=True, slots=True)
class _Task:
    # Rows of one subject, whose first row is ``base``.
    subject: int
    base: int
    first_row: int
    end_row: int


def _tasks(population: Population) -> Iterator[_Task]:
    for number in range(len(population.subjects)):
        ours = population.slice_of(number)
        for first in range(ours.start, ours.stop, _TASK_PAGES):
            yield _Task(number, ours.start, first, min(first + _TASK_PAGES, ours.stop))
