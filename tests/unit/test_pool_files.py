"""Files that a QEMU has mapped under the name of a frame pool, however many they are."""

import mmap
import os

import numpy as np
import pytest

from memshr.errors import BackendError
from memshr.procfs import Vmas, process_mappings
from memshr.qemu import control_area, guests, mark, status, syscalls
from memshr.qemu.attachment import Attachment
from memshr.qemu.guests import GuestProcess
from memshr.qemu.pool import FramePool, files_of_pools
from memshr.types import PAGE_SIZE

BASE = 0x7F0000000000
GUEST = GuestProcess(os.getpid(), 0, "guest", ("qemu-system-x86_64",), None, False, os.getuid())


def line(at: int, pages: int = 1, *, inode: int = 9, device: int = 1, name: str = "memshr-pool:a") -> str:
    start = BASE + at * PAGE_SIZE
    return f"{start:x}-{start + pages * PAGE_SIZE:x} rw-p {at * PAGE_SIZE:08x} 00:{device:02x} {inode} /memfd:{name}\n"


def maps(*lines: str) -> Vmas:
    return Vmas("".join(lines).encode())


def test_lines_are_put_together_by_file_in_the_order_in_which_files_come() -> None:
    mappings = maps(
        *(line(0, inode=8), line(2, inode=3), line(3, inode=8, device=2), line(4, name="other"), line(5, inode=3)),
        line(7, inode=8),
    )
    assert [rows.tolist() for rows in files_of_pools(mappings)] == [[0, 5], [1, 4], [2]]
    assert files_of_pools(maps(line(0, name="other"))) == []
    mapped = list(Attachment.pool_mappings(mappings))
    assert [each.file for each in mapped] == [(os.makedev(0, 1), 8), (os.makedev(0, 1), 3), (os.makedev(0, 2), 8)]
    assert [each.frames.tolist() for each in mapped] == [[0, 7], [2, 5], [3]]
    assert np.array_equal(mapped[0].hvas, [BASE, BASE + 7 * PAGE_SIZE])


TOO_MANY = {
    "files": [line(at, inode=at + 1) for at in range(4097)],
    "pages": [line(0, guests.most_pages() + 1)],
}


@pytest.mark.parametrize("lines", TOO_MANY.values(), ids=TOO_MANY)
def test_too_many_are_one_guests_trouble(lines: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    mappings = maps(*lines)
    with pytest.raises(BackendError, match="it has mapped"):
        list(Attachment.pool_mappings(mappings))
    monkeypatch.setattr(GuestProcess, "mappings", lambda _: mappings)
    monkeypatch.setattr(GuestProcess, "running", property(lambda _: True))
    row = status.status_of(GUEST)
    assert any("it has mapped" in refusal.reason for refusal in row.refusals)
    assert row.groups == ()
    assert status.groups_in_force([GUEST]) == {}


def test_a_guest_that_ends_while_its_pools_are_looked_at_is_one_guests_trouble(monkeypatch: pytest.MonkeyPatch) -> None:
    # What was mapped there is not in /proc/PID/map_files any more.
    mappings = maps(line(0))
    monkeypatch.setattr(GuestProcess, "mappings", lambda _: mappings)
    monkeypatch.setattr(GuestProcess, "running", property(lambda _: True))
    assert status.status_of(GUEST).groups == ()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mark files")
def test_a_file_that_is_called_like_a_pool_is_none_without_the_mark() -> None:
    file = os.memfd_create("memshr-pool:crew")
    os.ftruncate(file, PAGE_SIZE)
    with mmap.mmap(file, PAGE_SIZE):
        (vma,) = [vma for vma in process_mappings(os.getpid()) if vma.path.startswith("/memfd:memshr-pool:crew")]
        assert FramePool.adopt(os.getpid(), vma) is None
    os.close(file)
    made = FramePool.create("crew")
    made.add(np.ones((1, PAGE_SIZE), np.uint8))
    readable = made.readable()
    with mmap.mmap(readable, PAGE_SIZE, prot=mmap.PROT_READ):
        vmas = [vma for vma in process_mappings(os.getpid()) if vma.path.startswith("/memfd:memshr-pool:")]
        adopted = FramePool.adopt(os.getpid(), vmas[0])
        assert adopted is not None
        assert (adopted.group, adopted.file) == ("crew", made.file)
        adopted.close()
    os.close(readable)
    made.close()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can mark files")
def test_a_control_area_has_the_mark_the_size_and_the_seals() -> None:
    def made(*, marked: bool = True, size: int = control_area.CONTROL_BYTES, sealed: bool = True) -> bool:
        file = syscalls.memfd_create(control_area.CONTROL_NAME)
        try:
            os.ftruncate(file, size)
            if marked:
                mark.put(file, b"agent")
            if sealed:
                syscalls.add_seals(file, syscalls.F_SEAL_SHRINK | syscalls.F_SEAL_GROW | syscalls.F_SEAL_SEAL)
            return control_area.is_ours(file)
        finally:
            os.close(file)

    assert made()
    assert not made(marked=False)
    assert not made(size=control_area.CONTROL_BYTES - PAGE_SIZE)
    assert not made(sealed=False)
