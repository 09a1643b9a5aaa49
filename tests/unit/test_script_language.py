"""The language of the traces, read from lines; errors name the column."""

import json
from pathlib import Path

import pytest

from memshr.replay import ScriptError, parse_line

TRACES = Path(__file__).parents[1] / "traces"


@pytest.mark.parametrize("path", sorted(TRACES.glob("*.json")), ids=lambda path: path.stem)
def test_every_recorded_line_reads_as_it_was_resolved(path: Path) -> None:
    saved: dict[str, int] = {}
    for step in json.loads(path.read_text())["steps"]:
        line = parse_line(step["src"], saved)
        assert line is not None
        assert line.operation == step["op"]
        assert dict(line.arguments) == step["args"]
        if line.save is not None and "handle" in step:
            saved[line.save] = step["handle"]


def test_values_may_stand_without_names() -> None:
    line = parse_line("nominate A 0x10 save=ha  # a comment", {})
    assert line is not None
    assert (line.operation, dict(line.arguments), line.save) == ("nominate", {"dom": "A", "gfn": 16}, "ha")


def test_the_word_that_keeps_a_handle_takes_no_place() -> None:
    line = parse_line("nominate save=ha A 0x10", {})
    assert line is not None
    assert (dict(line.arguments), line.save) == ({"dom": "A", "gfn": 16}, "ha")


def test_hyphens_are_fine() -> None:
    line = parse_line("add-to-physmap 1 2 $h+1 2 3", {"h": 4})
    assert line is not None
    assert dict(line.arguments) == {"sdom": 1, "sgfn": 2, "sh": 5, "cdom": 2, "cgfn": 3}


@pytest.mark.parametrize("text", ["", "   ", "# only a remark", "   # indented"])
def test_nothing(text: str) -> None:
    assert parse_line(text, {}) is None


@pytest.mark.parametrize(
    ("text", "column", "message"),
    [
        ("levitate dom=A", 1, "unknown operation 'levitate'"),
        ("  levitate", 3, "unknown operation 'levitate'"),
        ("dom=A nominate", 1, "unknown operation"),
        ("nominate dom=A gfm=1", 16, "no parameter 'gfm'"),
        ("nominate dom=A gfn=$h", 16, "no handle was kept as $h"),
        ("nominate dom=A dom=B", 16, "dom is given twice"),
        ("nominate A 1 2", 14, "takes at most 2 values"),
        ('write dom=A gfn=1 data="never ends', 24, "a quote that is not closed"),
    ],
)
def test_errors_name_the_column(text: str, column: int, message: str) -> None:
    with pytest.raises(ScriptError) as caught:
        parse_line(text, {})
    assert message in str(caught.value)
    assert caught.value.column == column
