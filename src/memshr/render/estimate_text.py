"""An estimate as text for a person: the headline, where the saving is, and what stands in its way."""

from __future__ import annotations

from collections.abc import Mapping

from rich.console import Console
from rich.table import Table

from memshr.estimation.result import Achievable, Bounds, Estimate, Sample
from memshr.render.console import plain_table, result_console, shown
from memshr.render.wording import mib

_CONTENTS_SHOWN = 8
_PAIRS_SHOWN = 10


def print_estimate(estimate: Estimate, *, grouped: bool) -> None:
    """Print an estimate.

    :param grouped: whether trust groups were asked for; if not, the text says that there is such a thing.
    """
    console = result_console()
    about = "" if estimate.method.exact else "about "
    share_of = estimate.saved_pages / estimate.total_pages if estimate.total_pages else 0.0
    if estimate.bounds is not None and estimate.method.sample is not None:
        _print_bounds(console, estimate, estimate.method.sample, estimate.bounds)
    else:
        console.print(
            f"[bold]{about}{mib(estimate.saved_pages)} MiB can be saved[/bold]: {about}{estimate.saved_pages:,} of"
            f" {estimate.total_pages:,} pages ({share_of:.0%})"
        )
    console.print(_breakdown(estimate))
    console.print(_domains(estimate))
    if estimate.pairs:
        console.print(_pairs(estimate))
    if estimate.contents:
        console.print(_contents(estimate))
    if estimate.achievable is not None:
        _print_limits(console, estimate, estimate.achievable)
    if estimate.between_groups_pages:
        console.print(f"One trust group of all would save {mib(estimate.between_groups_pages)} MiB more.")
    if len(estimate.domains) > 1 and not grouped:
        console.print("Each domain shares within itself only; try --group all to see what one trust group would save.")


def _print_bounds(console: Console, estimate: Estimate, sample: Sample, bounds: Mapping[str, Bounds]) -> None:
    saved, zero = bounds["saved_pages"], bounds["zero_pages"]
    total = max(1, estimate.total_pages)
    console.print(
        f"[bold]Between {mib(saved.low)} and {mib(saved.high)} MiB can be saved[/bold]: {saved.low / total:.0%} to"
        f" {saved.high / total:.0%} of {estimate.total_pages:,} pages"
    )
    console.print(
        f"That is estimated from {sample.pages_read:,} pages, {sample.rate} of those with contents, drawn with seed"
        f" {sample.seed}, with a confidence of {sample.confidence:.0%}. Between {mib(zero.low)} and {mib(zero.high)}"
        " MiB of it are zero pages. A sample hardly sees pages that exist only a few times (docs/report.md)."
    )
    console.print("The figures below are guesses between these bounds.")


def _print_limits(console: Console, estimate: Estimate, achievable: Achievable) -> None:
    console.print(
        f"On a running host: {mib(achievable.saved_pages)} MiB with {achievable.mappings:,} mappings (at most"
        f" {estimate.method.mappings_per_domain:,} a domain); {mib(achievable.huge_pages_only)} MiB without splitting"
        f" huge pages{'' if achievable.huge_pages_known else ', if all memory were huge pages'}."
    )


def _breakdown(estimate: Estimate) -> Table:
    table = plain_table("where the saving is", "pages", "MiB")
    rows = [
        ("zero pages, given back without a frame", estimate.zero_pages),
        ("  of these in holes of the file: backed on the host or not, nobody can tell", estimate.hole_pages),
        ("equal pages inside one domain", estimate.intra_pages),
        ("equal pages between domains of a group", estimate.inter_pages),
        ("(frames kept by --max-sharers)", estimate.dropped["max_sharers"]),
        ("(never backed by the host: no saving)", estimate.absent_pages),
        ("(volatile: changed while looked at)", estimate.dropped["volatile"]),
        ("(could not be read)", estimate.dropped["not_sharable"]),
    ]
    for name, pages in rows:
        if pages or name[0] not in " (":
            table.add_row(name, f"{pages:,}", mib(pages))
    return table


def _domains(estimate: Estimate) -> Table:
    table = plain_table("domain", "group", "pages", "zero", "shared", "saved inside", "unique", "absent", "left out")
    for domain in estimate.domains:
        figures = (
            domain.total_pages,
            domain.zero_pages,
            domain.shared_pages,
            domain.intra_pages,
            domain.unique_pages,
            domain.absent_pages,
            sum(domain.dropped.values()),
        )
        table.add_row(shown(domain.name), shown(domain.group), *(f"{pages:,}" for pages in figures))
    return table


def _pairs(estimate: Estimate) -> Table:
    table = plain_table("who has how much in common", "contents", "MiB", "pages that hold them", "may share")
    pairs = sorted(estimate.pairs, key=lambda pair: -pair.contents)
    for pair in pairs[:_PAIRS_SHOWN]:
        table.add_row(
            shown(" + ".join(pair.names)),
            f"{pair.contents:,}",
            mib(pair.contents),
            f"{pair.pages:,}",
            "no" if pair.group is None else "yes",
        )
    if len(pairs) > _PAIRS_SHOWN:
        table.caption = f"and {len(pairs) - _PAIRS_SHOWN} pairs more: --json has them all"
    return table


def _contents(estimate: Estimate) -> Table:
    table = plain_table("contents that save most", "copies", "domains", "MiB saved")
    for content in estimate.contents[:_CONTENTS_SHOWN]:
        first = f"domain {content.first.domid}, gfn {content.first.gfn:#x}"
        table.add_row(
            shown(f"{content.guess} ({first})") if content.guess else first,
            f"{content.copies:,}",
            f"{content.domains:,}",
            mib(content.saved_pages),
        )
    return table
