"""VMware: a ``.vmem`` file, and the ``.vmss`` (suspended) or ``.vmsn`` (snapshot) that says where its pages belong.

The ``.vmem`` has no header. Guests with more memory than fits below the hole for devices have several regions in it,
which are listed in the group "memory" of the state file; without such a list it is a raw image. Older products put the
memory into the state file itself, as the block "Memory". A ``.vmem`` that has no state file next to it is a raw image:
the same pages, and only the gfns above the hole are wrong.

The state file is a table of named groups. A group is a list of tags: a byte of flags, the length of a name, the name,
up to three indices, and a value, which is up to 61 bytes, or a block with its sizes in front of it.

VMware has not published the layout. It is known from VMware's own vmss2core, and from the readers in Volatility
(vmware.py of both generations), whose field names are used here.
"""

from __future__ import annotations

import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np

from memshr.errors import ImageError
from memshr.images.file import RUN, ImageFile, Layout, checked_runs
from memshr.types import MAX_GFN_BITS, PAGE_SIZE

_MAGICS: Final = tuple(magic.to_bytes(4, "little") for magic in (0xBED2BED0, 0xBAD1BAD1, 0xBED2BED2, 0xBED3BED3))
_HEADER = np.dtype([("magic", "<u4"), ("unknown", "<u4"), ("groups", "<u4")])
_GROUP = np.dtype([("name", "S64"), ("tags", "<u8"), ("size", "<u8")])
_MAX_GROUPS: Final = 4096
_MAX_TAGS: Final = 1 << 16
_MAX_REGIONS: Final = 1 << 12
_COMPRESSED, _BLOCK = 62, 63
_STATE_SUFFIXES: Final = (".vmss", ".vmsn")
_MEMORY_SUFFIX: Final = ".vmem"
_AGAIN = "suspend the guest, or take the snapshot, again"

_Tags = dict[tuple[bytes, tuple[int, ...]], "_Value"]


@dataclass(frozen=True, slots=True)
class _Value:
    """What a tag has: a number, or a block."""

    number: int
    block_at: int = 0
    block_bytes: int = 0
    compressed: bool = False


class Vmware:
    """Memory of suspended VMware guests and of snapshots: the ``.vmem`` or the state file, whichever is named."""

    name = "vmware"

    def detect(self, file: ImageFile) -> bool:
        """Whether it is a state file, or a ``.vmem`` next to one of the same name."""
        return _is_state(file) or (file.path.suffix.lower() == _MEMORY_SUFFIX and _state_of(file) is not None)

    def beside(self, path: Path) -> tuple[Path, ...]:
        """The other file of the two."""
        return tuple(path.with_suffix(suffix) for suffix in (_MEMORY_SUFFIX, *_STATE_SUFFIXES)) if path.suffix else ()

    def layout(self, file: ImageFile) -> Layout:
        """The regions that the state file lists; all of the ``.vmem``, from address 0 on, if it lists none.

        :raises ImageError: a file of the two is missing, the state file is damaged or its memory compressed, or regions
            overlap or go beyond the end.
        """
        is_state = _is_state(file)
        state = file if is_state else _state_of(file)
        if state is None:
            raise file.error(
                "there is no .vmss or .vmsn of the same name next to it", remedy="put it there, or say --format raw"
            )
        tags = _memory_tags(state)
        contents, base, size = file, 0, file.size
        if is_state:
            block = next((value for (name, _), value in tags.items() if name == b"Memory" and value.block_bytes), None)
            if block is None:
                contents = file.beside(file.path.with_suffix(_MEMORY_SUFFIX))
                size = contents.size
            elif block.compressed:
                raise file.error("not supported: compressed memory", offset=block.block_at, remedy=_AGAIN)
            else:
                base, size = block.block_at, block.block_bytes
        runs = _regions(state, tags, base, size)
        checked = checked_runs(contents, runs, "region")
        if not len(checked):
            raise contents.error("it holds no memory: its regions are empty", remedy=_AGAIN)
        return Layout(checked, contents)


def _is_state(file: ImageFile) -> bool:
    return any(file.starts_with(magic) for magic in _MAGICS)


