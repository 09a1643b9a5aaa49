"""The door for what QEMU says, against a server that answers as no QEMU would."""

import os
import socket
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import pytest

from guests.fake_qmp import GREETING, FakeQmp, Reply, endless, line, refusing, returning, saying
from memshr.errors import ConnectionLostError, UnsupportedError
from memshr.qemu import monitor as door
from memshr.qemu.monitor import Monitor, MonitorError, SocketMonitor

EVENT = line({"event": "RESUME", "timestamp": {"seconds": 1, "microseconds": 2}})
SHORT_S = 0.3
MIB = 1 << 20


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """No wait is long."""
    for name in ("GREETING_DEADLINE_S", "ANSWER_DEADLINE_S"):
        monkeypatch.setattr(door, name, SHORT_S)


@contextmanager
def asked(
    tmp_path: Path,
    replies: Mapping[str, Reply] | None = None,
    *,
    greeting: bytes = GREETING,
    pace_s: float = 0.0,
    **more: Reply,
) -> Iterator[tuple[SocketMonitor, FakeQmp]]:
    """A connection to a server; ``_`` in the name of a command stands for ``-``."""
    named = {name.replace("_", "-"): reply for name, reply in {**(replies or {}), **more}.items()}
    with (
        FakeQmp(tmp_path / "qmp", named, greeting=greeting, pace_s=pace_s) as server,
        SocketMonitor(server.path) as monitor,
    ):
        yield monitor, server


# -- whose answer it is ------------------------------------------------------------------------------------------------


def test_answer_to_somebody_else_is_dropped(tmp_path: Path) -> None:
    others = line({"return": "late", "id": "somebody's"}), line({"return": "late"}), EVENT
    reply = saying(*others, b'{"return": "ours", "id": ID}\r\n')
    with asked(tmp_path, greeting=others[0] + GREETING, query_name=reply) as (monitor, _):
        assert monitor.execute("query-name") == "ours"
        assert monitor.execute("query-name") == "ours"


def test_no_two_requests_have_the_same_id(tmp_path: Path) -> None:
    """Also of two connections: QEMU answers the next client what the last one asked."""
    with asked(tmp_path, query_name=returning({})) as (monitor, server):
        monitor.execute("query-name")
        monitor.close()
        with SocketMonitor(server.path) as second:
            second.execute("query-name")
    assert len(server.requests) == 4
    assert len({each["id"] for each in server.requests}) == 4


def test_nothing_is_asked_after_a_wait_in_vain(tmp_path: Path, impatient: None) -> None:
    with asked(tmp_path, stop=saying(), cont=returning({})) as (monitor, server):
        with pytest.raises(ConnectionLostError, match=r"did not answer stop .*; is QEMU stopped or frozen\?"):
            monitor.execute("stop")
        with pytest.raises(ConnectionLostError, match="cont was not sent"):
            monitor.execute("cont")
    assert server.commands == ["stop"]


def test_nothing_is_asked_after_an_interrupt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with asked(tmp_path, stop=returning({}), cont=returning({})) as (monitor, server):
        with monkeypatch.context() as patch:
            patch.setattr(door, "parsed", _interrupted)
            with pytest.raises(KeyboardInterrupt):
                monitor.execute("stop")
        with pytest.raises(ConnectionLostError, match="cont was not sent"):
            monitor.execute("cont")
    assert server.commands == ["stop"]


def _interrupted(_: bytes) -> dict[str, object]:
    raise KeyboardInterrupt


# -- every wait has an end ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("reply", "pace_s"),
    [
        pytest.param(endless(b" "), 0.01, id="trickle"),
        pytest.param(endless(EVENT), 0.01, id="events-now-and-then"),
        pytest.param(endless(EVENT * 1000), 0.0, id="flood-of-events"),
        pytest.param(endless(line({"return": {}, "id": 1})), 0.0, id="flood-of-answers"),
    ],
)
def test_one_deadline_for_the_whole_answer(tmp_path: Path, impatient: None, reply: Reply, pace_s: float) -> None:
    with (
        asked(tmp_path, pace_s=pace_s, query_name=reply) as (monitor, _),
        pytest.raises(ConnectionLostError, match="did not answer query-name"),
    ):
        monitor.execute("query-name")


def test_greeting_that_trickles(tmp_path: Path, impatient: None) -> None:
    with FakeQmp(tmp_path / "qmp", {}, greeting=b"{") as server, pytest.raises(ConnectionLostError, match="is busy"):
        SocketMonitor(server.path)


def test_connection_as_a_whole_has_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "PATIENCE_S", 2.0)
    with (
        asked(tmp_path, pace_s=0.2, query_name=returning({})) as (monitor, server),
        pytest.raises(ConnectionLostError, match="did not answer query-name"),
    ):
        _ask_for_long(monitor)
    assert 1 <= len(server.commands) <= 10, "each was answered in time, and took a tenth of the patience or more"


def _ask_for_long(monitor: Monitor) -> None:
    for _ in range(60):
        monitor.execute("query-name")


