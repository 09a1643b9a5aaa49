"""Memory of the test's own process by address, write-protected by a real userfaultfd, and the kernel's own workers.

What guests' memory goes through, without guests: mappings are made, protected and written here, and whoever else
changes page table entries (KSM, reclaim, khugepaged) is switched on for a moment. What is switched is put back.
"""

from __future__ import annotations

import ctypes
import os
import select
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from io import FileIO
from pathlib import Path
from typing import Final

import numpy as np
import pytest
from numpy.typing import NDArray

from guests.ksm import kernel_settings
from memshr.qemu import syscalls
from memshr.qemu.pagemap import Entries, Pagemap, is_protected

PAGE: Final = 4096
HUGE: Final = 2 << 20
DEADLINE_S: Final = 60.0

# Documentation/admin-guide/mm/pagemap.rst
PRESENT: Final = 1 << 63
SWAPPED: Final = 1 << 62
FILE: Final = 1 << 61
EXCLUSIVE: Final = 1 << 56
FRAME: Final = (1 << 55) - 1
_KPF_KSM: Final = 1 << 21
_KPF_THP: Final = 1 << 22
_KPF_ZERO_PAGE: Final = 1 << 24

# asm-generic/mman-common.h, linux/mman.h, linux/prctl.h
MADV_FREE: Final = 8
MADV_UNMERGEABLE: Final = 13
MADV_PAGEOUT: Final = 21
MADV_POPULATE_WRITE: Final = 23
MADV_COLLAPSE: Final = 25
PR_SET_MEMORY_MERGE: Final = 67

KHUGEPAGED: Final = Path("/sys/kernel/mm/transparent_hugepage/khugepaged")

libc = ctypes.CDLL(None, use_errno=True)
# SAFETY: called with addresses of mappings that this module made and with lengths inside them.
libc.mmap.restype = libc.mremap.restype = ctypes.c_void_p
libc.mmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long]
libc.mremap.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int, ctypes.c_void_p]
libc.munmap.argtypes = libc.mlock.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
libc.madvise.argtypes = libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]

_READ_WRITE: Final = syscalls.PROT_READ | syscalls.PROT_WRITE
_SWAP_BYTES: Final = 32 << 20
_MESSAGE_BYTES: Final = 32
_ADDRESS: Final = slice(16, 24)
"""of struct uffd_msg, for a page fault (linux/userfaultfd.h)"""


def succeed(call: str, result: int | None) -> int:
    """The result of a system call. :raises OSError: it failed."""
    if result in (-1, ctypes.c_void_p(-1).value):
        number = ctypes.get_errno()
        raise OSError(number, f"{call}: {os.strerror(number)}")
    return int(result or 0)


