"""memshr estimate."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

import click

from memshr.backends import (
    SourceKind,
    kind_of,
    open_copies,
    open_guests,
    open_images,
    open_xen,
    select_domains,
    select_guests,
)
from memshr.cli.options import print_json, sharing_options
from memshr.cli.session import exit_with, print_report, run_session
from memshr.embedded import EmbeddedHypervisor
from memshr.sharing.session import SharingOptions


@click.command()
@sharing_options
def estimate(
    sources: tuple[str, ...], groups: tuple[str, ...], image_format: str | None, max_sharers: int, as_json: bool
) -> None:
    """What would sharing save? Changes nothing.

    Each SOURCE becomes a domain of the embedded reference hypervisor, and their pages are shared there, contents
    compared: the figures are exact, not sampled. They tell apart zero pages, equal pages inside one domain, and equal
    pages between domains of a trust group.

    Running guests (qemu:all, qemu:NAME, xen:all, xen:DOMID) are read and left alone. Their memory is copied to a
    temporary file first (TMPDIR says where), each page as it was when it was read.
    """
    with _open(sources, image_format) as hypervisor:
        report = run_session(hypervisor, groups, SharingOptions(max_sharers=max_sharers))
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report, verb="can be saved")
        if len(report.domains) > 1 and not groups:
            click.echo("Each domain shares within itself only; try --group all to see what one trust group would save.")
    exit_with(report)


@contextlib.contextmanager
def _open(sources: Sequence[str], image_format: str | None) -> Iterator[EmbeddedHypervisor]:
    match kind_of(sources):
        case SourceKind.IMAGE:
            with open_images(sources, format=image_format) as hypervisor:
                yield hypervisor
        case SourceKind.QEMU:
            with open_guests(select_guests(sources)) as guests:
                domids = [info.domid for info in guests.domains()]
                with open_copies(guests, domids) as hypervisor:
                    yield hypervisor
        case SourceKind.XEN:
            with open_xen() as xen, open_copies(xen, select_domains(xen, sources)) as hypervisor:
                yield hypervisor
