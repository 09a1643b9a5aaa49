"""Processes that say they are QEMU: which are believed, and what of it. What real QEMUs say is in tests/live."""

import json
import os
import socket
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from command_line import CommandLine
from guests.fake_qmp import RAM_MIB, FakeQemu, FakeQmp, Ram, flat_view, honest
from guests.machine import wait_until
from memshr.errors import BackendError, ConnectionLostError
from memshr.procfs import Vmas, process_mappings
from memshr.qemu import guests
from memshr.qemu.guests import GuestProcess, Refusal, inspect_process, memory_layout, status_refusals
from memshr.qemu.monitor import SocketMonitor
from memshr.qemu.status import guest_statuses, status_of
from memshr.types import PAGE_SIZE, Gfn

DEADLINE_S = 30.0
MIB = 1 << 20

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="needs /proc")


def inspected(pid: int) -> GuestProcess:
    """A process as memshr finds it."""
    found = inspect_process(pid)
    assert found is not None
    return found


def ourselves(path: Path) -> GuestProcess:
    """This process, as if it were a QEMU with that socket on its command line."""
    fields = Path("/proc/self/stat").read_text().rpartition(")")[2].split()
    return GuestProcess(
        pid=os.getpid(),
        start_ticks=int(fields[19]),
        name="ourselves",
        arguments=("qemu-system-x86_64",),
        qmp_path=Path(f"/proc/{os.getpid()}/root") / path.relative_to("/"),
        libvirt=False,
        uid=os.getuid(),
    )


# -- who listens -------------------------------------------------------------------------------------------------------


def test_socket_of_the_process_itself(tmp_path: Path) -> None:
    with FakeQmp(tmp_path / "qmp", {}) as server:
        ourselves(server.path).monitor().close()
        assert len(server.requests) == 1


def test_socket_of_somebody_else_is_sent_nothing(tmp_path: Path) -> None:
    with FakeQmp(tmp_path / "qmp", {}) as server, FakeQemu(tmp_path, "honest", socket_path=server.path) as deputy:
        process = inspected(deputy.pid)
        words = rf"guest honest \({deputy.pid}\) is that of process {os.getpid()}; if that is right, name it"
        with pytest.raises(ConnectionLostError, match=words):
            process.monitor()
        assert any("is that of process" in each.reason for each in status_of(process).refusals)
        assert server.raw == b""
        replace(process, qmp_path=server.path, socket_given=True).monitor().close()
        assert len(server.requests) == 1, "the operator vouches for a socket that he names"


def test_socket_of_a_process_that_has_ended(tmp_path: Path) -> None:
    """Its number may be another's by now: here the listening socket is passed on, as a manager of guests may."""
    with FakeQemu(tmp_path, "passed-on") as guest:
        process = inspected(guest.pid)
        with pytest.raises(ConnectionLostError, match=r"is that of .*; if that is right, name it"):
            process.monitor()


class PassedOnSocket(socket.socket):
    """A connection to a listener that has ended, and whose number is ours by now: that cannot be had on demand."""

    def getsockopt(self, level: int, option: int, size_bytes: int = 0) -> Any:
        """SO_PEERCRED names us; the pidfd is of a process that has ended."""
        if option == socket.SO_PEERCRED:
            return struct.pack("3i", os.getpid(), os.getuid(), os.getgid())
        with subprocess.Popen(["true"]) as child:
            return os.pidfd_open(child.pid)


