"""What the kernel says about pages, held against memory of this process, of which the test knows what became of it."""

import errno
import os
import subprocess
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path

import numpy as np
import pytest

from child_process import child
from guests.ksm import ksm_at_work
from guests.machine import wait_until
from live.parts import needed_parts
from memshr.errors import BackendError, NoSuchDomainError
from memshr.qemu import pagemap, syscalls
from memshr.qemu.pagemap import Pagemap, is_protected, is_there, ksm_pages, mapping_flags, on_frame
from own_memory import (
    DEADLINE_S,
    EXCLUSIVE,
    FILE,
    FRAME,
    HUGE,
    MADV_PAGEOUT,
    MADV_UNMERGEABLE,
    PAGE,
    PR_SET_MEMORY_MERGE,
    PRESENT,
    SWAPPED,
    OwnMemory,
    WriteProtection,
    some_swap,
)

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="frame numbers and userfaultfd are for root")

HUGE_PAGES = HUGE // PAGE


@pytest.fixture
def stack() -> Iterator[ExitStack]:
    """Closes what the test opened."""
    with ExitStack() as closing_all:
        yield closing_all


@pytest.fixture
def protection(stack: ExitStack) -> WriteProtection:
    """A userfaultfd."""
    return stack.enter_context(closing(WriteProtection()))


def memory_of(stack: ExitStack, pages: int, *, file: int | None = None, huge: bool = False) -> OwnMemory:
    """Memory that the stack unmaps."""
    return stack.enter_context(closing(OwnMemory(pages, file=file, huge=huge)))


def memory_file(stack: ExitStack, pages: int) -> int:
    """A memory file full of ones, which the stack closes."""
    file = os.memfd_create("frames")
    stack.callback(os.close, file)
    os.write(file, b"\1" * (pages * PAGE))
    return file


def huge_zero_memory(stack: ExitStack) -> OwnMemory:
    """Two huge pages of which the first is the huge zero page, and the second is written."""
    memory = memory_of(stack, 2 * HUGE_PAGES, huge=True)
    memory.read(7)
    memory.write(HUGE_PAGES + 3, 5)
    if not all(memory.are_huge()):
        pytest.skip("the kernel gave no huge pages (transparent_hugepage/enabled, use_zero_page, or no memory)")
    return memory


def test_huge_zero_page_is_a_zero_page(stack: ExitStack) -> None:
    memory = huge_zero_memory(stack)
    expected = [True] * HUGE_PAGES + [False] * HUGE_PAGES
    assert memory.are_zero() == expected
    entries = memory.entries()
    assert memory.pagemap.zero_pages(entries).tolist() == expected
    for page in (0, 7, HUGE_PAGES - 1, HUGE_PAGES):  # one entry alone says as much as all of them
        assert memory.pagemap.zero_pages(entries[page : page + 1]).tolist() == [expected[page]]
    assert is_there(entries).all()
    assert memory.pagemap.huge(entries).all()


def test_huge_zero_page_as_other_kernels_show_it(stack: ExitStack) -> None:
    memory = huge_zero_memory(stack)
    zero, written = (int(memory.entries()[page]) & ~(FILE | EXCLUSIVE) for page in (7, HUGE_PAGES))
    (small,) = (int(entry) & FRAME for entry in small_zero_entries(stack))
    kinds = [0, FILE, FILE | EXCLUSIVE]
    assert judged(memory, *(zero | kind for kind in kinds)) == [True, True, True]
    assert judged(memory, *(written | kind for kind in kinds)) == [False, False, False]
    # A number of swap space is no frame.
    assert judged(memory, SWAPPED | (zero & FRAME), SWAPPED | small, PRESENT | small, small) == [
        False,
        False,
        True,
        False,
    ]


