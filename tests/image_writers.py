"""Writers of memory images, for tests: each written from the published layout and by no code of memshr.

They are the tests' own word on the formats, packed field by field. What a test wants to be wrong is a parameter, or is
changed in the bytes that come out. Guests are given as ranges: the first gfn and the bytes of whole pages from there.
"""

from __future__ import annotations

import json
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import cramjam

from odd_cores import PAGE

Range = tuple[int, bytes]
NO_FRAME = (1 << 64) - 1


def note(name: bytes, kind: int, description: bytes) -> bytes:
    """One ELF note, padded to words of four bytes."""
    padded = [part + bytes(-len(part) % 4) for part in (name + b"\0", description)]
    return struct.pack("<III", len(name) + 1, len(description), kind) + b"".join(padded)


@dataclass(frozen=True, slots=True)
class XlCore:
    """What ``xl dump-core`` writes: xen.git docs/misc/dump-core-format.txt. What is None follows from the ranges."""

    ranges: Sequence[Range]
    pv: bool = False
    magic: int | None = None
    nr_pages: int | None = None
    page_size: int = PAGE
    version: int = 1
    padding_pages: int = 0
    """Pages at the end that have no frame number: a guest that shrank while ``xl dump-core -L`` ran."""
    elf_class: int = 2
    data: int = 1
    kind: int = 4
    machine: int = 62
    shentsize: int = 64
    shnum: int | None = None
    shstrndx: int = 1
    shoff: int = 64
    notes: bytes | None = None
    without: frozenset[str] = frozenset()
    replace: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    """Section name -> offset and size that its header claims."""

    def packed(self) -> bytes:
        pfns = [gfn + number for gfn, data in self.ranges for number in range(len(data) // PAGE)]
        table = b"".join(struct.pack("<QQ", pfn, 0x7000 + pfn) if self.pv else struct.pack("<Q", pfn) for pfn in pfns)
        table += struct.pack("<Q", NO_FRAME) * (self.padding_pages * (2 if self.pv else 1))
        pages = b"".join(data for _, data in self.ranges) + bytes(PAGE * self.padding_pages)
        sections = {
            ".shstrtab": b"",
            ".note.Xen": self._notes(len(pfns) + self.padding_pages) if self.notes is None else self.notes,
            ".xen_prstatus": b"vcpu" * 16,
            ".xen_shared_info": b"shared info",
            ".xen_pages": pages,
            ".xen_p2m" if self.pv else ".xen_pfn": table,
        }
        sections = {name: data for name, data in sections.items() if name not in self.without}
        names = b"\0" + b"".join(name.encode() + b"\0" for name in sections)
        sections[".shstrtab"] = names
        headers, contents = bytes(64), b""
        start = 64 + 64 * (len(sections) + 1)
        for name, data in sections.items():
            if name == ".xen_pages":
                contents += bytes(-(start + len(contents)) % PAGE)
            offset, size = self.replace.get(name, (start + len(contents), len(data)))
            kind = {".shstrtab": 3, ".note.Xen": 7}.get(name, 1)
            headers += struct.pack(
                "<IIQQQQIIQQ", names.index(b"\0" + name.encode() + b"\0") + 1, kind, 0, 0, offset, size, 0, 0, 1, 0
            )
            contents += data
        ident = b"\x7fELF" + bytes([self.elf_class, self.data, 1]) + bytes(9)
        shnum = len(sections) + 1 if self.shnum is None else self.shnum
        return (
            ident
            + struct.pack("<HHIQQQI", self.kind, self.machine, 1, 0, 0, self.shoff, 0)
            + struct.pack("<HHHHHH", 64, 0, 0, self.shentsize, shnum, self.shstrndx)
            + headers
            + contents
        )

    def _notes(self, pages: int) -> bytes:
        magic = (0xF00FEBED if self.pv else 0xF00FEBEE) if self.magic is None else self.magic
        header = struct.pack("<QQQQ", magic, 1, pages if self.nr_pages is None else self.nr_pages, self.page_size)
        return b"".join(
            [
                note(b"Xen", 0x2000000, b""),
                note(b"Xen", 0x2000001, header),
                note(b"Xen", 0x2000002, bytes(1240)),
                note(b"Xen", 0x2000003, struct.pack("<Q", self.version)),
            ]
        )


def range_header(start: int, end: int, *, magic: bytes = b"EMiL", version: int = 1, reserved: int = 0) -> bytes:
    """The header that LiME and AVML put before each range; ``end`` is its last byte (LiME doc/README.md)."""
    return magic + struct.pack("<IQQQ", version, start, end, reserved)


def lime_range(start: int, data: bytes) -> bytes:
    return range_header(start, start + len(data) - 1) + data


def lime(ranges: Sequence[Range]) -> bytes:
    return b"".join(lime_range(gfn * PAGE, data) for gfn, data in ranges)


def avml_range(start: int, data: bytes, *, compressed: bytes | None = None, length: int | None = None) -> bytes:
    """One block of AVML, version 2 (avml src/image.rs): header, frames, length of the frames.

    The frames are made by the library that AVML itself uses, Rust's ``snap``.
    """
    frames = bytes(cramjam.snappy.compress(data)) if compressed is None else compressed
    tail = struct.pack("<Q", len(frames) if length is None else length)
    return range_header(start, start + len(data) - 1, magic=b"AVML", version=2) + frames + tail


def avml(ranges: Sequence[Range], *, block_bytes: int = 16 << 20) -> bytes:
    """As AVML writes it: blocks of at most 16 MiB, and no block that is all zero."""
    blocks = [
        (gfn * PAGE + first, data[first : first + block_bytes])
        for gfn, data in ranges
        for first in range(0, len(data), block_bytes)
    ]
    return b"".join(avml_range(start, data) for start, data in blocks if data.count(0) < len(data))


def cloud_hypervisor(ranges: Sequence[Range], *, nesting: str = "string") -> dict[str, bytes]:
    """The files of a snapshot folder: vm-migration/src/lib.rs ``Snapshot``, protocol.rs ``MemoryRangeTable``.

    ``nesting``: how the memory manager's state lies in ``state.json``. "string": JSON in a string; older releases have
    a binary state in "bytes", an array of numbers, or in "sections" of such.
    """
    table = [{"gpa": gfn * PAGE, "length": len(data)} for gfn, data in ranges]
    return {
        "config.json": b"{}",
        "memory-ranges": b"".join(data for _, data in ranges),
        "state.json": ch_state({"memory_ranges": {"data": table}, "guest_ram_mappings": []}, nesting=nesting),
    }


def ch_state(manager: object, *, nesting: str = "string") -> bytes:
    text = json.dumps(manager)
    data: object
    if nesting == "string":
        data = {"state": text}
    elif nesting == "bytes":
        data = list(text.encode())
    else:
        section = "memory-manager-section"
        data = {section: {"id": section, "snapshot": list(text.encode())}}
    manager_node = {"snapshots": {}, "snapshot_data": data}
    other_node: dict[str, object] = {"snapshots": {}, "snapshot_data": None}
    return json.dumps({"snapshots": {"cpu-manager": other_node, "memory-manager": manager_node}}).encode()


def vmware_tag(name: bytes, value: bytes, *indices: int) -> bytes:
    head = bytes([len(indices) << 6 | len(value), len(name)]) + name
    return head + b"".join(struct.pack("<I", index) for index in indices) + value


def vmware_block(name: bytes, data: bytes, *indices: int, padding: int = 0, flag: int = 63, wide: bool = True) -> bytes:
    """A tag of any length: sizes on disk and in memory, then padding, then the data (62: compressed)."""
    head = bytes([len(indices) << 6 | flag, len(name)]) + name
    head += b"".join(struct.pack("<I", index) for index in indices)
    return head + struct.pack("<QQH" if wide else "<IIH", len(data), len(data), padding) + bytes(padding) + data


def vmware_state(groups: Mapping[bytes, bytes], *, magic: int = 0xBED3BED3, count: int | None = None) -> bytes:
    """A ``.vmss`` or ``.vmsn``: a table of groups, then the tags of each, ended by two zero bytes."""
    header = struct.pack("<III", magic, 8, len(groups) if count is None else count)
    offset = 12 + 80 * len(groups)
    table, contents = b"", b""
    for name, tags in groups.items():
        table += struct.pack("<64sQQ", name, offset + len(contents), 0)
        contents += tags + b"\0\0"
    return header + table + contents


def vmware_regions(ranges: Sequence[Range]) -> bytes:
    tags = vmware_tag(b"regionsCount", struct.pack("<I", len(ranges)))
    page = 0
    for number, (gfn, data) in enumerate(ranges):
        for name, value in ((b"regionPageNum", page), (b"regionPPN", gfn), (b"regionSize", len(data) // PAGE)):
            tags += vmware_tag(name, struct.pack("<I", value), number)
        page += len(data) // PAGE
    return tags


def vmware(ranges: Sequence[Range]) -> tuple[bytes, bytes]:
    """The ``.vmem`` and the ``.vmss`` of a guest."""
    groups = {
        b"Checkpoint": vmware_tag(b"fileversion", struct.pack("<I", 8)) + vmware_block(b"displayName", b"a guest"),
        b"memory": vmware_tag(b"align_mask", struct.pack("<I", 0xFFFF)) + vmware_regions(ranges),
        b"cpu": vmware_tag(b"CR64", bytes(8), 0, 3),
    }
    return b"".join(data for _, data in ranges), vmware_state(groups)


def firecracker(
    ranges: Sequence[Range], *, release: str = "1.13", magic: int = 0x0710_1984_8664_0000
) -> tuple[bytes, bytes]:
    """The memory file and the state file of a guest: src/vmm/src/vstate/memory.rs ``GuestMemoryState``.

    ``release``: up to 1.10 a region has its offset in the file, from 1.14 its type and which slots are plugged.
    """
    regions, offset = struct.pack("<Q", len(ranges)), 0
    for gfn, data in ranges:
        regions += struct.pack("<QQ", gfn * PAGE, len(data))
        if release == "1.10":
            regions += struct.pack("<Q", offset)
        elif release == "1.14":
            regions += struct.pack("<IQB", 0, 1, 1)
        offset += len(data)
    state = struct.pack("<Q", magic) + struct.pack("<Q5s", 5, b"7.0.0") + bytes(37) + regions + bytes(range(256)) * 2
    return b"".join(data for _, data in ranges), state


def write_files(folder: Path, files: Mapping[str, bytes]) -> Path:
    """Write the files into a new folder, and give that back."""
    folder.mkdir()
    for name, contents in files.items():
        (folder / name).write_bytes(contents)
    return folder
