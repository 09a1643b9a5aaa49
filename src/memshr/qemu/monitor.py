"""QEMU's monitor: a thin QMP client that can hand over file descriptors.

QMP is JSON, one object a line, over a Unix socket. QEMU serves one client of a socket at a time, others wait
unanswered, so memshr connects for a few commands and hangs up.

What makes this hard: whoever answers may be hostile, since a guest may have broken out into its QEMU. So this is the
one door for what QEMU says, and behind it nothing is doubtful any more:

1. An answer belongs to the request whose ``id`` it has. Others are answers to somebody who gave up, and are dropped:
   QEMU gives the answer to a command of a client that has hung up to the next client.
2. Every wait has an end: for one answer, and for all answers of one connection together. A connection on which a wait
   was in vain is closed and stays closed.
3. A line, the number of things in it, and every word that is shown are limited.
4. What is read is asked for by its type (``Answer``). Words come out as one printable line each.
5. What breaks these rules is a ConnectionLostError, whatever it is.

``Monitor`` is what the rest of memshr asks. Two ways lead there: ``SocketMonitor``, the guest's own socket, and
``libvirt_monitor``, where libvirt holds that socket.

Errors: ConnectionLostError (no answer, no right answer, or QEMU went away), PermissionDeniedError, UnsupportedError (a
QEMU that is not known to do what is asked), MonitorError (QEMU refused).
Source: QEMU's ``docs/interop/qmp-spec``, ``qapi/misc.json``, ``monitor/qmp.c``; observed on QEMU 7.2.
"""

from __future__ import annotations

import abc
import contextlib
import json
import os
import secrets
import socket
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from memshr.closing import Closing
from memshr.errors import BackendError, ConnectionLostError, PermissionDeniedError, UnsupportedError, printable

GREETING_DEADLINE_S = 3.0
ANSWER_DEADLINE_S = 10.0
PATIENCE_S = 30.0
"""How long the answers of one connection may take together."""

MOST_BYTES = 16 << 20
"""Longest line. A layout of a large guest (``info mtree -f``) takes megabytes."""
MOST_THINGS = 1 << 20
"""Most values in a line: each costs up to a hundred bytes in Python."""
LONGEST_WORD = 1024
"""Longest string that is shown or compared: a name, a state, a message."""

_DESCRIPTOR_NAME = "memshr"

_DRAINING_UP_TO = (10, 2)
"""The newest QEMU whose ``qmp_transaction`` was seen to begin with ``bdrv_drain_all``."""


Kind = TypeVar("Kind")


class MonitorError(BackendError):
    """QEMU refused a command; ``command`` says which, ``kind`` is QEMU's class of error."""

    def __init__(self, message: str, *, command: str, kind: str) -> None:
        super().__init__(message)
        self.command = command
        self.kind = kind


def _odd_answer(what: str) -> ConnectionLostError:
    return ConnectionLostError(
        f"QEMU's answer is no proper QMP: {what}", remedy="is this QEMU's own QMP socket, and is that QEMU in order?"
    )


@dataclass(frozen=True, slots=True)
class Answer:
    """A JSON object that QEMU answered, still doubtful: each look says what it wants, and gets that or an error.

    ``command`` is what it answers, for messages. Each method but ``has`` takes the name of a field.

    :raises ConnectionLostError: by each method: the field is missing or something else.
    """

    command: str
    fields: Mapping[str, object]

    def has(self, name: str) -> bool:
        """Whether there is such a field."""
        return name in self.fields

    def text(self, name: str) -> str:
        """A word, as one printable line."""
        value = self._field(name, str)
        if len(value) > LONGEST_WORD:
            raise _odd_answer(f"{self.command}: {name} is {len(value):,} letters long")
        return printable(value)

    def number(self, name: str) -> int:
        """A whole number below 2**64."""
        value = self._field(name, int)
        if isinstance(value, bool) or not 0 <= value < 1 << 64:
            raise _odd_answer(f"{self.command}: {name} is no number that can be")
        return value

    def truth(self, name: str) -> bool:
        """True or false."""
        return self._field(name, bool)

    def object(self, name: str) -> Answer:
        """An object in the object."""
        return Answer(self.command, self._field(name, dict))

    def _field(self, name: str, kind: type[Kind]) -> Kind:
        value = self.fields.get(name)
        if not isinstance(value, kind):
            raise _odd_answer(f"{self.command}: {name} is {'missing' if value is None else 'of another type'}")
        return value


