"""ELF cores: what is a page of them, and what is refused."""

import dataclasses
import struct
from pathlib import Path

import numpy as np
import pytest

from memshr.errors import ImageError
from memshr.images import MemoryImage, open_image
from memshr.images.elfcore import CoreWriter
from odd_cores import PAGE, Header, Segment, core, pattern, write


def layout(image: MemoryImage) -> list[tuple[int, int]]:
    return [(extent.first_gfn, len(extent.pages)) for extent in image.extents]


def words(image: MemoryImage) -> list[int]:
    """The first word of each page: what ``pattern`` filled it with."""
    return [int(word) for extent in image.extents for word in extent.pages.view(np.uint64)[:, 0]]


def test_machine_core_with_holes_and_unaligned_offsets(tmp_path: Path) -> None:
    contents = core(
        [
            Segment(kind=4, data=b"a note"),
            Segment(vaddr=0xFFFF << 48, paddr=0, data=pattern(1, 2)),
            Segment(paddr=0x10_0000, data=pattern(3, 3)),
            Segment(paddr=0xFFFC_0000, data=pattern(6)),
        ],
        gap_bytes=13,
    )
    with open_image(write(tmp_path / "dump", contents)) as image:
        assert image.format == "elfcore"
        assert image.total_pages == 6
        assert layout(image) == [(0, 2), (0x100, 3), (0xFFFC0, 1)]
        assert words(image) == [1, 2, 3, 4, 5, 6]
        assert b"".join(extent.pages.tobytes() for extent in image.extents) == pattern(1, 6)


def test_segments_come_out_in_order_of_address_and_joined_where_they_go_on(tmp_path: Path) -> None:
    contents = core(
        [
            Segment(paddr=0x9000, data=pattern(9)),
            Segment(paddr=0x1000, data=pattern(1, 2)),
            Segment(paddr=0x3000, data=pattern(3)),  # goes on in address and in file
            Segment(paddr=0x5000, data=pattern(5)),
            Segment(paddr=0x4000, data=pattern(4)),  # goes on in address only
        ]
    )
    with open_image(write(tmp_path / "dump", contents)) as image:
        assert layout(image) == [(1, 3), (4, 1), (5, 1), (9, 1)]
        assert words(image) == [1, 2, 3, 4, 5, 9]


def test_process_core_goes_by_virtual_address_and_leaves_vsyscall_out(tmp_path: Path) -> None:
    contents = core(
        [
            Segment(vaddr=0x5555_5555_4000, data=pattern(1, 2)),
            Segment(vaddr=0x7FFF_F7FC_0000, memsz=8 * PAGE),
            Segment(vaddr=0x7FFF_FFFD_E000, data=pattern(3), memsz=3 * PAGE),
            Segment(vaddr=0xFFFF_FFFF_FF60_0000, data=pattern(4)),
        ]
    )
    with open_image(write(tmp_path / "core", contents)) as image:
        assert layout(image) == [(0x5555_5555_4, 2), (0x7FFF_FFFD_E, 1)]
        assert words(image) == [1, 2, 3]


def test_highest_guest_physical_page_is_taken(tmp_path: Path) -> None:
    contents = core([Segment(paddr=(1 << 48) - PAGE, data=pattern(1))])
    with open_image(write(tmp_path / "dump", contents)) as image:
        assert layout(image) == [((1 << 36) - 1, 1)]


def test_dump_of_a_guest_in_real_mode_is_a_64_bit_core_of_the_32_bit_machine(tmp_path: Path) -> None:
    contents = core([Segment(paddr=0x1000, data=pattern(1))], Header(machine=3))
    with open_image(write(tmp_path / "dump", contents)) as image:
        assert layout(image) == [(1, 1)]


def many_segments(count: int) -> bytes:
    """A core with so many program headers that section header 0 has to say how many; every other page is there."""
    start = 64 + 64 + 56 * count
    section = struct.pack("<IIQQQQIIQQ", 0, 0, 0, 0, 0, 1, 0, count, 0, 0)
    table = b"".join(
        struct.pack("<IIQQQQQQ", 1, 4, start + number * PAGE, number * 2 * PAGE, 0, PAGE, PAGE, PAGE)
        for number in range(count)
    )
    header = Header(phoff=128, phnum=0xFFFF, shoff=64).packed(0)
    return header + section + table


def test_more_segments_than_the_header_can_count(tmp_path: Path) -> None:
    path = write(tmp_path / "core", many_segments(70_000))
    with path.open("r+b") as file:
        file.truncate(path.stat().st_size + 70_000 * PAGE)
        file.seek(-PAGE, 2)
        file.write(pattern(7))
    with open_image(path) as image:
        assert image.total_pages == len(image.extents) == 70_000
        assert image.extents[-1].first_gfn == 2 * 69_999
        assert image.extents[-1].pages.tobytes() == pattern(7)


