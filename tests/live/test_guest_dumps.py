"""What QEMU says a guest's memory holds, by two commands, and how many of its pages are equal."""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from command_line import CommandLine
from guests.linux import LinuxGuest
from guests.pages import PAGE_SIZE, Pages, count_pages
from kdumpfile import KdumpFile, find_library
from memshr.images import open_image


@dataclass(frozen=True, slots=True)
class Dumps:
    """One moment of two paused guests.

    ``alpha_raw`` holds the first 256 MiB of alpha's address space, from gfn 0 on, as ``pmemsave`` sees it.
    """

    alpha: Path
    beta: Path
    alpha_raw: Path
    alpha_kdump: Path


@pytest.fixture(scope="module")
def dumps(booted_pair: tuple[LinuxGuest, LinuxGuest]) -> Iterator[Dumps]:
    """ELF dumps of both guests and a raw one of alpha, all of the same moment."""
    alpha, beta = booted_pair
    # In the guests' folders, because a QEMU of another user can write nowhere else.
    done = Dumps(
        *(alpha.folder / "dump.elf", beta.folder / "dump.elf", alpha.folder / "dump.raw", alpha.folder / "dump.kdump")
    )
    for guest, path in ((alpha, done.alpha), (beta, done.beta)):
        assert guest.execute("query-status")["status"] == "paused"
        guest.execute("dump-guest-memory", {"paging": False, "protocol": f"file:{path}"})
    alpha.execute("pmemsave", {"val": 0, "size": alpha.memory_mib << 20, "filename": str(done.alpha_raw)})
    packed = {"paging": False, "protocol": f"file:{done.alpha_kdump}", "format": "kdump-zlib"}
    alpha.execute("dump-guest-memory", packed)
    yield done
    for path in (done.alpha, done.beta, done.alpha_raw, done.alpha_kdump):
        path.unlink()


def segments(path: Path) -> list[tuple[int, Pages]]:
    """First gfn and pages of each PT_LOAD of a dump, read with pyelftools."""
    with path.open("rb") as file:
        return [
            (segment["p_paddr"] // PAGE_SIZE, np.frombuffer(segment.data(), np.uint8).reshape(-1, PAGE_SIZE))
            for segment in ELFFile(file).iter_segments("PT_LOAD")
        ]


def all_pages(path: Path) -> Pages:
    """The pages of every PT_LOAD, one after the other."""
    return np.concatenate([pages for _, pages in segments(path)])


def test_elf_and_raw_dumps_hold_the_same_pages_at_the_same_gfns(dumps: Dumps) -> None:
    raw = np.fromfile(dumps.alpha_raw, np.uint8).reshape(-1, PAGE_SIZE)
    inside = [(first, pages) for first, pages in segments(dumps.alpha) if first < len(raw)]
    assert sum(len(pages) for _, pages in inside) > 0.99 * len(raw)
    for first, pages in inside:
        different = np.flatnonzero(
            (pages.view(np.uint64) != raw[first : first + len(pages)].view(np.uint64)).any(axis=1)
        )
        assert different.size == 0, f"gfns {first + different[:10]}"


def test_readers_find_the_same_pages_in_the_dumps(dumps: Dumps) -> None:
    with open_image(dumps.beta) as image:
        gfns = np.concatenate([np.arange(extent.first_gfn, extent.end_gfn) for extent in image.extents])
        wanted = np.concatenate([np.arange(first, first + len(pages)) for first, pages in segments(dumps.beta)])
        np.testing.assert_array_equal(gfns, wanted)
        assert np.array_equal(np.concatenate([extent.pages for extent in image.extents]), all_pages(dumps.beta))
    with open_image(dumps.alpha_raw) as image:
        (extent,) = image.extents
        assert np.array_equal(extent.pages, np.fromfile(dumps.alpha_raw, np.uint8).reshape(-1, PAGE_SIZE))


def test_packed_dump_holds_the_same_pages(dumps: Dumps) -> None:
    with open_image(dumps.alpha) as image, open_image(dumps.alpha_kdump) as packed:
        assert packed.format == "kdump"
        np.testing.assert_array_equal(packed.ranges, image.ranges)
        ours, theirs = (np.empty((source.total_pages, PAGE_SIZE), np.uint8) for source in (packed, image))
        packed.read_run(0, ours)
        image.read_run(0, theirs)
        assert np.array_equal(ours, theirs)
        gfns = np.concatenate([np.arange(first, first + count) for first, count in packed.ranges.tolist()])
    if find_library() is not None:
        with KdumpFile(dumps.alpha_kdump) as theirs_again:
            different = [
                gfn for gfn, page in zip(gfns.tolist(), ours, strict=True) if theirs_again.page(gfn) != page.tobytes()
            ]
        assert different == []


def test_two_guests_that_did_the_same_have_most_of_their_pages_in_common(dumps: Dumps) -> None:
    alpha, beta = all_pages(dumps.alpha), all_pages(dumps.beta)
    both, one, other = count_pages([[alpha], [beta]]), count_pages([[alpha]]), count_pages([[beta]])
    assert both.total_pages == one.total_pages + other.total_pages
    assert (both.zero_pages, both.intra_pages) == (
        one.zero_pages + other.zero_pages,
        one.intra_pages + other.intra_pages,
    )
    # Each of the 63 contents that the checkers have in common is one frame less, and each page of the four blobs.
    assert both.inter_pages >= 63 + 4 * 256
    assert both.saved_pages > both.total_pages / 2


def test_share_of_the_dumps_counts_as_we_do(dumps: Dumps, memshr: CommandLine) -> None:
    counted = count_pages([[all_pages(dumps.alpha)], [all_pages(dumps.beta)]])
    outcome = memshr("share", dumps.alpha, dumps.beta, "--group", "all", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["total_pages"] == counted.total_pages
    assert report["zero_pages"] == counted.zero_pages
    assert report["intra_pages"] == counted.intra_pages
    assert report["inter_pages"] == counted.inter_pages
    assert report["audit_findings"] == []
    over_limit = report["dropped"].get("max_sharers", 0)
    assert report["saved_pages"] == counted.saved_pages - over_limit
    assert report["dropped"] == ({"max_sharers": over_limit} if over_limit else {})


def test_every_page_of_the_shared_dumps_reads_as_before(dumps: Dumps, memshr: CommandLine) -> None:
    outcome = memshr("audit", dumps.alpha, dumps.beta, "--group", "all", "--json")
    assert outcome.code == 0, outcome.err
    assert json.loads(outcome.out)["wrong_pages"] == 0
