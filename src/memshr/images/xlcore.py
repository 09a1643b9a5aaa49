"""Xen's ``xl dump-core``: an ELF file without program headers, whose sections hold the pages and their frame numbers.

``.xen_pages`` has the pages, in no particular order. ``.xen_pfn`` (HVM, PVH) or ``.xen_p2m`` (PV, which pairs each with
its machine frame) has the guest's frame number of each of them. A guest that gave memory back while a dump of it was
running leaves pages at the end that belong to no frame; they are left out.

Layout: Xen, docs/misc/dump-core-format.txt, and the structures of tools/libs/ctrl/xc_core.h.
"""

from __future__ import annotations

from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from memshr.images.elfcore import EHDR, SHDR
from memshr.images.file import RUN, ImageFile, Layout, checked_runs, runs_of
from memshr.types import MAX_GFN_BITS, PAGE_SIZE

_MAGIC: Final = b"\x7fELF"
_CLASS_64 = 2
_LITTLE_ENDIAN = 1
_ET_CORE = 4
_MACHINES = {3, 62}
"""EM_386 and EM_X86_64."""
_SECTION_BYTES: Final = 64
_MAX_SMALL_BYTES: Final = 1 << 20
"""The largest table of names, or section of notes, that is read."""
_BATCH_PAGES: Final = 1 << 20
"""Frame numbers that are read at once."""

_NOTE = np.dtype([("name_bytes", "<u4"), ("bytes", "<u4"), ("kind", "<u4")])
_DUMPCORE_HEADER = 0x2000001
_DUMPCORE_VERSION = 0x2000003
_HEADER = np.dtype([("magic", "<u8"), ("vcpus", "<u8"), ("pages", "<u8"), ("page_bytes", "<u8")])
"""``xen_dumpcore_elfnote_header_desc``"""
_PV, _HVM = 0xF00FEBED, 0xF00FEBEE
"""XC_CORE_MAGIC and XC_CORE_MAGIC_HVM"""
_FRAME = np.dtype([("pfn", "<u8")])
_P2M = np.dtype([("pfn", "<u8"), ("gmfn", "<u8")])
_NO_FRAME = (1 << 64) - 1
"""XC_CORE_INVALID_PFN"""

_DUMP_AGAIN = "write it again with xl dump-core, or copy it again"


class XlCore:
    """Dumps of x86 guests by ``xl dump-core``, format version 0."""

    name = "xl-core"

    def detect(self, file: ImageFile) -> bool:
        """Whether it is a 64-bit ELF core that has sections and no program headers, which no other core has."""
        if not file.starts_with(_MAGIC + bytes([_CLASS_64])) or file.size < EHDR.itemsize:
            return False
        header = file.records(EHDR, 0, 1, "the ELF header")
        if header["data"][0] != _LITTLE_ENDIAN:
            header = header.view(EHDR.newbyteorder(">"))
        return bool(header["type"] == _ET_CORE and header["phnum"] == 0 and header["shnum"] > 0)

    def layout(self, file: ImageFile) -> Layout:
        """The pages that have a frame number. Reads the table of them: 8 bytes a page, 16 for a PV guest.

        :raises ImageError: the file is no such dump, a section is missing or contradicts the others or goes beyond the
            end, or a page is there twice.
        """
        sections = _sections(file)
        notes = _notes(file, *_section(file, sections, ".note.Xen"))
        version = _note(file, notes, _DUMPCORE_VERSION, np.dtype("<u8"), "the format's version")
        if version >> 32:
            raise file.error(
                f"not supported: version {version >> 32}.{version & 0xFFFFFFFF} of Xen's dump-core format, "
                "memshr reads 0.x",
                remedy="write the dump with another release of Xen",
            )
        header = _note(file, notes, _DUMPCORE_HEADER, _HEADER, "Xen's header")
        if header["magic"] not in {_PV, _HVM}:
            raise file.error(f"damaged: {int(header['magic']):#x} is no kind of guest", remedy=_DUMP_AGAIN)
        if header["page_bytes"] != PAGE_SIZE:
            raise file.error(
                f"not supported: pages of {header['page_bytes']} bytes", remedy=f"memshr reads pages of {PAGE_SIZE}"
            )
        table, record = (".xen_p2m", _P2M) if header["magic"] == _PV else (".xen_pfn", _FRAME)
        count = int(header["pages"])
        pages_at = _whole_section(file, sections, ".xen_pages", count, PAGE_SIZE)
        table_at = _whole_section(file, sections, table, count, record.itemsize)
        runs = [np.empty(0, RUN)]
        for first in range(0, count, _BATCH_PAGES):
            records = file.records(
                record, table_at + first * record.itemsize, min(_BATCH_PAGES, count - first), f"the table {table}"
            )
            # Each batch by itself too, so that a table which is one large hole ends here and not when memory does.
            runs.append(checked_runs(file, _runs(file, records["pfn"], first, pages_at, table), "run of pages"))
        checked = checked_runs(file, np.concatenate(runs), "run of pages")
        if not len(checked):
            raise file.error(f"the dump holds no memory: {table} has no frame number", remedy=_DUMP_AGAIN)
        return Layout(checked, file)


