"""From fingerprints to candidates: which pages of one trust group may be equal. Pure functions over arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memshr.content.fingerprint import ZERO_PAGE_FINGERPRINT, Fingerprints
from memshr.runs import range_members, run_starts

Indices = NDArray[np.int64]
"""Indices of pages in the arrays of a scan."""
BatchRows = NDArray[np.intp]
"""Indices of pages in one batch."""
Classes = NDArray[np.int64]
"""Class numbers, ascending from 0."""

_STRIDE = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pages that share their fingerprint with another one, those of one class side by side.

    :param rows: which pages, as indices of what was classified; within a class in ascending order.
    :param classes: the class of each, same shape ``(n,)``. Classes come in the order of their first rows, so that runs
        of pages that are equal to other runs stay runs: frames and mappings then come in runs, too. Only the class of
        fingerprint 0, the zero pages, is before all others.
    """

    rows: Indices
    classes: Classes

    def __len__(self) -> int:
        return len(self.rows)


def classify(fingerprints: Fingerprints) -> Candidates:
    """The classes of equal fingerprint that have at least two pages.

    If the pages come by domain and gfn, so do the pages of each class.

    :param fingerprints: of all pages that may be shared with each other, shape ``(n,)``.

    Cost: two sorts. Memory: 9 bytes a page, and 24 for each that is a candidate.
    """
    packed = packed_classes(fingerprints)
    classes = packed.keys
    rows = packed.rows(slice(None))
    classes >>= packed.bits
    new = np.ones(len(classes), dtype=np.bool_)
    np.not_equal(classes[1:], classes[:-1], out=new[1:])
    np.cumsum(new, out=classes)
    classes -= 1
    return Candidates(rows, classes)


@dataclass(frozen=True, slots=True)
class PackedClasses:
    """What ``Candidates`` says, in 8 bytes for each candidate.

    :param keys: ascending; of each candidate the first row of its class plus one, above ``bits`` bits that hold its
        own row, shape ``(n,)``. The class of fingerprint 0 has 0 instead of its first row.
    """

    keys: NDArray[np.int64]
    bits: int

    def rows(self, part: slice) -> Indices:
        """The rows of these candidates."""
        return self.keys[part] & ((1 << self.bits) - 1)

    def leaders(self, part: slice) -> Indices:
        """The first row of the class of each of these candidates; not for the class of fingerprint 0."""
        return (self.keys[part] >> self.bits) - 1


MAX_ROWS = 1 << 31
"""Indices that a class can be packed with: 8 TiB of pages."""


def packed_classes(fingerprints: Fingerprints, *, zero_pages: bool = True) -> PackedClasses:
    """As ``classify``, in a third of the memory.

    :param fingerprints: less than MAX_ROWS of them.
    :param zero_pages: whether the class of fingerprint 0 counts.

    Cost: two sorts. Memory: 9 bytes a page while the first is under way, then 17 for each candidate.
    """
    bits = len(fingerprints).bit_length()
    order, same = _in_order(fingerprints)
    if not zero_pages:
        zeros = np.count_nonzero(fingerprints == ZERO_PAGE_FINGERPRINT)
        order, same = order[zeros:], same[zeros:]
    repeated = same.copy()
    repeated[:-1] |= same[1:]
    keys = order[repeated]
    del order
    if not len(keys):
        return PackedClasses(keys, bits)
    (starts,) = np.nonzero(~same[repeated])
    del same, repeated
    zeros_lead = fingerprints[keys[0]] == ZERO_PAGE_FINGERPRINT
    first_rows = keys[starts] + 1
    if zeros_lead:
        first_rows[0] = 0
    first_rows <<= bits
    for first in range(0, len(starts), _STRIDE):
        ends = starts[first + 1 : first + _STRIDE + 1]
        end = int(ends[-1]) if len(ends) == _STRIDE else len(keys)
        lengths = np.diff(starts[first : first + _STRIDE], append=end)
        keys[starts[first] : end] |= np.repeat(first_rows[first : first + _STRIDE], lengths)
    keys.sort()
    return PackedClasses(keys, bits)


