"""One moment of one paused guest, in every form that this machine's QEMU writes: all of them hold the same pages."""

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from guests.qtest import QtestGuest
from kdumpfile import KdumpFile, find_library
from memshr.errors import ImageError
from memshr.images import open_image
from memshr.pagesource import PageState
from memshr.types import PAGE_SIZE, PageBytes
from odd_dumps import Block, configuration, mapped_ram

MEMORY_MIB = 32
STREAM_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class Written:
    """Dumps of one guest by name of the format, two of its migration streams, and a mapped-ram file that we wrote."""

    dumps: dict[str, Path]
    stream: Path
    stream_with_capability: Path
    mapped_ram: Path


def migrate(guest: QtestGuest, path: Path) -> None:
    """Let QEMU write a migration stream to a file; the guest is of no use afterwards."""
    guest.execute("migrate", {"uri": f"exec:cat > {path}"})
    guest.wait(lambda: guest.execute("query-migrate").get("status") == "completed", STREAM_DEADLINE_S, "migration")


@pytest.fixture(scope="module")
def written(qemu: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Written]:
    """A guest with pages of every kind in its RAM."""
    rng = np.random.default_rng(11)
    with (
        QtestGuest("dumped", qemu, memory_mib=MEMORY_MIB).boot() as guest,
        QtestGuest("migrated", qemu, memory_mib=MEMORY_MIB).boot() as other,
    ):
        for address, value in ((2 << 20, 0xFF), (3 << 20, 0x11), (20 << 20, 0xFF)):
            guest.fill(address, 1 << 20, value)
        for number in range(64):  # pages that can be packed, that cannot, and that are there twice
            guest.write((4 << 20) + number * PAGE_SIZE, rng.bytes(64) * 64)
            guest.write((5 << 20) + number * PAGE_SIZE, rng.bytes(PAGE_SIZE))
            guest.write((6 << 20) + number * PAGE_SIZE, bytes([number // 2]) * PAGE_SIZE)
        offered = guest.execute("query-dump-guest-memory-capability")["formats"]
        dumps = {}
        for name in offered:
            if name == "elf" or name.startswith("kdump"):
                dumps[name] = guest.folder / name
                protocol = {"paging": False, "protocol": f"file:{dumps[name]}", "format": name}
                guest.execute("dump-guest-memory", protocol)
        dumps["raw"] = guest.folder / "raw"
        guest.execute("pmemsave", {"val": 0, "size": MEMORY_MIB << 20, "filename": str(dumps["raw"])})
        migrate(guest, guest.folder / "stream")
        # The one capability that QEMU 7.2 writes into a stream; it changes nothing for memory that is not shared.
        ignored = {"capability": "x-ignore-shared", "state": True}
        other.execute("migrate-set-capabilities", {"capabilities": [ignored]})
        migrate(other, other.folder / "stream")
        ram = np.fromfile(dumps["raw"], np.uint8).reshape(-1, PAGE_SIZE)
        pages = {int(number): ram[number].tobytes() for number in np.flatnonzero(ram.any(axis=1))}
        saved = tmp_path_factory.mktemp("mapped-ram") / "state"
        saved.write_bytes(mapped_ram([Block("pc.ram", len(ram), pages)]))
        yield Written(dumps, guest.folder / "stream", other.folder / "stream", saved)


def contents(path: Path) -> tuple[NDArray[np.int64], PageBytes]:
    """Gfns and pages of an image."""
    with open_image(path) as image:
        out = np.empty((image.total_pages, PAGE_SIZE), np.uint8)
        assert image.read_run(0, out).all()
        gfns = np.concatenate([np.arange(first, first + count) for first, count in image.ranges.tolist()])
        return gfns, out


def test_every_dump_holds_the_same_pages(written: Written) -> None:
    assert {"elf", "kdump-zlib", "raw"} <= written.dumps.keys()
    gfns, pages = contents(written.dumps["elf"])
    assert len(np.unique(pages.view(np.uint64)[:, 0])) > 128
    for name, path in written.dumps.items():
        other_gfns, other_pages = contents(path)
        # pmemsave was told to stop at the end of RAM, and the firmware lies below 4 GiB.
        inside = gfns < len(other_gfns) if name == "raw" else np.ones(len(gfns), np.bool_)
        np.testing.assert_array_equal(other_gfns[np.isin(other_gfns, gfns)], gfns[inside], err_msg=name)
        assert np.array_equal(other_pages[np.isin(other_gfns, gfns)], pages[inside]), name
    assert np.array_equal(contents(written.mapped_ram)[1], contents(written.dumps["raw"])[1])


def test_zero_pages_of_a_kdump_are_holes(written: Written) -> None:
    with open_image(written.dumps["kdump-zlib"]) as image:
        holes = image.states(0, image.total_pages) == PageState.HOLE
    _, pages = contents(written.dumps["elf"])
    np.testing.assert_array_equal(holes, ~pages.any(axis=1))


@pytest.mark.skipif(find_library() is None, reason="no libkdumpfile: install drgn's wheel, or libkdumpfile")
@pytest.mark.parametrize("name", ["elf", "kdump-zlib"])
def test_libkdumpfile_reads_the_same_pages(written: Written, name: str) -> None:
    gfns, pages = contents(written.dumps[name])
    with KdumpFile(written.dumps[name]) as theirs:
        different = [int(gfn) for gfn, page in zip(gfns, pages, strict=True) if theirs.page(int(gfn)) != page.tobytes()]
        assert different == []
        assert theirs.page(int(gfns[-1]) + 1) is None


def test_plain_migration_stream_is_refused(written: Written) -> None:
    for path in (written.stream, written.stream_with_capability):
        with pytest.raises(ImageError, match=r"migration stream without mapped-ram.*dump-guest-memory"):
            open_image(path)


@pytest.mark.parametrize("capabilities", [(), ("x-ignore-shared",)])
def test_our_writer_of_migration_files_agrees_with_qemu(written: Written, capabilities: tuple[str, ...]) -> None:
    real = (written.stream_with_capability if capabilities else written.stream).read_bytes()
    machine = real[13 : 13 + struct.unpack(">I", real[9:13])[0]].decode()
    assert machine.startswith("pc-i440fx-")
    ours = mapped_ram([Block("pc.ram", 0, {})], configuration(machine, capabilities))
    start_of_list = ours.index(b"\x03ram") + len(b"\x03ram") + 8
    assert real[:start_of_list] == ours[:start_of_list]
    total, length = struct.unpack(">Q", real[start_of_list : start_of_list + 8])[0], real[start_of_list + 8]
    assert total % PAGE_SIZE == 4
    name_end = start_of_list + 9 + length
    assert real[name_end - length : name_end] == b"pc.ram"
    assert struct.unpack(">Q", real[name_end : name_end + 8])[0] == MEMORY_MIB << 20
