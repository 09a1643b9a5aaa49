"""/proc readers, held against real processes."""

import mmap
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from child_process import child
from memshr import procfs
from memshr.errors import ImageError
from memshr.procfs import ProcessMemory, Vma, Vmas, process_mappings
from memshr.runs import true_runs

PAGE = 4096


def test_maps_line_by_line() -> None:
    text = (
        b"55d0c0a00000-55d0c0a21000 rw-p 00000000 00:00 0                                  [heap]\n"
        b"7f1c10000000-7f1c14000000 ---p 00000000 00:00 0 \n"
        b"7f1c20000000-7f1c20002000 r-xs 00003000 fd:1a 131077                             /tmp/two  words (deleted)\n"
        b"ffffffffff600000-ffffffffff601000 --xp 00000000 00:00 0                          [vsyscall]\n"
    )
    heap, nothing, file, vsyscall = Vmas(text)
    assert heap == Vma(0x55D0C0A00000, 0x55D0C0A21000, True, True, False, False, 0, 0, 0, 0, "[heap]")
    assert heap.pages == 0x21
    assert nothing == Vma(0x7F1C10000000, 0x7F1C14000000, False, False, False, False, 0, 0, 0, 0, "")
    assert file == Vma(
        0x7F1C20000000, 0x7F1C20002000, True, False, True, True, 0x3000, 0xFD, 0x1A, 131077, "/tmp/two  words (deleted)"
    )
    assert (vsyscall.start, vsyscall.path) == (0xFFFFFFFFFF600000, "[vsyscall]")
    assert list(Vmas(b"")) == []


def test_many_mappings_as_columns() -> None:
    text = b"".join(
        b"%x-%x %s %08x 00:01 %d%s\n" % (at, at + 0x1000, flags, at % 0x10000, inode, path)
        for at, flags, inode, path in [
            (0x10000, b"rw-p", 0, b" "),
            (0x7F0000000000, b"rw-p", 12, b"          /memfd:a (deleted)"),
            (0x7F0000005000, b"rw-s", 12, b"          /memfd:a (deleted)"),
            (0x7F0000007000, b"r--p", 4_294_967_296, b" /b"),
        ]
    )
    mappings = Vmas(text)
    assert mappings.start.tolist() == [0x10000, 0x7F0000000000, 0x7F0000005000, 0x7F0000007000]
    assert (mappings.end - mappings.start == 0x1000).all()
    assert mappings.inode.tolist() == [0, 12, 12, 1 << 32]
    assert mappings.shared.tolist() == [False, False, True, False]
    assert [mappings.paths[place] for place in mappings.name] == ["", "/memfd:a (deleted)", "/memfd:a (deleted)", "/b"]
    chosen = mappings.named(lambda path: path.startswith("/memfd"))
    assert chosen.tolist() == [False, True, True, False]
    assert mappings.of(chosen) == mappings[1:3]
    assert mappings[3].path == "/b"


def maps_line(at: int, pages: int, flags: str, offset: int, device: str, inode: int, path: str) -> bytes:
    """A line as the kernel writes it: the path begins in column 74."""
    fields = f"{at:08x}-{at + pages * PAGE:08x} {flags} {offset:08x} {device} {inode} "
    return f"{fields:<73}{path}\n".encode() if path else f"{fields}\n".encode()


def test_thousands_of_lines_of_every_kind() -> None:
    rng = np.random.default_rng(7)
    expected = []
    for number in range(6000):
        # Most are alike; addresses, offsets and inodes of other widths make other lines of the same length.
        wide, other = number % 7 == 0, number % 11 == 0
        at = (0x7F0000000000 if wide else 0xFF0000000) + number * 0x10000
        flags = "".join(choice if rng.random() < 0.8 else "-" for choice in "rwx") + str(rng.choice(["p", "s"]))
        inode = 100 + number % 1000 if other else 12345
        offset = int(rng.integers(0, 1 << 40)) * PAGE if rng.random() < 0.3 else int(rng.integers(0, 16)) * PAGE
        path = f"/file {number}" if other else "/memfd:one (deleted)" if rng.random() < 0.7 else ""
        expected.append((at, int(rng.integers(1, 16)), flags, offset, "fd:1a" if other else "00:01", inode, path))
    mappings = Vmas(b"".join(maps_line(*fields) for fields in expected))
    for mapping, (at, pages, flags, offset, device, inode, path) in zip(mappings, expected, strict=True):
        major, minor = (int(part, 16) for part in device.split(":"))
        letters = [letter in flags for letter in "rwxs"]
        assert (mapping.start, mapping.end, mapping.offset) == (at, at + pages * PAGE, offset)
        assert [mapping.readable, mapping.writable, mapping.executable, mapping.shared] == letters
        assert (mapping.dev_major, mapping.dev_minor, mapping.inode, mapping.path) == (major, minor, inode, path)


