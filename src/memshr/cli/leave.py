"""memshr unshare and memshr detach."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import click

from memshr.cli.options import as_json, guests, print_json, reserve_mib
from memshr.cli.running import not_to_be_stopped
from memshr.opening.guests import open_guests, select_guests
from memshr.render.wording import mib, printable

if TYPE_CHECKING:
    from memshr.qemu.books import GuestFigures


@click.command(short_help="Give guests all their own pages back.")
@guests
@reserve_mib
@as_json
def unshare(guests: tuple[str, ...], reserve_mib: int, as_json: bool) -> None:
    """Give running guests all their own pages back, after checking that the host has room for them.

    The guests stay attached: the next share is quick. To leave them wholly, use memshr detach.
    """
    _report(_undo(guests, reserve_mib << 20, detach=False), as_json=as_json, verb="has its own pages again")


@click.command(short_help="Unshare guests and leave them as they were.")
@guests
@reserve_mib
@as_json
def detach(guests: tuple[str, ...], reserve_mib: int, as_json: bool) -> None:
    """Unshare running guests and leave them as they were: memshr's thread, mappings and descriptors are taken out."""
    _report(_undo(guests, reserve_mib << 20, detach=True), as_json=as_json, verb="is as it was")


def _undo(sources: Sequence[str], reserve_bytes: int, *, detach: bool) -> Iterator[GuestFigures]:
    """What each guest shared until then."""
    with not_to_be_stopped(), open_guests(select_guests(sources), reserve_bytes=reserve_bytes) as hypervisor:
        for domid in hypervisor.names():
            before = hypervisor.guest_figures(domid)
            if detach:
                hypervisor.detach(domid)
            else:
                hypervisor.unshare_guest(domid)
            yield before


def _report(done: Iterator[GuestFigures], *, as_json: bool, verb: str) -> None:
    guests = []
    for guest in done:
        pages = guest.sharing_pages
        guests.append({"name": guest.name, "pid": guest.pid, "unshared_pages": pages})
        if not as_json:
            click.echo(f"{printable(guest.name)} {verb}: {pages:,} pages ({mib(pages)} MiB) were shared.")
    if as_json:
        print_json({"guests": guests})
