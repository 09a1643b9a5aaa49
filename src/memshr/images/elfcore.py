"""ELF cores: what QEMU's ``dump-guest-memory``, the Linux kernel, gdb's ``gcore`` and ``memshr capture`` write.

A core of a machine gives each segment's guest physical address in ``p_paddr``. A core of a process has no physical
addresses, all of them are zero, and ``p_vaddr`` takes their place: the process is a machine whose memory lies at its
virtual addresses. Only what is in the file is a page; the rest of a segment (``p_memsz`` beyond ``p_filesz``) is
unknown and left out. What lies at 2**48 and above is no memory of a machine (a core of a process has ``[vsyscall]``
there, one of a kernel its virtual addresses) and left out too.

All of a table is checked at once, as arrays: a core may have a million segments, and any of its numbers may be a lie.
Layout: System V ABI, "Object Files"; for more than 65,534 segments ``elf(5)``, "PN_XNUM".
"""

from __future__ import annotations

from typing import Any, BinaryIO

import numpy as np
from numpy.typing import NDArray

from memshr.errors import ImageError
from memshr.images.file import RUN, ImageFile, Layout, checked_runs
from memshr.types import MAX_GFN_BITS, PAGE_SHIFT, PAGE_SIZE, PageBytes

MAX_SEGMENTS = 1 << 20
"""The largest program-header table that is read or written; a table of more is taken for a damaged one."""

_ADDRESS_LIMIT = 1 << (MAX_GFN_BITS + PAGE_SHIFT)

EHDR = np.dtype(
    [
        ("magic", "S4"),
        ("elf_class", "u1"),
        ("data", "u1"),
        ("ident", "V10"),
        ("type", "<u2"),
        ("machine", "<u2"),
        ("version", "<u4"),
        ("entry", "<u8"),
        ("phoff", "<u8"),
        ("shoff", "<u8"),
        ("flags", "<u4"),
        ("ehsize", "<u2"),
        ("phentsize", "<u2"),
        ("phnum", "<u2"),
        ("shentsize", "<u2"),
        ("shnum", "<u2"),
        ("shstrndx", "<u2"),
    ]
)
"""Elf64_Ehdr"""
_PHDR = np.dtype(
    [
        ("type", "<u4"),
        ("flags", "<u4"),
        ("offset", "<u8"),
        ("vaddr", "<u8"),
        ("paddr", "<u8"),
        ("filesz", "<u8"),
        ("memsz", "<u8"),
        ("align", "<u8"),
    ]
)
SHDR = np.dtype(
    [
        ("name", "<u4"),
        ("type", "<u4"),
        ("flags", "<u8"),
        ("addr", "<u8"),
        ("offset", "<u8"),
        ("size", "<u8"),
        ("link", "<u4"),
        ("info", "<u4"),
        ("addralign", "<u8"),
        ("entsize", "<u8"),
    ]
)
"""Elf64_Shdr"""

_MAGIC = b"\x7fELF"
_CLASS_64 = 2
_LITTLE_ENDIAN = 1
_ET_CORE = 4
_EM_386 = 3
_EM_X86_64 = 62
_EV_CURRENT = 1
_PT_LOAD = 1
_PF_R = 4
_PN_XNUM = 0xFFFF

_TYPES = {1: "an object file", 2: "an executable", 3: "a shared library or executable"}
_MACHINES = {21: "64-bit PowerPC", 22: "s390x", 40: "32-bit Arm", 183: "arm64", 243: "RISC-V"}
_WRITE_AGAIN = "write or copy the image again"


