"""Running QEMU guests: which of them a SOURCE names, as a host and as sources."""

from __future__ import annotations

import contextlib
import logging
import os
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING

from memshr.errors import BackendError, MemshrError, NoSuchDomainError, printable
from memshr.opening.domain_source import DomainSource
from memshr.opening.grammar import EVERY_GUEST, prefix_of
from memshr.pagesource import Subject
from memshr.types import DomId

if TYPE_CHECKING:
    from memshr.qemu.guests import GuestProcess
    from memshr.qemu.hypervisor import QemuHypervisor

__all__ = [
    "open_guests",
    "select_guests",
]

_log = logging.getLogger(__name__)


def select_guests(sources: Sequence[str]) -> list[GuestProcess]:
    """The running guests that ``qemu:all``, ``qemu:NAME``, ``qemu:PID`` or ``qemu:NAME@SOCKET`` name, each once.

    :raises NoSuchDomainError: there is none, or a name is that of several.
    :raises MemshrError: a source is no running guest at all.
    """
    from memshr.qemu import guests  # noqa: PLC0415  # a machine without Linux can still read images

    found: dict[int, GuestProcess] = {}
    for source in sources:
        if prefix_of(source) != "qemu":
            raise MemshrError(f"{source} names no QEMU guest", remedy="write qemu:all, qemu:NAME or qemu:PID")
        for process in guests.select_guests(source.partition(":")[2]):
            found.setdefault(process.pid, process)
    if not found:
        raise NoSuchDomainError(nothing_runs(), remedy="" if os.geteuid() == 0 else "run memshr as root")
    return list(found.values())


def nothing_runs() -> str:
    """What is said if there is no guest: a user sees only programs of their own."""
    if os.geteuid() == 0:
        return "no QEMU guest runs on this host"
    return "no QEMU guest runs that this user may see"


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


def guest_subjects(
    stack: contextlib.ExitStack, sources: Sequence[str], notice: Callable[[str], None]
) -> dict[str, list[Subject]]:
    """The guests that each source names, all of them under one hypervisor that ``stack`` closes."""
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
