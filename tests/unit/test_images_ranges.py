"""LiME and AVML: ranges behind headers, plain and compressed."""

import struct
from pathlib import Path

import cramjam
import numpy as np
import pytest

from image_writers import avml, avml_range, lime, lime_range, range_header
from memshr.errors import ImageError
from memshr.images import open_image
from memshr.images.lime import MAX_RANGES
from odd_cores import PAGE, pattern, write

RANGES = [(1, pattern(1, 2)), (0x100, pattern(3, 40)), (0x100000, pattern(50))]
PAGES = [(1, pattern(1, 2)), (0x100, pattern(3, 40)), (0x100000, pattern(50))]
WRITERS = {"lime": lime, "avml": avml}


def extents(path: Path) -> list[tuple[int, bytes]]:
    with open_image(path) as image:
        return [(extent.first_gfn, extent.pages.tobytes()) for extent in image.extents]


@pytest.mark.parametrize("name", WRITERS)
def test_ranges_come_out_in_order(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "image", WRITERS[name](RANGES[::-1]))
    assert extents(path) == PAGES
    with open_image(path) as image:
        assert image.format == name
        assert image.ranges.tolist() == [[1, 2], [0x100, 40], [0x100000, 1]]


# A range of Linux's "System RAM" may end with any byte: here 300 bytes are missing, and 100 at the start of another.
PARTIAL = [(PAGE, pattern(1, 3)[:-300]), (0x100 * PAGE + 100, pattern(7, 3)[100:]), (0x200 * PAGE + 5, b"x" * 4000)]


@pytest.mark.parametrize("write_range", [lime_range, avml_range])
def test_pages_that_are_only_partly_in_a_range_are_left_out(tmp_path: Path, write_range: object) -> None:
    assert callable(write_range)
    path = write(tmp_path / "image", b"".join(write_range(start, data) for start, data in PARTIAL))
    assert extents(path) == [(1, pattern(1, 2)), (0x101, pattern(8, 2))]


@pytest.mark.parametrize("write_range", [lime_range, avml_range])
def test_image_without_a_whole_page_is_refused(tmp_path: Path, write_range: object) -> None:
    assert callable(write_range)
    path = write(tmp_path / "image", write_range(PAGE + 1, bytes(PAGE)))
    with pytest.raises(ImageError, match="holds no memory: no range has a whole page"):
        open_image(path)


