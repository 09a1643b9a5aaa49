"""Capturing a live process: its private memory becomes an ELF core that ``open_image`` reads.

Only what the process has to itself is taken. Shared mappings are left out, because their pages belong to others too
and are shared already; devices, because reading them can act on them; ``[vvar]`` and ``[vsyscall]``, because they are
the kernel's. Of the rest the pages that are not there are left out, as far as /proc/PID/pagemap tells: anonymous
memory that was never touched, and pages of mapped files that the process has not used; they cost it nothing.
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np
from numpy.typing import NDArray

from memshr.errors import BackendError, ImageError
from memshr.images.elfcore import MAX_SEGMENTS, CoreWriter
from memshr.procfs import ProcessMemory, Vma
from memshr.runs import true_runs
from memshr.types import PAGE_SHIFT, PAGE_SIZE, PageBytes, page_buffer

_BATCH_BYTES = 16 << 20
_MAX_RUNS = MAX_SEGMENTS // 2
"""Runs that a capture starts with at most; pages that turn out to be unreadable may split them."""

_MEMORY_BELOW_DEV = ("/dev/zero", "/dev/shm/", "/dev/hugepages")
"""What is mapped from /dev and memory all the same."""


@dataclass(frozen=True, slots=True)
class CaptureResult:
    """What a capture wrote.

    ``pages`` are in the file. ``unreadable_pages`` went away while it ran, or the kernel refused to read them.
    ``absent_pages`` are mapped, but have no page behind them and are not in the file. None: /proc/PID/pagemap could not
    be read, so that they are among ``pages``, as zeros or as what the mapped file holds.
    """

    pid: int
    path: Path
    pages: int
    unreadable_pages: int
    absent_pages: int | None
    file_bytes: int


def capture_process(
    pid: int,
    path: str | os.PathLike[str],
    *,
    limit_bytes: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> CaptureResult:
    """Write the private memory of a running process to ``path``, as an ELF core.

    The process is not stopped: each page is as it was when it was read, and may be torn. All or nothing: the file
    appears, complete and readable by its owner alone, when all is written, and whatever was at ``path`` stays until
    then. A link at ``path`` is followed. Costs one buffer of 16 MiB.

    :param limit_bytes: more memory than that is refused before anything is written; None: no limit.
    :param progress: called with the bytes done and the bytes in all, at the start, now and then, and at the end.
    :raises ImageError: no such process, or it exited meanwhile; over the limit; ``path`` cannot be written.
    :raises PermissionDeniedError: this user may not read the process.
    :raises BackendError: no room for the file.
    """
    with ProcessMemory(pid) as memory:
        mappings = [mapping for mapping in memory.mappings() if is_captured(mapping)]
        runs = _planned_runs([memory.populated(mapping.start, mapping.end) for mapping in mappings], _MAX_RUNS)
        planned_bytes = int((runs[:, 1] - runs[:, 0]).sum())
        mapped_bytes = sum(mapping.end - mapping.start for mapping in mappings)
        if limit_bytes is not None and planned_bytes > limit_bytes:
            raise ImageError(
                f"{planned_bytes} bytes of memory to capture, the limit is {limit_bytes}",
                path=f"pid:{pid}",
                remedy="raise the limit",
            )
        with _new_file(path, planned_bytes) as file:
            with _errors_of_output(path):
                writer = CoreWriter(file)

            def write(address: int, pages: PageBytes) -> None:
                with _errors_of_output(path):
                    writer.add(address, pages)

            pages = _copy(memory, runs, write, progress or (lambda done, total: None))
            if not pages:
                raise ImageError("none of its memory can be read", path=f"pid:{pid}")
            with _errors_of_output(path):
                file_bytes = writer.finish()
                file.close()  # here, where it may still fail, and not after the file has taken its place
    return CaptureResult(
        pid=pid,
        path=Path(path),
        pages=pages,
        unreadable_pages=(planned_bytes >> PAGE_SHIFT) - pages,
        absent_pages=(mapped_bytes - planned_bytes) >> PAGE_SHIFT if memory.has_pagemap else None,
        file_bytes=file_bytes,
    )


def is_captured(mapping: Vma) -> bool:
    """Whether a mapping is memory that the process has to itself; the module's docstring says what is not."""
    device = mapping.path.startswith("/dev/") and not mapping.path.startswith(_MEMORY_BELOW_DEV)
    kernel = mapping.path.startswith(("[vvar", "[vsyscall"))
    return mapping.readable and not mapping.shared and not device and not kernel