def test_mappings_are_parsed_anew_only_if_they_have_changed() -> None:
    before = process_mappings(os.getpid())
    assert process_mappings(os.getpid(), last=before) is before
    with mmap.mmap(-1, PAGE, flags=mmap.MAP_SHARED):
        during = process_mappings(os.getpid(), last=before)
    assert during is not before
    assert len(during) > len(before)


@pytest.mark.parametrize(
    "line",
    [
        b"no maps\n",
        b"10-20 rw-p 0 0:0\n",
        b"1x-20 rw-p 0 00:00 0 \n",
        b"\n",
        b"000100x0-00020000 rw-p 00000000 00:00 0 \n",
    ],
)
@pytest.mark.parametrize("others", [1, 1000])
def test_lines_that_the_kernel_does_not_write(line: bytes, others: int) -> None:
    with pytest.raises(ValueError, match="a line of maps"):
        Vmas(b"00010000-00020000 rw-p 00000000 00:00 0 \n" * others + line)


def test_mapping_of_a_file_agrees_with_stat(tmp_path: Path) -> None:
    path = tmp_path / "line\nend and  blanks"
    path.write_bytes(bytes(3 * PAGE))
    status = path.stat()
    with path.open("rb") as file:
        view = mmap.mmap(file.fileno(), 2 * PAGE, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ, offset=PAGE)
    with view, ProcessMemory(os.getpid()) as memory:
        (mapping,) = [mapping for mapping in memory.mappings() if mapping.inode == status.st_ino]
    assert mapping.path == os.fspath(path).replace("\n", "\\012")
    assert (mapping.pages, mapping.offset) == (2, PAGE)
    assert os.makedev(mapping.dev_major, mapping.dev_minor) == status.st_dev
    assert (mapping.readable, mapping.writable, mapping.executable, mapping.shared) == (True, False, False, False)


@pytest.mark.parametrize(
    ("mask", "runs"),
    [([], []), ([0, 0], []), ([1], [[0, 1]]), ([1, 1, 0, 1], [[0, 2], [3, 4]]), ([0, 1, 0], [[1, 2]])],
)
def test_true_runs(mask: list[int], runs: list[list[int]]) -> None:
    assert true_runs(np.array(mask, dtype=np.bool_)).tolist() == runs


def test_reads_what_the_process_wrote() -> None:
    with child() as process, ProcessMemory(process.pid) as memory:
        address = process.ask("anonymous(8, 100, 8)")
        out = np.empty((8, PAGE), dtype=np.uint8)
        assert memory.read(address, out).all()
        assert (out.view(np.uint64) == np.arange(100, 108, dtype=np.uint64)[:, None]).all()


def test_tells_which_pages_cannot_be_read() -> None:
    with child() as process, ProcessMemory(process.pid) as memory:
        address = process.ask("anonymous(8, 100, 8)")
        assert process.ask(f"unmap({address} + 2 * PAGE, 3)") == 0
        out = np.empty((8, PAGE), dtype=np.uint8)
        readable = memory.read(address, out)
        assert readable.tolist() == [True, True, False, False, False, True, True, True]
        assert out[readable].view(np.uint64)[:, 0].tolist() == [100, 101, 105, 106, 107]


