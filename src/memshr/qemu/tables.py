"""Tables for the agent: which system calls put pages onto frames, give them back, or copy them. Pure arithmetic.

A row is a system call: its number, six arguments, and the result that it must have (``agent``). Nothing here looks at
QEMU or changes anything, so all of it can be tested without one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.qemu import syscalls
from memshr.qemu.control_area import IF_EQUAL, NODE_MASK_BYTES
from memshr.runs import edges_at, jumps
from memshr.types import HUGE_PAGE_PAGES, PAGE_SHIFT, PAGE_SIZE

Table = NDArray[np.uint64]
"""shape ``(n, 8)``"""
Runs = Sequence[tuple[int, int]]
"""address and bytes of each run of pages, ascending"""

_HUGE_BYTES: Final = HUGE_PAGE_PAGES * PAGE_SIZE
_NO_FILE: Final = np.uint64(2**64 - 1)
_BOTH: Final = syscalls.PROT_READ | syscalls.PROT_WRITE
_ADVICE_GAP_BYTES: Final = 64 * PAGE_SIZE
"""Vmas that are nearer than this get their flags back in one call. It looks at every mapping in between, of which
there may be ten thousand in a guest: over a gap like this one that costs less than another call."""

FLAGS: Final = ("dd", "dc", "mg", "hg", "nh", "nr")
"""the VmFlags of proc(5) that QEMU may have set on guest RAM, and that a new mapping would lose; bit i of
``Original.flags`` is FLAGS[i]. All but the last are set by madvise; ``nr`` is MAP_NORESERVE."""
_ADVICE: Final = {
    "dd": syscalls.MADV_DONTDUMP,
    "dc": syscalls.MADV_DONTFORK,
    # KSM must not touch a page that we protect: a merge drops the protection (docs/nominations.md).
    "mg": syscalls.MADV_UNMERGEABLE,
    "hg": syscalls.MADV_HUGEPAGE,
    "nh": syscalls.MADV_NOHUGEPAGE,
}
"""flag -> what a mapping gets for it as long as memshr is at work"""
_FRAME_FLAGS: Final = ("dd", "dc", "mg")
_MPOL_DEFAULT: Final = 0


def bits_of(flags: frozenset[str]) -> int:
    """VmFlags as ``Original.flags``."""
    return sum(1 << at for at, flag in enumerate(FLAGS) if flag in flags)


def mapping_frames(hvas: NDArray[np.int64], frames: NDArray[np.int64], number: int) -> tuple[Table, NDArray[np.int64]]:
    """Map frames over pages that hold the same bytes.

    :param hvas: the address of each page, ascending; ``frames``: its frame in the pool; both of shape ``(n,)``.
    :param number: the pool as a descriptor in QEMU.
    :returns: the table, a row for each run; how many pages are done after each row.
    """
    edges = edges_at(jumps(hvas, PAGE_SIZE) | jumps(frames), len(hvas))
    starts, ends = edges[:-1], edges[1:]
    table = np.zeros((len(starts), 8), dtype=np.uint64)
    table[:, 0] = syscalls.NR_MMAP | IF_EQUAL
    table[:, 1] = table[:, 7] = hvas[starts]
    table[:, 2] = (ends - starts) * PAGE_SIZE
    table[:, 3] = _BOTH
    table[:, 4] = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE
    table[:, 5] = number
    table[:, 6] = frames[starts] * PAGE_SIZE
    return table, ends


def emptying(
    hvas: NDArray[np.int64], anonymous: NDArray[np.bool_], kept: Sequence[Kept], ranges: NDArray[np.int64]
) -> tuple[Table, NDArray[np.int64]]:
    """Give the memory of pages back: they read as zeros afterwards.

    :param anonymous: which pages lie in anonymous memory, where the page can just be dropped; the others get a new
        anonymous mapping.
    :param kept: what each RAM range has; ``ranges``: the RAM range of each page, shape ``(n,)``.
    :returns: as mapping_frames.
    """
    edges = edges_at(jumps(hvas, PAGE_SIZE) | np.diff(anonymous) | jumps(ranges, 0), len(hvas))
    starts, ends = edges[:-1], edges[1:]
    drop = anonymous[starts]
    table = np.zeros((len(starts), 8), dtype=np.uint64)
    table[:, 0] = np.where(drop, syscalls.NR_MADVISE, syscalls.NR_MMAP)
    table[:, 1] = hvas[starts]
    table[:, 2] = (ends - starts) * PAGE_SIZE
    table[:, 3] = np.where(drop, syscalls.MADV_DONTNEED, _BOTH)
    reserving = np.array([each.reserving for each in kept], dtype=np.uint64)[ranges[starts]]
    table[~drop, 4] = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED | reserving[~drop]
    table[~drop, 5] = _NO_FILE
    table[~drop, 7] = hvas[starts[~drop]]
    return table, ends


def beside(table: Table, side: int, pid: int) -> tuple[Table, NDArray[np.int64]]:
    """The same with every mmap made beside and moved into place, for kernels on which one that fails leaves a hole.

    :param side: an address in QEMU where nothing is; ``pid``: what QEMU's getpid gives.
    :returns: the table; how many of its calls are done after each row of the original.
    """
    numbers = table[:, 0] & np.uint64(0xFFFF)
    maps = numbers == syscalls.NR_MMAP
    checked = (table[:, 0] & np.uint64(IF_EQUAL)) != 0
    counts = 1 + maps.astype(np.int64) + checked
    ends = np.cumsum(counts)
    calls = np.repeat(table, counts, axis=0)
    # Compared at its place first; the call that this allows is one that does nothing.
    look = (ends - counts)[checked]
    calls[look, 0] = syscalls.NR_GETPID | IF_EQUAL
    calls[look, 7] = pid
    made, moved = ends[maps] - 2, ends[maps] - 1
    calls[made, 0] = syscalls.NR_MMAP
    calls[made, 1] = calls[made, 7] = side
    calls[made, 4] ^= np.uint64(syscalls.MAP_FIXED | syscalls.MAP_FIXED_NOREPLACE)
    place, length = table[maps, 1], table[maps, 2]
    calls[moved] = 0
    calls[moved, 0] = syscalls.NR_MREMAP
    calls[moved, 1] = side
    calls[moved, 2] = calls[moved, 3] = length
    calls[moved, 4] = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED
    calls[moved, 5] = calls[moved, 7] = place
    return calls, ends


@dataclass(frozen=True, slots=True)
class Kept:
    """What each mapping of a RAM range is to have, as QEMU had set it.

    :param flags: bits as in ``Original.flags``.
    :param policy: the mode of its NUMA policy with its mode flags; 0 is the default.
    :param nodes_address: where in QEMU the bits of the policy's nodes are.
    """

    flags: int
    policy: int = _MPOL_DEFAULT
    nodes_address: int = 0

    @property
    def reserving(self) -> int:
        """The flag of mmap by which anonymous memory is asked for: whether it counts as promised (overcommit)."""
        return syscalls.MAP_NORESERVE if self.flags >> FLAGS.index("nr") & 1 else 0

    def rows(self, start: int, length_bytes: int, names: Sequence[str] = FLAGS) -> list[list[int]]:
        """The calls that give it to a piece of memory; only those flags that ``names`` has."""
        rows = [
            [syscalls.NR_MADVISE, start, length_bytes, _ADVICE[flag], 0, 0, 0, 0]
            for at, flag in enumerate(FLAGS)
            if flag in names and flag in _ADVICE and self.flags >> at & 1
        ]
        if self.policy != _MPOL_DEFAULT:
            nodes = [self.nodes_address, NODE_MASK_BITS + 1]
            rows.append([syscalls.NR_MBIND, start, length_bytes, self.policy, *nodes, 0, 0])
        return rows


NODE_MASK_BITS: Final = 8 * NODE_MASK_BYTES


def restoring(table: Table, kept: Sequence[Kept], ranges: NDArray[np.int64], most: int) -> list[list[int]]:
    """The calls that give new mappings what QEMU had set on the old ones.

    :param table: calls whose second and third words are where the new mappings are, ascending.
    :param kept: what each RAM range has.
    :param ranges: the RAM range of each call, shape ``(n,)``.
    :param most: how many calls there may be; then those between far mappings go over all that lies between, too.
    """
    maps = (table[:, 0] & np.uint64(0xFFFF)) == syscalls.NR_MMAP
    table, ranges = table[maps], ranges[maps]
    if not len(table):
        return []
    frames = (table[:, 4] & np.uint64(syscalls.MAP_ANONYMOUS)) == 0
    names = _FRAME_FLAGS if frames.all() else FLAGS
    starts = table[:, 1].astype(np.int64)
    ends = starts + table[:, 2].astype(np.int64)
    gaps = starts[1:] - ends[:-1]
    gap_bytes = _ADVICE_GAP_BYTES
    while True:
        edges = edges_at(jumps(ranges, 0) | (gaps > gap_bytes), len(starts)).tolist()
        rows = [
            row
            for first, end in pairwise(edges)
            for row in kept[int(ranges[first])].rows(int(starts[first]), int(ends[end - 1] - starts[first]), names)
        ]
        if len(rows) <= most:
            return rows
        gap_bytes *= 2


@dataclass(frozen=True, slots=True)
class Moves:
    """A table that gives pages memory of their own: copied beside, then moved into place.

    ``before_moves`` of its calls come before the first move; then there is one for each run.
    ``pieces`` are what the copying call copies: address beside, address in place, bytes; shape ``(n, 3)``.
    """

    table: Table
    before_moves: int
    pieces: NDArray[np.int64]


def copying(
    hvas: NDArray[np.int64],
    filled: NDArray[np.bool_],
    runs: Runs,
    kept: Sequence[Kept],
    *,
    side: int,
    pid: int,
    addresses: tuple[int, int],
) -> Moves:
    """Copy pages beside, then move each run into place.

    :param hvas: the address of each page, ascending, shape ``(n,)``.
    :param filled: which of them have contents; the others become pages that were never touched.
    :param runs: their runs; ``kept``: what the RAM range of each run has.
    :param side: an address in QEMU where nothing is; ``pid``: what QEMU's getpid gives.
    :param addresses: where in QEMU the pieces are for its process_vm_readv: those to copy to, those to copy from.
    """
    places: list[int] = []
    at = side
    for start, length in runs:
        if length >= _HUGE_BYTES:  # keep the place within 2 MiB, so that it can be a huge page
            at += (start - at) % _HUGE_BYTES
        places.append(at)
        at += length
    length = at - side
    all_huge = all(size >= _HUGE_BYTES for _, size in runs)
    flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED_NOREPLACE | kept[0].reserving
    table = [[syscalls.NR_MMAP, side, length, _BOTH, flags, 2**64 - 1, 0, side]]
    # Small pieces must not become huge pages while they are built: most of one would be thrown away again.
    before = FLAGS if all_huge else _FRAME_FLAGS
    for (_, size), place, each in zip(runs, places, kept, strict=True):
        table += each.rows(place, size, before)
    table = _joined(table)
    shifts = np.repeat(
        np.array(places, dtype=np.int64) - np.array([start for start, _ in runs], dtype=np.int64),
        [size >> PAGE_SHIFT for _, size in runs],
    )
    pieces = _pieces(hvas[filled], shifts[filled])
    if len(pieces):
        local, remote = addresses
        copied = int(pieces[:, 2].sum())
        table.append([syscalls.NR_PROCESS_VM_READV, pid, local, len(pieces), remote, len(pieces), 0, copied])
    if not all_huge:
        late: list[list[int]] = []
        for (_, size), place, each in zip(runs, places, kept, strict=True):
            late += Kept(each.flags).rows(place, size, ("hg", "nh"))
        table += _joined(late)
    before_moves = len(table)
    moving = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED
    table += [
        [syscalls.NR_MREMAP, place, size, size, moving, start, 0, start]
        for (start, size), place in zip(runs, places, strict=True)
    ]
    table.append([syscalls.NR_MUNMAP, side, length, 0, 0, 0, 0, 0])
    return Moves(np.array(table, dtype=np.uint64), before_moves, pieces)


def _pieces(hvas: NDArray[np.int64], shifts: NDArray[np.int64]) -> NDArray[np.int64]:
    # Runs of pages that are copied to a run.
    edges = edges_at(jumps(hvas, PAGE_SIZE) | jumps(shifts, 0), len(hvas))
    starts = edges[:-1]
    return np.stack([hvas[starts] + shifts[starts], hvas[starts], np.diff(edges) * PAGE_SIZE], axis=1)


def _joined(rows: list[list[int]]) -> list[list[int]]:
    # Calls that do the same to pieces next to each other, as one.
    joined: list[list[int]] = []
    last: dict[tuple[int, ...], list[int]] = {}
    for row in rows:
        key = (row[0], *row[3:])
        same = last.get(key)
        if same is not None and same[1] + same[2] == row[1]:
            same[2] += row[2]
        else:
            joined.append(row)
            last[key] = row
    return joined
