"""A hostile QEMU before every command: other guests stay right, memshr ends, nothing of root's is touched.

The law, for each mode and each command, is in ``Law``. The hostile QEMU stands first among the sources, which makes its
pages the ones that others are compared with, and it is in one trust group with its victims: the operator wrote that.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import threading
import time
import unicodedata
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from guests.hostile import MODES, HostileQemu, spoil
from guests.kit import find_program
from guests.machine import wait_until
from live.parts import needed_parts
from live.victims import Victims, common_pages, kept_victims
from memshr.qemu import control_area

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root can share running guests of other users")

DEADLINE_S = float(os.environ.get("MEMSHR_HOSTILE_DEADLINE_S", "60"))
"""A command that has not ended by then is killed, and has failed."""
MOST_BYTES: Final = 1 << 30
ADDRESSES_BYTES: Final = 16 << 30
"""more would only hurt this machine"""
OFFSETS: Final = {"state": control_area.STATE_AT, "done": control_area.DONE_AT, "tid": control_area.TID_AT}
CREW: Final = ("--group", "crew=1,2,3")
RACES: Final = 8
IMPATIENT: Final = """
from memshr.qemu import agent, bounded, monitor, target
agent.ANSWER_DEADLINE_S = 1.0
bounded.DEADLINE_S = 4.0
monitor.ANSWER_DEADLINE_S, monitor.PATIENCE_S, monitor.GREETING_DEADLINE_S = 2.0, 5.0, 1.0
target.DRAIN_DEADLINE_S = 2.0
from memshr.cli.main import main
main()
"""
"""memshr with deadlines of a few seconds, so that what waits for one of them does not take minutes; nothing else."""


# -- running memshr ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left."""

    arguments: tuple[str, ...]
    code: int
    out: str
    err: str
    peak_bytes: int
    killed: bool

    @property
    def json(self) -> Any:
        """What it printed with --json."""
        return json.loads(self.out)

    def __str__(self) -> str:
        command = " ".join(self.arguments[:8]) + (" ..." if len(self.arguments) > 8 else "")
        said = f"{self.err.strip()[-600:]!r}"
        return f"memshr {command}: exit {self.code}, {self.peak_bytes >> 20} MiB, it said {said}"


