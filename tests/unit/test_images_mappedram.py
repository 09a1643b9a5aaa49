"""mapped-ram migration files, written field by field, and the migration streams that are none."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest

from memshr.errors import ImageError
from memshr.images import MemoryImage, open_image
from memshr.pagesource import PageState
from odd_cores import pattern, write
from odd_dumps import PAGE, Block, configuration, mapped_ram, subsection
from peak_memory import peak_growth_bytes


def words(image: MemoryImage) -> list[int]:
    """The first word of each page, by ``read_run``."""
    out = np.empty((image.total_pages, PAGE), np.uint8)
    image.read_run(0, out)
    return [int(word) for word in out.view(np.uint64)[:, 0]]


def words_of(image: MemoryImage, rows: list[int]) -> list[int]:
    """The first words of these rows, by ``read``."""
    out = np.empty((len(rows), PAGE), np.uint8)
    image.read(np.array(rows), out)
    return [int(word) for word in out.view(np.uint64)[:, 0]]


RAM = Block("pc.ram", 200, {0: pattern(1), 1: pattern(2), 63: pattern(3), 64: pattern(4), 199: pattern(5)})
VIDEO = Block("0000:00:02.0/vga.vram", 4, {0: pattern(90)})
ROM = Block("pc.rom", 2, {1: pattern(91)})


def test_pages_are_where_the_bitmap_says_and_zero_elsewhere(tmp_path: Path) -> None:
    ram = dataclasses.replace(RAM, stale={2: pattern(77), 100: pattern(78)})
    with open_image(write(tmp_path / "state", mapped_ram([ram]))) as image:
        assert (image.format, image.ranges.tolist()) == ("mapped-ram", [[0, 200]])
        wanted = {0: 1, 1: 2, 63: 3, 64: 4, 199: 5}
        assert words(image) == [wanted.get(page, 0) for page in range(200)]
        stored = image.states(0, 200) == PageState.STORED
        assert set(np.flatnonzero(stored).tolist()) == set(wanted)
        assert [int(page) for extent in image.extents for page in extent.pages.view(np.uint64)[:, 0]] == words(image)


def test_memory_of_devices_is_left_out(tmp_path: Path) -> None:
    blocks = [VIDEO, Block("system.flash0", 2, {}), Block("/rom@etc/acpi/tables", 2, {0: pattern(9)}), RAM, ROM]
    with open_image(write(tmp_path / "state", mapped_ram(blocks))) as image:
        assert image.total_pages == 200
        assert words(image)[:2] == [1, 2]


def test_ram_of_several_blocks(tmp_path: Path) -> None:
    blocks = [Block("dimm1", 3, {0: pattern(50)}), VIDEO, Block("pc.ram", 2, {1: pattern(60)})]
    with open_image(write(tmp_path / "state", mapped_ram(blocks))) as image:
        assert image.ranges.tolist() == [[0, 5]]
        assert words(image) == [0, 60, 50, 0, 0]


@pytest.mark.parametrize(
    ("machine", "below_mib"),
    [("pc-i440fx-9.0", 3072), ("pc-q35-9.1", 2048), ("microvm", 4096)],
)
def test_ram_beyond_the_hole_begins_at_4_gib(tmp_path: Path, machine: str, below_mib: int) -> None:
    length, below = 4 << 18, below_mib << 8
    path = tmp_path / "state"
    head = mapped_ram([Block("pc.ram", 8, {})], configuration(machine), total_bytes=length * PAGE)
    # The same header for a block of 4 GiB, whose bitmap has the first and last page and those around the hole.
    place = head.index(b"\x06pc.ram") + 7
    bitmap = bytearray(length // 8)
    pages = sorted({0, below - 1, below % length, length - 1})
    for page in pages:
        bitmap[page // 8] |= 1 << page % 8
    with path.open("wb") as file:
        file.write(head[:place])
        bitmap_offset = place + 8 + 28
        file.write(struct.pack(">QIQQQ", length * PAGE, 1, PAGE, bitmap_offset, 1 << 20) + bitmap)
        for page in pages:
            file.seek((1 << 20) + page * PAGE)
            file.write(pattern(page + 1))
        file.seek((1 << 20) + length * PAGE)
        file.write(bytes(13))
    with open_image(path) as image:
        gaps = [[0, below], [1 << 20, length - below]] if below < length else [[0, length]]
        assert image.ranges.tolist() == gaps
        assert words_of(image, pages) == [page + 1 for page in pages]


def test_sparse_file_of_8_tib_takes_no_memory(tmp_path: Path) -> None:
    length = 8 << 40
    path = tmp_path / "state"
    head = mapped_ram([Block("pc.ram", 8, {})], total_bytes=length)
    place = head.index(b"\x06pc.ram") + 7
    pages_offset = 1 << 30
    with path.open("wb") as file:
        file.write(head[:place] + struct.pack(">QIQQQ", length, 1, PAGE, place + 36, pages_offset) + b"\1")
        file.truncate(pages_offset + length)
        file.seek(pages_offset)
        file.write(pattern(5))

    def look() -> None:
        with open_image(path) as image:
            assert image.total_pages == length // PAGE
            assert len(image.runs) == 3
            assert words_of(image, [0, 1, 1 << 30]) == [5, 0, 0]

    assert peak_growth_bytes(look) < 32 << 20


def test_parts_of_the_configuration_and_commands_are_passed_over(tmp_path: Path) -> None:
    before = configuration(
        more=subsection("configuration/target-page-bits", struct.pack(">I", 12))
        + subsection("configuration/uuid", bytes(16))
        + b"\x08\x00\x04\x00\x04ping"
    )
    with open_image(write(tmp_path / "state", mapped_ram([RAM], before))) as image:
        assert image.total_pages == 200


def other_section(name: bytes) -> bytes:
    return b"\1" + struct.pack(">I", 2) + bytes([len(name)]) + name + struct.pack(">II", 0, 4)


REFUSED: dict[str, tuple[bytes, str]] = {
    "plain stream": (mapped_ram([RAM], configuration(capabilities=())), "migration stream without mapped-ram"),
    "no configuration": (mapped_ram([RAM], b""), "migration stream without mapped-ram"),
    "shared memory left out": (
        mapped_ram([RAM], configuration(capabilities=("mapped-ram", "x-ignore-shared"))),
        "x-ignore-shared",
    ),
    "version": (mapped_ram([RAM], start=b"QEVM\0\0\0\2"), "migration stream of version 2"),
    "long machine name": (mapped_ram([RAM], b"\x07\xff\xff\xff\xff"), "machine type of 4294967295 bytes"),
    "many capabilities": (
        mapped_ram([RAM], configuration(more=subsection("configuration/capabilities", b"\xff" * 4))),
        "4294967295 capabilities",
    ),
    "large pages": (
        mapped_ram([RAM], configuration(more=subsection("configuration/target-page-bits", b"\0\0\0\x10"))),
        "pages of 2**16 bytes",
    ),
    "unknown part": (mapped_ram([RAM], configuration(more=subsection("configuration/x", b""))), "'configuration/x'"),
    "device first": (mapped_ram([RAM], section=other_section(b"timer")), "a section named 'timer' comes before"),
    "end first": (mapped_ram([RAM], section=b"\0"), "something of type 0 comes before"),
    "no list": (mapped_ram([RAM], flags=8), "the list of memory blocks is missing"),
    "absurd total": (mapped_ram([RAM], total_bytes=1 << 60), "1152921504606846976 bytes of memory"),
    "more in the list than in all": (mapped_ram([RAM], total_bytes=PAGE), "memory block 'pc.ram' of 819200 bytes"),
    "less in the list than in all": (mapped_ram([RAM], total_bytes=201 * PAGE), "truncated: a mapped-ram header"),
    "empty block": (mapped_ram([dataclasses.replace(RAM, used_bytes=0)]), "'pc.ram' of 0 bytes"),
    "odd block": (mapped_ram([dataclasses.replace(RAM, used_bytes=5000)]), "'pc.ram' of 5000 bytes"),
    "header version": (mapped_ram([dataclasses.replace(RAM, version=2)]), "mapped-ram of version 2"),
    "page size": (mapped_ram([dataclasses.replace(RAM, page_size=65536)]), "pages of 65536 bytes"),
    "bitmap beyond the end": (mapped_ram([dataclasses.replace(RAM, bitmap_offset=1 << 40)]), "truncated: the bitmap"),
    "bitmap at the highest offset": (
        mapped_ram([dataclasses.replace(RAM, bitmap_offset=(1 << 64) - 1)]),
        "truncated: the bitmap of memory block 'pc.ram'",
    ),
    "pages beyond the end": (mapped_ram([dataclasses.replace(RAM, pages_offset=1 << 40)]), "truncated: memory block"),
    "pages at the highest offset": (
        mapped_ram([dataclasses.replace(RAM, pages_offset=(1 << 64) - PAGE)]),
        "truncated: memory block",
    ),
    "pages before the header": (mapped_ram([dataclasses.replace(RAM, pages_offset=0)]), "before its header"),
    "devices only": (mapped_ram([VIDEO, ROM]), "holds no RAM"),
}


@pytest.mark.parametrize(("contents", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_reason_and_remedy(tmp_path: Path, contents: bytes, message: str) -> None:
    path = write(tmp_path / "state", contents)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_magic_is_asked_for_when_the_format_is_forced(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="magic number is missing"):
        open_image(write(tmp_path / "raw", bytes(PAGE)), format="mapped-ram")


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    contents = mapped_ram([RAM, VIDEO])
    head = contents.index(b"\x06pc.ram") + 7 + 8 + 28 + 32
    second = contents.index(b"\x15" + VIDEO.name.encode()) + 22 + 8 + 28 + 8
    pages = {(1 << 20) + number * PAGE for number in (0, 1, 100, 199, 200)}
    for size in sorted({*range(4, head + 2), *pages, *range(second - 70, second + 2), (2 << 20) + 4 * PAGE - 1}):
        write(tmp_path / "state", contents[:size])
        with pytest.raises(ImageError, match="truncated"):
            open_image(tmp_path / "state")
