"""The recordings of a real Xen replayed: every answer the same, and a changed recording is noticed."""

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from memshr.replay import DIFFERENCES, ScriptError, replay

TRACES = Path(__file__).parents[1] / "traces"
FILES = sorted(TRACES.glob("*.json"))

EXCUSED = {
    "merge_group_with_third_domain_crashes_xen": {"group-of-three-domains"},
    "merge_group_with_third_domain_crashes_xen__release": {"group-of-three-domains"},
    "merge_group_with_third_domain_higher_id": {"group-of-three-domains"},
    "oom_p2m_pool_add_to_physmap": {"failed-plug-counted"},
    "oom_unshare_write": {"writable-map-without-memory"},
    "remove_from_physmap_shared": {"removed-page-stays-shared"},
    "remove_from_physmap_shared_then_destroy": {"removed-page-stays-shared"},
    "remove_from_physmap_shared_then_destroy__release": {"removed-page-stays-shared"},
    "random_walk_2": {"either-handle-error"},
    "random_walk_new_a": {"either-handle-error"},
    "random_walk_new_b": {"either-handle-error"},
}


def test_there_are_recordings() -> None:
    assert len(FILES) >= 68


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_embedded_answers_as_xen_did(path: Path) -> None:
    result = replay(path)
    assert result.differences == ()
    assert set(result.excuses()) == EXCUSED.get(path.stem, set())


def test_every_excuse_is_needed_and_explained() -> None:
    assert set().union(*EXCUSED.values()) == set(DIFFERENCES)


def tampered(name: str, tmp_path: Path, change: Callable[[list[dict[str, Any]]], object]) -> Path:
    trace = json.loads((TRACES / f"{name}.json").read_text())
    change(trace["steps"])
    path = tmp_path / f"{name}.json"
    path.write_text(json.dumps(trace))
    return path


def step_of(steps: list[dict[str, Any]], op: str, **known: object) -> dict[str, Any]:
    return next(step for step in steps if step["op"] == op and all(step.get(k) == v for k, v in known.items()))


TAMPERINGS: dict[str, tuple[str, Callable[[list[dict[str, Any]]], object]]] = {
    "rc": ("share_basic_lifecycle", lambda steps: step_of(steps, "debug_gfn").update(rc=3)),
    "errno": ("nominate_unpopulated", lambda steps: step_of(steps, "nominate", rc=-1).update(errno=7)),
    "handle error": ("share_wrong_handles", lambda steps: step_of(steps, "share", xen_rc=-10).update(xen_rc=-9)),
    "handle": ("nominate_twice", lambda steps: step_of(steps, "nominate").update(handle=3)),
    "freed": ("share_basic_lifecycle", lambda steps: step_of(steps, "share")["counters"].update(freed=0)),
    "used": ("share_basic_lifecycle", lambda steps: step_of(steps, "share")["counters"].update(used=2)),
    "audit": ("share_basic_lifecycle", lambda steps: step_of(steps, "share")["counters"].update(audit=1)),
    "tot_pages of A": ("nominate_twice", lambda steps: steps[0]["domains"]["A"].update(tot_pages=15)),
    "shr_pages of A": ("nominate_twice", lambda steps: steps[0]["domains"]["A"].update(shr_pages=1)),
    "exists of A": ("nominate_twice", lambda steps: steps[0]["domains"]["A"].update(exists=False)),
    "paused of A": ("nominate_twice", lambda steps: steps[0]["domains"]["A"].update(paused=0)),
    "max_pages of A": ("nominate_twice", lambda steps: steps[0]["domains"]["A"].update(max_pages=1)),
    "dying of A": ("nominate_twice", lambda steps: steps[0]["domains"]["A"].update(dying=1)),
    "page_fnv1a": ("share_basic_lifecycle", lambda steps: step_of(steps, "read").update(page_fnv1a="0" * 16)),
    "max_gpfn": ("range_share_bounds", lambda steps: step_of(steps, "max_gpfn").update(max_gpfn=16)),
    "mem_type": ("logdirty_nominate", lambda steps: step_of(steps, "mem_type").update(mem_type="ram_rw")),
    # what Xen's mistakes excuse is bounded: one more than they explain is a difference
    "freed ": ("oom_p2m_pool_add_to_physmap", lambda steps: steps[-1]["counters"].update(freed=137)),
    "used ": ("remove_from_physmap_shared", lambda steps: steps[-1]["counters"].update(used=2)),
    "audit ": ("remove_from_physmap_shared", lambda steps: steps[-1]["counters"].update(audit=3)),
    "shr_pages of B": ("remove_from_physmap_shared", lambda steps: steps[-1]["domains"]["B"].update(shr_pages=2)),
}


@pytest.mark.parametrize("what", TAMPERINGS)
def test_a_changed_recording_differs(what: str, tmp_path: Path) -> None:
    name, change = TAMPERINGS[what]
    result = replay(tampered(name, tmp_path, change))
    assert not result.ok
    assert what.strip() in {difference.what for difference in result.differences}
    text = str(result.differences[0])
    assert "Xen" in text
    assert "memshr" in text


