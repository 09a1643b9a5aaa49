"""Memory images: files that hold the memory of a machine or of a process, opened as extents of pages.

A format is one file in this package, one class in it, and one line in ``FORMATS``. ``open_image`` detects the format by
asking each class in the order of that table and never looks at the file's name. What comes out is the same for all of
them: runs of pages that are views of the file, mapped copy-on-write, so that opening costs neither time nor memory
whatever the size, a domain that is made of an image reads its pages from the file when it first needs them, and what
the domain writes stays its own.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from memshr.images.elfcore import ElfCore
from memshr.images.mapped import ImageFormat, MappedFile
from memshr.images.raw import Raw
from memshr.types import Extent

__all__ = ["FORMATS", "MemoryImage", "open_image"]

FORMATS: tuple[ImageFormat, ...] = (
    ElfCore(),
    Raw(),  # last: it takes whatever nobody else claims
)
"""Every format that can be read, in the order in which they are asked whether a file is theirs."""


class MemoryImage:
    """An open memory image. ``open_image`` makes them; it is a context manager.

    The pages of ``extents`` are uint8 arrays of shape ``(n, PAGE_SIZE)`` over the mapped file. They are writable, and
    a write stays in this process: the file never changes. They stay valid after ``close`` for whoever still has them;
    the mapping goes when the last of them does.

    The operating system kills a process that reads a mapped page which its file no longer has (SIGBUS). Nothing in
    Python can catch that, so call ``check_unchanged`` before each batch that is read: it finds a file that was
    truncated or written meanwhile, except for the instant between the check and the read.
    """

    def __init__(self, file: MappedFile, format_name: str, extents: Sequence[Extent]) -> None:
        self._file = file
        self.path: Path = file.path
        self.format: str = format_name
        self.extents: Sequence[Extent] = extents
        """Ascending in gfn, not overlapping, every gfn below ``2 ** MAX_GFN_BITS``, none empty."""
        self.total_pages: int = sum(len(extent.pages) for extent in extents)

    def __repr__(self) -> str:
        return f"<MemoryImage {os.fspath(self.path)!r} {self.format}, {self.total_pages} pages>"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def check_unchanged(self) -> None:
        """Make sure that the file is still what was opened; costs one ``fstat``.

        :raises ImageError: its size or its time of last modification has changed since it was opened.
        :raises ValueError: the image is closed.
        """
        self._file.check_unchanged()

    def close(self) -> None:
        """Let go of the file; ``extents`` is empty afterwards. Closing twice does nothing."""
        self.extents = ()
        self._file.close()


def open_image(path: str | os.PathLike[str], *, format: str | None = None) -> MemoryImage:
    """Open a memory image.

    Reads the headers only: the time and memory that it takes depend on the number of segments, not on the size.

    :param path: a regular file, or a link to one.
    :param format: the ``name`` of a row of ``FORMATS``, to read the file as that and nothing else; None detects it.
    :raises ImageError: there is no such format, or the file is missing, not a regular file, not readable, not mappable,
        or not a memory image that memshr understands. Nothing else is raised for any content.
    """
    file = MappedFile(path)
    try:
        for row in FORMATS:
            if row.name == format or (format is None and row.detect(file)):
                return MemoryImage(file, row.name, row.extents(file))
        names = ", ".join(row.name for row in FORMATS)
        raise file.error(
            f"{format!r} is no image format that memshr knows" if format is not None else "not a known image format",
            remedy=f"known formats: {names}",
        )
    except BaseException:
        file.close()
        raise
