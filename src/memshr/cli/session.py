"""Running a sharing session for a command: its progress on a terminal, and its report as text."""

from __future__ import annotations

import secrets
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
from rich import box
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn
from rich.table import Table

from memshr.hypervisor import Hypervisor
from memshr.report.wording import printable
from memshr.sharing.fingerprint import SEED_BITS
from memshr.sharing.groups import trust_groups
from memshr.sharing.report import REASONS_TO_DROP, REASONS_TO_KEEP, SharingReport
from memshr.sharing.session import Progress as SessionProgress
from memshr.sharing.session import SharingOptions, share
from memshr.types import PAGE_SIZE, DomId

_PAIRS_SHOWN = 20


def run_session(
    hypervisor: Hypervisor,
    groups: Sequence[str],
    options: SharingOptions | None = None,
    *,
    domids: Collection[DomId] | None = None,
    users: Mapping[DomId, str] | None = None,
) -> SharingReport:
    """Share what can be shared among the host's domains; shows progress when standard error is a terminal.

    :param domids: only these domains; None: all.
    :param users: whose each domain is, as ``trust_groups`` wants it.
    """
    names = {domid: name for domid, name in hypervisor.names().items() if domids is None or domid in domids}
    trusted = trust_groups(names, groups, lambda: secrets.randbits(SEED_BITS), users)
    with _session_progress() as progress:
        return share(hypervisor, trusted, wait=time.sleep, options=options, progress=progress)


@contextmanager
def not_to_be_stopped() -> Iterator[None]:
    """Ctrl-Z, and the terminal's stopping of jobs in the background, do nothing meanwhile.

    A guest that writes to a nominated page waits for this process to let it go on, which a stopped process does not.
    Ctrl-C goes on working. (SIGSTOP cannot be caught.)
    """
    signals = (signal.SIGTSTP, signal.SIGTTIN, signal.SIGTTOU)
    before = [signal.signal(each, signal.SIG_IGN) for each in signals]
    try:
        yield
    finally:
        for each, handler in zip(signals, before, strict=True):
            signal.signal(each, handler)


@contextmanager
def progress_bar() -> Iterator[Progress]:
    """A progress bar on standard error; silent unless that is a terminal."""
    console = Console(stderr=True)
    with Progress(
        TextColumn("{task.description}", markup=False),
        BarColumn(),
        TaskProgressColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not sys.stderr.isatty(),
    ) as bar:
        yield bar


@contextmanager
def _session_progress() -> Iterator[Callable[[SessionProgress], None]]:
    with progress_bar() as bar:
        tasks: dict[tuple[str, str], TaskID] = {}

        def show(progress: SessionProgress) -> None:
            key = progress.group, progress.phase
            if key not in tasks:
                tasks[key] = bar.add_task(printable(f"{progress.phase} {progress.group}"), total=progress.total_pages)
            bar.update(tasks[key], completed=progress.done_pages)

        yield show


def mib(pages: int) -> str:
    """Pages as MiB, with one decimal."""
    return f"{pages * PAGE_SIZE / 2**20:,.1f}"


def shown(words: str) -> str:
    """Words that may hold a name, which is data of strangers, for a console: no markup, no control characters."""
    return escape(printable(words))


def say(line: str) -> None:
    """Tell the user something that is no result: on standard error."""
    print(f"memshr: {printable(line)}", file=sys.stderr)


def plain_table(*columns: str) -> Table:
    """A table whose first column is words, and whose others are figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table


def print_report(report: SharingReport, *, verb: str) -> None:
    """Print a session's report for a person. ``verb``: what the saving is, such as "can be saved"."""
    console = Console(width=None if sys.stdout.isatty() else 110, highlight=False)
    share_of = report.saved_pages / report.total_pages if report.total_pages else 0.0
    console.print(
        f"[bold]{mib(report.saved_pages)} MiB {verb}[/bold]: {report.saved_pages:,} of {report.total_pages:,} pages"
        f" ({share_of:.0%})"
    )
    console.print(_breakdown(report))
    console.print(_domain_table(report))
    if report.pairs:
        console.print(_pair_table(report))
    if dropped := {reason: pages for reason, pages in report.dropped.items() if pages}:
        table = plain_table("left out", "pages")
        for reason, pages in dropped.items():
            table.add_row(f"{reason}: {(REASONS_TO_DROP | REASONS_TO_KEEP)[reason]}", f"{pages:,}")
        console.print(table)
    console.print(
        f"Xen's counters: {report.counters.freed_pages:,} pages freed, {report.counters.used_frames:,} frames used."
    )
    if report.stopped is not None:
        console.print(f"[bold]Stopped early[/bold]: {shown(report.stopped)}")
    for finding in report.audit_findings:
        console.print(f"[bold]audit[/bold] {shown(str(finding))}")
    for line in report.audit_unchecked:
        console.print(f"[bold]not audited[/bold] {shown(line)}")
    if not report.audit_findings:
        checked = "what was checked" if report.audit_unchecked else "every frame, reference and counter"
        console.print(f"Audit: {checked} agrees.")
    for line in report.left_out:
        console.print(f"[bold]left out[/bold] {shown(line)}")


def _breakdown(report: SharingReport) -> Table:
    table = plain_table("where the saving is", "pages", "MiB")
    for name, pages in (
        (_zero_pages(report), report.zero_pages),
        ("equal pages inside one domain", report.intra_pages),
        ("equal pages between domains of a group", report.inter_pages),
    ):
        table.add_row(name, f"{pages:,}", mib(pages))
    if report.absent_pages:
        table.add_row("(never backed by the host: no saving)", f"{report.absent_pages:,}", mib(report.absent_pages))
    return table


def _zero_pages(report: SharingReport) -> str:
    if frames := report.dropped.get("zero_frames"):
        return f"zero pages, on {frames:,} frame{'s' * (frames > 1)}"
    return "zero pages, given back without a frame" if report.zero_pages else "zero pages"


def _domain_table(report: SharingReport) -> Table:
    table = plain_table("domain", "group", "pages", "zero", "shared", "saved inside", "unique", "left out")
    for domain in report.domains:
        table.add_row(
            shown(domain.name),
            shown(domain.group),
            *(
                f"{pages:,}"
                for pages in (
                    domain.total_pages,
                    domain.zero_pages,
                    domain.shared_pages,
                    domain.intra_pages,
                    domain.unique_pages,
                    sum(domain.dropped.values()),
                )
            ),
        )
    return table


def _pair_table(report: SharingReport) -> Table:
    table = plain_table("who has how much in common", "contents", "MiB", "pages that hold them")
    pairs = sorted(report.pairs, key=lambda pair: -pair.contents)
    for pair in pairs[:_PAIRS_SHOWN]:
        table.add_row(shown(" + ".join(pair.names)), f"{pair.contents:,}", mib(pair.contents), f"{pair.pages:,}")
    if len(pairs) > _PAIRS_SHOWN:
        table.caption = f"and {len(pairs) - _PAIRS_SHOWN} pairs more: --json has them all"
    return table


def exit_with(report: SharingReport) -> None:
    """Leave with exit code 1 when the audit found something."""
    if report.audit_findings:
        raise click.exceptions.Exit(1)
