"""Reading pages out of an image: the same bytes by every way, holes told apart, and a file that is cut short."""

import ctypes
import errno
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memshr.errors import BackendError, ImageError
from memshr.images import FORMATS, MemoryImage, open_image, reading
from memshr.images.file import RUN, ZEROS, ImageFile, Layout, Unpacked, checked_runs, runs_of
from memshr.indices import Row, of_kind
from memshr.pagesource import PageSource, PageState
from memshr.types import PAGE_SIZE, PageBytes
from odd_cores import PAGE, Segment, core, pattern, write


def scattered(path: Path) -> Path:
    """A core of 300 pages: short and long runs, in another order in the file than in memory, at odd offsets."""
    segments = [Segment(paddr=page * PAGE, data=pattern(page)) for page in range(140, 20, -1)]
    segments.append(Segment(paddr=1 << 30, data=pattern(1 << 18, 180)))
    return write(path, core(segments, gap_bytes=3))


def gfns_of(source: PageSource) -> list[int]:
    return [gfn for first, count in source.ranges.tolist() for gfn in range(first, first + count)]


def new_pages(count: int) -> PageBytes:
    return np.full((count, PAGE_SIZE), 0xEE, np.uint8)


def first_words(pages: PageBytes) -> list[int]:
    assert (pages.view(np.uint64) == pages.view(np.uint64)[:, :1]).all()
    return [int(word) for word in pages.view(np.uint64)[:, 0]]


def with_zero_runs(path: Path) -> MemoryImage:
    """An image of raw pages between runs that are stored nowhere: each page that is stored holds its gfn."""
    file = ImageFile(write(path, pattern(10, 2) + pattern(5, 3)))
    runs = np.array([(0, ZEROS, 5), (5, 2 * PAGE, 3), (8, ZEROS, 2), (10, 0, 2), (100, ZEROS, 7)], RUN)
    return MemoryImage(path, file, "made up", Layout(checked_runs(file, runs, "run"), file))


def test_rows_count_along_the_ranges(tmp_path: Path) -> None:
    with open_image(scattered(tmp_path / "dump")) as source:
        assert source.ranges.tolist() == [[21, 120], [1 << 18, 180]]
        assert (source.name, source.live, source.total_pages) == ("dump", False, 300)
        out = new_pages(300)
        assert source.read_run(0, out).all()
        assert first_words(out) == gfns_of(source)


def test_every_way_of_reading_gives_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(5)
    with open_image(scattered(tmp_path / "dump")) as source:
        gfns = np.array(gfns_of(source))
        for start, count in ((0, 300), (1, 10), (119, 3), (120, 180), (250, 50), (7, 0)):
            out = new_pages(count)
            assert source.read_run(start, out).tolist() == [True] * count
            assert first_words(out) == gfns[start : start + count].tolist()
        rows = rng.integers(0, 300, 3000)
        out = new_pages(3000)
        assert source.read(of_kind(Row, rows), out).all()
        assert first_words(out) == gfns[rows].tolist()
        assert np.array_equal(np.concatenate([extent.pages for extent in source.extents])[rows], out)
    monkeypatch.setattr(reading, "_process_vm_readv", lambda: None)
    with open_image(scattered(tmp_path / "dump")) as source:
        again = new_pages(3000)
        source.read(of_kind(Row, rows), again)
        assert np.array_equal(out, again)


