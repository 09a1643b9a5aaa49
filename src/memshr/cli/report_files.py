"""The options that write an estimate into files: --html and --csv."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

import click

from memshr.estimation.result import Estimate
from memshr.render.files import WriteFile, write_file
from memshr.render.html import check_html_libraries, write_html
from memshr.render.matrix import write_csv

_Command = TypeVar("_Command", bound=Callable[..., Any])


def _ready_for_html(_context: click.Context, _parameter: click.Parameter, path: str | None) -> str | None:
    # Now, not after the estimate.
    if path is not None:
        check_html_libraries()
    return path


_html = click.option(
    "--html",
    "html_file",
    metavar="FILE",
    callback=_ready_for_html,
    help="Also write the report as one self-contained web page.",
)
_csv = click.option(
    "--csv", "csv_file", metavar="FILE", help="Also write who has how much in common with whom, as CSV."
)


def report_files(command: _Command) -> _Command:
    """The options ``html_file`` and ``csv_file`` of a command that has an estimate to give to ``write_reports``."""
    return _html(_csv(command))


def write_reports(
    estimate: Estimate, *, html_file: str | None, csv_file: str | None, write: WriteFile = write_file
) -> None:
    """Write the files that were asked for.

    :param write: what writes them.
    :raises MemshrError: one cannot be written.
    """
    if html_file is not None:
        write_html(estimate, html_file, write)
    if csv_file is not None:
        write_csv(estimate, csv_file, write)
