"""What a user may write for a SOURCE or a HOST, without opening anything.

A SOURCE is a memory image (a path) or, with a prefix, something live: ``pid:N``, ``qemu:all``, ``qemu:NAME``,
``xen:all``, ``xen:DOMID``. A HOST is a mechanism: ``embedded:`` with the images that its domains are made of, ``qemu:``
with the guests, or ``xen:``.
"""

from __future__ import annotations

import enum
from collections.abc import Sequence
from pathlib import Path

from memshr.errors import MemshrError, UnsupportedError

EMBEDDED = "embedded:"
EVERY_GUEST = "qemu:all"
LIVE = ("pid", "qemu", "xen")


def prefix_of(source: str) -> str | None:
    """``qemu`` of ``qemu:all``; None: a path."""
    head, colon, _ = source.partition(":")
    return head if colon and "/" not in head and not Path(source).exists() else None


class SourceKind(enum.StrEnum):
    """Where the memory of a source is."""

    IMAGE = "image files"
    QEMU = "running QEMU guests"
    XEN = "domains of a Xen host"


def kind_of(sources: Sequence[str]) -> SourceKind:
    """What kind of sources these are.

    :raises MemshrError: they are of several kinds, or of one that is none.
    """
    kinds = {}
    for source in sources:
        prefix = prefix_of(source)
        if prefix == "pid":
            raise UnsupportedError(
                f"{source}: a process cannot be read in place",
                remedy=f"write its memory to a file first: memshr capture {source} -o FILE",
            )
        kinds[{"qemu": SourceKind.QEMU, "xen": SourceKind.XEN}.get(prefix or "", SourceKind.IMAGE)] = source
    if len(kinds) > 1:
        raise MemshrError(f"{' and '.join(kinds)} cannot share with each other", remedy="name sources of one kind")
    return next(iter(kinds))


def only_images(sources: Sequence[str]) -> bool:
    """Whether all sources are memory images: nothing of this host but files is needed for them."""
    return not any(prefix_of(source) in LIVE for source in sources)


def any_images(sources: Sequence[str]) -> bool:
    """Whether a memory image is among the sources."""
    return any(prefix_of(source) not in LIVE for source in sources)


def pid_of(source: str) -> int:
    """N of ``pid:N``. :raises MemshrError: it is no number of a process."""
    number = source.partition(":")[2]
    if not (number.isdecimal() and number.isascii() and 0 < len(number) <= 10):
        raise MemshrError(f"{source!r} is no process", remedy="write pid:N, N the process's number")
    return int(number)


def embedded_images(uri: str) -> list[str]:
    """The paths of the images in ``embedded:IMAGE,IMAGE``."""
    return [path for path in uri.removeprefix(EMBEDDED).split(",") if path]
