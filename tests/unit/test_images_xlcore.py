"""xl dump-core: what is a page of it, what is refused, and that pyelftools finds the same in it."""

import io
import struct
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from elftools.elf.elffile import ELFFile

from image_writers import NO_FRAME, XlCore, note
from memshr.errors import ImageError
from memshr.images import MemoryImage, open_image
from odd_cores import PAGE, pattern, write

RANGES = [(0x10, pattern(16, 3)), (0, pattern(0, 2)), (0xFEFFC, pattern(90))]
HVM = XlCore(RANGES)
PV = replace(HVM, pv=True)


def contents(image: MemoryImage) -> dict[int, bytes]:
    """gfn -> its page, read as an estimate reads."""
    out = np.empty((image.total_pages, PAGE), np.uint8)
    assert image.read_run(0, out).all()
    gfns = np.concatenate([np.arange(first, first + count) for first, count in image.ranges.tolist()])
    return dict(zip(gfns.tolist(), map(bytes, out), strict=True))


EXPECTED = {gfn + n: data[n * PAGE : (n + 1) * PAGE] for gfn, data in RANGES for n in range(len(data) // PAGE)}


@pytest.mark.parametrize("dump", [HVM, PV], ids=["hvm", "pv"])
def test_pages_come_out_by_their_frame_numbers(tmp_path: Path, dump: XlCore) -> None:
    with open_image(write(tmp_path / "core", dump.packed())) as image:
        assert image.format == "xl-core"
        assert image.ranges.tolist() == [[0, 2], [0x10, 3], [0xFEFFC, 1]]
        assert contents(image) == EXPECTED
        assert [(extent.first_gfn, extent.pages.tobytes()) for extent in image.extents] == [
            (0, pattern(0, 2)),
            (0x10, pattern(16, 3)),
            (0xFEFFC, pattern(90)),
        ]


@pytest.mark.parametrize("dump", [HVM, PV], ids=["hvm", "pv"])
def test_pyelftools_finds_the_same_pages(tmp_path: Path, dump: XlCore) -> None:
    packed = dump.packed()
    elf = ELFFile(io.BytesIO(packed))
    assert elf.num_segments() == 0
    sections: dict[str, Any] = {section.name: section for section in elf.iter_sections()}
    pages = sections[".xen_pages"].data()
    pfns = np.frombuffer(sections[".xen_p2m" if dump.pv else ".xen_pfn"].data(), "<u8")[:: 2 if dump.pv else 1].tolist()
    notes = [(row["n_name"], int(row["n_type"])) for row in sections[".note.Xen"].iter_notes()]
    assert notes == [("Xen", 0x2000000 + kind) for kind in range(4)]
    with open_image(write(tmp_path / "core", packed)) as image:
        assert contents(image) == {pfn: pages[n * PAGE : (n + 1) * PAGE] for n, pfn in enumerate(pfns)}


@pytest.mark.parametrize("dump", [HVM, PV], ids=["hvm", "pv"])
def test_pages_without_a_frame_are_left_out(tmp_path: Path, dump: XlCore) -> None:
    with open_image(write(tmp_path / "core", replace(dump, padding_pages=5).packed())) as image:
        assert contents(image) == EXPECTED


def test_other_elf_cores_are_not_claimed(tmp_path: Path) -> None:
    dump = HVM.packed()
    with_segment = dump[:56] + struct.pack("<H", 1) + dump[58:]
    with pytest.raises(ImageError, match="program headers of 0 bytes"):  # by elfcore
        open_image(write(tmp_path / "core", with_segment))


REFUSED = {
    "big-endian": (replace(HVM, data=2), "not little-endian"),
    "other machine": (replace(HVM, machine=183), "another machine than x86"),
    "no pages": (replace(HVM, without=frozenset({".xen_pages"})), "no section .xen_pages"),
    "no table": (replace(HVM, without=frozenset({".xen_pfn"})), "no section .xen_pfn"),
    "no notes": (replace(HVM, without=frozenset({".note.Xen"})), "no section .note.Xen"),
    "table of the other kind": (replace(HVM, magic=0xF00FEBED), "no section .xen_p2m"),
    "unknown kind": (replace(HVM, magic=0xF00FEBEF), "0xf00febef is no kind of guest"),
    "version 1.0": (replace(HVM, version=1 << 32), "not supported: version 1.0"),
    "large pages": (replace(HVM, page_size=1 << 14), "pages of 16384 bytes"),
    "header note too short": (
        replace(HVM, notes=note(b"Xen", 0x2000003, bytes(8)) + note(b"Xen", 0x2000001, bytes(24))),
        "the note with Xen's header is missing or too short",
    ),
    "note of a stranger": (replace(HVM, notes=note(b"Xin", 0x2000003, bytes(8))), "note with the format's version"),
    "note beyond its section": (
        replace(HVM, notes=struct.pack("<III", 4, 1 << 31, 0x2000003) + b"Xen\0"),
        "note with the format's version",
    ),
    "notes of 4 GiB": (replace(HVM, replace={".note.Xen": (64, 1 << 32)}), "4294967296 bytes of notes"),
    "names of 4 GiB": (replace(HVM, replace={".shstrtab": (64, 1 << 32)}), "4294967296 bytes of section names"),
    "absurd count": (replace(HVM, nr_pages=1 << 60), "times 4096 are expected"),
    "one page less": (replace(HVM, nr_pages=5), ".xen_pages has 24576 bytes, 5 times 4096"),
    "short table": (replace(HVM, replace={".xen_pfn": (4096, 40)}), ".xen_pfn has 40 bytes, 6 times 8"),
    "pages beyond the end": (replace(HVM, replace={".xen_pages": (1 << 40, 6 * PAGE)}), "truncated: .xen_pages"),
    "table at the highest offset": (replace(HVM, replace={".xen_pfn": ((1 << 64) - 8, 48)}), "truncated: .xen_pfn"),
    "sections beyond the end": (replace(HVM, shoff=1 << 63), "truncated: the table of sections"),
    "more sections than the file": (replace(HVM, shnum=0xFFFF), "truncated: the table of sections"),
    "names in no section": (replace(HVM, shstrndx=99), "contradicts itself"),
    "strange section size": (replace(HVM, shentsize=40), "contradicts itself"),
    "a frame twice": (replace(HVM, ranges=[(5, pattern(1, 2)), (6, pattern(3))]), "a page would be there twice"),
    "a frame beyond 2**36": (replace(HVM, ranges=[(1 << 36, pattern(1))]), "frame number beyond 0x1000000000"),
    "a frame of almost all ones": (replace(HVM, ranges=[(NO_FRAME - 1, pattern(1))]), "frame number beyond"),
    "no frame": (replace(HVM, ranges=[], padding_pages=2), "holds no memory"),
    "nothing": (replace(HVM, ranges=[]), "holds no memory"),
}


@pytest.mark.parametrize(("dump", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_reason(tmp_path: Path, dump: XlCore, message: str) -> None:
    path = write(tmp_path / "core", dump.packed())
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_32_bit_dump_is_not_supported(tmp_path: Path) -> None:
    path = write(tmp_path / "core", replace(HVM, elf_class=1).packed())
    with pytest.raises(ImageError, match="not supported: this ELF file is not 64-bit"):
        open_image(path)
    with pytest.raises(ImageError, match="not supported: not 64-bit"):
        open_image(path, format="xl-core")


def test_truncated_anywhere_is_refused(tmp_path: Path) -> None:
    dump, path = HVM.packed(), tmp_path / "core"
    ends = {0x40 + 64 * number for number in range(8)} | {len(dump) - 6 * 8 - PAGE * number for number in range(7)}
    for size in sorted({size + step for size in ends for step in (-1, 0, 1)} | {64 + 200, len(dump) - 1}):
        if size < len(dump):
            write(path, dump[:size])
            with pytest.raises(ImageError, match="truncated"):
                open_image(path, format="xl-core")


def test_dump_of_one_large_hole_is_refused_at_once(tmp_path: Path) -> None:
    pages = 1 << 31  # 8 TiB, whose table alone has 16 GiB
    start = len(HVM.packed()) // PAGE * PAGE + PAGE
    dump = replace(
        HVM,
        nr_pages=pages,
        replace={".xen_pages": (start, pages * PAGE), ".xen_pfn": (start + pages * PAGE, pages * 8)},
    )
    path = write(tmp_path / "core", dump.packed())
    try:
        with path.open("r+b") as file:
            file.truncate(start + pages * (PAGE + 8))
    except OSError as error:
        pytest.skip(f"this file system has no files of 8 TiB: {error}")
    with pytest.raises(ImageError, match="a page would be there twice"):
        open_image(path)