def repeated(fingerprints: Fingerprints) -> NDArray[np.bool_]:
    """Which pages share their fingerprint with another one, shape ``(n,)``."""
    order, same = _in_order(fingerprints)
    same[:-1] |= same[1:]
    result = np.empty_like(same)
    result[order] = same
    return result


def _in_order(fingerprints: Fingerprints) -> tuple[Indices, NDArray[np.bool_]]:
    # The rows by fingerprint, then by row; and which have the fingerprint of the one before. Numbers are sorted several
    # times faster than indices, so what is sorted are the top bits of the fingerprints, with the rows below them.
    low = np.uint64((1 << len(fingerprints).bit_length()) - 1)
    keys = fingerprints & ~low
    for first in range(0, len(keys), _STRIDE):
        part = keys[first : first + _STRIDE]
        part |= np.arange(first, first + len(part), dtype=np.uint64)
    keys.sort()
    same, mixed = _neighbours(fingerprints, keys, low)
    if len(mixed):
        # Different fingerprints whose top bits are equal: their rows are sorted once more, by the whole of them.
        tops = np.unique(keys[mixed] & ~low)
        starts, ends = np.searchsorted(keys, tops), np.searchsorted(keys, tops | low, side="right")
        lengths = ends - starts
        places = range_members(starts, lengths)
        again = keys[places]
        keys[places] = again[np.argsort(fingerprints[again & low], kind="stable")]
        same, _ = _neighbours(fingerprints, keys, low)
    keys &= low
    return keys.view(np.int64), same


def _neighbours(
    fingerprints: Fingerprints, keys: NDArray[np.uint64], low: np.uint64
) -> tuple[NDArray[np.bool_], NDArray[np.intp]]:
    # Which keys have the fingerprint of the one before, and which only its top bits. In strides: all fingerprints in
    # this order at once would be 8 bytes a page more.
    same = np.zeros(len(keys), dtype=np.bool_)
    mixed = []
    for first in range(0, len(keys), _STRIDE):
        part = keys[max(first - 1, 0) : first + _STRIDE]
        found = fingerprints[part & low]
        equal = found[1:] == found[:-1]
        same[max(first, 1) : first + _STRIDE] = equal
        mixed.append(np.flatnonzero(~equal & ((part[1:] ^ part[:-1]) <= low)) + max(first, 1))
    return same, np.concatenate(mixed) if mixed else np.empty(0, np.intp)


def one_of_each(classes: Classes, keys: NDArray[np.integer]) -> Indices:
    """The first row of each pair of class and key, in order of class, then of key.

    :param classes: of each row, shape ``(n,)``; ``keys``: something that the rows of a class may have in common.

    An example, with frames as keys::

        class   0  0  0  1  1
        frame   7  7  9  7  8
        rows    0     2  3  4
    """
    order = np.lexsort((keys, classes))
    return np.asarray(order[run_starts(classes[order]) | run_starts(keys[order])])


def refined(classes: Classes, keys: NDArray[np.integer]) -> tuple[Indices, Classes]:
    """Classes divided by a second key: the rows that still are with another one, and their new classes from 0 on.

    :param classes: of each row, shape ``(n,)``; ``keys``: of each row, equal for rows that may be equal.
    :returns: rows in order of class, then of key; ascending new classes, of the same shape.

    An example::

        class      0  0  0  1  1
        key        5  6  5  5  5
        rows       0  2  3  4       (row 1 is alone now)
        new class  0  0  1  1
    """
    order = np.lexsort((keys, classes))
    new = run_starts(classes[order]) | run_starts(keys[order])
    alike = np.cumsum(new) - 1
    several = np.bincount(alike)[alike] > 1
    return order[several], np.cumsum(new[several]) - 1