def test_listener_that_takes_nobody(tmp_path: Path, impatient: None) -> None:
    with socket.socket(socket.AF_UNIX) as listener:
        path = tmp_path / "qmp"
        listener.bind(os.fspath(path))
        listener.listen(0)
        with pytest.raises(ConnectionLostError, match="is busy: QEMU serves one client at a time"):
            SocketMonitor(path)  # it has room for one, who waits for a greeting, and is in its way from then on
        with pytest.raises(ConnectionLostError, match="is busy: QEMU serves one client at a time"):
            SocketMonitor(path)


def test_line_without_an_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(door, "MOST_BYTES", 1 << 20)
    with asked(tmp_path, query_name=endless(b"x" * 65536)) as (monitor, _):
        with pytest.raises(ConnectionLostError, match="a line of more than 1 MiB"):
            monitor.execute("query-name")
        with pytest.raises(ConnectionLostError, match="was not sent"):
            monitor.execute("query-name")


def test_long_answer_that_is_in_order(tmp_path: Path) -> None:
    text = "0123456789abcde\n" * (MIB >> 4) * 8
    with asked(tmp_path, human_monitor_command=returning(text)) as (monitor, _):
        assert monitor.human("info mtree -f") == text


# -- what is no QMP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "greeting",
    [
        pytest.param(b"QEMU 7.2.22 monitor - type 'help' for more information\r\n(qemu) ", id="human-monitor"),
        pytest.param(b"220 mail.example.org ESMTP\r\n", id="text"),
        pytest.param(bytes(range(256)), id="binary"),
        pytest.param(b"[" * 100_000 + b"\n", id="deep"),
        pytest.param(b'{"QMP": ' + b"9" * 10_000 + b"}\n", id="digits"),
        pytest.param(b"[1, 2]\n", id="list"),
        pytest.param(b'{"QMP": 5}\n', id="number"),
        pytest.param(b'{"return": {}}\n', id="answer"),
        pytest.param(b'{"error": 5}\n', id="error"),
    ],
)
def test_socket_that_is_no_qmp(tmp_path: Path, greeting: bytes) -> None:
    with FakeQmp(tmp_path / "qmp", {}, greeting=greeting) as server:
        with pytest.raises(ConnectionLostError, match=r"qmp does not speak QMP; give the socket of -qmp"):
            SocketMonitor(server.path)
        assert server.raw == b""


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        pytest.param(b'{"return": ' + b"[" * 100_000, "too deep", id="deep"),
        pytest.param(b'{"return": ' + b"9" * 10_000 + b', "id": ID}', "not JSON", id="digits"),
        pytest.param(b'{"return": \xff, "id": ID}', "not JSON", id="binary"),
        pytest.param(b"\x1b[2J", r"not JSON but \\x1b\[2J", id="control-characters"),
        pytest.param(b"[" + b"[]," * (1 << 20) + b"[]]", "more than 1,048,576 values", id="things"),
        pytest.param(b"5", "no object", id="number"),
        pytest.param(b'{"error": 5, "id": ID}', "error is of another type", id="error-is-a-number"),
        pytest.param(b'{"error": {"class": "GenericError"}, "id": ID}', "desc is missing", id="no-words"),
        pytest.param(b'{"error": {"desc": "no"}, "id": ID}', "class is missing", id="no-class"),
        pytest.param(b'{"error": {"desc": [], "class": "x"}, "id": ID}', "desc is of another type", id="odd-words"),
    ],
)
def test_answer_that_is_no_qmp(tmp_path: Path, answer: bytes, words: str) -> None:
    with (
        asked(tmp_path, query_name=saying(answer + b"\r\n")) as (monitor, _),
        pytest.raises(ConnectionLostError, match=words) as caught,
    ):
        monitor.execute("query-name")
    assert str(caught.value).isprintable()
    assert caught.value.remedy


@pytest.mark.parametrize(
    ("ask", "value"),
    [
        (lambda monitor: monitor.ask_object("x"), []),
        (lambda monitor: monitor.ask_object("x"), None),
        (lambda monitor: monitor.ask_list("x"), {}),
        (lambda monitor: monitor.ask_list("x"), [{}, 1]),
        (lambda monitor: monitor.human("x"), 1),
        (Monitor.state, {}),
        (Monitor.state, {"status": 1}),
        (Monitor.state, {"status": "x" * 1025}),
        (Monitor.runs, {"running": "yes"}),
        (Monitor.version, {"qemu": {"major": True, "minor": 2}}),
        (Monitor.version, {"qemu": {"major": 7, "minor": -2}}),
        (Monitor.version, {"qemu": {"major": 7, "minor": 2.5}}),
        (Monitor.version, {"qemu": {"major": 7, "minor": 1 << 64}}),
        (Monitor.version, {"qemu": {"major": 7}}),
        (Monitor.version, {"qemu": "7.2"}),
    ],
)
def test_answer_of_another_type(tmp_path: Path, ask: Callable[[Monitor], object], value: object) -> None:
    commands = ("x", "human-monitor-command", "query-status", "query-version")
    with (
        FakeQmp(tmp_path / "qmp", {name: returning(value) for name in commands}) as server,
        SocketMonitor(server.path) as monitor,
        pytest.raises(ConnectionLostError, match="no proper QMP"),
    ):
        ask(monitor)


