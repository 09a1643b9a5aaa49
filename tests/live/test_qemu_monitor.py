"""What a real QEMU makes of what the monitor is used for: descriptors by name, and draining without a stop."""

from pathlib import Path

import pytest

from guests.kit import need_root
from guests.qtest import QtestGuest
from live.descriptors import memory_file, numbers_of
from live.parts import needed_parts
from live.qemu_host import booted, process_of
from memshr.qemu.monitor import MonitorError, SocketMonitor

LATENCY_NS = 3_000_000_000
"""long enough to ask QEMU something meanwhile, on any machine"""
SLOW_DRIVE = ["-drive", f"if=none,id=slow,driver=null-aio,read-zeroes=on,latency-ns={LATENCY_NS}"]
DRAIN_DEADLINE_S = 60.0


@pytest.mark.parametrize("paused", [True, False])
def test_descriptor_is_closed_at_once(qemu: Path, paused: bool) -> None:
    with booted(qemu, "by-name") as (guest,), memory_file() as (file, name):
        if not paused:
            guest.resume()
        with process_of(guest).monitor() as monitor:
            assert monitor.runs() != paused
            monitor.hand_over(file)
            (number,) = numbers_of(guest, name)
            assert Path(f"/proc/{guest.pid}/fd/{number}").samefile(f"/proc/self/fd/{file}")
            monitor.take_back()
            assert numbers_of(guest, name) == []
            monitor.take_back()  # nothing is fine


def test_descriptor_outlives_the_connection_and_is_taken_back_by_the_next(qemu: Path) -> None:
    with booted(qemu, "left-over") as (guest,), memory_file() as (file, name):
        with process_of(guest).monitor() as monitor:
            monitor.hand_over(file)
        with process_of(guest).monitor() as monitor:
            assert len(numbers_of(guest, name)) == 1, "it stays when we hang up"
            monitor.hand_over(file)
            assert len(numbers_of(guest, name)) == 1, "the one before is closed"
        with pytest.raises(MonitorError, match="not found"), SocketMonitor(guest.folder / "own-qmp") as other:
            other.execute("closefd", {"fdname": "memshr"})  # another monitor has its own names
        with process_of(guest).monitor() as monitor:
            monitor.take_back()
        assert numbers_of(guest, name) == []


def test_drain_lets_requests_end_and_does_not_stop_the_guest(qemu: Path) -> None:
    with QtestGuest("drained", qemu).boot(SLOW_DRIVE) as guest:
        guest.resume()
        with guest.qmp() as looking, process_of(guest).monitor() as monitor:

            def ended_reads() -> int:
                (drive,) = looking.execute("query-blockstats")
                return int(drive["stats"]["rd_operations"])

            looking.execute("query-status")
            looking.events.clear()
            monitor.human('qemu-io slow "aio_read 0 512"')  # begins it, and does not wait
            assert ended_reads() == 0
            monitor.drain(DRAIN_DEADLINE_S)
            assert ended_reads() == 1
            assert monitor.runs()
            looking.execute("query-status")
            assert [event["event"] for event in looking.events] == []


def test_qemu_that_gave_up_its_rights_is_believed(qemu: Path) -> None:
    """It began to listen as root, and runs as another user."""
    with needed_parts():
        need_root("a QEMU that changes its user")
    with booted(qemu, "runas", arguments=["-runas", "nobody"]) as (guest,):
        process = process_of(guest)
        assert process.user == "nobody"
        with process.monitor() as monitor:
            assert monitor.execute("query-name") == {"name": "runas"}
