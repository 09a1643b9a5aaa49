"""Fingerprints of pages, in bulk: the cheap look that says which pages are worth nominating.

What makes this hard: the scan should cost what reading the memory costs, and Python may not touch single pages. A hash
that is called once for each page spends its time in the calls, and it holds the interpreter lock. numpy works on
thousands of pages in one call, at memory speed, on every core. So the fingerprint is arithmetic that numpy has an inner
loop for: one multiplication for each 64-bit word, and one pass over memory.

The rule, for the 512 words w of a page, in ``SEGMENTS`` runs of equal length, modulo 2**64:

1. each segment: the sum of w[j] * K[j], with random odd K (a multilinear hash);
2. each sum: x ^= x >> 32, so that its high bits count in the low half too;
3. fingerprint: the sum of x[s] * M[s], with random odd M, and once more x ^= x >> 32.

What it promises, for every seed:

* equal contents have equal fingerprints, wherever they lie and in whatever call;
* 0 is the fingerprint of the all-zero page and of no other (it is compared with zero, not only hashed);
* pages that differ within one 64-bit word have different fingerprints: an odd factor loses nothing, and neither do
  the other steps. (To the letter: a page that hashes to 0 without being zero is given 1, which is one value in 2**64.)

What it promises over the choice of the seed: pages that differ in a bit below bit b of some word collide with a
probability of at most 2**(b - 64) + 2**-32. That is next to nothing if the low half of any word differs, and it is the
weak side: pages that differ *only in the topmost bits of several words* collide often, and always if these are the
top bits of two words of one segment. ``python benchmarks/run.py collisions`` shows how often.

Still this is safe: contents are always compared, under valid handles, before anything is shared. So a collision costs
one nomination and one compare, and never a wrong share. Pages that collide are told apart by `universal_fingerprints`,
which costs eight times as much and has no weak side. To remove the weak side from the scan takes a second pass over all
memory, which was measured to halve its speed.

The seed belongs to a trust group and is secret: a guest that knew it could make pages that collide, and fingerprints
of two groups cannot be compared with each other.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import AbstractContextManager
from types import TracebackType

import numpy as np
from numpy.typing import NDArray

from memshr.types import PAGE_SIZE, PageBytes

Fingerprints = NDArray[np.uint64]

ZERO_PAGE_FINGERPRINT = np.uint64(0)
SEED_BITS = 128

FingerprintPages = Callable[[PageBytes], Fingerprints]
"""What gives the fingerprint of each page."""
Fingerprinting = Callable[[int], AbstractContextManager[FingerprintPages]]
"""What makes that of a seed, for as long as a ``with`` lasts."""

WORDS = PAGE_SIZE // 8
SEGMENTS = 4
"""More segments tell more pages apart that differ in high bits only, but their inner loops are shorter and slower."""

_CHUNK_PAGES = 1024
"""Pages of one numpy call: enough that calls cost little, few enough that a second look finds them in the cache."""
_HALF = np.uint64(32)


class Fingerprinter:
    """Computes the fingerprints of one trust group. A context manager: leaving it ends its threads.

    :param seed: SEED_BITS random bits; the same seed gives the same fingerprints, on every machine.
    :param threads: how many cores to use; the default is all that this process may run on.
    """

    def __init__(self, seed: int, *, threads: int | None = None) -> None:
        random = np.random.Generator(np.random.PCG64(seed))
        self._word_keys = _odd_keys(random, WORDS).reshape(SEGMENTS, -1)
        self._segment_keys = _odd_keys(random, SEGMENTS)
        self._threads = threads or len(os.sched_getaffinity(0))
        self._pool = ThreadPoolExecutor(self._threads, "fingerprint") if self._threads > 1 else None

    def __enter__(self) -> Fingerprinter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._pool:
            self._pool.shutdown()

    def __call__(self, pages: PageBytes) -> Fingerprints:
        """Fingerprints of ``pages``.

        :param pages: shape ``(n, PAGE_SIZE)``, uint8, each row contiguous; at any address, but pages that do not start
            at a multiple of 8 bytes (those of an ELF core may not) are copied first, which takes as long again.
        :returns: shape ``(n,)``; 0 exactly where the page is all zero.
        """
        count = len(pages)
        out = np.empty(count, dtype=np.uint64)
        share = -(-count // self._threads)
        share += -share % _CHUNK_PAGES
        parts = [slice(first, min(first + share, count)) for first in range(0, count, share or 1)]
        if self._pool is None or len(parts) < 2:
            for part in parts:
                self._fill(pages[part], out[part])
        else:
            for done in [self._pool.submit(self._fill, pages[part], out[part]) for part in parts]:
                done.result()
        return out

    def _fill(self, pages: PageBytes, out: Fingerprints) -> None:
        words = pages.view(np.uint64)
        aligned = None if words.flags.aligned else np.empty((_CHUNK_PAGES, WORDS), dtype=np.uint64)
        for first in range(0, len(words), _CHUNK_PAGES):
            chunk = words[first : first + _CHUNK_PAGES]
            if aligned is not None:
                np.copyto(aligned[: len(chunk)], chunk)
                chunk = aligned[: len(chunk)]
            self._fill_chunk(chunk, out[first : first + _CHUNK_PAGES])

    def _fill_chunk(self, words: NDArray[np.uint64], out: Fingerprints) -> None:
        sums = np.einsum("isj,sj->is", words.reshape(len(words), SEGMENTS, -1), self._word_keys)
        sums ^= sums >> _HALF
        np.einsum("is,s->i", sums, self._segment_keys, out=out)
        out ^= out >> _HALF
        (suspects,) = np.nonzero(out == ZERO_PAGE_FINGERPRINT)
        if len(suspects):
            # Zero pages come in long runs: looking at all rows in place is then cheaper than gathering some.
            everything = 2 * len(suspects) > len(words)
            tops = np.maximum.reduce(words if everything else words[suspects], axis=1)
            out[suspects] = (tops[suspects] if everything else tops) != 0


def universal_fingerprints(pages: PageBytes, seed: int) -> Fingerprints:
    """Fingerprints without a weak side, for the few pages that have collided.

    Each 32-bit lane times a random 64-bit key, summed modulo 2**64: two pages that differ in whatever way collide with
    a probability of at most 2**-33 over the seed. An all-zero page has 0, and others may.

    :param pages: shape ``(n, PAGE_SIZE)``, uint8, each row contiguous.
    :returns: shape ``(n,)``. Takes 8 KiB of memory a page.
    """
    keys = np.random.Generator(np.random.PCG64(seed)).integers(0, 2**64, PAGE_SIZE // 4, dtype=np.uint64)
    lanes = pages.view(np.uint32).astype(np.uint64)
    fingerprints: Fingerprints = np.einsum("ij,j->i", lanes, keys)
    return fingerprints


def _odd_keys(random: np.random.Generator, count: int) -> NDArray[np.uint64]:
    return random.integers(0, 2**63, count, dtype=np.uint64) * np.uint64(2) + np.uint64(1)
