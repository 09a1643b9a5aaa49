"""What changed between two estimates, as text for a person."""

from __future__ import annotations

from collections.abc import Iterable

from rich import box
from rich.table import Table

from memshr.render.console import result_console, shown
from memshr.render.difference import Change, Difference
from memshr.render.wording import Unit

_PAIRS_SHOWN = 20

_TOTALS = {
    "saved_pages": "can be saved",
    "achievable_pages": "  of it within the limits of a host",
    "zero_pages": "  pages of zeros",
    "intra_pages": "  equal inside a domain",
    "inter_pages": "  equal between domains of a group",
    "between_groups_pages": "not allowed: between groups",
    "unique_pages": "unique",
    "absent_pages": "never backed by the host",
    "total_pages": "looked at",
}


def print_difference(difference: Difference) -> None:
    """Print a difference."""
    console = result_console()
    totals = difference.totals
    saved = totals["saved_pages"]
    unit = Unit.of(max(totals["total_pages"].before, totals["total_pages"].after) // 10)
    if saved.difference:
        direction = "more" if saved.difference > 0 else "less"
        size = abs(saved.difference)
        console.print(f"[bold]{Unit.of(size).text(size)} {direction} can be saved[/bold]: {_from_to(saved)}.")
    else:
        console.print(f"[bold]The saving is the same[/bold]: {Unit.of(saved.after).text(saved.after)}.")
    table = _table(f"totals, {unit.name}")
    for name, words in _TOTALS.items():
        if name in totals:
            table.add_row(words, *_columns(totals[name], unit))
    console.print(table)
    if difference.domains:
        console.print(_domain_table(difference, unit))
    for words, names in (("new", difference.new), ("gone", difference.gone)):
        if names:
            console.print(f"{words}: {_names(names)}", soft_wrap=True)
    if difference.pairs:
        console.print(_pair_table(difference))
    for remark in difference.remarks:
        console.print(f"Note: {shown(remark)}.", soft_wrap=True)


def _from_to(change: Change) -> str:
    before, after = (Unit.of(pages).text(pages) for pages in (change.before, change.after))
    return f"{before} before, {after} now"


def _names(names: Iterable[str]) -> str:
    return ", ".join(shown(name) for name in names)


def _table(*heads: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(heads[0], overflow="fold")
    for head in (*heads[1:], "before", "now", "change"):
        table.add_column(head, justify="right", no_wrap=True)
    return table


def _columns(change: Change, unit: Unit) -> tuple[str, str, str]:
    return unit.number(change.before), unit.number(change.after), _signed(change, unit)


def _signed(change: Change, unit: Unit) -> str:
    if not change.difference:
        return "="
    return f"{'+' if change.difference > 0 else '-'}{unit.number(abs(change.difference))}"


def _domain_table(difference: Difference, unit: Unit) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(f"change of each domain, {unit.name}", overflow="fold")
    table.add_column("group", overflow="fold")
    names = ("total_pages", "zero_pages", "shared_pages", "intra_pages", "unique_pages")
    for head in ("size", "zero", "shared", "saved inside", "unique"):
        table.add_column(head, justify="right", no_wrap=True)
    for domain in difference.domains:
        was, now = (shown(group) for group in domain.groups)
        table.add_row(
            shown(domain.name),
            now if was == now else f"{was} -> {now}",
            *(_signed(domain.figures[name], unit) for name in names),
        )
    return table


def _pair_table(difference: Difference) -> Table:
    pairs = difference.pairs[:_PAIRS_SHOWN]
    unit = Unit.of(max(max(pair.contents.before, pair.contents.after) for pair in pairs) // 10)
    table = _table(f"save together, {unit.name}", "may share")
    for pair in pairs:
        may = ["no" if group is None else "yes" for group in pair.groups]
        table.add_row(
            " + ".join(shown(name) for name in pair.names),
            may[1] if may[0] == may[1] else f"{may[0]} -> {may[1]}",
            *_columns(pair.contents, unit),
        )
    if len(difference.pairs) > len(pairs):
        table.caption = f"and {len(difference.pairs) - len(pairs)} pairs more: --json has them all"
    return table
