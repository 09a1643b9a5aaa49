"""kdump-compressed dumps: every packing, flattened or not, as libkdumpfile reads them, and what is refused."""

import dataclasses
import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import cramjam
import lzallright
import numpy as np
import pytest

from kdumpfile import KdumpFile, find_library
from memshr.errors import ImageError
from memshr.images import open_image
from memshr.pagesource import PageState
from odd_cores import pattern, write
from odd_dumps import (
    END,
    PACKERS,
    PAGE,
    KdumpHeader,
    Packed,
    flattened,
    in_pieces,
    kdump,
    packed,
)
from peak_memory import peak_growth_bytes

FORMS: dict[str, Callable[[bytes], bytes]] = {
    "in order": lambda contents: contents,
    "flattened": lambda contents: flattened(in_pieces(contents, 4096)),
    "flattened across pages": lambda contents: flattened(in_pieces(contents, 777)),
    "flattened backwards": lambda contents: flattened(in_pieces(contents, 5000)[::-1]),
}


def page(number: int) -> bytes:
    """A page that every packer makes smaller, different for each number."""
    rng = np.random.default_rng(number)
    return rng.bytes(96) * 42 + rng.bytes(PAGE - 96 * 42)


def pages_of(path: Path) -> dict[int, bytes]:
    """gfn -> page, by ``read_run``."""
    with open_image(path) as image:
        assert image.format == "kdump"
        out = np.empty((image.total_pages, PAGE), np.uint8)
        image.read_run(0, out)
        gfns = [gfn for first, count in image.ranges.tolist() for gfn in range(first, first + count)]
        return {gfn: row.tobytes() for gfn, row in zip(gfns, out, strict=True)}


GFNS = [0, 1, 2, 7, 8, 9, 4095, 40_000, 40_001]


@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("way", PACKERS)
def test_every_packing_in_every_form(tmp_path: Path, way: str, form: Callable[[bytes], bytes]) -> None:
    wanted = {gfn: page(gfn) for gfn in GFNS} | {5: bytes(PAGE), 6: bytes(PAGE)}
    dump = {gfn: packed(content, way) if any(content) else Packed(content, 0) for gfn, content in wanted.items()}
    assert way == "plain" or len(dump[7].data) < PAGE
    path = write(tmp_path / "dump", form(kdump(dump, left_out=[3, 50_000])))
    assert pages_of(path) == wanted
    with open_image(path) as image:
        states = image.states(0, image.total_pages)
        assert np.flatnonzero(states == PageState.HOLE).tolist() == [3, 4]
        assert [extent.first_gfn for extent in image.extents] == [0, 5, 4095, 40_000]


@pytest.mark.skipif(find_library() is None, reason="no libkdumpfile: install drgn's wheel, or libkdumpfile")
@pytest.mark.parametrize("form", ["in order", "flattened across pages"])
def test_libkdumpfile_reads_the_same_pages(tmp_path: Path, form: str) -> None:
    ways = [*PACKERS, "zlib"]
    dump = {gfn: packed(page(gfn), ways[gfn % len(ways)]) for gfn in GFNS} | {5: Packed(bytes(PAGE), 0)}
    path = write(tmp_path / "dump", FORMS[form](kdump(dump, left_out=[3])))
    ours = pages_of(path)
    with KdumpFile(path) as theirs:
        assert {gfn: theirs.page(gfn) for gfn in ours} == ours
        assert theirs.page(3) is None


def test_many_pages_in_many_batches(tmp_path: Path) -> None:
    gfns = [*range(0, 20_000, 2), *range(300_000, 309_000)]
    dump = {gfn: packed(pattern(gfn % 7000), "zlib") for gfn in gfns}
    found = pages_of(write(tmp_path / "dump", kdump(dump)))
    assert list(found) == gfns
    assert all(found[gfn] == pattern(gfn % 7000) for gfn in gfns)


def test_pages_that_lie_in_any_order(tmp_path: Path) -> None:
    dump = {gfn: packed(page(gfn), "zlib") for gfn in range(200)}
    order = np.random.default_rng(4).permutation(200).tolist()
    contents = kdump(dump, order=order)
    assert pages_of(write(tmp_path / "dump", contents)) == {gfn: page(gfn) for gfn in range(200)}


