"""memshr replay."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import click

from memshr.cli.options import as_json, print_json
from memshr.replay import DIFFERENCES, ReplayResult
from memshr.replay import replay as replay_file


@click.command(short_help="Does memshr answer as a real Xen did?")
@click.argument("files", nargs=-1, required=True, type=click.Path(path_type=Path), metavar="FILE...")
@as_json
def replay(files: tuple[Path, ...], as_json: bool) -> None:
    """Run recordings of a real Xen on the embedded hypervisor, and print every difference.

    After every step the answer, the handle, the counters, the figures of each domain and what was read are compared.
    Where Xen itself is wrong, or died, memshr does the right thing; such differences are listed by name and do not
    count. Exit code 1 if there is any other.
    """
    results = {path: replay_file(path) for path in files}
    if as_json:
        print_json({str(path): _plain(result) for path, result in results.items()})
    else:
        for path, result in results.items():
            _print(path, result)
        used = {name for result in results.values() for name in result.excuses()}
        for name in DIFFERENCES:
            if name in used:
                click.echo(f"({name}: {DIFFERENCES[name]})")
    if not all(result.ok for result in results.values()):
        raise click.exceptions.Exit(1)


def _print(path: Path, result: ReplayResult) -> None:
    if result.ok:
        named = ", ".join(sorted(result.excuses()))
        click.echo(f"ok {path.stem} ({result.steps} steps{'; ' * bool(named)}{named})")
    for difference in result.differences:
        click.echo(f"differs {path.stem} {difference}")


def _plain(result: ReplayResult) -> dict[str, object]:
    return {
        "scenario": result.scenario,
        "ok": result.ok,
        "steps": result.steps,
        "differences": [dataclasses.asdict(difference) for difference in result.differences],
        "excused": [dataclasses.asdict(difference) for difference in result.excused],
    }
