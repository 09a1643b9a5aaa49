"""A campaign of kills: memshr dies at random instants, again and again, while two guests write into their memory.

What dies here is a worker that does nothing but share and unshare, which costs a third of a second a kill;
``command_campaign`` kills the commands themselves, which costs some seconds. ``python -m live.kill_campaign COUNT``
does both: of four kills three are of workers and one is of a command. It prints a line every 50 kills and a summary of
each part; the tests do a small campaign.
"""

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import NoReturn

import numpy as np

from guests.kit import MissingPartError, linux_kit, need_root
from guests.qtest import QtestGuest
from live.command_campaign import Outcome as CommandOutcome
from live.command_campaign import command_campaign
from live.qemu_host import FIRST_GFN, QtestHost, booted
from memshr.types import PAGE_SIZE

PAGES = 1500
LONGEST_LIFE_S = 0.4
WRITES_AFTER_DEATH = 20
TELL_EVERY = 50
TESTS = Path(__file__).parents[1]


@dataclass(slots=True)
class Outcome:
    """What a campaign found. All but ``kills`` and ``clean_audits``, which are equal then, must be 0.

    ``guest_errors`` are pages of guests that did not read as they were last written; ``leftovers`` guests in which
    something of memshr was left after the detach at the end.
    """

    kills: int = 0
    guest_errors: int = 0
    clean_audits: int = 0
    leftovers: int = 0
    first_trouble: str = ""

    @property
    def good(self) -> bool:
        """Whether nothing was found."""
        return self.guest_errors == self.leftovers == 0 and self.clean_audits == self.kills

    def note(self, trouble: str) -> None:
        """Keep the first trouble: the others may come of it."""
        self.first_trouble = self.first_trouble or f"after kill {self.kills}: {trouble}"

    def __str__(self) -> str:
        text = f"{self.kills} kills of workers: {self.guest_errors} guest errors, {self.clean_audits} audits clean"
        return f"{text}; {self.first_trouble}" if self.first_trouble else text


class Player:
    """Plays guests that rewrite a few pages all the time, and knows what each page must hold."""

    def __init__(self, guests: list[QtestGuest], seed: int) -> None:
        self.guests = guests
        self.chance = random.Random(seed)
        made = np.random.default_rng(seed)
        self.patterns = [bytes(PAGE_SIZE), *(made.bytes(PAGE_SIZE) for _ in range(3))]
        self.contents = [[self.chance.choice(self.patterns) for _ in range(PAGES)] for _ in guests]
        self.fill()

    def fill(self) -> None:
        """Write every page as it must be."""
        for guest, contents in zip(self.guests, self.contents, strict=True):
            guest.write(FIRST_GFN * PAGE_SIZE, b"".join(contents))

    def write_one(self) -> None:
        """One guest writes into one page: a whole page, or some bytes of it."""
        which, page = self.chance.randrange(len(self.guests)), self.chance.randrange(PAGES)
        new = self.chance.choice(self.patterns)
        if self.chance.random() < 0.3:
            new = self.contents[which][page][:2000] + self.chance.randbytes(8) + self.contents[which][page][2008:]
        self.guests[which].write((FIRST_GFN + page) * PAGE_SIZE, new)
        self.contents[which][page] = new

    def wrong_pages(self) -> list[tuple[str, int]]:
        """The pages that do not read as they were last written."""
        wrong = []
        for guest, contents in zip(self.guests, self.contents, strict=True):
            found = guest.read(FIRST_GFN * PAGE_SIZE, PAGES * PAGE_SIZE)
            wrong += [
                (guest.name, page)
                for page in range(PAGES)
                if found[page * PAGE_SIZE : (page + 1) * PAGE_SIZE] != contents[page]
            ]
        return wrong


def campaign(qemu: Path, kills: int, tell: Callable[[str], None] = lambda _: None) -> Outcome:
    """Start a memshr, kill it at a random instant, look at every page, audit as the next memshr; ``kills`` times.

    :param tell: told how it stands, every 50 kills.
    """
    chance = random.Random(kills)
    outcome = Outcome()
    with booted(qemu, "kill-1", "kill-2") as guests:
        player = Player(guests, seed=7)
        for number in range(kills):
            _live_and_die(guests, player, number, chance.uniform(0, LONGEST_LIFE_S))
            outcome.kills += 1
            for _ in range(WRITES_AFTER_DEATH):  # nobody may be left waiting
                player.write_one()
            if wrong := player.wrong_pages():
                outcome.guest_errors += len(wrong)
                outcome.note(f"page {wrong[0][1]} of {wrong[0][0]} is wrong")
                player.fill()  # so that one error is counted once
            with QtestHost(guests) as host:
                report = host.hypervisor.audit()
                outcome.clean_audits += report.clean
                if not report.clean:
                    outcome.note(str(report.findings[0]))
            if outcome.kills % TELL_EVERY == 0:
                tell(str(outcome))
        with QtestHost(guests) as host:
            for domid in host.domids:
                host.hypervisor.detach(domid)
        outcome.guest_errors += len(player.wrong_pages())
        outcome.leftovers = sum("memshr" in Path(f"/proc/{guest.pid}/maps").read_text() for guest in guests)
    return outcome


def _live_and_die(guests: list[QtestGuest], player: Player, seed: int, life_s: float) -> None:
    command = [sys.executable, "-m", "live.sharing_worker", str(seed), str(FIRST_GFN), str(PAGES)]
    path = os.pathsep.join(filter(None, [os.fspath(TESTS), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path}
    with subprocess.Popen(
        [*command, *(str(guest.pid) for guest in guests)], stdout=subprocess.PIPE, env=environment
    ) as worker:
        assert worker.stdout is not None
        assert worker.stdout.readline() == b"ready\n"
        end = time.monotonic() + life_s
        while time.monotonic() < end:
            player.write_one()
        assert worker.poll() is None, "the worker ended by itself"
        worker.send_signal(signal.SIGKILL)


def split(kills: int) -> tuple[int, int]:
    """How many of a campaign's kills are of workers, and how many of commands."""
    commands = kills // 4
    return kills - commands, commands


def _interrupt(_signal: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that guests end and their folders are removed.
    sys.exit(128 + signal.SIGTERM)


def main() -> int:
    """Run a campaign; 0 if nothing was found, 1 if something was, 2 if this machine cannot have one."""
    signal.signal(signal.SIGTERM, _interrupt)
    workers, commands = split(int(sys.argv[1]))

    def tell(line: str) -> None:
        print(line, flush=True)

    try:
        need_root("the memory of other processes")
        kit = linux_kit()
        parts: list[Callable[[], Outcome | CommandOutcome]] = [
            lambda: campaign(kit.qemu, workers, tell),
            lambda: command_campaign(kit, commands, tell),
        ]
        good = True
        for part in parts:
            begin = time.monotonic()
            outcome = part()
            good &= outcome.good
            tell(f"{'nothing found' if outcome.good else 'FAILED'} in {time.monotonic() - begin:.0f} s; {outcome}")
    except MissingPartError as missing:
        print(f"soak: {missing}", file=sys.stderr)
        return 2
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