def test_socket_of_a_process_whose_number_is_the_guests_now(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("memshr.qemu.monitor.socket.socket", PassedOnSocket)
    with FakeQmp(tmp_path / "qmp", {}) as server:
        with pytest.raises(ConnectionLostError, match="is that of a process that is not there"):
            ourselves(server.path).monitor()
        assert server.raw == b""


def test_socket_of_another_user_on_a_kernel_without_pidfds_of_peers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(guests, "_SO_PEERPIDFD", 9999)
    with FakeQmp(tmp_path / "qmp", {}) as server:
        ourselves(server.path).monitor().close()
        with pytest.raises(ConnectionLostError, match="is that of a process that is not there"):
            replace(ourselves(server.path), uid=12345).monitor()
        with pytest.raises(ConnectionLostError, match=f"is that of process {os.getpid()}"):
            replace(ourselves(server.path), pid=os.getppid(), qmp_path=ourselves(server.path).qmp_path).monitor()


def test_process_that_is_a_later_one_of_its_number(tmp_path: Path) -> None:
    with FakeQmp(tmp_path / "qmp", {}) as server:
        with pytest.raises(ConnectionLostError, match="is that of process"):
            replace(ourselves(server.path), start_ticks=1).monitor()
        assert server.raw == b""


# -- where the socket is -----------------------------------------------------------------------------------------------


@pytest.mark.skipif(os.geteuid() != 0, reason="chroot takes root")
def test_absolute_link_stays_in_the_root_of_the_guest(tmp_path: Path) -> None:
    """In a container whose socket is reached over an absolute link, that is looked up in the container."""
    with FakeQemu(tmp_path, "chrooted") as guest:
        process = inspected(guest.pid)
        wait_until((tmp_path / "link").is_symlink, DEADLINE_S, "the guest is in its root")
        assert os.fspath((tmp_path / "link").readlink()) == "/inside.qmp"
        assert not Path("/inside.qmp").exists()
        wait_until(lambda: Path(f"/proc/{guest.pid}/root").readlink() == tmp_path, DEADLINE_S, "chroot")
        linked = replace(process, qmp_path=Path(f"/proc/{guest.pid}/root/link"))
        linked.monitor().close()
        climbing = replace(process, qmp_path=Path(f"/proc/{guest.pid}/root/../../../link"))
        climbing.monitor().close()


def test_relative_path_does_not_lead_out_of_the_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    inside = tmp_path / "inside"
    inside.mkdir()
    monkeypatch.chdir(inside)
    with FakeQmp(tmp_path / "qmp", {}) as server:
        process = replace(ourselves(server.path), qmp_path=Path(f"/proc/{os.getpid()}/cwd/../qmp"))
        with pytest.raises(ConnectionLostError, match="it leads out of QEMU's folder; give another one with NAME@"):
            process.monitor()
        assert server.raw == b""
        (inside / "near").hardlink_to(server.path)
        replace(process, qmp_path=Path(f"/proc/{os.getpid()}/cwd/near")).monitor().close()


def test_socket_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLostError, match="No such file or directory; give another one with NAME@"):
        ourselves(tmp_path / "qmp").monitor()


# -- is it there -------------------------------------------------------------------------------------------------------


def test_zombie_is_not_running() -> None:
    with subprocess.Popen(["sleep", "600"]) as child:
        fields = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()
        process = replace(ourselves(Path("/x")), pid=child.pid, start_ticks=int(fields[19]))
        assert process.running
        child.kill()

        def zombie() -> bool:
            return Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[0] == "Z"

        wait_until(zombie, DEADLINE_S, "the child has ended")
        assert not process.running
        child.wait()
        assert not process.running


def test_user_of_a_guest(tmp_path: Path) -> None:
    with FakeQemu(tmp_path, "honest") as guest:
        process = inspected(guest.pid)
        assert process.uid == os.getuid()
        assert replace(process, uid=0).user == "root"
        assert replace(process, uid=3_999_999_999).user == "3999999999"


def test_guest_with_the_rights_of_several_users() -> None:
    assert "several users" in str(status_refusals("Uid:\t1000\t0\t0\t0\nVmLck:\t 0 kB\nVmPin:\t 0 kB\n"))
    assert status_refusals("Uid:\t7\t7\t7\t7\nVmLck:\t 0 kB\nVmPin:\t 0 kB\n") == []


# -- one odd guest is one row ------------------------------------------------------------------------------------------


ODD_ONES = {
    "deep": "too deep",
    "digits": "not JSON",
    "no-object": "query-status returned no object",
    "no-word": "status is of another type",
    "hung-up": "did not answer query-status",
    "no-list": "query-memdev returned no list",
    "odd-device": "name is of another type",
    "refusal": r"\x1b]0;title\x07\u202e",
    "huge-layout": "2,097,152 MiB, which is many times the memory of this host",
    "empty-layout": "where QEMU has not mapped as much",
    "many-ranges": "5,000 ranges",
    "markup": None,
    "honest": None,
}


@pytest.fixture(scope="module")
def odd_guests(tmp_path_factory: pytest.TempPathFactory) -> Iterator[list[FakeQemu]]:
    """A process for each of ``ODD_ONES``."""
    folder = tmp_path_factory.mktemp("odd")
    with ExitStack() as ending:
        yield [ending.enter_context(FakeQemu(folder, mode)) for mode in ODD_ONES]


@pytest.fixture
def only_odd(odd_guests: list[FakeQemu], monkeypatch: pytest.MonkeyPatch) -> list[FakeQemu]:
    """They are all guests that there are, and nobody waits for them for long."""
    monkeypatch.setattr(guests, "find_guests", lambda: [inspected(guest.pid) for guest in odd_guests])
    monkeypatch.setattr("memshr.qemu.monitor.ANSWER_DEADLINE_S", 2.0)
    return odd_guests


