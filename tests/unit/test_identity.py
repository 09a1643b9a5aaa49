"""What tells a program from whatever has its number later."""

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import pytest

from guests.machine import wait_until
from memshr.qemu.identity import Identity, identity_of

READS = "import sys; sys.stdin.read()"
EXECUTES = "import os, sys; os.read(0, 1); os.execv(sys.argv[1], sys.argv[1:])"


@contextmanager
def waiting(*command: str) -> Iterator["subprocess.Popen[bytes]"]:
    process = subprocess.Popen(command, stdin=subprocess.PIPE)
    wait_until(lambda: Path(f"/proc/{process.pid}/cmdline").read_bytes().startswith(os.fsencode(command[0])), 10, "run")
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def test_it_is_what_the_kernel_says_of_us() -> None:
    identity = identity_of(os.getpid())
    program = Path(sys.executable).stat()
    assert (identity.device, identity.inode) == (program.st_dev, program.st_ino)
    assert identity.users[:3] == os.getresuid()
    assert identity.groups[:3] == os.getresgid()
    assert identity.still_holds()


SETS_ITS_IDS = "import os, sys; os.setresgid(41, 42, 43); os.setresuid(51, 52, 53); sys.stdin.read()"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become others")
def test_ids_are_those_of_the_process() -> None:
    with waiting(sys.executable, "-c", SETS_ITS_IDS) as process:
        wait_until(
            lambda: "Uid:\t51\t52\t53" in Path(f"/proc/{process.pid}/status").read_text(), 10, "it becomes another user"
        )
        identity = identity_of(process.pid)
    assert identity.users == (51, 52, 53, 52)
    assert identity.groups == (41, 42, 43, 42)


def test_the_same_program_started_later_is_another() -> None:
    stat = Path("/proc/self/stat").read_text()
    assert identity_of(os.getpid()).start_ticks == int(stat.rpartition(")")[2].split()[19])
    with waiting(sys.executable, "-c", READS) as one:
        first = identity_of(one.pid)
        time.sleep(0.05)
        with waiting(sys.executable, "-c", READS) as other:
            assert identity_of(other.pid).start_ticks > first.start_ticks


def test_as_text_and_back() -> None:
    identity = identity_of(os.getpid())
    assert Identity.parse(str(identity)) == identity
    assert " " not in str(identity)
    for text in ("", "1,2,3", str(identity) + ",00", str(identity)[:-1], str(identity).replace(",", ",x", 1)):
        with pytest.raises(ValueError, match=r"."):
            Identity.parse(text)


@pytest.mark.parametrize(
    "change",
    [
        {"start_ticks": 1},
        {"device": 1},
        {"inode": 1},
        {"users": (1, 2, 3, 4)},
        {"groups": (1, 2, 3, 4)},
        {"auxv": b"other"},
        {"pid": os.getppid()},
    ],
)
def test_each_part_counts(change: dict[str, object]) -> None:
    assert not replace(identity_of(os.getpid()), **change).still_holds()  # type: ignore[arg-type]  # one of each kind


def test_another_program_in_the_same_process() -> None:
    with waiting(sys.executable, "-c", EXECUTES, "/bin/cat") as process:
        identity = identity_of(process.pid)
        assert process.stdin is not None
        process.stdin.write(b"!")
        process.stdin.flush()
        wait_until(lambda: identity_of(process.pid).inode != identity.inode, 10, "it executes")
        assert not identity.still_holds()


def test_the_same_program_again_in_the_same_process() -> None:
    with waiting(sys.executable, "-c", EXECUTES, sys.executable, "-c", READS) as process:
        identity = identity_of(process.pid)
        assert process.stdin is not None
        process.stdin.write(b"!")
        process.stdin.flush()
        wait_until(lambda: b"execv" not in Path(f"/proc/{process.pid}/cmdline").read_bytes(), 10, "it executes")
        later = identity_of(process.pid)
        assert replace(later, auxv=identity.auxv) == identity, "only the auxiliary vector tells"
        assert not identity.still_holds()


def test_a_zombie_and_nobody_are_gone() -> None:
    process = subprocess.Popen([sys.executable, "-c", READS], stdin=subprocess.PIPE)
    identity = identity_of(process.pid)
    assert process.stdin is not None
    process.stdin.close()
    wait_until(lambda: Path(f"/proc/{process.pid}/stat").read_text().rsplit(")", 1)[1][1] == "Z", 10, "it has ended")
    with pytest.raises(ProcessLookupError):
        identity_of(process.pid)
    assert not identity.still_holds()
    process.wait()
    with pytest.raises(OSError, match=r"No such"):
        identity_of(process.pid)
    assert not identity.still_holds()


def test_a_name_that_looks_like_fields_of_stat(tmp_path: Path) -> None:
    odd = tmp_path / "a) Z 1 (b"
    odd.symlink_to("/bin/cat")
    with waiting(str(odd)) as process:
        assert identity_of(process.pid).still_holds()
