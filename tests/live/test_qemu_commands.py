"""The commands on running guests, as an operator gives them: what they print, and that the guests notice nothing."""

import json
import os
import signal
import time
from pathlib import Path

import numpy as np
import pytest

from guests.linux import LinuxGuest
from live.commands import finish, memshr, start
from live.qemu_host import FIRST_GFN, booted
from memshr.types import PAGE_SIZE

Pair = tuple[LinuxGuest, LinuxGuest]


@pytest.fixture
def sources(guest_pair: Pair) -> list[str]:
    """The pair as an operator names it: by pid and QMP socket."""
    return [f"qemu:{guest.pid}" for guest in guest_pair]


def test_the_whole_story(guest_pair: Pair, sources: list[str]) -> None:
    names = {guest.name for guest in guest_pair}
    for guest in guest_pair:
        guest.pause()
    expected = memshr("estimate", *sources, "--group", "all")
    for guest in guest_pair:
        guest.resume()
        guest.wait_rounds(1, ("files", "checker"))
    maps = [Path(f"/proc/{guest.pid}/maps").read_text() for guest in guest_pair]
    assert not any("memfd:memshr" in each for each in maps), "an estimate puts nothing into a guest"

    report = memshr("share", *sources, "--group", "all", "--huge-share", "0")
    assert report["audit_findings"] == []
    assert 0.5 * expected["saved_pages"] < report["saved_pages"] < 1.2 * expected["saved_pages"]
    assert report["host"]["counted_bytes"] == report["saved_pages"] * 4096
    status = {each["name"]: each for each in memshr("status", *sources)}
    assert status.keys() == names
    assert {each["sharing_pages"] > 1000 for each in status.values()} == {True}
    assert memshr("audit", *sources)["findings"] == []

    first, second = guest_pair
    [unshared] = memshr("unshare", f"qemu:{first.pid}")["guests"]
    assert (unshared["name"], unshared["pid"]) == (first.name, first.pid)
    assert unshared["unshared_pages"] > 1000
    memshr("detach", *sources)
    for guest in (first, second):
        assert "memfd:memshr" not in Path(f"/proc/{guest.pid}/maps").read_text()


def test_guests_of_the_same_name_are_told_apart_by_their_pids(qemu: Path) -> None:
    with booted(qemu, "twin", "twin") as twins:
        sources = [f"qemu:{guest.pid}" for guest in twins]
        for guest in twins:
            guest.write(FIRST_GFN * PAGE_SIZE, np.random.default_rng(1).bytes(64 * PAGE_SIZE))
        alone = memshr("share", *sources, "--huge-share", "0")
        assert alone["inter_pages"] == 0, "without --group each guest is a trust group of its own"
        memshr("detach", *sources)
        report = memshr("share", *sources, "--group", "all", "--huge-share", "0")
        assert report["inter_pages"] >= 64
        assert report["audit_findings"] == []
        undone = memshr("detach", *sources)["guests"]
        assert [(each["name"], each["pid"]) for each in undone] == [("twin", guest.pid) for guest in twins]
        assert all(each["unshared_pages"] >= 64 for each in undone)


def test_ctrl_z_does_not_stop_what_guests_wait_for(sources: list[str]) -> None:
    with start("share", *sources, "--group", "all", "--json") as command:
        end = time.monotonic() + 60
        while command.poll() is None and time.monotonic() < end:
            if ignores(command.pid, signal.SIGTSTP):
                os.kill(command.pid, signal.SIGTSTP)
            time.sleep(0.01)
        out, err = finish(command)
    assert (command.returncode, err) == (0, "")
    assert json.loads(out)["stopped"] is None
    memshr("detach", *sources)


def ignores(pid: int, number: int) -> bool:
    """Whether a process ignores a signal, as proc(5) shows it."""
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False
    ignored = next((line.split()[1] for line in status.splitlines() if line.startswith("SigIgn:")), "0")
    return bool(int(ignored, 16) >> (number - 1) & 1)
