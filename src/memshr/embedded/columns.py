"""Sparse columns: one number for each index of a 64-bit space, in chunks that are made when first touched.

The p2m of a domain, the links of the reverse maps and the tables of machine frames are columns. A domain may have
memory at gfn 0 and at gfn 2**36 - 1, and a 100 GiB image must cost nothing until it is read, so a column holds only
the chunks that somebody touched; ``make`` says what an untouched chunk holds.

Bulk access goes through ``Spots``, which sorts a set of indices by chunk once for all the columns of a space.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from memshr.runs import alike

CHUNK_BITS = 16
CHUNK = 1 << CHUNK_BITS
_MASK = CHUNK - 1

Index = NDArray[np.int64]


def _stable_order(keys: Index) -> NDArray[np.intp]:
    # numpy sorts 16-bit numbers by radix, in a fraction of the time; chunks are seldom more than that apart.
    lowest = keys.min()
    small = keys.max() - lowest < 1 << 16
    return np.argsort((keys - lowest).astype(np.uint16) if small else keys, kind="stable")


class Spots:
    """Where the entries of an index array are: for each chunk, which positions lie in it and at what offsets.

    Cost: one pass when all indices lie in one chunk, one stable sort otherwise.
    """

    __slots__ = ("groups", "size")

    def __init__(self, index: Index) -> None:
        self.size = len(index)
        self.groups: list[tuple[int, slice | NDArray[np.intp], NDArray[np.int64]]] = []
        if not self.size:
            return
        keys = index >> CHUNK_BITS
        offsets = index & _MASK
        first = int(keys[0])
        if (keys == first).all():
            self.groups.append((first, slice(None), offsets))
            return
        edges = alike(keys)
        order: NDArray[np.intp] | None = None
        if len(edges) > 66 or len(np.unique(keys[edges[:-1]])) < len(edges) - 1:
            order = _stable_order(keys)
            keys = keys[order]
            offsets = offsets[order]
            edges = alike(keys)
        for start, end in pairwise(edges.tolist()):
            positions = slice(start, end) if order is None else order[start:end]
            self.groups.append((int(keys[start]), positions, offsets[start:end]))


class Column:
    """One number of ``dtype`` for each index; see the module's docstring.

    :param make: called with a chunk's key when the chunk is first touched; returns its CHUNK numbers. Without it, or
        when it returns None, they are zeros, which cost no memory until written.
    """

    __slots__ = ("_chunks", "_make", "dtype")

    def __init__(self, dtype: Any, make: Callable[[int], NDArray[Any] | None] | None = None) -> None:
        self.dtype = np.dtype(dtype)
        self._chunks: dict[int, NDArray[Any]] = {}
        self._make = make

    def chunk(self, key: int) -> NDArray[Any]:
        """The CHUNK numbers at indices ``key << CHUNK_BITS`` and up."""
        chunk = self._chunks.get(key)
        if chunk is None:
            made = self._make(key) if self._make else None
            chunk = self._chunks[key] = np.zeros(CHUNK, self.dtype) if made is None else made
        return chunk

    def touched(self, key: int) -> bool:
        """True if this chunk exists."""
        return key in self._chunks

    def touched_chunks(self, first_key: int, last_key: int) -> Iterator[tuple[int, NDArray[Any]]]:
        """The chunks that exist with keys from ``first_key`` to ``last_key``, ascending."""
        if last_key - first_key < len(self._chunks):
            keys = [key for key in range(first_key, last_key + 1) if key in self._chunks]
        else:
            keys = sorted(key for key in self._chunks if first_key <= key <= last_key)
        for key in keys:
            yield key, self._chunks[key]

    def drop(self, first_key: int, last_key: int) -> None:
        """Forget the chunks from ``first_key`` to ``last_key``."""
        for key in [key for key, _ in self.touched_chunks(first_key, last_key)]:
            del self._chunks[key]

    def get(self, index: int) -> int:
        """The number at one index."""
        chunk = self._chunks.get(index >> CHUNK_BITS)
        if chunk is None:
            chunk = self.chunk(index >> CHUNK_BITS)
        return chunk.item(index & _MASK)  # type: ignore[no-any-return]  # integer dtypes only

    def set(self, index: int, value: int) -> None:
        """Put a number at one index."""
        chunk = self._chunks.get(index >> CHUNK_BITS)
        if chunk is None:
            chunk = self.chunk(index >> CHUNK_BITS)
        chunk[index & _MASK] = value

    def gather(self, spots: Spots) -> NDArray[Any]:
        """The numbers at many indices, in the order of the index array that made ``spots``."""
        if len(spots.groups) == 1:
            key, _, offsets = spots.groups[0]
            return self.chunk(key)[offsets]
        out = np.empty(spots.size, self.dtype)
        for key, positions, offsets in spots.groups:
            out[positions] = self.chunk(key)[offsets]
        return out

    def scatter(self, spots: Spots, values: NDArray[Any] | int) -> None:
        """Put numbers at many indices; where an index comes twice, one of its values stays."""
        for key, positions, offsets in spots.groups:
            self.chunk(key)[offsets] = values[positions] if isinstance(values, np.ndarray) else values