class OwnMemory:
    """One mapping of this process, ``pages`` pages from ``address`` on, at the beginning of a 2 MiB piece.

    :param file: the file that is mapped, privately; None: anonymous memory.
    :param huge: whether huge pages are allowed there.
    """

    def __init__(self, pages: int, *, file: int | None = None, huge: bool = False) -> None:
        self.pages = pages
        self.bytes = pages * PAGE
        # What is around it may not be touched, so the kernel joins it with nothing.
        self._around_bytes = self.bytes + 2 * HUGE
        reserved = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_NORESERVE
        self._around = succeed("mmap", libc.mmap(None, self._around_bytes, 0, reserved, -1, 0))
        self.address = (self._around + HUGE) & ~(HUGE - 1)
        self.map(file=file, huge=huge)
        self.pagemap = Pagemap(os.getpid())

    def map(self, *, file: int | None = None, huge: bool = False) -> None:
        """Map anew what this is, over what is there."""
        kind = syscalls.MAP_ANONYMOUS if file is None else 0
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED | kind
        succeed("mmap", libc.mmap(self.address, self.bytes, _READ_WRITE, flags, -1 if file is None else file, 0))
        self.advise(syscalls.MADV_HUGEPAGE if huge else syscalls.MADV_NOHUGEPAGE)

    def advise(self, advice: int, first: int = 0, pages: int | None = None) -> None:
        """madvise(2) on some of it, on all if not told otherwise."""
        count = self.pages - first if pages is None else pages
        succeed("madvise", libc.madvise(self.at(first), count * PAGE, advice))

    def at(self, page: int) -> int:
        """The address of a page."""
        return self.address + page * PAGE

    def write(self, page: int, value: int, pages: int = 1) -> None:
        """Fill pages with one byte value."""
        ctypes.memset(self.at(page), value, pages * PAGE)

    def number(self, pages: NDArray[np.int64] | range, seed: int = 1) -> None:
        """Give each of these pages contents of its own."""
        for page in pages:
            ctypes.memmove(self.at(int(page)), np.random.default_rng([seed, int(page)]).bytes(PAGE), PAGE)

    def read(self, page: int) -> bytes:
        """Contents of one page."""
        return ctypes.string_at(self.at(page), PAGE)

    def entries(self, first: int = 0, pages: int | None = None) -> Entries:
        """The pagemap entries of some pages, of all if not told otherwise."""
        count = self.pages - first if pages is None else pages
        return self.pagemap.entries(self.at(first) + PAGE * np.arange(count, dtype=np.int64))

    def protected(self, first: int = 0, pages: int | None = None) -> list[bool]:
        """Which pages the kernel calls write-protected by userfaultfd."""
        return [bool(each) for each in is_protected(self.entries(first, pages))]

    def merged_by_ksm(self) -> list[bool]:
        """Which pages lie on a frame of KSM's (KPF_KSM in /proc/kpageflags), asked one by one."""
        with Path("/proc/kpageflags").open("rb", buffering=0) as flags:
            return [self._has_flag(flags, entry, _KPF_KSM) for entry in self.entries().tolist()]

    def are_zero(self) -> list[bool]:
        """Which pages are a zero page of the kernel (KPF_ZERO_PAGE), asked one by one."""
        with Path("/proc/kpageflags").open("rb", buffering=0) as flags:
            return [self._has_flag(flags, entry, _KPF_ZERO_PAGE) for entry in self.entries().tolist()]

    def are_huge(self) -> list[bool]:
        """Which pages are parts of a transparent huge page (KPF_THP), asked one by one."""
        with Path("/proc/kpageflags").open("rb", buffering=0) as flags:
            return [self._has_flag(flags, entry, _KPF_THP) for entry in self.entries().tolist()]

    @staticmethod
    def _has_flag(flags: FileIO, entry: int, flag: int) -> bool:
        flags.seek((entry & FRAME) * 8)
        return bool(entry & PRESENT and int.from_bytes(flags.read(8), "little") & flag)

    def close(self) -> None:
        """Unmap it."""
        self.pagemap.close()
        succeed("munmap", libc.munmap(self._around, self._around_bytes))


