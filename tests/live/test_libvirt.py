"""Guests of a real libvirt, which holds their QMP sockets: memshr's commands, as an operator gives them."""

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path

import pytest

from command_line import CommandLine
from guests.kit import LinuxKit
from guests.libvirt import Libvirt, LibvirtGuest
from guests.peculiar import process_status
from live.descriptors import memory_file, numbers_of
from live.parts import needed_parts
from memshr.errors import ConnectionLostError
from memshr.qemu.guests import inspect_process

OURS = os.getpid()
"""in the names of guests: nobody else's guest is called so, also where somebody else runs these tests"""
NAMES = (f"libvirt one {OURS}", f"libvirt-2-{OURS}")
"""libvirt allows blanks"""


@pytest.fixture(scope="module")
def libvirt(kit: LinuxKit) -> Iterator[Libvirt]:
    """A libvirt without guests."""
    with ExitStack() as ending:
        with needed_parts():
            running = ending.enter_context(Libvirt(kit.qemu))
        yield running


@pytest.fixture(scope="module")
def guests(kit: LinuxKit, libvirt: Libvirt) -> Iterator[list[LibvirtGuest]]:
    """Two guests that rewrite and check memory which is partly equal."""
    with ExitStack() as ending:
        booting = [ending.enter_context(LibvirtGuest(name, kit, libvirt).boot()) for name in NAMES]
        for seed, guest in enumerate(booting, 1):
            guest.wait_ready()
            guest.start_checker(4096, seed=seed)
        for guest in booting:
            guest.wait_rounds(1)
        yield booting


def test_guests_of_libvirt_share_and_go_on(
    guests: list[LibvirtGuest], libvirt: Libvirt, memshr: CommandLine, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirt.uri)
    sources = [f"qemu:{guest.name}" for guest in guests]
    for guest in guests:
        process = inspect_process(guest.pid)
        assert process is not None
        assert (process.name, process.qmp_path, process.libvirt) == (guest.name, None, True)
        assert process_status(guest.pid)["Seccomp"] == "2", "libvirt filters system calls unless told not to"
    before = json.loads(memshr("status", "--json", *sources).out)
    assert [(each["state"], each["refusals"]) for each in before] == [("running", [])] * 2
    assert [each["ram_bytes"] >> 20 for each in before] == [255, 255]

    assert json.loads(memshr("estimate", *sources, "--group", "all", "--json").out)["saved_pages"] > 2000
    shared = memshr("share", *sources, "--group", "all", "--json")
    assert (shared.code, shared.err) == (0, "")
    during = json.loads(memshr("status", "--json", *sources).out)
    assert [each["groups"] for each in during] == [["all (nobody)"]] * 2
    assert all(each["sharing_pages"] > 2000 for each in during)
    for guest in guests:
        guest.wait_rounds(2)
    assert memshr("audit", *sources).code == 0
    assert memshr("detach", *sources).code == 0
    for guest in guests:
        guest.wait_rounds(1)
        assert guest.mismatches() == []
        assert "memfd:memshr" not in Path(f"/proc/{guest.pid}/maps").read_text()
        assert "memshr" not in libvirt.virsh("qemu-monitor-command", guest.name, '{"execute":"query-fdsets"}')
        assert "custom monitor" in libvirt.virsh("dominfo", guest.name)


def test_descriptor_is_handed_to_a_paused_guest_and_closed_at_once(
    guests: list[LibvirtGuest], libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirt.uri)
    guest = guests[0]
    process = inspect_process(guest.pid)
    assert process is not None
    libvirt.virsh("suspend", guest.name)
    try:
        with memory_file() as (file, name), process.monitor() as monitor:
            assert not monitor.runs()
            monitor.hand_over(file)
            assert len(numbers_of(guest, name)) == 1
            monitor.take_back()
            assert numbers_of(guest, name) == []
            monitor.take_back()
            monitor.drain(30)
    finally:
        libvirt.virsh("resume", guest.name)


@pytest.mark.parametrize(
    ("uri", "words"),
    [
        ("test:///default", "does not know guest"),  # the driver of libvirt's own tests has no such domain
        ("qemu+unix:///system?socket=/nowhere", "No such file"),
    ],
)
def test_guest_that_another_libvirt_holds(guests: list[LibvirtGuest], uri: str, words: str) -> None:
    """In a process of its own: libvirt's library writes its errors to standard error unless it is told not to."""
    name = guests[0].name

    def memshr(*arguments: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "memshr", *arguments]
        environment = os.environ | {"LIBVIRT_DEFAULT_URI": uri}
        return subprocess.run(command, capture_output=True, text=True, check=False, env=environment)

    looked = memshr("status", "--json", f"qemu:{name}")
    assert (looked.returncode, looked.stderr) == (0, "")
    (seen,) = json.loads(looked.stdout)
    assert seen["state"] == "unknown"
    (refusal,) = seen["refusals"]
    assert words in refusal["reason"]
    assert "LIBVIRT_DEFAULT_URI" in refusal["remedy"]
    refused = memshr("share", f"qemu:{name}")
    assert refused.returncode == 3
    (line,) = refused.stderr.splitlines()
    assert words in line


@pytest.mark.parametrize(
    ("more", "reason", "remedy"),
    [
        ("<source type='memfd'/><access mode='shared'/>", "shared memory", "remove <source> and <access>"),
        ("<source type='memfd'/><access mode='private'/>", "mapped file", "remove <source>"),
    ],
)
def test_remedy_is_one_of_the_description(
    kit: LinuxKit,
    libvirt: Libvirt,
    memshr: CommandLine,
    monkeypatch: pytest.MonkeyPatch,
    more: str,
    reason: str,
    remedy: str,
) -> None:
    """libvirt chooses QEMU's options; its user has a description to change."""
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirt.uri)
    with LibvirtGuest(f"libvirt-4-{OURS}", kit, libvirt, more=f"<memoryBacking>{more}</memoryBacking>").boot():
        (seen,) = json.loads(memshr("status", "--json", f"qemu:libvirt-4-{OURS}").out)
        (refusal,) = seen["refusals"]
        assert reason in refusal["reason"]
        assert remedy in refusal["remedy"]


def test_guest_that_libvirt_ends_while_memshr_is_connected(
    kit: LinuxKit, libvirt: Libvirt, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", libvirt.uri)
    with LibvirtGuest(f"libvirt-3-{OURS}", kit, libvirt).boot() as guest:
        process = inspect_process(guest.pid)
        assert process is not None
        with process.monitor() as monitor:
            assert monitor.execute("query-name") == {"name": guest.name}
            libvirt.virsh("destroy", guest.name)
            with pytest.raises(ConnectionLostError, match=f"guest {guest.name}"):
                monitor.execute("query-name")
        assert not process.running
