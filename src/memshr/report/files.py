"""Writing a report's file: the whole of it or nothing."""

from __future__ import annotations

import contextlib
import os
import tempfile
from pathlib import Path

from memshr.errors import MemshrError


def write_file(path: str | os.PathLike[str], text: str) -> None:
    """Write ``text`` as UTF-8 into ``path``. What was there stays until all is written; then it is replaced at once.

    What cannot be encoded (a file name of undecodable bytes) is written as an escape. A new file has the permissions
    that the umask gives; a link is followed; something that is no regular file, such as a pipe, is written into.

    :raises MemshrError: it cannot be written there; nothing has changed then.
    """
    name = os.fspath(path) if os.fspath(path).isprintable() else repr(os.fspath(path))
    data = text.encode("utf-8", "backslashreplace")
    try:
        target = Path(os.path.realpath(path))
        if target.exists() and not target.is_file():
            with target.open("wb") as file:
                file.write(data)
            return
        _replace(target, data)
    except OSError as error:
        raise MemshrError(f"{name}: cannot be written: {error.strerror}") from error


def _replace(target: Path, data: bytes) -> None:
    handle, temporary = tempfile.mkstemp(prefix=f".{target.name[:64]}.", suffix=".part", dir=target.parent)
    try:
        with open(handle, "wb") as file:  # noqa: PTH123  # a descriptor, which has no path
            file.write(data)
            mask = os.umask(0)
            os.umask(mask)
            os.fchmod(file.fileno(), target.stat().st_mode & 0o777 if target.exists() else 0o666 & ~mask)
        Path(temporary).replace(target)
    except BaseException:
        with contextlib.suppress(OSError):
            Path(temporary).unlink()
        raise
