"""Everything in the kernel that may change a page table entry of guest RAM, and what becomes of a nomination.

The table of docs/nominations.md, row by row. A nomination is a write protection by userfaultfd, so each test protects
memory of its own, lets one actor work on it, and asks two things: does the pagemap still call the page protected (bit
57), and does a write still give an event? Both must always say the same, or else nobody could tell a nomination that
was undone.
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from guests.ksm import SETTINGS, ksm_at_work
from guests.machine import wait_until
from live.parts import needed_parts
from memshr.qemu import syscalls
from memshr.qemu.pagemap import mapping_flags, on_frame
from own_memory import (
    DEADLINE_S,
    FRAME,
    HUGE,
    KHUGEPAGED,
    MADV_COLLAPSE,
    MADV_FREE,
    MADV_PAGEOUT,
    MADV_POPULATE_WRITE,
    MADV_UNMERGEABLE,
    PAGE,
    PR_SET_MEMORY_MERGE,
    OwnMemory,
    WriteProtection,
    khugepaged_at_work,
    libc,
    some_swap,
    succeed,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="userfaultfd and the switches of KSM are for root")

HUGE_PAGES = HUGE // PAGE
NR_MOVE_PAGES = 279
MPOL_MF_MOVE = 2
COMPACTED_PAGES = 16384
SAMPLES = 8
PAGEOUT_TRIES = 100

MakeMemory = Callable[..., OwnMemory]
"""``make(pages, frames=False, huge=False, registered=True)``"""


@pytest.fixture
def protection() -> Iterator[WriteProtection]:
    """A userfaultfd."""
    with closing(WriteProtection()) as made:
        yield made


@pytest.fixture
def make(protection: WriteProtection) -> Iterator[MakeMemory]:
    """Makes memory that can be protected: anonymous, or ``frames`` of a memory file as a shared guest has them."""
    with ExitStack() as stack:

        def make_memory(pages: int, *, frames: bool = False, huge: bool = False, registered: bool = True) -> OwnMemory:
            file = os.memfd_create("frames") if frames else None
            if file is not None:
                stack.callback(os.close, file)
                os.truncate(file, pages * PAGE)
                for page in range(pages):
                    os.pwrite(file, bytes([page % 251 + 1]) * PAGE, page * PAGE)
            memory = stack.enter_context(closing(OwnMemory(pages, file=file, huge=huge)))
            if registered:
                protection.register(memory)
            return memory

        yield make_memory


def each_told(protection: WriteProtection, memory: OwnMemory, pages: range | None = None) -> list[bool]:
    """Write to pages, all if not told otherwise; for which of them userfaultfd told.

    Those must be the pages that the pagemap called protected.
    """
    pages = range(memory.pages) if pages is None else pages
    protected = memory.protected()
    told = [protection.tells_of_write(memory, page) for page in pages]
    assert told == [protected[page] for page in pages]
    return told


# -- KSM ---------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("zeros", [False, True])
def test_ksm_drops_the_protection_of_what_it_merges(make: MakeMemory, protection: WriteProtection, zeros: bool) -> None:
    memory = make(64)
    memory.write(0, 0 if zeros else 7, pages=64)
    protection.protect(memory)
    assert all(memory.protected())
    merged = memory.are_zero if zeros else memory.merged_by_ksm
    with needed_parts(), ksm_at_work(zero_pages=zeros):
        memory.advise(syscalls.MADV_MERGEABLE)
        wait_until(lambda: sum(merged()) == 64, DEADLINE_S, "KSM merges 64 equal pages")
    # The first page of a group may become KSM's frame itself, where it is: that one stays protected.
    assert each_told(protection, memory).count(False) >= 62


def test_ksm_that_was_off_is_no_protection(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(64)
    memory.write(0, 7, pages=64)
    with needed_parts(), ksm_at_work(run=False) as switch:
        memory.advise(syscalls.MADV_MERGEABLE)
        protection.protect(memory)
        assert all(memory.protected())
        switch.write_text("1")  # as ksmtuned does when memory gets short
        wait_until(lambda: all(memory.merged_by_ksm()), DEADLINE_S, "KSM merges 64 equal pages")
    assert each_told(protection, memory).count(False) >= 62


def test_ksm_keeps_away_from_what_is_not_mergeable(make: MakeMemory, protection: WriteProtection) -> None:
    others, memory = make(64), make(64)
    for each in (others, memory):
        each.write(0, 7, pages=64)
        each.advise(syscalls.MADV_MERGEABLE)
    memory.advise(MADV_UNMERGEABLE)
    protection.protect(memory)
    with needed_parts(), ksm_at_work():
        wait_until(lambda: all(others.merged_by_ksm()), DEADLINE_S, "KSM merges equal pages beside")
        scans = int((SETTINGS / "full_scans").read_text())
        wait_until(
            lambda: int((SETTINGS / "full_scans").read_text()) >= scans + 2, DEADLINE_S, "KSM looks at all twice"
        )
    assert not any(memory.merged_by_ksm())
    assert all(each_told(protection, memory))


@contextmanager
def merged_by_ksm(make: MakeMemory) -> Iterator[OwnMemory]:
    """64 equal pages that KSM has merged; it does nothing more."""
    memory = make(64)
    memory.write(0, 7, pages=64)
    with needed_parts(), ksm_at_work() as switch:
        memory.advise(syscalls.MADV_MERGEABLE)
        wait_until(lambda: all(memory.merged_by_ksm()), DEADLINE_S, "KSM merges 64 equal pages")
        switch.write_text("0")
        yield memory


def test_page_that_ksm_merged_before_is_protected(make: MakeMemory, protection: WriteProtection) -> None:
    with merged_by_ksm(make) as memory:
        protection.protect(memory)
        assert all(memory.protected())
        assert all(memory.merged_by_ksm())
        assert all(each_told(protection, memory, range(32)))
        assert {memory.read(page) for page in range(32, 64)} == {b"\7" * PAGE}
        assert all(memory.protected(32))


def test_unmerging_protected_pages(make: MakeMemory, protection: WriteProtection) -> None:
    with merged_by_ksm(make) as memory:
        protection.protect(memory)
        # Older kernels unmerge by a write, which waits as any does and then is told of.
        waited = protection.events_of(lambda: memory.advise(MADV_UNMERGEABLE))
        assert not any(memory.merged_by_ksm())
        assert memory.protected() == [memory.at(page) not in waited for page in range(64)]
        each_told(protection, memory)


def test_process_that_is_mergeable_by_default(make: MakeMemory) -> None:
    memory = make(8, registered=False)
    if libc.prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
        pytest.skip("needs Linux 6.4 with KSM: PR_SET_MEMORY_MERGE")
    try:
        assert "mg" in mapping_flags(os.getpid(), memory.address)
        memory.advise(MADV_UNMERGEABLE)
        assert "mg" not in mapping_flags(os.getpid(), memory.address)
        memory.map()
        assert "mg" in mapping_flags(os.getpid(), memory.address)  # each new mapping has to be taken out again
    finally:
        assert libc.prctl(PR_SET_MEMORY_MERGE, 0, 0, 0, 0) == 0


# -- reclaim -----------------------------------------------------------------------------------------------------------


def swapped_out(memory: OwnMemory, pages: int) -> bool:
    """Have the first pages swapped out; whether they are. Pages that were just written may have to be asked again."""
    for _ in range(PAGEOUT_TRIES):
        memory.advise(MADV_PAGEOUT)
        if (memory.entries(0, pages) >> np.uint64(62) == 1).all():
            return True
    return False


@pytest.mark.parametrize("frames", [False, True])
def test_swapped_out_and_in(make: MakeMemory, protection: WriteProtection, tmp_path: Path, frames: bool) -> None:
    with some_swap(tmp_path):
        memory = make(32, frames=frames)
        memory.number(range(16))
        for page in range(16, 32):
            memory.read(page)  # of frames: still the frame
        contents = [memory.read(page) for page in range(32)]
        protection.protect(memory, 0, 24)
        expected = [page < 24 for page in range(32)]
        if not swapped_out(memory, 16):
            pytest.skip("the kernel swapped nothing out")
        assert memory.protected() == expected
        assert [memory.read(page) for page in range(32)] == contents
        assert memory.protected() == expected
        memory.advise(MADV_PAGEOUT)
        assert each_told(protection, memory) == expected


def test_swapped_in_by_swapoff(make: MakeMemory, protection: WriteProtection, tmp_path: Path) -> None:
    memory = make(16)
    memory.number(range(16))
    protection.protect(memory, 0, 8)
    with some_swap(tmp_path):  # which ends with swapoff, unless the machine has swap of its own
        if not swapped_out(memory, 16):
            pytest.skip("the kernel swapped nothing out")
    assert each_told(protection, memory) == [page < 8 for page in range(16)]


def test_frames_that_are_swapped_out(make: MakeMemory, protection: WriteProtection, tmp_path: Path) -> None:
    with some_swap(tmp_path):
        memory = make(16, frames=True)
        for page in range(16):
            memory.read(page)
        protection.protect(memory)
        memory.advise(MADV_PAGEOUT)  # leaves markers: where a frame is is the file's business
        assert all(memory.protected())
        assert on_frame(memory.entries()).all()
        assert [memory.read(page)[0] for page in range(16)] == list(range(1, 17))
        assert all(each_told(protection, memory))


@pytest.mark.parametrize("frames", [False, True])
def test_cold(make: MakeMemory, protection: WriteProtection, frames: bool) -> None:
    memory = make(16, frames=frames)
    memory.number(range(8))
    protection.protect(memory, 4, 8)
    memory.advise(syscalls.MADV_COLD)
    expected = [4 <= page < (12 if protection.unpopulated or frames else 8) for page in range(16)]
    assert each_told(protection, memory) == expected


def test_cold_splits_a_protected_huge_page(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(HUGE_PAGES, huge=True)
    memory.write(0, 7)
    if not all(memory.are_huge()):
        pytest.skip("the kernel gave no huge page")
    protection.protect(memory)
    memory.advise(syscalls.MADV_COLD, 3, 1)
    assert not any(memory.are_huge())
    assert all(memory.protected())
    assert all(each_told(protection, memory, range(SAMPLES)))


def test_free(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(16)
    memory.number(range(16))
    protection.protect(memory)
    memory.advise(MADV_FREE)
    assert all(each_told(protection, memory, range(8)))

    def taken() -> bool:
        memory.advise(MADV_FREE, 8)
        memory.advise(MADV_PAGEOUT, 8)
        return not memory.entries(8).any()

    # Pages that were just written are not yet on the kernel's lists (of some other processor, perhaps).
    wait_until(taken, DEADLINE_S, "the kernel takes pages that are free to be taken, as when memory is short")
    assert memory.read(12) == bytes(PAGE)
    assert not any(memory.protected(8))
    assert not any(each_told(protection, memory, range(8, 16)))


# -- huge pages --------------------------------------------------------------------------------------------------------


def small_pages(make: MakeMemory, protection: WriteProtection, blocks: int, absent: int | None = None) -> OwnMemory:
    """Memory of small pages that may become huge ones."""
    memory = make(blocks * HUGE_PAGES)
    for page in range(memory.pages):
        if page != absent:
            memory.write(page, page % 251 + 1)
    memory.advise(syscalls.MADV_HUGEPAGE)
    assert not any(memory.are_huge())
    return memory


def test_collapse(make: MakeMemory, protection: WriteProtection) -> None:
    memory = small_pages(make, protection, 2)
    protection.protect(memory, 5, 1)
    with pytest.raises(OSError, match="madvise"):
        memory.advise(MADV_COLLAPSE, 0, HUGE_PAGES)
    try:
        memory.advise(MADV_COLLAPSE, HUGE_PAGES, HUGE_PAGES)
    except OSError as error:
        pytest.skip(f"needs Linux 6.1, and memory for a huge page: {error}")
    assert memory.are_huge() == [page >= HUGE_PAGES for page in range(memory.pages)]
    assert each_told(protection, memory, range(SAMPLES)) == [page == 5 for page in range(SAMPLES)]


def test_collapse_where_an_absent_page_is_protected(make: MakeMemory, protection: WriteProtection) -> None:
    if not protection.unpopulated:
        pytest.skip("needs Linux 6.4: absent pages can be protected")
    memory = small_pages(make, protection, 1, absent=5)
    protection.protect(memory, 5, 1)
    with pytest.raises(OSError, match="madvise"):
        memory.advise(MADV_COLLAPSE)
    assert each_told(protection, memory, range(SAMPLES)) == [page == 5 for page in range(SAMPLES)]


def test_frames_that_are_collapsed(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(HUGE_PAGES, frames=True)
    for page in range(HUGE_PAGES):
        memory.read(page)
    memory.write(9, 9)
    protection.protect(memory)
    # Somebody has the file mapped elsewhere, as the pool's maker has: a huge page of it changes all its readers.
    shared = syscalls.MAP_SHARED | syscalls.MAP_FIXED
    beside = make(HUGE_PAGES, registered=False)
    with file_behind(memory) as file:
        succeed("mmap", libc.mmap(beside.address, beside.bytes, syscalls.PROT_READ, shared, file, 0))
    beside.read(0)
    before = memory.entries(0, 1)[0]
    try:
        beside.advise(MADV_COLLAPSE)
    except OSError as error:
        pytest.skip(f"the kernel does not collapse memory files: {error}")
    assert memory.read(0) == b"\1" * PAGE
    assert memory.entries(0, 1)[0] != before  # it lies elsewhere now
    assert all(memory.protected())
    assert on_frame(memory.entries()).tolist() == [page != 9 for page in range(HUGE_PAGES)]
    assert all(each_told(protection, memory, range(4, 4 + SAMPLES)))


def test_khugepaged(make: MakeMemory, protection: WriteProtection) -> None:
    memory = small_pages(make, protection, 3, absent=HUGE_PAGES + 5)
    protection.protect(memory, 5, 1)
    protection.protect(memory, HUGE_PAGES + 5, 1)
    with khugepaged_at_work():
        last = memory.entries
        wait_until(
            lambda: bool(memory.pagemap.huge(last(2 * HUGE_PAGES)).all()), DEADLINE_S, "khugepaged makes a huge page"
        )
        scans = int((KHUGEPAGED / "full_scans").read_text())
        wait_until(lambda: int((KHUGEPAGED / "full_scans").read_text()) >= scans + 2, DEADLINE_S, "it looks again")
    block = np.arange(memory.pages) // HUGE_PAGES
    huge = np.array(memory.are_huge())
    assert not huge[block == 0].any()
    assert bool(huge[block == 1].any()) is not protection.unpopulated
    assert each_told(protection, memory, range(SAMPLES)) == [page == 5 for page in range(SAMPLES)]
    assert protection.tells_of_write(memory, HUGE_PAGES + 5) is protection.unpopulated


# -- moving ------------------------------------------------------------------------------------------------------------


def test_compaction(make: MakeMemory, protection: WriteProtection) -> None:
    compact = Path("/proc/sys/vm/compact_memory")
    if not os.access(compact, os.W_OK):
        pytest.skip("needs a kernel with compaction")
    memory = make(COMPACTED_PAGES)
    memory.write(0, 7, pages=COMPACTED_PAGES)
    protection.protect(memory)
    before = memory.entries() & np.uint64(FRAME)
    compact.write_text("1")
    (moved,) = np.nonzero((memory.entries() & np.uint64(FRAME)) != before)
    assert all(memory.protected())
    if not len(moved):
        pytest.skip("compaction had no reason to move one of 16,384 pages")
    for page in moved[:SAMPLES].tolist():
        assert memory.read(page) == b"\7" * PAGE
        assert protection.tells_of_write(memory, page)


def test_move_pages(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(16)
    memory.number(range(16))
    protection.protect(memory)
    before = memory.entries() & np.uint64(FRAME)
    nodes = [int(path.name.removeprefix("node")) for path in Path("/sys/devices/system/node").glob("node[0-9]*")]
    for node in sorted(nodes):  # with a single node nothing moves
        at = (ctypes.c_void_p * 16)(*(memory.at(page) for page in range(16)))
        wanted, status = (ctypes.c_int * 16)(*[node] * 16), (ctypes.c_int * 16)()
        # SAFETY: arrays of 16 each, which live until the call returns; pid 0 is this process.
        result = libc.syscall(NR_MOVE_PAGES, 0, ctypes.c_ulong(16), at, wanted, status, MPOL_MF_MOVE)
        assert result >= 0
        assert all(memory.protected())
    moved = (memory.entries() & np.uint64(FRAME)) != before
    assert bool(moved.any()) is (len(nodes) > 1)
    assert all(each_told(protection, memory))


# -- what QEMU does ----------------------------------------------------------------------------------------------------


def test_discard_of_anonymous_memory(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(16)
    memory.number(range(8))
    protection.protect(memory)
    memory.advise(syscalls.MADV_DONTNEED)
    assert not any(memory.protected())
    assert memory.read(3) == bytes(PAGE)
    assert not any(each_told(protection, memory))


def test_discard_of_a_mapping_of_frames(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(16, frames=True)
    memory.read(0)
    for page in range(4, 8):
        memory.write(page, 0xAA)
    protection.protect(memory, 0, 12)
    memory.advise(syscalls.MADV_DONTNEED)
    # The protection outlives it, as a marker, but the contents do not: a copy has become the frame again, untold.
    assert memory.protected() == [page < 12 for page in range(16)]
    assert [memory.read(page)[0] for page in range(16)] == list(range(1, 17))
    assert each_told(protection, memory) == [page < 12 for page in range(16)]


def test_frames_that_are_given_back(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(16, frames=True)
    for page in range(8):
        memory.read(page)
    memory.write(3, 0xAA)
    protection.protect(memory)
    # As memshr gives a frame back to the host, which it does when nobody reads it.
    with file_behind(memory) as file:
        syscalls.punch_hole(file, 0, memory.bytes)
    assert all(memory.protected())
    assert [memory.read(page)[0] for page in range(16)] == [0xAA if page == 3 else 0 for page in range(16)]
    assert all(each_told(protection, memory))


@contextmanager
def file_behind(memory: OwnMemory) -> Iterator[int]:
    """The file that is mapped there, open for reading and writing."""
    path = Path("/proc/self/map_files", f"{memory.address:x}-{memory.address + memory.bytes:x}")
    with path.open("r+b", buffering=0) as file:
        yield file.fileno()


def test_fork(make: MakeMemory, protection: WriteProtection) -> None:
    memory, kept = make(8), make(8)
    for each in (memory, kept):
        each.number(range(8))
        protection.protect(each)
    kept.advise(syscalls.MADV_DONTFORK)  # as QEMU has it for guest RAM
    contents = memory.read(0)
    reading, writing = os.pipe()
    child = os.fork()
    if not child:
        try:
            signal.alarm(int(DEADLINE_S))
            memory.write(0, 0xAA)  # nobody is told, or else it would wait here
            with closing(type(memory.pagemap)(os.getpid())) as reader:
                entry = int(reader.entries(np.array([memory.at(1)]))[0])
            absent = f"{kept.address:x}-" not in Path("/proc/self/maps").read_text()
            os.write(writing, b"%d %d" % (entry >> 57 & 1, absent))
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as answer:
        assert answer.read() == "0 1"  # not protected in the child; and what is marked is not there
    assert os.waitpid(child, 0)[1] == 0
    assert memory.read(0) == contents
    assert all(each_told(protection, memory))
    assert all(each_told(protection, kept))


def test_unplugged_and_plugged_again(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(8)
    memory.number(range(8))
    protection.protect(memory)
    succeed("munmap", libc.munmap(memory.address, memory.bytes))
    memory.map()
    memory.number(range(8))
    assert not any(memory.protected())
    assert not any(each_told(protection, memory))
    with pytest.raises(FileNotFoundError):  # ENOENT: it is another mapping, which is not registered
        protection.protect(memory)


def test_moved_by_mremap(make: MakeMemory, protection: WriteProtection) -> None:
    memory, target = make(8), make(8, registered=False)
    memory.number(range(8))
    contents = [memory.read(page) for page in range(8)]
    protection.protect(memory)
    flags = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED
    moved = libc.mremap(memory.address, memory.bytes, memory.bytes, flags, target.address)
    assert succeed("mremap", moved) == target.address
    assert [target.read(page) for page in range(8)] == contents
    # The mapping is not registered any more. Before Linux 6.13 the entries went on calling themselves protected.
    for page in range(8):
        assert protection.events_of(lambda page=page: target.write(page, 1)) == []  # type: ignore[misc]  # of this page
    assert not any(target.protected())


def test_mprotect(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(8)
    memory.number(range(8))
    protection.protect(memory, 0, 4)
    for allowed in (syscalls.PROT_READ, 0, syscalls.PROT_READ | syscalls.PROT_WRITE):
        succeed("mprotect", libc.mprotect(memory.address, memory.bytes, allowed))
        assert memory.protected() == [True] * 4 + [False] * 4
    assert each_told(protection, memory) == [True] * 4 + [False] * 4


def test_mlock_of_protected_pages_waits_like_a_write(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(8)
    memory.number(range(8))
    protection.protect(memory, 2, 3)
    told = protection.events_of(lambda: succeed("mlock", libc.mlock(memory.address, memory.bytes)))
    assert told == [memory.at(page) for page in (2, 3, 4)]
    assert not any(memory.protected())


def test_locked_pages_are_protected(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(8)
    memory.number(range(8))
    succeed("mlock", libc.mlock(memory.address, memory.bytes))
    protection.protect(memory)
    assert all(each_told(protection, memory))


def test_populating_for_writing_waits_like_a_write(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(8)
    memory.number(range(8))
    protection.protect(memory, 2, 3)
    assert protection.events_of(lambda: memory.advise(MADV_POPULATE_WRITE)) == [memory.at(page) for page in (2, 3, 4)]
    assert not any(memory.protected())


# -- from outside ------------------------------------------------------------------------------------------------------


def test_write_from_outside_waits_like_a_write(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(8)
    memory.number(range(8))
    protection.protect(memory)
    new = ctypes.create_string_buffer(b"\xaa" * PAGE, PAGE)
    local, remote = ((ctypes.c_size_t * 2)(at, PAGE) for at in (ctypes.addressof(new), memory.at(3)))
    # SAFETY: one struct iovec each, of a buffer and of memory that both outlive the call.
    told = protection.events_of(lambda: libc.process_vm_writev(os.getpid(), local, 1, remote, 1, 0))
    assert told == [memory.at(3)]
    assert memory.read(3) == b"\xaa" * PAGE
    assert memory.protected() == [page != 3 for page in range(8)]


def test_write_by_a_debugger_fails(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(8)
    memory.number(range(8))
    contents = memory.read(3)
    protection.protect(memory)
    with Path("/proc/self/mem").open("r+b", buffering=0) as outside, pytest.raises(OSError, match="Input/output"):
        os.pwrite(outside.fileno(), b"\xaa" * PAGE, memory.at(3))
    assert memory.read(3) == contents
    assert all(each_told(protection, memory))


@pytest.mark.parametrize("what", ["1", "4"])
def test_clearing_of_references_and_of_soft_dirty_bits(
    make: MakeMemory, protection: WriteProtection, what: str
) -> None:
    memory = make(8)
    memory.number(range(8))
    protection.protect(memory, 0, 4)
    try:
        Path("/proc/self/clear_refs").write_text(what)
    except OSError as error:
        pytest.skip(f"needs a kernel that tracks this: {error}")
    assert each_told(protection, memory) == [True] * 4 + [False] * 4


def test_another_userfaultfd_is_refused(make: MakeMemory, protection: WriteProtection) -> None:
    memory = make(8)
    memory.number(range(8))
    protection.protect(memory)
    # QEMU's background snapshots and postcopy migration want one of their own.
    with closing(WriteProtection()) as other, pytest.raises(OSError, match="busy"):
        other.register(memory)
    assert all(each_told(protection, memory))


def test_end_of_memshr(make: MakeMemory) -> None:
    memory = make(8, registered=False)
    memory.number(range(8))
    with closing(WriteProtection()) as given_up:
        given_up.register(memory)
        given_up.protect(memory)
        assert all(memory.protected())
    assert not any(memory.protected())
    memory.write(0, 1, pages=8)
