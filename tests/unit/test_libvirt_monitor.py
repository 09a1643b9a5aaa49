"""The passthrough of libvirt against a fake of its Python bindings: what no libvirt does on demand.

The real libvirt is in tests/live/test_libvirt.py. Numbers of errors are those of libvirt's ``virterror.h``.
"""

import errno
import json
import sys
import threading
from collections.abc import Callable
from types import ModuleType
from typing import Any

import pytest

from memshr.errors import BackendError, ConnectionLostError, PermissionDeniedError, UnsupportedError
from memshr.qemu import libvirt_monitor
from memshr.qemu.guests import GuestProcess
from memshr.qemu.libvirt_monitor import LibvirtMonitor
from memshr.qemu.monitor import MonitorError

UUID = "72f8e421-77c8-444f-a604-8bfb422156e0"
ARGUMENTS = (
    *("/usr/bin/qemu-system-x86_64", "-name", "guest=web,debug-threads=on", "-uuid", UUID),
    *("-chardev", "socket,id=charmonitor,fd=28,server=on,wait=off", "-mon", "chardev=charmonitor,id=monitor"),
)
NUMBERS = {
    "VIR_ERR_NO_SUPPORT": 3,
    "VIR_ERR_OPERATION_DENIED": 29,
    "VIR_ERR_SYSTEM_ERROR": 38,
    "VIR_ERR_NO_DOMAIN": 42,
    "VIR_ERR_AUTH_FAILED": 45,
    "VIR_ERR_OPERATION_INVALID": 55,
    "VIR_ERR_OPERATION_TIMEOUT": 68,
    "VIR_ERR_AUTH_CANCELLED": 79,
    "VIR_ERR_OPERATION_UNSUPPORTED": 84,
    "VIR_ERR_ACCESS_DENIED": 88,
    "VIR_ERR_AUTH_UNAVAILABLE": 94,
}


class FakeLibvirtError(Exception):
    """What the bindings raise."""

    def __init__(self, code: str, text: str = "libvirt's\nown words", number: int = 0) -> None:
        super().__init__(text)
        self._code, self._number = NUMBERS[code], number

    def get_error_code(self) -> int:
        """A number of ``virErrorNumber``."""
        return self._code

    def get_int1(self) -> int:
        """The errno of a system error."""
        return self._number


class FakeLibvirt:
    """Both modules of the bindings, the connection and the domain; a test plants what goes wrong."""

    def __init__(self) -> None:
        self.opened: list[str] = []
        self.asked: list[tuple[dict[str, Any], list[int]]] = []
        self.looked_up: list[str] = []
        self.closed = 0
        self.handlers: list[Callable[[Any, Any], None]] = []
        self.answer: dict[str, Any] = {"return": {"status": "running"}, "id": "libvirt-7"}
        self.at_open: Callable[[], None] = lambda: None
        self.at_look_up: Callable[[], None] = lambda: None
        self.at_command: Callable[[], None] = lambda: None

    def modules(self) -> dict[str, ModuleType]:
        """``libvirt`` and ``libvirt_qemu``."""
        libvirt, passthrough = ModuleType("libvirt"), ModuleType("libvirt_qemu")
        for name, value in NUMBERS.items():
            setattr(libvirt, name, value)
        plain = {
            "libvirtError": FakeLibvirtError,
            "open": self.open,
            "registerErrorHandler": lambda handler, context: self.handlers.append(handler),
        }
        for name, thing in plain.items():
            setattr(libvirt, name, thing)
        passthrough.__dict__["qemuMonitorCommand"] = lambda domain, request, flags: self.command(request, [])
        passthrough.__dict__["qemuMonitorCommandWithFiles"] = lambda domain, request, files, flags: (
            self.command(request, files),
            [],
        )
        return {"libvirt": libvirt, "libvirt_qemu": passthrough}

    def open(self, uri: str) -> "FakeLibvirt":
        """``virConnectOpen``"""
        self.opened.append(uri)
        self.at_open()
        return self

    def lookupByUUIDString(self, uuid: str) -> str:
        """``virDomainLookupByUUIDString``"""
        self.looked_up.append(uuid)
        self.at_look_up()
        return "the domain"

    def command(self, request: str, files: list[int]) -> str:
        """``virDomainQemuMonitorCommand``"""
        self.asked.append((json.loads(request), files))
        self.at_command()
        return json.dumps(self.answer)

    def close(self) -> int:
        """``virConnectClose``"""
        self.closed += 1
        return 0


