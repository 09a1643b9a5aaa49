"""Domains made of memory images: opened in no time, no memory until read, copy on write, whatever their size."""

import os
from pathlib import Path

import numpy as np
import pytest

from memshr import errors
from memshr.embedded import EmbeddedHypervisor
from memshr.images import open_image
from memshr.types import PAGE_SIZE, DomId, Extent, Gfn, PageArray

GIB = 1 << 30


def resident_bytes() -> int:
    """What this process has in memory that is its own: not pages of files that it merely reads."""
    fields = dict(line.split(":") for line in Path("/proc/self/status").read_text().splitlines())
    return int(fields["RssAnon"].split()[0]) * 1024


def sparse_image(path: Path, size: int) -> Path:
    with path.open("wb") as file:
        file.truncate(size)
        os.pwrite(file.fileno(), b"first", 0)
        os.pwrite(file.fileno(), b"last", size - PAGE_SIZE)
    return path


def test_domain_of_100_gib_costs_nothing_until_it_is_read(tmp_path: Path) -> None:
    size = 100 * GIB
    path = sparse_image(tmp_path / "big.raw", size)
    hypervisor = EmbeddedHypervisor()
    before = resident_bytes()
    with open_image(path) as image:
        domid = hypervisor.create_domain("big", extents=image.extents)
    pages = size // PAGE_SIZE
    assert hypervisor.domain_info(domid).tot_pages == pages
    assert hypervisor.populated_ranges(domid).tolist() == [[0, pages]]
    last = Gfn(pages - 1)
    buffer = np.empty((1, PAGE_SIZE), np.uint8)
    assert hypervisor.read_range(domid, last, 1, buffer)[0, :4].tobytes() == b"last"
    hypervisor.write(domid, last, b"mine")
    assert hypervisor.nominate_gfn(domid, Gfn(0)) == 2
    assert hypervisor.audit().clean
    assert resident_bytes() - before < 8 << 20
    assert hypervisor.read(domid, last)[:4] == b"mine"
    with path.open("rb") as file:
        assert os.pread(file.fileno(), 4, size - PAGE_SIZE) == b"last"
    hypervisor.destroy_domain(domid)
    assert hypervisor.memory.allocated_pages == 0
    assert resident_bytes() - before < 1 << 30  # destroying walks the frames' owners once


def extents(*runs: tuple[int, int]) -> list[Extent]:
    return [Extent(Gfn(first), np.full((count, PAGE_SIZE), first % 251, np.uint8)) for first, count in runs]


def test_holes_between_extents() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("d", extents=extents((0, 3), (1 << 20, 70_000), ((1 << 36) - 2, 2)))
    assert hypervisor.populated_ranges(domid).tolist() == [[0, 3], [1 << 20, 70_000], [(1 << 36) - 2, 2]]
    for gfn in (3, (1 << 20) - 1, (1 << 20) + 70_000):
        with pytest.raises(errors.NotSharableError):
            hypervisor.nominate_gfn(domid, Gfn(gfn))
    far = Gfn((1 << 36) - 1)
    assert hypervisor.read(domid, far) == bytes([((1 << 36) - 2) % 251]) * PAGE_SIZE
    hypervisor.decrease_reservation(domid, Gfn((1 << 20) + 65_536))
    assert hypervisor.populated_ranges(domid).tolist() == [
        [0, 3],
        [1 << 20, 65_536],
        [(1 << 20) + 65_537, 70_000 - 65_537],
        [(1 << 36) - 2, 2],
    ]
    assert hypervisor.audit().clean


@pytest.mark.parametrize("runs", [[(0, 3), (2, 3)], [((1 << 36) - 1, 2)], [(-1, 2)]])
def test_extents_that_cannot_be(runs: list[tuple[int, int]]) -> None:
    hypervisor = EmbeddedHypervisor()
    with pytest.raises(ValueError, match=r"overlap|address width"):
        hypervisor.create_domain("d", extents=extents(*runs))
    assert hypervisor.domains() == []
    assert hypervisor.memory.allocated_pages == 0


def test_range_over_shared_and_private_frames_reads_as_the_guest_does() -> None:
    hypervisor = EmbeddedHypervisor()
    domid = hypervisor.create_domain("d", extents=extents((0, 8)))
    rng = np.random.default_rng(3)
    written = {gfn: rng.bytes(PAGE_SIZE) for gfn in (1, 4, 5)}
    for gfn, data in written.items():
        hypervisor.write(domid, Gfn(gfn), data)
    handles, _ = hypervisor.nominate_gfns(PageArray.of_domain(domid, np.array([0, 2, 3])))
    hypervisor.share_gfns(domid, Gfn(0), handles[0], domid, Gfn(3), handles[2])
    buffer = np.empty((8, PAGE_SIZE), np.uint8)
    pages = hypervisor.read_range(domid, Gfn(0), 8, buffer)
    assert [page.tobytes() for page in pages] == [hypervisor.read(domid, Gfn(gfn)) for gfn in range(8)]
    with pytest.raises(ValueError, match="read-only"):
        hypervisor.read_range(domid, Gfn(0), 1, buffer)[0, 0] = 1


def test_machine_that_is_too_small() -> None:
    hypervisor = EmbeddedHypervisor(limit_pages=10)
    hypervisor.create_domain("a", 6)
    with pytest.raises(errors.HostMemoryError, match="4 free pages, b needs 5"):
        hypervisor.create_domain("b", 5)
    assert [info.name for info in hypervisor.domains()] == ["a"]


def test_new_domain_does_not_inherit_what_was_asked_of_its_number() -> None:
    hypervisor = EmbeddedHypervisor()
    buffer = np.empty((1, PAGE_SIZE), np.uint8)
    assert hypervisor.read_pages(PageArray.of_domain(DomId(1), np.array([0])), buffer).tolist() == [-3]
    domid = hypervisor.create_domain("d", extents=extents((0, 2)))
    assert domid == 1
    assert hypervisor.nominate_gfn(domid, Gfn(1)) == 2