def test_frames_that_there_are_no_flags_of(stack: ExitStack) -> None:
    memory = memory_of(stack, 1)
    memory.write(0, 1)
    last = (1 << 55) - 2
    beyond = np.array([PRESENT | last - 9, PRESENT | last, PRESENT | last + 1], dtype=np.uint64)
    assert not memory.pagemap.huge(beyond).any()
    assert not memory.pagemap.zero_pages(beyond).any()


def judged(memory: OwnMemory, *entries: int) -> list[bool]:
    """Which of these entries are called zero pages."""
    found: list[bool] = memory.pagemap.zero_pages(np.array(entries, dtype=np.uint64)).tolist()
    return found


def small_zero_entries(stack: ExitStack) -> list[int]:
    """The entry of a page that was read and never written."""
    memory = memory_of(stack, 1)
    memory.read(0)
    found: list[int] = memory.entries().tolist()
    return found


def test_huge_zero_page_that_is_split_is_small_zero_pages(stack: ExitStack) -> None:
    memory = huge_zero_memory(stack)
    memory.advise(syscalls.MADV_DONTNEED, 7, 1)
    expected = [page != 7 for page in range(HUGE_PAGES)] + [False] * HUGE_PAGES
    assert memory.are_zero() == expected
    assert memory.pagemap.zero_pages(memory.entries()).tolist() == expected
    assert memory.pagemap.huge(memory.entries()).tolist() == [False] * HUGE_PAGES + [True] * HUGE_PAGES


def test_small_zero_page(stack: ExitStack) -> None:
    memory = memory_of(stack, 6)
    for page in (0, 1, 3):
        memory.read(page)
    memory.write(3, 3)
    memory.write(4, 0)
    expected = [True, True, False, False, False, False]
    assert memory.are_zero() == expected
    assert memory.pagemap.zero_pages(memory.entries()).tolist() == expected
    assert is_there(memory.entries()).tolist() == [True, True, False, True, True, False]
    assert not memory.pagemap.huge(memory.entries()).any()


