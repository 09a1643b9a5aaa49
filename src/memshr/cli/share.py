"""memshr share."""

from __future__ import annotations

import click

from memshr.backends import open_sources
from memshr.cli.options import print_json, sharing_options
from memshr.cli.session import exit_with, print_report, run_session


@click.command()
@sharing_options
def share(
    sources: tuple[str, ...], groups: tuple[str, ...], image_format: str | None, max_sharers: int, as_json: bool
) -> None:
    """Share equal pages now: nominate, compare, share, audit.

    Image files are shared in the embedded reference hypervisor, which lives as long as the command: it shows what
    happens, and the files stay as they are.
    """
    with open_sources(sources, format=image_format) as hypervisor:
        report = run_session(hypervisor, groups, max_sharers=max_sharers)
    if as_json:
        print_json(report.to_dict())
    else:
        print_report(report, verb="given back")
    exit_with(report)
