"""The HTML report itself; needs the libraries of the extra ``report`` (memshr.render.html does without, until it runs).

The page loads nothing, from nowhere: its content security policy forbids it, and allows no style and no script but its
own two. It is complete without JavaScript, which only makes tooltips quicker. Every figure of the estimate that it
shows is a ``<data>`` element whose ``data-figure`` is the path of the figure in the JSON, and whose ``value`` is its
value there.
"""

from __future__ import annotations

import base64
import hashlib
import importlib.resources
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jinja2
from markupsafe import Markup

from memshr.estimation.result import CopiesBand, DomainEstimate, Estimate
from memshr.render import html_charts
from memshr.render.html_charts import Bar, Cell, Segment
from memshr.render.wording import Unit, percent, printable
from memshr.types import PAGE_SIZE

MATRIX_DOMAINS = 48
"""Domains that the matrix shows: those with the most in common. The CSV has all."""

BARS_SHOWN = 60
"""Domains that have a bar: the largest. The table has all."""

PAIRS_SHOWN = 12
WIDTHS = {"wide": 920, "narrow": 340}
"""Each plot of bars is drawn for a screen and for a telephone; the style shows one of them."""


# Read now, since a process that was root may not be able to when the page is made (``privilege``).
_TEMPLATES = {
    name: importlib.resources.files("memshr.render").joinpath("templates", name).read_text("utf-8")
    for name in ("estimate.html", "estimate.css", "estimate.js")
}


def load_libraries() -> None:
    """Draw a plot of nothing: Altair looks for its plugins, and Vega is loaded, when there is something to draw."""
    html_charts.bars([Bar("", (Segment("zero", 1.0, ""),))], unit="", title="", width=WIDTHS["narrow"])


