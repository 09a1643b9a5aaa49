"""ELF cores of any shape, right or wrong, packed field by field with ``struct``: the tests' own word on the format."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

PAGE = 4096


@dataclass(frozen=True, slots=True)
class Segment:
    """One program header and its bytes. What is None follows from ``data``."""

    vaddr: int = 0
    paddr: int = 0
    data: bytes = b""
    memsz: int | None = None
    filesz: int | None = None
    offset: int | None = None
    kind: int = 1


@dataclass(frozen=True, slots=True)
class Header:
    """The fields of an ELF header that a test may want to be wrong."""

    magic: bytes = b"\x7fELF"
    elf_class: int = 2
    data: int = 1
    kind: int = 4
    machine: int = 62
    phoff: int = 64
    phentsize: int = 56
    phnum: int | None = None
    shoff: int = 0
    shentsize: int = 64

    def packed(self, phnum: int) -> bytes:
        ident = self.magic + bytes([self.elf_class, self.data, 1]) + bytes(9)
        return ident + struct.pack(
            "<HHIQQQIHHHHHH",
            *(self.kind, self.machine, 1, 0, self.phoff, self.shoff, 0, 64, self.phentsize),
            *(phnum if self.phnum is None else self.phnum, self.shentsize, 0, 0),
        )


def core(segments: Sequence[Segment], header: Header | None = None, *, gap_bytes: int = 0) -> bytes:
    """A core with its table first and the segments' bytes behind it, ``gap_bytes`` before each."""
    offset = 64 + 56 * len(segments)
    table, contents = b"", b""
    for segment in segments:
        size = len(segment.data)
        contents += bytes(gap_bytes) + segment.data
        offset += gap_bytes
        table += struct.pack(
            "<IIQQQQQQ",
            *(segment.kind, 6, offset if segment.offset is None else segment.offset, segment.vaddr, segment.paddr),
            size if segment.filesz is None else segment.filesz,
            size if segment.memsz is None else segment.memsz,
            0,
        )
        offset += size
    return (header or Header()).packed(len(segments)) + table + contents


def pattern(first: int, count: int = 1) -> bytes:
    """``count`` pages, each filled with its own number from ``first`` on: no two alike."""
    return b"".join(struct.pack("<Q", number) * (PAGE // 8) for number in range(first, first + count))


def write(path: Path, contents: bytes) -> Path:
    path.write_bytes(contents)
    return path
