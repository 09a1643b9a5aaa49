"""Cloud Hypervisor, Firecracker and VMware: memory in one file, and what it is in another."""

import json
import struct
from pathlib import Path

import pytest

from image_writers import (
    ch_state,
    cloud_hypervisor,
    firecracker,
    vmware,
    vmware_block,
    vmware_regions,
    vmware_state,
    vmware_tag,
    write_files,
)
from memshr.errors import ImageError
from memshr.images import open_image
from odd_cores import PAGE, pattern, write

GIB = 1 << 30
RANGES = [(0, pattern(1, 3)), (0x100000, pattern(4, 2))]


def extents(path: Path, format: str | None = None) -> list[tuple[int, bytes]]:
    with open_image(path, format=format) as image:
        return [(extent.first_gfn, extent.pages.tobytes()) for extent in image.extents]


def refusal(path: Path, format: str | None = None) -> str:
    with pytest.raises(ImageError) as caught:
        open_image(path, format=format)
    assert "\n" not in str(caught.value)
    assert caught.value.remedy or "No such file" in str(caught.value)
    return str(caught.value)


def test_cloud_hypervisor_folder_and_file(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "snapshot", cloud_hypervisor(RANGES))
    for path in (folder, folder / "memory-ranges"):
        assert extents(path) == RANGES
        with open_image(path) as image:
            assert (image.format, image.path, image.name) == ("cloud-hypervisor", path, path.name)
    (folder / "memory-ranges").rename(folder / "memory")
    assert extents(folder / "memory", "cloud-hypervisor") == RANGES
    assert "memory-ranges: cannot be opened" in refusal(folder)


def ch_rows(*rows: object) -> bytes:
    return ch_state({"memory_ranges": {"data": list(rows)}})


CH_REFUSED = {
    "binary state": (cloud_hypervisor(RANGES, nesting="bytes")["state.json"], "not supported: the memory manager's"),
    "sections": (cloud_hypervisor(RANGES, nesting="sections")["state.json"], "not supported: the memory manager's"),
    "no json": (b"{", "no JSON, or damaged"),
    "no utf-8": (b"\xff" * 9, "no JSON, or damaged"),
    "very deep": (b"[" * 100_000, "no JSON, or damaged: RecursionError"),
    "very long number": (b"9" * 10_000, "no JSON, or damaged"),
    "a list": (b"[]", "says nothing of the memory manager"),
    "no manager": (b'{"snapshots": {}}', "says nothing of the memory manager"),
    "state is no json": (
        json.dumps({"snapshots": {"memory-manager": {"snapshot_data": {"state": "{"}}}}).encode(),
        "no JSON, or damaged",
    ),
    "no table": (ch_state({"memory_ranges": {"data": 5}}), "no table of ranges"),
    "row is a number": (ch_rows(5), "whose gpa is no address"),
    "text as address": (ch_rows({"gpa": "0", "length": PAGE}), "whose gpa is no address"),
    "truth as length": (ch_rows({"gpa": 0, "length": True}), "whose length is no address or size"),
    "fraction": (ch_rows({"gpa": 0, "length": 4096.0}), "whose length is no address or size"),
    "negative": (ch_rows({"gpa": -PAGE, "length": PAGE}), "whose gpa is no address"),
    "beyond 2**64": (ch_rows({"gpa": 1 << 70, "length": PAGE}), "whose gpa is no address"),
    "beyond 2**48": (ch_rows({"gpa": (1 << 48) - PAGE, "length": 5 * PAGE}), "beyond the highest guest physical"),
    "unaligned": (ch_rows({"gpa": 100, "length": 5 * PAGE}), "range 0 is not made of whole pages"),
    "more than the file": (ch_rows({"gpa": 0, "length": 6 * PAGE}), "truncated: the ranges in state.json have 24576"),
    "less than the file": (ch_rows({"gpa": 0, "length": 4 * PAGE}), "damaged: the ranges in state.json have 16384"),
    "overlapping": (
        ch_rows({"gpa": 0, "length": 3 * PAGE}, {"gpa": PAGE, "length": 2 * PAGE}),
        "a page would be there twice",
    ),
    "too many": (ch_rows(*[{"gpa": 0, "length": 0}] * 70_000), "70000 ranges of memory"),
    "too large": (b" " * (17 << 20), "memshr reads at most 16777216"),
}


@pytest.mark.parametrize(("state", "message"), CH_REFUSED.values(), ids=CH_REFUSED)
def test_cloud_hypervisor_refused(tmp_path: Path, state: bytes, message: str) -> None:
    folder = write_files(tmp_path / "snapshot", cloud_hypervisor(RANGES) | {"state.json": state})
    assert message in refusal(folder)


def test_cloud_hypervisor_state_is_cut_short_anywhere(tmp_path: Path) -> None:
    files = cloud_hypervisor(RANGES)
    folder = write_files(tmp_path / "snapshot", files)
    for size in range(1, len(files["state.json"]) - 1):
        write(folder / "state.json", files["state.json"][:size])
        refusal(folder)


