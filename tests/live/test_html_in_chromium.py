"""The HTML report in a real browser: what it shows in every medium, and that it asks for nothing and runs nothing."""

import dataclasses
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import Browser, Page, sync_playwright

from estimates import ABSENT, HOLE, VOLATILE, ZERO, counted
from guests.kit import MissingPartError
from live.parts import needed_parts
from memshr.estimation.result import Bounds, Estimate, Sample
from memshr.render.html import write_html

CHROMIUM = Path("/usr/bin/chromium")
UNITS = {"KiB": 1 << 10, "MiB": 1 << 20, "GiB": 1 << 30}
HOSTILE = '<script>window.hacked=1</script><img src=x onerror="window.hacked=1">\''
WIDTHS = (400, 700, 1280)

COMMON = [ABSENT] * 40 + [VOLATILE] * 9 + [HOLE] * 300 + [ZERO] * 500 + [1] * 90 + [2] * 5 + list(range(3, 700))
SOME = counted(
    {
        "web-frontend-01": [*COMMON, *range(10_000, 11_000)],
        "web-frontend-02": [*COMMON, *range(20_000, 20_700)],
        "postgres-primary.example.org": [*COMMON[:900], *range(30_000, 33_000)],
        HOSTILE: [ZERO, 1, 3, 4, 5, 40_000, 40_001],
    },
    {"web": ["web-frontend-01", "web-frontend-02"], "data": ["postgres-primary.example.org", HOSTILE]},
)
MANY = counted({f"guest-{number:02}-{'x' * number}": [*COMMON[:-number], 50_000 + number] for number in range(1, 41)})
SAMPLED = dataclasses.replace(
    SOME,
    method=dataclasses.replace(SOME.method, exact=False, sample=Sample("1/64", 7, 90, 0.95), samples_s=2.0),
    bounds={"saved_pages": Bounds(SOME.saved_pages - 100, SOME.saved_pages + 300), "zero_pages": Bounds(2000, 3000)},
    achievable=None,
    pairs=(),
    copies=(),
    stopped="a guest went away",
)
ESTIMATES = {
    "one": counted({"guest.core": COMMON}),
    "two": counted({"W" * 200: COMMON, "漢字" * 100: COMMON}),
    "some": SOME,
    "ten": counted({f"guest-{number}": COMMON[number:] for number in range(10)}),
    "many": MANY,
    "sampled": SAMPLED,
    "nothing": counted({"a": [1, 2], "b": [3]}, {"a": ["a"], "b": ["b"]}),
}

FIGURES = """elements => elements.map(element => {
    const cell = element.closest('td');
    const heads = element.closest('table')?.querySelectorAll('thead th');
    return {
        path: element.dataset.figure, value: Number(element.value), text: element.textContent,
        head: cell && heads ? heads[cell.cellIndex].innerText : '',
    };
})"""

CLIPPED = """() => [...document.querySelectorAll('.plot svg')].filter(svg => svg.clientWidth > 0).flatMap(svg => {
    const frame = svg.getBoundingClientRect();
    return [...svg.querySelectorAll('text, path')].filter(mark => {
        const box = mark.getBoundingClientRect();
        return box.left < frame.left - 1.5 || box.right > frame.right + 1.5
            || box.top < frame.top - 1.5 || box.bottom > frame.bottom + 1.5;
    }).map(mark => mark.textContent);
})"""

