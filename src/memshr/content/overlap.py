"""Who has how much in common with whom: counting over arrays that are sorted by content."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from memshr.runs import run_starts

_SLAB_CELLS = 1 << 17


def overlap(
    contents: NDArray[np.integer], owners: NDArray[np.integer], copies: NDArray[np.integer], owner_count: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """What each two owners have in common.

    :param contents: a number for each content, ascending, shape ``(n,)``.
    :param owners: who has it, from 0 and below ``owner_count``, shape ``(n,)``; each only once for each content.
    :param copies: how many pages of the owner hold it, at least 1, shape ``(n,)``.
    :returns: two matrices, int64, shape ``(owner_count, owner_count)``: at [a, b] the contents that both have, and the
        pages of a that hold a content that b has, too.
    """
    both = np.zeros((owner_count, owner_count), np.int64)
    pages = np.zeros_like(both)
    row = np.cumsum(run_starts(contents)) - 1
    height = max(1, _SLAB_CELLS // max(1, owner_count))
    for first in range(0, int(row[-1]) + 1 if len(row) else 0, height):  # contents x owners, a slab of rows at a time
        here = slice(*np.searchsorted(row, [first, first + height]))
        slab = np.zeros((height, owner_count))
        slab[row[here] - first, owners[here]] = copies[here]
        present = (slab > 0).astype(np.float64)
        both += (present.T @ present).astype(np.int64)
        pages += (slab.T @ present).astype(np.int64)
    return both, pages
