"""The plots of the HTML report: static SVG, made by Altair and Vega, that takes its colours from the page's style.

A plot is drawn in the colours of PALETTE. The style of the page has a rule for each of them, ``[fill="#2a9d8f"]``, so
that one plot serves light, dark and paper. Every mark carries its figures as ``<title>``, which browsers show as a
tooltip without JavaScript.
"""

from __future__ import annotations

import json
import re
import xml.etree.ElementTree as ET
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unicodedata import east_asian_width

import altair as alt
import vl_convert

SVG = "http://www.w3.org/2000/svg"
_MORE_DIGITS = re.compile(r"(\d\.\d\d)\d+")
_ELEMENTS = {"svg", "g", "path", "text", "line", "rect", "title"}

PALETTE = {
    "zero": "#86cdbf",
    "intra": "#2a9d8f",
    "inter": "#1f6fa8",
    "shared": "#2b8c90",
    "kept": "#9fb3c8",
    "unique": "#bfc9d5",
    "absent": "#e9edf2",
    "dropped": "#e2a33b",
    "heat": "#1f6fa9",
    "inside": "#178a7b",
    "barred": "#e3e6eb",
    "ink": "#1d2530",
    "soft": "#5b6775",
    "line": "#dde2e8",
}
"""What a colour stands for -> the colour in light. Each is used once, as the style finds the marks by it."""

DARK = {
    "zero": "#4f9487",
    "intra": "#35b5a4",
    "inter": "#4f9fdc",
    "shared": "#36a5a0",
    "kept": "#65788d",
    "unique": "#465462",
    "absent": "#242c35",
    "dropped": "#c98f35",
    "heat": "#4f9fdc",
    "inside": "#35b5a4",
    "barred": "#2a323c",
    "ink": "#e6eaef",
    "soft": "#9aa7b4",
    "line": "#2c3540",
}
"""The same in dark."""

NAME_LETTERS = 24
"""Letters of a domain's name that a plot shows; tooltips and tables have the whole of it."""

NAMED_COLUMNS = 6
"""With more domains than this the columns of the matrix have domids instead of names."""

NUMBERED_CELLS = 14
"""With more domains than this the fields of the matrix have their figures in tooltips only."""


@dataclass(frozen=True, slots=True)
class Segment:
    """A part of a bar: what it is (a key of PALETTE), how long, and its tooltip."""

    part: str
    value: float
    tooltip: str


@dataclass(frozen=True, slots=True)
class Bar:
    """One bar of segments; ``note`` is written behind its end."""

    label: str
    segments: tuple[Segment, ...]
    note: str = ""


@dataclass(frozen=True, slots=True)
class Cell:
    """One field of the matrix. ``kind`` is ``heat`` (may share), ``inside`` (one domain) or ``barred`` (may not)."""

    row: int
    column: int
    kind: str
    strength: float
    text: str
    tooltip: str


def shortened(name: str, letters: int = NAME_LETTERS) -> str:
    """A name that fits: the middle of a long one is left out, as names of guests differ at their ends."""
    if len(name) <= letters:
        return name
    head = (letters - 1) // 2
    return f"{name[:head]}…{name[len(name) - (letters - 1 - head) :]}"


def palette_style() -> str:
    """The style rules that give plots, and ``var(--zero)`` and the like, the colours of PALETTE or of DARK."""

    def variables(colours: Mapping[str, str]) -> str:
        return ":root{" + "".join(f"--{part}:{colour};" for part, colour in colours.items()) + "}"

    rules = [variables(PALETTE), f"@media screen and (prefers-color-scheme:dark){{{variables(DARK)}}}"]
    for part, colour in PALETTE.items():
        rules.append(f'svg [fill="{colour}"]{{fill:var(--{part})}}')
    rules.append(f'svg [stroke="{PALETTE["line"]}"]{{stroke:var(--line)}}')
    rules.append(f'svg [fill="{PALETTE["barred"]}"]{{fill:url(#barred)}}')
    rules.append(f'svg [fill="{PALETTE["absent"]}"]{{stroke:var(--line)}}')
    return "\n".join(rules)