def test_avml_range_of_many_batches_that_begins_and_ends_inside_pages(tmp_path: Path) -> None:
    words = np.arange(3 * 1024 * PAGE // 4, dtype=np.uint32).tobytes()  # 12 MiB, no two pages alike
    path = write(tmp_path / "image", avml_range(0x1000_0000 - 1000, b"a" * 1000 + words + b"z" * 10))
    assert extents(path) == [(0x10000, words)]


def test_avml_zero_pages_are_not_stored(tmp_path: Path) -> None:
    path = write(tmp_path / "image", avml([(0, pattern(1, 1) + bytes(600 * PAGE) + pattern(2, 1))]))
    with open_image(path) as image:
        assert image.total_pages == 602
        states = image.states(0, 602)
    assert (states == 1).sum() >= 512  # HOLE, as far as the file system's blocks allow


def test_avml_drops_blocks_of_zeros_and_so_do_we(tmp_path: Path) -> None:
    image = avml([(0, pattern(1, 16) + bytes(16 * PAGE) + pattern(33, 16))], block_bytes=16 * PAGE)
    assert extents(write(tmp_path / "image", image)) == [(0, pattern(1, 16)), (32, pattern(33, 16))]


FRAMES = bytes(cramjam.snappy.compress(pattern(1, 2)))
HEADER = range_header(PAGE, 3 * PAGE - 1, magic=b"AVML", version=2)
STREAM = b"\xff\x06\x00\x00sNaPpY"


def compressed(frames: bytes, *, pages: int = 2) -> bytes:
    """An image whose one range has these frames."""
    return avml_range(PAGE, pattern(1, pages), compressed=frames)


def chunk(kind: int, data: bytes) -> bytes:
    return bytes([kind]) + len(data).to_bytes(3, "little") + data


REFUSED = {
    "version 2": (range_header(0, PAGE - 1, version=2) + bytes(PAGE), "not supported: version 2 of the format"),
    "other endianness": (b"EMiL" + struct.pack(">IQQQ", 1, 0, PAGE - 1, 0) + bytes(PAGE), "version 16777216"),
    "ends before it begins": (range_header(PAGE, 0) + bytes(PAGE), "damaged: the header of range 0"),
    "reserved": (range_header(0, PAGE - 1, reserved=1) + bytes(PAGE), "damaged: the header of range 0"),
    "beyond 2**48": (range_header(1 << 48, (1 << 48) + PAGE - 1) + bytes(PAGE), "range 0 ends beyond the highest"),
    "last byte of all": (range_header(0, (1 << 64) - 1) + bytes(PAGE), "range 0 ends beyond the highest"),
    "larger than the file": (range_header(0, (1 << 40) - 1) + bytes(PAGE), "truncated: range 0 should reach"),
    "no second header": (lime(RANGES) + bytes(40), "damaged: range 3 has no header"),
    "part of a second header": (lime(RANGES) + b"EMiL", "truncated: the header of range 3"),
    "overlapping": (lime([(1, pattern(1, 4)), (3, pattern(9, 2))]), "a page would be there twice"),
    "too many": (lime_range(1, b"x") * (MAX_RANGES + 1), f"damaged: more than {MAX_RANGES} ranges"),
    "avml version 1": (range_header(0, PAGE - 1, magic=b"AVML") + bytes(PAGE), "not supported: version 1"),
    "avml of lime": (avml(RANGES) + lime(RANGES), "damaged: range 3 has no header"),
    "avml overlapping": (avml([(1, pattern(1, 4)), (3, pattern(9, 2))]), "it overlaps another one"),
    "no stream": (compressed(bytes(2 * PAGE)), "no compressed range begins here"),
    "header only": (HEADER, "truncated: a compressed range"),
    "stream that holds less": (compressed(FRAMES, pages=3), "truncated: the file ends in a compressed range"),
    "stream that holds more": (compressed(FRAMES, pages=1), "holds more, or less, than it may"),
    "wrong length": (avml_range(PAGE, pattern(1, 2), length=7), "bytes long, 7 are said"),
    "wrong checksum": (compressed(FRAMES[:14] + b"\0\0\0\0" + FRAMES[18:]), "damaged: snappy"),
    "wrong contents": (compressed(FRAMES[:22] + b"\xff" + FRAMES[23:]), "damaged: snappy"),
    "unknown kind": (compressed(STREAM + chunk(0x42, bytes(9))), "an unknown kind of compressed data, 66"),
    "empty piece": (compressed(STREAM + chunk(1, bytes(4))), "holds more, or less"),
    "piece without a checksum": (compressed(STREAM + chunk(1, b"") * 9), "holds more, or less"),
    "piece of 128 KiB": (compressed(STREAM + chunk(1, bytes(4 + (1 << 17))), pages=64), "holds more, or less"),
    "number that does not end": (compressed(STREAM + chunk(0, b"\xff" * 40)), "holds more, or less"),
    "bomb": (compressed(STREAM + chunk(0, bytes(4) + b"\xff\xff\xff\xff\x0f" + bytes(99))), "holds more, or less"),
}


@pytest.mark.parametrize(("contents", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_with_reason(tmp_path: Path, contents: bytes, message: str) -> None:
    path = write(tmp_path / "image", contents)
    with pytest.raises(ImageError) as caught:
        open_image(path)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{path}: ")
    assert "\n" not in str(caught.value)
    assert caught.value.remedy


def test_avml_skips_what_the_framing_format_lets_skip(tmp_path: Path) -> None:
    padded = STREAM + chunk(0xFE, bytes(500)) + FRAMES + STREAM
    with pytest.raises(ImageError, match="bytes long"):  # the last one belongs to no range: AVML writes none
        open_image(write(tmp_path / "image", compressed(padded)))
    assert extents(write(tmp_path / "image", compressed(padded[: -len(STREAM)]))) == [(1, pattern(1, 2))]


@pytest.mark.parametrize("name", WRITERS)
def test_truncated_anywhere_is_refused(tmp_path: Path, name: str) -> None:
    image, path = WRITERS[name](RANGES[:1]), tmp_path / "image"
    for size in (*range(4, 80), *range(80, len(image), 97), len(image) - 8, len(image) - 1):
        if size < len(image):
            write(path, image[:size])
            with pytest.raises(ImageError, match="truncated"):
                open_image(path)


@pytest.mark.parametrize("name", WRITERS)
def test_format_can_be_said(tmp_path: Path, name: str) -> None:
    with open_image(write(tmp_path / "image", WRITERS[name](RANGES)), format=name) as image:
        assert image.total_pages == 43
    with pytest.raises(ImageError, match="no image of this format"):
        open_image(write(tmp_path / "other", bytes(PAGE)), format=name)
