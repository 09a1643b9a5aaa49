"""Fingerprints: what they promise for every seed, and how rarely they collide where they may."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshr.content.fingerprint import SEED_BITS, SEGMENTS, WORDS, Fingerprinter, universal_fingerprints
from memshr.types import PAGE_SIZE, PageBytes

seeds = st.integers(0, 2**SEED_BITS - 1)
words_of_a_page = st.integers(0, WORDS - 1)
lines = st.integers(1, 2**64 - 1)


def random_pages(count: int, seed: int = 1) -> PageBytes:
    bytes_ = np.random.Generator(np.random.PCG64(seed)).bytes(count * PAGE_SIZE)
    return np.frombuffer(bytes_, np.uint8).reshape(count, PAGE_SIZE).copy()


def by_the_rule(page: PageBytes, fingerprints: Fingerprinter) -> int:
    """The rule of the module's docstring, in Python's own integers, for one page."""
    modulus = 2**64
    total = 0
    words = [int.from_bytes(page.tobytes()[i : i + 8], "little") for i in range(0, PAGE_SIZE, 8)]
    run = WORDS // SEGMENTS
    for s in range(SEGMENTS):
        keys = [int(key) for key in fingerprints._word_keys[s]]
        x = sum(word * key for word, key in zip(words[s * run : (s + 1) * run], keys, strict=True)) % modulus
        total += (x ^ (x >> 32)) * int(fingerprints._segment_keys[s])
    total %= modulus
    return total ^ (total >> 32)


@given(seeds)
def test_fingerprints_follow_the_rule_that_the_docstring_gives(seed: int) -> None:
    pages = random_pages(3)
    with Fingerprinter(seed, threads=1) as fingerprints:
        assert fingerprints(pages).tolist() == [by_the_rule(page, fingerprints) for page in pages]


def test_every_key_is_odd_and_depends_on_the_seed() -> None:
    first, second = Fingerprinter(1, threads=1), Fingerprinter(2, threads=1)
    for fingerprints in (first, second):
        assert (fingerprints._word_keys % np.uint64(2) == 1).all()
        assert (fingerprints._segment_keys % np.uint64(2) == 1).all()
    assert (first._word_keys != second._word_keys).all()
    page = random_pages(1)
    assert first(page) != second(page)
    assert first(page) == Fingerprinter(1, threads=1)(page)


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("count", [0, 1, 2, 1023, 1024, 1025, 5000])
def test_a_fingerprint_does_not_depend_on_the_company_of_the_page(count: int, threads: int) -> None:
    pages = random_pages(count)
    pages[::3] = 0
    with Fingerprinter(7, threads=threads) as fingerprints, Fingerprinter(7, threads=1) as alone:
        found = fingerprints(pages)
        assert found.shape == (count,)
        for i in {0, 1, 2, count // 2, count - 1} & set(range(count)):
            assert found[i] == alone(pages[i : i + 1])[0]


@pytest.mark.parametrize("offset", [0, 1, 4, 7])
def test_pages_at_any_address_and_distance_have_the_same_fingerprints(offset: int) -> None:
    pages = random_pages(1500)
    room = np.zeros(1500 * PAGE_SIZE + 16, np.uint8)
    start = -room.ctypes.data % 8 + offset
    moved = room[start : start + pages.size].reshape(pages.shape)
    moved[:] = pages
    apart = np.zeros((1500, 2 * PAGE_SIZE), np.uint8)
    apart[:, :PAGE_SIZE] = pages
    with Fingerprinter(3, threads=2) as fingerprints:
        expected = fingerprints(pages)
        assert (fingerprints(moved) == expected).all()
        assert (fingerprints(apart[:, :PAGE_SIZE]) == expected).all()
        moved.flags.writeable = False
        assert (fingerprints(moved) == expected).all()


@given(seeds, words_of_a_page, lines, st.binary(min_size=8, max_size=8))
def test_a_difference_within_one_word_never_collides(seed: int, word: int, delta: int, filling: bytes) -> None:
    pages = np.frombuffer(filling * (2 * WORDS), np.uint64).reshape(2, WORDS).copy()
    pages[1, word] ^= np.uint64(delta)
    with Fingerprinter(seed, threads=1) as fingerprints:
        first, second = fingerprints(pages.view(np.uint8))
    assert first != second


@given(seeds, st.lists(st.tuples(words_of_a_page, st.integers(0, 63)), min_size=0, max_size=4))
def test_zero_is_the_fingerprint_of_the_zero_page_only(seed: int, bits: list[tuple[int, int]]) -> None:
    pages = np.zeros((5, WORDS), np.uint64)
    for word, bit in bits:
        pages[3, word] |= np.uint64(1) << np.uint64(bit)
    with Fingerprinter(seed, threads=1) as fingerprints:
        assert (fingerprints(pages.view(np.uint8)) == 0).tolist() == [True, True, True, not bits, True]


@pytest.mark.parametrize("zeros", [10, 1500], ids=["few zero pages", "most are zero pages"])
def test_a_page_that_hashes_to_zero_but_is_not_zero_is_seen(zeros: int) -> None:
    pages = np.zeros((2000, WORDS), np.uint64)
    pages[zeros:] = np.arange(1, WORDS + 1, dtype=np.uint64)
    top = np.uint64(1) << np.uint64(63)
    pages[5, [10, 11]] = top  # two odd keys times 2**63 add up to 0
    with Fingerprinter(11, threads=1) as fingerprints:
        assert by_the_rule(pages[5].view(np.uint8), fingerprints) == 0
        found = fingerprints(pages.view(np.uint8))
    assert found[5] == 1
    assert (np.flatnonzero(found == 0) == np.delete(np.arange(zeros), 5)).all()


def flip_top_bits_of_neighbours(words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> None:
    words[:, [20, 21]] ^= np.uint64(1) << np.uint64(63)


def swap_halves(words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> None:
    words[:] = np.concatenate([words[:, WORDS // 2 :], words[:, : WORDS // 2]], axis=1)


def move_one_word(words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> None:
    words[:, 7:500] = np.roll(words[:, 7:500], 1, axis=1)


def add_the_same_to_two_words(words: np.ndarray[tuple[int, ...], np.dtype[np.uint64]]) -> None:
    words[:, [3, 300]] += np.uint64(1 << 20)


DIFFERENCES = [flip_top_bits_of_neighbours, swap_halves, move_one_word, add_the_same_to_two_words]


@pytest.mark.parametrize("change", DIFFERENCES, ids=lambda change: change.__name__)
def test_differences_that_are_told_apart(
    change: Callable[[np.ndarray[tuple[int, ...], np.dtype[np.uint64]]], None],
) -> None:
    before = random_pages(2000)
    after = before.copy()
    change(after.view(np.uint64))
    for seed in range(3):
        assert not (universal_fingerprints(before, seed) == universal_fingerprints(after, seed)).any()
        with Fingerprinter(seed) as fingerprints:
            collide = fingerprints(before) == fingerprints(after)
        # The one weak side, as the docstring says: top bits of two words in one segment cancel.
        assert collide.all() if change is flip_top_bits_of_neighbours else not collide.any()


def test_pages_of_equal_steps_have_fingerprints_of_their_own() -> None:
    starts = np.arange(0, 3000, dtype=np.uint64)
    pages = starts[:, None] + np.arange(WORDS, dtype=np.uint64) * np.uint64(8)
    with Fingerprinter(5) as fingerprints:
        assert len(np.unique(fingerprints(pages.view(np.uint8)))) == 3000
    assert len(np.unique(universal_fingerprints(pages.view(np.uint8), 5))) == 3000
