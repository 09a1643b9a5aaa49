"""The result of a sharing session as text for a person."""

from __future__ import annotations

from rich.table import Table

from memshr.render.console import plain_table, result_console, shown
from memshr.render.wording import mib
from memshr.sharing.result import REASONS_TO_DROP, REASONS_TO_KEEP, SharingReport

_PAIRS_SHOWN = 20


def print_report(report: SharingReport, *, verb: str) -> None:
    """Print a session's report for a person. ``verb``: what the saving is, such as "can be saved"."""
    console = result_console()
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
