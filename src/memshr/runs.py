"""Runs: stretches of an array whose neighbours belong together, by their edges.

The edges of runs are numbers from 0 to the length of the array, ascending::

    pages   4  5  6  9  10  20
    edges   0        3      5   6     consecutive(pages)

So ``edges[:-1]`` is where the runs begin, ``np.diff(edges)`` is how long they are, and ``pairwise(edges.tolist())``
gives the begin and the end of each. An empty array has no run, and the one edge 0.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Edges = NDArray[np.int64]
"""shape ``(runs + 1,)``"""


def edges_at(breaks: NDArray[np.bool_], count: int) -> Edges:
    """The edges of runs.

    :param breaks: whether a run ends between each two neighbours, shape ``(count - 1,)``; empty if ``count`` is 0.
    :param count: the length of the array.
    """
    inner = np.flatnonzero(breaks)
    edges = np.zeros(len(inner) + 1 + (count > 0), np.int64)
    edges[1 : 1 + len(inner)] = inner + 1
    edges[-1] = count
    return edges


def jumps(numbers: NDArray[np.integer], step: int = 1) -> NDArray[np.bool_]:
    """Between which neighbours the numbers do not go up by ``step``, shape ``(n - 1,)``."""
    return np.asarray(np.diff(numbers) != step)


def consecutive(*numbers: NDArray[np.integer]) -> Edges:
    """The edges of the runs in which each of these arrays, all of shape ``(n,)``, goes up by 1."""
    breaks = jumps(numbers[0])
    for more in numbers[1:]:
        breaks |= jumps(more)
    return edges_at(breaks, len(numbers[0]))


def alike(values: NDArray[np.generic]) -> Edges:
    """The edges of the runs of equal values."""
    return edges_at(np.asarray(values[1:] != values[:-1]), len(values))


def run_starts(values: NDArray[np.generic]) -> NDArray[np.bool_]:
    """Where a run of equal values begins; bool, of the same shape ``(n,)``."""
    starts = np.ones(len(values), np.bool_)
    np.not_equal(values[1:], values[:-1], out=starts[1:])
    return starts


def true_runs(mask: NDArray[np.bool_]) -> NDArray[np.int64]:
    """The runs of True in ``mask`` (shape ``(n,)``): shape ``(runs, 2)``, each row its begin and its end."""
    steps = np.diff(mask.astype(np.int8), prepend=0, append=0)
    return np.flatnonzero(steps).astype(np.int64).reshape(-1, 2)


def slices(edges: Edges) -> Iterator[slice]:
    """The runs as slices."""
    return (slice(begin, end) for begin, end in pairwise(edges.tolist()))


def range_members(firsts: NDArray[np.integer], counts: NDArray[np.integer]) -> NDArray[np.int64]:
    """The numbers of some ranges, one range after the other.

    :param firsts: the first number of each, shape ``(n,)``; ``counts``: how many numbers it has, of the same shape.

    An example: ``range_members([5, 20], [3, 2])`` is ``[5, 6, 7, 20, 21]``.
    """
    before = np.cumsum(counts) - counts
    numbers = np.arange(int(counts.sum()), dtype=np.int64)
    numbers += np.repeat(firsts - before, counts)
    return numbers


def joined_ranges(ranges: NDArray[np.int64]) -> NDArray[np.int64]:
    """Ranges in order, those that touch as one.

    :param ranges: shape ``(n, 2)``: begin and end of each, none overlapping another, in any order.
    :returns: shape ``(m, 2)``: first number and how many numbers, ascending, neither touching nor overlapping.
    """
    ordered = ranges[np.argsort(ranges[:, 0])]
    edges = edges_at(ordered[1:, 0] != ordered[:-1, 1], len(ordered))
    begins, ends = ordered[edges[:-1], 0], ordered[edges[1:] - 1, 1]
    return np.stack([begins, ends - begins], axis=1)