def test_folder_that_is_no_snapshot(tmp_path: Path) -> None:
    assert "a directory" in refusal(tmp_path)
    write(tmp_path / "memory-ranges", pattern(1))
    assert "a directory" in refusal(tmp_path)
    with open_image(tmp_path / "memory-ranges") as image:
        assert image.format == "raw"
    assert "state.json: cannot be opened" in refusal(tmp_path / "memory-ranges", "cloud-hypervisor")


def test_snapshot_state_that_changes_is_noticed(tmp_path: Path) -> None:
    folder = write_files(tmp_path / "snapshot", cloud_hypervisor(RANGES))
    with open_image(folder) as image:
        (folder / "state.json").write_bytes(b"{}")
        with pytest.raises(ImageError, match=r"state\.json: the file changed"):
            image.check_unchanged()


@pytest.mark.parametrize("release", ["1.10", "1.13", "1.14"])
@pytest.mark.parametrize("gap_start", [3 * GIB, 0xD000_0000])
def test_firecracker_regions_come_from_the_state_file(tmp_path: Path, release: str, gap_start: int) -> None:
    below = gap_start // PAGE
    memory, state = firecracker([(0, pattern(1)), (1 << 20, pattern(2, 3))], release=release)
    assert len(memory) == 4 * PAGE
    state = state.replace(struct.pack("<QQ", 0, PAGE), struct.pack("<QQ", 0, gap_start))
    path = write(tmp_path / "mem_file", b"")
    with path.open("r+b") as file:
        file.write(pattern(1))
        file.truncate(gap_start)
        file.seek(gap_start)
        file.write(pattern(2, 3))
    write(tmp_path / "some_state", state)
    with open_image(path) as image:
        assert image.format == "firecracker"
        assert image.ranges.tolist() == [[0, below], [1 << 20, 3]]
        assert image.extents[1].pages.tobytes() == pattern(2, 3)
        assert (image.states(1000, 10) == 1).all()  # HOLE
    (tmp_path / "some_state").unlink()
    with open_image(path) as image:
        assert image.format == "raw"
        assert image.total_pages == below + 3
    assert "no state file next to it" in refusal(path, "firecracker")


def test_firecracker_small_guest_needs_no_state_file(tmp_path: Path) -> None:
    path = write(tmp_path / "mem_file", pattern(1, 5))
    assert extents(path, "firecracker") == [(0, pattern(1, 5))]
    assert "5 bytes are not a multiple" in refusal(write(tmp_path / "odd", b"12345"), "firecracker")


@pytest.mark.parametrize(
    ("memory_pages", "magic", "place"),
    [(6, 0x0710_1984_8664_0000, -1), (5, 0x0710_1984_AAAA_0000, -1), (5, 0x0710_1984_8664_0000, 90)],
    ids=["another size", "arm64", "truncated"],
)
def test_state_files_that_say_nothing_of_it(tmp_path: Path, memory_pages: int, magic: int, place: int) -> None:
    _, state = firecracker(RANGES, magic=magic)
    write(tmp_path / "state", state[:place])
    with open_image(write(tmp_path / "mem_file", pattern(1, memory_pages))) as image:
        assert image.format == "raw"


def test_firecracker_state_files_that_contradict_each_other(tmp_path: Path) -> None:
    write(tmp_path / "one", firecracker(RANGES)[1])
    write(tmp_path / "two", firecracker([(0, pattern(1, 2)), (0x100000, pattern(4, 3))])[1])
    assert "contradict each other" in refusal(write(tmp_path / "mem_file", pattern(1, 5)))


