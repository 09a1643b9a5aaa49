"""The estimate as data: to plain JSON and back, and what is refused."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from estimates import ABSENT, HOLE, VOLATILE, ZERO, counted
from memshr.errors import MemshrError
from memshr.estimation.result import Bounds, Estimate, Sample, read_estimate

PLAIN = counted(
    {"a": [ABSENT, VOLATILE, HOLE, ZERO, 1, 1, 2, 3], "b": [1, 2, 4], "c": [1, 4, 5, 5]},
    {"left": ["a", "b"], "right": ["c"]},
)
SAMPLED = dataclasses.replace(
    PLAIN,
    method=dataclasses.replace(PLAIN.method, exact=False, sample=Sample("1/64", 7, 100, 0.95), samples_s=1.0),
    stopped="memory ran out",
    bounds={"zero_pages": Bounds(1, 3)},
)


@pytest.mark.parametrize("estimate", [PLAIN, SAMPLED])
def test_comes_back_from_json_as_it_was(estimate: Estimate) -> None:
    assert Estimate.from_dict(json.loads(json.dumps(estimate.to_dict()))) == estimate


def test_json_has_the_keys_of_the_schema_in_order() -> None:
    plain = SAMPLED.to_dict()
    assert list(plain)[:4] == ["schema", "version", "method", "total_pages"]
    assert (plain["schema"], plain["version"]) == ("memshr-estimate", 2)
    assert plain["bounds"] == {"zero_pages": [1, 3]}
    assert plain["pairs"][0] == {"domids": [1, 2], "names": ["a", "b"], "group": "left", "contents": 2, "pages": 5}
    assert plain["counters"] == {"freed_pages": PLAIN.intra_pages + PLAIN.inter_pages, "used_frames": 3}


def test_keys_of_a_later_memshr_are_skipped() -> None:
    assert Estimate.from_dict(PLAIN.to_dict() | {"weather": "fine"}) == PLAIN


def _set(*path: str | int, to: object) -> Callable[[dict[str, Any]], None]:
    def change(plain: Any) -> None:
        for key in path[:-1]:
            plain = plain[key]
        plain[path[-1]] = to

    return change


def _without(*path: str | int) -> Callable[[dict[str, Any]], None]:
    def change(plain: Any) -> None:
        for key in path[:-1]:
            plain = plain[key]
        del plain[path[-1]]

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("schema", to="memshr-recording"), "this is no estimate of memshr; write one by"),
        (_set("version", to=3), "has version 3 of the schema; this memshr reads 2; estimate again"),
        (_set("version", to=True), "has version true of the schema"),
        (_set("version", to=[1] * 1000), r"has version \[1, 1, .*\.\.\. of the schema"),
        (_without("zero_pages"), "damaged: zero_pages is missing"),
        (_without("domains", 1, "dropped"), r"damaged: domains\[1\].dropped is missing"),
        (_set("total_pages", to="many"), 'total_pages is "many", not a number'),
        (_set("total_pages", to=-1), "total_pages is -1, not a number from 0 on"),
        (_set("total_pages", to=True), "total_pages is true, not a number"),
        (_set("total_pages", to=1.5), "total_pages is 1.5, not a number"),
        (_set("total_pages", to=10**30), "total_pages is 1000000000000000000000000000000, not"),
        (_set("method", "elapsed_s", to=float("nan")), "method.elapsed_s is NaN, not a number"),
        (_set("method", "elapsed_s", to=10**400), r"method.elapsed_s is 10000.*\.\.\., not a number"),
        (_set("method", "exact", to=1), "method.exact is 1, not true or false"),
        (_set("method", to=None), "method is null, not an object"),
        (_set("domains", to={}), "domains is {}, not a list"),
        (_set("domains", 0, "name", to=None), r"domains\[0\].name is null, not text"),
        (_set("domains", 0, "format", to=4), r"domains\[0\].format is 4, not text"),
        (_set("domains", 0, "domid", to=2), "domains has a domid twice"),
        (_set("pairs", 0, "domids", to=[1]), r"pairs\[0\].domids is \[1\], not a list of 2"),
        (_set("pairs", 0, "domids", to=[1, 9]), "pairs names domid 9, which is in no domain"),
        (_set("contents", 0, "first", "domid", to=8), "contents names domid 8, which"),
        (_set("groups", 0, "domids", to=[7]), "groups names domid 7, which"),
        (_set("dropped", "volatile", to=None), "dropped.volatile is null, not a number"),
        (_set("dropped", to=[]), r"dropped is \[\], not an object"),
        (_set("bounds", to={"saved_pages": [5, 4]}), "bounds.saved_pages has its low end above its high end"),
        (_set("copies", 0, "copies_to", to="x"), r'copies\[0\].copies_to is "x", not a number'),
    ],
)
def test_refuses_what_is_no_estimate(change: Callable[[dict[str, Any]], None], message: str) -> None:
    plain = json.loads(json.dumps(PLAIN.to_dict()))
    change(plain)
    with pytest.raises(MemshrError, match=message) as refused:
        Estimate.from_dict(plain)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 200


@pytest.mark.parametrize("plain", [None, [], 5, "memshr-estimate", {}])
def test_refuses_what_is_not_even_an_object_of_ours(plain: object) -> None:
    with pytest.raises(MemshrError, match="this is no estimate of memshr"):
        Estimate.from_dict(plain)


def test_reads_a_file(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_text(json.dumps(SAMPLED.to_dict()))
    assert read_estimate(path) == SAMPLED


@pytest.mark.parametrize(
    ("contents", "message"),
    [
        (b"", "no JSON, so no estimate"),
        (b"\x7fELF\xff\xfe", "no JSON, so no estimate"),
        (b"[" * 100_000, "no JSON, so no estimate"),
        (b"1" * 10_000, "no JSON, so no estimate"),
        (b"[]", "this is no estimate of memshr"),
        (b'{"schema": "memshr-estimate", "version": 1}', "version 1 of the schema"),
    ],
)
def test_refuses_a_file_by_name(contents: bytes, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(contents)
    with pytest.raises(MemshrError, match=message) as refused:
        read_estimate(path)
    assert str(refused.value).startswith(f"{path}: ")


def test_refuses_files_that_are_none(tmp_path: Path) -> None:
    with pytest.raises(MemshrError, match="cannot be read: No such file"):
        read_estimate(tmp_path / "none.json")
    with pytest.raises(MemshrError, match="cannot be read: Is a directory"):
        read_estimate(tmp_path)
    image = tmp_path / "image.raw"
    with image.open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(MemshrError, match="too large for an estimate"):
        read_estimate(image)
    with pytest.raises(MemshrError, match=r"two\\nlines.*No such file"):
        read_estimate("two\nlines")
