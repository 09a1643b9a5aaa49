"""Cloud Hypervisor snapshots: a folder with the file ``memory-ranges``, and ``state.json`` that says what is in it.

``memory-ranges`` is the guest's memory, range after range, without a header. The table of ranges is in the state of
the memory manager, which is JSON in a string in the JSON of ``state.json``. Memory that the user put into files of
their own, or shares, is not in a snapshot and so not in this image.

Releases before mid-2024 (pull request 6371) wrote that state in a binary form, which is refused.

Layout: Cloud Hypervisor, vm-migration/src/lib.rs ``Snapshot`` and ``SnapshotData``, vm-migration/src/protocol.rs
``MemoryRangeTable``, vmm/src/memory_manager.rs ``MemoryManagerSnapshotData``.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Final

import numpy as np

from memshr import opened
from memshr.images.file import RUN, ImageFile, Layout, checked_runs
from memshr.types import MAX_GFN_BITS, PAGE_SIZE

_PAGES_FILE: Final = "memory-ranges"
_STATE_FILE: Final = "state.json"
_MAX_STATE_BYTES: Final = 16 << 20
_MAX_RANGES: Final = 1 << 16
_SNAPSHOT_AGAIN = "take the snapshot again, or copy the whole folder again"


class CloudHypervisor:
    """Snapshot folders of Cloud Hypervisor, or the ``memory-ranges`` in one."""

    name = "cloud-hypervisor"

    def folder_file(self, path: Path) -> Path | None:
        """``memory-ranges``, in a folder that has a ``state.json``."""
        return path / _PAGES_FILE if opened.is_file(path / _STATE_FILE) else None

    def beside(self, path: Path) -> tuple[Path, ...]:
        """``state.json``."""
        return (path.parent / _STATE_FILE,) if path.name == _PAGES_FILE else ()

    def detect(self, file: ImageFile) -> bool:
        """Whether it is the memory of such a folder. The file has no magic number, so its name has to do."""
        return file.path.name == _PAGES_FILE and self.folder_file(file.path.parent) is not None

    def layout(self, file: ImageFile) -> Layout:
        """The ranges of the table in ``state.json``, which is read whole.

        :raises ImageError: there is no ``state.json`` next to the file, it cannot be understood or is of an old
            release, the ranges are not made of whole pages, overlap, or do not come to the size of the file.
        """
        state = file.beside(file.path.parent / _STATE_FILE)
        table = _table(state)
        if len(table) > _MAX_RANGES:
            raise state.error(f"damaged: {len(table)} ranges of memory", remedy=_SNAPSHOT_AGAIN)
        runs, offset = np.empty(len(table), RUN), 0
        for number, row in enumerate(table):
            address, size = (_number(state, row, key) for key in ("gpa", "length"))
            if address % PAGE_SIZE or size % PAGE_SIZE:
                raise state.error(f"range {number} is not made of whole pages", remedy=_SNAPSHOT_AGAIN)
            runs[number] = address // PAGE_SIZE, offset, size // PAGE_SIZE
            offset += size
        if offset != file.size:
            what = "truncated" if offset > file.size else "damaged"
            raise file.error(
                f"{what}: the ranges in {_STATE_FILE} have {offset} bytes, the file has {file.size}",
                remedy=_SNAPSHOT_AGAIN,
            )
        return Layout(checked_runs(file, runs, "range"), file)


def _table(state: ImageFile) -> list[Any]:
    """The rows of the table of ranges, as they are in the JSON."""
    if state.size > _MAX_STATE_BYTES:
        raise state.error(
            f"{state.size} bytes, which is no state of a snapshot: memshr reads at most {_MAX_STATE_BYTES}",
            remedy=_SNAPSHOT_AGAIN,
        )
    data = _at(
        _parsed(state, state.bytes_at(0, state.size, "the state")), "snapshots", "memory-manager", "snapshot_data"
    )
    if data is None:
        raise state.error("it says nothing of the memory manager", remedy=_SNAPSHOT_AGAIN)
    text = _at(data, "state")
    if not isinstance(text, str):
        raise state.error(
            "not supported: the memory manager's state is in a binary form",
            remedy="take the snapshot with Cloud Hypervisor of mid-2024 or newer",
        )
    table = _at(_parsed(state, text), "memory_ranges", "data")
    if not isinstance(table, list):
        raise state.error("the memory manager's state has no table of ranges", remedy=_SNAPSHOT_AGAIN)
    return table


def _parsed(state: ImageFile, text: str | bytes) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise state.error(f"no JSON, or damaged: {type(error).__name__}", remedy=_SNAPSHOT_AGAIN) from error


def _at(tree: Any, *keys: str) -> Any:
    """What is at the end of these keys; None: nothing."""
    for key in keys:
        if not isinstance(tree, dict):
            return None
        tree = tree.get(key)
    return tree


def _number(state: ImageFile, row: Any, key: str) -> int:
    number = _at(row, key)
    if type(number) is not int or not 0 <= number <= PAGE_SIZE << MAX_GFN_BITS:
        raise state.error(f"damaged: a range of memory whose {key} is no address or size", remedy=_SNAPSHOT_AGAIN)
    return number