def _planned_runs(runs_of_mappings: list[NDArray[np.int64]], limit: int) -> NDArray[np.int64]:
    """All the runs, at most ``limit`` as far as that is possible: the smallest gaps inside mappings are filled.

    What fills a gap are pages that the process never touched, which read as zeros.
    """
    runs = np.concatenate([np.empty((0, 2), dtype=np.int64), *runs_of_mappings])
    excess = len(runs) - limit
    if excess <= 0:
        return runs
    mapping = np.repeat(np.arange(len(runs_of_mappings)), [len(part) for part in runs_of_mappings])
    inside = np.flatnonzero(mapping[1:] == mapping[:-1])
    gaps = runs[inside + 1, 0] - runs[inside, 1]
    fill = inside[np.argsort(gaps, kind="stable")[:excess]]
    return np.stack([np.delete(runs[:, 0], fill + 1), np.delete(runs[:, 1], fill)], axis=1)


def _copy(
    memory: ProcessMemory,
    runs: NDArray[np.int64],
    write: Callable[[int, PageBytes], None],
    progress: Callable[[int, int], None],
) -> int:
    """Hand the runs to ``write``, without the pages that cannot be read; returns how many pages it was."""
    buffer = page_buffer(_BATCH_BYTES // PAGE_SIZE)
    total_bytes = int((runs[:, 1] - runs[:, 0]).sum())
    done_bytes = told_bytes = pages = 0
    progress(0, total_bytes)
    for start, end in runs.tolist():
        for address in range(start, end, _BATCH_BYTES):
            out = buffer[: (min(end, address + _BATCH_BYTES) - address) >> PAGE_SHIFT]
            for first, last in true_runs(memory.read(address, out)).tolist():
                write(address + first * PAGE_SIZE, out[first:last])
                pages += last - first
            done_bytes += out.nbytes
            if done_bytes - told_bytes >= _BATCH_BYTES or done_bytes == total_bytes:
                told_bytes = done_bytes
                progress(done_bytes, total_bytes)
    return pages


@contextlib.contextmanager
def _new_file(path: str | os.PathLike[str], size_bytes: int) -> Iterator[BinaryIO]:
    """A new file, which takes the place of ``path`` if the block ends well and is gone if it does not."""
    with _errors_of_output(path):
        # Through links, so that the file they name is replaced and not they themselves.
        target = Path(os.path.realpath(path))
        with contextlib.suppress(FileNotFoundError):
            if not stat.S_ISREG(target.stat().st_mode):
                raise ImageError("this is no regular file", path=path, remedy="name a file to write the core to")
        space = shutil.disk_usage(target.parent)
        if space.total and space.free < size_bytes:
            raise _no_room(path, f"{size_bytes} bytes to write, {space.free} are free")
    # Named before it is made, so that whatever interrupts us at whatever point, we know what to take away.
    unfinished = target.with_name(f".memshr-capture-{secrets.token_hex(8)}")
    try:
        with _errors_of_output(path):
            file = os.fdopen(os.open(unfinished, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb", buffering=1 << 20)
        try:
            yield file
        finally:
            with contextlib.suppress(OSError):  # it writes what it still has; if that fails, it failed before
                file.close()
        with _errors_of_output(path):
            unfinished.replace(target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise


@contextlib.contextmanager
def _errors_of_output(path: str | os.PathLike[str]) -> Iterator[None]:
    """Operating-system errors in the block are about writing to ``path``."""
    try:
        yield
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}:
            raise _no_room(path, os.strerror(error.errno)) from error
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise ImageError(f"cannot be written: {reason}", path=path) from error


def _no_room(path: str | os.PathLike[str], why: str) -> BackendError:
    return BackendError(f"{os.fspath(path)}: no room for the core: {why}", remedy="make room, or write it elsewhere")