class WriteProtection:
    """A userfaultfd on memory of this process."""

    def __init__(self) -> None:
        self.uffd = syscalls.open_userfaultfd()
        os.set_blocking(self.uffd, False)
        try:
            has = syscalls.userfaultfd_features()
            self.unpopulated = bool(has & syscalls.UFFD_FEATURE_WP_UNPOPULATED)
            wanted = syscalls.UFFD_FEATURE_PAGEFAULT_FLAG_WP | syscalls.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
            wanted |= has & syscalls.UFFD_FEATURE_WP_UNPOPULATED
            syscalls.userfaultfd_api(self.uffd, wanted)
        except BaseException:
            os.close(self.uffd)
            raise

    def register(self, memory: OwnMemory) -> None:
        """Make it memory that can be protected."""
        syscalls.userfaultfd_register(self.uffd, memory.address, memory.bytes)

    def protect(self, memory: OwnMemory, first: int = 0, pages: int | None = None) -> None:
        """Protect some pages, all if not told otherwise."""
        self._change(memory, first, pages, protect=True)

    def unprotect(self, memory: OwnMemory, first: int = 0, pages: int | None = None) -> None:
        """Take the protection of some pages away."""
        self._change(memory, first, pages, protect=False)

    def _change(self, memory: OwnMemory, first: int, pages: int | None, *, protect: bool) -> None:
        count = memory.pages - first if pages is None else pages
        syscalls.userfaultfd_write_protect(self.uffd, [(memory.at(first), count * PAGE)], protect)

    def events_of(self, action: Callable[[], object]) -> list[int]:
        """Carry out an action in another thread; the addresses of the pages at which it had to wait, in this order.

        Whenever it waits, the page is unprotected, so that it goes on.
        """
        failures: list[BaseException] = []
        waited: list[int] = []
        ended = os.eventfd(0, os.EFD_CLOEXEC | os.EFD_NONBLOCK)

        def act() -> None:
            try:
                action()
            except BaseException as error:  # handed to the test below, whatever it is
                failures.append(error)
            finally:
                os.eventfd_write(ended, 1)

        poll = select.poll()
        poll.register(ended, select.POLLIN)
        poll.register(self.uffd, select.POLLIN)
        thread = threading.Thread(target=act, daemon=True)
        thread.start()
        try:
            deadline = time.monotonic() + DEADLINE_S
            while thread.is_alive():
                ready = dict(poll.poll(1000))
                if ready.get(self.uffd, 0) & select.POLLIN:
                    message = os.read(self.uffd, _MESSAGE_BYTES)
                    assert message[0] == syscalls.UFFD_EVENT_PAGEFAULT
                    waited.append(int.from_bytes(message[_ADDRESS], "little") & ~(PAGE - 1))
                    syscalls.userfaultfd_write_protect(self.uffd, [(waited[-1], PAGE)], False)
                elif ended in ready:
                    thread.join()
                assert time.monotonic() < deadline, "the action neither ends nor waits for us"
        finally:
            os.close(ended)
        if failures:
            raise failures[0]
        return waited

    def tells_of_write(self, memory: OwnMemory, page: int, value: int = 0xEE) -> bool:
        """Write to a page; whether userfaultfd told of it first. Afterwards it is written and not protected."""
        told = self.events_of(lambda: memory.write(page, value))
        assert memory.read(page) == bytes([value]) * PAGE
        assert not memory.protected(page, 1)[0]
        assert told in ([], [memory.at(page)])
        return bool(told)

    def close(self) -> None:
        """Give it up: whatever it protects is protected no more."""
        os.close(self.uffd)


@contextmanager
def khugepaged_at_work() -> Iterator[None]:
    """khugepaged looks for huge pages all the time. Skips where it may not work on memory that asks for it."""
    enabled = KHUGEPAGED.parent / "enabled"
    if not os.access(KHUGEPAGED / "scan_sleep_millisecs", os.W_OK) or "[never]" in enabled.read_text():
        pytest.skip("needs transparent huge pages to be allowed, and root")
    fast = {"scan_sleep_millisecs": "10", "alloc_sleep_millisecs": "10", "pages_to_scan": "65536"}
    with kernel_settings({KHUGEPAGED / name: value for name, value in fast.items()}):
        yield


@contextmanager
def some_swap(directory: Path) -> Iterator[None]:
    """There is swap space: what is active, or a small file that is swap meanwhile. Skips where that cannot be."""
    with ExitStack() as undo:
        if len(Path("/proc/swaps").read_text().splitlines()) < 2:
            file = str(directory / "swap")
            Path(file).touch(mode=0o600)
            Path(file).write_bytes(bytes(_SWAP_BYTES))
            for command in ("mkswap", "swapon"):
                done = subprocess.run([command, file], capture_output=True, text=True, check=False)
                if done.returncode:
                    pytest.skip(f"needs swap space: {done.stderr.strip()}")
            undo.callback(lambda: subprocess.run(["swapoff", file], check=True))
        yield