def test_call_that_is_forbidden_is_made_once_and_pages_are_read_all_the_same(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []

    def refuse(*arguments: Any) -> int:
        calls.append(arguments)
        ctypes.set_errno(errno.EPERM)
        return -1

    monkeypatch.setattr(reading, "_process_vm_readv", lambda: refuse)
    with open_image(scattered(tmp_path / "dump")) as source:
        gfns = gfns_of(source)
        for _ in range(2):
            out = new_pages(100)
            source.read(of_kind(Row, np.arange(150, 50, -1)), out)
            assert first_words(out) == [gfns[row] for row in range(150, 50, -1)]
    assert len(calls) == 1


def test_threads_read_at_once(tmp_path: Path) -> None:
    with open_image(scattered(tmp_path / "dump")) as source:
        gfns = np.array(gfns_of(source))

        def check(seed: int) -> bool:
            rng = np.random.default_rng(seed)
            for _ in range(20):
                rows = rng.integers(0, 300, 1500)
                out = new_pages(1500)
                source.read(of_kind(Row, rows), out)
                if not np.array_equal(out.view(np.uint64)[:, 0], gfns[rows]):
                    return False
            return True

        with ThreadPoolExecutor(4) as threads:
            assert all(threads.map(check, range(4)))


def test_zeros_that_are_stored_nowhere(tmp_path: Path) -> None:
    with with_zero_runs(tmp_path / "pages") as source:
        wanted = [0, 0, 0, 0, 0, 5, 6, 7, 0, 0, 10, 11, *[0] * 7]
        assert source.total_pages == len(wanted)
        assert source.ranges.tolist() == [[0, 12], [100, 7]]
        out = new_pages(len(wanted))
        source.read_run(0, out)
        assert first_words(out) == wanted
        rows = np.array([18, 11, 3, 5, 0, 10, 6])
        out = new_pages(len(rows))
        source.read(of_kind(Row, rows), out)
        assert first_words(out) == [0, 11, 0, 5, 0, 10, 6]
        out = new_pages(3)
        source.read_run(0, out)
        assert not out.any()
        holes = source.states(0, len(wanted)) == PageState.HOLE
        assert holes.tolist() == [word == 0 for word in wanted]
        assert [(extent.first_gfn, len(extent.pages)) for extent in source.extents] == [
            *((0, 5), (5, 3), (8, 2), (10, 2), (100, 7)),
        ]
        assert [word for extent in source.extents for word in first_words(extent.pages)] == wanted
        source.extents[0].pages[4] = 9
        assert not source.extents[2].pages.any()


def test_zero_pages_of_a_terabyte_cost_no_memory(tmp_path: Path) -> None:
    path = write(tmp_path / "small", pattern(1))
    file = ImageFile(path)
    runs = np.array([(0, ZEROS, 1 << 28), (1 << 28, 0, 1)], RUN)
    with MemoryImage(path, file, "made up", Layout(runs, file)) as source:
        assert not source.extents[0].pages[123_456_789].any()
        assert source.extents[1].pages.tobytes() == pattern(1)


@pytest.mark.parametrize("shape", ["raw", "elfcore", "unaligned"])
def test_holes_of_a_sparse_file_are_told_apart(tmp_path: Path, shape: str) -> None:
    start = {"raw": 0, "elfcore": PAGE, "unaligned": 64 + 56}[shape]
    path = tmp_path / "image"
    with path.open("wb") as file:
        if shape != "raw":
            file.write(core([Segment(filesz=64 * PAGE, memsz=64 * PAGE, offset=start)]))
        file.truncate(start + 64 * PAGE)
        for page in (3, 40):
            os.pwrite(file.fileno(), pattern(page + 1), start + page * PAGE)
    with open_image(path) as source:
        states = source.states(0, 64)
        out = new_pages(64)
        source.read_run(0, out)
        stored = set(np.flatnonzero(states == PageState.STORED).tolist())
        assert {3, 40} <= stored
        # What lies in a block that holds something else as well is stored; blocks are at most 4 KiB here.
        assert stored <= {0, 2, 3, 4, 39, 40, 41}
        assert set(np.flatnonzero(out.any(axis=1)).tolist()) == {3, 40}
        assert source.states(10, 4).tolist() == [PageState.HOLE] * 4


def test_file_system_that_knows_no_holes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(descriptor: int, place: int, whence: int) -> int:
        raise OSError(errno.EINVAL, "Invalid argument")

    path = tmp_path / "raw"
    with path.open("wb") as file:
        file.truncate(8 * PAGE)
    monkeypatch.setattr(os, "lseek", refuse)
    with open_image(path) as source:
        assert source.states(0, 8).tolist() == [PageState.STORED] * 8


@pytest.mark.parametrize("allowed", [True, False])
def test_file_cut_short_is_an_error_and_kills_nobody(tmp_path: Path, allowed: bool) -> None:
    path = scattered(tmp_path / "dump")
    program = (
        "import os, sys\n"
        "import numpy as np\n"
        "from memshr.errors import ImageError\n"
        "from memshr.images import open_image, reading\n"
        f"if not {allowed}: reading._process_vm_readv = lambda: None\n"
        "out = np.empty((300, 4096), np.uint8)\n"
        "with open_image(sys.argv[1]) as image:\n"
        "    image.read(np.arange(300)[::-1], out)\n"
        "    os.truncate(sys.argv[1], 5000)\n"
        "    for read in (lambda: image.read(np.arange(300)[::-1], out), lambda: image.read_run(0, out),\n"
        "                 lambda: image.read_run(150, out[:100]), lambda: image.states(0, 300)):\n"
        "        try: read()\n"
        "        except ImageError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, os.fspath(path)], capture_output=True, text=True, check=True)
    lines = done.stdout.splitlines()
    assert len(lines) == 4
    assert all("bytes while it was read; work on a copy" in line for line in lines)


def test_headers_of_a_file_cut_short(tmp_path: Path) -> None:
    path = write(tmp_path / "file", bytes(10_000))
    file = ImageFile(path)
    os.truncate(path, 100)
    with pytest.raises(ImageError, match="changed from 10000 to 100 bytes"):
        file.records(np.dtype("<u8"), 0, 1000, "things")
    file.close()


def test_page_that_the_disk_cannot_give(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: object) -> int:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    with open_image(scattered(tmp_path / "dump")) as source:
        monkeypatch.setattr(os, "preadv", fail)
        with pytest.raises(ImageError, match=r"cannot be read: Input/output error; look for errors"):
            source.read_run(120, new_pages(100))


def test_reading_leaves_no_pages_resident(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    with path.open("wb") as file:
        for _ in range(64):
            file.write(os.urandom(1 << 20))
    fields = ("RssFile", "RssShmem")

    def resident_bytes() -> int:
        status = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
        return sum(int(status[name].split()[0]) * 1024 for name in fields)

    with open_image(path) as source:
        out = new_pages(source.total_pages)
        before = resident_bytes()
        source.read(of_kind(Row, np.random.default_rng(1).permutation(source.total_pages)), out)
        assert out.any(axis=1).all()
        assert resident_bytes() - before < 8 << 20


def test_closed_image_is_read_no_more(tmp_path: Path) -> None:
    source = open_image(scattered(tmp_path / "dump"))
    source.close()
    for call in (
        lambda: source.read(of_kind(Row, np.arange(3)), new_pages(3)),
        lambda: source.read_run(130, new_pages(100)),
        lambda: source.states(0, 1),
    ):
        with pytest.raises(ValueError, match="closed"):
            call()


def test_runs_of_pages_are_joined() -> None:
    gfns = np.array([7, 3, 4, 5, 9, 10, 12])
    offsets = np.array([ZEROS, 0, PAGE, 3 * PAGE, ZEROS, ZEROS, ZEROS])
    wanted = [(3, 0, 2), (5, 3 * PAGE, 1), (7, ZEROS, 1), (9, ZEROS, 2), (12, ZEROS, 1)]
    assert runs_of(gfns, offsets).tolist() == wanted
    assert runs_of(gfns[:0], offsets[:0]).tolist() == []


BIG = (1 << 63) - 1
BAD_RUNS = {
    "negative gfn": ([(0, 0, 1), (-1, 0, 1)], "thing 1: damaged: a negative number"),
    "negative pages": ([(0, 0, -BIG)], "thing 0: damaged: a negative number"),
    "negative offset": ([(0, -2, 1)], "thing 0: damaged: a negative number"),
    "gfn too high": ([(1 << 36, 0, 1)], "thing 0: damaged: it ends beyond the highest"),
    "end too high": ([((1 << 36) - 1, ZEROS, 2)], "thing 0: damaged: it ends beyond the highest"),
    "everything at its highest": ([(BIG, BIG, BIG)], "thing 0: damaged: it ends beyond the highest"),
    "beyond the end": ([(0, 0, 1), (5, 15 * PAGE + 1, 1)], "thing 1: truncated"),
    "offset at its highest": ([(0, BIG, 1)], "thing 0: truncated"),
    "longer than the file": ([(0, 0, 17)], "thing 0: truncated"),
    "same bytes": ([(0, 0, 4), (9, PAGE * 3, 1)], "thing 1: damaged: it has bytes of the file in common"),
    "contained": ([(4, ZEROS, 2), (9, 0, 0), (3, 0, 4)], "thing 0: it overlaps another one"),
    "gfn twice": ([(3, 0, 1), (3, PAGE, 1)], "thing 1: it overlaps another one"),
}


@pytest.mark.parametrize(("runs", "message"), BAD_RUNS.values(), ids=BAD_RUNS)
def test_bad_runs_are_named_by_number_and_place(tmp_path: Path, runs: list[tuple[int, int, int]], message: str) -> None:
    file = ImageFile(write(tmp_path / "file", bytes(16 * PAGE)))
    with pytest.raises(ImageError) as caught:
        checked_runs(file, np.array(runs, RUN), "thing", places=np.arange(100, 100 + len(runs)))
    assert message in str(caught.value)
    number = int(message.split()[1].rstrip(":"))
    assert caught.value.offset == 100 + number
    file.close()


def test_pages_that_were_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "packed", b"whatever it was")
    file = ImageFile(path)
    unpacked = Unpacked(file)
    pages = np.frombuffer(pattern(20, 8), np.uint8).reshape(-1, PAGE).copy()
    pages[2:5] = 0
    with ThreadPoolExecutor(2) as threads:
        list(threads.map(unpacked.add, [np.arange(20, 28), np.arange(8)], [pages, pages]))
    with MemoryImage(path, file, "made up", unpacked.layout()) as source:
        assert source.ranges.tolist() == [[0, 8], [20, 8]]
        out = new_pages(16)
        source.read_run(0, out)
        assert np.array_equal(out, np.concatenate([pages, pages]))
        assert (source.states(0, 16) == PageState.HOLE).sum() == 6
        assert np.array_equal(source.extents[1].pages, pages)


def test_pages_that_are_unpacked_once_for_several_gfns(tmp_path: Path) -> None:
    path = write(tmp_path / "packed", b"whatever it was")
    file = ImageFile(path)
    unpacked = Unpacked(file)
    pages = np.frombuffer(pattern(0, 4), np.uint8).reshape(-1, PAGE)
    rows = np.array([3, 0, 0, 1, 2, 3, 2, 1, 1])
    unpacked.add(np.arange(9), pages, rows)
    unpacked.add(np.arange(9, 11), pages, np.array([0, 0]))
    with MemoryImage(path, file, "made up", unpacked.layout()) as source:
        out = new_pages(11)
        source.read_run(0, out)
        assert first_words(out) == [*rows.tolist(), 0, 0]
        source.extents[0].pages[0] = 9
        assert first_words(source.extents[0].pages[5:6]) == [3]


def test_page_that_is_unpacked_twice(tmp_path: Path) -> None:
    file = ImageFile(write(tmp_path / "packed", b"whatever it was"))
    unpacked = Unpacked(file)
    unpacked.add(np.array([4, 5, 4]), new_pages(3))
    with pytest.raises(ImageError, match="overlaps another one"):
        unpacked.layout()


def test_no_room_to_unpack(tmp_path: Path) -> None:
    path = write(tmp_path / "packed", b"whatever it was")
    program = (
        "import resource, signal, sys\n"
        "import numpy as np\n"
        "from memshr.errors import BackendError\n"
        "from memshr.images.file import ImageFile, Unpacked\n"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN)\n"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (8192, 8192))\n"
        "try: Unpacked(ImageFile(sys.argv[1])).add(np.arange(3), np.ones((3, 4096), np.uint8))\n"
        "except BackendError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", program, os.fspath(path)], capture_output=True, text=True, check=True)
    assert done.stdout.startswith(f"{path}: no room to unpack it: File too large; make room in ")


