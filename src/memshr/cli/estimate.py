"""memshr estimate."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import click

from memshr.cli.options import print_json, refuse_options, sharing_options
from memshr.cli.report_files import report_files, write_reports
from memshr.cli.rights import given_up
from memshr.cli.running import progress_bar
from memshr.estimation.analysis import EstimateProgress
from memshr.estimation.estimate import estimate as estimate_sources
from memshr.opening.grammar import any_images, only_images
from memshr.render.estimate_text import print_estimate

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command()
@sharing_options
@click.option(
    "--mappings",
    type=click.IntRange(0),
    metavar="N",
    show_default="what this host's vm.max_map_count leaves",
    help="Mappings that each domain may spend on sharing.",
)
@click.option(
    "--interval",
    type=click.FloatRange(0),
    metavar="SECONDS",
    default=1.0,
    show_default=True,
    help="Live sources: the time between the two samples; what changes in between is left out as volatile.",
)
@click.option(
    "--rate", type=click.FloatRange(0, min_open=True), metavar="MIB_PER_S", help="Read no faster than that, in MiB/s."
)
@click.option(
    "--sample",
    metavar="1/N",
    help="Look at one in N pages only (2 to 4096), chosen by position, and print bounds: quick, but not exact.",
)
@click.option("--seed", type=click.IntRange(0), metavar="N", help="Draw the sample that this number stands for.")
@click.option(
    "--against",
    type=_FILE,
    multiple=True,
    metavar="FILE",
    help="Say of the contents that save most whether they are pages of this file. May be given several times.",
)
@report_files
def estimate(
    sources: tuple[str, ...],
    groups: tuple[str, ...],
    image_format: str | None,
    max_sharers: int,
    as_json: bool,
    mappings: int | None,
    interval: float,
    rate: float | None,
    sample: str | None,
    seed: int | None,
    against: tuple[Path, ...],
    html_file: str | None,
    csv_file: str | None,
) -> None:
    """What would sharing save? Reads only, and changes nothing.

    Each SOURCE becomes a domain: memory images, live processes (pid:N, their private memory), running guests (qemu:all,
    qemu:NAME, xen:all, xen:DOMID), in any mixture. Nothing is injected. Images are read in place; only those that have
    to be unpacked (AVML, kdump-compressed dumps) go through a temporary file.

    Every page is looked at, and pages that could share are compared byte for byte: the figures are exact. They tell
    apart zero pages, equal pages inside one domain, and equal pages between domains of a trust group; what wider groups
    would save on top; and what the limits of a running host, its mappings and huge pages, leave of it.

    Pages of live sources that could share are read twice; those that change in between are left out.
    """
    reports, html = (html_file, csv_file), html_file is not None
    if sample is None:
        refuse_options(["seed"], "is for --sample 1/N, which was not given")
    if only_images(sources):
        refuse_options(["interval"], "is for live memory; image files are looked at once")
    if not any_images(sources):
        refuse_options(["image_format"], "is for image files")
    with contextlib.ExitStack() as stack:
        # Live memory is read as root; then nothing is left but to lay out the reports.
        images_only = only_images(sources)
        if images_only:
            write = stack.enter_context(given_up(images=sources, compared=against, outputs=reports, html=html))
        progress = stack.enter_context(_estimate_progress())
        found = estimate_sources(
            sources,
            groups=groups,
            format=image_format,
            max_sharers=max_sharers,
            mappings=mappings,
            interval_s=interval,
            rate_mib_per_s=rate,
            sample=sample,
            seed=seed,
            against=against,
            progress=progress,
            notice=lambda line: print(f"memshr: {line}", file=sys.stderr),
        )
        if not images_only:
            write = stack.enter_context(given_up(outputs=reports, html=html))
        write_reports(found, html_file=html_file, csv_file=csv_file, write=write)
    if as_json:
        print_json(found.to_dict())
    else:
        print_estimate(found, grouped=bool(groups))


@contextlib.contextmanager
def _estimate_progress() -> Iterator[Callable[[EstimateProgress], None]]:
    with progress_bar() as bar:
        tasks = {phase: bar.add_task(phase, total=None) for phase in ("look", "compare")}
        yield lambda progress: bar.update(
            tasks[progress.phase], completed=progress.done_pages, total=progress.total_pages
        )
