"""Opens what a user names: sources of memory, and hosts to call by hand. An explicit table, imported when needed.

A SOURCE is a memory image (a path) or, with a prefix, something live: ``qemu:all``, ``qemu:NAME``, ``xen:all``,
``xen:DOMID``. A HOST is a mechanism: ``embedded:`` with the images that its domains are made of, ``qemu:`` with the
guests, or ``xen:``.
"""

from __future__ import annotations

import contextlib
import enum
import logging
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from memshr.domainsource import DomainSource
from memshr.errors import (
    BackendError,
    DomainError,
    MemshrError,
    NoSuchDomainError,
    RefusedDomainError,
    UnsupportedError,
    printable,
)
from memshr.hypervisor import Hypervisor
from memshr.sources import Subject
from memshr.types import DomId

if TYPE_CHECKING:
    from memshr.embedded import EmbeddedHypervisor
    from memshr.images import MemoryImage
    from memshr.qemu.guests import GuestProcess
    from memshr.qemu.hypervisor import QemuHypervisor
    from memshr.xen import XenHypervisor

_log = logging.getLogger(__name__)

EMBEDDED = "embedded:"
EVERY_GUEST = "qemu:all"


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
    from memshr.embedded import EmbeddedHypervisor  # noqa: PLC0415  # running guests are shared without it
    from memshr.images import open_image  # noqa: PLC0415  # as above

    hypervisor = EmbeddedHypervisor()
    with contextlib.ExitStack() as stack:
        images = [stack.enter_context(open_image(path, format=format)) for path in paths]
        _refuse_twice(images)
        for name, image in zip(_names([image.path for image in images]), images, strict=True):
            domid = hypervisor.create_domain(name, extents=image.extents)
            _log.info("domain %d is image %s, format %s", domid, image.path, image.format)
            hypervisor.control(domid, True)
        yield hypervisor


def _refuse_twice(images: Sequence[MemoryImage]) -> None:
    seen: dict[tuple[int, int], Path] = {}
    for image in images:
        first = seen.setdefault(image.identity, image.path)
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
        prefix = _prefix(source)
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
    return not any(_prefix(source) in _LIVE for source in sources)


def select_guests(sources: Sequence[str]) -> list[GuestProcess]:
    """The running guests that ``qemu:all``, ``qemu:NAME``, ``qemu:PID`` or ``qemu:NAME@SOCKET`` name, each once.

    :raises NoSuchDomainError: there is none, or a name is that of several.
    :raises MemshrError: a source is no running guest at all.
    """
    from memshr.qemu import guests  # noqa: PLC0415  # a machine without Linux can still read images

    found: dict[int, GuestProcess] = {}
    for source in sources:
        if _prefix(source) != "qemu":
            raise MemshrError(f"{source} names no QEMU guest", remedy="write qemu:all, qemu:NAME or qemu:PID")
        for process in guests.select_guests(source.partition(":")[2]):
            found.setdefault(process.pid, process)
    if not found:
        raise NoSuchDomainError("no QEMU guest runs on this host")
    return list(found.values())


Grouping = Callable[[Mapping[DomId, "GuestProcess"]], Mapping[str, Collection[int]]]


@contextlib.contextmanager
def open_guests(
    processes: Sequence[GuestProcess], *, groups: Grouping | None = None, reserve_bytes: int | None = None
) -> Iterator[QemuHypervisor]:
    """Running guests as a host; opening only looks. Guests that have ended meanwhile are left out.

    :param groups: tells from the guests which trust group has which of their domids; None: as they share already.
    :param reserve_bytes: memory of the host that sharing and unsharing leave alone; None: the mechanism's default.
    :raises MemshrError: a guest cannot be reached.
    """
    from memshr.qemu.hypervisor import DEFAULT_RESERVE_BYTES, QemuHypervisor  # noqa: PLC0415  # as above
    from memshr.qemu.status import groups_in_force  # noqa: PLC0415  # as above

    processes = [process for process in processes if process.running]
    if not processes:
        raise NoSuchDomainError("every guest that was named has ended")
    if groups is None:
        members: Mapping[str, Collection[int]] = groups_in_force(processes)
    else:
        members = groups({DomId(number): process for number, process in enumerate(processes, 1)})
    reserve = DEFAULT_RESERVE_BYTES if reserve_bytes is None else reserve_bytes
    for process in processes:
        _log.info("guest %s is process %d", process.name, process.pid)
    with QemuHypervisor(processes, groups=members, reserve_bytes=reserve) as hypervisor:
        yield hypervisor


@contextlib.contextmanager
def open_xen() -> Iterator[XenHypervisor]:
    """The Xen host that this machine is the control domain of.

    :raises BackendError: there is none, or it cannot be used.
    """
    from memshr.xen import open_host as open_xen_host  # noqa: PLC0415  # loads Xen's libraries

    with open_xen_host() as hypervisor:
        facts = hypervisor.facts
        _log.info("Xen %s through %s, memory sharing: %s", facts.version, facts.library, facts.sharing)
        yield hypervisor


