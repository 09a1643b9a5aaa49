"""One guest, written in every format by the tests' own writers: the same pages come out of all of them."""

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from image_writers import XlCore, avml, cloud_hypervisor, firecracker, lime, vmware, write_files
from memshr import estimate
from memshr.images import FORMATS, MemoryImage, open_image
from memshr.indices import Row, of_kind
from odd_cores import PAGE, Segment, core, pattern, write
from odd_dumps import kdump, packed

LOW = pattern(1, 70) + pattern(1, 3) + bytes(20 * PAGE) + np.random.default_rng(6).bytes(60 * PAGE)
HIGH = bytes(PAGE) + pattern(1, 30) + pattern(500, 10)
GUEST = [(0, LOW), (1 << 20, HIGH)]
"""Some pages alike, some zero, some that cannot be compressed; in two regions, as guests of more than 3 GiB have."""


def xl(folder: Path, pv: bool = False) -> Path:
    return write(folder / "guest.core", XlCore(GUEST[::-1], pv=pv).packed())


def elf(folder: Path) -> Path:
    return write(folder / "dump", core([Segment(paddr=gfn * PAGE, data=data) for gfn, data in GUEST]))


def memory_with_state(folder: Path) -> Path:
    memory, state = firecracker(GUEST)
    write(folder / "vmstate", state)
    return write(folder / "mem_file", memory)


def vmem(folder: Path) -> Path:
    memory, state = vmware(GUEST)
    write(folder / "guest.vmss", state)
    return write(folder / "guest.vmem", memory)


def gathered(folder: Path) -> Path:
    pages = {gfn + n: data[n * PAGE : (n + 1) * PAGE] for gfn, data in GUEST for n in range(len(data) // PAGE)}
    return write(folder / "dump", kdump({gfn: packed(page, "zlib") for gfn, page in pages.items()}))


WAYS: dict[str, tuple[str, Callable[[Path], Path]]] = {
    "elfcore": ("elfcore", elf),
    "kdump": ("kdump", gathered),
    "xl-core": ("xl-core", xl),
    "xl-core of a PV guest": ("xl-core", lambda folder: xl(folder, pv=True)),
    "lime": ("lime", lambda folder: write(folder / "image.lime", lime(GUEST))),
    "avml": ("avml", lambda folder: write(folder / "image.avml", avml(GUEST))),
    "firecracker": ("firecracker", memory_with_state),
    "cloud-hypervisor": ("cloud-hypervisor", lambda folder: write_files(folder / "snapshot", cloud_hypervisor(GUEST))),
    "vmware": ("vmware", vmem),
}


def digests(image: MemoryImage) -> list[tuple[int, str]]:
    """gfn and digest of each page, read once in order and once in another."""
    total = image.total_pages
    gfns = np.concatenate([np.arange(first, first + count) for first, count in image.ranges.tolist()])
    in_order = np.empty((total, PAGE), np.uint8)
    assert image.read_run(0, in_order).all()
    rows = np.random.default_rng(1).permutation(total)
    mixed = np.empty((total, PAGE), np.uint8)
    assert image.read(of_kind(Row, rows), mixed).all()
    assert (mixed == in_order[rows]).all()
    assert b"".join(extent.pages.tobytes() for extent in image.extents) == in_order.tobytes()
    return [
        (gfn, hashlib.sha256(page.tobytes()).hexdigest()) for gfn, page in zip(gfns.tolist(), in_order, strict=True)
    ]


EXPECTED = [
    (gfn + n, hashlib.sha256(data[n * PAGE : (n + 1) * PAGE]).hexdigest())
    for gfn, data in GUEST
    for n in range(len(data) // PAGE)
]


@pytest.mark.parametrize(("format_name", "way"), WAYS.values(), ids=WAYS)
def test_same_pages(tmp_path: Path, format_name: str, way: Callable[[Path], Path]) -> None:
    with open_image(way(tmp_path)) as image:
        assert image.format == format_name
        assert digests(image) == EXPECTED


@pytest.mark.parametrize("way", [way for _, way in WAYS.values()], ids=WAYS)
def test_same_estimate(tmp_path: Path, way: Callable[[Path], Path]) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    found = estimate([elf(tmp_path / "a"), way(tmp_path / "b")], groups=["all"])
    ours, theirs = found.domains
    figures = ("total_pages", "zero_pages", "unique_pages", "shared_pages", "intra_pages", "mappings")
    assert [getattr(ours, name) for name in figures] == [getattr(theirs, name) for name in figures]
    distinct = {digest for _, digest in EXPECTED} - {hashlib.sha256(bytes(PAGE)).hexdigest()}
    assert (found.total_pages, found.zero_pages) == (2 * len(EXPECTED), 2 * 21)
    assert found.saved_pages == 2 * len(EXPECTED) - len(distinct)
    assert found.unique_pages == 0, "each content of one is in the other"


def test_a_raw_image_has_the_same_contents_at_other_addresses(tmp_path: Path) -> None:
    with open_image(write(tmp_path / "raw", LOW + HIGH)) as image:
        assert [digest for _, digest in digests(image)] == [digest for _, digest in EXPECTED]


def test_every_format_of_these_is_one_that_is_read() -> None:
    assert {format_name for format_name, _ in WAYS.values()} <= {row.name for row in FORMATS}