def _state_of(vmem: ImageFile) -> ImageFile | None:
    """The state file of a ``.vmem``, open."""
    for suffix in _STATE_SUFFIXES:
        with contextlib.suppress(ImageError):
            state = vmem.beside(vmem.path.with_suffix(suffix))
            if _is_state(state):
                return state
    return None


def _regions(state: ImageFile, tags: _Tags, base: int, size: int) -> np.ndarray[tuple[int], np.dtype[np.void]]:
    """The regions as runs, which still have to be checked; ``base`` is where the memory begins in its file."""
    none = _Value(0)
    count = tags.get((b"regionsCount", ()), none).number
    if count > _MAX_REGIONS:
        raise state.error(f"damaged: {count} regions of memory", remedy=_AGAIN)
    if not count:
        if size % PAGE_SIZE:
            raise state.error(f"damaged: {size} bytes of memory are not whole pages", remedy=_AGAIN)
        return np.array([(0, base, size // PAGE_SIZE)], RUN)
    runs = np.empty(count, RUN)
    for number in range(count):
        try:
            gfn, page, pages = (
                tags[name, (number,)].number for name in (b"regionPPN", b"regionPageNum", b"regionSize")
            )
        except KeyError as error:
            raise state.error(f"damaged: region {number} of {count} is not described", remedy=_AGAIN) from error
        if max(gfn, page, pages) > 1 << MAX_GFN_BITS or (page + pages) * PAGE_SIZE > size:
            raise state.error(
                f"region {number} goes beyond the {size} bytes of memory: truncated, or damaged", remedy=_AGAIN
            )
        runs[number] = gfn, base + page * PAGE_SIZE, pages
    return runs


def _memory_tags(state: ImageFile) -> _Tags:
    """The tags of the group "memory", by name and indices."""
    header = state.records(_HEADER, 0, 1, "the header")[0]
    if header["magic"].tobytes() not in _MAGICS:
        raise state.error("no state file of VMware: the magic number is missing", offset=0, remedy="leave --format out")
    count = int(header["groups"])
    if count > _MAX_GROUPS:
        raise state.error(f"damaged: {count} groups", offset=8, remedy=_AGAIN)
    groups = state.records(_GROUP, _HEADER.itemsize, count, f"the table of {count} groups")
    memory = groups[groups["name"] == b"memory"]
    if len(memory) != 1:
        raise state.error("damaged: there is no group of tags for the memory", offset=12, remedy=_AGAIN)
    size_bytes = 8 if int(header["magic"]) & 0xF else 4
    offset = int(memory[0]["tags"])
    tags: _Tags = {}
    for _ in range(_MAX_TAGS):
        flags, name_bytes = state.bytes_at(offset, 2, "a tag")
        if not flags and not name_bytes:
            return tags
        index_bytes, value_bytes = (flags >> 6) * 4, flags & 0x3F
        head = state.bytes_at(offset + 2, name_bytes + index_bytes, "a tag")
        key = head[:name_bytes], tuple(np.frombuffer(head, "<u4", offset=name_bytes).tolist())
        offset += 2 + len(head)
        if value_bytes < _COMPRESSED:
            value = _Value(int.from_bytes(state.bytes_at(offset, value_bytes, "a tag's value"), "little"))
            offset += value_bytes
        else:
            sizes = state.bytes_at(offset, 2 * size_bytes + 2, "the sizes of a block")
            offset += len(sizes) + int.from_bytes(sizes[2 * size_bytes :], "little")
            block_bytes = int.from_bytes(sizes[:size_bytes], "little")
            if offset + block_bytes > state.size:
                raise state.error(
                    f"truncated: a block should reach to {offset + block_bytes:#x}, the file ends at {state.size:#x}",
                    offset=offset,
                    remedy="copy it again",
                )
            value = _Value(0, offset, block_bytes, value_bytes == _COMPRESSED)
            offset += block_bytes
        tags.setdefault(key, value)
    raise state.error(f"damaged: more than {_MAX_TAGS} tags", offset=offset, remedy=_AGAIN)
