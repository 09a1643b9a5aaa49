"""Measuring, for every benchmark: things that take turns, tables in plain text, images in the page cache."""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np

from memshr.types import PAGE_SIZE

GIB_PAGES = 2**30 // PAGE_SIZE
SIZES_GIB = (0.25, 1, 4)


def best_times_s(*things: Callable[[], object], rounds: int = 5) -> list[float]:
    """The shortest time of each thing over ``rounds`` rounds; in each round every thing has one turn."""
    times = [float("inf")] * len(things)
    for _ in range(rounds):
        for i, thing in enumerate(things):
            start = time.perf_counter()
            thing()
            times[i] = min(times[i], time.perf_counter() - start)
    return times


def print_table(title: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """A table in plain text: the first column to the left, the others to the right."""
    widths = [max(len(row[i]) for row in [head, *rows]) for i in range(len(head))]
    print(f"\n{title}")
    for row in [head, ["-" * width for width in widths], *rows]:
        cells = [cell.rjust(width) for cell, width in zip(row[1:], widths[1:], strict=True)]
        print("  ".join([row[0].ljust(widths[0]), *cells]).rstrip())


@contextmanager
def image_in_page_cache(pages: int, *, spare_bytes: int = 0) -> Iterator[mmap.mmap]:
    """A mapped file of ``pages`` random pages (and some bytes more) that is in the page cache and on no disk."""
    random = np.random.Generator(np.random.PCG64(1))
    size = pages * PAGE_SIZE + spare_bytes
    file = os.memfd_create("benchmark")
    try:
        for first in range(0, size, 2**24):
            os.write(file, random.bytes(min(2**24, size - first)))
        with mmap.mmap(file, size, prot=mmap.PROT_READ) as mapping:
            yield mapping
    finally:
        os.close(file)