@pytest.mark.parametrize(("free", "blocks", "fits"), [(2, 100, False), (9, 100, True), (0, 0, True)])
def test_a_file_system_is_not_filled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, free: int, blocks: int, fits: bool
) -> None:
    # Of 100 blocks 5 stay free; a tmpfs without a limit says 0 of 0.
    system = os.statvfs_result((PAGE, PAGE, blocks, free, free, 0, 0, 0, 0, 255))
    monkeypatch.setattr(os, "fstatvfs", lambda _: system)
    unpacked = Unpacked(ImageFile(write(tmp_path / "packed", b"whatever it was")))
    if fits:
        unpacked.add(np.arange(3), np.ones((3, PAGE), np.uint8))
        return
    with pytest.raises(BackendError, match="no room to unpack it: 0 MiB are left; make room in ") as caught:
        unpacked.add(np.arange(3), np.ones((3, PAGE), np.uint8))
    assert "\n" not in str(caught.value)
    assert os.fstat(unpacked.fileno()).st_size == 0, "nothing was written"


def test_no_folder_for_what_is_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = ImageFile(write(tmp_path / "packed", b"whatever it was"))
    monkeypatch.setattr("tempfile.tempdir", os.fspath(tmp_path / "missing"))
    with pytest.raises(BackendError, match="no room to unpack it: No such file"):
        Unpacked(file)


