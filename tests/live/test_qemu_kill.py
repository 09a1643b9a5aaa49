"""memshr is killed at random instants: guests keep their own correct memory, the next memshr finds the truth (I11)."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from guests.qtest import QtestGuest
from live.qemu_host import FIRST_GFN, QtestHost, booted
from memshr.types import PAGE_SIZE

PAGES = 1500
KILLS = int(os.environ.get("MEMSHR_KILLS", "50"))
LONGEST_LIFE_S = 0.4
TESTS = Path(__file__).parents[1]


class Player:
    """Plays guests that rewrite a few pages all the time, and knows what each page must hold."""

    def __init__(self, guests: list[QtestGuest], seed: int) -> None:
        self.guests = guests
        self.chance = random.Random(seed)
        made = np.random.default_rng(seed)
        self.patterns = [bytes(PAGE_SIZE), *(made.bytes(PAGE_SIZE) for _ in range(3))]
        self.contents = [[self.chance.choice(self.patterns) for _ in range(PAGES)] for _ in guests]
        for guest, contents in zip(guests, self.contents, strict=True):
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


def test_guests_survive_the_death_of_memshr_at_any_instant(qemu: Path) -> None:
    chance = random.Random(KILLS)
    with booted(qemu, "kill-1", "kill-2") as guests:
        player = Player(guests, seed=7)
        for kill in range(KILLS):
            command = [sys.executable, "-m", "live.sharing_worker", str(kill), str(FIRST_GFN), str(PAGES)]
            environment = {**os.environ, "PYTHONPATH": os.fspath(TESTS)}
            with subprocess.Popen(
                [*command, *(str(guest.pid) for guest in guests)], stdout=subprocess.PIPE, env=environment
            ) as worker:
                assert worker.stdout is not None
                assert worker.stdout.readline() == b"ready\n"
                end = time.monotonic() + chance.uniform(0, LONGEST_LIFE_S)
                while time.monotonic() < end:
                    player.write_one()
                assert worker.poll() is None, "the worker ended by itself"
                worker.send_signal(signal.SIGKILL)
            for _ in range(20):  # nobody may be left waiting
                player.write_one()
            assert player.wrong_pages() == [], f"after kill {kill}"
        with QtestHost(guests) as host:
            report = host.hypervisor.audit()
            assert report.clean, report
            for domid in host.domids:
                host.hypervisor.detach(domid)
        assert player.wrong_pages() == []
        assert all("memshr" not in Path(f"/proc/{guest.pid}/maps").read_text() for guest in guests)
