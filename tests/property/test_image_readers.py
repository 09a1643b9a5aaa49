"""Whatever a file holds, opening it raises ImageError or nothing, and every page of what opened can be read."""

import tempfile
from pathlib import Path

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from memshr.errors import ImageError
from memshr.images import MemoryImage, open_image
from memshr.indices import Row, of_kind
from memshr.pagesource import PageState
from memshr.types import MAX_GFN_BITS
from odd_cores import PAGE, Header, Segment, core, pattern
from odd_dumps import PACKERS, Block, Packed, flattened, in_pieces, kdump, mapped_ram, packed

INTERESTING = st.sampled_from(
    [0, 1, 7, PAGE, PAGE - 1, 1 << 31, (1 << 32) - 1, 1 << 36, 1 << 48, (1 << 63) - 1, 1 << 63, (1 << 64) - PAGE]
)
NUMBERS = INTERESTING | st.integers(0, (1 << 64) - 1) | st.integers(0, 16).map(lambda number: number * PAGE)
SEGMENTS = st.builds(
    Segment,
    vaddr=NUMBERS,
    paddr=NUMBERS,
    data=st.integers(0, 4).map(lambda count: pattern(1, count)),
    memsz=st.none() | NUMBERS,
    filesz=st.none() | NUMBERS,
    offset=st.none() | NUMBERS,
    kind=st.sampled_from([1, 1, 1, 4]),
)
HEADERS = st.builds(
    Header,
    phoff=st.just(64) | NUMBERS,
    phentsize=st.sampled_from([56, 56, 0, 32]),
    phnum=st.none() | st.sampled_from([0, 0xFFFE, 0xFFFF]),
    shoff=st.integers(0, 256) | NUMBERS,
)
GOOD = core(
    [
        Segment(kind=4, data=b"note"),
        Segment(paddr=0, data=pattern(1, 2)),
        Segment(paddr=0x10_0000, data=pattern(3)),
    ]
)


def open_and_read(contents: bytes) -> None:
    """Open the contents as a file; if they open, hold them against every promise and read them all."""
    with tempfile.TemporaryDirectory() as directory:
        path = Path(directory) / "image"
        path.write_bytes(contents)
        image: MemoryImage | None = None
        message = f"{path}: "
        try:
            image = open_image(path)
        except ImageError as error:
            message = str(error)
        assert message.startswith(f"{path}: ")
        assert "\n" not in message
        if image is None:
            return
        with image:
            end, total = 0, 0
            for extent in image.extents:
                assert extent.first_gfn >= end
                assert len(extent.pages)
                assert extent.pages.shape[1:] == (PAGE,)
                assert int(extent.pages.sum(dtype=np.int64)) >= 0
                extent.pages[:] = 0
                end, total = extent.end_gfn, total + len(extent.pages)
            assert end <= 1 << MAX_GFN_BITS
            assert image.total_pages == total
            if image.format in {"elfcore", "raw"}:
                assert total <= len(contents) // PAGE
            out = np.empty((min(total, 4096), PAGE), np.uint8)
            assert image.read_run(total - len(out), out).all()
            again = np.empty_like(out)
            assert image.read(of_kind(Row, np.arange(total - len(out), total)), again).all()
            assert np.array_equal(out, again)
            assert (out[image.states(total - len(out), len(out)) == PageState.HOLE] == 0).all()
        assert path.read_bytes() == contents


@given(st.binary(max_size=300))
def test_any_bytes(contents: bytes) -> None:
    open_and_read(contents)


@given(st.binary(max_size=200))
def test_any_bytes_behind_the_magic(contents: bytes) -> None:
    open_and_read(b"\x7fELF\x02\x01" + contents)


@given(st.lists(SEGMENTS, max_size=5), HEADERS, st.integers(0, 5))
def test_any_core(segments: list[Segment], header: Header, gap_bytes: int) -> None:
    open_and_read(core(segments, header, gap_bytes=gap_bytes))


@given(st.lists(st.tuples(st.integers(0, 64 + 3 * 56 - 1), st.integers(0, 255)), min_size=1, max_size=6))
def test_good_core_with_bytes_changed(changes: list[tuple[int, int]]) -> None:
    contents = bytearray(GOOD)
    for place, value in changes:
        contents[place] = value
    open_and_read(bytes(contents))


@given(st.integers(0, len(GOOD) - 1), st.integers(0, 64))
def test_good_core_with_a_piece_missing(start: int, length: int) -> None:
    open_and_read(GOOD[:start] + GOOD[start + length :])
    open_and_read(GOOD[:start])


PAGE_OF_WORDS = (b"some words " * 400)[:PAGE]
GOOD_KDUMP = kdump({gfn: packed(PAGE_OF_WORDS, way) for gfn, way in enumerate(PACKERS)} | {9: Packed(bytes(PAGE), 0)})
GOOD_MAPPED_RAM = mapped_ram([Block("pc.ram", 70, {0: pattern(1), 69: pattern(2)}), Block("pc.rom", 1, {})])
KDUMP_PLACES = (
    st.integers(0, 463) | st.integers(PAGE, PAGE + 104) | st.integers(3 * PAGE, 3 * PAGE + 8) | st.integers(4 * PAGE)
)
BYTES = st.integers(0, 255)


def changed(contents: bytes, changes: list[tuple[int, int]]) -> bytes:
    new = bytearray(contents)
    for place, value in changes:
        new[place % len(new)] = value
    return bytes(new)


@given(st.lists(st.tuples(KDUMP_PLACES, BYTES), max_size=6), st.none() | st.integers(100, 9000))
def test_good_kdump_with_bytes_changed(changes: list[tuple[int, int]], piece: int | None) -> None:
    contents = changed(GOOD_KDUMP, changes)
    open_and_read(contents if piece is None else flattened(in_pieces(contents, piece)))


@given(st.lists(st.tuples(st.integers(0), BYTES), min_size=1, max_size=6), st.integers(100, 9000))
def test_flattened_kdump_with_bytes_changed(changes: list[tuple[int, int]], piece: int) -> None:
    open_and_read(changed(flattened(in_pieces(GOOD_KDUMP, piece)), changes))


@given(st.lists(st.tuples(st.integers(0, len(GOOD_KDUMP)), st.integers(0, 5000)), min_size=1, max_size=8))
def test_flattened_pieces_in_any_order_are_what_was_written_last(pieces: list[tuple[int, int]]) -> None:
    whole = [(0, bytes(len(GOOD_KDUMP))), (0, GOOD_KDUMP)]
    again = [
        (start, GOOD_KDUMP[start : start + length]) for start, length in pieces if GOOD_KDUMP[start : start + length]
    ]
    with tempfile.TemporaryDirectory() as directory:
        paths = [Path(directory) / name for name in ("plain", "pieces")]
        paths[0].write_bytes(GOOD_KDUMP)
        paths[1].write_bytes(flattened([*whole, *again]))
        with open_image(paths[0]) as plain, open_image(paths[1]) as pieced:
            found = [np.empty((plain.total_pages, PAGE), np.uint8) for _ in range(2)]
            plain.read_run(0, found[0])
            pieced.read_run(0, found[1])
            assert np.array_equal(found[0], found[1])


@given(st.lists(st.tuples(st.integers(0, 170) | st.integers(0), BYTES), min_size=1, max_size=6))
def test_good_mapped_ram_file_with_bytes_changed(changes: list[tuple[int, int]]) -> None:
    open_and_read(changed(GOOD_MAPPED_RAM, changes))