def page(estimate: Estimate) -> str:
    """The text of the page."""
    templates = jinja2.Environment(
        loader=jinja2.DictLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    style = html_charts.palette_style() + "\n" + templates.get_template("estimate.css").render()
    script = templates.get_template("estimate.js").render()
    figures = _Figures(estimate)
    parts = _parts(estimate)
    shown = _matrix_domains(estimate)
    matrix_unit = Unit.of(max((pair.contents for pair in estimate.pairs), default=0) // 10)
    most_copies = max((i for i, band in enumerate(estimate.copies) if band.contents), default=-1)
    copies = estimate.copies[: most_copies + 1]
    copies_unit = Unit.of(max((band.saved_pages for band in estimate.copies), default=0))
    several = len(estimate.domains) > 1
    template = templates.get_template("estimate.html")
    return template.render(
        estimate=estimate,
        figures=figures,
        parts=parts,
        copies=copies,
        bars_shown=BARS_SHOWN,
        domain_key=_domain_key(estimate),
        palette=html_charts.PALETTE,
        style=Markup(style),  # these two are files of ours
        script=Markup(script),
        style_hash=_hash(style),
        script_hash=_hash(script),
        whole_plots=_plots([_whole_bar(parts)], "Where the memory is", figures.unit, axis=False),
        domain_plots=_plots(_domain_bars(estimate, figures.unit), "Pages of each domain", figures.unit),
        copies_plots=_plots(_copies_bars(copies, copies_unit), "What contents save, by their copies", copies_unit),
        matrix_plot=_matrix_plot(estimate, shown, matrix_unit) if several else "",
        matrix_unit=matrix_unit.name,
        matrix_domains=len(shown),
        cells_numbered=len(shown) <= html_charts.NUMBERED_CELLS,
        pairs=sorted(enumerate(estimate.pairs), key=lambda pair: -pair[1].contents)[:PAIRS_SHOWN],
        sharing_groups=[group for group in estimate.groups if len(group.domids) > 1],
        names={domain.domid: printable(domain.name) for domain in estimate.domains},
        printable=printable,
        percent=percent,
        several=several,
        numbered=len(shown) > html_charts.NAMED_COLUMNS,
    )


class _Figures:
    """The figures of an estimate by their path in its JSON, as text and as marked elements of the page."""

    def __init__(self, estimate: Estimate) -> None:
        self._plain = estimate.to_dict()
        # Columns that are compared with each other have one unit.
        self.unit = Unit.of(estimate.total_pages // 10)

    def size(self, path: str) -> Markup:
        """Pages in the unit that suits them."""
        return self._marked(path, Unit.of(self.value(path)).text(self.value(path)))

    def column(self, path: str) -> Markup:
        """Pages in ``unit``, for a table."""
        return self._marked(path, self.unit.number(self.value(path)))

    def number(self, path: str) -> Markup:
        """A plain number."""
        return self._marked(path, f"{self.value(path):,}")

    @staticmethod
    def plain(pages: int) -> str:
        """Pages that are no figure of the JSON but made of some, in the unit that suits them."""
        return Unit.of(pages).text(pages)

    def has(self, key: str) -> bool:
        """Whether the estimate itself has a figure of this name."""
        return isinstance(self._plain.get(key), int)

    def value(self, path: str) -> int:
        """The figure at this path of the JSON."""
        value: Any = self._plain
        for key in path.split("."):
            value = value[int(key)] if isinstance(value, list) else value[key]
        assert isinstance(value, int)
        return value

    def _marked(self, path: str, text: str) -> Markup:
        return Markup('<data data-figure="{}" value="{}">{}</data>').format(path, self.value(path), text)


@dataclass(frozen=True, slots=True)
class _Part:
    """One part of all memory: its colour, its name, its path in the JSON if it is a figure there, and what it means."""

    colour: str
    name: str
    path: str | None
    pages: int
    saves: bool
    meaning: str


def _parts(estimate: Estimate) -> list[_Part]:
    kept = max(estimate.shared_pages - estimate.intra_pages - estimate.inter_pages, 0)
    dropped = estimate.dropped.get("volatile", 0) + estimate.dropped.get("not_sharable", 0)
    parts = [
        _Part(
            "zero",
            "Pages of zeros",
            "zero_pages",
            estimate.zero_pages,
            True,
            "Nothing but zeros: they need no memory at all until somebody writes to them.",
        ),
        _Part(
            "intra",
            "Equal inside a domain",
            "intra_pages",
            estimate.intra_pages,
            True,
            "Further copies of a page that the same domain already has.",
        ),
        _Part(
            "inter",
            "Equal between domains",
            "inter_pages",
            estimate.inter_pages,
            True,
            "Further copies of a page that another domain of the same trust group has.",
        ),
        _Part("kept", "Kept for sharing", None, kept, False, "The one copy of each shared page that all others read."),
        _Part("unique", "Unique", "unique_pages", estimate.unique_pages, False, "No other page has these contents."),
        _Part(
            "absent",
            "Never used",
            "absent_pages",
            estimate.absent_pages,
            False,
            "The host has not backed them with memory: they cost nothing, so they save nothing.",
        ),
        _Part(
            "dropped",
            "Left out",
            None,
            dropped,
            False,
            "Changed while being looked at, or could not be read; in no other figure.",
        ),
    ]
    always = {"zero", "intra", "unique"} | ({"inter"} if len(estimate.domains) > 1 else set())
    return [part for part in parts if part.pages or part.colour in always]


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def _plots(rows: Sequence[Bar], title: str, unit: Unit, *, axis: bool = True) -> dict[str, Markup]:
    if not any(segment.value for row in rows for segment in row.segments):
        return {}
    return {
        kind: Markup(html_charts.bars(rows, unit=unit.name, title=title, width=width, axis=axis))
        for kind, width in WIDTHS.items()
    }


def _whole_bar(parts: Sequence[_Part]) -> Bar:
    return Bar(
        "",
        tuple(Segment(part.colour, float(part.pages), f"{part.name}: {_Figures.plain(part.pages)}") for part in parts),
    )


def _domain_parts(domain: DomainEstimate) -> tuple[tuple[str, str, int], ...]:
    # Colour, what it is, pages.
    return (
        ("zero", "zeros", domain.zero_pages),
        ("shared", "shared", domain.shared_pages),
        ("unique", "unique", domain.unique_pages),
        ("dropped", "left out", sum(domain.dropped.values())),
        ("absent", "never used", domain.absent_pages),
    )


def _domain_key(estimate: Estimate) -> list[tuple[str, str]]:
    # What the bars of the domains are made of, in the order of the bars.
    columns = zip(*map(_domain_parts, estimate.domains), strict=True)
    return [column[0][:2] for column in columns if any(pages for _, _, pages in column)]


def _domain_bars(estimate: Estimate, unit: Unit) -> list[Bar]:
    scale = PAGE_SIZE / unit.size_bytes
    rows = []
    largest = sorted(estimate.domains, key=lambda domain: -domain.total_pages)[:BARS_SHOWN]
    shown = {domain.domid for domain in largest}
    for domain in estimate.domains:
        if domain.domid not in shown:
            continue
        name = printable(domain.name)
        segments = tuple(
            Segment(colour, pages * scale, f"{name}\n{what}: {_Figures.plain(pages)}, {pages:,} pages")
            for colour, what, pages in _domain_parts(domain)
        )
        rows.append(Bar(name, segments, unit.text(domain.total_pages)))
    return rows


def _copies_bars(bands: Sequence[CopiesBand], unit: Unit) -> list[Bar]:
    scale = PAGE_SIZE / unit.size_bytes
    rows = []
    for band in bands:
        copies = f"{band.copies_from:,}"
        if band.copies_to is None:
            copies += " or more"
        elif band.copies_to != band.copies_from:
            copies += f" to {band.copies_to:,}"
        tip = f"{band.contents:,} contents in {copies} copies\nsave {_Figures.plain(band.saved_pages)}"
        rows.append(Bar(copies, (Segment("inter", band.saved_pages * scale, tip),), unit.text(band.saved_pages)))
    return rows


def _matrix_domains(estimate: Estimate) -> list[DomainEstimate]:
    common = {domain.domid: 0 for domain in estimate.domains}
    for pair in estimate.pairs:
        for domid in pair.domids:
            common[domid] += pair.contents
    best = sorted(estimate.domains, key=lambda domain: -common[domain.domid])[:MATRIX_DOMAINS]
    # Groups stay together, in the order in which their first domain was given.
    rank: dict[str, int] = {}
    for domain in estimate.domains:
        rank.setdefault(domain.group, len(rank))
    place = {domain.domid: i for i, domain in enumerate(estimate.domains)}
    return sorted(best, key=lambda domain: (rank[domain.group], place[domain.domid]))


def _matrix_plot(estimate: Estimate, shown: Sequence[DomainEstimate], unit: Unit) -> Markup:
    pairs = {frozenset(pair.domids): pair for pair in estimate.pairs}
    group_of = {domid: number for number, group in enumerate(estimate.groups) for domid in group.domids}
    most_pair = max((pair.contents for pair in estimate.pairs), default=0) or 1
    most_inside = max((domain.intra_pages for domain in shown), default=0) or 1
    cells: list[Cell] = []
    for row, one in enumerate(shown):
        for column, other in enumerate(shown[: row + 1]):
            if one is other:
                kind, pages, most = "inside", one.intra_pages, most_inside
                tip = f"{printable(one.name)}\nsaves inside itself: {_Figures.plain(pages)}"
            else:
                pair = pairs.get(frozenset((one.domid, other.domid)))
                pages, most = pair.contents if pair else 0, most_pair
                kind = "heat" if group_of[one.domid] == group_of[other.domid] else "barred"
                verb = "save together" if kind == "heat" else "not allowed: different groups; would save together"
                tip = f"{printable(other.name)} and {printable(one.name)}\n{verb}: {_Figures.plain(pages)}"
            cells.append(Cell(row, column, kind, pages / most, unit.number(pages) if pages else "0", tip))
    return Markup(  # an SVG of plots only, see html_charts
        html_charts.matrix(
            [printable(domain.name) for domain in shown],
            [domain.domid for domain in shown],
            cells,
            title=f"What each two domains save together, in {unit.name}",
        )
    )
