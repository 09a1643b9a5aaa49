"""Capturing real processes, and every way in which it goes wrong."""

import errno
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from child_process import Child, child
from memshr.errors import BackendError, ImageError
from memshr.images import MemoryImage, open_image
from memshr.images.capture import CaptureResult, _planned_runs, capture_process
from memshr.procfs import ProcessMemory

PAGE = 4096
MIB = 1 << 20


@pytest.fixture
def process() -> Iterator[Child]:
    with child() as running:
        yield running


def page_at(image: MemoryImage, address: int) -> bytes | None:
    """The page at an address of the process, or None if the image has none there."""
    for extent in image.extents:
        if extent.first_gfn <= address // PAGE < extent.end_gfn:
            return bytes(extent.pages[address // PAGE - extent.first_gfn])
    return None


def first_words(image: MemoryImage, address: int, count: int) -> list[int | None]:
    pages = [page_at(image, address + number * PAGE) for number in range(count)]
    return [None if page is None else int.from_bytes(page[:8], "little") for page in pages]


def test_pages_are_those_of_the_process(process: Child, tmp_path: Path) -> None:
    filled = process.ask("anonymous(5000, 1, 5000)")
    part = process.ask("anonymous(1000, 7, 2)")
    scattered = process.ask("every_other(6, 50)")
    result = capture_process(process.pid, tmp_path / "p.core")
    with open_image(tmp_path / "p.core") as image:
        assert image.format == "elfcore"
        assert first_words(image, filled, 5000) == list(range(1, 5001))
        assert first_words(image, part, 4) == [7, 8, None, None]
        assert first_words(image, scattered, 6) == [50, None, 52, None, 54, None]
        # What runs does not change its text meanwhile, so each page of it can be compared as it is now.
        compared = 0
        with ProcessMemory(process.pid) as memory:
            out = np.empty((1, PAGE), dtype=np.uint8)
            for mapping in memory.mappings():
                for address in range(mapping.start, mapping.end, PAGE) if mapping.executable else ():
                    page = page_at(image, address)
                    if page is not None and memory.read(address, out).all():
                        assert out.tobytes() == page
                        compared += 1
        assert compared > 100
        assert result == CaptureResult(
            pid=process.pid,
            path=tmp_path / "p.core",
            pages=image.total_pages,
            unreadable_pages=0,
            absent_pages=result.absent_pages,
            file_bytes=(tmp_path / "p.core").stat().st_size,
        )
    assert result.absent_pages is not None
    assert result.absent_pages >= 998 + 3


def test_shared_and_unreadable_memory_is_left_out(process: Child, tmp_path: Path) -> None:
    shared = process.ask("shared(4, 1)")
    hidden = process.ask("anonymous(4, 1, 4)")
    assert process.ask(f"unreadable({hidden}, 2)") == 0
    capture_process(process.pid, tmp_path / "p.core")
    with ProcessMemory(process.pid) as memory:
        special = [mapping.start for mapping in memory.mappings() if mapping.path.startswith(("[vvar", "[vsyscall"))]
    with open_image(tmp_path / "p.core") as image:
        assert first_words(image, shared, 4) == [None] * 4
        assert first_words(image, hidden, 4) == [None, None, 3, 4]
        assert [page_at(image, address) for address in special] == [None] * len(special)


def test_pages_of_a_mapped_file_beyond_its_end_are_counted(process: Child, tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"\1" * 4 * PAGE)
    address = process.ask(f"private_file({os.fspath(path)!r})")
    array = f"np.frombuffer(kept[-1], dtype=np.uint8)[{2 * PAGE}:].sum()"
    assert process.ask(array) == 2 * PAGE

    def cut(done_bytes: int, total_bytes: int) -> None:
        if not done_bytes:
            os.truncate(path, 3 * PAGE)

    result = capture_process(process.pid, tmp_path / "p.core", progress=cut)
    assert result.unreadable_pages == 1
    with open_image(tmp_path / "p.core") as image:
        assert page_at(image, address + 2 * PAGE) == b"\1" * PAGE
        assert page_at(image, address + 3 * PAGE) is None


def test_memory_that_goes_away_meanwhile_is_left_out_and_counted(process: Child, tmp_path: Path) -> None:
    address = process.ask("anonymous(10, 1, 10)")

    def unmap(done_bytes: int, total_bytes: int) -> None:
        if not done_bytes:
            assert process.ask(f"unmap({address} + 3 * PAGE, 4)") == 0

    result = capture_process(process.pid, tmp_path / "p.core", progress=unmap)
    assert result.unreadable_pages == 4
    with open_image(tmp_path / "p.core") as image:
        assert first_words(image, address, 10) == [1, 2, 3, None, None, None, None, 8, 9, 10]


def test_progress_is_told_from_nothing_to_all(process: Child, tmp_path: Path) -> None:
    process.ask("anonymous(10000, 1, 10000)")
    told: list[tuple[int, int]] = []
    capture_process(process.pid, tmp_path / "p.core", progress=lambda done, total: told.append((done, total)))
    done = [pair[0] for pair in told]
    (total,) = {pair[1] for pair in told}
    assert done[0] == 0
    assert done[-1] == total >= 10000 * PAGE
    assert done == sorted(set(done))
    assert len(done) >= 3


@pytest.mark.parametrize("runs", [1, 200, 70_000])
def test_pyelftools_reads_the_same_pages(process: Child, tmp_path: Path, runs: int) -> None:
    process.ask(f"every_other({2 * runs}, 1)")
    path = tmp_path / "p.core"
    result = capture_process(process.pid, path)
    with path.open("rb") as file, open_image(path) as image:
        core = ELFFile(file)
        assert (core["e_type"], core["e_machine"]) == ("ET_CORE", "EM_X86_64")
        assert core.num_segments() >= runs
        theirs: dict[int, bytes] = {}
        for segment in core.iter_segments():
            assert segment["p_type"] == "PT_LOAD"
            assert segment["p_filesz"] == segment["p_memsz"]
            data = segment.data()
            for at in range(0, len(data), PAGE):
                theirs[(segment["p_vaddr"] + at) // PAGE] = data[at : at + PAGE]
        ours = {
            extent.first_gfn + number: page.tobytes()
            for extent in image.extents
            for number, page in enumerate(extent.pages)
        }
        assert ours == theirs
        assert len(ours) == result.pages


def test_gcore_has_the_same_pages(process: Child, tmp_path: Path) -> None:
    if not shutil.which("gcore"):
        if "gdb" in os.environ.get("MEMSHR_REQUIRE", "").split(","):
            pytest.fail("MEMSHR_REQUIRE has gdb, and there is no gcore")
        pytest.skip("gdb is not installed: no gcore to compare with")
    address = process.ask("anonymous(3000, 1, 2000)")
    # gdb stops the process while it reads; ours was taken before, and the process has only waited for a line since.
    result = capture_process(process.pid, tmp_path / "ours.core")
    subprocess.run(["gcore", "-a", "-o", tmp_path / "gdb", str(process.pid)], check=True, capture_output=True)
    with open_image(tmp_path / "ours.core") as ours, open_image(tmp_path / f"gdb.{process.pid}") as theirs:
        assert first_words(theirs, address, 2001) == [*range(1, 2001), 0]
        common = different = 0
        for extent in ours.extents:
            for number, page in enumerate(extent.pages):
                other = page_at(theirs, (extent.first_gfn + number) * PAGE)
                if other is not None:
                    common += 1
                    different += other != page.tobytes()
        # gdb itself changes a page or two (breakpoints of the dynamic linker), and leaves out what it takes for text.
        assert common >= 2000
        assert different <= 4
        assert result.pages >= common


def left_in(directory: Path) -> list[str]:
    return sorted(path.name for path in directory.iterdir())


def test_limit_is_kept_before_anything_is_written(process: Child, tmp_path: Path) -> None:
    process.ask("anonymous(1024, 1, 1024)")
    with pytest.raises(ImageError, match=rf"pid:{process.pid}: \d+ bytes .* the limit is 4194304; raise the limit"):
        capture_process(process.pid, tmp_path / "p.core", limit_bytes=4 * MIB)
    assert left_in(tmp_path) == []
    capture_process(process.pid, tmp_path / "p.core", limit_bytes=400 * MIB)


def test_process_that_dies_meanwhile_leaves_nothing(process: Child, tmp_path: Path) -> None:
    process.ask("anonymous(20000, 1, 20000)")
    (tmp_path / "p.core").write_text("an older capture")

    def kill(done_bytes: int, total_bytes: int) -> None:
        if done_bytes:
            process.kill()

    with pytest.raises(ImageError, match="has exited"):
        capture_process(process.pid, tmp_path / "p.core", progress=kill)
    assert left_in(tmp_path) == ["p.core"]
    assert (tmp_path / "p.core").read_text() == "an older capture"


@pytest.mark.parametrize("error", [KeyboardInterrupt, BrokenPipeError])
def test_interruption_leaves_nothing_and_comes_through(
    process: Child, tmp_path: Path, error: type[BaseException]
) -> None:
    def interrupt(done_bytes: int, total_bytes: int) -> None:
        raise error

    with pytest.raises(error):
        capture_process(process.pid, tmp_path / "p.core", progress=interrupt)
    assert left_in(tmp_path) == []


def test_file_size_limit_leaves_nothing(process: Child, tmp_path: Path) -> None:
    process.ask("anonymous(8192, 1, 8192)")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (8 * MIB, hard))
    try:
        with pytest.raises(BackendError, match="no room for the core: File too large") as caught:
            capture_process(process.pid, tmp_path / "p.core")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert caught.value.exit_code == 3
    assert isinstance(caught.value.__cause__, OSError)
    assert caught.value.__cause__.errno == errno.EFBIG
    assert left_in(tmp_path) == []


_ON_A_SMALL_DISK = """
import os, sys
from pathlib import Path
from child_process import child
from memshr.errors import BackendError
from memshr.images.capture import capture_process

directory = Path(sys.argv[1])

def attempt(progress=None):
    try:
        capture_process(process.pid, directory / "p.core", progress=progress)
    except BackendError as error:
        print(error.exit_code, error)
    print(sorted(os.listdir(directory)))

def fill(done_bytes, total_bytes):
    if done_bytes and not (directory / "other").exists():
        with open(directory / "other", "wb") as file:
            file.truncate(64 << 20)
            os.posix_fallocate(file.fileno(), 0, os.statvfs(directory).f_bavail * 4096)

with child() as process:
    process.ask("anonymous(12288, 1, 12288)")
    attempt(fill)
    (directory / "other").unlink()
    process.ask("anonymous(12288, 1, 12288)")
    attempt()
"""


def test_full_disk_leaves_nothing(tmp_path: Path) -> None:
    mount = f"mount -t tmpfs -o size=80m memshr-test {tmp_path} && exec "
    privileges = [] if not os.getuid() else ["--user", "--map-root-user"]
    command = ["unshare", *privileges, "--mount", "sh", "-c", mount + '"$0" "$@"']
    if subprocess.run([*command, "true"], capture_output=True, check=False).returncode:
        if "mount" in os.environ.get("MEMSHR_REQUIRE", "").split(","):
            pytest.fail("MEMSHR_REQUIRE has mount, and no small file system can be mounted")
        pytest.skip("no small file system can be mounted here (unshare --mount is refused)")
    output = subprocess.run(
        [*command, sys.executable, "-c", _ON_A_SMALL_DISK, tmp_path],
        env={**os.environ, "PYTHONPATH": os.fspath(Path(__file__).parents[1])},
        capture_output=True,
        text=True,
        check=True,
    ).stdout.splitlines()
    assert "no room for the core: No space left on device; make room" in output[0]
    assert output[1] == "['other']"
    assert "bytes to write" in output[2]
    assert output[3] == "[]"
    assert [line[:2] for line in output[::2]] == ["3 ", "3 "]


def test_output_that_cannot_be_written(process: Child, tmp_path: Path) -> None:
    def refusal(path: Path | str) -> str:
        with pytest.raises(ImageError) as caught:
            capture_process(process.pid, path)
        assert "\n" not in str(caught.value)
        return str(caught.value)

    assert "No such file or directory" in refusal(tmp_path / "missing" / "p.core")
    assert "no regular file" in refusal(tmp_path)
    assert "no regular file" in refusal("/dev/null")
    assert Path("/dev/null").is_char_device()
    assert "null byte" in refusal("nul\0byte")
    assert "cannot be written" in refusal(tmp_path / ("n" * 300))
    assert left_in(tmp_path) == []


def test_output_replaces_a_file_through_a_link(process: Child, tmp_path: Path) -> None:
    (tmp_path / "real").write_text("old")
    (tmp_path / "link").symlink_to("real")
    capture_process(process.pid, tmp_path / "link")
    assert left_in(tmp_path) == ["link", "real"]
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").stat().st_mode & 0o777 == 0o600
    with open_image(tmp_path / "real") as image:
        assert image.total_pages


def test_too_many_runs_are_joined_over_gaps_that_read_as_zeros(
    process: Child, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    scattered = process.ask("every_other(2000, 1)")
    monkeypatch.setattr("memshr.images.capture._MAX_RUNS", 500)
    capture_process(process.pid, tmp_path / "p.core")
    with open_image(tmp_path / "p.core") as image:
        assert len(image.extents) <= 500
        words = first_words(image, scattered, 1999)
        assert words[::2] == list(range(1, 2000, 2))
        assert words[1::2].count(0) >= 500
        assert set(words[1::2]) <= {0, None}


def test_smallest_gaps_are_filled_first_and_only_inside_a_mapping() -> None:
    parts = [[[0, 1], [4, 5], [6, 7], [9, 10]], [], [[10, 12], [15, 16]]]
    runs = [np.array(part, dtype=np.int64).reshape(-1, 2) for part in parts]
    assert _planned_runs(runs, 6).tolist() == [*parts[0], *parts[2]]
    assert _planned_runs(runs, 5).tolist() == [[0, 1], [4, 7], [9, 10], [10, 12], [15, 16]]
    assert _planned_runs(runs, 4).tolist() == [[0, 1], [4, 10], [10, 12], [15, 16]]
    assert _planned_runs(runs, 1).tolist() == [[0, 10], [10, 16]]
    assert _planned_runs([], 1).shape == (0, 2)


def test_no_such_process(tmp_path: Path) -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    with pytest.raises(ImageError, match="no such process"):
        capture_process(ended.pid, tmp_path / "p.core")
    assert left_in(tmp_path) == []
