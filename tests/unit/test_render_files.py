"""The files of a report: the page without a browser, the matrix as CSV, and how both are written."""

import csv
import dataclasses
import html.parser
import io
import json
import os
import stat
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner

import memshr.render
from command_line import CommandLine
from estimates import counted
from memshr.cli.report_files import report_files, write_reports
from memshr.errors import MemshrError, UnsupportedError
from memshr.estimation.result import Estimate
from memshr.render.files import write_file
from memshr.render.html import estimate_html, write_html
from memshr.render.matrix import COLUMNS, matrix_csv, write_csv
from memshr.render.wording import Unit, percent, printable

THREE = counted({"a": [1, 1, 2, 3], "b": [1, 2, 4], "c": [2, 9]}, {"left": ["a", "b"], "right": ["c"]})


class Elements(html.parser.HTMLParser):
    """The names of a page's elements, and the texts between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.names: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.texts: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)
        self.attributes += attrs

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def named(names: list[str], groups: dict[str, list[str]] | None = None) -> Estimate:
    """Domains of these names that all hold the same two contents."""
    return counted({name: [1, 1, 2] for name in names}, groups)


def test_page_is_one_file_that_asks_for_nothing() -> None:
    page = Elements(estimate_html(THREE))
    assert {"link", "script", "style"} <= set(page.names)
    assert not {"img", "iframe", "object", "embed", "form", "base"} & set(page.names)
    addresses = [value for name, value in page.attributes if name in {"src", "href", "xlink:href", "action", "data"}]
    assert addresses == ["data:,"]
    assert [value for name, value in page.attributes if name.startswith("on")] == []
    (policy,) = [value for name, value in page.attributes if value and "default-src" in value]
    assert policy is not None
    assert policy.startswith("default-src 'none'; style-src 'sha256-")
    assert "unsafe" not in policy


def test_page_is_the_same_for_the_same_estimate() -> None:
    assert estimate_html(THREE) == estimate_html(THREE)


@pytest.mark.parametrize(
    "name",
    [
        "<script>window.hacked=1</script>",
        "\"'><img src=x onerror=hacked=1>",
        "</title></text></svg><b>",
        "{{ 7 * 7 }}{% raw %}",
        "' + alert(1) + '",
        "]]>&amp;",
    ],
)
def test_names_are_text_and_nothing_else(name: str) -> None:
    harmless, hostile = (Elements(estimate_html(named([each, "b"], {each: [each, "b"]}))) for each in ("a", name))
    assert hostile.names == harmless.names
    assert any(name in text for text in hostile.texts)


@pytest.mark.parametrize("name", ["two\nlines", "bell\a", "\udcff\ud800", "\u202eleft", "漢字" * 50, "", "x" * 5000])
def test_names_that_no_screen_can_show(name: str, tmp_path: Path) -> None:
    write_html(named([name, "b"]), tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text()
    assert printable(name) in text
    assert "\a" not in text
    assert "\u202e" not in text


@pytest.mark.parametrize("count", [0, 1, 2, 6, 7, 14, 15, 40, 61])
def test_any_number_of_domains(count: int) -> None:
    page = Elements(estimate_html(named([f"guest-{number}" for number in range(count)])))
    assert sum(text.strip() == "Who could share with whom" for text in page.texts) == (count > 1)
    assert sum("48 domains with the most in common" in text for text in page.texts) == (count > 48)
    assert sum("The 60 largest have a bar." in text for text in page.texts) == (count > 60)
    assert {f"guest-{number}" for number in range(count)} <= {text.strip() for text in page.texts}


def test_estimate_without_anything_to_save() -> None:
    page = Elements(estimate_html(counted({"a": [1, 2], "b": [3]}, {"a": ["a"], "b": ["b"]})))
    assert ": nothing to save" in page.texts
    assert any("No two domains have a page in common." in text for text in page.texts)


def test_page_says_that_it_ended_early() -> None:
    page = Elements(estimate_html(dataclasses.replace(THREE, stopped="a guest <died>")))
    assert any("a guest <died>. The figures are of what was looked at" in text for text in page.texts)


def without_altair(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make this process one in which the extra ``report`` is not installed."""
    for module in ("html_page", "html_charts"):
        monkeypatch.delitem(sys.modules, f"memshr.render.{module}", raising=False)
        monkeypatch.delattr(memshr.render, module, raising=False)
    monkeypatch.setitem(sys.modules, "altair", None)


def test_missing_libraries_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    without_altair(monkeypatch)
    with pytest.raises(UnsupportedError, match=r"needs the Python package altair; pip install 'memshr\[report\]'"):
        estimate_html(THREE)


# -- the matrix ------------------------------------------------------------------------------------------------------


def test_csv_has_a_line_for_each_pair() -> None:
    head, *lines = csv.reader(io.StringIO(matrix_csv(THREE)))
    assert tuple(head) == COLUMNS
    assert lines == [
        ["1", "a", "2", "b", "left", "yes", "2", "5"],
        ["1", "a", "3", "c", "", "no", "1", "2"],
        ["2", "b", "3", "c", "", "no", "1", "2"],
    ]


@pytest.mark.parametrize("name", ["=cmd()", "+1", "-1", "@SUM(A1)", "'quoted"])
def test_csv_holds_no_formula(name: str) -> None:
    _, line = csv.reader(io.StringIO(matrix_csv(named([name, "b"], {name: [name, "b"]}))))
    assert line[1] == f"'{name}"
    assert line[4] == f"'{name}"