# WCAG 2.1, "relative luminance" and "contrast ratio".
CONTRASTS = """() => {
    const parts = colour => colour.match(/[\\d.]+/g).slice(0, 3).map(Number);
    const light = colour => parts(colour).map(part => part / 255)
        .map(part => part <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
        .reduce((sum, part, i) => sum + part * [0.2126, 0.7152, 0.0722][i], 0);
    const page = light(getComputedStyle(document.body).backgroundColor);
    const texts = document.querySelectorAll('h1, p, td, th, dd, dt, .key span, .plot:not(.fixed) svg text');
    return [...texts].map(element => {
        const style = getComputedStyle(element);
        const own = light(element.ownerSVGElement ? style.fill : style.color);
        return (Math.max(own, page) + 0.05) / (Math.min(own, page) + 0.05);
    });
}"""


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    """Chromium of this machine, without a screen."""
    with needed_parts():
        if not CHROMIUM.exists():
            raise MissingPartError(f"{CHROMIUM} is not installed; apt-get install chromium", "chromium")
    arguments = ["--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"]
    with sync_playwright() as playwright:
        running = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        yield running
        running.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The report of each of ESTIMATES, written to a file."""
    folder = tmp_path_factory.mktemp("reports")
    for name, estimate in ESTIMATES.items():
        write_html(estimate, folder / f"{name}.html")
    return {name: folder / f"{name}.html" for name in ESTIMATES}


class Seen:
    """A report opened in the browser, with everything that it asked for and complained about."""

    def __init__(self, browser: Browser, path: Path, **options: Any) -> None:
        self.context = browser.new_context(**options)
        self.page: Page = self.context.new_page()
        self.requests: list[str] = []
        self.complaints: list[str] = []
        self.page.on("request", lambda request: self.requests.append(request.url))
        self.page.on("console", lambda message: self.complaints.append(message.text))
        self.page.on("pageerror", lambda error: self.complaints.append(str(error)))
        self.page.goto(path.as_uri())

    def __enter__(self) -> "Seen":
        return self

    def __exit__(self, *_: object) -> None:
        self.context.close()


def at(plain: Any, path: str) -> Any:
    """What the JSON has at a path."""
    for key in path.split("."):
        plain = plain[int(key)] if isinstance(plain, list) else plain[key]
    return plain


def says(text: str, head: str, value: int) -> bool:
    """Whether a text, in a column with this head, is this figure: a size in a unit, or the number itself."""
    number, _, unit = text.partition(" ")
    lines = head.splitlines()
    if not unit and lines and lines[-1] in UNITS:
        unit = lines[-1]
    if not unit:
        return text == f"{value:,}"
    size = value * 4096 / UNITS[unit]
    if number.startswith("<"):
        return 0 < size < float(number[1:])
    decimals = len(number.partition(".")[2])
    return bool(abs(float(number.replace(",", "")) - size) <= 0.5001 * 10**-decimals)


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("javascript", [True, False], ids=["javascript", "no-javascript"])
def test_every_number_is_that_of_the_json(
    name: str, javascript: bool, browser: Browser, pages: dict[str, Path]
) -> None:
    estimate = ESTIMATES[name]
    plain = json.loads(json.dumps(estimate.to_dict()))
    with Seen(browser, pages[name], java_script_enabled=javascript) as seen:
        figures = seen.page.locator("data[data-figure]").evaluate_all(FIGURES)
        text = seen.page.inner_text("body")
        assert seen.page.locator(".plot svg:visible").count() >= (2 if name in {"nothing", "sampled"} else 3)
    for figure in figures:
        assert figure["value"] == at(plain, figure["path"]), figure
        assert says(figure["text"], figure["head"], figure["value"]), figure
    wanted = {"saved_pages", "total_pages", "zero_pages", "intra_pages", "unique_pages"}
    wanted |= {"inter_pages"} if len(estimate.domains) > 1 else set()
    wanted |= {"between_groups_pages", "method.pages_read"}
    if estimate.achievable is not None:
        wanted |= {f"achievable.{key}" for key in ("saved_pages", "mappings", "huge_pages_only", "split_huge_pages")}
    for key in estimate.bounds or {}:
        wanted |= {f"bounds.{key}.0", f"bounds.{key}.1"}
    for i in range(len(estimate.domains)):
        wanted |= {f"domains.{i}.{key}_pages" for key in ("total", "zero", "shared", "intra", "unique")}
    wanted |= {f"contents.{i}.saved_pages" for i in range(len(estimate.contents))}
    wanted |= {f"copies.{i}.saved_pages" for i in range(len(estimate.copies))}
    wanted |= {f"pairs.{i}.contents" for i in range(len(estimate.pairs))} if len(estimate.pairs) <= 12 else set()
    assert wanted <= {figure["path"] for figure in figures}
    for domain in estimate.domains:
        assert domain.name in text


def test_plots_show_the_figures_of_the_json(browser: Browser, pages: dict[str, Path]) -> None:
    """The bars are as long as their domains' pages, and the tooltips name them; the matrix has the pairs."""
    with Seen(browser, pages["some"], java_script_enabled=False) as seen:
        tips = seen.page.locator(".wide svg path").evaluate_all(
            "marks => marks.map(mark => [mark.textContent, mark.getBoundingClientRect().width])"
        )
        fields = seen.page.locator(".fixed svg path title").all_text_contents()
        numbers = seen.page.locator(".fixed svg text").all_text_contents()
    widths = {tip: width for tip, width in tips if "\n" in tip and not tip.endswith("B")}
    for domain in SOME.domains:
        lengths = {
            pages_of: width
            for pages_of, what in ((domain.zero_pages, "zeros"), (domain.unique_pages, "unique"))
            for tip, width in widths.items()
            if re.fullmatch(rf"{re.escape(domain.name)}\n{what}: .* {pages_of:,} pages", tip)
        }
        assert len(lengths) == 2, widths
        assert lengths[domain.zero_pages] / lengths[domain.unique_pages] == pytest.approx(
            domain.zero_pages / domain.unique_pages, rel=0.05
        )
    barred = [field for field in fields if "not allowed: different groups" in field]
    assert (len(fields), len(barred)) == (10, 4)
    for pair in SOME.pairs:
        one, other = pair.names
        (field,) = [field for field in fields if field.startswith(f"{one} and {other}\n")]
        assert ("not allowed" in field) == (pair.group is None)
        assert says(field.rpartition(": ")[2], "", pair.contents)
    assert sum(bool(re.fullmatch(r"[\d,.<]+", number)) for number in numbers) == 10


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_asks_for_nothing_and_complains_of_nothing(
    name: str, scheme: Any, browser: Browser, pages: dict[str, Path]
) -> None:
    with Seen(browser, pages[name], color_scheme=scheme) as seen:
        seen.page.mouse.move(300, 600)
        seen.page.screenshot(full_page=True)
        assert [url for url in seen.requests if not url.startswith("data:")] == [pages[name].as_uri()]
        assert seen.complaints == []


