"""A campaign of kills of what people run: ``memshr share``, ``unshare`` and ``detach`` die at random instants.

The guests are Linux and check their own memory: one rewrites it all the time, one reads a drive past the page cache
into it (``cache=none``: the host writes into guest RAM by DMA), one is paused. In the second half KSM is at work.

A guest that was stopped and continued is seen in QEMU's own trace of its states: a QMP connection that waited for
events would keep open what QEMU closes when the last monitor hangs up.
"""

import os
import random
import signal
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from guests.asitwas import Snapshot
from guests.kit import LinuxKit
from guests.ksm import ksm_at_work
from guests.linux import LinuxGuest, drive_arguments
from guests.machine import GuestFailedError, wait_until
from live.commands import CommandFailedError, finish, memshr, start

MEMORY_MIB = 192
CHECKER_PAGES = 2048
FILES = 8
READERS = ("reader1", "reader2")
COMMANDS = ("share", "share", "unshare", "detach")
"""drawn from; half of them share"""
STATE_DEADLINE_S = 10.0
GUEST_NICE = 10
"""two guests that never rest would leave little of two processors to memshr, and nothing to KSM"""
TELL_EVERY = 50
MOST_SURVIVORS = 20
"""how often a command may end before it is killed"""


@dataclass(slots=True)
class Outcome:
    """What a campaign found. But for ``kills`` and ``clean_audits``, which are equal then, these must be 0.

    ``guest_errors`` are complaints of guests about their memory or their kernel; ``misplaced`` counts guests that did
    not run, or were not paused, as before a kill; ``failed`` commands that ended with an error of their own;
    ``leftovers`` guests in which something of memshr was left after the detach at the end.

    ``stops``, of running guests only, and ``merged_pages``, the most that KSM had at a time, are told and not judged.
    """

    kills: int = 0
    guest_errors: int = 0
    misplaced: int = 0
    failed: int = 0
    clean_audits: int = 0
    leftovers: int = 0
    stops: int = 0
    merged_pages: int = 0
    killed: dict[str, int] = field(default_factory=dict)
    first_trouble: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        found = self.guest_errors + self.misplaced + self.failed + self.leftovers
        return found == 0 and self.clean_audits == self.kills

    def note(self, trouble: str) -> None:
        """Keep the first trouble: the others may come of it."""
        self.first_trouble = self.first_trouble or f"after kill {self.kills}: {trouble}"

    def __str__(self) -> str:
        which = ", ".join(f"{count} of {name}" for name, count in sorted(self.killed.items()))
        text = (
            f"{self.kills} kills of commands ({which}): {self.guest_errors} guest errors, {self.misplaced} guests not"
            f" running or paused as before, {self.failed} commands failed, {self.clean_audits} audits clean,"
            f" {self.leftovers} leftovers; guests were stopped {self.stops} times; KSM had {self.merged_pages} pages"
        )
        return f"{text}; {self.first_trouble}" if self.first_trouble else text


@dataclass(slots=True)
class Watched:
    """A guest, the programs that check its memory, and the state that it must be in."""

    guest: LinuxGuest
    programs: tuple[str, ...]
    state: str = "running"
    complaints: int = 0
    resumed: int = 1
    """how often we have let it run; QEMU did so first"""

    def is_in_place(self) -> bool:
        """Whether it runs, or is paused and was not let run by anybody else."""
        if self.state == "paused" and self.changes_to("running") != self.resumed:
            return False
        return bool(self.guest.execute("query-status")["status"] == self.state)

    def resume(self) -> None:
        """Let it run."""
        self.guest.resume()
        self.resumed = self.changes_to("running")

    def put_in_place(self) -> None:
        """Let it run, or pause it, as it must."""
        self.resume()
        if self.state == "paused":
            self.guest.pause()

    def changes_to(self, state: str) -> int:
        """How often in its life it went into this state, whoever was the cause."""
        return (self.guest.folder / "trace").read_text().count(f"({state})\n")

    def new_complaints(self) -> list[str]:
        """What its programs and its kernel said against their memory since we asked last."""
        found = self.guest.mismatches()[self.complaints :]
        self.complaints += len(found)
        return found


@contextmanager
def watched_guests(kit: LinuxKit) -> Iterator[list[Watched]]:
    """The guests of a campaign, at work."""
    with ExitStack() as ending:

        def boot(name: str, arguments: tuple[str, ...] = ()) -> LinuxGuest:
            guest = ending.enter_context(LinuxGuest(name, kit, memory_mib=MEMORY_MIB))
            return guest.boot([*arguments, "-trace", "runstate_set", "-D", os.fspath(guest.folder / "trace")])

        busy, drive, paused = boot("soak-busy"), boot("soak-drive", drive_arguments("native")), boot("soak-paused")
        for seed, guest in enumerate((busy, drive, paused), 1):
            guest.wait_ready()
            guest.start_checker(CHECKER_PAGES, seed=seed)
        busy.start_files(FILES)
        for seed in range(1, len(READERS) + 1):
            drive.start_reader(seed=seed)
        guests = [
            Watched(busy, ("checker", "files")),
            Watched(drive, ("checker", *READERS)),
            Watched(paused, ("checker",), "paused"),
        ]
        for each in guests:
            each.guest.wait_rounds(1, each.programs)
            for thread in Path(f"/proc/{each.guest.pid}/task").iterdir():
                os.setpriority(os.PRIO_PROCESS, int(thread.name), GUEST_NICE)
        paused.pause()
        if guests[2].changes_to("paused") != 1:
            raise GuestFailedError("QEMU's trace does not show that a guest was paused")
        yield guests


