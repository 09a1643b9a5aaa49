"""Memory images as sources, and as the domains of an embedded host."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memshr.errors import MemshrError

if TYPE_CHECKING:
    from memshr.embedded import EmbeddedHypervisor
    from memshr.images import MemoryImage

__all__ = [
    "open_images",
]

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_images(paths: Sequence[str], *, format: str | None = None) -> Iterator[EmbeddedHypervisor]:
    """A host with a domain for each memory image, named after its file, whose contents stay in the files.

    :param paths: image files; two files of one name get their folder's name, too.
    :param format: read them all as this format; None: detect it.
    :raises ImageError: a file is no usable image. :raises MemshrError: a file is named twice.
    """
    from memshr.embedded import EmbeddedHypervisor  # noqa: PLC0415  # running guests are shared without it
    from memshr.images import open_image  # noqa: PLC0415  # as above

    hypervisor = EmbeddedHypervisor()
    with contextlib.ExitStack() as stack:
        images = [stack.enter_context(open_image(path, format=format)) for path in paths]
        refuse_twice(images)
        for name, image in zip(names_of([image.path for image in images]), images, strict=True):
            domid = hypervisor.create_domain(name, extents=image.extents)
            _log.info("domain %d is image %s, format %s", domid, image.path, image.format)
            hypervisor.control(domid, True)
        yield hypervisor


def refuse_twice(images: Sequence[MemoryImage]) -> None:
    """:raises MemshrError: two of the images are one file."""
    seen: dict[tuple[int, int], Path] = {}
    for image in images:
        first = seen.setdefault(image.identity, image.path)
        if first is not image.path:
            raise MemshrError(
                f"{image.path} is the same file as {first}", remedy="name each image once; a copy counts as another"
            )


def names_of(paths: Sequence[Path]) -> list[str]:
    """What images are called: the shortest tails of their paths that tell them apart."""
    absolute = [path.absolute() for path in paths]
    for length in range(1, max((len(path.parts) for path in absolute), default=1) + 1):
        names = ["/".join(path.parts[-length:]) for path in absolute]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in absolute]