@pytest.mark.parametrize("name", ESTIMATES)
@pytest.mark.parametrize("width", WIDTHS)
def test_nothing_is_cut_off(name: str, width: int, browser: Browser, pages: dict[str, Path]) -> None:
    with Seen(browser, pages[name], viewport={"width": width, "height": 900}) as seen:
        assert seen.page.evaluate(CLIPPED) == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") == width


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_texts_can_be_read(scheme: Any, browser: Browser, pages: dict[str, Path]) -> None:
    with Seen(browser, pages["some"], color_scheme=scheme) as seen:
        assert min(seen.page.evaluate(CONTRASTS)) >= 4.5
        background = seen.page.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") == (scheme == "light")


def test_paper_is_white_and_has_everything(browser: Browser, pages: dict[str, Path]) -> None:
    with Seen(browser, pages["some"], viewport={"width": 700, "height": 900}) as seen:
        seen.page.emulate_media(media="print", color_scheme="dark")
        assert seen.page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
        assert seen.page.evaluate(CLIPPED) == []
        assert seen.page.evaluate("document.documentElement.scrollWidth") == 700
        assert min(seen.page.evaluate(CONTRASTS)) >= 4.5
        paper = seen.page.pdf(format="A4")
    assert paper.startswith(b"%PDF-")
    assert 2 <= len(re.findall(rb"/Type\s*/Page\b", paper)) <= 12


def test_names_of_domains_run_nothing(browser: Browser, pages: dict[str, Path]) -> None:
    with Seen(browser, pages["some"]) as seen:
        assert seen.page.evaluate("window.hacked") is None
        assert seen.page.locator("script").count() == 1
        assert seen.page.locator("img").count() == 0
        assert HOSTILE in seen.page.inner_text("body")


def test_policy_forbids_what_the_page_does_not_do(browser: Browser, pages: dict[str, Path]) -> None:
    with Seen(browser, pages["some"]) as seen:
        attempt = "fetch('http://127.0.0.1:9/').then(() => 'sent', error => error.message)"
        seen.page.evaluate(attempt)
        seen.page.evaluate(
            """() => {
                const script = document.createElement('script');
                script.textContent = 'window.hacked = 1';
                document.body.append(script);
                const image = new Image();
                image.src = 'http://127.0.0.1:9/a.png';
                document.body.append(image);
            }"""
        )
        assert seen.page.evaluate("window.hacked") is None
        refused = " ".join(seen.complaints)
    for directive in ("default-src 'none'", "script-src 'sha256-", "img-src data:"):
        assert directive in refused


def test_tooltip_shows_at_once(browser: Browser, pages: dict[str, Path]) -> None:
    with Seen(browser, pages["some"], viewport={"width": 1280, "height": 900}) as seen:
        assert not seen.page.locator(".tip").is_visible()
        bar = seen.page.locator(".wide svg path").nth(8)
        bar.scroll_into_view_if_needed()
        seen.page.evaluate("new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")
        bar.hover()
        assert seen.page.locator(".tip").is_visible()
        assert re.fullmatch(r"web-frontend-0\d\n\w+: .* pages", seen.page.locator(".tip").inner_text())
        box, width = seen.page.locator(".tip").bounding_box(), 1280
        assert box is not None
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        seen.page.mouse.move(5, 5)
        assert not seen.page.locator(".tip").is_visible()


def test_estimate_of_the_page_is_that_of_its_file(browser: Browser, tmp_path: Path) -> None:
    """What came back from JSON makes the same page."""
    write_html(SOME, tmp_path / "direct.html")
    write_html(Estimate.from_dict(json.loads(json.dumps(SOME.to_dict()))), tmp_path / "file.html")
    texts = []
    for name in ("direct", "file"):
        with Seen(browser, tmp_path / f"{name}.html") as seen:
            texts.append(seen.page.inner_text("body"))
    assert texts[0] == texts[1]
