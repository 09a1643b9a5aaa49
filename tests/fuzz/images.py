"""Whatever bytes an image is made of: ImageError or BackendError come out of its reader, or pages, and nothing else.

``python -m fuzz.images --seconds 600`` (or ``make fuzz``) searches for inputs that break this, guided by coverage of
memshr's own code, with atheris. It starts from ``corpus``, and from what earlier runs kept in ``.fuzz``. What breaks
is left in ``.fuzz`` as ``crash-...``, ``timeout-...`` or ``oom-...``; ``python -m fuzz.images FILE...`` shows it again.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from memshr.errors import BackendError, ImageError
from memshr.images import FORMATS, MemoryImage, open_image
from memshr.types import MAX_GFN_BITS
from odd_cores import PAGE, pattern

CORPUS = Path(__file__).parent / "corpus"
KEPT = Path(__file__).parents[2] / ".fuzz"

MAX_INPUT_BYTES = 1 << 16
MAX_UNPACKED_BYTES = 256 << 20
"""No file that a reader makes may grow beyond that (RLIMIT_FSIZE)."""
MAX_MEMORY_MIB = 1024
MAX_SECONDS_EACH = 10
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
            assert image.read(np.arange(row, row + count), again).all()
            assert (out == again).all()
            assert not out[states == 1].any()
        assert image.extents[0].pages[:1].tobytes() == out[:1].tobytes()
    except (ImageError, BackendError) as error:
        _require_one_line(str(error))


def search(seconds: int, seed: int) -> int:
    """Search for inputs that break a reader, in a process of its own; returns its exit code, not 0 if there is one."""
    KEPT.mkdir(exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        command = [sys.executable, "-m", "fuzz.search", str(KEPT), str(CORPUS)]
        command += [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={KEPT}/", "-print_final_stats=1"]
        command += [f"-max_len={MAX_INPUT_BYTES}", f"-timeout={MAX_SECONDS_EACH}", f"-rss_limit_mb={MAX_MEMORY_MIB}"]
        # The search ends by itself; an end from outside is for a reader that hangs where no timeout can reach it.
        return subprocess.run(
            command, env=os.environ | {"TMPDIR": folder}, timeout=seconds + 120, check=False
        ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.images")
    parser.add_argument("--seconds", type=int, default=600, help="how long to search (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="of the search's random numbers; 0: another each time")
    parser.add_argument("files", nargs="*", help="inputs to try again instead of searching")
    arguments = parser.parse_args()
    if not arguments.files:
        return search(arguments.seconds, arguments.seed)
    with tempfile.TemporaryDirectory() as folder:
        for file in map(Path, arguments.files):
            print(f"{file}: {', '.join(exercise(file.read_bytes(), Path(folder))) or 'refused'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