def failing(code: str, number: int = 0) -> Callable[[], None]:
    """Raises an error of libvirt."""

    def fail() -> None:
        raise FakeLibvirtError(code, number=number)

    return fail


@pytest.fixture
def fake_libvirt(monkeypatch: pytest.MonkeyPatch) -> FakeLibvirt:
    """Bindings that work."""
    fake = FakeLibvirt()
    for name, module in fake.modules().items():
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delenv("LIBVIRT_DEFAULT_URI", raising=False)
    return fake


def guest() -> GuestProcess:
    """A guest as libvirt 9.0 starts it."""
    return GuestProcess(pid=1, start_ticks=1, name="web", arguments=ARGUMENTS, qmp_path=None, libvirt=True, uid=0)


def test_commands_go_to_the_domain_of_this_uuid(fake_libvirt: FakeLibvirt) -> None:
    with guest().monitor() as monitor:
        assert monitor.execute("query-status") == {"status": "running"}
        fake_libvirt.answer = {"return": {}, "id": "libvirt-8"}
        monitor.hand_over(5)
    assert fake_libvirt.opened == ["qemu:///system"]
    assert fake_libvirt.looked_up == [UUID]
    assert [(request["execute"], files) for request, files in fake_libvirt.asked] == [
        ("query-status", []),
        ("getfd", [5]),
    ]
    assert fake_libvirt.closed == 1
    assert fake_libvirt.handlers, "or libvirt prints its errors itself"


