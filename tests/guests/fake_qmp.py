"""A QMP server that answers as a test wants, also as no QEMU would: in a thread, or as a program called QEMU."""

import contextlib
import ctypes
import json
import mmap
import os
import shutil
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from guests.machine import wait_until

GREETING = (
    b'{"QMP": {"version": {"qemu": {"micro": 0, "minor": 2, "major": 7}, "package": ""}, "capabilities": []}}\r\n'
)
START_DEADLINE_S = 30.0
PACE_S = 0.01

Request = dict[str, Any]
Reply = Callable[[Request], Iterator[bytes]]


def line(content: object) -> bytes:
    """An object as QEMU writes it."""
    return json.dumps(content).encode() + b"\r\n"


def returning(value: object) -> Reply:
    """The proper answer that a command returned this."""

    def reply(request: Request) -> Iterator[bytes]:
        yield line({"return": value, "id": request["id"]})

    return reply


def refusing(words: object, kind: object = "GenericError") -> Reply:
    """The proper answer that QEMU refused a command."""

    def reply(request: Request) -> Iterator[bytes]:
        yield line({"error": {"class": kind, "desc": words}, "id": request["id"]})

    return reply


def saying(*pieces: bytes) -> Reply:
    """These bytes, in which ``ID`` stands for the id of the request."""

    def reply(request: Request) -> Iterator[bytes]:
        for each in pieces:
            yield each.replace(b"ID", json.dumps(request["id"]).encode())

    return reply


def endless(piece: bytes) -> Reply:
    """The same bytes for ever."""

    def reply(request: Request) -> Iterator[bytes]:
        while True:
            yield piece

    return reply


class FakeQmp:
    """Serves one client after the other until the ``with`` ends.

    :param replies: what to say to each command; to one that is not named: that there is none.
    :param pace_s: how long to wait before each piece of an answer.
    :param listener: a socket that listens already; None: one at ``path`` is made.

    ``requests`` and ``raw`` are what was received, ``files`` the descriptors that came along.
    """

    def __init__(
        self,
        path: Path,
        replies: Mapping[str, Reply],
        *,
        greeting: bytes = GREETING,
        pace_s: float = 0.0,
        listener: socket.socket | None = None,
    ) -> None:
        self.path = path
        self.requests: list[Request] = []
        self.raw = b""
        self.files: list[int] = []
        self._replies = {"qmp_capabilities": returning({}), **replies}
        self._greeting, self._pace_s = greeting, pace_s
        self._ended = threading.Event()
        if listener is None:
            listener = socket.socket(socket.AF_UNIX)
            early = path.with_name(f"{path.name}.early")  # whoever finds it at its place can connect
            listener.bind(os.fspath(early))
            listener.listen(4)
            early.rename(path)
        self._listener = listener
        self._thread = threading.Thread(target=self._serve, name="fake-qmp", daemon=True)
        self._client: socket.socket | None = None

    @property
    def commands(self) -> list[str]:
        """What was asked, besides the capabilities that begin each connection."""
        return [str(each["execute"]) for each in self.requests if each["execute"] != "qmp_capabilities"]

    def _serve(self) -> None:
        while True:
            try:
                self._client, _ = self._listener.accept()
            except OSError:  # the end
                return
            with self._client:
                try:
                    self._client.sendall(self._greeting)
                    self._answer(self._client)
                except OSError:  # the client hung up
                    continue

    def _answer(self, client: socket.socket) -> None:
        received = b""
        while True:
            piece, files, _, _ = socket.recv_fds(client, 1 << 16, 4)
            self.files += files
            if not piece:
                return
            self.raw += piece
            received += piece
            while b"\n" in received:
                text, _, received = received.partition(b"\n")
                request = json.loads(text)
                self.requests.append(request)
                reply = self._replies.get(request["execute"], refusing("no such command", "CommandNotFound"))
                for answer in reply(request):
                    if self._ended.wait(self._pace_s):
                        return
                    client.sendall(answer)

    def __enter__(self) -> Self:
        self._thread.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._ended.set()
        for each in (self._listener, self._client):
            if each is not None:
                with contextlib.suppress(OSError):  # not connected any more
                    each.shutdown(socket.SHUT_RDWR)
                each.close()
        self._thread.join()
        for file in self.files:
            os.close(file)


# -- as a program ------------------------------------------------------------------------------------------------------

RAM_MIB = 4


def flat_view(*ranges: tuple[int, int, str]) -> str:
    """What ``info mtree -f`` prints of RAM from an address up to, not including, another."""
    lines = [f"  {first:016x}-{end - 1:016x} (prio 0, ram): {name}" for first, end, name in ranges]
    return "\n".join(["FlatView #0", ' AS "memory", root: system', " Root memory region: system", *lines, ""])


