"""Opens what a user names: sources of memory, and hosts to call by hand. An explicit table, imported when needed.

A SOURCE is a memory image (a path) or, with a prefix, something live. A HOST is a mechanism: ``embedded:`` with the
images that its domains are made of.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from pathlib import Path

from memshr.embedded import EmbeddedHypervisor
from memshr.errors import MemshrError, UnsupportedError
from memshr.hypervisor import Hypervisor
from memshr.images import MemoryImage, open_image

LIVE_PREFIXES = ("pid", "qemu", "xen")
EMBEDDED = "embedded:"


def _prefix(source: str) -> str | None:
    head, colon, _ = source.partition(":")
    return head if colon and "/" not in head and not Path(source).exists() else None


@contextlib.contextmanager
def open_images(paths: Sequence[str], *, format: str | None = None) -> Iterator[EmbeddedHypervisor]:
    """A host with a domain for each memory image, named after its file, whose contents stay in the files.

    :param paths: image files; two files of one name get their folder's name, too.
    :param format: read them all as this format; None: detect it.
    :raises ImageError: a file is no usable image. :raises MemshrError: a file is named twice.
    """
    hypervisor = EmbeddedHypervisor()
    with contextlib.ExitStack() as stack:
        images = [stack.enter_context(open_image(path, format=format)) for path in paths]
        _refuse_twice(images)
        for name, image in zip(_names([image.path for image in images]), images, strict=True):
            domid = hypervisor.create_domain(name, extents=image.extents)
            hypervisor.control(domid, True)
        yield hypervisor


def _refuse_twice(images: Sequence[MemoryImage]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for image in images:
        status = image.path.stat()
        first = seen.setdefault((status.st_dev, status.st_ino), image.path)
        if first is not image.path:
            raise MemshrError(
                f"{image.path} is the same file as {first}", remedy="name each image once; a copy counts as another"
            )


def _names(paths: Sequence[Path]) -> list[str]:
    # The shortest tails of the paths that tell them apart.
    absolute = [path.absolute() for path in paths]
    for length in range(1, max((len(path.parts) for path in absolute), default=1) + 1):
        names = ["/".join(path.parts[-length:]) for path in absolute]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in absolute]


@contextlib.contextmanager
def open_sources(sources: Sequence[str], *, format: str | None = None) -> Iterator[Hypervisor]:
    """The host on which the sources of ``estimate`` and ``share`` are domains.

    :raises MemshrError: a source cannot be opened; see open_images.
    """
    for source in sources:
        prefix = _prefix(source)
        if prefix == "pid":
            raise UnsupportedError(
                f"{source}: a process cannot be read in place",
                remedy=f"write its memory to a file first: memshr capture {source} -o FILE",
            )
        if prefix in LIVE_PREFIXES:
            raise UnsupportedError(f"{source}: this version of memshr has no {prefix}: mechanism; it reads image files")
    with open_images(sources, format=format) as hypervisor:
        yield hypervisor


@contextlib.contextmanager
def open_host(uri: str) -> Iterator[Hypervisor]:
    """The mechanism that ``uri`` names: ``embedded:``, or ``embedded:IMAGE,IMAGE...`` with a domain for each image.

    :raises MemshrError: there is no such mechanism, or an image cannot be opened.
    """
    if not uri.startswith(EMBEDDED):
        raise MemshrError(f"{uri!r} is no host", remedy=f"write {EMBEDDED} or {EMBEDDED}IMAGE,IMAGE")
    paths = [path for path in uri.removeprefix(EMBEDDED).split(",") if path]
    with open_images(paths) as hypervisor:
        yield hypervisor