def select_domains(hypervisor: XenHypervisor, sources: Sequence[str]) -> list[DomId]:
    """The domains that ``xen:all`` (or ``xen:``), ``xen:DOMID`` or ``xen:NAME`` name, each once, of any kind.

    :raises NoSuchDomainError: one that is named is not there, or a name is that of several.
    """
    found: dict[DomId, None] = {}
    for source in sources:
        found.update(dict.fromkeys(info.domid for info in hypervisor.select(source.partition(":")[2] or "all")))
    return list(found)


def sharable_domains(
    hypervisor: XenHypervisor, sources: Sequence[str], notice: Callable[[str], None] = lambda _: None
) -> list[DomId]:
    """Those of ``select_domains`` whose pages can be shared; sharing is enabled on them.

    :param notice: told of each of the others, by name, with the reason, in one line.
    :raises RefusedDomainError: none is left; the reasons of all of them.
    :raises UnsupportedError: this Xen shares no domain's pages.
    """
    hypervisor.need_sharing("share")
    return list(_admitted(hypervisor, select_domains(hypervisor, sources), hypervisor.admit, notice))


_Admitted = TypeVar("_Admitted")


def _admitted(
    hypervisor: XenHypervisor,
    domids: Sequence[DomId],
    admit: Callable[[DomId], _Admitted],
    notice: Callable[[str], None],
) -> dict[DomId, _Admitted]:
    # What ``admit`` makes of each domain that it does not refuse.
    if not domids:
        raise NoSuchDomainError("no domain but dom0 runs on this host")
    names = hypervisor.names()
    admitted, reasons = {}, []
    for domid in domids:
        try:
            admitted[domid] = admit(domid)
        except DomainError as error:
            reasons.append(f"domain {names.get(domid, 'dom0')} ({domid}) is left alone: {error}")
    if not admitted:
        raise RefusedDomainError("; ".join(reasons), reasons=reasons)
    for reason in reasons:
        notice(reason)
    return admitted


@contextlib.contextmanager
def open_sources(
    sources: Sequence[str], *, format: str | None = None, notice: Callable[[str], None] = lambda _: None
) -> Iterator[list[list[Subject]]]:
    """What ``sources`` name, opened for an estimate: images and live memory of any kind, read in place.

    :param sources: paths, ``pid:N``, ``qemu:...``, ``xen:...``, in any mixture.
    :param format: read images as this format; None: detect it.
    :param notice: told, in one line each, of guests of ``qemu:all`` that cannot be reached, and of Xen domains that may
        not be looked at: they are left out.
    :returns: the subjects of each source; a domain or process that several sources name is in the first only.
    :raises MemshrError: a source cannot be opened, or an image or process is named twice.
    """
    from memshr.images import open_image  # noqa: PLC0415  # as above
    from memshr.images.process import ProcessSource  # noqa: PLC0415  # as above

    with contextlib.ExitStack() as stack:
        images = {
            number: stack.enter_context(open_image(source, format=format))
            for number, source in enumerate(sources)
            if _prefix(source) not in _LIVE
        }
        _refuse_twice(list(images.values()))
        for name, image in zip(_names([image.path for image in images.values()]), images.values(), strict=True):
            image.name = name
            _log.info("image %s, format %s", image.path, image.format)
        pids = [source for source in sources if _prefix(source) == "pid"]
        if twice := [source for source in pids if pids.count(source) > 1]:
            raise MemshrError(f"{twice[0]} is named twice", remedy="name each process once")
        guests = _guest_subjects(stack, [source for source in sources if _prefix(source) == "qemu"], notice)
        domains = _domain_subjects(stack, [source for source in sources if _prefix(source) == "xen"], notice)
        opened: list[list[Subject]] = []
        for number, source in enumerate(sources):
            match _prefix(source):
                case "pid":
                    process = stack.enter_context(ProcessSource(_pid_of(source)))
                    _log.info("process %s", source)
                    opened.append([Subject(process, "process", huge_pages_known=process.huge_pages_known)])
                case "qemu":
                    opened.append(guests.pop(source, []))
                case "xen":
                    opened.append(domains.pop(source, []))
                case _:
                    opened.append([Subject(images[number], "image", images[number].format)])
        yield opened


_LIVE = ("pid", "qemu", "xen")


def _pid_of(source: str) -> int:
    number = source.partition(":")[2]
    if not (number.isdecimal() and number.isascii() and 0 < len(number) <= 10):
        raise MemshrError(f"{source!r} is no process", remedy="write pid:N, N the process's number")
    return int(number)