def honest(hva: int, view: str = "") -> dict[str, Reply]:
    """The replies of a guest that has some RAM at an address of this process."""

    def human(request: Request) -> Iterator[bytes]:
        asked = request["arguments"]["command-line"]
        text = f"Host virtual address for 0x0 (pc.ram) is {hva:#x}\r\n"
        if asked == "info mtree -f":
            text = view or flat_view((0, RAM_MIB << 20, "pc.ram"))
        return returning(text)(request)

    return {
        "query-status": returning({"status": "running", "running": True, "singlestep": False}),
        "query-memdev": returning([]),
        "human-monitor-command": human,
        "query-migrate": returning({}),
        "query-memory-devices": returning([]),
        "qom-list": returning([]),
    }


def odd(mode: str, hva: int) -> dict[str, Reply]:
    """The replies of a guest that is odd in one way; ``honest`` is none."""
    replies = honest(hva)
    nothing: dict[str, Reply] = {}
    return (
        replies
        | {
            "honest": nothing,
            "deep": {"query-status": saying(b'{"return": ' + b"[" * 100_000 + b"\r\n")},
            "digits": {"query-status": saying(b'{"return": ' + b"9" * 10_000 + b', "id": ID}\r\n')},
            "no-object": {"query-status": returning(["running"])},
            "no-word": {"query-status": returning({"status": {"a": 1}, "running": True})},
            "markup": {"query-status": returning({"status": "[/x]\x1b[31m", "running": True})},
            "refusal": {"query-migrate": refusing("\x1b]0;title\x07\u202e")},
            "huge-layout": honest(hva, flat_view((0, 2 << 40, "pc.ram"))),
            "empty-layout": honest(0x1000),
            "many-ranges": honest(hva, flat_view(*((at << 13, (at << 13) + 4096, "pc.ram") for at in range(5000)))),
            "no-list": {"query-memdev": returning({"id": 1})},
            "odd-device": {"qom-list": returning([{"name": 1}])},
            "hung-up": {"query-status": saying()},
        }[mode]
    )


class FakeQemu:
    """A process whose program is called QEMU, that answers QMP in one of the modes of ``odd``; ended for sure."""

    def __init__(self, folder: Path, mode: str, *, socket_path: Path | None = None) -> None:
        self.mode = mode
        self.socket_path = folder / f"{mode}.qmp"
        program = folder / "qemu-system-x86_64"
        if not program.exists():
            shutil.copy(Path(sys.executable).resolve(), program)
        # The program looks for its library where it is, unless it is told.
        here = os.pathsep.join(map(os.fspath, (Path(__file__).parents[1], Path(__file__).parents[2] / "src")))
        environment = os.environ | {"PYTHONHOME": sys.base_prefix, "PYTHONPATH": here}
        named = socket_path or self.socket_path
        arguments = ["-m", "guests.fake_qmp", os.fspath(self.socket_path), mode, "-name", mode]
        self._process = subprocess.Popen(
            [program, *arguments, "-qmp", f"unix:{named},server=on,wait=off"], env=environment
        )
        try:
            wait_until(self.socket_path.exists, START_DEADLINE_S, "the fake QEMU listens")
        except BaseException:
            self.kill()
            raise

    @property
    def pid(self) -> int:
        """Its process."""
        return self._process.pid

    def kill(self) -> None:
        """End it."""
        self._process.kill()
        self._process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.kill()


def main() -> None:
    """Serve in a mode until killed, or until whoever started us is gone.

    ``chrooted`` lives in the folder of its socket, to which an absolute link leads; ``passed-on`` listens on a socket
    that a process made which has ended; both are honest else.
    """
    path, mode = Path(sys.argv[1]), sys.argv[2]
    ram = Ram(RAM_MIB << 20)
    parent = os.getppid()
    listener = None
    if mode == "passed-on":
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(os.fspath(path.with_suffix(".early")))
        if (child := os.fork()) == 0:
            listener.listen(4)
            os._exit(0)
        os.waitpid(child, 0)
        path.with_suffix(".early").rename(path)
    if mode == "chrooted":
        os.chroot(path.parent)
        Path("/link").symlink_to("/inside.qmp")
        Path("/chrooted.qmp").symlink_to("inside.qmp")
        path = Path("/inside.qmp")
    with FakeQmp(path, odd("honest" if mode in {"chrooted", "passed-on"} else mode, ram.address), listener=listener):
        while os.getppid() == parent:
            threading.Event().wait(0.5)


class Ram:
    """Private anonymous memory."""

    def __init__(self, length_bytes: int) -> None:
        self._memory = mmap.mmap(-1, length_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        self.address = ctypes.addressof(ctypes.c_char.from_buffer(self._memory))


if __name__ == "__main__":
    main()