def test_populated_is_what_was_touched() -> None:
    with child() as process, ProcessMemory(process.pid) as memory:
        assert memory.has_pagemap
        address = process.ask("anonymous(1000, 1, 3)")
        assert memory.populated(address, address + 1000 * PAGE).tolist() == [[address, address + 3 * PAGE]]
        assert memory.populated(address + PAGE, address + 2 * PAGE).tolist() == [[address + PAGE, address + 2 * PAGE]]
        assert memory.populated(address + 3 * PAGE, address + 1000 * PAGE).shape == (0, 2)
        address = process.ask("every_other(7, 1)")
        runs = memory.populated(address, address + 7 * PAGE)
        assert ((runs - address) // PAGE).tolist() == [[0, 1], [2, 3], [4, 5], [6, 7]]


def test_populated_joins_runs_across_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memshr.procfs._PAGEMAP_BATCH_PAGES", 4)
    with child() as process, ProcessMemory(process.pid) as memory:
        address = process.ask("anonymous(64, 1, 18)")
        # From an address that the batches do not begin at, so that an end falls inside one and on the edge of one.
        for first, end in ((0, 18), (1, 17), (3, 64), (16, 20)):
            runs = memory.populated(address + first * PAGE, address + end * PAGE)
            assert ((runs - address) // PAGE).tolist() == [[first, min(end, 18)]]


def test_no_such_process() -> None:
    ended = subprocess.Popen(["true"])
    ended.wait()
    for pid in (ended.pid, 0, -1, 1 << 40):
        with pytest.raises(ImageError, match=f"pid:{pid}: there is no such process") as caught:
            ProcessMemory(pid)
        assert caught.value.exit_code == 2


def test_process_that_exited_but_was_not_reaped() -> None:
    zombie = subprocess.Popen(["true"])
    os.waitid(os.P_PID, zombie.pid, os.WEXITED | os.WNOWAIT)
    with pytest.raises(ImageError, match="has no memory"):
        ProcessMemory(zombie.pid)
    zombie.wait()


def test_process_that_goes_away_while_it_is_read() -> None:
    out = np.empty((1, PAGE), dtype=np.uint8)
    with child() as process, ProcessMemory(process.pid) as memory:
        address = process.ask("anonymous(1, 1, 1)")
        process.kill()
        with pytest.raises(ImageError, match="has exited"):
            memory.read(address, out)
        with pytest.raises(ImageError, match="has exited"):
            memory.mappings()
        with pytest.raises(ImageError, match="has exited"):
            memory.populated(address, address + PAGE)


def test_process_that_runs_another_program_meanwhile() -> None:
    out = np.empty((1, PAGE), dtype=np.uint8)
    with child() as process, ProcessMemory(process.pid) as memory:
        old = memory.mappings()
        assert process.ask("run_other_program()") == 1
        new = memory.mappings()
        assert {mapping.path for mapping in old if mapping.executable} != {m.path for m in new if m.executable}
        (first, *_) = new
        with pytest.raises(ImageError, match="runs another program"):
            memory.read(first.start, out)


def test_process_that_may_not_be_read() -> None:
    # Root may read everything, so root becomes nobody first; nobody else may read what forbids it.
    program = (
        "import os, sys\n"
        "from memshr.errors import PermissionDeniedError\n"
        "from memshr.procfs import ProcessMemory\n"
        "os.getuid() or os.setuid(65534)\n"
        "try: ProcessMemory(int(sys.argv[1]))\n"
        "except PermissionDeniedError as error: print(error.exit_code, error)\n"
    )
    with child() as process:
        assert process.ask("forbid_looking()") == 0
        command = [sys.executable, "-c", program, str(process.pid)]
        output = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    assert output.startswith(f"3 pid:{process.pid}: not permitted to read the memory of this process; run as root")
    assert "CAP_SYS_PTRACE" in output


def test_nothing_stays_open() -> None:
    with child() as process:
        before = set(Path("/proc/self/fd").iterdir())
        memory = ProcessMemory(process.pid)
        memory.close()
        memory.close()
        process.kill()
        with pytest.raises(ImageError):
            ProcessMemory(process.pid)
        assert set(Path("/proc/self/fd").iterdir()) <= before


def test_maps_of_long_names_without_end_are_not_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(procfs, "_MOST_MAPS_BYTES", 100)
    process_mappings(os.getpid())  # its lines are short
    monkeypatch.setattr(procfs, "_MOST_LINE_BYTES", 1)
    with pytest.raises(OSError, match="very many files with very long names"):
        process_mappings(os.getpid())