def test_firecracker_state_of_many_counts_is_searched_in_bounded_time(tmp_path: Path) -> None:
    state = struct.pack("<Q", 0x0710_1984_8664_0000) + struct.pack("<QQ", 1, 0) * ((9 << 20) // 16)
    write(tmp_path / "state", state)
    with open_image(write(tmp_path / "mem_file", pattern(1, 5))) as image:
        assert image.format == "raw"


def vmware_files(folder: Path, ranges: list[tuple[int, bytes]], suffix: str = ".vmss") -> Path:
    vmem, state = vmware(ranges)
    return write_files(folder, {"guest.vmem": vmem, f"guest{suffix}": state})


@pytest.mark.parametrize("suffix", [".vmss", ".vmsn"])
def test_vmware_regions_come_from_the_state_file(tmp_path: Path, suffix: str) -> None:
    folder = vmware_files(tmp_path / "guest", RANGES, suffix)
    for name in ("guest.vmem", f"guest{suffix}"):
        assert extents(folder / name) == RANGES
        with open_image(folder / name) as image:
            assert image.format == "vmware"
    (folder / f"guest{suffix}").unlink()
    assert extents(folder / "guest.vmem") == [(0, pattern(1, 5))]
    with open_image(folder / "guest.vmem") as image:
        assert image.format == "raw"
    assert "no .vmss or .vmsn of the same name" in refusal(folder / "guest.vmem", "vmware")


def test_vmware_without_regions_is_all_of_the_vmem(tmp_path: Path) -> None:
    state = vmware_state({b"memory": vmware_tag(b"regionsCount", bytes(4))})
    folder = write_files(tmp_path / "guest", {"guest.vmem": pattern(1, 5), "guest.vmss": state})
    assert extents(folder / "guest.vmss") == [(0, pattern(1, 5))]


@pytest.mark.parametrize(("magic", "wide"), [(0xBED2BED0, False), (0xBAD1BAD1, True), (0xBED2BED2, True)])
@pytest.mark.parametrize("regions", [True, False])
def test_vmware_memory_in_the_state_file(tmp_path: Path, magic: int, wide: bool, regions: bool) -> None:
    block = vmware_block(b"Memory", pattern(1, 5), 0, 0, padding=77, wide=wide)
    tags = (vmware_regions(RANGES) if regions else b"") + block
    path = write(tmp_path / "guest.vmss", vmware_state({b"memory": tags}, magic=magic))
    assert extents(path) == (RANGES if regions else [(0, pattern(1, 5))])


def region_state(count: int = 1, gfn: int = 0, page: int = 0, pages: int = 5) -> bytes:
    tags = vmware_tag(b"regionsCount", struct.pack("<I", count))
    for name, value in ((b"regionPPN", gfn), (b"regionPageNum", page), (b"regionSize", pages)):
        tags += vmware_tag(name, struct.pack("<Q", value), 0)
    return vmware_state({b"memory": tags})


GOOD = vmware(RANGES)[1]
VMWARE_REFUSED = {
    "wrong magic": (b"\0\0\0\0" + GOOD[4:], "no .vmss or .vmsn of the same name"),
    "other endianness": (GOOD[3::-1] + GOOD[4:], "no .vmss or .vmsn of the same name"),
    "absurd number of groups": (vmware_state({b"memory": b""}, count=1 << 31), "2147483648 groups"),
    "groups beyond the end": (vmware_state({b"memory": b""}, count=4000), "truncated: the table of 4000 groups"),
    "no group": (vmware_state({b"cpu": b""}), "no group of tags for the memory"),
    "tags at the highest offset": (
        GOOD[:92] + struct.pack("<64sQQ", b"memory", (1 << 64) - 1, 0) + GOOD[172:],
        "truncated: a tag",
    ),
    "tags without an end": (region_state()[:-2], "truncated: a tag"),
    "too many tags": (vmware_state({b"memory": vmware_tag(b"", b"x") * 70_000}), "more than 65536 tags"),
    "absurd number of regions": (region_state(count=1 << 30), "1073741824 regions"),
    "region not described": (region_state(count=2), "region 1 of 2 is not described"),
    "region beyond the end": (region_state(pages=6), "region 0 goes beyond the 20480 bytes"),
    "region at an absurd place": (region_state(page=(1 << 64) - 1), "region 0 goes beyond"),
    "region beyond 2**48": (region_state(gfn=(1 << 36) - 1), "beyond the highest guest physical address"),
    "region of nothing": (region_state(pages=0), "its regions are empty"),
    "overlapping": (
        vmware_state({b"memory": vmware_regions([(0, bytes(3 * PAGE)), (1, bytes(2 * PAGE))])}),
        "overlaps another one",
    ),
    "block beyond the end": (
        vmware_state({b"memory": b"\x3f\x01M" + struct.pack("<QQH", 1 << 40, 1 << 40, 0)}),
        "truncated: a block should reach",
    ),
}


@pytest.mark.parametrize(("state", "message"), VMWARE_REFUSED.values(), ids=VMWARE_REFUSED)
def test_vmware_refused(tmp_path: Path, state: bytes, message: str) -> None:
    folder = write_files(tmp_path / "guest", {"guest.vmem": pattern(1, 5), "guest.vmss": state})
    assert message in refusal(folder / "guest.vmem", "vmware")


def test_vmware_compressed_memory_is_not_supported(tmp_path: Path) -> None:
    state = vmware_state({b"memory": vmware_block(b"Memory", bytes(9), 0, 0, flag=62)})
    assert "not supported: compressed memory" in refusal(write(tmp_path / "guest.vmss", state))


def test_vmware_state_without_its_vmem(tmp_path: Path) -> None:
    assert "guest.vmem: cannot be opened" in refusal(write(tmp_path / "guest.vmss", GOOD))


def test_vmware_state_is_cut_short_anywhere(tmp_path: Path) -> None:
    folder = vmware_files(tmp_path / "guest", RANGES)
    memory_end = GOOD.index(b"CR64")  # the group behind that of the memory is never looked at
    for size in range(4, memory_end - 3):
        write(folder / "guest.vmss", GOOD[:size])
        assert "truncated" in refusal(folder / "guest.vmss")
