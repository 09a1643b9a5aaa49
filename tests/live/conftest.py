"""Fixtures for tests on real guests.

A test that lacks a part of this machine is skipped, and says what is missing and how to get it. MEMSHR_REQUIRE names
the parts (``qemu``, ``kvm``, ``hugepages``; separated by commas) that must be there: then it fails instead.
"""

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path

import pytest

from guests.freestanding import FreestandingGuest
from guests.kit import LinuxKit, find_kvm, find_qemu, linux_kit
from guests.linux import LinuxGuest, drive_arguments
from guests.machine import Machine
from guests.peculiar import PECULIARITIES
from guests.qtest import QtestGuest
from live.parts import needed_parts

PAIR_CHECKER_PAGES = 16384
PAIR_FILES = 48
DRIVE_PROGRAMS = ("checker", "reader1", "reader2")

HERE = Path(__file__).parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Everything in this folder is live."""
    for item in items:
        if HERE in item.path.parents:
            item.add_marker(pytest.mark.live)


@pytest.fixture(scope="session")
def kit() -> LinuxKit:
    """The parts of Linux guests."""
    with needed_parts():
        return linux_kit()


@pytest.fixture(scope="session")
def qemu() -> Path:
    """The QEMU of this machine."""
    with needed_parts():
        return find_qemu()


@pytest.fixture(scope="session")
def kvm() -> None:
    """KVM works on this machine."""
    with needed_parts():
        find_kvm()


@contextmanager
def awake(guests: Sequence[LinuxGuest], programs: Sequence[str]) -> Iterator[None]:
    """Let guests of the session run for one test, and see that they went on without a mismatch; then they rest again.

    A guest that no test uses is paused, because all of them together would keep a small machine busy.
    """
    try:
        for guest in guests:
            guest.resume()
        yield
        for guest in guests:
            guest.wait_rounds(1, programs)
        for guest in guests:
            assert guest.mismatches() == []
    finally:
        for guest in guests:
            guest.pause()


@pytest.fixture(scope="session")
def booted_pair(kit: LinuxKit) -> Iterator[tuple[LinuxGuest, LinuxGuest]]:
    """The guests of ``guest_pair``, booted side by side once in the session."""
    other_user = "nobody" if os.geteuid() == 0 else None
    with ExitStack() as ending:
        alpha = ending.enter_context(LinuxGuest("alpha", kit).boot())
        beta = ending.enter_context(LinuxGuest("beta", kit, user=other_user).boot())
        for seed, guest in enumerate((alpha, beta), start=1):
            guest.wait_ready()
            guest.start_files(PAIR_FILES)
            guest.start_checker(PAIR_CHECKER_PAGES, seed=seed)
        for guest in (alpha, beta):
            guest.wait_rounds(1, ("files", "checker"))
            guest.pause()
        yield alpha, beta


@pytest.fixture
def guest_pair(booted_pair: tuple[LinuxGuest, LinuxGuest]) -> Iterator[tuple[LinuxGuest, LinuxGuest]]:
    """Two running Linux guests, ``alpha`` and ``beta``, whose memory is full of equal pages.

    Each rewrites and checks its memory all the time; after the test both must go on doing so, with no mismatch. A test
    that shares their pages unshares them. QEMU of beta is another user's (if we are root): with libvirt it always is.
    """
    with awake(booted_pair, ("files", "checker")):
        yield booted_pair


@pytest.fixture(scope="session")
def booted_drive_pair(kit: LinuxKit) -> Iterator[dict[str, LinuxGuest]]:
    """The guests of ``drive_pair``, booted side by side once in the session."""
    with needed_parts(), ExitStack() as ending:
        pair = {
            aio: ending.enter_context(LinuxGuest(f"aio-{aio}", kit).boot(drive_arguments(aio)))
            for aio in ("native", "io_uring")
        }
        for seed, guest in enumerate(pair.values(), start=1):
            guest.wait_ready()
            guest.start_checker(PAIR_CHECKER_PAGES // 4, seed=seed)
            for reader in (1, 2):
                guest.start_reader(seed=reader)
        for guest in pair.values():
            guest.wait_rounds(1, DRIVE_PROGRAMS)
            guest.pause()
        yield pair


@pytest.fixture
def drive_pair(booted_drive_pair: dict[str, LinuxGuest]) -> Iterator[dict[str, LinuxGuest]]:
    """Two Linux guests, ``native`` and ``io_uring`` by what their drive uses, that read it hard into their memory.

    The drive is ``cache=none``: the host writes into guest RAM past the page tables. After the test both must go on
    reading and checking, with no mismatch.
    """
    with awake(list(booted_drive_pair.values()), DRIVE_PROGRAMS):
        yield booted_drive_pair


@pytest.fixture
def boot(kit: LinuxKit) -> Iterator[Callable[..., LinuxGuest]]:
    """Boots one more Linux guest for this test, ``boot(name, arguments, memory_mib=..., user=...)``; wait_ready it."""
    with ExitStack() as ending:

        def boot_one(
            name: str, arguments: tuple[str, ...] = (), *, memory_mib: int = 256, user: str | None = None
        ) -> LinuxGuest:
            guest = ending.enter_context(LinuxGuest(name, kit, memory_mib=memory_mib, user=user))
            return guest.boot(arguments)

        yield boot_one


@pytest.fixture
def qtest_pair(qemu: Path) -> Iterator[tuple[QtestGuest, QtestGuest]]:
    """Two QEMUs of 64 MiB whose memory the test reads and writes as the guest would; they start in no time."""
    with QtestGuest("left", qemu) as left, QtestGuest("right", qemu) as right:
        yield left.boot(), right.boot()


@pytest.fixture(scope="session")
def booted_kvm_pair(kvm: None, qemu: Path) -> Iterator[tuple[FreestandingGuest, FreestandingGuest]]:
    """The guests of ``kvm_pair``, booted side by side once in the session."""
    with needed_parts(), FreestandingGuest("kvm-1", qemu) as one, FreestandingGuest("kvm-2", qemu) as two:
        for seed, guest in enumerate((one, two), start=1):
            guest.boot(accelerator="kvm", seed=seed)
        for guest in (one, two):
            guest.wait_rounds(1)
            guest.pause()
        yield one, two


@pytest.fixture
def kvm_pair(
    booted_kvm_pair: tuple[FreestandingGuest, FreestandingGuest],
) -> Iterator[tuple[FreestandingGuest, FreestandingGuest]]:
    """Two guests under KVM that check and rewrite memory full of equal pages.

    After the test both must go on doing so, with no mismatch.
    """
    for guest in booted_kvm_pair:
        guest.resume()
    yield booted_kvm_pair
    for guest in booted_kvm_pair:
        guest.wait_rounds(1)
    for guest in booted_kvm_pair:
        guest.pause()
        assert guest.mismatches() == 0


@pytest.fixture
def start_peculiar(qemu: Path) -> Iterator[Callable[[str], Machine]]:
    """Starts the special guest of this name (guests.peculiar) for this test."""
    with ExitStack() as ending:

        def start(kind: str) -> Machine:
            with needed_parts():
                return ending.enter_context(PECULIARITIES[kind].started(kind))

        yield start
