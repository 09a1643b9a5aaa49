"""From fingerprints to candidates: which pages of one trust group may be equal. Pure functions over arrays."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memshr.sharing.fingerprint import Fingerprints

Rows = NDArray[np.int64]
"""Indices of pages in the arrays of a scan."""
Classes = NDArray[np.int64]
"""Class numbers, ascending from 0."""

_STRIDE = 1 << 20


@dataclass(frozen=True, slots=True)
class Candidates:
    """Pages that share their fingerprint with another one, those of one class side by side.

    :param rows: which pages, as indices of what was classified; within a class in ascending order.
    :param classes: the class of each, same shape ``(n,)``; classes come in the order of their fingerprints.
    """

    rows: Rows
    classes: Classes

    def __len__(self) -> int:
        return len(self.rows)


def classify(fingerprints: Fingerprints) -> Candidates:
    """The classes of equal fingerprint that have at least two pages.

    If the pages come by domain and gfn, so do the pages of each class.

    :param fingerprints: of all pages that may be shared with each other, shape ``(n,)``.

    Cost: one sort. Memory: 9 bytes a page, and 24 for each that is a candidate.
    """
    order = np.argsort(fingerprints)
    same = _same_as_before(fingerprints, order)
    repeated = same.copy()
    repeated[:-1] |= same[1:]
    rows = order[repeated]
    del order
    starts = ~same[repeated]
    classes = np.cumsum(starts, dtype=np.int64)
    classes -= 1
    # The sort does not keep the order of equal fingerprints: sort once more, by class and row in one number.
    bits = len(fingerprints).bit_length()
    key = classes << bits
    key |= rows
    key.sort()
    np.bitwise_and(key, (1 << bits) - 1, out=rows)
    return Candidates(rows, classes)


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
