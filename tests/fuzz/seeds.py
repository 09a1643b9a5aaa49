"""Makes ``corpus``: what each target's search starts from, and what once broke it. ``python -m fuzz.seeds`` writes it.

Images are small ones of every format, from the tests' own writers.

A seed is named after the format that reads it; what follows the name says which kind of it this is. Formats that
describe their pages in another file have that one as their seed (see ``fuzz.images.STATE_FILES``).
"""

from __future__ import annotations

import json
import struct
from collections.abc import Callable

from fuzz.campaign import CORPUS
from guests.fake_qmp import flat_view
from image_writers import (
    XlCore,
    avml,
    avml_range,
    cloud_hypervisor,
    firecracker,
    lime,
    lime_range,
    vmware,
    vmware_block,
    vmware_regions,
    vmware_state,
)
from memshr.qemu.control_area import CONTROL_BYTES, DATA, OFFER_AT, RECEIVED_AT, SLOTS, STATE_AT, TABLE
from odd_cores import PAGE, Header, Segment, core, pattern
from odd_dumps import PACKERS, Block, flattened, in_pieces, kdump, mapped_ram, packed

RANGES = [(0, pattern(1, 2)), (0x100000, pattern(3))]
FIVE_PAGES = [(0, pattern(1, 3)), (0x100000, pattern(4, 2))]
"""What the file next to a seed of two files has."""

PAGES = pattern(1), pattern(2)


def _mapped_ram() -> bytes:
    """A migration file of three pages, of which one is zero, without the gap of 1 MiB that QEMU leaves before them."""
    whole = mapped_ram([Block("pc.ram", 3, {0: PAGES[0], 2: PAGES[1]}, pages_offset=PAGE)])
    return whole[:PAGE] + PAGES[0] + bytes(PAGE) + PAGES[1]


def seeds() -> dict[str, bytes]:
    """File name -> contents. The same each time."""
    segments = [Segment(kind=4, data=b"note"), *(Segment(paddr=gfn * PAGE, data=data) for gfn, data in RANGES)]
    counted = [Segment(kind=4, data=struct.pack("<IIQQQQIIQQ", *[0] * 7, 3, 0, 0)), *segments[1:]]
    return {
        "elfcore-machine": core(segments),
        "elfcore-process": core([Segment(vaddr=0x7FFF_0000_0000, data=pattern(1)), Segment(vaddr=1 << 12, memsz=PAGE)]),
        "elfcore-counted-in-section": core(counted, Header(phnum=0xFFFF, shoff=64 + 56 * len(counted))),
        "xl-core-hvm": XlCore(RANGES, padding_pages=1).packed(),
        "xl-core-pv": XlCore(RANGES, pv=True).packed(),
        **{
            f"kdump-{way}": kdump(dict.fromkeys([0, 5], packed(PAGES[0], way)) | {9: packed(PAGES[1], way)})
            for way in PACKERS
        },
        "kdump-flattened": flattened(in_pieces(kdump({2: packed(PAGES[0], "zlib")}), 5000)),
        "mapped-ram-one-block": _mapped_ram(),
        "lime-ranges": lime(RANGES),
        "lime-partial-pages": lime_range(100, pattern(1, 2)) + lime_range(3 * PAGE, pattern(3)[:-300]),
        "avml-ranges": avml(RANGES),
        "avml-partial-pages": avml_range(100, pattern(1, 2)) + avml_range(3 * PAGE, pattern(3)[:-300]),
        "avml-two-pieces": avml_range(0, pattern(1, 17)),
        "cloud-hypervisor-state": cloud_hypervisor(FIVE_PAGES)["state.json"],
        "firecracker-1.10": firecracker(FIVE_PAGES, release="1.10")[1],
        "firecracker-1.13": firecracker(FIVE_PAGES, release="1.13")[1],
        "firecracker-1.14": firecracker(FIVE_PAGES, release="1.14")[1],
        "vmware-regions": vmware(FIVE_PAGES)[1],
        "vmware-memory-inside": vmware_state(
            {b"memory": vmware_regions(FIVE_PAGES) + vmware_block(b"Memory", pattern(1, 5), 0, 0, padding=9)}
        ),
        "raw-pages": pattern(1, 2),
    }


def _answers(*values: object) -> bytes:
    """Lines of QMP that return these values."""
    return b"\n".join(json.dumps({"return": value, "id": "memshr-1"}).encode() for value in values)