def test_zero_pages_cost_one_look_for_each_2_mib_of_the_host(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of(stack, 1)
    frames = np.arange(100_000, dtype=np.uint64) * np.uint64(5) + np.uint64(HUGE_PAGES)
    merged = np.random.default_rng(1).permutation(frames) | np.uint64(PRESENT)
    calls = []
    pread = os.pread

    def counted(file: int, count: int, offset: int) -> bytes:
        calls.append(offset)
        return pread(file, count, offset)

    monkeypatch.setattr(os, "pread", counted)
    assert memory.pagemap.zero_pages(merged).shape == merged.shape
    assert len(calls) == len(np.unique(frames // np.uint64(HUGE_PAGES)))


def test_huge_reads_the_frames_of_a_huge_page_in_one_go(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = huge_zero_memory(stack)
    entries = memory.entries()
    calls = []
    read_words = pagemap._read_words

    def counted(file: int, first: int, words: pagemap.Entries) -> int:
        calls.append(first)
        return read_words(file, first, words)

    monkeypatch.setattr(pagemap, "_read_words", counted)
    assert memory.pagemap.huge(entries[::-1]).all()
    assert 1 <= len(calls) <= 2


@contextmanager
def merged(memory: OwnMemory, done: Callable[[], bool], *, zero_pages: bool = False) -> Iterator[None]:
    """KSM has merged what it may of some memory, and does nothing more."""
    with needed_parts(), ksm_at_work(zero_pages=zero_pages) as switch:
        memory.advise(syscalls.MADV_MERGEABLE)
        wait_until(done, DEADLINE_S, "KSM merges equal pages")
        switch.write_text("0")
        yield


def test_pages_that_ksm_has_merged(stack: ExitStack) -> None:
    memory = memory_of(stack, 64)
    memory.number(range(64))
    memory.write(8, 9, pages=40)
    assert ksm_pages(os.getpid()) == 0
    with merged(memory, lambda: sum(memory.merged_by_ksm()) == 40):
        entries = memory.entries()
        assert len(np.unique(entries[8:48] & np.uint64(FRAME))) == 1
        assert ksm_pages(os.getpid()) == 40
        assert is_there(entries).all()
        assert not memory.pagemap.zero_pages(entries).any()
        assert not memory.pagemap.huge(entries).any()
        assert not is_protected(entries).any()
        assert not on_frame(entries).any()
        counts_what_is_mapped = pagemap._SMAPS_KSM_KIB.search(Path("/proc/self/smaps_rollup").read_bytes())
        memory.write(10, 1, pages=3)
        assert ksm_pages(os.getpid()) == (37 if counts_what_is_mapped else 40)
        memory.advise(MADV_UNMERGEABLE)
        assert sum(memory.merged_by_ksm()) == 0
        assert ksm_pages(os.getpid()) == (0 if counts_what_is_mapped else 40)


def test_pages_that_ksm_has_merged_with_the_zero_page(stack: ExitStack) -> None:
    if b"ksm_zero_pages" not in pagemap._ksm_stat(os.getpid()):
        pytest.skip("needs Linux 6.6: KSM counts the zero pages of each process")
    memory = memory_of(stack, 16)
    memory.write(0, 0, pages=16)
    with merged(memory, lambda: all(memory.are_zero()), zero_pages=True):
        assert memory.pagemap.zero_pages(memory.entries()).all()
        assert ksm_pages(os.getpid()) == 16
        memory.advise(MADV_UNMERGEABLE)
        assert not memory.pagemap.zero_pages(memory.entries()).any()
        assert ksm_pages(os.getpid()) == 0


def test_swapped_pages(stack: ExitStack, protection: WriteProtection, tmp_path: Path) -> None:
    with some_swap(tmp_path):
        memory = memory_of(stack, 64)
        frames = memory_of(stack, 64, file=memory_file(stack, 64))
        for each in (memory, frames):
            protection.register(each)
            each.number(range(32))
            protection.protect(each, 8, 8)
            each.advise(MADV_PAGEOUT)
            if not swapped_out(each)[:32].all():
                pytest.skip("the kernel swapped nothing out")
            assert is_protected(each.entries()).tolist() == [8 <= page < 16 for page in range(64)]
            assert not each.pagemap.zero_pages(each.entries()).any()
            assert not each.pagemap.huge(each.entries()).any()
            assert is_there(each.entries())[:32].all()
        assert not is_there(memory.entries())[32:].any()
        assert on_frame(frames.entries()).tolist() == [page >= 32 for page in range(64)]


def swapped_out(memory: OwnMemory) -> np.ndarray[tuple[int], np.dtype[np.bool_]]:
    """Which pages are in swap space."""
    return np.asarray((memory.entries() >> np.uint64(62)) & np.uint64(3) == 1)


def test_pages_of_a_private_mapping_of_a_memory_file(stack: ExitStack, protection: WriteProtection) -> None:
    memory = memory_of(stack, 8, file=memory_file(stack, 8))
    protection.register(memory)
    memory.read(1)
    memory.write(2, 7)
    memory.read(3)
    memory.write(4, 7)
    protection.protect(memory, 3, 3)  # a frame that was read, the guest's own copy, a frame that was not touched
    entries = memory.entries()
    assert on_frame(entries).tolist() == [True, True, False, True, False, True, True, True]
    assert is_protected(entries).tolist() == [False, False, False, True, True, True, False, False]
    assert not memory.pagemap.zero_pages(entries).any()
    assert not is_there(entries)[5]
    memory.advise(syscalls.MADV_DONTNEED)
    assert on_frame(memory.entries()).all()


def test_protected_pages(stack: ExitStack, protection: WriteProtection) -> None:
    memory = memory_of(stack, 6)
    protection.register(memory)
    memory.write(0, 1)
    memory.write(1, 1)
    memory.read(2)
    assert not is_protected(memory.entries()).any()
    protection.protect(memory, 1, 3)  # a page, a zero page, and one that is not there
    assert is_protected(memory.entries()).tolist() == [False, True, True, protection.unpopulated, False, False]
    assert is_there(memory.entries()).tolist() == [True, True, True, False, False, False]
    assert on_frame(memory.entries()).tolist()[3]  # a marker: as absent as before
    protection.unprotect(memory, 1, 1)
    assert is_protected(memory.entries()).tolist() == [False, False, True, protection.unpopulated, False, False]
    protection.unprotect(memory)
    assert not is_protected(memory.entries()).any()


def test_protected_parts_of_huge_pages(stack: ExitStack, protection: WriteProtection) -> None:
    memory = huge_zero_memory(stack)
    protection.register(memory)
    protection.protect(memory)
    assert is_protected(memory.entries()).all()
    assert memory.pagemap.zero_pages(memory.entries()).tolist() == [True] * HUGE_PAGES + [False] * HUGE_PAGES
    protection.unprotect(memory)
    protection.protect(memory, HUGE_PAGES + 10, 2)
    expected = [page in {HUGE_PAGES + 10, HUGE_PAGES + 11} for page in range(2 * HUGE_PAGES)]
    assert is_protected(memory.entries()).tolist() == expected


def test_entries_in_any_order_and_batch(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of(stack, 64)
    memory.write(0, 1, pages=40)
    expected = memory.entries()
    some = np.array([0, 5, 6, 41, 50])
    assert (memory.pagemap.entries(memory.address + PAGE * some) == expected[some]).all()
    counts = []
    read_words = pagemap._read_words

    def counted(file: int, first: int, words: pagemap.Entries) -> int:
        counts.append(len(words))
        return read_words(file, first, words)

    monkeypatch.setattr(pagemap, "_BATCH_PAGES", 4)
    monkeypatch.setattr(pagemap, "_read_words", counted)
    assert (memory.entries() == expected).all()
    assert counts == [4] * 16
    order = np.random.default_rng(2).integers(0, 64, 200)
    assert (memory.pagemap.entries(memory.address + PAGE * order) == expected[order]).all()
    assert memory.pagemap.entries(np.empty(0, dtype=np.int64)).shape == (0,)


def test_entries_of_a_process_that_is_gone() -> None:
    with child() as process, closing(Pagemap(process.pid)) as reader:
        address = np.array([process.ask("anonymous(1, 1, 1)")])
        assert is_there(reader.entries(address)).all()
        process.kill()
        with pytest.raises(NoSuchDomainError):
            reader.entries(address)
    with child() as process, closing(Pagemap(process.pid)) as reader:
        assert process.ask("run_other_program()") == 1
        with pytest.raises(NoSuchDomainError):
            reader.entries(address)


def test_an_error_is_not_taken_for_the_end_of_a_process(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of(stack, 2)
    last = (1 << 47) - 2 * PAGE  # of the address space of a process
    for beyond in ([memory.address, 1 << 60], [last, last + PAGE]):
        with pytest.raises(OSError, match="no process has memory") as caught:
            memory.pagemap.entries(np.array(beyond, dtype=np.int64))
        assert caught.value.errno == errno.EFAULT

    def fails(*_: object) -> int:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OSError, match="no memory"):
        memory.entries()


def test_short_reads_are_continued(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of(stack, 64)
    memory.write(0, 1, pages=40)
    expected = memory.entries()
    preadv = os.preadv
    monkeypatch.setattr(os, "preadv", lambda file, views, at: preadv(file, [views[0][:24]], at))
    assert (memory.entries() == expected).all()


def test_nothing_stays_open_if_it_cannot_be_opened(monkeypatch: pytest.MonkeyPatch) -> None:
    before = len(list(Path("/proc/self/fd").iterdir()))
    with pytest.raises(FileNotFoundError):
        Pagemap(1 << 30)

    def fails(*_: object) -> int:
        raise OSError(errno.ENOMEM, "no memory")

    monkeypatch.setattr(os, "preadv", fails)
    with pytest.raises(OSError, match="no memory"):
        Pagemap(os.getpid())
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_without_flags_of_frames_there_is_no_answer(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = huge_zero_memory(stack)
    opened = os.open

    def no_flags(path: str, *arguments: int) -> int:
        if path == "/proc/kpageflags":
            raise PermissionError(errno.EACCES, "no")
        return opened(path, *arguments)

    monkeypatch.setattr(os, "open", no_flags)
    hidden = np.array([PRESENT, *small_zero_entries(stack)], dtype=np.uint64)
    with closing(Pagemap(os.getpid())) as reader:
        for entries in (memory.entries(), hidden):
            assert not reader.zero_pages(entries).any()
            assert not reader.huge(entries).any()


# -- facts of processes ------------------------------------------------------------------------------------------------


def test_ksm_pages_before_linux_6_3(monkeypatch: pytest.MonkeyPatch, stack: ExitStack) -> None:
    read: list[str] = []

    def older(_: int, name: str) -> bytes:
        read.append(name)
        return {"ksm_stat": b"ksm_rmap_items 3", "ksm_merging_pages": b"12"}.get(name, b"")

    monkeypatch.setattr(pagemap, "_read_if_there", older)
    assert ksm_pages(os.getpid()) == 12
    assert read == ["ksm_stat", "ksm_merging_pages", "smaps_rollup"]
    assert pagemap.is_mergeable_by_default(os.getpid()) is None
    monkeypatch.setattr(pagemap, "_read_if_there", lambda *_: b"")
    assert ksm_pages(os.getpid()) == 0


def test_ksm_pages_of_a_process_that_is_gone() -> None:
    ended = subprocess.Popen(["true"])
    os.waitid(os.P_PID, ended.pid, os.WEXITED | os.WNOWAIT)
    assert ksm_pages(ended.pid) == 0
    with pytest.raises(ProcessLookupError):
        mapping_flags(ended.pid, PAGE)
    ended.wait()
    for look in (ksm_pages, pagemap.is_mergeable_by_default, lambda pid: mapping_flags(pid, PAGE)):
        with pytest.raises(OSError, match=str(ended.pid)):
            look(ended.pid)


def test_mergeable_by_default() -> None:
    if pagemap.is_mergeable_by_default(os.getpid()) is None:
        pytest.skip("needs Linux 6.15: ksm_stat says whether a process is mergeable")
    with child() as process:
        assert pagemap.is_mergeable_by_default(process.pid) is False
        assert process.ask(f"libc.prctl({PR_SET_MEMORY_MERGE}, 1, 0, 0, 0)") == 0
        assert pagemap.is_mergeable_by_default(process.pid) is True
        assert "mg" in mapping_flags(process.pid, process.ask("anonymous(1, 1, 1)"))


def test_flags_of_mappings(stack: ExitStack, monkeypatch: pytest.MonkeyPatch) -> None:
    memory = memory_of(stack, 8)
    memory.advise(syscalls.MADV_DONTDUMP, 2, 2)
    plain, marked = (mapping_flags(os.getpid(), memory.at(page)) for page in (1, 3))
    assert {"rd", "wr", "nh"} <= plain
    assert marked - plain == {"dd"}
    assert mapping_flags(os.getpid(), PAGE) == frozenset()
    assert mapping_flags(os.getpid(), 1 << 62) == frozenset()
    monkeypatch.setattr(pagemap, "_SMAPS_BYTES", 2000)
    assert mapping_flags(os.getpid(), PAGE) == frozenset()  # nothing before it has to be looked through
    with pytest.raises(BackendError, match="hundreds of thousands"):
        mapping_flags(os.getpid(), memory.at(3))
    monkeypatch.undo()
    monkeypatch.setattr(pagemap, "_SMAPS_LINE_BYTES", 40)
    with pytest.raises(BackendError, match="too long"):
        mapping_flags(os.getpid(), memory.at(3))
