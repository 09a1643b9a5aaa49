"""Files that were opened while memshr had the right to, for those who read them after it has given that up.

A process that starts as root opens what its user has named, gives up root's rights (``privilege``), and only then looks
into the files. Readers ask here by path, and the file system answers for what was not opened beforehand. What is held
stays open until the process ends.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable
from pathlib import Path

_files: dict[str, int] = {}
_folders: dict[str, list[Path]] = {}

AnyPath = str | os.PathLike[str]


def _key(path: AnyPath) -> str:
    return str(Path(path).absolute())


def keep(path: AnyPath, descriptor: int) -> None:
    """Keep an open file for whoever asks for ``path`` from now on.

    :param descriptor: open for reading; owned by this module from now on.
    """
    before = _files.get(_key(path))
    _files[_key(path)] = descriptor
    if before is not None:
        os.close(before)


def keep_folder(path: AnyPath, files: Iterable[Path] = ()) -> None:
    """Remember that ``path`` is a folder, and which files of it readers are to find when they look for others.

    :param files: those that are held, too; others of the folder are not found.
    """
    known = _folders.setdefault(_key(path), [])
    known.extend(file for file in files if file not in known)


def is_held(path: AnyPath) -> bool:
    """Whether the file was opened beforehand."""
    return _key(path) in _files


def open_file(path: AnyPath, flags: int = os.O_RDONLY | os.O_CLOEXEC) -> int:
    """A descriptor of the file, at its start, for the caller to close. Those of a held one share their position.

    :param flags: for a file that was not held.
    :raises OSError: it was not held, and cannot be opened.
    """
    held = _files.get(_key(path))
    if held is None:
        return os.open(path, flags)
    with contextlib.suppress(OSError):  # a pipe has no position
        os.lseek(held, 0, os.SEEK_SET)
    return os.dup(held)


def is_dir(path: Path) -> bool:
    """Whether this is a folder. :raises OSError: we may not look."""
    return _key(path) in _folders or path.is_dir()


def is_file(path: Path) -> bool:
    """Whether this is a regular file that readers are to find. :raises OSError: we may not look."""
    return is_held(path) or (files_in(path.parent) is None and path.is_file())


def files_in(folder: Path) -> list[Path] | None:
    """The files of a folder that readers are to find; None: the folder was not held, so look at it."""
    return _folders.get(_key(folder))
