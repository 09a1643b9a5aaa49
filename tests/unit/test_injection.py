"""The injector seen from outside: every wait ends, no answer is believed, and descriptors of QEMU are found."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.victims import altered
from memshr.errors import BackendError, RefusedDomainError
from memshr.qemu import injection, syscalls, tracee
from memshr.qemu.identity import identity_of
from memshr.qemu.injection import Injector, descriptor_number, is_same_file


def alternative(monkeypatch: pytest.MonkeyPatch, code: str) -> None:
    monkeypatch.setattr(injection, "command", lambda: [sys.executable, "-I", "-S", "-c", code])


def answering(monkeypatch: pytest.MonkeyPatch, answer: bytes) -> None:
    code = f"import socket; wire = socket.socket(fileno=0); wire.recv(9999); wire.send({answer!r}); wire.recv(9999)"
    alternative(monkeypatch, code)


@pytest.fixture
def injector() -> Iterator[Injector]:
    one = Injector()
    yield one
    one.close()
    assert one._process is None


def ask(injector: Injector) -> injection.Answer:
    with Path("/dev/null").open("rb") as file:
        return injector.ask("attach", identity_of(os.getpid()), 0, file.fileno())


def test_an_injector_that_does_not_answer_is_killed(monkeypatch: pytest.MonkeyPatch, injector: Injector) -> None:
    monkeypatch.setattr(injection, "ANSWER_DEADLINE_S", 0.2)
    alternative(monkeypatch, "import sys; sys.stdin.buffer.raw.read; import signal; signal.pause()")
    started: list[subprocess.Popen[bytes]] = []
    real = injector._start
    monkeypatch.setattr(injector, "_start", lambda: (real(), started.append(injector._process))[0])  # type: ignore[arg-type,func-returns-value]  # it has just been set
    with pytest.raises(BackendError, match="did not answer for 0 s on process"):
        ask(injector)
    assert started[0].returncode == -9
    assert injector._wire is None


def test_an_injector_that_does_not_end_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "_ENDING_DEADLINE_S", 0.2)
    alternative(monkeypatch, "import signal; signal.pause()")
    injector = Injector()
    injector._start()
    process = injector._process
    injector.close()
    assert process is not None
    assert process.returncode == -9


def test_a_request_that_takes_too_long_ends_the_injector(monkeypatch: pytest.MonkeyPatch, injector: Injector) -> None:
    slow = altered("injector.REQUEST_DEADLINE_S = 0.2; injector.answer = lambda *request: time.sleep(60)")
    monkeypatch.setattr(injection, "command", lambda: slow)
    with pytest.raises(BackendError, match="it took too long"):
        ask(injector)


def test_an_injector_that_fails_says_why(monkeypatch: pytest.MonkeyPatch, injector: Injector) -> None:
    alternative(monkeypatch, "raise SystemExit('no such thing')")
    with pytest.raises(BackendError, match=r"the injector failed on process \d+: no such thing"):
        ask(injector)


@pytest.mark.parametrize(
    "answer",
    [
        *(b"no JSON", b"[]", b"1", b"\xff", b'{"refused": "x"}', b'{"refused": 1, "remedy": "", "stuck": false}'),
        *(
            b'{"code_address": "1", "forbidden": []}',
            b'{"code_address": -1, "forbidden": []}',
            b'{"code_address": 4096}',
        ),
        *(b'{"code_address": 4096, "forbidden": ["x"]}', b'{"code_address": 4096, "forbidden": [], "more": 1}'),
        *(b'{"code_address": 1e300, "forbidden": []}', b'{"forbidden": [99999]}', b'{"more": 1}'),
    ],
)
def test_an_answer_of_another_form_is_not_believed(
    monkeypatch: pytest.MonkeyPatch, injector: Injector, answer: bytes
) -> None:
    answering(monkeypatch, answer)
    with pytest.raises(BackendError, match="no sensible answer"):
        ask(injector)


@pytest.mark.parametrize(
    ("answer", "found"),
    [
        (b"{}", {}),
        (b'{"forbidden": [28]}', {"forbidden": [28]}),
        (b'{"code_address": 4096, "forbidden": []}', {"code_address": 4096, "forbidden": []}),
        (b'{"refused": "a", "remedy": "b", "stuck": true}', {"refused": "a", "remedy": "b", "stuck": True}),
    ],
)
def test_answers(monkeypatch: pytest.MonkeyPatch, injector: Injector, answer: bytes, found: dict[str, object]) -> None:
    answering(monkeypatch, answer)
    assert ask(injector) == found
    assert (injector._process is None) == bool(found.get("stuck"))


class Interrupted(socket.socket):
    """A Ctrl-C comes while we wait for an answer."""

    def recv(self, *_: object) -> bytes:
        raise KeyboardInterrupt


def test_answer_of_the_injector_that_nobody_waited_for_is_not_taken_for_the_next_one() -> None:
    injector = Injector()
    injector._wire = Interrupted(fileno=injector._start().detach())
    with pytest.raises(KeyboardInterrupt):
        ask(injector)
    assert injector._wire is None
    assert injector._process is None


# -- descriptors -------------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def holding(*files: int) -> Iterator[tuple[int, int]]:
    """A process that has inherited these descriptors: its pid, and a pidfd of it."""
    process = subprocess.Popen(["/bin/cat"], stdin=subprocess.PIPE, pass_fds=files)
    pidfd = os.pidfd_open(process.pid)
    try:
        yield process.pid, pidfd
    finally:
        os.close(pidfd)
        process.kill()
        process.communicate()


def test_the_number_of_a_memory_file_a_socket_and_a_device() -> None:
    memory, other = syscalls.memfd_create("memshr-agent"), syscalls.memfd_create("memshr-agent")
    one, two = socket.socketpair()
    device, again = os.open("/dev/null", os.O_RDWR), os.open("/dev/null", os.O_RDWR)
    files = [other, memory, two.fileno(), one.fileno(), again, device]
    with holding(*files) as (pid, pidfd):
        for file in files:
            assert descriptor_number(pid, pidfd, file) == file
    with holding(other, two.fileno(), again) as (pid, pidfd):
        for file in (memory, one.fileno(), device):
            with pytest.raises(RefusedDomainError, match="does not have the descriptor"):
                descriptor_number(pid, pidfd, file)
    for file in (memory, other, device, again):
        os.close(file)
    one.close()
    two.close()


def test_without_kcmp_the_inode_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    def lacking(one: int, other: int) -> bool:
        raise OSError(38, "Function not implemented")

    monkeypatch.setattr(syscalls, "is_same_open_file", lacking)
    memory, other = syscalls.memfd_create("memshr-agent"), syscalls.memfd_create("memshr-agent")
    copy = os.dup(memory)
    assert is_same_file(memory, copy)
    assert not is_same_file(memory, other)
    for file in (memory, other, copy):
        os.close(file)


def test_a_process_with_very_many_descriptors_is_not_searched_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(injection, "_DESCRIPTORS_MOST", 3)
    memory = syscalls.memfd_create("memshr-agent")
    with (
        holding(memory) as (pid, pidfd),
        pytest.raises(RefusedDomainError, match="does not have the descriptor"),
    ):
        descriptor_number(pid, pidfd, memory)
    os.close(memory)


def test_the_injector_does_not_read_maps_without_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert len(list(tracee.mappings(os.getpid()))) > 3
    monkeypatch.setattr(tracee, "_MAPS_MOST_LINES", 3)
    with pytest.raises(tracee.Refused, match="too many mappings"):
        list(tracee.mappings(os.getpid()))
