"""memshr share."""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping, Sequence
from functools import partial
from math import ceil
from typing import TYPE_CHECKING

import click

from memshr.cli.options import huge_pages, huge_share, print_json, refuse_options, reserve_mib, sharing_options
from memshr.cli.running import exit_with, not_to_be_stopped, run_session, say
from memshr.errors import RefusedDomainError
from memshr.opening.grammar import SourceKind, kind_of
from memshr.opening.guests import open_guests, select_guests
from memshr.opening.images import open_images
from memshr.opening.xen import open_xen, sharable_domains, unseen
from memshr.render.sharing_text import print_report
from memshr.render.wording import mib, printable
from memshr.sharing.session import SharingOptions
from memshr.trust import EVERY_DOMAIN, trust_groups
from memshr.types import HUGE_PAGE_PAGES, PAGE_SIZE, DomId

if TYPE_CHECKING:
    from memshr.qemu.guests import GuestProcess


@click.command()
@sharing_options
@reserve_mib
@huge_pages
@huge_share
def share(
    sources: tuple[str, ...],
    groups: tuple[str, ...],
    image_format: str | None,
    max_sharers: int,
    as_json: bool,
    reserve_mib: int,
    huge_pages: str,
    huge_share: float,
) -> None:
    """Share equal pages now: nominate, compare, share, audit.

    Running QEMU guests (qemu:all, qemu:NAME, qemu:PID, qemu:NAME@SOCKET) go on running; what they share stays shared
    after the command, and the host has the memory. Guests that must not be touched are left alone, with the reason; see
    memshr status.

    Domains of a Xen host (xen:all, xen:DOMID, xen:NAME) are shared by Xen itself; docs/xen-host.md says what host that
    takes.

    Image files are shared in the embedded reference hypervisor, which lives as long as the command: it shows what
    happens, and the files stay as they are.
    """
    kind = kind_of(sources)
    if kind is not SourceKind.IMAGE:
        refuse_options(["image_format"], "is for image files")
    if kind is not SourceKind.QEMU:
        refuse_options(["reserve_mib", "huge_pages", "huge_share"], "is for running QEMU guests")
    options = SharingOptions(
        max_sharers=max_sharers,
        huge_page_pages=HUGE_PAGE_PAGES + 1 if huge_pages == "spare" else ceil(huge_share * HUGE_PAGE_PAGES),
    )
    if kind is SourceKind.QEMU:
        _share_guests(select_guests(sources), groups, options, reserve_mib << 20, as_json=as_json)
        return
    if kind is SourceKind.XEN:
        with open_xen() as xen:
            report = run_session(xen, groups, options, domids=sharable_domains(xen, sources, say))
            for info in xen.domains():
                if unseen_pages := xen.unseen_pages.get(info.domid):
                    say(unseen(info.name, info.domid, unseen_pages))
    else:
        from memshr.cli.rights import given_up  # noqa: PLC0415  # knows every image format

        with given_up(images=sources), open_images(sources, format=image_format) as hypervisor:
            report = run_session(hypervisor, groups, options)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report, verb="given back")
    exit_with(report)


def group_members(
    specs: Sequence[str], names: Mapping[DomId, str], users: Mapping[DomId, str] | None = None
) -> Mapping[str, Collection[int]]:
    """The domids of each trust group that ``specs`` write down, of the domains that have these names.

    :param users: whose each domain is, as ``trust_groups`` wants it.
    """
    written = {spec.partition("=")[0].strip() for spec in specs}
    groups = trust_groups(names, specs, lambda: 0, users)
    return {group.name: group.domids for group in groups if group.name in written or EVERY_DOMAIN in written}


def guest_groups(specs: Sequence[str], guests: Mapping[DomId, GuestProcess]) -> Mapping[str, Collection[int]]:
    """``group_members`` of running guests: those of different users are together only if a spec names them."""
    return group_members(specs, {domid: guest.name for domid, guest in guests.items()}, users_of(guests))


def users_of(guests: Mapping[DomId, GuestProcess]) -> dict[DomId, str]:
    """Whose each guest is; root's are of ""."""
    return {domid: guest.user if guest.uid else "" for domid, guest in guests.items()}


def _share_guests(
    processes: Sequence[GuestProcess],
    groups: Sequence[str],
    options: SharingOptions,
    reserve_bytes: int,
    *,
    as_json: bool,
) -> None:
    from memshr.qemu.pagemap import host_available_bytes  # noqa: PLC0415  # only where there are guests

    willing = _willing(processes)
    before_bytes = host_available_bytes()
    with (
        not_to_be_stopped(),
        open_guests(willing, groups=partial(guest_groups, groups), reserve_bytes=reserve_bytes) as hypervisor,
    ):
        users = users_of({domid: hypervisor.enlisted(domid) for domid in hypervisor.names()})
        report = run_session(hypervisor, groups, options, users=users)
        hypervisor.fold_back(seen=report.counters)
        figures = [hypervisor.guest_figures(domid) for domid in hypervisor.names()]
        trouble = hypervisor.trouble
    gained_bytes = host_available_bytes() - before_bytes
    if as_json:
        host = {"mem_available_gained_bytes": gained_bytes, "counted_bytes": report.saved_pages * PAGE_SIZE}
        print_json(report.to_dict() | {"host": host})
    else:
        print_report(report, verb="given back")
        click.echo(
            f"Host: MemAvailable {gained_bytes / 2**20:+,.1f} MiB; the pages counted are {mib(report.saved_pages)} MiB."
        )
        click.echo(
            "The two differ by what was shared before this run, by what the guests and the host's other programs"
            " allocated or freed meanwhile, by memshr's own memory, by pages just freed that the kernel does not count"
            " yet, and by neighbours of shared pages in huge pages that were split."
        )
        for guest in figures:
            click.echo(f"{printable(guest.name)}: {guest.mappings_left:,} more mappings fit into its process.")
    for line in trouble:
        print(f"memshr: {printable(line)}", file=sys.stderr)
    exit_with(report)
    if trouble:
        raise click.exceptions.Exit(3)


def _willing(processes: Sequence[GuestProcess]) -> list[GuestProcess]:
    """The guests that may be touched; the others are named on standard error, with every reason."""
    from memshr.qemu.status import status_of  # noqa: PLC0415  # as above

    willing = []
    reasons: list[str] = []
    for process in processes:
        refusals = status_of(process).refusals
        if not refusals:
            willing.append(process)
        reasons += [f"guest {process.name} ({process.pid}) is left alone: {refusal}" for refusal in refusals]
    if not willing:
        raise RefusedDomainError(reasons[0] if len(reasons) == 1 else "; ".join(reasons), reasons=reasons)
    for reason in reasons:
        print(f"memshr: {printable(reason)}", file=sys.stderr)
    return willing
