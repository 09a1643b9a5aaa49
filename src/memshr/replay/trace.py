"""Replay a recording of a real Xen on the embedded hypervisor, and list every difference.

After each step rc, errno, the handle error, the handle, the counters with Xen's number of audit errors, the page
counts, pause count and state of each domain, and the contents of what was read must be equal. Xen is wrong, or dies,
in the few places of ``DIFFERENCES``; there memshr does the right thing, and the result says so by name. What a
difference excuses is bounded: a counter may be off by exactly what Xen's mistake makes of it, and no more.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from memshr.embedded import EmbeddedHypervisor
from memshr.errors import NoSuchDomainError, Status
from memshr.replay.operations import MAX_WORD, Answer, Operations, ScriptError
from memshr.types import DomId, Gfn, P2mType

DEBUG_SCRUB_BYTE = 0xC2
"""What Xen's debug build fills fresh memory with; the release build uses zeros."""

GROUP_OF_THREE = "group-of-three-domains"
FAILED_PLUG_COUNTED = "failed-plug-counted"
REMOVED_PAGE_STAYS = "removed-page-stays-shared"
MAP_WITHOUT_MEMORY = "writable-map-without-memory"
EITHER_HANDLE = "either-handle-error"

DIFFERENCES: dict[str, str] = {
    GROUP_OF_THREE: "Xen 4.17 dies (mm locking order violation) of a share whose client frame a third domain maps too;"
    " memshr moves the whole group, as the interface promises",
    FAILED_PLUG_COUNTED: "Xen counts a page as freed though add_to_physmap failed for lack of page-table memory;"
    " memshr keeps the counters true",
    REMOVED_PAGE_STAYS: "Xen leaves a shared page that remove_from_physmap took away on the frame's reverse map, and"
    " its audit finds 2 errors for each from then on (the debug build dies of it when the domain goes); memshr takes"
    " it off the frame",
    MAP_WITHOUT_MEMORY: "Xen's debug build dies of an assertion when a writable mapping finds no memory to unshare the"
    " page; memshr answers ENOMEM, as the release build does",
    EITHER_HANDLE: "neither page is shared: Xen looks at the lower machine frame first, which nobody outside can know,"
    " so either handle error is right",
}
"""Where a replay may differ from a recording, and why."""

_READ_VALUES = ("hex", "page_fnv1a", "uniform", "max_gpfn", "mem_type", "gdom", "frame")
_DOMAIN_VALUES = ("exists", "tot_pages", "shr_pages", "max_pages", "paused", "dying")
_WRITABLE_MAPS = ("write", "read", "hold", "grant_map")


@dataclass(frozen=True, slots=True)
class StepDifference:
    """One value that is not what Xen answered. ``excuse`` is a name of DIFFERENCES, or empty."""

    step: int
    source: str
    what: str
    xen: object
    memshr: object
    excuse: str = ""

    def __str__(self) -> str:
        return f"step {self.step}: {self.source}: {self.what}: Xen {self.xen!r}, memshr {self.memshr!r}"


@dataclass(frozen=True, slots=True)
class ReplayResult:
    """What a replay found. ``excused`` are the differences that DIFFERENCES explains."""

    scenario: str
    steps: int
    differences: tuple[StepDifference, ...]
    excused: tuple[StepDifference, ...]

    @property
    def ok(self) -> bool:
        """True if there is no difference but excused ones."""
        return not self.differences

    def excuses(self) -> Mapping[str, int]:
        """How many differences each name explains."""
        return Counter(difference.excuse for difference in self.excused)


@dataclass(slots=True)
class _Mistakes:
    """What Xen's mistakes have made of its counters so far."""

    plugs: int = 0
    """add_to_physmap calls that failed and were counted as freed."""
    phantoms: Counter[str] = field(default_factory=Counter)
    """Pages that were taken away and stayed on the books, by the name of their domain."""


def replay(path: str | os.PathLike[str]) -> ReplayResult:
    """Run a recorded scenario and compare.

    :raises ScriptError: the file cannot be read or is no trace, with its name and the step.
    """
    return _Replay(Path(path)).run()