def test_piece_written_again_replaces_the_first(tmp_path: Path) -> None:
    contents = kdump({1: packed(page(1), "zlib"), 2: packed(page(2), "zlib")})
    # As makedumpfile does at its end: the headers come first with something else in them.
    pieces = [
        (0, bytes(100)),
        (PAGE, b"\xff" * PAGE),
        *in_pieces(contents, 3000),
        (0, contents[:50]),
        (10, contents[10:20]),
    ]
    assert pages_of(write(tmp_path / "dump", flattened(pieces))) == {1: page(1), 2: page(2)}


def test_bytes_that_no_piece_has_are_zeros(tmp_path: Path) -> None:
    contents = kdump({1: packed(page(1), "zlib")})
    pieces = [(0, contents[:464]), (PAGE, contents[PAGE : PAGE + 104]), (2 * PAGE, contents[2 * PAGE :])]
    assert pages_of(write(tmp_path / "dump", flattened(pieces))) == {1: page(1)}


def test_older_header_counts_page_frames_in_32_bits(tmp_path: Path) -> None:
    contents = kdump({1: packed(page(1), "zlib")}, KdumpHeader(version=5))
    contents = contents[: PAGE + 96] + bytes(8) + contents[PAGE + 104 :]
    assert pages_of(write(tmp_path / "dump", contents)) == {1: page(1)}


def test_sub_header_of_several_blocks(tmp_path: Path) -> None:
    contents = kdump({1: packed(page(1), "zlib")}, KdumpHeader(sub_blocks=3, vmcoreinfo=b"x" * 6000))
    assert pages_of(write(tmp_path / "dump", contents)) == {1: page(1)}


ONE = {1: packed(page(1), "zlib"), 4: packed(page(4), "lzo")}
TABLE = 4 * PAGE


def one_page(data: bytes, way: str) -> bytes:
    return kdump({1: Packed(data, PACKERS[way][0])})


def changed(contents: bytes, place: int, new: bytes) -> bytes:
    return contents[:place] + new + contents[place + len(new) :]


