"""memshr is killed at random instants: guests keep their own correct memory, the next memshr finds the truth (I11)."""

import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path

from guests.kit import LinuxKit
from guests.ksm import FULL_SPEED, SETTINGS, ksm_at_work
from live.command_campaign import command_campaign
from live.kill_campaign import TESTS, campaign, split
from live.parts import needed_parts

KILLS = int(os.environ.get("MEMSHR_KILLS", "60"))
WORKERS, COMMANDS = split(KILLS)


def test_guests_survive_the_death_of_memshr_at_any_instant(qemu: Path) -> None:
    outcome = campaign(qemu, WORKERS)
    assert outcome.kills == WORKERS
    assert outcome.good, str(outcome)


def test_guests_survive_the_death_of_a_command_at_any_instant(kit: LinuxKit) -> None:
    with needed_parts():
        outcome = command_campaign(kit, COMMANDS)
    assert outcome.good, str(outcome)
    assert outcome.kills == COMMANDS


def test_ksm_is_as_it_was_also_when_its_user_is_killed() -> None:
    program = (
        "import os, signal\n"
        "from guests.ksm import ksm_at_work\n"
        "with ksm_at_work():\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    with needed_parts(), ksm_at_work():
        assert (SETTINGS / "run").read_text() == "1\n"
    names = [name for name in FULL_SPEED if (SETTINGS / name).exists()]
    folder = os.open(SETTINGS, os.O_RDONLY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        before = {name: (SETTINGS / name).read_text() for name in names}
        fcntl.flock(folder, fcntl.LOCK_UN)
        environment = os.environ | {"PYTHONPATH": os.fspath(TESTS)}
        done = subprocess.run([sys.executable, "-c", program], env=environment, check=False)
        assert done.returncode == -signal.SIGKILL
        fcntl.flock(folder, fcntl.LOCK_EX)  # whoever puts them back has it as long
        assert {name: (SETTINGS / name).read_text() for name in names} == before
    finally:
        os.close(folder)
