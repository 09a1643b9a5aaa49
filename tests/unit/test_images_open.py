"""Opening any path at all, raw images, and what the mapping promises."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from memshr.errors import ImageError
from memshr.images import FORMATS, open_image
from odd_cores import PAGE, Header, Segment, core, pattern, write


def refusal(path: Path | str, format: str | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(path, format=format)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_raw_image_is_one_run_from_gfn_0(tmp_path: Path) -> None:
    with open_image(write(tmp_path / "raw", pattern(1, 3))) as image:
        assert (image.format, image.total_pages) == ("raw", 3)
        assert image.path == tmp_path / "raw"
        (extent,) = image.extents
        assert (extent.first_gfn, extent.end_gfn) == (0, 3)
        assert extent.pages.shape == (3, PAGE)
        assert extent.pages.dtype == np.uint8
        assert extent.pages.tobytes() == pattern(1, 3)
    assert not image.extents


def test_raw_needs_whole_pages(tmp_path: Path) -> None:
    assert "5000 bytes are not a multiple of 4096" in refusal(write(tmp_path / "raw", bytes(5000)))


def test_raw_larger_than_a_guest_can_be(tmp_path: Path) -> None:
    path = tmp_path / "raw"
    try:
        with path.open("wb") as file:
            file.truncate((1 << 48) + PAGE)
    except OSError:
        path = Path("/dev/shm") / f"memshr-test-{os.getpid()}"
        with path.open("wb") as file:
            file.truncate((1 << 48) + PAGE)
    try:
        refusal(path)  # by us, or by the kernel: the address space of a process is no larger than a guest's
    finally:
        path.unlink()


@pytest.mark.parametrize(
    ("magic", "what"),
    [(b"\x1f\x8b", "gzip"), (b"QFI\xfb", "qcow2"), (b"LibvirtQemudSave", "libvirt")],
)
def test_what_plainly_is_something_else_is_raw_only_on_request(tmp_path: Path, magic: bytes, what: str) -> None:
    path = write(tmp_path / "file", magic + bytes(PAGE - len(magic)))
    assert what in refusal(path)
    with open_image(path, format="raw") as image:
        assert image.total_pages == 1


def test_format_overrides_detection(tmp_path: Path) -> None:
    contents = core([Segment(paddr=0x1000, data=pattern(1))])
    path = write(tmp_path / "dump", contents + bytes(-len(contents) % PAGE))
    with open_image(path) as image:
        assert image.format == "elfcore"
    with open_image(path, format="raw") as image:
        assert image.total_pages == 2
    assert "no ELF file" in refusal(write(tmp_path / "raw", pattern(1)), format="elfcore")
    assert "known formats: xl-core, elfcore, kdump, mapped-ram, " in refusal(path, format="vhs")


def test_formats_have_names_of_their_own() -> None:
    assert len({row.name for row in FORMATS}) == len(FORMATS)
    assert FORMATS[-1].name == "raw"


def test_document_has_a_row_for_each_format() -> None:
    document = (Path(__file__).parents[2] / "docs" / "images.md").read_text()
    assert sorted(re.findall(r"^\| `([a-z][a-z0-9-]*)` \|", document, re.MULTILINE)) == sorted(
        row.name for row in FORMATS
    )


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    assert "No such file" in refusal(tmp_path / "missing")
    assert "empty" in refusal(write(tmp_path / "empty", b""))
    assert "a directory" in refusal(tmp_path)
    assert "a directory" in refusal("")
    assert "cannot be opened" in refusal("nul\0byte")
    assert "Not a directory" in refusal(tmp_path / "empty" / "below")
    loop = tmp_path / "loop"
    loop.symlink_to(loop)
    assert "cannot be opened" in refusal(loop)


def test_message_is_one_line_whatever_the_name(tmp_path: Path) -> None:
    refusal(tmp_path / "two\nlines")
    refusal(tmp_path / os.fsdecode(b"\xff\xfe")).encode()


def test_special_files_are_refused_at_once(tmp_path: Path) -> None:
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    assert "a fifo" in refusal(fifo)  # opening it for reading would wait for a writer
    assert "a character device" in refusal("/dev/zero")
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(os.fspath(tmp_path / "socket"))
        assert "a socket" in refusal(tmp_path / "socket")


def test_files_of_the_kernel_cannot_be_mapped() -> None:
    assert "empty" in refusal("/proc/self/maps")
    assert "cannot be mapped" in refusal("/sys/kernel/mm/transparent_hugepage/enabled")


def test_unreadable_file(tmp_path: Path) -> None:
    write(tmp_path / "raw", pattern(1)).chmod(0)
    tmp_path.chmod(0o755)
    # Root may read everything, so root becomes nobody first; the relative path spares nobody the way from / to here.
    program = (
        "import os\n"
        "from memshr.errors import ImageError\n"
        "from memshr.images import open_image\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: open_image('raw')\n"
        "except ImageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program]
    output = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout
    assert output == "raw: cannot be opened: Permission denied; run as a user who may read it\n"


@pytest.mark.parametrize("contents", [pattern(1, 4), core([Segment(paddr=0x1000, data=pattern(1, 4))], gap_bytes=5)])
def test_writes_stay_in_the_process(tmp_path: Path, contents: bytes) -> None:
    path = write(tmp_path / "image", contents)
    with open_image(path) as image, open_image(path) as other:
        pages = image.extents[0].pages
        pages[2] = 0xAA
        assert (pages[2] == 0xAA).all()
        assert pages[3].tobytes() == pattern(4)
        assert other.extents[0].pages[2].tobytes() == pattern(3)
        image.check_unchanged()
    assert path.read_bytes() == contents


def test_pages_outlive_close(tmp_path: Path) -> None:
    image = open_image(write(tmp_path / "raw", pattern(1, 2)))
    pages = image.extents[0].pages
    image.close()
    image.close()
    assert pages.tobytes() == pattern(1, 2)
    with pytest.raises(ValueError, match="closed"):
        image.check_unchanged()


def open_files(path: Path) -> int:
    return sum(link.readlink() == path for link in Path("/proc/self/fd").iterdir() if link.is_symlink())


def test_nothing_stays_open(tmp_path: Path) -> None:
    path = write(tmp_path / "raw", pattern(1, 2))
    image = open_image(path)
    assert open_files(path)
    image.close()
    assert not open_files(path)
    open_image(path)  # dropped without close
    assert not open_files(path)
    refusal(write(path, pattern(1) + b"x"))
    assert not open_files(path)


def test_change_of_the_file_is_found(tmp_path: Path) -> None:
    path = write(tmp_path / "raw", pattern(1, 4))
    with open_image(path) as image:
        image.check_unchanged()
        os.truncate(path, PAGE)
        with pytest.raises(ImageError, match="changed from 16384 to 4096 bytes"):
            image.check_unchanged()
    with open_image(path) as image:
        os.utime(path, ns=(1, 1))
        with pytest.raises(ImageError, match="was written"):
            image.check_unchanged()


def rss_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")


@pytest.mark.parametrize("shape", ["raw", "elfcore"])
def test_100_gib_open_without_memory(tmp_path: Path, shape: str) -> None:
    size = 100 << 30
    path = tmp_path / "huge"
    with path.open("wb") as file:
        if shape == "elfcore":
            data = Segment(paddr=0, filesz=size, memsz=size, offset=PAGE)
            file.write(core([data], Header()))
            file.truncate(size + PAGE)
        else:
            file.truncate(size)
        file.seek(-PAGE, os.SEEK_END)
        file.write(pattern(9))
    before = rss_bytes()
    with open_image(path) as image:
        assert (image.format, image.total_pages) == (shape, size // PAGE)
        assert rss_bytes() - before < 4 << 20
        pages = image.extents[0].pages
        assert pages[-1].tobytes() == pattern(9)
        pages[12_345_678] = 1
        assert rss_bytes() - before < 8 << 20
    assert path.stat().st_blocks * 512 < 1 << 20


def test_address_space_that_is_too_small(tmp_path: Path) -> None:
    path = tmp_path / "huge"
    with path.open("wb") as file:
        file.truncate(100 << 30)
    program = (
        "import resource, sys\n"
        "from memshr.errors import ImageError\n"
        "from memshr.images import open_image\n"
        "resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))\n"
        "try: open_image(sys.argv[1])\n"
        "except ImageError as error: print(error)\n"
    )
    command = [sys.executable, "-c", program, os.fspath(path)]
    output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith(f"{path}: cannot be mapped: Cannot allocate memory; raise ulimit -v")
