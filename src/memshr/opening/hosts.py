"""A mechanism by name, to call by hand (``memshr ctl``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from memshr.errors import MemshrError
from memshr.hypervisor import Hypervisor
from memshr.opening.grammar import EMBEDDED, embedded_images, prefix_of
from memshr.opening.guests import open_guests, select_guests
from memshr.opening.images import open_images
from memshr.opening.xen import open_xen

__all__ = [
    "open_host",
]


@contextlib.contextmanager
def open_host(uri: str) -> Iterator[Hypervisor]:
    """The mechanism that ``uri`` names.

    ``embedded:``; ``embedded:IMAGE,IMAGE...`` with a domain for each image; ``qemu:all``, ``qemu:NAME`` for guests;
    ``xen:`` for a Xen host.

    :raises MemshrError: there is no such mechanism, or an image cannot be opened.
    """
    if prefix_of(uri) == "xen":
        with open_xen() as xen:
            yield xen
        return
    if prefix_of(uri) == "qemu":
        with open_guests(select_guests([uri])) as guests:
            yield guests
        return
    if not uri.startswith(EMBEDDED):
        raise MemshrError(f"{uri!r} is no host", remedy=f"write {EMBEDDED}, {EMBEDDED}IMAGE,IMAGE, qemu:all or xen:")
    with open_images(embedded_images(uri)) as hypervisor:
        yield hypervisor