REFUSED: dict[str, tuple[bytes, str, int | None]] = {
    "big-endian": (changed(kdump(ONE), 8, b"\0\0\0\6"), "not supported: the dump is big-endian", 8),
    "version": (kdump(ONE, KdumpHeader(version=7)), "not supported: header version 7", 8),
    "32 bit": (
        changed(kdump(ONE, KdumpHeader(block_size=1)), 416, struct.pack("<i", PAGE)),
        "not supported: the dump is of a 32-bit machine",
        416,
    ),
    "large pages": (kdump(ONE, KdumpHeader(block_size=65536)), "not supported: blocks and pages of 65536 bytes", 428),
    "unfinished": (kdump(ONE, KdumpHeader(status=9)), "left unfinished", 424),
    "split": (kdump(ONE, KdumpHeader(split=1)), "one part of a dump that was split", PAGE + 12),
    "no sub header": (changed(kdump(ONE), 432, bytes(4)), "a sub header of 0 blocks", 432),
    "sub header far away": (changed(kdump(ONE), 432, b"\xff\xff\xff\x7f"), "truncated: the second bitmap", None),
    "one bitmap only": (kdump(ONE, KdumpHeader(bitmap_blocks=1)), "which need 2", 436),
    "bitmaps beyond the end": (kdump(ONE, KdumpHeader(bitmap_blocks=0xFFFFFFFE)), "truncated: the second", None),
    "no page frames": (kdump(ONE, KdumpHeader(max_mapnr=0)), "damaged: 0 page frames", PAGE + 96),
    "absurd page frames": (kdump(ONE, KdumpHeader(max_mapnr=(1 << 64) - 1)), "18446744073709551615 page", PAGE + 96),
    "no page": (kdump({}), "holds no memory", None),
    "more bits than descriptors": (
        changed(kdump(ONE, KdumpHeader(max_mapnr=8 * PAGE)), 3 * PAGE, b"\xff" * PAGE),
        "truncated: the descriptors of 32768 pages",
        TABLE,
    ),
    "page beyond the end": (kdump({**ONE, 9: Packed(b"x", 1, offset=1 << 40)}), "beyond the end", TABLE + 48),
    "highest offset": (kdump({1: Packed(b"x", 1, offset=(1 << 63) - 1)}), "beyond the end", TABLE),
    "negative offset": (kdump({1: Packed(b"x", 1, offset=-4096)}), "a negative offset", TABLE),
    "no bytes": (kdump({1: Packed(b"x", 1, size=0)}), "no size of a packed page", TABLE),
    "too many bytes": (kdump({1: Packed(b"x" * 8000, 1)}), "no size of a packed page", TABLE),
    "absurd size": (kdump({1: Packed(b"x", 1, size=0xFFFFFFFF)}), "no size of a packed page", TABLE),
    "plain and short": (kdump({1: Packed(b"x" * 4095, 0)}), "not packed, and no whole page", TABLE),
    "two packings": (kdump({1: Packed(b"x", 3)}), "packed in several ways", TABLE),
    "same place, other size": (
        kdump({1: ONE[1], 4: dataclasses.replace(ONE[1], size=5)}, equal_once=True),
        "another one names the same bytes in another way",
        TABLE + 24,
    ),
    **{
        f"garbage as {way}": (one_page(b"\xff" * 100, way), f"does not unpack to 4096 bytes of {name} data", TABLE)
        for way, name in (("zlib", "zlib"), ("lzo", "LZO"), ("snappy", "snappy"), ("zstd", "zstd"))
    },
    **{
        f"short {way}": (one_page(PACKERS[way][1](bytes(4095)), way), "does not unpack to 4096 bytes", TABLE)
        for way in ("zlib", "lzo", "snappy", "zstd")
    },
    **{
        f"long {way}": (one_page(PACKERS[way][1](bytes(4097)), way), "does not unpack to 4096 bytes", TABLE)
        for way in ("zlib", "lzo", "snappy", "zstd")
    },
    "flattened of another type": (flattened([(0, kdump(ONE))], kind=2), "flattened form of type 2", 16),
    "flattened and empty": (flattened([]), "no piece of a dump", PAGE),
    "piece without length": (flattened([(0, b"")]), "damaged: a piece of 0 bytes", PAGE),
    "piece of negative length": (flattened([], struct.pack(">qq", 0, -5)), "damaged: a piece of -5 bytes", PAGE),
    "piece before the start": (flattened([(-5, b"x")]), "damaged: a piece of 1 bytes for -5", PAGE),
    "piece far away": (flattened([(1 << 62, b"x")]), "damaged: a piece of 1 bytes for", PAGE),
    "piece beyond the end": (flattened([], struct.pack(">qq", 0, 1 << 60)), "truncated: a piece of", PAGE),
    "no end mark": (flattened([(0, kdump(ONE))], b""), "truncated: the header of the next piece, or the end", None),
    "flattened without a header": (flattened([(PAGE, bytes(PAGE))]), "signature is missing", 0),
    "everything written again": (flattened([(0, b"xx")] * 5000), "5000 pieces overlap", None),
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
    assert offset in (None, caught.value.offset)


BOMBS = {
    "zlib": zlib.compress(bytes(4 << 20), 9)[:PAGE],
    "lzo": lzallright.LZOCompressor().compress(bytes(700_000))[:PAGE],
    "snappy": b"\xff\xff\xff\xff\x0f" + bytes(100),
    "zstd": bytes(cramjam.zstd.compress(bytes(1 << 27))),
}


@pytest.mark.parametrize("way", BOMBS)
def test_bomb_is_refused_before_it_takes_memory(tmp_path: Path, way: str) -> None:
    assert len(BOMBS[way]) <= PAGE or way == "zstd"
    path = write(tmp_path / "dump", one_page(BOMBS[way], way))

    def refuse() -> None:
        with pytest.raises(ImageError):
            open_image(path)

    assert peak_growth_bytes(refuse) < 32 << 20


def written_by_unpacking(path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[int, ImageError | None]:
    """How many bytes opening an image has written to TMPDIR, and the error."""
    written: list[int] = []
    pwrite = os.pwrite

    def counted(descriptor: int, data: memoryview, offset: int) -> int:
        written.append(pwrite(descriptor, data, offset))
        return written[-1]

    monkeypatch.setattr(os, "pwrite", counted)
    try:
        with open_image(path):
            return sum(written), None
    except ImageError as error:
        return sum(written), error


def overlapping(count: int) -> bytes:
    """Pages that are not packed, each of which begins one byte after the one before."""
    dump = {gfn: Packed(page(1), 0) for gfn in range(count)}
    start = len(kdump(dump, equal_once=True)) - PAGE
    dump = {gfn: dataclasses.replace(each, offset=start + gfn) for gfn, each in dump.items()}
    return kdump(dump, equal_once=True) + bytes(count)


@pytest.mark.parametrize("form", ["in order", "flattened"])
@pytest.mark.parametrize(
    "contents",
    [
        pytest.param(
            kdump(dict.fromkeys(range(100_000), packed(b"\x01" * PAGE, "zstd")), equal_once=True),
            id="one page again and again",
        ),
        pytest.param(overlapping(3000), id="pages that overlap"),
    ],
)
def test_a_small_file_is_not_unpacked_to_a_large_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, contents: bytes, form: str
) -> None:
    # 24 bytes for each page: without the limit 100,000 of them wrote 400 MiB.
    path = write(tmp_path / "dump", FORMS[form](contents))
    written_bytes, error = written_by_unpacking(path, monkeypatch)
    assert "unpacked from the same bytes" in str(error)
    assert written_bytes < 16 << 20


def test_a_page_of_zeros_may_be_there_once_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dump = dict.fromkeys(range(100_000), packed(bytes(PAGE), "zlib")) | {7: packed(page(1), "zlib")}
    assert written_by_unpacking(write(tmp_path / "dump", kdump(dump)), monkeypatch) == (PAGE, None)


def test_a_dump_that_was_copied_with_holes_is_read(tmp_path: Path) -> None:
    # Little of each page is not zero, now at its start and now at its end: holes begin and end inside of pages.
    words = {gfn: (page(1)[:508] + gfn.to_bytes(4, "little")).ljust(PAGE, b"\0") for gfn in range(64)}
    contents = kdump({gfn: Packed(words[gfn][:: -1 if gfn % 2 else 1], 0) for gfn in words})
    path = tmp_path / "dump"
    with path.open("wb") as file:
        for start in range(0, len(contents), PAGE):
            block = contents[start : start + PAGE]
            if any(block):
                os.pwrite(file.fileno(), block, start)
        file.truncate(len(contents))
    assert len(pages_of(path)) == 64


def test_signature_is_asked_for_when_the_format_is_forced(tmp_path: Path) -> None:
    with pytest.raises(ImageError, match="signature is missing"):
        open_image(write(tmp_path / "raw", bytes(8 * PAGE)), format="kdump")


@pytest.mark.parametrize("form", ["in order", "flattened"])
def test_truncated_anywhere_is_refused(tmp_path: Path, form: str) -> None:
    contents = FORMS[form](kdump(ONE))
    sizes = {8, 9, 12, 430, 464, 4095, 4096, 4097, *range(PAGE, len(contents), 509), *range(TABLE - 2, TABLE + 50)}
    sizes |= {*range(TABLE + 50, len(contents), 37), len(contents) - 1}
    if form == "flattened":
        sizes |= set(range(13, 40)) | {len(contents) - len(END), len(contents) - 1}
    for size in sorted(sizes):
        if size < len(contents):
            write(tmp_path / "dump", contents[:size])
            with pytest.raises(ImageError) as caught:
                open_image(tmp_path / "dump")
            # What is left of a flattened file may be a signature and less.
            assert "truncated" in str(caught.value) or (size < 16 and form == "flattened")


def test_absurd_bitmaps_of_a_sparse_file_take_no_memory(tmp_path: Path) -> None:
    contents = kdump(ONE, KdumpHeader(max_mapnr=1 << 36, bitmap_blocks=1 << 22))
    path = tmp_path / "dump"
    with path.open("wb") as file:
        file.write(contents[: 2 * PAGE])
        file.truncate(2 * PAGE + (1 << 34))

    def refuse() -> None:
        with pytest.raises(ImageError, match="holds no memory"):
            open_image(path)

    assert peak_growth_bytes(refuse) < 32 << 20


def test_dump_of_1_gib_is_not_held_in_memory(tmp_path: Path) -> None:
    dump = {gfn: Packed(bytes(PAGE), 0) for gfn in range(1 << 18)}
    dump |= {gfn: packed(page(gfn), "zlib") for gfn in range(0, 1 << 18, 16)}
    path = write(tmp_path / "dump", kdump(dump))
    del dump

    def unpack() -> None:
        with open_image(path) as image:
            assert image.total_pages == 1 << 18

    # 17 batches of 4 MiB may wait with two threads, or up to eight.
    assert peak_growth_bytes(unpack) < 160 << 20