class ElfCore:
    """64-bit little-endian x86-64 ELF cores, of machines and of processes."""

    name = "elfcore"

    def detect(self, file: ImageFile) -> bool:
        return file.starts_with(_MAGIC)

    def layout(self, file: ImageFile) -> Layout:
        """The segments that have contents, those that go on where another ends joined to one run.

        :raises ImageError: the file is no such core, a table or segment goes beyond its end, segments overlap in the
            address space or in the file, or are not made of whole pages.
        """
        table_offset, count = _program_headers(file)
        table = file.records(_PHDR, table_offset, count, f"the table of {count} program headers")
        runs = _checked_loads(file, table, table_offset)
        if not len(runs):
            raise file.error(
                "the core holds no memory: no PT_LOAD segment has contents",
                remedy="write it again, with QEMU's dump-guest-memory or memshr capture",
            )
        return Layout(runs, file)


def _program_headers(file: ImageFile) -> tuple[int, int]:
    """Offset and length of the program-header table, once the ELF header is found to be that of a core we read."""
    header = file.records(EHDR, 0, 1, "the ELF header")[0]
    if header["magic"] != _MAGIC:
        raise file.error("no ELF file: the magic number is missing", offset=0, remedy="leave --format out")
    if header["elf_class"] != _CLASS_64:
        raise file.error("not supported: this ELF file is not 64-bit", offset=4, remedy="memshr reads 64-bit x86 cores")
    if header["data"] != _LITTLE_ENDIAN:
        raise file.error("not supported: not little-endian", offset=5, remedy="memshr reads 64-bit x86 cores")
    kind = int(header["type"])
    if kind != _ET_CORE:
        what = _TYPES.get(kind, f"of ELF type {kind}")
        raise file.error(f"no core: the file is {what}", offset=16, remedy="name a core, such as gcore writes")
    machine = int(header["machine"])
    # QEMU names the 32-bit machine, even in a 64-bit core, if the guest's vCPU is not in long mode at that moment
    # (target/i386/arch_dump.c, cpu_get_dump_info); pages are pages.
    if machine not in {_EM_X86_64, _EM_386}:
        what = _MACHINES.get(machine, f"ELF machine {machine}")
        raise file.error(f"not supported: a core of {what}", offset=18, remedy="memshr reads 64-bit x86 cores")
    count, offset = int(header["phnum"]), int(header["phoff"])
    if count == _PN_XNUM:
        section_offset = int(header["shoff"])
        if not section_offset or header["shentsize"] != SHDR.itemsize:
            raise file.error(
                "damaged: it has more than 65,534 program headers, and no section header that says how many",
                offset=40,
                remedy=_WRITE_AGAIN,
            )
        count = int(file.records(SHDR, section_offset, 1, "section header 0")[0]["info"])
    if count and header["phentsize"] != _PHDR.itemsize:
        raise file.error(
            f"damaged: program headers of {header['phentsize']} bytes, expected {_PHDR.itemsize}",
            offset=54,
            remedy=_WRITE_AGAIN,
        )
    if count > MAX_SEGMENTS:
        raise file.error(f"{count} program headers; memshr reads at most {MAX_SEGMENTS}", remedy=_WRITE_AGAIN)
    return offset, count