class _Replay:
    def __init__(self, path: Path) -> None:
        self._path = path
        self._trace = self._load()
        build = str(self._trace.get("hypervisor_build", "debug"))
        self._hypervisor = EmbeddedHypervisor(scrub_byte=0 if build.startswith("release") else DEBUG_SCRUB_BYTE)
        self._operations = Operations(self._hypervisor)
        self._mistakes = _Mistakes()
        self._found: list[StepDifference] = []

    def _load(self) -> dict[str, Any]:
        try:
            trace = json.loads(self._path.read_bytes())
        except OSError as error:
            raise ScriptError(f"{self._path}: {error.strerror or error}") from error
        except (ValueError, RecursionError) as error:
            raise ScriptError(f"{self._path}: no JSON: {error}") from error
        if not isinstance(trace, dict) or not isinstance(trace.get("steps"), list):
            raise ScriptError(f"{self._path}: no trace: it has no list of steps")
        return trace

    def _error(self, step: int, text: object) -> ScriptError:
        return ScriptError(f"{self._path}: step {step}: {text}")

    def run(self) -> ReplayResult:
        steps = self._trace["steps"]
        for number, step in enumerate(steps, 1):
            self._check_form(number, step)
            before = self._before(step)
            answer = self._do(number, step)
            for what, xen, ours in self._compare(step, answer):
                excuse = self._excuse(step, answer, before, what, xen, ours)
                self._found.append(StepDifference(number, _source(step), what, xen, ours, excuse))
        crashed = self._trace.get("crashed_step")
        if crashed is not None:
            self._replay_crash(len(steps) + 1, crashed)
        return ReplayResult(
            str(self._trace.get("scenario", self._path.stem)),
            len(steps) + (crashed is not None),
            tuple(difference for difference in self._found if not difference.excuse),
            tuple(difference for difference in self._found if difference.excuse),
        )

    def _check_form(self, number: int, step: object, *needed: str) -> None:
        if not isinstance(step, dict):
            raise self._error(number, "a step is not an object")
        for name in needed or ("op", "args", "rc", "errno"):
            if name not in step:
                raise self._error(number, f"the field {name!r} is missing")
        if not isinstance(step["args"], dict) or not isinstance(step["op"], str):
            raise self._error(number, "op must be a text and args an object")
        handle = step.get("handle", 0)
        if not isinstance(handle, int) or not 0 <= handle <= MAX_WORD:
            raise self._error(number, f"the handle {handle!r} is not a number of 64 bits")
        domains = step.get("domains", {})
        for name, value in (("counters", step.get("counters", {})), ("domains", domains)):
            if not isinstance(value, dict):
                raise self._error(number, f"{name} must be an object")
        for name, value in domains.items():
            if not isinstance(value, dict):
                raise self._error(number, f"domains: {name} must be an object")
        if not isinstance(step.get("words", []), list):
            raise self._error(number, "words must be a list")

    def _do(self, number: int, step: Mapping[str, Any]) -> Answer:
        try:
            return self._operations.run(step["op"], step["args"])
        except ScriptError as error:
            raise self._error(number, error) from error

    def _compare(self, step: Mapping[str, Any], answer: Answer) -> Iterator[tuple[str, object, object]]:
        pairs: list[tuple[str, object, object]] = [
            ("rc", step["rc"], answer.rc),
            ("errno", step["errno"], answer.errno),
            ("handle error", step.get("xen_rc"), answer.handle_error),
            ("handle", _handle(step), answer.handle),
        ]
        pairs += [(name, step[name], answer.values.get(name)) for name in _READ_VALUES if name in step]
        if "counters" in step:
            counters, audit = self._hypervisor.counters(), self._hypervisor.audit()
            ours = {"freed": counters.freed_pages, "used": counters.used_frames, "audit": audit.xen_errors}
            pairs += [(name, step["counters"][name], value) for name, value in ours.items() if name in step["counters"]]
            pairs += [("our own audit", [], [str(finding) for finding in audit.findings])]
        for name, recorded in step.get("domains", {}).items():
            state = self._domain_state(name)
            pairs += [(f"{key} of {name}", recorded[key], state[key]) for key in _DOMAIN_VALUES if key in recorded]
        for what, xen, memshr in pairs:
            if xen != memshr:
                yield what, xen, memshr

    def _domain_state(self, name: str) -> dict[str, object]:
        domid = self._operations.domains.get(name, DomId(0))
        try:
            info = self._hypervisor.domain_info(domid)
        except NoSuchDomainError:
            return dict.fromkeys(_DOMAIN_VALUES) | {"exists": False}
        return {
            "exists": True,
            "tot_pages": info.tot_pages,
            "shr_pages": info.shr_pages,
            "max_pages": info.max_pages,
            "paused": int(info.pause_count > 0),
            "dying": int(info.dying),
        }

    # -- what is excused ---------------------------------------------------------------------------------------------

    def _before(self, step: Mapping[str, Any]) -> str:
        """The name of the difference that this step may bring, from the state before it."""
        arguments = step["args"]
        match step["op"]:
            case "share" if not self._is_shared(arguments, "s") and not self._is_shared(arguments, "c"):
                return EITHER_HANDLE
            case "share" if self._has_third_domain(arguments):
                return GROUP_OF_THREE
            case "remove_from_physmap" if self._is_shared(arguments, ""):
                self._mistakes.phantoms[str(arguments["dom"])] += 1
            case "add_to_physmap" if step["errno"] == -Status.ENOMEM:
                self._mistakes.plugs += 1
        return ""

    def _page(self, arguments: Mapping[str, Any], side: str) -> tuple[DomId, Gfn] | None:
        name = arguments.get(f"{side}dom")
        domid = self._operations.domains.get(name) if isinstance(name, str) else None
        gfn = arguments.get(f"{side}gfn")
        return None if domid is None or not isinstance(gfn, int) else (domid, Gfn(gfn))

    def _is_shared(self, arguments: Mapping[str, Any], side: str) -> bool:
        page = self._page(arguments, side)
        try:
            return page is not None and self._hypervisor.mem_type(*page) is P2mType.RAM_SHARED
        except NoSuchDomainError:
            return False

    def _has_third_domain(self, arguments: Mapping[str, Any]) -> bool:
        source, client = self._page(arguments, "s"), self._page(arguments, "c")
        if source is None or client is None or not self._is_shared(arguments, "c"):
            return False
        return any(page.domid not in (source[0], client[0]) for page in self._hypervisor.sharers(*client))

    def _excuse(
        self, step: Mapping[str, Any], answer: Answer, before: str, what: str, xen: object, ours: object
    ) -> str:
        handle_errors = {Status.S_HANDLE_INVALID.value, Status.C_HANDLE_INVALID.value}
        if before == EITHER_HANDLE and {step.get("xen_rc"), answer.handle_error} == handle_errors:
            return EITHER_HANDLE if what in ("errno", "handle error") else ""
        if not isinstance(xen, int) or not isinstance(ours, int):
            return ""
        counted = what == "freed" or (what == "rc" and step["op"] == "freed_pages")
        if self._mistakes.plugs and counted and xen - ours == self._mistakes.plugs:
            return FAILED_PLUG_COUNTED
        return REMOVED_PAGE_STAYS if self._is_phantom(step, what, xen, ours) else ""

    def _is_phantom(self, step: Mapping[str, Any], what: str, xen: int, ours: int) -> bool:
        phantoms = self._mistakes.phantoms.total()
        if not phantoms:
            return False
        if what in ("freed", "used"):
            counters = self._hypervisor.counters()
            recorded = step["counters"].get("freed"), step["counters"].get("used")
            if not all(isinstance(number, int) for number in recorded):
                return False
            return bool(sum(recorded) == counters.freed_pages + counters.used_frames + phantoms)
        if what == "audit" or (what == "rc" and step["op"] == "audit"):
            return ours == 0 and xen == 2 * phantoms
        if what == "rc" and step["op"] in ("debug_gfn", "freed_pages", "used_frames"):
            return 0 < xen - ours <= phantoms
        name = what.removeprefix("shr_pages of ")
        return name != what and xen - ours == self._mistakes.phantoms[name]

    def _replay_crash(self, number: int, crashed: object) -> None:
        self._check_form(number, crashed, "op", "args")
        assert isinstance(crashed, dict)
        before = self._before({"errno": 0, **crashed})
        answer = self._do(number, crashed)
        excuse = ""
        if crashed["op"] in _WRITABLE_MAPS and answer.status == Status.ENOMEM:
            excuse = MAP_WITHOUT_MEMORY
        elif crashed["op"] == "share" and answer.rc == 0:
            excuse = before if before == GROUP_OF_THREE else ""
        elif crashed["op"] == "destroy_domain" and self._mistakes.phantoms:
            excuse = REMOVED_PAGE_STAYS
        outcome = f"rc {answer.rc}" + (f", errno {answer.errno}" if answer.rc < 0 else "")
        self._found.append(StepDifference(number, _source(crashed), "Xen died", "no answer", outcome, excuse))
        if findings := self._hypervisor.audit().findings:
            self._found.append(StepDifference(number, _source(crashed), "our own audit", [], list(map(str, findings))))


def _handle(step: Mapping[str, Any]) -> object:
    # A raw call hands its handle out in the second word of its union.
    if step["op"] == "raw_memop" and step["args"].get("op") in (0, 1) and step["rc"] == 0:
        return next(iter(step.get("words", [])[1:2]), None)
    return step.get("handle")


def _source(step: Mapping[str, Any]) -> str:
    source = str(step.get("src", step["op"]))
    return source if source.isprintable() else ascii(source)
