"""Live processes and the domains of a mechanism as sources of an estimate: read in place, and nothing done to them."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

import memshr
from child_process import Child, child
from command_line import CommandLine
from memshr.embedded import EmbeddedHypervisor
from memshr.errors import ImageError, MemshrError, NoSuchDomainError
from memshr.images.process import ProcessSource
from memshr.opening.domain_source import DomainSource
from memshr.pagesource import PageSource, PageState
from memshr.procfs import ProcessMemory
from memshr.types import PAGE_SIZE, DomId, Extent, Gfn, PageArray


@pytest.fixture
def process() -> Iterator[Child]:
    with child() as running:
        yield running


def rows_at(source: PageSource, page: int, count: int) -> int:
    """The row of a virtual page number; ``count`` pages from there on are rows in order."""
    ends = np.cumsum(source.ranges[:, 1])
    (which,) = np.nonzero((source.ranges[:, 0] <= page) & (page + count <= source.ranges.sum(axis=1)))
    return int(ends[which[0]] - source.ranges[which[0], 1] + page - source.ranges[which[0], 0])


def test_a_process_as_a_source(process: Child) -> None:
    filled = process.ask("anonymous(40, 100, 30)") // PAGE_SIZE
    apart = process.ask("every_other(6, 50)") // PAGE_SIZE
    with ProcessSource(process.pid) as source:
        assert source.live
        assert source.total_pages == source.ranges[:, 1].sum()
        row = rows_at(source, filled, 40)
        states = source.states(row, 40)
        assert set(states[:30].tolist()) <= {PageState.STORED, PageState.HUGE}
        assert set(states[30:].tolist()) == {PageState.ABSENT}
        out = np.empty((30, PAGE_SIZE), np.uint8)
        assert source.read_run(row, out).all()
        assert out.view(np.uint64)[:, 0].tolist() == list(range(100, 130))
        other = rows_at(source, apart, 6)
        scattered = np.array([row + 7, other + 2, row + 3, other])
        assert source.read(scattered, out[:4]).all()
        assert out.view(np.uint64)[:4, 0].tolist() == [107, 52, 103, 50]
        # Over the end of a range, too, where addresses do not go on.
        everything = np.concatenate([source.states(first, 7) for first in range(0, source.total_pages - 7, 7)])
        assert (everything == source.states(0, len(everything))).all()
        assert np.count_nonzero(source.states(other, 6) == PageState.ABSENT) == 3


def test_pages_that_were_only_looked_at_are_absent(process: Child) -> None:
    address = process.ask("anonymous(8, 1, 0)")
    with ProcessSource(process.pid) as source, ProcessMemory(process.pid) as memory:
        if not source.huge_pages_known:
            pytest.skip("this kernel has no PAGEMAP_SCAN (Linux 6.7)")
        looked_at = np.empty((8, PAGE_SIZE), np.uint8)
        assert memory.read(address, looked_at).all()  # makes the kernel map its zero page there
        states = source.states(rows_at(source, address // PAGE_SIZE, 8), 8)
        assert set(states.tolist()) == {PageState.ABSENT}


def test_huge_pages_of_a_process() -> None:
    setting = Path("/sys/kernel/mm/transparent_hugepage/enabled")
    if not setting.exists() or "[never]" in setting.read_text():
        pytest.skip("this kernel has no transparent huge pages")
    with child() as process:
        process.ask("(kept.append(mmap.mmap(-1, 8 << 20, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)), 0)[1]")
        process.ask("(kept[-1].madvise(mmap.MADV_HUGEPAGE), 0)[1]")
        address = process.ask("words(kept[-1], 1, 2048)")
        smaps = Path(f"/proc/{process.pid}/smaps").read_text()
        kib = sum(int(line.split()[1]) for line in smaps.splitlines() if line.startswith("AnonHugePages:"))
        with ProcessSource(process.pid) as source:
            if not source.huge_pages_known:
                pytest.skip("this kernel has no PAGEMAP_SCAN (Linux 6.7)")
            assert np.count_nonzero(source.states(0, source.total_pages) == PageState.HUGE) == kib // 4
            states = source.states(rows_at(source, address // PAGE_SIZE, 2048), 2048)
            assert np.count_nonzero(states == PageState.HUGE) <= kib // 4


def test_an_estimate_of_a_process_counts_what_it_holds(process: Child) -> None:
    process.ask("anonymous(3000, 1000000, 3000)")
    before = memshr.estimate([f"pid:{process.pid}"], interval_s=0)
    process.ask("anonymous(3000, 1000000, 3000)")
    after = memshr.estimate([f"pid:{process.pid}"], interval_s=0)
    assert abs(after.intra_pages - before.intra_pages - 3000) < 50  # the process itself goes on meanwhile
    (domain,) = after.domains
    assert (domain.kind, domain.format, domain.name) == ("process", None, f"pid:{process.pid}")
    assert after.method.samples_s == 0


def test_images_and_processes_in_one_estimate(process: Child, tmp_path: Path, memshr: CommandLine) -> None:
    process.ask("anonymous(500, 1000000, 500)")
    words = np.repeat(np.arange(1_000_000, 1_000_500, dtype=np.uint64), PAGE_SIZE // 8)
    (tmp_path / "a.raw").write_bytes(words.tobytes())
    outcome = memshr("estimate", tmp_path / "a.raw", f"pid:{process.pid}", "--group", "all", "--interval", "0")
    assert outcome.code == 0, outcome.err
    assert f"a.raw + pid:{process.pid}" in outcome.out
    assert "500" in outcome.out


def test_a_process_that_ends_is_one_line(process: Child) -> None:
    with ProcessSource(process.pid) as source:
        process.kill()
        with pytest.raises(ImageError, match="has exited"):
            source.states(0, 1)
        with pytest.raises(ImageError, match="has exited"):
            source.read_run(0, np.empty((1, PAGE_SIZE), np.uint8))
    with pytest.raises(ImageError, match="no such process"):
        ProcessSource(process.pid)


# -- domains of a mechanism ------------------------------------------------------------------------------------------


@pytest.fixture
def host() -> EmbeddedHypervisor:
    """A domain of two ranges, with a zero page that was given back."""
    host = EmbeddedHypervisor()
    pages = np.arange(1, 11, dtype=np.uint64).repeat(PAGE_SIZE // 8).view(np.uint8).reshape(-1, PAGE_SIZE)
    extents = [Extent(Gfn(4), pages[:6].copy()), Extent(Gfn(100), pages[6:].copy())]
    extents[0].pages[1] = 0
    page = PageArray.of_domain(host.create_domain("one", extents=extents), np.array([5]))
    handles, _ = host.nominate_gfns(page)
    assert not host.release_zero_pages(page, handles).any()
    return host


def test_a_domain_as_a_source(host: EmbeddedHypervisor) -> None:
    source = DomainSource(host, DomId(1), threading.Lock(), lambda pages: pages.gfns >= 102)
    assert (source.name, source.total_pages, source.ranges.tolist()) == ("one", 10, [[4, 6], [100, 4]])
    stored, absent, huge = PageState.STORED, PageState.ABSENT, PageState.HUGE
    assert source.states(0, 10).tolist() == [stored, absent, *[stored] * 6, huge, huge]
    out = np.empty((10, PAGE_SIZE), np.uint8)
    assert source.read_run(0, out).all()  # over the end of a range
    assert out.view(np.uint64)[:, 0].tolist() == [1, 0, *range(3, 11)]
    assert source.read_run(6, out[:4]).all()
    assert out.view(np.uint64)[:4, 0].tolist() == [7, 8, 9, 10]
    assert source.read(np.array([9, 2]), out[:2]).all()
    assert out.view(np.uint64)[:2, 0].tolist() == [10, 3]
    assert host.counters().used_frames == 0


def test_pages_and_domains_that_go_away(host: EmbeddedHypervisor) -> None:
    source = DomainSource(host, DomId(1), threading.Lock())
    host.decrease_reservation(DomId(1), Gfn(6))
    out = np.empty((4, PAGE_SIZE), np.uint8)
    assert source.read_run(1, out).tolist() == [True, False, True, True]
    host.destroy_domain(DomId(1))
    with pytest.raises(MemshrError):
        source.read_run(0, out)
    with pytest.raises(NoSuchDomainError):
        source.read(np.array([1]), out[:1])
    with pytest.raises(NoSuchDomainError):
        DomainSource(host, DomId(1), threading.Lock())


def test_an_estimate_of_sources_of_ones_own(host: EmbeddedHypervisor) -> None:
    source = DomainSource(host, DomId(1), threading.Lock())
    found = memshr.estimate([source], interval_s=0)
    assert (found.total_pages, found.absent_pages, found.unique_pages) == (10, 1, 9)
