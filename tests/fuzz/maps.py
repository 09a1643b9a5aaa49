"""Whatever /proc/PID/maps holds: ValueError comes out of what reads it, or rows that can be worked with.

The addresses in that text are the kernel's, the paths in it are whatever a QEMU likes, and how much it maps is its
choice. ``fuzz.campaign`` searches for inputs that break this.
"""

from __future__ import annotations

import contextlib
import os
from pathlib import Path

from memshr.errors import BackendError
from memshr.procfs import Vmas
from memshr.qemu.attachment import Attachment
from memshr.qemu.guests import RamRange, mapping_refusals, most_pages
from memshr.qemu.pool import files_of_pools, groups_in
from memshr.types import Gfn

CORPUS = Path(__file__).parent / "corpus" / "maps"

LAYOUT = [RamRange(Gfn(0), 32768, 0x7F0000000000, "pc.ram")]
_EXPANDED_PAGES = 1 << 18


def exercise(data: bytes, folder: Path) -> list[str]:
    """Read the text as maps, and look through it as memshr does; returns the paths.

    :raises AssertionError: a promise was broken. So is anything but what the functions document.
    """
    del folder
    try:
        mappings = Vmas(data)
    except ValueError:
        return []
    for row, mapping in zip(range(8), mappings, strict=False):
        assert mapping.start < mapping.end
        assert mappings[row] == mapping
        assert mapping.pages >= 0
    try:
        pages = sum(mappings[row].pages for rows in files_of_pools(mappings) for row in rows.tolist())
        assert pages <= most_pages()
        # What that many take is known, and is more than a search may use.
        if pages <= _EXPANDED_PAGES:
            assert sum(len(mapped.hvas) for mapped in Attachment.pool_mappings(mappings)) == pages
    except BackendError as error:
        _require_shown(str(error))
    for refusal in mapping_refusals(mappings, LAYOUT, {1}):
        _require_shown(str(refusal))
    with contextlib.suppress(OSError, BackendError):
        groups_in(os.getpid(), mappings)
    return mappings.paths


def _require_shown(text: str) -> None:
    assert text.isprintable()
