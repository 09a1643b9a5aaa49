"""Makes ``corpus``: small images of every format, from the tests' own writers. ``python -m fuzz.seeds`` writes them.

A seed is named after the format that reads it; what follows the name says which kind of it this is. Formats that
describe their pages in another file have that one as their seed (see ``fuzz.images.STATE_FILES``).
"""

from __future__ import annotations

import struct

from fuzz.images import CORPUS
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


def main() -> None:
    CORPUS.mkdir(exist_ok=True)
    for old in CORPUS.iterdir():
        old.unlink()
    for name, contents in seeds().items():
        (CORPUS / name).write_bytes(contents)


if __name__ == "__main__":
    main()
