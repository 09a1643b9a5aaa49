"""memshr capture."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import click

from memshr.cli.options import as_json, print_json
from memshr.cli.running import progress_bar
from memshr.errors import MemshrError
from memshr.images.capture import capture_process
from memshr.render.wording import mib


@click.command()
@click.argument("source", metavar="pid:N")
@click.option(
    "-o", "--output", required=True, type=click.Path(path_type=Path), metavar="FILE", help="The file to write."
)
@click.option(
    "--limit-mib",
    type=click.IntRange(1),
    metavar="N",
    help="Refuse, before anything is written, if the memory to be written is more than this.",
)
@as_json
def capture(source: str, output: Path, limit_mib: int | None, as_json: bool) -> None:
    """Write the memory of a live process to an ELF core.

    What is written is the readable private memory of the process: not what it shares with others, not devices, and
    not pages that it never touched. The process goes on running meanwhile, so the pages are of slightly different
    moments. If anything goes wrong no file is left behind, and a file that was there before is kept.
    """
    match = re.fullmatch(r"pid:([1-9][0-9]{0,9})", source)
    if match is None:
        raise MemshrError(f"{source!r} is no source that can be captured", remedy="write pid:N, N the process's number")
    with progress_bar() as bar:
        task = bar.add_task(f"capture {source}", total=None)

        def show(done_bytes: int, total_bytes: int) -> None:
            bar.update(task, completed=done_bytes, total=total_bytes)

        limit_bytes = None if limit_mib is None else limit_mib << 20
        result = capture_process(int(match[1]), output, limit_bytes=limit_bytes, progress=show)
    if as_json:
        print_json(dataclasses.asdict(result) | {"path": str(result.path)})
        return
    click.echo(f"{result.path}: {result.pages:,} pages ({mib(result.pages)} MiB) of process {result.pid}")
    if result.absent_pages:
        click.echo(f"{result.absent_pages:,} pages that it never touched are not in the file.")
    if result.unreadable_pages:
        click.echo(f"{result.unreadable_pages:,} pages could not be read and are not in the file.")