def test_one_odd_guest_is_one_row(only_odd: list[FakeQemu]) -> None:
    rows = {each.process.name: each for each in guest_statuses()}
    assert set(rows) == set(ODD_ONES)
    for mode, words in ODD_ONES.items():
        reasons = [str(refusal) for refusal in rows[mode].refusals]
        assert all(reason.isprintable() for reason in reasons)
        assert words is None or any(words in reason for reason in reasons), (mode, reasons)
    assert (rows["honest"].state, rows["honest"].ram_bytes) == ("running", RAM_MIB * MIB)
    assert rows["markup"].state == r"[/x]\x1b[31m"
    assert rows["huge-layout"].ram_bytes == 0


def test_odd_guests_are_shown_on_a_terminal(only_odd: list[FakeQemu], memshr: CommandLine) -> None:
    shown = memshr("status").out
    assert "[/x]" in shown
    assert all(line.isprintable() for line in shown.splitlines())
    assert max(map(len, shown[: shown.index("must not be touched")].splitlines()[:-1])) <= 120
    told = json.loads(memshr("status", "--json").out)
    assert {each["uid"] for each in told} == {os.getuid()}


def test_refusal_is_printable_whoever_wrote_it() -> None:
    refusal = Refusal("says \x1b[2J", "do\nthis")
    assert (refusal.reason, refusal.remedy) == (r"says \x1b[2J", r"do\nthis")


# -- where its memory is -----------------------------------------------------------------------------------------------


def layout_of(tmp_path: Path, view: str, hva: Callable[[int], int], mappings: Vmas | None = None) -> list[object]:
    """What memshr makes of a layout; ``hva`` tells from a guest address where QEMU says it is."""

    def human(request: dict[str, object]) -> Iterator[bytes]:
        arguments = request["arguments"]
        assert isinstance(arguments, dict)
        command = arguments["command-line"]
        text = view if command == "info mtree -f" else f"is {hva(int(command.split()[1], 16)):#x}"
        yield json.dumps({"return": text, "id": request["id"]}).encode() + b"\n"

    if mappings is None:
        mappings = process_mappings(os.getpid())
    replies = honest(0) | {"human-monitor-command": human}
    with FakeQmp(tmp_path / "qmp", replies) as server, SocketMonitor(server.path) as monitor:
        return list(memory_layout(monitor, mappings))


def test_layout_that_is_there(tmp_path: Path) -> None:
    ram = Ram(2 * MIB)
    view = flat_view((0, MIB, "pc.ram"), (4 * MIB, 5 * MIB, "high.ram"))
    low, high = layout_of(tmp_path, view, lambda gpa: ram.address + (MIB if gpa else 0))
    assert (low, high) == (
        guests.RamRange(Gfn(0), 256, ram.address, "pc.ram"),
        guests.RamRange(Gfn(1024), 256, ram.address + MIB, "high.ram"),
    )


@pytest.mark.parametrize(
    ("ranges", "hva", "words"),
    [
        ([(0, 2 * MIB), (MIB, 3 * MIB)], lambda at, gpa: at + gpa, "overlap at 0x100000"),
        ([(0, MIB), (0, MIB)], lambda at, gpa: at + gpa, "overlap at 0x0"),
        ([(0, MIB), (2 * MIB, 3 * MIB)], lambda at, gpa: at, "are at the same address"),
        ([(0, MIB)], lambda at, gpa: at + 8, "at address 0x"),
        ([(0, MIB)], lambda at, gpa: 0, "where QEMU has not mapped as much"),
        ([(0, MIB)], lambda at, gpa: (1 << 64) - MIB, "at address 0xfffffffffff00000"),
        ([(0, 1 << 30)], lambda at, gpa: at, "where QEMU has not mapped as much"),
        ([(0, MIB)], lambda at, gpa: 1 << 80, "does not say where guest address 0x0 is"),
        ([(0, 1 << 63)], lambda at, gpa: at, "many times the memory of this host"),
    ],
)
def test_layout_that_cannot_be(
    tmp_path: Path, ranges: list[tuple[int, int]], hva: Callable[[int, int], int], words: str
) -> None:
    ram = Ram(8 * MIB)
    view = flat_view(*((first, end, "pc.ram") for first, end in ranges))
    with pytest.raises(BackendError, match=words):
        layout_of(tmp_path, view, lambda gpa: hva(ram.address, gpa))


def test_layout_of_a_process_without_memory(tmp_path: Path) -> None:
    view = flat_view((0, PAGE_SIZE, "pc.ram"))
    with pytest.raises(BackendError, match="nothing is mapped in it"):
        layout_of(tmp_path, view, lambda _: PAGE_SIZE, Vmas(b""))


def test_block_name_is_printable(tmp_path: Path) -> None:
    ram = Ram(PAGE_SIZE)
    (only,) = layout_of(tmp_path, flat_view((0, PAGE_SIZE, "\x1b[2J.ram")), lambda _: ram.address)
    assert isinstance(only, guests.RamRange)
    assert only.block == r"\x1b[2J.ram"