def command_campaign(kit: LinuxKit, kills: int, tell: Callable[[str], None] = lambda _: None) -> Outcome:
    """Kill a command at a random instant, look at every guest, audit; ``kills`` times.

    :param tell: told how it stands, every 50 kills.
    :raises MissingPartError: this machine lacks a part. :raises GuestFailedError: a guest does not come up.
    """
    with watched_guests(kit) as guests:
        return _Campaign(guests, random.Random(kills), tell).run(kills)


class _Campaign:
    # The kills of one campaign, in order.

    def __init__(self, guests: list[Watched], chance: random.Random, tell: Callable[[str], None]) -> None:
        self._guests = guests
        self._sources = [f"qemu:{each.guest.pid}" for each in guests]
        self._chance = chance
        self._tell = tell
        self._outcome = Outcome(killed=dict.fromkeys(COMMANDS, 0))
        self._startup_s = 0.0
        self._whole_s: dict[str, float] = {}

    def run(self, kills: int) -> Outcome:
        # What was found; a guest that does not answer and a command that does not end are the end of the campaign.
        outcome = self._outcome
        try:
            self._learn()
            with ExitStack() as ksm:
                while outcome.kills < kills:
                    if outcome.kills == kills // 2:
                        self._look_at_paused()
                        ksm.enter_context(ksm_at_work())
                    self._kill_one()
                    self._judge()
                    if outcome.kills % TELL_EVERY == 0:
                        self._tell(str(outcome))
            self._look_at_paused()
            self._leave()
        except (GuestFailedError, CommandFailedError, TimeoutError) as trouble:
            outcome.failed += 1
            outcome.note(str(trouble))
        return outcome

    def _learn(self) -> None:
        # How long it takes until a command can have begun, and how long each takes in all.
        self._startup_s = _seconds(partial(_end_of, "--version"))
        for command in ("share", "unshare", "share", "detach"):
            self._whole_s[command] = _seconds(partial(self._run_whole, command))

    def _arguments(self, command: str) -> list[str]:
        more = ["--group", "all", "--huge-share", "0"] if command == "share" else []
        return [command, *self._sources, *more]

    def _run_whole(self, command: str) -> None:
        memshr(*self._arguments(command))

    def _kill_one(self) -> None:
        # Kill a command while it is at work. Before one that undoes there is something to undo.
        command = self._chance.choice(COMMANDS)
        for _ in range(MOST_SURVIVORS):
            if command != "share":
                self._run_whole("share")
            life_s = self._chance.uniform(self._startup_s / 2, self._whole_s[command])
            begin = time.monotonic()
            with start(*self._arguments(command)) as process:
                try:
                    process.wait(timeout=life_s)
                except subprocess.TimeoutExpired:
                    process.send_signal(signal.SIGKILL)
                    process.wait()
                else:
                    self._whole_s[command] = max(self._startup_s, time.monotonic() - begin)
            if process.returncode == -signal.SIGKILL:
                self._outcome.kills += 1
                self._outcome.killed[command] += 1
                return
            if process.returncode != 0:
                raise CommandFailedError(f"memshr {command} ended by itself with exit code {process.returncode}")
        raise CommandFailedError(f"memshr {command} ended {MOST_SURVIVORS} times before it could be killed")

    def _judge(self) -> None:
        # Every guest goes on as before, with its own memory, and the next memshr finds the truth.
        outcome = self._outcome
        for each in self._guests:
            try:
                wait_until(each.is_in_place, STATE_DEADLINE_S, f"guest {each.guest.name} is {each.state} as before")
            except GuestFailedError as trouble:
                outcome.misplaced += 1
                outcome.note(str(trouble))
                each.put_in_place()
        running = [each for each in self._guests if each.state == "running"]
        for each in running:
            each.guest.wait_rounds(1, each.programs)
        self._collect_complaints()
        findings = memshr("audit", *self._sources)["findings"]
        outcome.clean_audits += not findings
        if findings:
            outcome.note(f"audit: {findings[0]}")
        outcome.stops = sum(each.changes_to("paused") for each in running)
        outcome.merged_pages = max(outcome.merged_pages, sum(_merged_pages(each.guest.pid) for each in self._guests))

    def _collect_complaints(self) -> None:
        for each in self._guests:
            found = each.new_complaints()
            self._outcome.guest_errors += len(found)
            if found:
                self._outcome.note(f"guest {each.guest.name}: {found[0]}")

    def _look_at_paused(self) -> None:
        # Its programs look at its memory only while it runs.
        for each in self._guests:
            if each.state == "paused":
                each.resume()
                each.guest.wait_rounds(1, each.programs)
                each.guest.pause()
        self._collect_complaints()

    def _leave(self) -> None:
        self._run_whole("detach")
        for each in self._guests:
            try:
                wait_until(
                    partial(_is_left, each.guest.pid), STATE_DEADLINE_S, f"memshr leaves guest {each.guest.name}"
                )
            except GuestFailedError as trouble:
                self._outcome.leftovers += 1
                self._outcome.note(str(trouble))
            each.resume()
            each.guest.wait_rounds(1, each.programs)
        self._collect_complaints()


def _end_of(*arguments: str) -> None:
    with start(*arguments) as command:
        finish(command)


def _seconds(work: Callable[[], None]) -> float:
    begin = time.monotonic()
    work()
    return time.monotonic() - begin


def _is_left(pid: int) -> bool:
    # Whether no descriptor and no mapping of memshr's is in a process.
    facts = Snapshot.take(pid).facts
    return not any(sign in fact for fact in facts for sign in ("memfd:memshr", "userfaultfd"))


def _merged_pages(pid: int) -> int:
    # How many pages of a process KSM has merged (Linux 5.19); 0 where the kernel does not say.
    found = Path(f"/proc/{pid}/ksm_merging_pages")
    return int(found.read_text()) if found.exists() else 0
