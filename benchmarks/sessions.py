"""What a whole sharing session costs on the embedded hypervisor, beside reading the memory once."""

from __future__ import annotations

import mmap
import time
import tracemalloc
from collections import Counter

import numpy as np

from measure import GIB_PAGES, SIZES_GIB, best_times_s, print_table
from memshr.embedded import EmbeddedHypervisor
from memshr.sharing.session import SharingProgress, share
from memshr.trust import trust_groups
from memshr.types import PAGE_SIZE, Extent, Gfn, PageBytes

ROUNDS = 4


def cost() -> None:
    """Two domains with half of their contents in common, in another order; a quarter of each is zero pages."""
    rows = []
    for gib in SIZES_GIB:
        images = _two_images(int(gib * GIB_PAGES) // 2)
        sum_s = float("inf")
        phases: dict[str, float] = {}
        for _ in range(ROUNDS):
            sum_s = min(sum_s, *best_times_s(lambda images=images: _read(images), rounds=1))  # type: ignore[misc]  # a default that binds the value
            for phase, seconds in _session(images).items():
                phases[phase] = min(seconds, phases.get(phase, seconds))
        whole_s = sum(phases.values())
        tracemalloc.start()
        _session(images)
        _, peak_bytes = tracemalloc.get_traced_memory()
        tracemalloc.stop()
        pages = sum(len(image) for image in images)
        rows.append(
            [
                f"{gib:g} GiB",
                f"{whole_s / gib:.2f}",
                f"{whole_s / sum_s:.1f}",
                f"{phases['scan'] / sum_s:.1f}",
                f"{pages / 4 / phases['zero pages']:,.0f}",
                f"{pages / 2 / phases['share']:,.0f}",
                f"{peak_bytes / pages:.1f}",
            ]
        )
    head = ["memory", "s/GiB", "whole / sum", "scan / sum", "zero pages/s", "shared pages/s", "peak bytes/page"]
    print_table(
        "session: time beside numpy.sum over the same memory, on one thread; the host's books included", head, rows
    )


def _read(images: list[PageBytes]) -> None:
    for image in images:
        image.view(np.uint64).sum()


def _session(images: list[PageBytes]) -> Counter[str]:
    # Seconds that each phase of a session took; "end" is counting and audit.
    host = EmbeddedHypervisor()
    for image in images:
        host.create_domain("domain", extents=[Extent(Gfn(0), image)])
    seconds: Counter[str] = Counter()
    last = time.perf_counter()

    def note(progress: SharingProgress | None) -> None:
        nonlocal last
        now = time.perf_counter()
        seconds[progress.phase if progress else "end"] += now - last  # type: ignore[assignment]  # floats, which Counter adds as well
        last = now

    share(host, trust_groups(host.names(), ["all"], lambda: 1), wait=time.sleep, progress=note)
    note(None)
    return seconds


def _two_images(pages: int) -> list[PageBytes]:
    random = np.random.Generator(np.random.PCG64(3))
    images = []
    for _ in range(2):
        image = np.frombuffer(mmap.mmap(-1, pages * PAGE_SIZE), np.uint8).reshape(pages, PAGE_SIZE)
        filled = pages * 3 // 4
        for first in range(0, filled, 4096):
            part = image[first : min(first + 4096, filled)]
            part[:] = np.frombuffer(random.bytes(part.size), np.uint8).reshape(part.shape)
        images.append(image)
    images[1][random.permutation(pages // 2)] = images[0][: pages // 2]
    return images