class Monitor(Closing):
    """A way to QEMU's monitor. A context manager; hangs up at the end.

    Every method that asks QEMU something raises these:

    :raises MonitorError: QEMU refused it.
    :raises ConnectionLostError: QEMU hung up, did not answer in time, or answered something else than what was asked
        for; whether the command was done is unknown.
    """

    def __init__(self) -> None:
        self._patience_s = PATIENCE_S

    @abc.abstractmethod
    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        descriptor: int | None = None,
        deadline_s: float | None = None,
    ) -> Any:
        """Run a command and return what it returned, of whatever type: ``ask_object`` and its like look at that.

        :param descriptor: a file descriptor of ours to hand over with the command.
        :param deadline_s: how long to wait for the answer; None: ANSWER_DEADLINE_S.
        """

    @abc.abstractmethod
    def close(self) -> None:
        """Hang up."""

    @contextlib.contextmanager
    def _waiting(self, deadline_s: float | None) -> Iterator[float]:
        # How long a wait may take that begins now; what it takes is taken from the patience.
        begin_s = time.monotonic()
        try:
            yield max(0.0, min(ANSWER_DEADLINE_S if deadline_s is None else deadline_s, self._patience_s))
        finally:
            self._patience_s -= time.monotonic() - begin_s

    def ask_object(self, command: str, arguments: Mapping[str, object] | None = None) -> Answer:
        """Run a command that returns an object."""
        returned = self.execute(command, arguments)
        if not isinstance(returned, dict):
            raise _odd_answer(f"{command} returned no object")
        return Answer(command, returned)

    def ask_list(self, command: str, arguments: Mapping[str, object] | None = None) -> list[Answer]:
        """Run a command that returns a list of objects."""
        returned = self.execute(command, arguments)
        if not isinstance(returned, list) or not all(isinstance(each, dict) for each in returned):
            raise _odd_answer(f"{command} returned no list of objects")
        return [Answer(command, each) for each in returned]

    def human(self, command: str) -> str:
        """Run a command of the human monitor and return its text: lines of a stranger, to be looked through."""
        text = self.execute("human-monitor-command", {"command-line": command})
        if not isinstance(text, str):
            raise _odd_answer(f"{command} returned no text")
        return text

    def state(self) -> str:
        """QEMU's word for what the guest does: running, paused, prelaunch, inmigrate and so on."""
        return self.ask_object("query-status").text("status")

    def runs(self) -> bool:
        """Whether the guest's processors run."""
        return self.ask_object("query-status").truth("running")

    def version(self) -> tuple[int, int]:
        """QEMU's version, major and minor."""
        numbers = self.ask_object("query-version").object("qemu")
        return numbers.number("major"), numbers.number("minor")

    def hand_over(self, descriptor: int) -> None:
        """Hand a file descriptor over, which QEMU keeps under our name; one that it has kept so far is closed.

        QEMU does not say which number it has there. It stays when we hang up, also when we die, until the next one is
        handed over or taken back through the same socket of QEMU, which has its own names.

        Source: ``getfd``; ``monitor_add_fd`` of QEMU's ``monitor/fds.c`` (up to 7.2 ``monitor/misc.c``).
        """
        self.execute("getfd", {"fdname": _DESCRIPTOR_NAME}, descriptor=descriptor)

    def take_back(self) -> None:
        """Have QEMU close what ``hand_over`` gave it, at once, also while the guest is paused. None is fine."""
        try:
            self.execute("closefd", {"fdname": _DESCRIPTOR_NAME})
        except MonitorError as error:
            if "not found" not in str(error):
                raise

    def require_drain(self) -> None:
        """See that ``drain`` does what it promises.

        :raises UnsupportedError: not on this QEMU.
        """
        version = self.version()
        if version > _DRAINING_UP_TO:
            raise UnsupportedError(
                f"QEMU {version[0]}.{version[1]} is not known to end its disk requests when asked to",
                remedy="use QEMU {}.{} or older, a newer memshr, or drives without cache=none, aio=native and "
                "aio=io_uring".format(*_DRAINING_UP_TO),
            )
        try:
            replays = self.ask_object("query-replay").text("mode") != "none"
        except MonitorError:  # built without it, or older than 5.2
            replays = False
        if replays:
            raise UnsupportedError(
                "QEMU records or replays the guest, and does not end its disk requests when asked to",
                remedy="start QEMU without -icount rr=",
            )

    def drain(self, deadline_s: float) -> None:
        """Let every disk request that is under way end, without stopping the guest.

        Requests that the guest begins meanwhile wait for that in QEMU and start afterwards. QEMU's main thread waits,
        too: until the answer comes nothing may be in flight that needs it.

        Ask ``require_drain`` once before.

        :raises ConnectionLostError: there was no answer in ``deadline_s``; QEMU goes on waiting.

        A ``transaction`` of no action: ``qmp_transaction`` begins with ``bdrv_drain_all``. Source: QEMU's
        ``blockdev.c`` of 7.2, 10.0 and 10.2 (a patch of September 2023 that drops the call is in none of them);
        ``bdrv_drain_all_begin`` of ``block/io.c``, which does nothing while a guest is replayed.
        """
        self.execute("transaction", {"actions": []}, deadline_s=deadline_s)