def test_writer_output_of_many_segments_is_read_again(tmp_path: Path) -> None:
    page = np.frombuffer(pattern(5), dtype=np.uint8).reshape(1, PAGE)
    path = tmp_path / "core"
    with path.open("wb") as file:
        writer = CoreWriter(file)
        for number in range(65_535):
            writer.add(number * 2 * PAGE, page)
        size = writer.finish()
    assert size == path.stat().st_size
    with open_image(path) as image:
        assert image.total_pages == len(image.extents) == 65_535
        assert all((extent.pages == page).all() for extent in image.extents)


ONE = Segment(paddr=0x4000, data=pattern(1, 2))

REFUSED = {
    "32 bit": (core([ONE], Header(elf_class=1)), "not 64-bit", 4),
    "big-endian": (core([ONE], Header(data=2)), "not little-endian", 5),
    "executable": (core([ONE], Header(kind=2)), "no core: the file is an executable", 16),
    "shared library": (core([ONE], Header(kind=3)), "no core: the file is a shared library", 16),
    "other machine": (core([ONE], Header(machine=183)), "arm64", 18),
    "strange entry size": (core([ONE], Header(phentsize=32)), "program headers of 32 bytes, expected 56", 54),
    "no segment": (core([]), "holds no memory", None),
    "only notes": (core([Segment(kind=4, data=b"note")]), "holds no memory", None),
    "nothing in the file": (core([Segment(vaddr=0x1000, memsz=PAGE)]), "holds no memory", None),
    "only beyond 2**48": (core([Segment(vaddr=1 << 48, data=pattern(1))]), "holds no memory", None),
    "table beyond the end": (core([ONE], Header(phoff=1 << 20)), "truncated: the table of 1 program", 1 << 20),
    "table at the highest offset": (core([ONE], Header(phoff=(1 << 64) - 1)), "truncated", (1 << 64) - 1),
    "more entries than the file": (
        core([ONE], Header(phnum=60_000)),
        "truncated: the table of 60000",
        64,
    ),
    "count missing": (core([ONE], Header(phnum=0xFFFF)), "no section header that says how many", 40),
    "section header beyond the end": (core([ONE], Header(phnum=0xFFFF, shoff=1 << 40)), "truncated", 1 << 40),
    "absurd count": (
        core([dataclasses.replace(ONE, data=b"\xff" * 2 * PAGE)], Header(phnum=0xFFFF, shoff=64 + 56)),
        "4294967295 program headers; memshr reads at most 1048576",
        None,
    ),
    "segment beyond the end": (
        core([ONE, Segment(paddr=0x9000, data=pattern(3), offset=9000)]),
        "program header 1: truncated",
        64 + 56,
    ),
    "size that overflows": (
        core([dataclasses.replace(ONE, filesz=(1 << 64) - PAGE, memsz=(1 << 64) - PAGE)]),
        "program header 0: truncated",
        64,
    ),
    "offset that overflows": (core([dataclasses.replace(ONE, offset=(1 << 64) - PAGE)]), "truncated", 64),
    "more in the file than in memory": (core([dataclasses.replace(ONE, memsz=PAGE)]), "more bytes in the file", 64),
    "end beyond 2**48": (
        core([dataclasses.replace(ONE, paddr=(1 << 48) - PAGE)]),
        "beyond the highest guest physical address",
        64,
    ),
    "unaligned address": (core([dataclasses.replace(ONE, paddr=0x4100)]), "not made of whole pages", 64),
    "unaligned size": (core([dataclasses.replace(ONE, filesz=PAGE + 1)]), "not made of whole pages", 64),
    "overlapping": (core([ONE, Segment(paddr=0x5000, data=pattern(9))]), "program header 1: it overlaps", 120),
    "same address twice": (core([ONE, Segment(paddr=0x4000, data=pattern(9))]), "overlaps another", 120),
    "contained": (
        core([Segment(paddr=0x6000, data=pattern(9)), Segment(paddr=0x4000, data=pattern(1, 9))]),
        "program header 0: it overlaps",
        64,
    ),
    "same bytes twice": (
        core([ONE, Segment(paddr=0x10_0000, data=pattern(3, 2), offset=64 + 2 * 56 + PAGE)]),
        "bytes of the file in common",
        120,
    ),
}


@pytest.mark.parametrize(("contents", "message", "offset"), REFUSED.values(), ids=REFUSED)
def test_refused_with_place_and_reason(tmp_path: Path, contents: bytes, message: str, offset: int | None) -> None:
    path = write(tmp_path / "dump", contents)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy
    assert caught.value.offset == offset
    assert caught.value.exit_code == 2


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    contents = core([Segment(kind=4, data=b"note"), Segment(paddr=0x1000, data=pattern(1, 2))])
    path = tmp_path / "dump"
    for size in (*range(4, 64 + 2 * 56 + 8), len(contents) - PAGE, len(contents) - 1):
        write(path, contents[:size])
        with pytest.raises(ImageError, match="truncated"):
            open_image(path)
