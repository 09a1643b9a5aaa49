"""What changed between two estimates, as data and as memshr compare prints it."""

import dataclasses
import json
from pathlib import Path

import pytest

from command_line import CommandLine
from estimates import ZERO, counted
from memshr.estimation.result import Estimate, Sample
from memshr.render.difference import Change, DomainChange, PairChange, difference

BEFORE = counted(
    {"web": [ZERO, 1, 2, 3, 3], "db": [ZERO, 1, 2, 9], "old": [1, 4]}, {"left": ["web", "db"], "right": ["old"]}
)
AFTER = counted(
    {"new": [7, 8], "db": [ZERO, 1, 9, 10], "web": [ZERO, ZERO, 1, 2, 3, 3]}, {"all": ["new", "db"], "web": ["web"]}
)


def test_totals_and_domains_by_name() -> None:
    changes = difference(BEFORE, AFTER)
    assert changes.totals["total_pages"] == Change(11, 12)
    assert changes.totals["zero_pages"] == Change(2, 3)
    assert changes.totals["inter_pages"] == Change(2, 0)
    assert changes.totals["saved_pages"].difference == -1
    assert BEFORE.achievable is not None
    assert AFTER.achievable is not None
    assert changes.totals["achievable_pages"] == Change(BEFORE.achievable.saved_pages, AFTER.achievable.saved_pages)
    assert (changes.new, changes.gone) == (("new",), ("old",))
    db, web = changes.domains
    assert (db.name, web.name, db.groups, web.groups) == ("db", "web", ("left", "all"), ("left", "web"))
    assert isinstance(web, DomainChange)
    assert web.figures["zero_pages"] == Change(1, 2)
    assert db.figures["shared_pages"] == Change(2, 0)


def test_pairs_that_changed_most_come_first() -> None:
    changes = difference(BEFORE, AFTER)
    assert changes.pairs == (PairChange(("db", "web"), ("left", None), Change(2, 1)),)
    one = counted({"a": [1, 2, 3, 4], "b": [1, 2, 3], "c": [4]})
    other = counted({"a": [1, 2, 3, 4], "b": [5], "c": [4, 1]})
    assert [(pair.names, pair.contents.difference) for pair in difference(one, other).pairs] == [
        (("a", "b"), -3),
        (("a", "c"), 1),
    ]


def test_the_same_has_no_changes() -> None:
    changes = difference(BEFORE, BEFORE)
    assert (changes.pairs, changes.new, changes.gone, changes.remarks) == ((), (), (), ())
    assert {change.difference for change in changes.totals.values()} == {0}


def _renamed(estimate: Estimate, name: str) -> Estimate:
    domains = tuple(dataclasses.replace(domain, name=name) for domain in estimate.domains)
    return dataclasses.replace(estimate, domains=domains)


def test_domains_of_one_name_are_matched_in_order() -> None:
    two, three = counted({"a": [1, 2], "b": [1]}), counted({"a": [1, 2], "b": [1, 1], "c": [1]})
    changes = difference(_renamed(two, "guest"), _renamed(three, "guest"))
    assert [domain.figures["total_pages"] for domain in changes.domains] == [Change(2, 2), Change(1, 2)]
    assert changes.new == ("guest",)


def test_says_why_two_are_not_comparable() -> None:
    sampled = dataclasses.replace(
        AFTER,
        method=dataclasses.replace(
            AFTER.method, exact=False, sample=Sample("1/64", 1, 9, 0.95), samples_s=1.0, max_sharers=16
        ),
        stopped="a guest went away",
        achievable=None,
    )
    assert "achievable_pages" not in difference(BEFORE, sampled).totals
    assert difference(BEFORE, sampled).pairs == ()
    assert difference(BEFORE, sampled).remarks == (
        "the second estimate is of a sample: small changes may be chance",
        "the second estimate ended early: a guest went away",
        "the limit on sharers of one frame was 256 and is 16",
        "one estimate left volatile pages out and the other did not look for them",
    )


@pytest.fixture
def paths(tmp_path: Path) -> tuple[Path, Path]:
    """BEFORE and AFTER in files."""
    one, other = tmp_path / "a.json", tmp_path / "b.json"
    one.write_text(json.dumps(BEFORE.to_dict()))
    other.write_text(json.dumps(AFTER.to_dict()))
    return one, other


def test_command_prints_what_changed(paths: tuple[Path, Path], memshr: CommandLine) -> None:
    outcome = memshr("compare", *paths)
    assert (outcome.code, outcome.err) == (0, "")
    lines = [" ".join(line.split()) for line in outcome.out.splitlines()]
    assert lines[0] == "4 KiB less can be saved: 20 KiB before, 16 KiB now."
    for line in (
        "can be saved 20 16 -4",
        "pages of zeros 8 12 +4",
        "looked at 44 48 +4",
        "web left -> web +4 +4 -8 = +8",
        "new: new",
        "gone: old",
        "db + web yes -> no 8 4 -4",
    ):
        assert line in lines, outcome.out


def test_command_on_the_same(paths: tuple[Path, Path], memshr: CommandLine) -> None:
    outcome = memshr("compare", paths[0], paths[0])
    assert outcome.code == 0
    assert outcome.out.startswith("The saving is the same: 20 KiB.\n")
    assert "save together" not in outcome.out


def test_command_prints_json(paths: tuple[Path, Path], memshr: CommandLine) -> None:
    plain = json.loads(memshr("compare", *paths, "--json").out)
    assert (plain["schema"], plain["version"]) == ("memshr-comparison", 1)
    assert plain["totals"]["saved_pages"] == {"before": 5, "after": 4}
    assert plain["domains"][1]["figures"]["zero_pages"] == {"before": 1, "after": 2}
    assert plain["pairs"] == [{"names": ["db", "web"], "groups": ["left", None], "contents": {"before": 2, "after": 1}}]


def test_command_shows_hostile_names_as_they_are(tmp_path: Path, memshr: CommandLine) -> None:
    name = "[bold]x[/red]\x1b[2J"
    for file, last in (("a.json", 2), ("b.json", 3)):
        (tmp_path / file).write_text(json.dumps(counted({name: [1, 1, 2], "b": [1, last]}).to_dict()))
    outcome = memshr("compare", tmp_path / "a.json", tmp_path / "b.json")
    assert (outcome.code, outcome.err) == (0, "")
    assert "[bold]x[/red]\\x1b[2J" in outcome.out
    assert "\x1b" not in outcome.out


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        ("", "no JSON, so no estimate of memshr; write one by `memshr estimate --json`"),
        ("{}", "this is no estimate of memshr; write one by"),
        (
            '{"schema": "memshr-estimate", "version": 9}',
            "this estimate has version 9 of the schema; this memshr reads 2",
        ),
    ],
)
def test_command_refuses_what_is_no_estimate(
    contents: str, message: str, paths: tuple[Path, Path], memshr: CommandLine
) -> None:
    paths[1].write_text(contents)
    outcome = memshr("compare", *paths)
    assert outcome.code == 2
    assert outcome.err.startswith(f"memshr: {paths[1]}: {message}")
    assert outcome.err.count("\n") == 1