def text_px(text: str) -> int:
    """Room for a text of 12 px, in a font as wide as DejaVu Sans: the browser's own is not known here."""
    return round(sum(12.5 if letter in "WMm@%…" or east_asian_width(letter) in "WF" else 7.5 for letter in text))


def bars(rows: Sequence[Bar], *, unit: str, title: str, width: int, axis: bool = True) -> str:
    """Stacked bars below each other, as SVG.

    :param unit: what the values are in, written at the axis.
    :param width: of the whole plot, in pixels.
    """
    longest = max((sum(segment.value for segment in row.segments) for row in rows), default=0.0) or 1.0
    labels = [shortened(row.label, NAME_LETTERS if width > 500 else 14) for row in rows]
    left = 12 + max(map(text_px, labels)) if any(labels) else 1
    right = 8 + max(text_px(row.note) for row in rows) if axis else 1
    step, thickness = (34, 20) if len(rows) <= 12 else (22, 14)
    inner = max(width - left - right, 80)
    marks, notes, names = [], [], []
    for i, (row, label) in enumerate(zip(rows, labels, strict=True)):
        end = 0.0
        for segment in row.segments:
            if segment.value > 0:
                marks.append(
                    {"row": i, "from": end, "to": end + segment.value, "part": segment.part, "tip": segment.tooltip}
                )
                end += segment.value
        notes.append({"row": i, "at": end, "text": row.note})
        names.append({"row": i, "text": label, "at": 0})
    y = alt.Y("row:O", axis=None, scale=alt.Scale(domain=list(range(len(rows)))))
    x_axis = (
        alt.Axis(
            title=None,
            tickCount=5 if width > 500 else 3,
            grid=True,
            gridColor=PALETTE["line"],
            domain=False,
            ticks=False,
            labelPadding=6,
            labelExpr=f"datum.label + ' {unit}'",
        )
        if axis
        else None
    )
    scale = alt.Scale(domain=[0, longest], nice=False)
    plot = (
        alt.Chart(_data(marks))
        .mark_bar(height=thickness, stroke="none")
        .encode(
            y=y,
            x=alt.X("from:Q", scale=scale, axis=x_axis),
            x2="to:Q",
            color=_colours(),
            description="tip:N",
        )
    )
    said = (
        alt.Chart(_data(notes))
        .mark_text(align="left", baseline="middle", dx=7, fontSize=12, color=PALETTE["ink"], aria=False)
        .encode(y=y, x=alt.X("at:Q", scale=scale), text="text:N")
    )
    named = (
        alt.Chart(_data(names))
        .mark_text(align="right", baseline="middle", dx=-9, fontSize=12, color=PALETTE["ink"], aria=False)
        .encode(y=y, x=alt.X("at:Q", scale=scale), text="text:N")
    )
    chart = alt.layer(plot, said, named).properties(width=inner, height=step * len(rows))
    return _svg(chart, title, padding={"left": left, "right": right, "top": 1, "bottom": 26 if axis else 1})