def parsed(line: bytes | bytearray) -> dict[str, object]:
    """The object that a line of QMP is.

    :raises ConnectionLostError: it is none, or one that no QEMU writes: too long, too deep, too many things.
    """
    if len(line) > MOST_BYTES:
        raise _odd_answer(f"a line of more than {MOST_BYTES >> 20} MiB")
    if sum(map(line.count, (b",", b"[", b"{"))) > MOST_THINGS:
        raise _odd_answer(f"more than {MOST_THINGS:,} values in a line")
    try:
        found = json.loads(line)
    except RecursionError as error:
        raise _odd_answer("values in values in values, too deep") from error
    except ValueError as error:  # no JSON, no UTF-8, a number of thousands of digits
        raise _odd_answer(f"not JSON but {printable(line[:40].decode(errors='replace'))}") from error
    if not isinstance(found, dict):
        raise _odd_answer("no object")
    return found


def returned(command: str, answer: Mapping[str, object]) -> Any:
    """What an answer of QMP to a command returns.

    :raises MonitorError: it says that QEMU refused the command.
    :raises ConnectionLostError: it is neither a result nor a refusal.
    """
    if "error" in answer:
        error = Answer(command, answer).object("error")
        words, kind = error.text("desc"), error.text("class")
        raise MonitorError(f"QEMU refused {command}: {words}", command=command, kind=kind)
    if "return" not in answer:
        raise _odd_answer(f"{command}: neither a result nor an error")
    return answer["return"]