def _guest_subjects(
    stack: contextlib.ExitStack, sources: Sequence[str], notice: Callable[[str], None]
) -> dict[str, list[Subject]]:
    # The guests that each source names, all of them under one hypervisor.
    if not sources:
        return {}
    found = {source: select_guests([source]) for source in dict.fromkeys(sources)}
    if EVERY_GUEST in found:
        found[EVERY_GUEST] = _reachable(found[EVERY_GUEST], notice)
    processes = {process.pid: process for each in found.values() for process in each}
    hypervisor = stack.enter_context(open_guests(list(processes.values())))
    domids = {hypervisor.enlisted(domid).pid: domid for domid in hypervisor.names()}
    lock = threading.Lock()
    subjects: dict[str, list[Subject]] = {}
    for source, each in found.items():
        ours = [domid for process in each if (domid := domids.pop(process.pid, None)) is not None]
        subjects[source] = [
            Subject(DomainSource(hypervisor, domid, lock, hypervisor.huge), "qemu", huge_pages_known=True)
            for domid in ours
        ]
    return subjects


def _reachable(processes: Sequence[GuestProcess], notice: Callable[[str], None]) -> list[GuestProcess]:
    # Those whose monitor answers, and says where their memory is; if that is none, the first error is the answer.
    from memshr.qemu.guests import memory_layout, unreadable  # noqa: PLC0415  # as above

    reachable, errors = [], []
    for process in processes:
        try:
            with process.monitor() as monitor:
                memory_layout(monitor, process.mappings())
            reachable.append(process)
        except BackendError as error:
            errors.append(error)
        except OSError as error:
            refusal = unreadable(error)
            errors.append(
                BackendError(f"guest {process.name} ({process.pid}): {refusal.reason}", remedy=refusal.remedy)
            )
    if errors and not reachable:
        raise errors[0]
    for each in errors:
        _log.warning("left out: %s", each)
        notice(printable(f"left out: {each}"))
    return reachable


def _domain_subjects(
    stack: contextlib.ExitStack, sources: Sequence[str], notice: Callable[[str], None]
) -> dict[str, list[Subject]]:
    if not sources:
        return {}
    xen = stack.enter_context(open_xen())
    lock = threading.Lock()
    source_of: dict[DomId, str] = {}
    for source in dict.fromkeys(sources):
        for domid in select_domains(xen, [source]):
            source_of.setdefault(domid, source)
    admitted = _admitted(xen, list(source_of), lambda domid: DomainSource(xen, domid, lock), notice)
    subjects: dict[str, list[Subject]] = {source: [] for source in sources}
    for domid, pages in admitted.items():
        subjects[source_of[domid]].append(Subject(pages, "xen", domid=domid))
        if unseen_pages := xen.unseen_pages.get(domid):
            notice(unseen(pages.name, domid, unseen_pages))
    return subjects


def unseen(name: str, domid: DomId, pages: int) -> str:
    """What is said of a domain of which so many pages were not found."""
    return (
        f"domain {name} ({domid}): {pages:,} of its pages were not found in its address space, and are in no figure"
        " (a device model's rings are among them)"
    )


def mapping_budget() -> int:
    """How many mappings sharing could use of those that this host lets a process have (``vm.max_map_count``)."""
    from memshr.qemu.attachment import MAP_RESERVE  # noqa: PLC0415  # as above
    from memshr.qemu.pagemap import map_count_limit  # noqa: PLC0415  # as above

    try:
        return max(0, map_count_limit() - MAP_RESERVE)
    except (OSError, ValueError):
        return DEFAULT_MAP_COUNT - MAP_RESERVE


DEFAULT_MAP_COUNT = 65_530
"""What Linux sets unless told otherwise (``DEFAULT_MAX_MAP_COUNT`` of ``include/linux/mm.h``)."""


def embedded_images(uri: str) -> list[str]:
    """The paths of the images in ``embedded:IMAGE,IMAGE``."""
    return [path for path in uri.removeprefix(EMBEDDED).split(",") if path]


@contextlib.contextmanager
def open_host(uri: str) -> Iterator[Hypervisor]:
    """The mechanism that ``uri`` names.

    ``embedded:``; ``embedded:IMAGE,IMAGE...`` with a domain for each image; ``qemu:all``, ``qemu:NAME`` for guests;
    ``xen:`` for a Xen host.

    :raises MemshrError: there is no such mechanism, or an image cannot be opened.
    """
    if _prefix(uri) == "xen":
        with open_xen() as xen:
            yield xen
        return
    if _prefix(uri) == "qemu":
        with open_guests(select_guests([uri])) as guests:
            yield guests
        return
    if not uri.startswith(EMBEDDED):
        raise MemshrError(f"{uri!r} is no host", remedy=f"write {EMBEDDED}, {EMBEDDED}IMAGE,IMAGE, qemu:all or xen:")
    with open_images(embedded_images(uri)) as hypervisor:
        yield hypervisor
