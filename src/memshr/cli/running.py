"""Running a sharing session for a command: its progress on a terminal, and its report as text."""

from __future__ import annotations

import secrets
import signal
import sys
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TaskProgressColumn, TextColumn, TimeRemainingColumn

from memshr.content.fingerprint import SEED_BITS
from memshr.hypervisor import Hypervisor
from memshr.render.wording import printable
from memshr.sharing.result import SharingReport
from memshr.sharing.session import SharingOptions, SharingProgress, share
from memshr.trust import trust_groups
from memshr.types import DomId

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
def _session_progress() -> Iterator[Callable[[SharingProgress], None]]:
    with progress_bar() as bar:
        tasks: dict[tuple[str, str], TaskID] = {}

        def show(progress: SharingProgress) -> None:
            key = progress.group, progress.phase
            if key not in tasks:
                tasks[key] = bar.add_task(printable(f"{progress.phase} {progress.group}"), total=progress.total_pages)
            bar.update(tasks[key], completed=progress.done_pages)

        yield show


def say(line: str) -> None:
    """Tell the user something that is no result: on standard error."""
    print(f"memshr: {printable(line)}", file=sys.stderr)


def exit_with(report: SharingReport) -> None:
    """Leave with exit code 1 when the audit found something."""
    if report.audit_findings:
        raise click.exceptions.Exit(1)
