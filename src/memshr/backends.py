"""Opens what a user names: sources of memory, and hosts to call by hand. An explicit table, imported when needed.

A SOURCE is a memory image (a path) or, with a prefix, something live: ``qemu:all``, ``qemu:NAME``. A HOST is a
mechanism: ``embedded:`` with the images that its domains are made of, or ``qemu:`` with the guests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from memshr.embedded import EmbeddedHypervisor
from memshr.errors import MemshrError, NoSuchDomainError, UnsupportedError
from memshr.hypervisor import Hypervisor
from memshr.images import MemoryImage, open_image
from memshr.types import DomainInfo, DomId

if TYPE_CHECKING:
    from memshr.qemu.guests import GuestProcess
    from memshr.qemu.hypervisor import QemuHypervisor

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


def are_guests(sources: Sequence[str]) -> bool:
    """True if the sources are running QEMU guests, False if they are image files.

    :raises MemshrError: they are of both kinds, or of a kind that cannot be shared.
    """
    prefixes = {_prefix(source) for source in sources}
    for source in sources:
        prefix = _prefix(source)
        if prefix == "pid":
            raise UnsupportedError(
                f"{source}: a process cannot be read in place",
                remedy=f"write its memory to a file first: memshr capture {source} -o FILE",
            )
        if prefix == "xen":
            raise UnsupportedError(f"{source}: this version of memshr does not drive Xen hosts")
    if "qemu" in prefixes and len(prefixes) > 1:
        raise MemshrError("running guests and image files cannot share with each other", remedy="name one kind")
    return "qemu" in prefixes


def select_guests(sources: Sequence[str]) -> list[GuestProcess]:
    """The running guests that ``qemu:all``, ``qemu:NAME``, ``qemu:PID`` or ``qemu:NAME@SOCKET`` name, each once.

    :raises NoSuchDomainError: there is none, or a name is that of several.
    """
    from memshr.qemu import guests  # noqa: PLC0415  # a machine without Linux can still read images

    found: dict[int, GuestProcess] = {}
    for source in sources:
        for process in guests.select_guests(source.partition(":")[2]):
            found.setdefault(process.pid, process)
    if not found:
        raise NoSuchDomainError("no QEMU guest runs on this host")
    return list(found.values())


Grouping = Callable[[Sequence[DomainInfo]], Mapping[str, Collection[str]]]


@contextlib.contextmanager
def open_guests(
    processes: Sequence[GuestProcess], *, groups: Grouping | None = None, reserve_bytes: int | None = None
) -> Iterator[QemuHypervisor]:
    """Running guests as a host; opening only looks. Guests that have ended meanwhile are left out.

    :param groups: tells from the guests which trust group's name has which of them; None: as they share already.
    :param reserve_bytes: memory of the host that sharing and unsharing leave alone; None: the mechanism's default.
    :raises MemshrError: a guest cannot be reached.
    """
    from memshr.qemu.hypervisor import DEFAULT_RESERVE_BYTES, QemuHypervisor  # noqa: PLC0415  # as above
    from memshr.qemu.status import groups_in_force  # noqa: PLC0415  # as above

    processes = [process for process in processes if process.running]
    if not processes:
        raise NoSuchDomainError("every guest that was named has ended")
    if groups is None:
        members: Mapping[str, Collection[str]] = groups_in_force(processes)
    else:
        members = groups(
            [
                DomainInfo(DomId(number), process.name, tot_pages=0, shr_pages=0, max_pages=0)
                for number, process in enumerate(processes, 1)
            ]
        )
    reserve = DEFAULT_RESERVE_BYTES if reserve_bytes is None else reserve_bytes
    with QemuHypervisor(processes, groups=members, reserve_bytes=reserve) as hypervisor:
        yield hypervisor


@contextlib.contextmanager
def open_host(uri: str) -> Iterator[Hypervisor]:
    """The mechanism that ``uri`` names.

    ``embedded:``; ``embedded:IMAGE,IMAGE...`` with a domain for each image; ``qemu:all``, ``qemu:NAME`` for guests.

    :raises MemshrError: there is no such mechanism, or an image cannot be opened.
    """
    if _prefix(uri) == "qemu":
        with open_guests(select_guests([uri])) as guests:
            yield guests
        return
    if not uri.startswith(EMBEDDED):
        raise MemshrError(f"{uri!r} is no host", remedy=f"write {EMBEDDED} or {EMBEDDED}IMAGE,IMAGE, or qemu:all")
    paths = [path for path in uri.removeprefix(EMBEDDED).split(",") if path]
    with open_images(paths) as hypervisor:
        yield hypervisor
