"""The state machine of two guests on two real QEMU processes."""

from pathlib import Path

from live.qemu_host import QtestHost, booted
from two_guests import run


def test_two_guests_and_a_model_agree(qemu: Path) -> None:
    with booted(qemu, "machine-1", "machine-2") as guests:
        run(lambda: QtestHost(guests), examples=25)
