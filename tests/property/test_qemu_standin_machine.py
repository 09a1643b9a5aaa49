"""The state machine of two guests on the stand-in for kernel and agent, which it keeps true."""

import pytest

from memshr.qemu import attachment
from standin.machine import StandInHost, StandInMachine
from two_guests import run


@pytest.mark.parametrize("old", [False, True], ids=["this kernel", "older kernel"])
def test_two_guests_and_a_model_agree_on_the_stand_in(old: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attachment, "MAPPING_OVER_IS_SAFE", not old)
    with StandInMachine("one", "two", pages=0x400 + 1100) as machine:
        machine.kernel.protects_what_is_not_there = not old
        run(lambda: StandInHost(machine), examples=10)