class SocketMonitor(Monitor):
    """A QMP connection over a socket of the guest. Events that come in between answers are dropped.

    :param path: the socket, as a path of this process; with ``place`` only its name for messages.
    :param place: a descriptor of the socket's file (O_PATH), to connect to that whatever the path leads to by now.
    :param check: called with the connected socket before anything is sent, to see who is there; raises if it is not
        who it should be.
    :raises ConnectionLostError: nobody listens, QEMU does not greet because another client is connected, or it is no
        QEMU.
    :raises PermissionDeniedError: we may not connect.
    """

    def __init__(
        self, path: Path, *, place: int | None = None, check: Callable[[socket.socket], None] | None = None
    ) -> None:
        super().__init__()
        self._path = printable(os.fspath(path))
        self._lost = False
        self._socket = socket.socket(socket.AF_UNIX)
        self._received = bytearray()
        self._searched_bytes = 0
        # Also of the next client: see rule 1.
        self._id_begin = f"memshr-{secrets.token_hex(8)}-"
        self._requests = 0
        try:
            self._connect(os.fspath(path) if place is None else f"/proc/self/fd/{place}")
            if check is not None:
                check(self._socket)
            self._greet()
            self.execute("qmp_capabilities")
        except BaseException:
            self.close()
            raise

    def _connect(self, address: str) -> None:
        self._socket.settimeout(GREETING_DEADLINE_S)
        try:
            self._socket.connect(address)
        except PermissionError as error:
            raise PermissionDeniedError(
                f"may not connect to the QMP socket {self._path}", remedy="run as root or as the user of QEMU"
            ) from error
        except (TimeoutError, BlockingIOError) as error:  # more wait already than the listener's queue takes
            raise self._busy() from error
        except OSError as error:
            raise ConnectionLostError(
                f"cannot connect to the QMP socket {self._path}: {error.strerror or error}",
                remedy="give another one with NAME@/path/qmp.sock",
            ) from error

    def _greet(self) -> None:
        with self._waiting(GREETING_DEADLINE_S) as deadline_s:
            end_s = time.monotonic() + deadline_s
            try:
                greeting = self._receive(end_s)
                while "id" in greeting and not greeting.keys().isdisjoint(("return", "error")):
                    greeting = self._receive(end_s)  # the answer to a client that has hung up
            except TimeoutError as error:
                raise self._busy() from error
            except OSError as error:
                raise self._failed(error, "the connection") from error
            except ConnectionLostError as error:
                raise self._no_qmp() from error
        if not isinstance(greeting.get("QMP"), dict):
            raise self._no_qmp()

    def _busy(self) -> ConnectionLostError:
        return ConnectionLostError(
            f"the QMP socket {self._path} is busy: QEMU serves one client at a time and did not greet us",
            remedy="end the other client (libvirt keeps its own socket), or start QEMU with a second -qmp",
        )

    def _no_qmp(self) -> ConnectionLostError:
        return ConnectionLostError(
            f"{self._path} does not speak QMP", remedy="give the socket of -qmp or of a -mon with mode=control"
        )

    def _failed(self, error: OSError, what: str) -> ConnectionLostError:
        why = "QEMU hung up" if isinstance(error, ConnectionError) else error.strerror or str(error)
        return ConnectionLostError(f"{why} on {self._path} at {what}", remedy="does the guest still run?")

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        descriptor: int | None = None,
        deadline_s: float | None = None,
    ) -> Any:
        if self._lost:
            raise ConnectionLostError(
                f"the connection to {self._path} is closed, so {command} was not sent", remedy="connect again"
            )
        self._requests += 1
        name = f"{self._id_begin}{self._requests}"
        request = json.dumps({"execute": command, "arguments": arguments or {}, "id": name}).encode() + b"\n"
        try:
            with self._waiting(deadline_s) as patience_s:
                end_s = time.monotonic() + patience_s
                self._send(request, descriptor, end_s)
                answer = self._receive(end_s)
                while answer.get("id") != name or not ("return" in answer or "error" in answer):
                    answer = self._receive(end_s)
        except TimeoutError as error:
            self.close()
            raise ConnectionLostError(
                f"QEMU did not answer {command} on {self._path} in time", remedy="is QEMU stopped or frozen?"
            ) from error
        except OSError as error:
            self.close()
            raise self._failed(error, command) from error
        except BaseException:  # in the middle of a command nobody knows what comes next
            self.close()
            raise
        return returned(command, answer)

    def _send(self, request: bytes, descriptor: int | None, end_s: float) -> None:
        if descriptor is not None:
            self._allow(end_s)
            request = request[socket.send_fds(self._socket, [request], [descriptor]) :]
        self._allow(end_s)
        self._socket.sendall(request)

    def _allow(self, end_s: float) -> None:
        # Let the next call on the socket wait until ``end_s``.
        left_s = end_s - time.monotonic()
        if left_s <= 0:
            raise TimeoutError
        self._socket.settimeout(left_s)

    def _receive(self, end_s: float) -> dict[str, object]:
        """The next line. :raises TimeoutError: it is not there at ``end_s``."""
        while (end := self._received.find(b"\n", self._searched_bytes)) < 0:
            self._searched_bytes = len(self._received)
            if self._searched_bytes > MOST_BYTES:
                raise _odd_answer(f"a line of more than {MOST_BYTES >> 20} MiB")
            self._allow(end_s)
            received = self._socket.recv(1 << 16)
            if not received:
                raise ConnectionResetError
            self._received += received
        self._searched_bytes = 0
        line = bytes(memoryview(self._received)[:end])
        del self._received[: end + 1]
        return parsed(line)

    def close(self) -> None:
        """Hang up."""
        self._lost = True
        self._socket.close()
