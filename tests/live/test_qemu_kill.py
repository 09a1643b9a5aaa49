"""memshr is killed at random instants: guests keep their own correct memory, the next memshr finds the truth (I11)."""

import os
from pathlib import Path

from live.kill_campaign import campaign

KILLS = int(os.environ.get("MEMSHR_KILLS", "50"))


def test_guests_survive_the_death_of_memshr_at_any_instant(qemu: Path) -> None:
    outcome = campaign(qemu, KILLS)
    assert outcome.kills == KILLS
    assert outcome.good, outcome
