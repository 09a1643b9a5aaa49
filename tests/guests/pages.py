"""Counting equal pages by a path of its own: no memshr code, and no fast hash whose word must be taken."""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

PAGE_SIZE = 4096
READ_PAGES = 2048
"""pages that are read at a time"""

PAGEMAP_PRESENT = np.uint64(1 << 63)
PAGEMAP_SWAPPED = np.uint64(1 << 62)
PAGEMAP_PFN = np.uint64((1 << 55) - 1)
KPAGEFLAGS_ZERO_PAGE = np.uint64(1 << 24)

Pages = NDArray[np.uint8]
"""shape (n, PAGE_SIZE)"""


@dataclass(frozen=True, slots=True)
class Census:
    """How many pages could be given back if every set of equal pages were kept once.

    ``zero_pages`` all of them; ``intra_pages`` copies inside single domains; ``inter_pages`` what is saved on top of
    that when equal pages of different domains are put together. Non-zero pages only in the last two.
    """

    total_pages: int
    zero_pages: int
    intra_pages: int
    inter_pages: int

    @property
    def saved_pages(self) -> int:
        """All of it."""
        return self.zero_pages + self.intra_pages + self.inter_pages


def count_pages(domains: Sequence[Iterable[Pages]]) -> Census:
    """Count the equal pages of some domains, each given as one or more pieces.

    Pages count as equal when their BLAKE2b digests of 20 bytes are equal. Cost: about 5 us a page.
    """
    zero_page = bytes(PAGE_SIZE)
    kinds: list[Counter[bytes]] = []
    zero = 0
    for pieces in domains:
        found: Counter[bytes] = Counter()
        for pages in pieces:
            for page in pages:
                content = page.tobytes()
                if content == zero_page:
                    zero += 1
                else:
                    found[hashlib.blake2b(content, digest_size=20).digest()] += 1
        kinds.append(found)
    nonzero = sum(found.total() for found in kinds)
    distinct_inside = sum(len(found) for found in kinds)
    return Census(
        total_pages=zero + nonzero,
        zero_pages=zero,
        intra_pages=nonzero - distinct_inside,
        inter_pages=distinct_inside - len(set().union(*kinds)),
    )


def mergeable_ranges(pid: int) -> list[tuple[int, int]]:
    """First and last address (exclusive) of each mapping that a process has marked MADV_MERGEABLE.

    That is guest RAM, unless QEMU was told ``mem-merge=off``, and it is what KSM may look at.
    """
    ranges: list[tuple[int, int]] = []
    first = last = 0
    for line in Path(f"/proc/{pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if not word.endswith(":"):
            first, last = (int(address, 16) for address in word.split("-"))
        elif word == "VmFlags:" and "mg" in rest.split():
            ranges.append((first, last))
    return ranges


def used_frames(memory: Mapping[int, Sequence[tuple[int, int]]]) -> int:
    """How many frames of the host some pieces of memory have, each frame counted once however many pages are on it.

    Frames of the kernel's zero page do not count; swapped pages count one each. Needs root. Cost: about 0.1 us a page.

    :param memory: for each pid its ranges of addresses, as ``mergeable_ranges`` gives them.
    """
    frames: list[NDArray[np.uint64]] = []
    swapped = 0
    for pid, ranges in memory.items():
        for entries in _pagemap(pid, ranges):
            frames.append(entries[(entries & PAGEMAP_PRESENT) != 0] & PAGEMAP_PFN)
            swapped += int(np.count_nonzero(entries & PAGEMAP_SWAPPED))
    present = np.unique(np.concatenate(frames))
    return len(present) - int(np.count_nonzero(_are_zero_page(present))) + swapped


def backed_pages(pid: int) -> Iterator[Pages]:
    """The mergeable pages of a process that the host spends memory on, in pieces. Needs root.

    A page that was never touched, or was only read, has nothing or the kernel's one zero page behind it; such a page is
    not read here either, for a read would put a zero page there.
    """
    ranges = mergeable_ranges(pid)
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for (first, _), entries in zip(ranges, _pagemap(pid, ranges), strict=True):
            backed = (entries & (PAGEMAP_PRESENT | PAGEMAP_SWAPPED)) != 0
            present = (entries & PAGEMAP_PRESENT) != 0
            frames, place = np.unique(entries[present] & PAGEMAP_PFN, return_inverse=True)
            backed[present] = ~_are_zero_page(frames)[place]
            edges = np.flatnonzero(np.diff(backed.astype(np.int8), prepend=0, append=0))
            for begin, end in edges.reshape(-1, 2).tolist():
                for piece in range(begin, end, READ_PAGES):
                    memory.seek(first + piece * PAGE_SIZE)
                    content = memory.read(min(READ_PAGES, end - piece) * PAGE_SIZE)
                    yield np.frombuffer(content, np.uint8).reshape(-1, PAGE_SIZE)


def _pagemap(pid: int, ranges: Iterable[tuple[int, int]]) -> Iterator[NDArray[np.uint64]]:
    # The pagemap entries of each range.
    with Path(f"/proc/{pid}/pagemap").open("rb", buffering=0) as pagemap:
        for first, last in ranges:
            pagemap.seek(first // PAGE_SIZE * 8)
            yield np.frombuffer(pagemap.read((last - first) // PAGE_SIZE * 8), np.uint64)


def _are_zero_page(frames: NDArray[np.uint64]) -> NDArray[np.bool_]:
    # Which of these frames, ascending, are (part of) a zero page of the kernel; runs of them, as each is a system call.
    flags = np.zeros(len(frames), np.uint64)
    runs = np.split(np.arange(len(frames)), np.flatnonzero(np.diff(frames) != 1) + 1)
    with Path("/proc/kpageflags").open("rb", buffering=0) as kpageflags:
        for run in runs if len(frames) else ():
            kpageflags.seek(int(frames[run[0]]) * 8)
            flags[run] = np.frombuffer(kpageflags.read(len(run) * 8), np.uint64)
    zero: NDArray[np.bool_] = (flags & KPAGEFLAGS_ZERO_PAGE) != 0
    return zero
