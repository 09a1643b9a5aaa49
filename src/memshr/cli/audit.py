"""memshr audit."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import click
import numpy as np

from memshr.cli.options import print_json, refuse_options, sharing_options
from memshr.cli.rights import given_up
from memshr.cli.running import run_session
from memshr.cli.share import guest_groups
from memshr.embedded import EmbeddedHypervisor
from memshr.images import open_image
from memshr.opening.grammar import SourceKind, kind_of
from memshr.opening.guests import open_guests, select_guests
from memshr.opening.images import open_images
from memshr.opening.xen import open_xen
from memshr.render.wording import printable
from memshr.sharing.session import SharingOptions
from memshr.types import AuditReport, DomId, Gfn, page_buffer

_BATCH_PAGES = 2048


@click.command(short_help="Prove that sharing was safe: every book, every page.")
@sharing_options
def audit(
    sources: tuple[str, ...], groups: tuple[str, ...], image_format: str | None, max_sharers: int, as_json: bool
) -> None:
    """Prove that sharing was safe: check every book, and every page against its image.

    Of running guests (qemu:all, qemu:NAME) what the kernel says of each page is checked: every shared page lies on a
    frame of its own group's pool, every frame is read by somebody, and holds what it held when it was shared. Without
    --group the trust groups are those under which the guests share now.

    Of a Xen host (xen:) it is Xen's own audit, where that is built in, and a cross-check of ours.

    Image files are shared in the embedded hypervisor. Then the books are checked in both directions (every shared frame
    against the p2m of every domain, and back), and every page of every domain is read again through its p2m and
    compared, byte for byte, with the image file opened afresh.
    """
    kind = kind_of(sources)
    if kind is not SourceKind.IMAGE:
        refuse_options(["image_format", "max_sharers"], "is for image files")
    if kind is SourceKind.XEN:
        refuse_options(["groups"], "is not for Xen, which keeps no trust groups: all of the host is checked")
        with open_xen() as xen:
            _tell(xen.audit(patience_s=math.inf), as_json=as_json)
        return
    if kind is SourceKind.QEMU:
        grouping = partial(guest_groups, groups) if groups else None
        with open_guests(select_guests(sources), groups=grouping) as live:
            _tell(live.audit(), as_json=as_json)
        return
    with given_up(images=sources), open_images(sources, format=image_format) as hypervisor:
        report = run_session(hypervisor, groups, SharingOptions(max_sharers=max_sharers))
        checked = wrong = 0
        for domid, path in zip(hypervisor.names(), sources, strict=True):
            pages, differing = _compare_with_image(hypervisor, domid, path, image_format)
            checked += pages
            wrong += differing
        audited = hypervisor.audit()
    if as_json:
        print_json(
            {
                "findings": [dataclasses.asdict(finding) for finding in audited.findings],
                "xen_errors": audited.xen_errors,
                "counters": dataclasses.asdict(report.counters),
                "saved_pages": report.saved_pages,
                "checked_pages": checked,
                "wrong_pages": wrong,
            }
        )
    else:
        for finding in audited.findings:
            click.echo(str(finding))
        click.echo(
            f"{len(audited.findings)} findings in the books of {report.counters.used_frames:,} shared frames;"
            f" {wrong:,} of {checked:,} pages differ from their image ({report.saved_pages:,} pages saved)."
        )
    if not audited.clean or wrong:
        raise click.exceptions.Exit(1)


def _tell(audited: AuditReport, *, as_json: bool) -> None:
    if as_json:
        print_json(dataclasses.asdict(audited))
    else:
        for finding in audited.findings:
            click.echo(str(finding))
        for line in audited.unchecked:
            click.echo(f"not checked: {printable(line)}")
        found = f"{len(audited.findings)} findings" + " in what was checked" * bool(audited.unchecked)
        click.echo(
            f"{found}; {audited.counters.used_frames:,} frames are shared"
            f" and save {audited.counters.freed_pages:,} pages."
        )
    if not audited.clean:
        raise click.exceptions.Exit(1)


def _compare_with_image(
    hypervisor: EmbeddedHypervisor, domid: DomId, path: str, image_format: str | None
) -> tuple[int, int]:
    buffer = page_buffer(_BATCH_PAGES)
    checked = wrong = 0
    with open_image(path, format=image_format) as image:
        for extent in image.extents:
            for start in range(0, len(extent.pages), _BATCH_PAGES):
                original = extent.pages[start : start + _BATCH_PAGES]
                now = hypervisor.read_range(domid, Gfn(extent.first_gfn + start), len(original), buffer)
                checked += len(original)
                if not np.array_equal(now, original):
                    wrong += int(np.count_nonzero((now != original).any(axis=1)))
    return checked, wrong
