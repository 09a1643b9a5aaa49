"""The mechanism on QEMU guests under the contract kit, on the stand-in for kernel and agent."""

from collections.abc import Callable

import pytest

from memshr.qemu import attachment
from memshr.qemu.target import Target
from memshr.testing import CONTRACT, GuestHost, check_hypervisor
from standin.machine import StandInMachine, StandInTarget, running


@pytest.fixture(params=["this kernel", "older kernel"])
def machine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> StandInMachine:
    """Two guests; once on a kernel that lacks what newer ones have."""
    made = StandInMachine("one", "two")
    old = request.param == "older kernel"
    made.kernel.protects_what_is_not_there = not old
    monkeypatch.setattr(attachment, "MAPPING_OVER_IS_SAFE", not old)
    return made


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_qemu_keeps_the_contract_on_the_stand_in(check: Callable[[GuestHost], None], machine: StandInMachine) -> None:
    with machine, running(machine) as host:
        check(host)


def test_qemu_keeps_the_whole_contract_on_one_host_of_the_stand_in(machine: StandInMachine) -> None:
    with machine, running(machine) as host:
        check_hypervisor(host)


def test_the_stand_in_answers_everything_that_is_asked_of_a_target() -> None:
    public = {name for name, value in vars(Target).items() if callable(value) and not name.startswith("_")}
    assert public <= vars(StandInTarget).keys()
