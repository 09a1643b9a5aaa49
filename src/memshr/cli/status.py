"""memshr status and memshr top."""

from __future__ import annotations

import dataclasses
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import click
from rich import box
from rich.console import Console
from rich.live import Live
from rich.table import Table

from memshr.backends import select_guests
from memshr.cli.options import as_json, print_json
from memshr.cli.session import mib

if TYPE_CHECKING:
    from memshr.qemu.status import GuestStatus


def _look(sources: Sequence[str]) -> list[GuestStatus]:
    from memshr.qemu.status import guest_statuses, status_of  # noqa: PLC0415  # only where there are guests

    return [status_of(process) for process in select_guests(sources)] if sources else guest_statuses()


@click.command(short_help="The QEMU guests of this host, and what they share.")
@click.argument("guests", nargs=-1, metavar="[qemu:GUEST]...")
@as_json
def status(guests: tuple[str, ...], as_json: bool) -> None:
    """The running QEMU guests of this host: who they are, whether memshr may touch them, and what they share.

    A guest that must not be touched is listed with every reason, each with what would change it. Nothing is changed.
    """
    found = _look(guests)
    if as_json:
        print_json([_plain(each) for each in found])
        return
    Console(width=None if sys.stdout.isatty() else 120, highlight=False).print(_table(found, {}))
    for each in found:
        for refusal in each.refusals:
            click.echo(f"{each.process.name} ({each.process.pid}) must not be touched: {refusal}")


@click.command(short_help="Watch what the guests share.")
@click.argument("guests", nargs=-1, metavar="[qemu:GUEST]...")
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
    console = Console(width=None if sys.stdout.isatty() else 120, highlight=False)
    looks = 0
    before: dict[int, int] = {}
    with Live(console=console, auto_refresh=False, screen=False) as live:
        while True:
            found = _look(guests)
            rates = {
                each.process.pid: (each.copied_pages - before[each.process.pid]) / interval
                for each in found
                if each.process.pid in before
            }
            before = {each.process.pid: each.copied_pages for each in found}
            table = _table(found, rates)
            if sys.stdout.isatty():
                live.update(table, refresh=True)
            else:
                console.print(table)
            looks += 1
            if looks == count:
                return
            time.sleep(interval)


def _table(found: Sequence[GuestStatus], rates: Mapping[int, float]) -> Table:
    from memshr.qemu.pagemap import host_available_bytes  # noqa: PLC0415  # only where there are guests

    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, caption_justify="left")
    for column in ("guest", "shares in"):
        table.add_column(column)
    for column in (
        "pid",
        "state",
        "RAM MiB",
        "sharing MiB",
        "frames MiB",
        "written again",
        "a second",
        "may be touched",
    ):
        table.add_column(column, justify="right")
    for each in found:
        rate = rates.get(each.process.pid)
        table.add_row(
            each.process.name,
            ", ".join(each.groups),
            str(each.process.pid),
            each.state,
            f"{each.ram_bytes / 2**20:,.1f}",
            mib(each.sharing_pages),
            mib(each.frames),
            f"{each.copied_pages:,}",
            "" if rate is None else f"{rate:,.0f}",
            "no" if each.refusals else "yes",
        )
    table.caption = f"Host: {host_available_bytes() / 2**20:,.0f} MiB available."
    return table


def _plain(status: GuestStatus) -> dict[str, object]:
    return {
        "name": status.process.name,
        "pid": status.process.pid,
        "state": status.state,
        "ram_bytes": status.ram_bytes,
        "attached": status.attached,
        "groups": list(status.groups),
        "sharing_pages": status.sharing_pages,
        "copied_pages": status.copied_pages,
        "frames": status.frames,
        "refusals": [dataclasses.asdict(refusal) for refusal in status.refusals],
    }