def _checked_loads(file: ImageFile, table: NDArray[Any], table_offset: int) -> NDArray[Any]:
    """The runs that the PT_LOAD segments with contents make, in order of address, after every check."""
    index = np.flatnonzero((table["type"] == _PT_LOAD) & (table["filesz"] > 0))
    loads = table[index]

    def refuse(bad: NDArray[np.bool_], problem: str, remedy: str = _WRITE_AGAIN) -> None:
        if bad.any():
            segment = int(index[np.argmax(bad)])
            raise file.error(
                f"program header {segment}: {problem}", offset=table_offset + segment * _PHDR.itemsize, remedy=remedy
            )

    # Numbers of the file are compared with bounds before they are added up, so that no sum can overflow.
    size = np.uint64(file.size)
    refuse(
        (loads["filesz"] > size) | (loads["offset"] > size - np.minimum(loads["filesz"], size)),
        f"truncated: the segment ends beyond the end of the file ({file.size:#x})",
    )
    refuse(loads["filesz"] > loads["memsz"], "damaged: more bytes in the file than in memory")
    address = loads["paddr"] if loads["paddr"].any() else loads["vaddr"]
    inside = address < _ADDRESS_LIMIT
    index, loads, address = index[inside], loads[inside], address[inside]
    refuse(
        address + loads["filesz"] > _ADDRESS_LIMIT,
        f"damaged: the segment ends beyond the highest guest physical address ({_ADDRESS_LIMIT:#x})",
    )
    unaligned = (address % PAGE_SIZE != 0) | (loads["filesz"] % PAGE_SIZE != 0)
    refuse(unaligned, f"the segment is not made of whole pages of {PAGE_SIZE} bytes")

    # The others stay as empty runs, so that errors count as the table does.
    runs = np.zeros(len(table), RUN)
    runs["gfn"][index], runs["offset"][index] = address >> PAGE_SHIFT, loads["offset"]
    runs["pages"][index] = loads["filesz"] >> PAGE_SHIFT
    places = table_offset + np.arange(len(table)) * _PHDR.itemsize
    remedy = "write it again; with QEMU, dump-guest-memory without -p"
    return checked_runs(file, runs, "program header", places=places, if_overlapping=remedy)


class CoreWriter:
    """Writes an ELF core of a process: runs of pages at virtual addresses, in ascending order.

    The table of segments follows the pages, because how many there are is known only when all has been read. Pages
    begin at a multiple of PAGE_SIZE in the file, so a mapping of it shares the page cache page by page.

    :param file: a new, empty file, open for writing; the caller closes it. Its OSErrors come through.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._segments: list[list[int]] = []
        self._end = PAGE_SIZE
        file.write(bytes(PAGE_SIZE))

    def add(self, address: int, pages: PageBytes) -> None:
        """Write the pages from ``address`` on, shape ``(n, PAGE_SIZE)``, C-contiguous.

        A run that goes on where the last one ended makes no new segment.
        """
        last = self._segments[-1] if self._segments else None
        if last and last[0] + last[1] == address:
            last[1] += pages.nbytes
        else:
            self._segments.append([address, pages.nbytes, self._end])
        self._file.write(pages.data)
        self._end += pages.nbytes

    def finish(self) -> int:
        """Write the tables and the header. The file is a core from here on.

        :returns: the size of the file in bytes.
        :raises ImageError: there are more than MAX_SEGMENTS segments.
        """
        count = len(self._segments)
        if count > MAX_SEGMENTS:
            raise ImageError(f"the core would have {count} segments, at most {MAX_SEGMENTS} can be read again")
        table = np.zeros(count, dtype=_PHDR)
        table["type"], table["flags"], table["align"] = _PT_LOAD, _PF_R, PAGE_SIZE
        if count:
            segments = np.array(self._segments, dtype=np.uint64)
            table["vaddr"], table["filesz"], table["offset"] = segments.T
            table["memsz"] = table["filesz"]
        header = np.zeros(1, dtype=EHDR)
        header["magic"], header["elf_class"], header["data"] = _MAGIC, _CLASS_64, _LITTLE_ENDIAN
        header["ident"] = bytes([_EV_CURRENT, *[0] * 9])
        header["type"], header["machine"], header["version"] = _ET_CORE, _EM_X86_64, _EV_CURRENT
        header["ehsize"], header["phentsize"], header["shentsize"] = EHDR.itemsize, _PHDR.itemsize, SHDR.itemsize
        header["phoff"], header["phnum"] = self._end, min(count, _PN_XNUM)
        self._file.write(table.tobytes())
        self._end += table.nbytes
        if count >= _PN_XNUM:
            section = np.zeros(1, dtype=SHDR)
            section["info"], section["size"] = count, 1
            header["shoff"], header["shnum"] = self._end, 1
            self._file.write(section.tobytes())
            self._end += section.nbytes
        self._file.seek(0)
        self._file.write(header.tobytes())
        return self._end
