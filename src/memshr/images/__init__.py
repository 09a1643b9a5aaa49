"""Memory images: files that hold the memory of a machine or of a process, opened as extents of pages.

A format is one file in this package, one class in it, and one line in ``FORMATS``. ``open_image`` detects the format by
asking each class in the order of that table. They look at magic numbers; names count only where a format describes its
pages in another file next to them. What comes out is the same for all of them: runs, which say which pages lie where in
the file, or in a temporary one where they had to be unpacked. Opening costs neither time nor memory for the pages of a
file that has them as they are. An image is read in two ways: page by page as a ``PageSource``, for estimates; or as
extents, mapped copy-on-write, that a domain is made of, which reads its pages from the file when it first needs them
and keeps what it writes to itself.
"""

from __future__ import annotations

import contextlib
import os
import stat
from collections.abc import Sequence
from pathlib import Path

from memshr import opened
from memshr.errors import ImageError
from memshr.images.avml import Avml
from memshr.images.cloudhypervisor import CloudHypervisor
from memshr.images.elfcore import ElfCore
from memshr.images.file import CompanyFormat, Contents, FolderFormat, ImageFile, ImageFormat
from memshr.images.firecracker import Firecracker
from memshr.images.image import MemoryImage
from memshr.images.kdump import Kdump
from memshr.images.lime import Lime
from memshr.images.mappedram import MappedRam
from memshr.images.raw import Raw
from memshr.images.vmware import Vmware
from memshr.images.xlcore import XlCore

__all__ = ["FORMATS", "MemoryImage", "keep_image_open", "open_image"]

FORMATS: tuple[ImageFormat, ...] = (
    XlCore(),  # before elfcore: an ELF core, too
    ElfCore(),
    Kdump(),
    MappedRam(),
    Lime(),
    Avml(),
    Vmware(),
    CloudHypervisor(),
    Firecracker(),  # after all that have a magic number: it looks at the files next to an image
    Raw(),  # last: it takes whatever nobody else claims
)
"""Every format that can be read, in the order in which they are asked whether a file is theirs."""


def open_image(path: str | os.PathLike[str], *, format: str | None = None) -> MemoryImage:
    """Open a memory image.

    Reads the headers only, unless the pages have to be unpacked: the time and memory that it takes depend on the number
    of segments, not on the size. Unpacked pages go to a temporary file (TMPDIR says where).

    :param path: a regular file, a folder of a format that has folders, or a link to one.
    :param format: the ``name`` of a row of ``FORMATS``, to read the file as that and nothing else; None detects it.
    :raises ImageError: there is no such format, or the file is missing, not a regular file, not readable, not mappable,
        or not a memory image that memshr understands.
    :raises BackendError: no room to unpack it. Nothing else is raised for any content.
    """
    rows = [row for row in FORMATS if format in (None, row.name)]
    if not rows:
        names = ", ".join(row.name for row in FORMATS)
        raise ImageError(
            f"{format!r} is no image format that memshr knows", path=path, remedy=f"known formats: {names}"
        )
    file = ImageFile(_file_of(Path(path), rows))
    contents: Contents = file
    try:
        row = next(row for row in rows if row.name == format or row.detect(file))
        layout = row.layout(file)
        contents = layout.contents
        file.check_unchanged()
        return MemoryImage(Path(path), file, row.name, layout)
    except BaseException:
        contents.close()
        file.close()
        raise


def keep_image_open(path: str | os.PathLike[str]) -> None:
    """Open what ``open_image`` may want for this path, for a process that is about to lose the right to (``opened``).

    No contents are looked at: files next to the image are chosen by their names, kinds and sizes. A link is followed if
    it was named, and not if it lies next to an image.

    :raises ImageError: the file is missing, empty, not a regular file, or cannot be opened.
    """
    named = Path(path)
    file = _file_of(named, FORMATS)
    image = ImageFile(file)
    opened.keep(file, os.dup(image.fileno()))
    image.close()
    beside: list[Path] = []
    for row in FORMATS:
        if isinstance(row, CompanyFormat):
            for other in row.beside(file):
                with contextlib.suppress(OSError):
                    descriptor = os.open(other, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK | os.O_NOFOLLOW)
                    if stat.S_ISREG(os.fstat(descriptor).st_mode):
                        opened.keep(other, descriptor)
                        beside.append(other)
                    else:
                        os.close(descriptor)
    opened.keep_folder(file.parent, beside)


def _file_of(path: Path, rows: Sequence[ImageFormat]) -> Path:
    """The file itself, or the one that stands for a folder."""
    with contextlib.suppress(OSError, ValueError):  # ImageFile says what is wrong with the path
        if opened.is_dir(path):
            inside = (row.folder_file(path) for row in rows if isinstance(row, FolderFormat))
            return next((found for found in inside if found is not None), path)
    return path