def test_either_handle_error_is_right_only_when_neither_page_is_shared(tmp_path: Path) -> None:
    def swap(steps: list[dict[str, Any]]) -> None:
        steps[6].update(errno=10, xen_rc=-10)

    result = replay(tampered("share_not_nominated", tmp_path, swap))
    assert result.ok
    assert set(result.excuses()) == {"either-handle-error"}

    def swap_with_one_nominated(steps: list[dict[str, Any]]) -> None:
        steps[11].update(errno=10, xen_rc=-10)

    assert not replay(tampered("share_not_nominated", tmp_path, swap_with_one_nominated)).ok


BAD_TRACES: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "unknown operation": (
        lambda trace: trace["steps"][3].update(op="levitate"),
        "step 4: unknown operation 'levitate'",
    ),
    "missing field": (lambda trace: trace["steps"][3].pop("rc"), "step 4: the field 'rc' is missing"),
    "missing argument": (lambda trace: trace["steps"][6]["args"].pop("gfn"), "step 7: nominate: the parameter gfn is"),
    "unknown argument": (lambda trace: trace["steps"][6]["args"].update(gnf=1), "step 7: nominate: no parameter 'gnf'"),
    "name never created": (lambda trace: trace["steps"][6]["args"].update(dom="Z"), "no domain was ever named 'Z'"),
    "handle beyond 64 bits": (lambda trace: trace["steps"][6].update(handle=1 << 64), "not a number of 64 bits"),
    "share with one": (lambda trace: trace["steps"][8]["args"].update(sh=1 << 64), "step 9: share: sh="),
    "negative gfn": (lambda trace: trace["steps"][6]["args"].update(gfn=-2), "step 7: nominate: gfn=-2"),
    "gfn beyond 64 bits": (lambda trace: trace["steps"][6]["args"].update(gfn=1 << 64), "step 7: nominate: gfn="),
    "gfn that is a text": (lambda trace: trace["steps"][6]["args"].update(gfn="one"), "gfn='one' is not a number"),
    "domid beyond 16 bits": (lambda trace: trace["steps"][6]["args"].update(dom=70000), "dom=70000 is no domid"),
    "no steps": (lambda trace: trace.pop("steps"), "no trace: it has no list of steps"),
    "step that is none": (lambda trace: trace["steps"].insert(0, 7), "step 1: a step is not an object"),
    "domain that is none": (
        lambda trace: trace["steps"][0].update(domains={"A": 7}),
        "step 1: domains: A must be an object",
    ),
    "words that are none": (lambda trace: trace["steps"][0].update(words=7), "step 1: words must be a list"),
    "domain that is a list": (lambda trace: trace["steps"][8]["args"].update(sdom=[1]), "step 9: share: sdom=[1] is"),
    "pages below zero": (lambda trace: trace["steps"][0]["args"].update(pages=-1), "step 1: create_domain: -1 pages"),
    "no vCPU": (lambda trace: trace["steps"][0]["args"].update(vcpus=0), "step 1: create_domain: vcpus=0"),
    "arguments that are none": (lambda trace: trace["steps"][0].update(args=[]), "step 1: op must be a text"),
}


@pytest.mark.parametrize("what", BAD_TRACES)
def test_bad_trace_gets_one_line_with_file_and_step(what: str, tmp_path: Path) -> None:
    change, expected = BAD_TRACES[what]
    trace = json.loads((TRACES / "share_again_same_frame.json").read_text())
    assert trace["steps"][6]["op"] == "nominate"
    assert trace["steps"][8]["op"] == "share"
    change(trace)
    path = tmp_path / "bad.json"
    path.write_text(json.dumps(trace))
    with pytest.raises(ScriptError) as caught:
        replay(path)
    assert expected in str(caught.value)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"\xff\xfe", b"[]", b"7", b'{"steps": 3}', b"[" * 100_000, b'{"steps": [%s]}' % (b"1" * 5000)],
)
def test_file_that_is_no_trace(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "no.json"
    path.write_bytes(content)
    with pytest.raises(ScriptError, match=r"no\.json: no "):
        replay(path)


def test_missing_file(tmp_path: Path) -> None:
    with pytest.raises(ScriptError, match="No such file"):
        replay(tmp_path / "none.json")


def test_unexpected_death_of_xen_is_a_difference(tmp_path: Path) -> None:
    trace = json.loads((TRACES / "share_again_same_frame.json").read_text())
    crashed = copy.deepcopy(trace["steps"].pop())
    trace |= {"completed": False, "crashed_step": crashed}
    path = tmp_path / "died.json"
    path.write_text(json.dumps(trace))
    assert [difference.what for difference in replay(path).differences] == ["Xen died"]


def test_what_a_recording_does_not_hold_is_not_compared(tmp_path: Path) -> None:
    def thin(steps: list[dict[str, Any]]) -> None:
        for step in steps:
            step["counters"] = {"freed": step["counters"]["freed"]} if "counters" in step else {}
            for name in ("domains", "step", "line", "src", "errname", "xen_log"):
                step.pop(name, None)

    assert replay(tampered("share_basic_lifecycle", tmp_path, thin)).ok


def test_numbers_that_are_none_are_differences(tmp_path: Path) -> None:
    def spoil(steps: list[dict[str, Any]]) -> None:
        steps[-1].update(rc=float("nan"), src="two\nlines")
        steps[-1]["counters"] = {"freed": "x", "used": None}

    found = replay(tampered("remove_from_physmap_shared", tmp_path, spoil)).differences
    assert [difference.what for difference in found] == ["rc", "freed", "used"]
    assert all("\n" not in str(difference) for difference in found)
