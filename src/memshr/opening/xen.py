"""The domains of a Xen host: which of them a SOURCE names, and which may be looked at or shared."""

from __future__ import annotations

import contextlib
import logging
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TypeVar

from memshr.errors import DomainError, NoSuchDomainError, RefusedDomainError
from memshr.opening.domain_source import DomainSource
from memshr.pagesource import Subject
from memshr.types import DomId

if TYPE_CHECKING:
    from memshr.xen import XenHypervisor

__all__ = [
    "open_xen",
    "select_domains",
    "sharable_domains",
]

_log = logging.getLogger(__name__)


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


def domain_subjects(
    stack: contextlib.ExitStack, sources: Sequence[str], notice: Callable[[str], None]
) -> dict[str, list[Subject]]:
    """The domains that each source names, all of them under one hypervisor that ``stack`` closes."""
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
    """What is said of a domain if some of its pages were not found; ``pages`` is how many."""
    return (
        f"domain {name} ({domid}): {pages:,} of its pages were not found in its address space, and are in no figure"
        " (a device model's rings are among them)"
    )
