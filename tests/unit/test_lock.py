"""The lock of a guest: what an error of it says."""

import errno
import fcntl
import os
import subprocess
import sys
from pathlib import Path

import pytest

from memshr.errors import PermissionDeniedError, RefusedDomainError
from memshr.qemu import lock
from memshr.qemu.lock import GuestLock, holder_of


@pytest.fixture
def own_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A lock file that no memshr of this machine uses."""
    path = tmp_path / "lock"
    monkeypatch.setattr(lock, "LOCK_PATH", path)
    monkeypatch.setattr(lock, "_file", [])
    monkeypatch.setattr(lock, "_held", {})
    return path


def test_whoever_has_it_is_named(own_file: Path) -> None:
    program = (
        "import fcntl, os, sys\n"
        "file = os.open(sys.argv[1], os.O_RDWR | os.O_CREAT)\n"
        "fcntl.lockf(file, fcntl.LOCK_EX, 1, 77)\n"
        "print(flush=True); sys.stdin.read()\n"
    )
    with subprocess.Popen(
        [sys.executable, "-c", program, own_file], stdin=subprocess.PIPE, stdout=subprocess.PIPE
    ) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(RefusedDomainError, match=f"(?s)process {other.pid} .*has guest web \\(77\\) in hand"):
            GuestLock(77, "web")
        other.communicate()
    taken = GuestLock(77, "web")
    assert holder_of(77) == os.getpid()
    taken.release()
    assert holder_of(77) is None


@pytest.mark.usefixtures("own_file")
def test_an_error_of_the_file_is_no_other_memshr(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "lockf", fails)
    with pytest.raises(PermissionDeniedError, match=r"cannot lock guest web \(77\) .*No locks available"):
        GuestLock(77, "web")
    assert holder_of(77) is None


def test_a_folder_in_its_place(own_file: Path) -> None:
    own_file.mkdir()
    with pytest.raises(PermissionDeniedError, match="cannot open"):
        GuestLock(77, "web")
