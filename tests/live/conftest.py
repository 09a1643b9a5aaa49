"""Fixtures for tests on real guests.

A test that lacks a part of this machine is skipped, and says what is missing and how to get it. MEMSHR_REQUIRE names
the parts (``qemu``, ``kvm``; separated by commas) that must be there: then it fails instead.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import TypeVar

import pytest

from guests.kit import LinuxKit, MissingPartError, linux_kit
from guests.linux import LinuxGuest

PAIR_CHECKER_PAGES = 16384
PAIR_FILES = 48

HERE = Path(__file__).parent
T = TypeVar("T")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is live."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.live)


def find_part(part: str, find: Callable[[], T]) -> T:
    """What ``find`` finds; if it is missing, skip, or fail where MEMSHR_REQUIRE names ``part``."""
    try:
        return find()
    except MissingPartError as missing:
        if part in os.environ.get("MEMSHR_REQUIRE", "").split(","):
            pytest.fail(f"MEMSHR_REQUIRE={part}, but {missing}", pytrace=False)
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def kit() -> LinuxKit:
    """The parts of Linux guests."""
    return find_part("qemu", linux_kit)


@pytest.fixture(scope="session")
def booted_pair(kit: LinuxKit) -> Iterator[tuple[LinuxGuest, LinuxGuest]]:
    """Two guests for the whole session, booted side by side; tests take ``guest_pair``."""
    with ExitStack() as ending:
        pair = tuple(ending.enter_context(LinuxGuest(name, kit).boot()) for name in ("alpha", "beta"))
        for seed, guest in enumerate(pair, start=1):
            guest.wait_ready()
            guest.start_files(PAIR_FILES)
            guest.start_checker(PAIR_CHECKER_PAGES, seed=seed)
        for guest in pair:
            guest.wait_rounds(1, ("files", "checker"))
        alpha, beta = pair
        yield alpha, beta


@pytest.fixture
def guest_pair(booted_pair: tuple[LinuxGuest, LinuxGuest]) -> Iterator[tuple[LinuxGuest, LinuxGuest]]:
    """Two running Linux guests, ``alpha`` and ``beta``, whose memory is full of equal pages.

    Each rewrites and checks its memory all the time. After the test both must go on doing so, with no mismatch; a test
    that pauses one resumes it, and a test that shares their pages unshares them.
    """
    yield booted_pair
    for guest in booted_pair:
        guest.wait_rounds(1, ("files", "checker"))
        assert guest.mismatches() == []


@pytest.fixture
def boot(kit: LinuxKit) -> Iterator[Callable[..., LinuxGuest]]:
    """Boots one more Linux guest for this test: the arguments of LinuxGuest and of its ``boot``, by name."""
    with ExitStack() as ending:

        def boot_one(
            name: str, arguments: tuple[str, ...] = (), *, memory_mib: int = 256, user: str | None = None
        ) -> LinuxGuest:
            guest = ending.enter_context(LinuxGuest(name, kit, memory_mib=memory_mib, user=user))
            return guest.boot(arguments)

        yield boot_one
