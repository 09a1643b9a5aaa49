"""Writing a report's file: the whole of it or nothing.

A process that gives its rights up before it makes the report (``privilege``) starts a ``FileWriter`` first. That is a
program of its own, which keeps the rights and only waits for the text of one file.
"""

from __future__ import annotations

import contextlib
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Final, Self

from memshr.errors import MemshrError

_PROGRAM: Final = "import sys; sys.path.append(sys.argv[1]); from memshr.render.files import main; main()"
_LENGTH_BYTES: Final = 8
_REFUSED: Final = 2

WriteFile = Callable[[str | os.PathLike[str], str], None]
"""What writes a text into a file, as ``write_file`` does."""


class FileWriter:
    """A process with the rights that this one has now, which will write one file. A context manager.

    It ends, and has written nothing, when this is closed or when we die before ``write``.

    :param path: the file; as ``write_file`` has it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        # As the injector is started: no environment of the user and no packages matter to a program that is root. A
        # session of its own: Ctrl-C is for us, and we end it. What is open stays open, for paths such as /dev/stdout.
        self._process = subprocess.Popen(
            [sys.executable, "-I", "-S", "-c", _PROGRAM, os.fspath(Path(__file__).parents[2]), os.fspath(path)],
            stdin=subprocess.PIPE,
            stderr=subprocess.PIPE,
            start_new_session=True,
            close_fds=False,
        )

    def write(self, text: str) -> None:
        """As ``write_file``, once. :raises MemshrError: it cannot be written; nothing has changed then."""
        data = text.encode("utf-8", "backslashreplace")
        _, errors = self._process.communicate(len(data).to_bytes(_LENGTH_BYTES, "big") + data)
        if self._process.returncode:
            last = errors.decode(errors="replace").splitlines()[-1:]
            raise MemshrError("".join(last) or "the writer of the report has ended")

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for pipe in (self._process.stdin, self._process.stderr):
            if pipe is not None:
                pipe.close()
        self._process.wait()


def main() -> None:
    """What a ``FileWriter`` runs: standard input has the length and the text, and the last argument is the path."""
    length_bytes = int.from_bytes(sys.stdin.buffer.read(_LENGTH_BYTES), "big")
    data = sys.stdin.buffer.read()
    if not length_bytes or len(data) != length_bytes:  # whoever started us gave up
        return
    try:
        write_file(sys.argv[-1], data.decode())
    except MemshrError as error:
        print(error, file=sys.stderr)
        sys.exit(_REFUSED)


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