def _runs(file: ImageFile, pfns: NDArray[np.uint64], first: int, pages_at: int, table: str) -> NDArray[Any]:
    index = np.flatnonzero(pfns != _NO_FRAME)
    if (pfns[index] >= 1 << MAX_GFN_BITS).any():
        raise file.error(f"damaged: {table} has a frame number beyond {1 << MAX_GFN_BITS:#x}", remedy=_DUMP_AGAIN)
    return runs_of(pfns[index].astype(np.int64), pages_at + (first + index) * PAGE_SIZE)


def _sections(file: ImageFile) -> dict[bytes, tuple[int, int]]:
    """Name -> offset and size in the file, not checked yet."""
    header = file.records(EHDR, 0, 1, "the ELF header")[0]
    if header["magic"] != _MAGIC:
        raise file.error("no ELF file: the magic number is missing", offset=0, remedy="leave --format out")
    for name, offset, expected, what in (
        ("elf_class", 4, {_CLASS_64}, "not 64-bit"),
        ("data", 5, {_LITTLE_ENDIAN}, "not little-endian"),
        ("machine", 18, _MACHINES, "a dump of another machine than x86"),
    ):
        if int(header[name]) not in expected:
            raise file.error(f"not supported: {what}", offset=offset, remedy="memshr reads dumps of x86 guests")
    if header["type"] != _ET_CORE or not header["shnum"]:
        raise file.error("no dump of xl dump-core: not a core with sections", offset=16, remedy="leave --format out")
    if header["shentsize"] != _SECTION_BYTES or header["shstrndx"] >= header["shnum"]:
        raise file.error("damaged: the ELF header contradicts itself", offset=58, remedy=_DUMP_AGAIN)
    table = file.records(SHDR, int(header["shoff"]), int(header["shnum"]), "the table of sections")
    names_at, names_bytes = (int(number) for number in table[["offset", "size"]][int(header["shstrndx"])])
    if names_bytes > _MAX_SMALL_BYTES:
        raise file.error(f"damaged: {names_bytes} bytes of section names", offset=names_at, remedy=_DUMP_AGAIN)
    names = file.bytes_at(names_at, names_bytes, "the names of the sections")
    return {
        names[name : name + 32].split(b"\0", 1)[0]: (offset, size)
        for name, offset, size in table[["name", "offset", "size"]].tolist()
        if name < len(names)
    }


def _section(file: ImageFile, sections: dict[bytes, tuple[int, int]], name: str) -> tuple[int, int]:
    try:
        return sections[name.encode()]
    except KeyError:
        raise file.error(
            f"no dump of xl dump-core, or damaged: there is no section {name}", remedy=_DUMP_AGAIN
        ) from None


def _whole_section(
    file: ImageFile, sections: dict[bytes, tuple[int, int]], name: str, count: int, item_bytes: int
) -> int:
    """Where a section of ``count`` items begins, which is all in the file."""
    offset, size = _section(file, sections, name)
    if size != count * item_bytes:
        raise file.error(
            f"damaged: {name} has {size} bytes, {count} times {item_bytes} are expected",
            offset=offset,
            remedy=_DUMP_AGAIN,
        )
    if offset + size > file.size:
        raise file.error(
            f"truncated: {name} should reach to {offset + size:#x}, the file ends at {file.size:#x}",
            offset=offset,
            remedy=_DUMP_AGAIN,
        )
    return offset


def _notes(file: ImageFile, offset: int, size: int) -> dict[int, tuple[int, bytes]]:
    """Kind -> offset and description of each note that is Xen's."""
    if size > _MAX_SMALL_BYTES:
        raise file.error(f"damaged: {size} bytes of notes", offset=offset, remedy=_DUMP_AGAIN)
    data = file.bytes_at(offset, size, "the notes")
    notes: dict[int, tuple[int, bytes]] = {}
    place = 0
    while place + _NOTE.itemsize <= size:
        name_bytes, description_bytes, kind = np.frombuffer(data, _NOTE, 1, place)[0].tolist()
        name_at = place + _NOTE.itemsize
        description_at = name_at + -(-name_bytes // 4) * 4
        if data[name_at : name_at + name_bytes] == b"Xen\0":
            notes[kind] = offset + description_at, data[description_at : description_at + description_bytes]
        place = description_at + -(-description_bytes // 4) * 4
    return notes


def _note(file: ImageFile, notes: dict[int, tuple[int, bytes]], kind: int, dtype: np.dtype[Any], what: str) -> Any:
    """The description of a note: a number, or a record. Longer ones are of a later minor version."""
    offset, description = notes.get(kind, (None, b""))
    if len(description) < dtype.itemsize:
        raise file.error(f"damaged: the note with {what} is missing or too short", offset=offset, remedy=_DUMP_AGAIN)
    found = np.frombuffer(description, dtype, 1)[0]
    return int(found) if dtype.names is None else found
