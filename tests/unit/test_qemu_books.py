"""What the books of a frame pool cost on a host on which memshr has been at work for years."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np

from memshr.qemu.books import PoolBooks
from memshr.qemu.pool import FramePool

LONG_GONE = 100_000_000
RECENT = 1000


def resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_frames_long_gone_cost_no_memory() -> None:
    file = os.memfd_create("pool")
    pool = FramePool("old", file)
    try:
        os.ftruncate(file, LONG_GONE * 4096)
        before = resident_bytes()
        books = PoolBooks(pool)
        books.handles[LONG_GONE - RECENT : LONG_GONE] = np.arange(2, RECENT + 2)
        books.sums[LONG_GONE - RECENT : LONG_GONE] = 7
        os.ftruncate(file, (LONG_GONE + 1) * 4096)
        books.grow()
        assert len(books.handles) > LONG_GONE
        assert books.handles[LONG_GONE - RECENT : LONG_GONE + 1].tolist() == [*range(2, RECENT + 2), 0]
        assert (books.sums[LONG_GONE - RECENT : LONG_GONE] == 7).all()
        assert resident_bytes() - before < 64 << 20
    finally:
        pool.close()
