"""The process that borrows a thread of QEMU is killed in the midst of it: QEMU goes on as if nothing had been."""

import contextlib
import itertools
import os
import random
import signal
import socket
import subprocess
import time
from pathlib import Path

from guests.machine import wait_until
from guests.qtest import QtestGuest
from live.qemu_host import booted, process_of
from memshr.qemu import agent, control_area, injection
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.qemu.identity import identity_of
from memshr.qemu.injection import Injector, command
from memshr.qemu.monitor import Monitor
from memshr.types import DomId

KILLS = 25


def handed_over(guest: QtestGuest, monitor: Monitor, control: control_area.ControlArea) -> int:
    """Hand a control area to QEMU; its number there."""
    monitor.hand_over(control.file)
    pidfd = os.pidfd_open(guest.pid)
    try:
        return injection.descriptor_number(guest.pid, pidfd, control.file)
    finally:
        os.close(pidfd)


def installed(guest: QtestGuest, monitor: Monitor, injector: Injector) -> control_area.ControlArea:
    """An agent in a QEMU that has none."""
    control = control_area.ControlArea.create()
    number = handed_over(guest, monitor, control)
    injection.install(identity_of(guest.pid), guest.name, control, number, injector)
    monitor.take_back()
    return control


def found(guest: QtestGuest) -> control_area.ControlArea:
    """The control area that is in a QEMU, opened anew: a link closes the one that it was given."""
    control = control_area.ControlArea.find(guest.pid)
    assert control is not None
    return control


def killed_while_attaching(guest: QtestGuest, delay_s: float) -> bool:
    """Start the injector and kill it ``delay_s`` after it has prepared everything; returns whether it was in time."""
    control = control_area.ControlArea.create()
    with process_of(guest).monitor() as monitor:
        number = handed_over(guest, monitor, control)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        with (
            ours,
            theirs,
            subprocess.Popen(command(), stdin=theirs.fileno()) as injector,
        ):
            socket.send_fds(ours, [f"attach {identity_of(guest.pid)} {number}".encode()], [control.file])
            # A parent that has died: it ends of itself when it has done its work.
            ours.shutdown(socket.SHUT_WR)
            while (
                not any(control.memory[control_area.PARAMETERS : control_area.PARAMETERS + 8])
                and injector.poll() is None
            ):
                pass
            end = time.perf_counter() + delay_s
            while time.perf_counter() < end:
                pass
            injector.send_signal(signal.SIGKILL)
            killed = injector.wait() == -signal.SIGKILL
        monitor.take_back()
    control.close()
    return killed


def test_the_death_of_the_injector_harms_nobody(qemu: Path) -> None:
    chance = random.Random(2)
    with booted(qemu, "borrowed") as (guest,):
        in_time, longest_s = 0, 0.003
        for tries in itertools.count(1):
            if killed_while_attaching(guest, chance.uniform(0, longest_s)):
                in_time += 1
            else:  # it had done its work: sooner, then
                longest_s *= 0.8
            guest.write(0x200000, os.urandom(64))
            assert guest.hmp("info status").startswith("VM status")
            if tries >= KILLS and in_time > KILLS // 3:
                break
            assert tries < 20 * KILLS, "the injector is always done before it is killed"
        # Where it had made its commitment an agent sleeps; all of them are found and taken out.
        with QemuHypervisor([process_of(guest)]) as hypervisor:
            hypervisor.detach(DomId(1))
        assert "memshr" not in Path(f"/proc/{guest.pid}/maps").read_text()
        assert guest.alive


SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"


def test_what_the_sandbox_of_qemu_forbids_is_told_and_the_rest_of_it_lets_the_agent_in(qemu: Path) -> None:
    with (
        booted(qemu, "sandboxed", arguments=["-sandbox", SANDBOX]) as (guest,),
        process_of(guest).monitor() as monitor,
        contextlib.closing(Injector()) as injector,
        contextlib.closing(control_area.ControlArea.create()) as control,
    ):
        identity = identity_of(guest.pid)
        number = handed_over(guest, monitor, control)
        installed = injection.install(identity, "sandboxed", control, number, injector)
        monitor.take_back()
        assert control.thread_lives(guest.pid)
        assert injection.forbidden_calls(identity, "sandboxed", control, injector) == installed.forbidden
        assert "\nSeccomp:\t2\n" in Path(f"/proc/{guest.pid}/status").read_text()
        assert installed.forbidden == set()
        assert guest.hmp("info status").startswith("VM status")


def test_agent_runs_tables_until_the_first_surprise(qemu: Path) -> None:
    with booted(qemu, "tables") as (guest,), process_of(guest).monitor() as monitor:
        injector = Injector()
        control = installed(guest, monitor, injector)
        injector.close()
        pidfd = os.pidfd_open(guest.pid)
        with agent.AgentLink.open(guest.pid, pidfd, "tables", control, monitor) as link:
            assert link.call(39) == guest.pid
            table = agent.entries([(39,), (39,), (39,)], results=[guest.pid, 1, guest.pid])
            assert link.run(table) == 1, "a table stops at its first surprise"
            # A Ctrl-C has left an answer unread: it is not taken for that of the next table.
            link.post(agent.entries([(39,)], results=[guest.pid]))
            wait_until(lambda: link.control.get(control_area.STATE_AT, "<I") == (4,), 10, "the table is done")
            link._answer_is_due = False
            assert link.run(agent.entries([(7, 0, 0, 300), (39,)], results=[0, guest.pid])) == 2
            assert link.run(agent.entries([(3, 12345)], results=[0])) == 0
            assert link.failure(0, "closing what is not open").errno == 9
        os.close(pidfd)
        control.close()


def test_an_offer_of_a_memshr_that_died_before_it_woke_the_agent_is_passed_over(qemu: Path) -> None:
    with booted(qemu, "offer") as (guest,), process_of(guest).monitor() as monitor:
        injector = Injector()
        installed(guest, monitor, injector).close()
        injector.close()
        thread = found(guest).thread(guest.pid)
        wait_until(lambda: "futex" in Path(f"/proc/{thread}/wchan").read_text(), 10, "the agent sleeps")
        pidfd = os.pidfd_open(guest.pid)
        for number in (0, 999):  # some other file of QEMU; none
            control = found(guest)
            control.put(control_area.OFFER_AT, "<i", number)
            with agent.AgentLink.open(guest.pid, pidfd, "offer", control, monitor) as link:
                assert link.call(39) == guest.pid
        control = found(guest)
        control.put(control_area.OFFER_AT, "<i", 0)
        wait_until(lambda: not agent.is_linked(guest.pid), 10, "the agent sleeps again")
        os.close(pidfd)
        control.close()