def monitor_seeds() -> dict[str, bytes]:
    """File name -> answers of QEMU: one of each kind that memshr asks for, and some that no QEMU gives."""
    view = flat_view((0, 0x8000000, "pc.ram"), (0x100000000, 0x100200000, "/objects/m1"))
    places = ["Host virtual address for 0x0 (pc.ram) is 0x7f0000000000\r\n", "... is 0x7f0010000000\r\n"]
    status = {"status": "running", "running": True, "singlestep": False}
    device = {"name": "balloon0", "type": "child<virtio-balloon-pci>"}
    return {
        "layout": _answers([{"id": "m1", "size": 1 << 21}], view, *places),
        "refusals": _answers(status, {}, None, {"enabled": False}, [{"type": "dimm"}], [device], True, [device], False),
        "refusals-migrating": _answers(status, {"status": "active"}, "/objects/sev0", [], [], []),
        "drives": _answers([{"cache": {"direct": False}}, {"cache": {"direct": True}}]),
        "state": _answers(status, status),
        "drain": _answers({"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, {"mode": "none"}),
        "refused": b'{"error": {"class": "GenericError", "desc": "File descriptor named \'memshr\' not found"}}',
        "deep": b'{"return": ' + b"[" * 5000,
        "digits": b'{"return": [' + b"9" * 5000 + b"]}",
        "escapes": _answers({"status": "[/x]\x1b[31m\ud800", "running": True}),
        "overlapping": _answers([], flat_view((0, 0x8000000, "pc.ram"), (0x1000, 0x9000, "pc.ram")), *places),
        "too-large": _answers([], flat_view((0, 2 << 40, "pc.ram")), *places),
    }


def _maps_line(start: int, pages: int, path: str, *, inode: int = 0, flags: str = "rw-p") -> str:
    return f"{start:x}-{start + pages * PAGE:x} {flags} 00000000 00:01 {inode}".ljust(73) + path


def maps_seeds() -> dict[str, bytes]:
    """File name -> texts of /proc/PID/maps, some of them longer than one process of the host could have."""
    base = 0x7F0000000000
    pool = "/memfd:memshr-pool:a (deleted)"
    own = [
        _maps_line(0x55AA00000000, 3, "/usr/bin/qemu-system-x86_64", inode=7, flags="r-xp"),
        _maps_line(base, 64, ""),
    ]
    shared = [_maps_line(base + (1 + 2 * at) * PAGE, 1, pool, inode=9) for at in range(4)]
    return {
        "guest": "\n".join([*own, ""]).encode(),
        "frames": "\n".join([own[0], *shared, _maps_line(0x7FFF00000000, 33, "[stack]"), ""]).encode(),
        "many-alike": "\n".join(_maps_line(base + at * PAGE, 1, pool, inode=9) for at in range(300)).encode(),
        "terabytes-of-frames": (_maps_line(0x1000_0000_0000, 1 << 34, pool, inode=9) + "\n").encode(),
        "huge-inode": _maps_line(base, 1, "x", inode=10**20 - 1).encode(),
        "backwards": _maps_line(base, -1, pool, inode=9).encode(),
        "odd-names": "\n".join(
            [own[1], _maps_line(base + (1 << 20), 1, "/a\\012 \x1b[2J", inode=3), "\udcff x"]
        ).encode(errors="surrogateescape"),
    }


def area_seeds() -> dict[str, bytes]:
    """File name -> data of control areas; see ``control_area`` for where things are."""
    size = CONTROL_BYTES - DATA
    honest = bytearray(size)
    struct.pack_into("<i", honest, OFFER_AT, -1)
    struct.pack_into(f"<{SLOTS}i", honest, 0x1A000, 7, *[-1] * (SLOTS - 1))
    struct.pack_into("<3I", honest, STATE_AT, 4, 1, 1)
    struct.pack_into("<i", honest, RECEIVED_AT, 8)
    # Notes in every place for them, and a number in every place for a descriptor.
    full = bytearray(honest)
    struct.pack_into("<Q", full, 0x1B000, 1 << 63)
    struct.pack_into(f"<{SLOTS}i", full, 0x1A000, *range(SLOTS))
    huge = bytearray(honest)
    struct.pack_into("<Q", huge, TABLE - DATA + 56, 1 << 62)
    no_errno = bytearray(honest)
    struct.pack_into("<q", no_errno, TABLE - DATA + 56, -(1 << 40))
    end = 0x1C000
    return {
        "honest": bytes(honest[: end + 1]),
        "no-socket": bytes(honest[:0x1A000]) + b"\xff\xff\xff\xff" + bytes(honest[0x1A004 : end + 1]),
        "huge-result": bytes(huge[: end + 1]),
        "no-errno": bytes(no_errno[: end + 1]),
        "full": bytes(full[: end + 1]),
        "no-answer": bytes(honest[:end]),
        "two-answers": bytes(honest[: end + 2]),
        "ones": b"\xff" * (0x1000 + 1),
        "nothing": b"",
    }


CORPORA: dict[str, Callable[[], dict[str, bytes]]] = {
    "images": seeds,
    "monitor": monitor_seeds,
    "maps": maps_seeds,
    "area": area_seeds,
}
"""Target of ``fuzz.campaign`` -> its seeds, which are in the folder of that name."""


def main() -> None:
    for target, made in CORPORA.items():
        folder = CORPUS / target
        folder.mkdir(parents=True, exist_ok=True)
        for old in folder.iterdir():
            old.unlink()
        for name, contents in made().items():
            (folder / name).write_bytes(contents)


if __name__ == "__main__":
    main()
