"""How fast fingerprints are, and what they miss. Each function prints one table."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from measure import GIB_PAGES, SIZES_GIB, best_times_s, image_in_page_cache, print_table
from memshr.content.fingerprint import Fingerprinter, Fingerprints, universal_fingerprints
from memshr.types import PAGE_SIZE, PageBytes


def speed() -> None:
    """Fingerprinting an image in page cache, as a fraction of what numpy.sum reads with as many threads."""
    rows = []
    for gib in SIZES_GIB:
        count = int(gib * GIB_PAGES)
        with image_in_page_cache(count, spare_bytes=4) as image:
            pages = np.frombuffer(image, np.uint8, count * PAGE_SIZE).reshape(count, PAGE_SIZE)
            shifted = np.frombuffer(image, np.uint8, count * PAGE_SIZE, 4).reshape(count, PAGE_SIZE)
            for threads in (1, 2):
                name = f"{gib:g} GiB, {threads} thread{'s'[: threads - 1]}"
                rows.append([name, *_fingerprint_row(pages, shifted, threads)])
            del pages, shifted
    head = ["image", "numpy.sum GB/s", "fingerprint GB/s", "ratio", "unaligned, ratio", "zero pages, ratio"]
    print_table("fingerprint: against numpy.sum with as many threads", head, rows)


def _fingerprint_row(pages: PageBytes, shifted: PageBytes, threads: int) -> list[str]:
    words = pages.view(np.uint64)
    zeros = np.zeros((GIB_PAGES // 16, PAGE_SIZE), np.uint8)
    cuts = [slice(len(words) * i // threads, len(words) * (i + 1) // threads) for i in range(threads)]
    with ThreadPoolExecutor(threads) as pool, Fingerprinter(1, threads=threads) as fingerprints:
        sums, prints, unaligned, of_zeros = best_times_s(
            lambda: list(pool.map(lambda cut: words[cut].sum(), cuts)),
            lambda: fingerprints(pages),
            lambda: fingerprints(shifted),
            lambda: fingerprints(zeros),
        )
    size = pages.nbytes
    return [
        f"{size / sums / 1e9:.1f}",
        f"{size / prints / 1e9:.1f}",
        f"{sums / prints:.2f}",
        f"{sums / unaligned:.2f}",
        f"{sums / size / (of_zeros / zeros.nbytes):.2f}",
    ]


def collisions() -> None:
    """How many pairs of differing pages have one fingerprint, for kinds of difference that could be hard to see."""
    trials = 2**16
    random = np.random.Generator(np.random.PCG64(2))
    shape = (trials // 16, PAGE_SIZE)
    rows = []
    for name, (contents, change) in DIFFERENCES.items():
        counts = [0, 0]
        for seed in range(16):
            with Fingerprinter(seed) as fingerprints:
                base = contents(random, shape)
                other = base.copy()
                change(random, other)
                differ = (base != other).any(axis=1)
                hashes: list[Callable[[PageBytes], Fingerprints]] = [
                    fingerprints,
                    lambda pages, seed=seed: universal_fingerprints(pages, seed),  # type: ignore[misc]  # a default that binds the value
                ]
                for i, hash_pages in enumerate(hashes):
                    counts[i] += int((differ & (hash_pages(base) == hash_pages(other))).sum())
        rows.append([name, f"{trials:,}", f"{counts[0]:,}", f"{counts[0] / trials:.2%}", f"{counts[1]:,}"])
    head = ["the two pages differ in", "pairs", "collide", "rate", "collide when told apart"]
    print_table("collisions: equal fingerprints of pages that differ (each costs one compare)", head, rows)


def _random_bytes(random: np.random.Generator, shape: tuple[int, int]) -> PageBytes:
    return np.frombuffer(random.bytes(shape[0] * shape[1]), np.uint8).reshape(shape)


def _small_floats(random: np.random.Generator, shape: tuple[int, int]) -> PageBytes:
    """Small whole numbers as float64: words that are zero but for their high bits."""
    numbers = random.integers(1, 9, (shape[0], shape[1] // 8)).astype(np.float64)
    return numbers.view(np.uint8)


def _places(random: np.random.Generator, pages: PageBytes, places: int, limit: int) -> NDArray[np.intp]:
    """For each page ``places`` different numbers below ``limit``, shape ``(n, places)``."""
    return random.random((len(pages), limit)).argpartition(places, axis=1)[:, :places]


def _flip_bits(random: np.random.Generator, pages: PageBytes, places: int, low_bit: int, high_bit: int) -> None:
    """Flip one bit, of number ``low_bit`` to ``high_bit``, in each of ``places`` words of each page."""
    words = pages.view(np.uint64)
    where = _places(random, pages, places, words.shape[1])
    bits = np.uint64(1) << random.integers(low_bit, high_bit + 1, where.shape, dtype=np.uint64)
    rows = np.arange(len(pages))[:, None]
    words[rows, where] ^= bits


def _flip_neighbours(random: np.random.Generator, pages: PageBytes) -> None:
    words = pages.view(np.uint64)
    where = random.integers(0, words.shape[1] - 1, len(pages))
    for step in (0, 1):
        words[np.arange(len(pages)), where + step] ^= np.uint64(1) << np.uint64(63)


def _new_bytes(random: np.random.Generator, pages: PageBytes, first: int, count: int) -> None:
    pages[:, first : first + count] = np.frombuffer(random.bytes(len(pages) * count), np.uint8).reshape(-1, count)


def _two_bytes(random: np.random.Generator, pages: PageBytes) -> None:
    where = _places(random, pages, 2, PAGE_SIZE)
    pages[np.arange(len(pages))[:, None], where] ^= random.integers(1, 256, where.shape, dtype=np.uint8)


def _swap_words(random: np.random.Generator, pages: PageBytes) -> None:
    words = pages.view(np.uint64)
    where = _places(random, pages, 2, words.shape[1])
    rows = np.arange(len(pages))[:, None]
    words[rows, where] = words[rows, where[:, ::-1]]


def _add_everywhere(random: np.random.Generator, pages: PageBytes) -> None:
    words = pages.view(np.uint64)
    words += np.uint64(1)


Contents = Callable[[np.random.Generator, tuple[int, int]], PageBytes]
Change = Callable[[np.random.Generator, PageBytes], None]
DIFFERENCES: dict[str, tuple[Contents, Change]] = {
    "one bit": (_random_bytes, lambda random, pages: _flip_bits(random, pages, 1, 0, 63)),
    "the top bit of one word": (_random_bytes, lambda random, pages: _flip_bits(random, pages, 1, 63, 63)),
    "the last word": (_random_bytes, lambda random, pages: _new_bytes(random, pages, PAGE_SIZE - 8, 8)),
    "the last 4 bytes": (_random_bytes, lambda random, pages: _new_bytes(random, pages, PAGE_SIZE - 4, 4)),
    "the last byte": (_random_bytes, lambda random, pages: _new_bytes(random, pages, PAGE_SIZE - 1, 1)),
    "all bytes": (_random_bytes, lambda random, pages: _new_bytes(random, pages, 0, PAGE_SIZE)),
    "two bytes": (_random_bytes, _two_bytes),
    "1 added to every word": (_random_bytes, _add_everywhere),
    "two words, swapped": (_random_bytes, _swap_words),
    "two words, swapped, of small numbers as float64": (_small_floats, _swap_words),
    "one bit each of two words": (_random_bytes, lambda random, pages: _flip_bits(random, pages, 2, 0, 63)),
    "one of bits 48 to 63 of two words": (_random_bytes, lambda random, pages: _flip_bits(random, pages, 2, 48, 63)),
    "one of bits 56 to 63 of two words": (_random_bytes, lambda random, pages: _flip_bits(random, pages, 2, 56, 63)),
    "one of bits 56 to 63 of 16 words": (_random_bytes, lambda random, pages: _flip_bits(random, pages, 16, 56, 63)),
    "the top bits of 16 words": (_random_bytes, lambda random, pages: _flip_bits(random, pages, 16, 63, 63)),
    "the top bits of two words": (_random_bytes, lambda random, pages: _flip_bits(random, pages, 2, 63, 63)),
    "the top bits of two neighbouring words": (_random_bytes, _flip_neighbours),
}
"""name -> the first page's contents, and what makes the second page of the first"""