def test_csv_keeps_separators_in_names_and_escapes_what_ends_lines(tmp_path: Path) -> None:
    write_csv(named(['a,"b"\r\n', "d;e"]), tmp_path / "matrix.csv")
    with (tmp_path / "matrix.csv").open(newline="") as file:
        _, line = csv.reader(file)
    assert (line[1], line[3]) == ('a,"b"\\r\\n', "d;e")


# -- writing ---------------------------------------------------------------------------------------------------------


def test_file_has_the_permissions_of_any_new_file_and_keeps_those_of_an_old_one(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_file(tmp_path / "new", "text")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "new").stat().st_mode) == 0o640
    (tmp_path / "new").chmod(0o604)
    write_file(tmp_path / "new", "other")
    assert ((tmp_path / "new").read_text(), stat.S_IMODE((tmp_path / "new").stat().st_mode)) == ("other", 0o604)


def test_link_stays_a_link(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to("real")
    write_file(tmp_path / "link", "text")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real").read_text() == "text"


def test_a_failed_write_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "report").write_text("old")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fchmod", full)
    with pytest.raises(MemshrError, match="report: cannot be written: No space left on device"):
        write_file(tmp_path / "report", "new")
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("report", "old")]


def test_what_cannot_be_written_is_said_in_one_line(tmp_path: Path) -> None:
    for path, why in (
        (tmp_path / "none" / "a.html", "No such file or directory"),
        (tmp_path, "Is a directory"),
        (tmp_path / ("x" * 300), "File name too long"),
    ):
        with pytest.raises(MemshrError, match=f"cannot be written: {why}"):
            write_file(path, "text")


def test_writes_into_what_is_no_file() -> None:
    write_file("/dev/null", "text")
    assert not Path("/dev/null").is_file()


# -- the options -----------------------------------------------------------------------------------------------------


@click.command()
@report_files
def _command(html_file: str | None, csv_file: str | None) -> None:
    write_reports(THREE, html_file=html_file, csv_file=csv_file)


def test_options_write_the_files_that_are_asked_for(tmp_path: Path) -> None:
    page, matrix = tmp_path / "a.html", tmp_path / "a.csv"
    assert CliRunner().invoke(_command, [], standalone_mode=False).exception is None
    assert list(tmp_path.iterdir()) == []
    CliRunner().invoke(_command, ["--html", str(page), "--csv", str(matrix)], standalone_mode=False)
    assert page.read_text() == estimate_html(THREE)
    assert matrix.read_text() == matrix_csv(THREE)


# -- wording ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("pages", "text"),
    [
        (0, "0 KiB"),
        (1, "4 KiB"),
        (255, "1,020 KiB"),
        (256, "1.00 MiB"),
        (2560, "10.0 MiB"),
        (262144, "1.00 GiB"),
        (1 << 28, "1.00 TiB"),
    ],
)
def test_sizes(pages: int, text: str) -> None:
    assert Unit.of(pages).text(pages) == text


def test_little_is_not_written_as_nothing() -> None:
    assert Unit("GiB", 1 << 30, 2).number(1) == "<0.01"
    assert Unit("GiB", 1 << 30, 2).number(0) == "0.00"


@pytest.mark.parametrize(
    ("part", "whole", "text"),
    [
        (0, 0, "0%"),
        (0, 9, "0%"),
        (1, 1000, "<1%"),
        (1, 3, "33%"),
        (999, 1000, ">99%"),
        (9, 9, "100%"),
        (98, 100, "98%"),
    ],
)
def test_percents(part: int, whole: int, text: str) -> None:
    assert percent(part, whole) == text


# -- memshr estimate -------------------------------------------------------------------------------------------------


def test_estimate_command_writes_page_and_matrix_of_what_it_prints(tmp_path: Path, memshr: CommandLine) -> None:
    for name, contents in (("a.raw", b"aabc"), ("b.raw", b"acd\0")):
        (tmp_path / name).write_bytes(b"".join(bytes([byte]) * 4096 for byte in contents))
    images, page, matrix = (tmp_path / "a.raw", tmp_path / "b.raw"), tmp_path / "r.html", tmp_path / "r.csv"
    outcome = memshr("estimate", *images, "--group", "all", "--json", "--html", page, "--csv", matrix)
    assert (outcome.code, outcome.err) == (0, "")
    found = Estimate.from_dict(json.loads(outcome.out))
    assert (found.saved_pages, found.zero_pages, found.intra_pages, found.inter_pages) == (4, 1, 1, 2)
    assert page.read_text() == estimate_html(found)
    assert matrix.read_text() == matrix_csv(found)
    assert matrix.read_text().splitlines()[1] == "1,a.raw,2,b.raw,all,yes,2,5"


def test_estimate_command_misses_the_libraries_before_it_begins(
    tmp_path: Path, memshr: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    without_altair(monkeypatch)
    outcome = memshr("estimate", tmp_path / "none.raw", "--html", tmp_path / "r.html")
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err == "memshr: an HTML report needs the Python package altair; pip install 'memshr[report]'\n"


def test_estimate_command_says_what_cannot_be_written(tmp_path: Path, memshr: CommandLine) -> None:
    (tmp_path / "a.raw").write_bytes(bytes(4096))
    outcome = memshr("estimate", tmp_path / "a.raw", "--csv", tmp_path / "none" / "r.csv")
    assert outcome.code == 2
    assert outcome.err == f"memshr: {tmp_path}/none/r.csv: cannot be written: No such file or directory\n"