def test_libvirt_is_named_by_its_own_variable(fake_libvirt: FakeLibvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LIBVIRT_DEFAULT_URI", "qemu+unix:///session?socket=/run/user/7/sock")
    guest().monitor().close()
    assert fake_libvirt.opened == ["qemu+unix:///session?socket=/run/user/7/sock"]


def test_a_command_that_qemu_refuses(fake_libvirt: FakeLibvirt) -> None:
    fake_libvirt.answer = {"error": {"class": "CommandNotFound", "desc": "never heard of it"}, "id": "libvirt-7"}
    with LibvirtMonitor("web", UUID) as monitor, pytest.raises(MonitorError, match="never heard of it") as caught:
        monitor.execute("query-sev")
    assert (caught.value.command, caught.value.kind) == ("query-sev", "CommandNotFound")


def test_missing_bindings_say_how_to_get_them(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "libvirt", None)
    with pytest.raises(UnsupportedError, match=r"libvirt holds .* guest web, .* missing") as caught:
        guest().monitor()
    assert "pip install 'memshr[libvirt]' (apt-get install python3-libvirt)" in caught.value.remedy


def test_bindings_that_cannot_hand_over_descriptors(fake_libvirt: FakeLibvirt) -> None:
    del sys.modules["libvirt_qemu"].qemuMonitorCommandWithFiles
    with pytest.raises(UnsupportedError, match=r"too old .*; use libvirt-python 8\.2"):
        guest().monitor()
    assert fake_libvirt.opened == []


@pytest.mark.parametrize(
    ("code", "number", "kind", "words"),
    [
        ("VIR_ERR_SYSTEM_ERROR", errno.EACCES, PermissionDeniedError, "run as root"),
        ("VIR_ERR_AUTH_UNAVAILABLE", 0, PermissionDeniedError, "run as root"),
        ("VIR_ERR_SYSTEM_ERROR", errno.ENOENT, ConnectionLostError, "do libvirtd"),
    ],
)
def test_a_libvirt_that_does_not_let_us_in(
    fake_libvirt: FakeLibvirt, code: str, number: int, kind: type[BackendError], words: str
) -> None:
    fake_libvirt.at_open = failing(code, number)
    with pytest.raises(kind, match=words) as caught:
        guest().monitor()
    assert "\n" not in str(caught.value)
    assert "libvirt's own words" in str(caught.value)


def test_a_libvirt_that_does_not_know_the_guest(fake_libvirt: FakeLibvirt) -> None:
    fake_libvirt.at_look_up = failing("VIR_ERR_NO_DOMAIN")
    with pytest.raises(ConnectionLostError, match=r"does not know guest web; .* LIBVIRT_DEFAULT_URI"):
        guest().monitor()
    assert fake_libvirt.closed == 1


@pytest.mark.parametrize(
    ("code", "kind", "words"),
    [
        ("VIR_ERR_OPERATION_TIMEOUT", ConnectionLostError, "busy with guest web"),
        ("VIR_ERR_OPERATION_INVALID", ConnectionLostError, "failed at query-status for guest web"),
        ("VIR_ERR_OPERATION_DENIED", PermissionDeniedError, "run as root"),
        ("VIR_ERR_NO_SUPPORT", UnsupportedError, "use libvirt 8.2"),
    ],
)
def test_a_command_that_libvirt_refuses(
    fake_libvirt: FakeLibvirt, code: str, kind: type[BackendError], words: str
) -> None:
    fake_libvirt.at_command = failing(code)
    with LibvirtMonitor("web", UUID) as monitor, pytest.raises(kind, match=words):
        monitor.execute("query-status")
    assert fake_libvirt.closed == 1


def test_a_command_that_is_never_answered(fake_libvirt: FakeLibvirt, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(libvirt_monitor, "ANSWER_DEADLINE_S", 0.05)
    go_on = threading.Event()

    def wait() -> None:
        go_on.wait(30)

    fake_libvirt.at_command = wait
    with LibvirtMonitor("web", UUID) as monitor:
        with pytest.raises(ConnectionLostError, match="did not answer query-status"):
            monitor.execute("query-status")
        with pytest.raises(ConnectionLostError, match="cont was not sent"):
            monitor.execute("cont")
    assert fake_libvirt.closed == 0  # that would have waited, too
    assert [request["execute"] for request, _ in fake_libvirt.asked] == ["query-status"]
    go_on.set()


@pytest.mark.parametrize(
    "said",
    ["", "error", "[" * 100_000, '{"return": ' + "9" * 10_000 + "}", "[]", "{}", '{"error": {"desc": 1}}', "\ud800"],
)
def test_answer_that_is_no_qmp(fake_libvirt: FakeLibvirt, said: str) -> None:
    """libvirt hands on what QEMU says."""
    sys.modules["libvirt_qemu"].__dict__["qemuMonitorCommand"] = lambda domain, request, flags: said
    with LibvirtMonitor("web", UUID) as monitor, pytest.raises(ConnectionLostError, match="no proper QMP") as caught:
        monitor.execute("query-status")
    assert str(caught.value).isprintable()


def test_answer_of_another_type(fake_libvirt: FakeLibvirt) -> None:
    fake_libvirt.answer = {"return": {"status": 1}, "id": "libvirt-7"}
    with LibvirtMonitor("web", UUID) as monitor, pytest.raises(ConnectionLostError, match="status is of another type"):
        monitor.state()


def test_descriptor_is_handed_over_by_name(fake_libvirt: FakeLibvirt) -> None:
    fake_libvirt.answer = {"return": {}, "id": "libvirt-7"}
    with LibvirtMonitor("web", UUID) as monitor:
        monitor.hand_over(5)
        monitor.take_back()
    assert [(request["execute"], request["arguments"], files) for request, files in fake_libvirt.asked] == [
        ("getfd", {"fdname": "memshr"}, [5]),
        ("closefd", {"fdname": "memshr"}, []),
    ]