def matrix(names: Sequence[str], domids: Sequence[int], cells: Sequence[Cell], *, title: str) -> str:
    """The heat map of the lower triangle, as SVG: row and column ``i`` are the domain ``names[i]``."""
    count = len(names)
    few = count <= NAMED_COLUMNS
    cell_width, cell_height = (108, 44) if few else (58, 30) if count <= NUMBERED_CELLS else (20, 20)
    rows = [
        f"{shortened(name)}" if few else f"{shortened(name)}  {domid}"
        for name, domid in zip(names, domids, strict=True)
    ]
    columns = [shortened(name, 15) if few else str(domid) for name, domid in zip(names, domids, strict=True)]
    left = 12 + max(map(text_px, rows))
    bottom = 24 if count <= NUMBERED_CELLS else 12 + 7 * max(map(len, columns))
    at_row = alt.Y("row:O", axis=None, scale=alt.Scale(domain=list(range(count)), paddingInner=0.06))
    at_column = alt.X("column:O", axis=None, scale=alt.Scale(domain=list(range(count)), paddingInner=0.06))
    places = [
        {
            "row": cell.row,
            "column": cell.column,
            "part": cell.kind,
            "opacity": 1.0 if cell.kind == "barred" else round(0.08 + 0.62 * cell.strength, 2),
            "text": cell.text,
            "tip": cell.tooltip,
        }
        for cell in cells
    ]
    fields = (
        alt.Chart(_data(places))
        .mark_rect(stroke="none")
        .encode(
            y=at_row,
            x=at_column,
            color=_colours(),
            fillOpacity=alt.FillOpacity("opacity:Q", scale=None),
            description="tip:N",
        )
    )
    layers = [fields]
    if count <= NUMBERED_CELLS:
        layers.append(
            alt.Chart(_data(places))
            .mark_text(fontSize=13 if few else 11, color=PALETTE["ink"], aria=False)
            .encode(y=at_row, x=at_column, text="text:N")
        )
    edge: dict[str, Any] = {"fontSize": 12 if count <= NUMBERED_CELLS else 11, "color": PALETTE["ink"], "aria": False}
    layers.append(
        alt.Chart(_data([{"row": i, "text": text} for i, text in enumerate(rows)]))
        .mark_text(align="right", baseline="middle", dx=-9, **edge)
        .encode(y=at_row, x=alt.value(0), text="text:N")
    )
    turn: dict[str, Any] = (
        {"align": "center", "baseline": "top", "dy": 8}
        if count <= NUMBERED_CELLS
        else {"align": "right", "baseline": "middle", "angle": 270, "dx": -7}
    )
    layers.append(
        alt.Chart(_data([{"column": i, "text": text} for i, text in enumerate(columns)]))
        .mark_text(**turn, **edge)
        .encode(x=at_column, y=alt.value(cell_height * count), text="text:N")
    )
    chart = alt.layer(*layers).properties(width=cell_width * count, height=cell_height * count)
    return _svg(chart, title, padding={"left": left, "right": 2, "top": 2, "bottom": bottom}, scaled=False)


def _data(rows: list[dict[str, Any]]) -> alt.InlineData:
    return alt.InlineData(values=rows)


def _colours() -> alt.Color:
    return alt.Color("part:N", scale=alt.Scale(domain=list(PALETTE), range=list(PALETTE.values())), legend=None)


def _svg(chart: alt.LayerChart | alt.FacetChart, title: str, *, padding: dict[str, int], scaled: bool = True) -> str:
    spec = chart.properties(padding=padding, autosize=alt.AutoSizeParams(type="none")).configure(
        background="transparent",
        font="sans-serif",
        axis=alt.AxisConfig(
            labelColor=PALETTE["soft"],
            labelFontSize=12,
        ),
        view=alt.ViewConfig(stroke="transparent"),
    )
    return _page_svg(
        vl_convert.vegalite_to_svg(json.dumps(spec.to_dict(validate=False)), allowed_base_urls=[]), title, scaled
    )


def _page_svg(text: str, title: str, scaled: bool) -> str:
    # Only what a plot of ours needs comes into the page, whatever the names of domains are.
    ET.register_namespace("", SVG)
    root = ET.fromstring(text)
    width, height = float(root.attrib["width"]), float(root.attrib["height"])
    root.attrib.clear()
    root.set("viewBox", f"0 0 {width:g} {height:g}")
    root.set("role", "img")
    root.set("aria-label", title)
    if not scaled:
        root.set("width", f"{width:g}")
        root.set("height", f"{height:g}")
    for parent in list(root.iter()):
        for element in list(parent):
            if element.tag.removeprefix(f"{{{SVG}}}") not in _ELEMENTS or _draws_nothing(element):
                parent.remove(element)
    for element in list(root.iter())[1:]:
        label = element.get("aria-label")
        for attribute in [
            name for name in element.attrib if name.startswith(("aria-", "role", "class", "font-family"))
        ]:
            del element.attrib[attribute]
        for attribute in ("d", "transform"):
            if attribute in element.attrib:
                element.set(attribute, _MORE_DIGITS.sub(r"\1", element.attrib[attribute]))
        if label and element.tag == f"{{{SVG}}}path":
            ET.SubElement(element, f"{{{SVG}}}title").text = label
    return ET.tostring(root, encoding="unicode")


def _draws_nothing(element: ET.Element) -> bool:
    if element.tag == f"{{{SVG}}}text":
        return not element.text and not len(element)
    return element.get("class") in ("background", "foreground") or element.get("fill") == "transparent"
