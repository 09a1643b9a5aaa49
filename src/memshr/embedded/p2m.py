"""The p2m of every domain: what each gfn is, and which machine frame is behind it.

An entry is one number, ``mfn << 4 | type``; a hole is 0. Entries live in one sparse column over page ids
(``domid << 36 | gfn``). A domain that was made from an image has its entries only where somebody looked: the rest
follow from its extents.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from memshr.embedded.columns import CHUNK, CHUNK_BITS, Column
from memshr.runs import joined_ranges, true_runs
from memshr.types import MAX_GFN_BITS, P2mType

TYPE_BITS = 4
TYPE_MASK = (1 << TYPE_BITS) - 1
HOLE = 0
HOLES = (HOLE, int(P2mType.MMIO_DM))
"""Types with nothing behind them, where a shared frame may be put."""
CHUNK_BITS_PER_DOMAIN = MAX_GFN_BITS - CHUNK_BITS

_IS_RAM = np.zeros(1 << TYPE_BITS, np.bool_)
_IS_RAM[[P2mType.RAM_RW, P2mType.RAM_SHARED, P2mType.RAM_RO, P2mType.RAM_LOGDIRTY, P2mType.RAM_POD]] = True


def entry(mfn: int, kind: P2mType) -> int:
    """The p2m entry of a gfn."""
    return mfn << TYPE_BITS | kind


def is_ram(value: int) -> bool:
    """True if a guest reads memory at this entry."""
    return bool(_IS_RAM[value & TYPE_MASK])


def is_ram_many(values: NDArray[np.int64]) -> NDArray[np.bool_]:
    """``is_ram`` for an array of entries."""
    ram: NDArray[np.bool_] = _IS_RAM[values & TYPE_MASK]
    return ram


@dataclass(frozen=True, slots=True)
class FrameExtent:
    """A run of gfns that were given a run of machine frames when their domain was made."""

    first_gfn: int
    count: int
    first_mfn: int


@dataclass(slots=True)
class P2m:
    """The p2m of one domain: a window on the entries of all domains."""

    domid: int
    entries: Column
    extents: list[FrameExtent] = field(default_factory=list)
    max_gfn: int = -1
    """The highest gfn that was ever populated."""

    def make_chunk(self, key: int) -> NDArray[np.int64] | None:
        """What the extents say about a chunk of entries that nobody touched; None: all holes."""
        first = (key - (self.domid << CHUNK_BITS_PER_DOMAIN)) << CHUNK_BITS
        chunk: NDArray[np.int64] | None = None
        for extent in self.extents:
            start = max(first, extent.first_gfn)
            end = min(first + CHUNK, extent.first_gfn + extent.count)
            if start < end:
                if chunk is None:
                    chunk = np.zeros(CHUNK, np.int64)
                mfns = np.arange(end - start) + (extent.first_mfn + start - extent.first_gfn)
                chunk[start - first : end - first] = mfns << TYPE_BITS | P2mType.RAM_RW
        return chunk

    @property
    def first_key(self) -> int:
        """Key of the domain's first chunk."""
        return self.domid << CHUNK_BITS_PER_DOMAIN

    @property
    def end_key(self) -> int:
        """Key of the first chunk after the domain's."""
        return self.first_key + (1 << CHUNK_BITS_PER_DOMAIN)

    def touched(self) -> list[tuple[int, NDArray[np.int64]]]:
        """The chunks of entries that exist up to ``max_gfn``: first page id and entries of each, ascending."""
        if self.max_gfn < 0:
            return []
        last_key, last = self.first_key + (self.max_gfn >> CHUNK_BITS), self.max_gfn & (CHUNK - 1)
        return [
            (key << CHUNK_BITS, chunk[: last + 1] if key == last_key else chunk)
            for key, chunk in self.entries.touched_chunks(self.first_key, last_key)
        ]

    def untouched(self) -> list[FrameExtent]:
        """The parts of the extents whose entries do not exist yet: private RAM, every page of them."""
        parts: list[FrameExtent] = []
        for extent in self.extents:
            end = extent.first_gfn + extent.count
            for chunk in range(extent.first_gfn >> CHUNK_BITS, ((end - 1) >> CHUNK_BITS) + 1):
                if not self.entries.touched(self.first_key + chunk):
                    start = max(extent.first_gfn, chunk << CHUNK_BITS)
                    stop = min(end, (chunk + 1) << CHUNK_BITS)
                    parts.append(FrameExtent(start, stop - start, extent.first_mfn + start - extent.first_gfn))
        return parts

    def populated_ranges(self) -> NDArray[np.int64]:
        """The gfns with RAM behind them: rows ``first_gfn, count``, ascending, neither touching nor overlapping."""
        bounds = [(part.first_gfn, part.first_gfn + part.count) for part in self.untouched()]
        first_pid = self.first_key << CHUNK_BITS
        for pid, chunk in self.touched():
            ram = true_runs(_IS_RAM[chunk & TYPE_MASK]) + (pid - first_pid)
            bounds.extend((begin, end) for begin, end in ram.tolist())
        return joined_ranges(np.array(bounds, np.int64).reshape(-1, 2))