def test_file_beside_it_is_watched_and_closed_with_it(tmp_path: Path) -> None:
    file = ImageFile(write(tmp_path / "state", b"state"))
    other = file.beside(write(tmp_path / "memory", pattern(1)))
    file.check_unchanged()
    os.utime(tmp_path / "memory", ns=(1, 1))
    with pytest.raises(ImageError, match="memory: the file was written"):
        file.check_unchanged()
    file.close()
    assert other.closed


class OfAFolder:
    """A format whose images are folders with a file ``pages``."""

    name = "folder"

    def folder_file(self, path: Path) -> Path | None:
        return path / "pages" if (path / "pages").exists() else None

    def detect(self, file: ImageFile) -> bool:
        return file.path.name == "pages"

    def layout(self, file: ImageFile) -> Layout:
        return Layout(np.array([(1, 0, file.size // PAGE_SIZE)], RUN), file)


def test_folder_as_image(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memshr.images.FORMATS", (OfAFolder(), *FORMATS))
    with pytest.raises(ImageError, match="this is a directory"):
        open_image(tmp_path)
    write(tmp_path / "pages", pattern(1, 2))
    with open_image(tmp_path) as source:
        assert (source.path, source.name, source.format) == (tmp_path, tmp_path.name, "folder")
        assert source.ranges.tolist() == [[1, 2]]
    with pytest.raises(ImageError, match="this is a directory"):
        open_image(tmp_path, format="raw")
