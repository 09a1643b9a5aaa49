"""memshr status and memshr top."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from memshr.cli.options import as_json, print_json
from memshr.errors import NoSuchDomainError
from memshr.opening.grammar import SourceKind, kind_of
from memshr.opening.guests import nothing_runs, select_guests
from memshr.opening.xen import open_xen, select_domains
from memshr.render.console import shown
from memshr.render.wording import mib, printable

if TYPE_CHECKING:
    from memshr.qemu.status import GuestStatus
    from memshr.types import DomainInfo, DomId
    from memshr.xen import XenHypervisor


def _look(sources: Sequence[str]) -> list[GuestStatus]:
    from memshr.qemu.status import guest_statuses, status_of  # noqa: PLC0415  # only where there are guests

    return [status_of(process) for process in select_guests(sources)] if sources else guest_statuses()


@click.command(short_help="The QEMU guests of this host, and what they share.")
@click.argument("guests", nargs=-1, metavar="[qemu:GUEST|xen:DOMAIN]...")
@as_json
def status(guests: tuple[str, ...], as_json: bool) -> None:
    """The running QEMU guests of this host: who they are, whether memshr may touch them, and what they share.

    A guest that must not be touched is listed with every reason, each with what would change it. Nothing is changed.
    With xen: it is the domains of the Xen host, and what host that is.
    """
    if guests and kind_of(guests) is SourceKind.XEN:
        with open_xen() as xen:
            if as_json:
                print_json(_plain_xen(xen, guests))
            else:
                _console().print(_xen_table(xen, _xen_domains(xen, guests)))
        return
    found = _look(guests)
    if as_json:
        print_json([_plain(each) for each in found])
        return
    if not found:
        hint = "" if os.geteuid() == 0 else ": run memshr as root to see those of every user"
        text = nothing_runs()
        click.echo(f"{text[0].upper()}{text[1:]}{hint}.")
        return
    _console().print(_table(found, {}))
    for each in found:
        if each.ksm_pages:
            click.echo(
                f"{printable(each.process.name)} ({each.process.pid}): KSM has merged {mib(each.ksm_pages)} MiB of it;"
                " memshr would take that back before it shares."
            )
        for refusal in each.refusals:
            click.echo(f"{printable(each.process.name)} ({each.process.pid}) must not be touched: {refusal}")


@click.command(short_help="Watch what the guests share.")
@click.argument("guests", nargs=-1, metavar="[qemu:GUEST|xen:DOMAIN]...")
@click.option(
    "--interval",
    type=click.FloatRange(0.1),
    metavar="SECONDS",
    default=2.0,
    show_default=True,
    help="Time between looks.",
)
@click.option(
    "--count", type=click.IntRange(1), metavar="N", help="Look so often, then end; until interrupted if not given."
)
def top(guests: tuple[str, ...], interval: float, count: int | None) -> None:
    """Watch the guests: what they share, how fast they write it away again, and the memory of the host.

    On a terminal the table is refreshed in place; Ctrl-C ends it. In a pipe each look is printed below the last.
    """
    console = _console()
    with contextlib.ExitStack() as stack:
        if guests and kind_of(guests) is SourceKind.XEN:
            xen = stack.enter_context(open_xen())
            named = select_domains(xen, guests)  # whoever is named must be there when it begins
            _refresh(console, lambda: _xen_table(xen, _still_there(xen, guests, named)), interval, count)
            return
        before: dict[int, tuple[float, int]] = {}
        """of each guest when it was looked at, and its copied pages then"""

        def look() -> Table:
            found = _look(guests)
            now_s = time.monotonic()
            rates = {
                each.process.pid: (each.copied_pages - copied) / (now_s - then_s)
                for each in found
                for then_s, copied in [before.get(each.process.pid, (now_s, 0))]
                if then_s < now_s
            }
            before.clear()
            before.update({each.process.pid: (now_s, each.copied_pages) for each in found})
            return _table(found, rates)

        _refresh(console, look, interval, count)


def _console() -> Console:
    return Console(width=None if sys.stdout.isatty() else 120, highlight=False)


def _refresh(console: Console, look: Callable[[], Table], interval: float, count: int | None) -> None:
    # On a terminal in place, in a pipe one table below the other.
    looks = 0
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            if sys.stdout.isatty():
                live.update(look(), refresh=True)
            else:
                console.print(look())
            looks += 1
            if looks == count:
                return
            time.sleep(interval)


def _xen_domains(xen: XenHypervisor, sources: Sequence[str]) -> list[DomainInfo]:
    # Those that are named. One that ends while we look is left out.
    found = []
    for domid in select_domains(xen, sources):
        with contextlib.suppress(NoSuchDomainError):
            found.append(xen.domain_info(domid))
    return found


def _still_there(xen: XenHypervisor, sources: Sequence[str], named: Sequence[DomId]) -> list[DomainInfo]:
    # Of a host the domains that there are now; of domains that were named those that have not ended.
    everyone = any(source.partition(":")[2] in ("", "all") for source in sources)
    return [info for info in xen.domains() if everyone or info.domid in named]


def _xen_table(xen: XenHypervisor, domains: Sequence[DomainInfo]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    table.add_column("domain")
    for column in ("domid", "kind", "own MiB", "shared MiB", "state"):
        table.add_column(column, justify="right")
    for info in domains:
        table.add_row(
            shown(info.name), str(info.domid), info.kind, mib(info.tot_pages), mib(info.shr_pages), _xen_state(info)
        )
    facts = xen.facts
    built_in = "" if facts.sharing else "not "
    caption = f"Xen {facts.version} through {facts.library}; memory sharing is {built_in}built in."
    if facts.sharing:
        counters = xen.counters()
        caption += f" {mib(counters.freed_pages)} MiB freed, {counters.used_frames:,} frames shared."
    table.caption = caption
    return table


def _xen_state(info: DomainInfo) -> str:
    states = {"dying": info.dying, "crashed": info.crashed, "paused": info.pause_count > 0}
    return next((state for state, holds in states.items() if holds), "running")


def _plain_xen(xen: XenHypervisor, sources: Sequence[str]) -> dict[str, object]:
    counters = dataclasses.asdict(xen.counters()) if xen.facts.sharing else None
    domains = [dataclasses.asdict(info) for info in _xen_domains(xen, sources)]
    return {"host": dataclasses.asdict(xen.facts), "counters": counters, "domains": domains}


def _table(found: Sequence[GuestStatus], rates: Mapping[int, float]) -> Table:
    from memshr.qemu.pagemap import host_available_bytes  # noqa: PLC0415  # only where there are guests

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 0, 0, 1), caption_justify="left")
    for column in ("guest", "group"):
        table.add_column(column, overflow="fold", min_width=10 if column == "guest" else 5)
    table.add_column("user", overflow="fold", min_width=4)
    for column in ("pid", "state", "RAM", "shared", "frames", "copied", "/s", "ok"):
        table.add_column(column, justify="right", no_wrap=True)
    for each in found:
        rate = rates.get(each.process.pid)
        table.add_row(
            shown(each.process.name),
            shown(", ".join(each.groups)),
            shown(each.process.user),
            str(each.process.pid),
            shown(each.state),
            f"{each.ram_bytes / 2**20:,.1f}",
            mib(each.sharing_pages),
            mib(each.frames),
            f"{each.copied_pages:,}",
            "" if rate is None else f"{rate:,.0f}",
            "no" if each.refusals else "yes",
        )
    table.caption = (
        "MiB of RAM, of it shared, and of the frames that it reads; copied: pages\n"
        "written since they were shared; ok: memshr may touch it.\n"
        f"Host: {host_available_bytes() / 2**20:,.0f} MiB available."
    )
    return table


def _plain(status: GuestStatus) -> dict[str, object]:
    return {
        "name": status.process.name,
        "pid": status.process.pid,
        "uid": status.process.uid,
        "user": status.process.user,
        "state": status.state,
        "ram_bytes": status.ram_bytes,
        "attached": status.attached,
        "groups": list(status.groups),
        "sharing_pages": status.sharing_pages,
        "copied_pages": status.copied_pages,
        "frames": status.frames,
        "ksm_pages": status.ksm_pages,
        "refusals": [dataclasses.asdict(refusal) for refusal in status.refusals],
    }
