"""Whatever bytes an image is made of: ImageError or BackendError come out of its reader, or pages, and nothing else.

``fuzz.campaign`` searches for inputs that break this.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memshr.errors import BackendError, ImageError
from memshr.images import FORMATS, MemoryImage, open_image
from memshr.indices import Row, of_kind
from memshr.types import MAX_GFN_BITS
from odd_cores import PAGE, pattern

CORPUS = Path(__file__).parent / "corpus" / "images"

MAX_INPUT_BYTES = 1 << 16
MAX_UNPACKED_BYTES = 256 << 20
"""No file that a reader makes may grow beyond that (RLIMIT_FSIZE)."""
FORMAT_NAMES = tuple(row.name for row in FORMATS)
ROWS = 64
"""Pages of an image that are read at its start, and at its end."""

STATE_FILES = {
    b"{": ("state.json", "memory-ranges"),
    b"\xd3\xbe\xd3\xbe": ("guest.vmss", "guest.vmem"),
    b"\0\0\x64\x86\x84\x19\x10\x07": ("vmstate", "mem_file"),
}
"""First bytes of an input that describes pages in another file -> its name, and that of five pages next to it."""


def exercise(data: bytes, folder: Path, *, formats: Sequence[str] = FORMAT_NAMES) -> list[str]:
    """Open the bytes as an image, by detection and as each of ``formats``, and read from it.

    :param folder: an empty folder, which is empty again afterwards.
    :returns: the formats as which it could be opened; the one that was detected is first.
    :raises AssertionError: a promise was broken. So is anything but ImageError and BackendError.
    """
    name, memory = next((names for head, names in STATE_FILES.items() if data.startswith(head)), ("image", ""))
    path = folder / name
    path.write_bytes(data)
    if memory:
        path = folder / memory
        path.write_bytes(pattern(1, 5))
    try:
        found = [
            opened for format_name in (None, *formats) if (opened := _open_and_read(path, format_name)) is not None
        ]
        assert all((folder / file).exists() for file in (name, memory or name))
        assert path.read_bytes() == (pattern(1, 5) if memory else data)
        return found
    finally:
        for file in folder.iterdir():
            file.unlink()


def _open_and_read(path: Path, format_name: str | None) -> str | None:
    try:
        image = open_image(path, format=format_name)
    except (ImageError, BackendError) as error:
        _require_one_line(str(error))
        return None
    with image:
        _check_promises(image)
    return image.format


def _require_one_line(message: str) -> None:
    assert message
    assert "\n" not in message


def _check_promises(image: MemoryImage) -> None:
    first, pages = image.runs["gfn"], image.runs["pages"]
    assert (pages > 0).all()
    assert (first >= 0).all()
    assert (first[1:] >= (first + pages)[:-1]).all()
    assert int((first + pages).max()) <= 1 << MAX_GFN_BITS
    assert image.total_pages == int(pages.sum()) == int(image.ranges[:, 1].sum())
    count = min(ROWS, image.total_pages)
    out, again = np.empty((count, PAGE), np.uint8), np.empty((count, PAGE), np.uint8)
    try:
        for row in (image.total_pages - count, 0):
            states = image.states(row, count)
            assert image.read_run(row, out).all()
            assert image.read(of_kind(Row, np.arange(row, row + count)), again).all()
            assert (out == again).all()
            assert not out[states == 1].any()
        assert image.extents[0].pages[:1].tobytes() == out[:1].tobytes()
    except (ImageError, BackendError) as error:
        _require_one_line(str(error))
