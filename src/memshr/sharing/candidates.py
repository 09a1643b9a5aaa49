"""From fingerprints to candidates: which pages of one trust group may be equal. Pure functions over arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memshr.sharing.fingerprint import ZERO_PAGE_FINGERPRINT, Fingerprints

Rows = NDArray[np.int64]
"""Indices of pages in the arrays of a scan."""
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

    rows: Rows
    classes: Classes

    def __len__(self) -> int:
        return len(self.rows)


def classify(fingerprints: Fingerprints) -> Candidates:
    """The classes of equal fingerprint that have at least two pages.

    If the pages come by domain and gfn, so do the pages of each class.

    :param fingerprints: of all pages that may be shared with each other, shape ``(n,)``.

    Cost: two sorts. Memory: 10 bytes a page, and 24 for each that is a candidate.
    """
    order = np.argsort(fingerprints)
    same = _same_as_before(fingerprints, order)
    repeated = same.copy()
    repeated[:-1] |= same[1:]
    rows = order[repeated]
    del order
    (starts,) = np.nonzero(~same[repeated])
    del same, repeated
    if not len(rows):
        return Candidates(rows, rows.copy())
    # The sort does not keep the order of equal fingerprints: sort once more, by a class's first row and row in one
    # number.
    first_rows = np.minimum.reduceat(rows, starts) + 1
    if fingerprints[rows[0]] == ZERO_PAGE_FINGERPRINT:
        first_rows[0] = 0
    bits = len(fingerprints).bit_length()
    first_rows <<= bits
    lengths = np.diff(starts, append=len(rows))
    del starts
    key = np.repeat(first_rows, lengths)
    del first_rows, lengths
    key |= rows
    key.sort()
    np.bitwise_and(key, (1 << bits) - 1, out=rows)
    key >>= bits
    new = np.ones(len(key), dtype=np.bool_)
    np.not_equal(key[1:], key[:-1], out=new[1:])
    np.cumsum(new, out=key)
    key -= 1
    return Candidates(rows, key)


def repeated(fingerprints: Fingerprints) -> NDArray[np.bool_]:
    """Which pages share their fingerprint with another one, shape ``(n,)``."""
    order = np.argsort(fingerprints)
    same = _same_as_before(fingerprints, order)
    same[:-1] |= same[1:]
    result = np.empty_like(same)
    result[order] = same
    return result


def _same_as_before(fingerprints: Fingerprints, order: NDArray[np.intp]) -> NDArray[np.bool_]:
    # In strides: all fingerprints in their sorted order at once would be 8 bytes a page more.
    same = np.zeros(len(order), dtype=np.bool_)
    for first in range(0, len(order), _STRIDE):
        in_order = fingerprints[order[max(first - 1, 0) : first + _STRIDE]]
        same[max(first, 1) : first + _STRIDE] = in_order[1:] == in_order[:-1]
    return same
