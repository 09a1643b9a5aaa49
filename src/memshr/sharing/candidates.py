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

    def rows(self, part: slice) -> Rows:
        """The rows of these candidates."""
        return self.keys[part] & ((1 << self.bits) - 1)

    def leaders(self, part: slice) -> Rows:
        """The first row of the class of each of these candidates; not for the class of fingerprint 0."""
        return (self.keys[part] >> self.bits) - 1


MAX_ROWS = 1 << 31
"""Rows that a class can be packed with: 8 TiB of pages."""


def packed_classes(fingerprints: Fingerprints, *, zero_pages: bool = True) -> PackedClasses:
    """As ``classify``, in a third of the memory.

    :param fingerprints: less than MAX_ROWS of them.
    :param zero_pages: whether the class of fingerprint 0 counts.

    Cost: two sorts. Memory: 10 bytes a page while the first is under way, then 17 for each candidate.
    """
    order: NDArray[np.int64] = np.argsort(fingerprints)
    if not zero_pages:
        order = order[np.count_nonzero(fingerprints == ZERO_PAGE_FINGERPRINT) :]
    same = _same_as_before(fingerprints, order)
    repeated = same.copy()
    repeated[:-1] |= same[1:]
    keys = order[repeated]
    del order
    bits = len(fingerprints).bit_length()
    if not len(keys):
        return PackedClasses(keys, bits)
    (starts,) = np.nonzero(~same[repeated])
    del same, repeated
    # The sort does not keep the order of equal fingerprints: sort once more, by a class's first row and row in one
    # number.
    zeros_lead = fingerprints[keys[0]] == ZERO_PAGE_FINGERPRINT
    first_rows = np.minimum.reduceat(keys, starts) + 1
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
