"""Counting equal pages by a path of its own: no memshr code, and no fast hash whose word must be taken."""

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

PAGE_SIZE = 4096

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


def count_pages(domains: Sequence[Pages]) -> Census:
    """Count the equal pages of some domains.

    Pages count as equal when their BLAKE2b digests of 20 bytes are equal. Cost: about 5 us a page.
    """
    total = sum(len(pages) for pages in domains)
    zero_page = bytes(PAGE_SIZE)
    kinds: list[Counter[bytes]] = []
    zero = 0
    for pages in domains:
        found: Counter[bytes] = Counter()
        for page in pages:
            content = page.tobytes()
            if content == zero_page:
                zero += 1
            else:
                found[hashlib.blake2b(content, digest_size=20).digest()] += 1
        kinds.append(found)
    distinct_inside = sum(len(found) for found in kinds)
    return Census(
        total_pages=total,
        zero_pages=zero,
        intra_pages=total - zero - distinct_inside,
        inter_pages=distinct_inside - len(set().union(*kinds)),
    )
