"""The independent counts that memshr and KSM are measured by: they find exactly what was put into guest RAM."""

import os
import random

import pytest

from guests.kit import MissingPartError
from guests.machine import Machine
from guests.pages import PAGE_SIZE, Census, backed_pages, count_pages, mergeable_ranges, used_frames
from guests.qtest import QtestGuest
from live.parts import needed_parts

FIRST_GPA = 0x1000000


@pytest.fixture(autouse=True)
def root() -> None:
    """The kernel tells frame numbers to root only."""
    with needed_parts():
        if os.geteuid() != 0:
            raise MissingPartError("frames are counted through /proc/PID/pagemap; run the tests as root")


def census(*guests: Machine) -> Census:
    """What may be shared among these guests."""
    return count_pages([backed_pages(guest.pid) for guest in guests])


def test_counts_find_what_was_written(qtest_pair: tuple[QtestGuest, QtestGuest]) -> None:
    left, right = qtest_pair
    for guest in qtest_pair:
        # Back these pages beforehand: a first write may back a whole huge page.
        guest.fill(FIRST_GPA, 512 * PAGE_SIZE, 0)
    before = census(left, right)
    noise = random.Random(2)
    equal, other, unique = (noise.randbytes(PAGE_SIZE) for _ in range(3))
    left.write(FIRST_GPA, equal * 3 + other)
    right.write(FIRST_GPA, equal * 2 + unique)
    after = census(left, right)
    assert after.total_pages == before.total_pages
    assert after.zero_pages == before.zero_pages - 7
    assert after.intra_pages == before.intra_pages + 2 + 1
    assert after.inter_pages == before.inter_pages + 1
    assert after.saved_pages == before.saved_pages - 7 + 4


def test_memory_that_was_only_read_is_not_backed(qtest_pair: tuple[QtestGuest, QtestGuest]) -> None:
    guest = qtest_pair[0]
    before = census(guest)
    guest.read(FIRST_GPA, 64 * PAGE_SIZE)
    assert census(guest) == before


def test_frames_are_those_of_the_backed_pages(qtest_pair: tuple[QtestGuest, QtestGuest]) -> None:
    for guest in qtest_pair:
        guest.fill(FIRST_GPA, 100 * PAGE_SIZE, 1)
    frames = used_frames({guest.pid: mergeable_ranges(guest.pid) for guest in qtest_pair})
    assert frames == census(*qtest_pair).total_pages
