"""memshr estimate."""

from __future__ import annotations

import click

from memshr.backends import are_guests, open_images
from memshr.cli.options import print_json, sharing_options
from memshr.cli.session import exit_with, print_report, run_session
from memshr.errors import UnsupportedError


@click.command()
@sharing_options
def estimate(
    sources: tuple[str, ...], groups: tuple[str, ...], image_format: str | None, max_sharers: int, as_json: bool
) -> None:
    """What would sharing save? Changes nothing.

    Each SOURCE becomes a domain of the embedded reference hypervisor, and their pages are shared there, contents
    compared: the figures are exact, not sampled. They tell apart zero pages, equal pages inside one domain, and equal
    pages between domains of a trust group.
    """
    if are_guests(sources):
        raise UnsupportedError(
            "running guests are estimated from a dump",
            remedy="write one with QEMU's dump-guest-memory (the guest goes on), and estimate that file",
        )
    with open_images(sources, format=image_format) as hypervisor:
        report = run_session(hypervisor, groups, max_sharers=max_sharers)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report, verb="can be saved")
        if len(sources) > 1 and not groups:
            click.echo("Each domain shares within itself only; try --group all to see what one trust group would save.")
    exit_with(report)