def test_what_is_shown_is_printable(tmp_path: Path) -> None:
    state = returning({"status": "run\x1b[31mning\ud800", "running": True})
    with asked(tmp_path, query_status=state, stop=refusing("\x1b]0;x\x07")) as (monitor, _):
        assert monitor.state() == r"run\x1b[31mning\ud800"
        with pytest.raises(MonitorError, match=r"QEMU refused stop: \\x1b\]0;x\\x07") as caught:
            monitor.execute("stop")
        assert (caught.value.command, caught.value.kind) == ("stop", "GenericError")
        assert monitor.runs(), "a refusal leaves the connection as it is"


# -- who is there ------------------------------------------------------------------------------------------------------


def test_nothing_is_sent_before_the_peer_is_checked(tmp_path: Path) -> None:
    def check(_: socket.socket) -> None:
        raise ConnectionLostError("somebody else")

    with FakeQmp(tmp_path / "qmp", {}) as server:
        with pytest.raises(ConnectionLostError, match="somebody else"):
            SocketMonitor(server.path, check=check)
        SocketMonitor(server.path).close()
        assert [each["execute"] for each in server.requests] == ["qmp_capabilities"]


def test_socket_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(ConnectionLostError, match="No such file or directory; give another one"):
        SocketMonitor(tmp_path / "qmp")


def test_server_that_hangs_up(tmp_path: Path) -> None:
    def hang_up(_: object) -> Iterator[bytes]:
        raise OSError
        yield b""

    with (
        asked(tmp_path, query_name=hang_up) as (monitor, _),
        pytest.raises(ConnectionLostError, match=r"QEMU hung up on .* at query-name"),
    ):
        monitor.execute("query-name")


# -- descriptors -------------------------------------------------------------------------------------------------------


def test_descriptor_is_handed_over_by_name_and_taken_back(tmp_path: Path) -> None:
    with asked(tmp_path, getfd=returning({}), closefd=returning({})) as (monitor, server):
        file = os.memfd_create("handed-over")
        try:
            monitor.hand_over(file)
            monitor.take_back()
            (theirs,) = server.files
            assert os.path.sameopenfile(file, theirs)
        finally:
            os.close(file)
    assert [(each["execute"], each["arguments"]) for each in server.requests[1:]] == [
        ("getfd", {"fdname": "memshr"}),
        ("closefd", {"fdname": "memshr"}),
    ]


def test_nothing_to_take_back(tmp_path: Path) -> None:
    gone = refusing("File descriptor named 'memshr' not found")
    with asked(tmp_path, closefd=gone) as (monitor, _):
        monitor.take_back()
    (tmp_path / "qmp").unlink()
    with asked(tmp_path, closefd=refusing("never")) as (monitor, _), pytest.raises(MonitorError, match="never"):
        monitor.take_back()


# -- draining ----------------------------------------------------------------------------------------------------------


def version(major: int, minor: int) -> Reply:
    """What QEMU says of itself."""
    return returning({"qemu": {"major": major, "minor": minor, "micro": 1}, "package": ""})


@pytest.mark.parametrize(("major", "minor"), [(2, 12), (7, 2), (9, 2), (10, 2)])
@pytest.mark.parametrize("replay", [returning({"mode": "none", "icount": 0}), refusing("none", "CommandNotFound")])
def test_drain_of_a_version_that_is_known(tmp_path: Path, major: int, minor: int, replay: Reply) -> None:
    replies = {"query_version": version(major, minor), "query_replay": replay, "transaction": returning({})}
    with asked(tmp_path, replies) as (monitor, server):
        monitor.drain(5)
    assert server.requests[-1]["execute"] == "transaction"
    assert server.requests[-1]["arguments"] == {"actions": []}


@pytest.mark.parametrize(
    ("major", "minor", "mode", "words"),
    [
        (10, 3, "none", "QEMU 10.3 is not known to end"),
        (11, 0, "none", "QEMU 11.0 is not known to end .*use QEMU 10.2 or older"),
        (7, 2, "record", "records or replays"),
        (7, 2, "play", "records or replays"),
    ],
)
def test_drain_that_may_do_nothing(tmp_path: Path, major: int, minor: int, mode: str, words: str) -> None:
    replies = {"query_version": version(major, minor), "query_replay": returning({"mode": mode, "icount": 0})}
    with (
        asked(tmp_path, replies, transaction=returning({})) as (monitor, server),
        pytest.raises(UnsupportedError, match=words),
    ):
        monitor.require_drain()
    assert "transaction" not in server.commands


def test_drain_has_its_own_deadline(tmp_path: Path) -> None:
    replies = {"query_version": version(7, 2), "query_replay": returning({"mode": "none"}), "transaction": saying()}
    with (
        asked(tmp_path, replies) as (monitor, _),
        pytest.raises(ConnectionLostError, match="did not answer transaction"),
    ):
        monitor.drain(SHORT_S)