def memshr(*arguments: str) -> Outcome:
    """Run a command as root, for ``DEADLINE_S`` at most."""
    limited: list[str | Path] = [find_program("prlimit", "util-linux"), f"--as={ADDRESSES_BYTES}"]
    peak_bytes, killed = 0, False
    with tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        with subprocess.Popen(
            [*limited, sys.executable, "-c", IMPATIENT, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=out,
            stderr=err,
        ) as process:
            end = time.monotonic() + DEADLINE_S
            while process.poll() is None:
                peak_bytes = max(peak_bytes, _peak_bytes(process.pid))
                if time.monotonic() > end:
                    killed = True
                    process.kill()
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(0.02)
        out.seek(0)
        err.seek(0)
        printed, said = (file.read().decode(errors="surrogateescape") for file in (out, err))
    return Outcome(arguments, process.returncode, printed, said, peak_bytes, killed)


def _peak_bytes(pid: int) -> int:
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM:")), 0)


# -- the law -----------------------------------------------------------------------------------------------------------


class Law:
    """What holds after each command, whatever the hostile QEMUs do."""

    def __init__(self, victims: Victims, hostile: Sequence[HostileQemu] = ()) -> None:
        self.victims = victims
        self.hostile = hostile

    def run(self, *arguments: str) -> Outcome:
        """Run a command and judge it.

        :raises AssertionError: it, or what it did to others, is against the law; the text says how.
        """
        outcome = memshr(*arguments)
        self.victims.check()
        self.judge_victims(outcome)
        for hostile in self.hostile:
            _judge_root(hostile, outcome)
        _judge_command(outcome)
        return outcome

    def judge_victims(self, outcome: Outcome) -> None:
        """They read no file of a hostile QEMU."""
        theirs = set().union(*(hostile.own_files for hostile in self.hostile), set())
        for victim in self.victims.pair:
            mapped = _mapped_files(victim.guest.pid)
            assert not theirs & mapped, f"a victim has a file of the hostile QEMU mapped after {outcome}"
        for hostile in self.hostile:
            assert not hostile.reported("stole"), f"the hostile QEMU could write to a pool after {outcome}"

    def leave(self) -> None:
        """Victims can be left, and nothing of memshr stays in them."""
        outcome = self.run("detach", *self.victims.sources)
        assert outcome.code == 0, f"victims cannot be left: {outcome}"
        for victim in self.victims.pair:
            victim.wait_clean()


def _judge_command(outcome: Outcome) -> None:
    assert not outcome.killed, f"it had not ended after {DEADLINE_S:.0f} s: {outcome}"
    assert outcome.code in {0, 1, 2, 3}, str(outcome)
    assert outcome.peak_bytes < MOST_BYTES, f"it took too much memory: {outcome}"
    for word in ("Traceback", "internal error", "Exception ignored"):
        assert word not in outcome.err, f"a defect shows: {outcome}"
    raw = {letter for letter in outcome.out + outcome.err if unicodedata.category(letter) in {"Cc", "Cf", "Cs"}} - {
        "\n"
    }
    assert not raw, f"letters that a terminal obeys, {raw!r}, in {outcome}; {outcome.out!r}"


def _mapped_files(pid: int) -> set[tuple[int, int]]:
    """Device and inode of each file that a process has mapped."""
    found = set()
    for line in Path(f"/proc/{pid}/maps").read_text(errors="replace").splitlines():
        fields = line.split(maxsplit=5)
        major, minor = (int(number, 16) for number in fields[3].split(":"))
        found.add((os.makedev(major, minor), int(fields[4])))
    return found


def _judge_root(hostile: HostileQemu, outcome: Outcome) -> None:
    # The setuid program that it has turned into, if it has: whole, and with nothing in it that it did not bring.
    if hostile.mode.startswith(("exec-own", "exec-kept", "exec-at")) and hostile.acted:
        assert hostile.alive, f"root's program was made to end ({hostile.exit_code}) by {outcome}"
    with contextlib.suppress(FileNotFoundError, ProcessLookupError):
        if Path(f"/proc/{hostile.pid}/exe").readlink().name == "canary":
            maps = Path(f"/proc/{hostile.pid}/maps").read_text()
            assert "memfd:" not in maps, f"root's program has strange memory after {outcome}: {maps}"
            for [address] in hostile.reported("guarded"):
                assert f"{int(address):x}-" in maps, f"root's program has lost memory to {outcome}"
            threads = len(list(Path(f"/proc/{hostile.pid}/task").iterdir()))
            assert threads == 1, f"root's program has {threads} threads after {outcome}"


# -- fixtures ----------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def place(qemu: Path) -> Iterator[list[Victims]]:
    """Where the module's victims are."""
    with kept_victims(qemu) as place:
        yield place


@pytest.fixture
def victims(place: list[Victims], qemu: Path) -> Victims:
    """Two honest guests, with nothing of memshr in them; new ones if a test before has spoilt them."""
    if place and not place[0].fit:
        place.pop().close()
    if not place:
        place.append(Victims(qemu))
    for victim in place[0].pair:
        victim.rewrite()
    return place[0]


@contextlib.contextmanager
def hostile_qemu(mode: str = "honest", *, pages: bytes | None = None, **described: Any) -> Iterator[HostileQemu]:
    """One that has pages in common with the victims."""
    with needed_parts(), HostileQemu(mode, offsets=OFFSETS, pages=pages or common_pages(), **described) as hostile:
        yield hostile.start()


# -- the fixture is what it says ---------------------------------------------------------------------------------------


def _as_it_is(pid: int) -> tuple[object, ...]:
    maps: list[list[str]] = []
    for line in Path(f"/proc/{pid}/maps").read_text().splitlines():
        addresses, *rest = line.split(maxsplit=5)
        start, end = addresses.split("-")
        if maps and maps[-1][1] == start and maps[-1][2:] == rest and rest[3] == "0":
            maps[-1][1] = end
        else:
            maps.append([start, end, *rest])
    descriptors = sorted(os.fspath(entry.readlink()) for entry in Path(f"/proc/{pid}/fd").iterdir())
    return maps, descriptors, len(list(Path(f"/proc/{pid}/task").iterdir()))


def test_one_that_does_nothing_bad_is_shared_and_left_as_it_was(victims: Victims) -> None:
    with hostile_qemu() as honest:
        law = Law(victims, [honest])
        before = _as_it_is(honest.pid)
        sources = [honest.source, *victims.sources]
        [row] = law.run("status", honest.source, "--json").json
        assert row["refusals"] == []
        assert law.run("estimate", *sources, "--group", "all").code == 0
        report = law.run("share", *sources, *CREW, "--json").json
        assert report["inter_pages"] >= 200
        assert law.run("audit", *sources).code == 0
        [row] = law.run("status", honest.source, "--json").json
        assert row["sharing_pages"] >= 100
        assert law.run("unshare", *sources).code == 0
        assert law.run("detach", *sources).code == 0
        wait_until(lambda: _as_it_is(honest.pid) == before, 10.0, "it is as it was")
        law.leave()


@pytest.mark.parametrize("real", [False, True], ids=["ours", "qemu"])
def test_it_takes_descriptors_as_qemu_does(real: bool, victims: Victims) -> None:
    guest = victims.pair[0].guest
    with hostile_qemu() as honest, tempfile.TemporaryFile() as file, socket.socket(socket.AF_UNIX) as wire:
        pid, path = (guest.pid, guest.qmp_path) if real else (honest.pid, honest.folder / "qmp")
        identity = 'an "id"]}'
        wire.connect(os.fspath(path))
        with wire.makefile("rb") as lines:
            assert "QMP" in json.loads(lines.readline())
            for words, is_held in (
                ({"execute": "qmp_capabilities"}, False),
                ({"execute": "getfd", "arguments": {"fdname": "memshr"}}, True),
                ({"arguments": {"fdname": "memshr"}, "execute": "closefd"}, False),
                ({"execute": "transaction", "arguments": {"actions": []}}, False),
            ):
                request = json.dumps({"id": identity, **words}).encode() + b"\n"
                socket.send_fds(wire, [request], [file.fileno()] if words["execute"] == "getfd" else [])
                assert json.loads(lines.readline()) == {"return": {}, "id": identity}
                assert _has_open(pid, os.fstat(file.fileno())) == is_held, words


def _has_open(pid: int, file: os.stat_result) -> bool:
    for entry in Path(f"/proc/{pid}/fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.path.samestat(entry.stat(), file):
                return True
    return False


# -- what it does ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", MODES)
def test_every_command_beside(mode: str, victims: Victims) -> None:
    with hostile_qemu(mode) as hostile:
        _every_command(Law(victims, [hostile]), hostile)
        assert hostile.acted, "the mode was not put to the test: it never came to do what it is for"


@pytest.mark.parametrize("mode", ["forged-pool", "pool-write@pool"])
def test_every_command_beside_a_root_without_capabilities(mode: str, victims: Victims) -> None:
    with hostile_qemu(mode, user="root", capabilities=False) as hostile:
        _every_command(Law(victims, [hostile]), hostile)


def _every_command(law: Law, hostile: HostileQemu) -> None:
    sources = [hostile.source, *law.victims.sources]
    law.run("status", *sources)
    law.run("estimate", *sources, "--group", "all")
    law.run("share", *sources, *CREW)
    law.run("audit", *sources)
    law.run("share", *sources, *CREW)
    law.run("unshare", *sources)
    law.run("detach", *sources)
    law.leave()


def test_its_pool_does_not_become_that_of_another_group(victims: Victims) -> None:
    """It and the victims are in groups of their own; a race, which is run several times."""
    with hostile_qemu("pool-swap@pool", pages=2 * common_pages()) as hostile:  # twins, so that it has a pool
        law = Law(victims, [hostile])
        for _ in range(RACES):
            law.run("share", hostile.source, *victims.sources, "--group", "alone=1", "--group", "crew=2,3")
            theirs = {status.st_ino for status in _pool_files(hostile.pid).values()}
            for victim in victims.pair:
                common = theirs & {status.st_ino for status in _pool_files(victim.guest.pid).values()}
                assert not common, "a victim is on frames of a pool that the hostile QEMU has"
        assert hostile.acted
        law.run("detach", hostile.source)
        law.leave()


def test_what_it_turns_into_while_it_is_left_is_not_touched(victims: Victims) -> None:
    """A race, which is run several times: root's program must have its memory before it can lose it."""
    for _ in range(RACES):
        with hostile_qemu("exec-at-detach", pages=2 * common_pages()) as hostile:
            law = Law(victims, [hostile])
            law.run("share", hostile.source)
            law.run("detach", hostile.source)
            assert hostile.acted


def test_no_thread_that_it_names_stays_urgent(victims: Victims) -> None:
    with hostile_qemu("tid-forged@agent") as hostile:
        law = Law(victims, [hostile])
        law.run("share", hostile.source, *victims.sources, *CREW)
        for thread in Path(f"/proc/{hostile.pid}/task").iterdir():
            nice = os.getpriority(os.PRIO_PROCESS, int(thread.name))
            assert nice >= 0, f"thread {thread.name} of the hostile QEMU is left with nice {nice}"
        law.run("detach", hostile.source)
        law.leave()


def test_the_agent_of_a_guest_that_stays_shared_is_not_urgent(victims: Victims) -> None:
    law = Law(victims)
    law.run("share", *victims.sources, "--group", "all")
    for victim in victims.pair:
        threads = Path(f"/proc/{victim.guest.pid}/task").iterdir()
        assert all(os.getpriority(os.PRIO_PROCESS, int(thread.name)) >= 0 for thread in threads)
    law.leave()


@pytest.mark.parametrize("groups", [("--group", "all"), CREW], ids=["all", "crew"])
def test_it_can_read_no_page_that_only_a_victim_has(groups: Sequence[str], victims: Victims) -> None:
    with hostile_qemu() as hostile:
        law = Law(victims, [hostile])
        law.run("share", hostile.source, *victims.sources, *groups)
        readable = _readable_pools(hostile.pid)
        for victim in victims.pair:
            pages = [victim.twins[at : at + 4096] for at in range(0, len(victim.twins), 4096)]
            found = sum(page in pool for page in pages for pool in readable)
            assert not found, f"{found} pages that only {victim.guest.name} has are in a pool of the hostile QEMU"
        law.run("detach", hostile.source)
        law.leave()


def _pool_files(pid: int) -> dict[Path, os.stat_result]:
    found = {}
    for folder in ("map_files", "fd"):
        for entry in Path(f"/proc/{pid}/{folder}").iterdir():
            with contextlib.suppress(OSError):
                if os.fspath(entry.readlink()).startswith("/memfd:memshr-pool"):
                    found[entry] = entry.stat()
    return found


def _readable_pools(pid: int) -> list[bytes]:
    by_inode = {status.st_ino: path for path, status in _pool_files(pid).items()}
    return [path.read_bytes() for path in by_inode.values()]


# -- what it says ------------------------------------------------------------------------------------------------------

ESCAPES: Final = r"\u001b[2J\u001b]0;owned\u0007\r\u202e[bold]x[/bold][/]"
_DEEP: Final = "[" * 100_000 + "]" * 100_000
_WRONG: Final = (
    *("null", "true", "-1", "1e400", "NaN", '""', f'"{ESCAPES}"', "[]", "{}", "[[]]", "[null]", "[{}]", "5" * 5000),
    *(_DEEP, '{"a":' * 50_000 + "1" + "}" * 50_000, '"\\ud800"', '{"status": null}', '{"status": {}}'),
)
_MANY_RANGES: Final = 'FlatView #0\\r\\n AS \\"memory\\", root: system\\r\\n' + "".join(
    f"  {at * 8192:016x}-{at * 8192 + 4095:016x} (prio 0, ram): pc.ram\\r\\n" for at in range(50_000)
)


def _view(*ranges: tuple[int, int]) -> str:
    lines = "".join(f"  {first:016x}-{last:016x} (prio 0, ram): pc.ram\\r\\n" for first, last in ranges)
    return f'"FlatView #0\\r\\n AS \\"memory\\", root: system\\r\\n{lines}"'


ODD: Final[dict[str, tuple[tuple[str, str], ...]]] = {
    "query-status": (
        ("return", f'{{"status": "{ESCAPES}", "running": true}}'),
        ("return", '{"status": ["running"], "running": "no"}'),
        ("return", f'{{"status": "{"r" * 1_000_000}", "running": true}}'),
    ),
    "query-migrate": (("return", '{"status": ["active"]}'), ("return", f'{{"status": "{ESCAPES}"}}')),
    "query-memdev": (("return", '[{"id": 5}]'), ("return", '[{"id": {"a": 1}}]'), ("return", '["id"]')),
    "hmp:info mtree": (
        ("return", _view((0, (1 << 64) - 1))),
        ("return", _view((1 << 63, (1 << 63) + 4095))),
        ("return", _view((4096, 0))),
        ("return", _view((0, (16 << 20) - 1), (0, (16 << 20) - 1))),
        ("return", _view((0, (16 << 20) - 1), (4096, (8 << 20) - 1))),
        ("return", _view((0, (1 << 52) - 1))),
        ("return", f'"{_MANY_RANGES}"'),
    ),
    "hmp:gpa2hva": (
        ("return", '"is 0x0"'),
        ("return", '"is 0x1001"'),
        ("return", '"is 0xffffffffffffffff"'),
        ("return", '"is 0xffffffff81000000"'),
        ("return", f'"is 0x{"f" * 5000}"'),
        ("return", f'"{ESCAPES}"'),
    ),
    "query-memory-devices": (("return", '[{"type": 5}]'), ("return", '[{"type": ["virtio-mem"]}]')),
    "qom-list": (
        ("return", f'[{{"name": "{ESCAPES}", "type": "child<virtio-balloon-pci>"}}]'),
        ("return", '[{"name": 5, "type": 7}]'),
        ("return", '[{"name": "x"}]'),
    ),
    "qom-get:confidential-guest-support": (),
    "query-sev": (("return", '{"enabled": "perhaps"}'),),
    "query-named-block-nodes": (
        ("return", '[{"cache": null}]'),
        ("return", '[{"cache": {"direct": "perhaps"}}]'),
        ("return", '[{"cache": []}]'),
    ),
    "qmp_capabilities": (),
    "query-version": (),
    "transaction": (),
    "add-fd": (
        ("return", '{"fd": -1}'),
        ("return", '{"fd": 1e30}'),
        ("return", '{"fd": "0"}'),
        ("return", '{"fd": 2}'),
    ),
    "remove-fd": (),
    "getfd": (),
    "closefd": (),
    "greeting": (("raw", f'{{"QMP": "{ESCAPES}"}}'), ("raw", '{"QMP": null}'), ("raw", "")),
}
"""a question of memshr -> answers that are no proper answer to it, besides those that are none to any question"""

_REFUSALS: Final = ("null", "5", "{}", '{"class": 5, "desc": []}', f'{{"class": "{ESCAPES}", "desc": "{ESCAPES}"}}')
_NO_ANSWERS: Final = ("not JSON", "[]", "5", "null", '{"return": 1', "\x00\x01\x1b[2J")


def _odd_answers(command: str) -> list[str]:
    first, rest = list(ODD[command]), []
    if command != "greeting":
        rest += [("return", wrong) for wrong in _WRONG] + [("error", refusal) for refusal in _REFUSALS]
    rest += [("raw", line) for line in (*_NO_ANSWERS, _DEEP)]
    rest += [("hangup", ""), ("twice", ""), ("wrong-id", ""), ("events", "2000")]
    return [spoil(command, kind, payload) for kind, payload in [*first, *rest]]


@contextlib.contextmanager
def _naming_the_culprits(law: Law) -> Iterator[None]:
    # What many odd guests together brought about is tried again with each alone, so that the text says which.
    try:
        yield
    except AssertionError as together:
        culprits = []
        for odd in law.hostile:
            try:
                outcome = Law(law.victims, [odd]).run("status", odd.source)
                assert outcome.code == 0, str(outcome)
            except AssertionError as alone:
                culprits.append(f"{odd.answers[0][:120]!r}: {str(alone).splitlines()[0][-200:]}")
        raise AssertionError("\n".join([str(together).splitlines()[0], *culprits])) from together


@pytest.mark.parametrize("command", ODD)
def test_one_odd_guest_is_one_row_of_status(command: str, victims: Victims) -> None:
    with ExitStack() as ending:
        odd = [ending.enter_context(hostile_qemu(answers=[line], memory_mib=8)) for line in _odd_answers(command)]
        law = Law(victims, odd)
        sources = [*(each.source for each in odd), *victims.sources]
        with _naming_the_culprits(law):
            shown = law.run("status", *sources)
            assert shown.code == 0, f"one odd guest ended the look at all: {shown}"
            rows = {row["pid"]: row for row in law.run("status", *sources, "--json").json}
            assert set(rows) == {int(source.removeprefix("qemu:")) for source in sources}
            for victim in victims.pair:
                assert rows[victim.guest.pid]["refusals"] == []


@pytest.mark.parametrize("command", ODD)
def test_odd_answers_to_every_command(command: str, victims: Victims) -> None:
    """All odd guests are in one command with the victims; those that are not left alone at once get into its work."""
    with ExitStack() as ending:
        odd = [ending.enter_context(hostile_qemu(answers=[line], memory_mib=8)) for line in _odd_answers(command)]
        law = Law(victims, odd)
        sources = [*(each.source for each in odd), *victims.sources]
        law.run("share", *sources, "--group", "all")
        for action in ("audit", "unshare", "detach"):
            law.run(action, *sources)
        law.leave()


@pytest.mark.parametrize("command", ["greeting", "query-memdev", "hmp:info mtree", "hmp:gpa2hva"])
def test_odd_answers_to_an_estimate(command: str, victims: Victims) -> None:
    """One by one: an estimate that cannot look into one of its sources ends."""
    for line in _odd_answers(command):
        with hostile_qemu(answers=[line], memory_mib=8) as odd:
            Law(victims, [odd]).run("estimate", odd.source)


NEVER: Final = (
    *(("silent", ""), ("trickle", ""), ("endless", ""), ("events", ""), ("huge", "2000"), ("late", "20")),
    ("raw", "{}"),
)


@pytest.mark.parametrize("command", ["greeting", "query-status"])
@pytest.mark.parametrize(("kind", "payload"), NEVER, ids=[kind for kind, _ in NEVER])
def test_answers_that_do_not_end(command: str, kind: str, payload: str, victims: Victims) -> None:
    with hostile_qemu(answers=[spoil(command, kind, payload)]) as hostile:
        law = Law(victims, [hostile])
        sources = [hostile.source, *victims.sources]
        rows = {row["pid"]: row for row in law.run("status", *sources, "--json").json}
        for victim in victims.pair:
            assert rows[victim.guest.pid]["refusals"] == []
        law.run("share", *sources, "--group", "all")
        law.leave()


@pytest.mark.parametrize("action", ["estimate", "audit", "unshare", "detach"])
def test_no_answer_where_its_memory_is(action: str, victims: Victims) -> None:
    with hostile_qemu(answers=[spoil("hmp:info mtree", "silent")]) as hostile:
        Law(victims, [hostile]).run(action, hostile.source, *victims.sources)


@pytest.mark.parametrize("command", ["add-fd", "getfd", "closefd", "remove-fd", "transaction"])
@pytest.mark.parametrize("kind", ["silent", "endless"])
def test_answers_that_do_not_end_while_a_guest_is_attached(command: str, kind: str, victims: Victims) -> None:
    with hostile_qemu(answers=[spoil(command, kind)]) as hostile:
        law = Law(victims, [hostile])
        sources = [hostile.source, *victims.sources]
        law.run("share", *sources, *CREW)
        law.run("detach", *sources)
        law.leave()


NAMES: Final = {
    "escapes": "\x1b[2J\x1b]0;owned\x07\r\u202e[bold]x[/bold][/]",
    "long": "n" * 100_000,
    "empty": "",
    "no text": "\udcff\udcfe",
    "line ends": "a\nmemshr: all is well\n",
}


@pytest.mark.parametrize("name", NAMES.values(), ids=NAMES)
def test_odd_names(name: str, victims: Victims) -> None:
    with hostile_qemu(name=name) as hostile:
        _every_command(Law(victims, [hostile]), hostile)


def test_a_guest_that_is_called_like_the_number_of_another(victims: Victims) -> None:
    with hostile_qemu(name=str(victims.pair[0].guest.pid)) as hostile:
        law = Law(victims, [hostile])
        report = law.run("share", *victims.sources, "--group", "all")
        assert report.code == 0, f"a name keeps another guest from being meant: {report}"
        [row] = law.run("status", victims.sources[0], "--json").json
        assert row["pid"] == victims.pair[0].guest.pid
        law.leave()


# -- whose socket it names ---------------------------------------------------------------------------------------------


class OthersSocket:
    """A QMP socket of root's. ``heard`` is what was said to it: nothing, if memshr looks whose it is."""

    def __init__(self) -> None:
        self.folder = tempfile.TemporaryDirectory(prefix="memshr-others-")
        self.path = Path(self.folder.name) / "qmp"
        self.heard = b""
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.bind(os.fspath(self.path))
        self._socket.listen()
        self._thread = threading.Thread(target=self._serve)
        self._thread.start()

    def _serve(self) -> None:
        while True:
            try:
                client, _ = self._socket.accept()
            except OSError:
                return
            with client, contextlib.suppress(OSError):
                client.sendall(b'{"QMP": {"version": {}, "capabilities": []}}\r\n')
                while said := client.recv(1 << 16):
                    self.heard += said
                    client.sendall(b'{"return": {}}\r\n')

    def __enter__(self) -> OthersSocket:
        return self

    def __exit__(self, *_: object) -> None:
        self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()
        self._thread.join()
        self.folder.cleanup()


def test_the_socket_of_another(victims: Victims) -> None:
    with OthersSocket() as others, hostile_qemu(qmp_path=others.path) as hostile:
        _every_command(Law(victims, [hostile]), hostile)
        assert others.heard == b"", "memshr gave commands to a socket that is another's"


def test_a_link_to_the_socket_of_another(victims: Victims) -> None:
    with OthersSocket() as others, hostile_qemu(qmp_path=Path(f"{others.path}-link")) as hostile:
        Path(f"{others.path}-link").symlink_to(others.path)
        _every_command(Law(victims, [hostile]), hostile)
        assert others.heard == b"", "memshr gave commands to a socket that is another's"


def test_an_absolute_link_in_a_root_of_its_own(victims: Victims) -> None:
    with OthersSocket() as others, hostile_qemu(qmp_path=Path("/qmp"), own_root=True) as hostile:
        (hostile.folder / "qmp").symlink_to(others.path)
        _every_command(Law(victims, [hostile]), hostile)
        assert others.heard == b"", "memshr followed a link of the guest's root in the host's"
