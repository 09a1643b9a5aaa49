"""The record of a run: what the modules of memshr say through ``logging``, kept and written for later.

Every module logs under its own name (``logging.getLogger(__name__)``), so all of it is below ``memshr``. A program that
imports memshr gets no handler but a ``NullHandler`` (see ``memshr.hypervisor``) and sets up its own, as with any
library. The command line uses this module.

What makes this hard: records are made while writers of guests wait, and a terminal that is held by Ctrl-S, a pipe that
nobody reads or a full disk may block or fail at any time. So:

1. A logging call keeps the record and, if anybody wants it, puts it into a queue. It formats nothing, writes nothing
   and takes no lock of ours. A thread of its own writes.
2. What cannot be written is lost, and one line on standard error says so. No error leaves a logging call, no command
   ends for it, and no command waits for it longer than FLUSH_DEADLINE_S.
3. A record is one line, whatever names of strangers are in it.
"""

from __future__ import annotations

import contextlib
import copy
import errno
import importlib.metadata
import logging
import os
import platform
import queue
import shlex
import stat
import sys
import tempfile
import threading
from collections import deque
from datetime import UTC, datetime
from typing import Final, Protocol, TextIO

from memshr.errors import MemshrError, printable

KEPT_LINES: Final = 100
"""How many of the latest records are kept in memory."""
LINE_CHARACTERS: Final = 4000
"""What is longer is cut: a text may hold a name that a stranger made long."""
QUEUED_LINES: Final = 10_000
"""How many records wait for a slow file or terminal before further ones are dropped (and counted)."""
FLUSH_DEADLINE_S: Final = 2.0
"""How long a command waits at its end for a slow file or terminal."""

_NOBODY: Final = logging.CRITICAL + 1
# Values that cannot change until they are formatted, and that hold on to nothing else.
_LASTING: Final = frozenset({int, float, str, bytes, bool, type(None)})

_log = logging.getLogger(__name__)


class _Outlet(Protocol):
    # Something that lines are written to, by the writing thread alone.
    level: int

    def write(self, line: str) -> None: ...

    def close(self) -> None: ...


class Record(logging.Handler):
    """Keeps the last KEPT_LINES records of ``memshr``, and writes them all to a file or to standard error if asked to.

    It listens from the moment it is made until ``close``, from level DEBUG on. Cost of a record that nobody wants to
    read: that of a LogRecord.
    """

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self._kept: deque[logging.LogRecord] = deque(maxlen=KEPT_LINES)
        self._queue: queue.SimpleQueue[logging.LogRecord | threading.Event | None] = queue.SimpleQueue()
        self._wanted_level = _NOBODY
        self._dropped_lines = 0
        self._patience_s = FLUSH_DEADLINE_S
        self._file: _FileOutlet | None = None
        self._writer: threading.Thread | None = None
        self._logger = logging.getLogger("memshr")
        self._level_before = self._logger.level
        self._logger.addHandler(self)
        self._logger.setLevel(logging.DEBUG)

    def createLock(self) -> None:  # logging's name
        """No lock: a deque and a queue need none, and no thread that serves a guest waits for another one here."""
        self.lock = None

    def emit(self, record: logging.LogRecord) -> None:
        """Keep a record, and hand it to the writing thread if there is one that wants it."""
        record = _lasting(record)
        self._kept.append(record)
        if record.levelno >= self._wanted_level:
            if self._queue.qsize() < QUEUED_LINES:
                self._queue.put(record)
            else:
                self._dropped_lines += 1

    def enable(self, log_file: str | os.PathLike[str] | None, verbose: int) -> None:
        """Write what is recorded from now on.

        :param log_file: a file to which all levels are appended; it is made with mode 0600 if it is not there.
        :param verbose: 1: levels from INFO on go to standard error; more: all levels; 0: none.
        :raises MemshrError: the file cannot be opened, or is none to which a record should be written: a link, a pipe,
            a directory, a file of another user.
        """
        outlets: list[_Outlet] = []
        if log_file is not None:
            self._file = _FileOutlet(log_file)
            outlets.append(self._file)
        if verbose:
            outlets.append(_ErrorOutlet(logging.INFO if verbose == 1 else logging.DEBUG))
        if not outlets:
            return
        self._writer = threading.Thread(target=self._write, args=(outlets,), name="memshr-record", daemon=True)
        self._writer.start()
        self._wanted_level = min(outlet.level for outlet in outlets)
        _log.info("%s", _heading())

    def lines(self) -> list[str]:
        """The last KEPT_LINES records, oldest first, as lines without line ends."""
        return [_line(record) for record in list(self._kept)]

    def kept_where(self) -> str:
        """Where somebody finds the last records: words for the end of a message.

        They are in the file of ``enable``, if all of them could be written to it; else they are written to a fresh file
        that only this user can read.
        """
        written = self._flushed()
        if self._file is not None and written and self._file.complete and not self._dropped_lines:
            return f"what led to it is at the end of {self._file.path}"
        try:
            descriptor, path = tempfile.mkstemp(prefix="memshr-record-", suffix=".log")
            with open(descriptor, "w", encoding="utf-8") as file:  # noqa: PTH123  # a descriptor, which has no path
                file.writelines(f"{line}\n" for line in [printable(_heading()), *self.lines()])
        except OSError as error:
            return f"the record of what led to it could not be written: {error.strerror}"
        return f"what led to it is in {path}"

    def flush(self) -> None:
        """Wait until all records so far are written, but no longer than FLUSH_DEADLINE_S, and once only so long."""
        self._flushed()

    def _flushed(self) -> bool:
        # Whether all records so far have been written in time.
        if self._writer is None:
            return True
        written = threading.Event()
        self._queue.put(written)
        if not written.wait(self._patience_s):
            self._patience_s = 0.0
            return False
        return True

    def close(self) -> None:
        """Write what waits, as ``flush`` does, and stop listening. A second time it does nothing."""
        if self in self._logger.handlers:
            self._logger.removeHandler(self)
            self._logger.setLevel(self._level_before)
        self._wanted_level = _NOBODY
        writer, self._writer = self._writer, None
        if writer is not None:
            self._queue.put(None)
            writer.join(self._patience_s)
        super().close()

    def _write(self, outlets: list[_Outlet]) -> None:
        # The writing thread.
        told_lines = 0
        while (item := self._queue.get()) is not None:
            if isinstance(item, threading.Event):
                item.set()
                continue
            lines = [_line(item)]
            if (dropped_lines := self._dropped_lines) > told_lines:
                lines.insert(0, f"{dropped_lines - told_lines} lines are missing here: writing them took too long")
                told_lines = dropped_lines
            for outlet in outlets:
                if item.levelno >= outlet.level:
                    for line in lines:
                        outlet.write(line)
        for outlet in outlets:
            outlet.close()


class _FileOutlet:
    # The file of --log.

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.level = logging.DEBUG
        self.path = os.fspath(path)
        self.complete = True
        self._descriptor = _open_log(self.path)
        self._cut = False

    def write(self, line: str) -> None:
        # After a line that a full disk cut short, the next one begins anew.
        data = b"\n" * self._cut + line.encode() + b"\n"
        written_bytes = 0
        try:
            # O_APPEND: lines of several memshr's do not overwrite each other.
            while written_bytes < len(data):
                written_bytes += os.write(self._descriptor, data[written_bytes:])
            self._cut = False
        except OSError as error:
            self._cut |= written_bytes > 0
            if self.complete:
                self.complete = False
                text = f"memshr: the record is not complete: {self.path} cannot be written: {error.strerror}"
                _print_error(sys.stderr, printable(text))

    def close(self) -> None:
        with contextlib.suppress(OSError):  # a file system may tell only now of what it could not write
            os.close(self._descriptor)


class _ErrorOutlet:
    # Standard error. On a terminal it is looked up for each line: while a progress bar is shown, rich has put itself in
    # its place, and shows lines above the bar.

    def __init__(self, level: int) -> None:
        self.level = level
        self._stream = sys.stderr
        self._terminal = sys.stderr is not None and sys.stderr.isatty()

    def write(self, line: str) -> None:
        _print_error(sys.stderr if self._terminal else self._stream, line)

    def close(self) -> None:
        pass


def _print_error(stream: TextIO | None, line: str) -> None:
    # A line on standard error; lost if that is closed (ValueError, or None from the start) or cannot be written.
    if stream is not None:
        with contextlib.suppress(OSError, ValueError):
            stream.write(f"{line}\n")
            stream.flush()


def _open_log(path: str) -> int:
    # SAFETY: memshr is root, and the file may be in a folder where others can write. O_NOFOLLOW and the checks of what
    # was opened keep us from writing into something that another user has put there; O_NONBLOCK keeps a pipe from
    # holding us. Nothing is written before the checks.
    flags = os.O_WRONLY | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    name = path if path.isprintable() else repr(path)
    try:
        descriptor = os.open(path, flags, 0o600)
    except (OSError, ValueError) as error:  # ValueError: a name with a null byte
        number = error.errno if isinstance(error, OSError) else None
        if number in _NO_LOG_FILE:
            raise _no_log_file(name, _NO_LOG_FILE[number]) from error
        reason = error.strerror if isinstance(error, OSError) else error
        raise MemshrError(f"{name}: the record cannot be written there: {reason}") from error
    status = os.fstat(descriptor)
    problem = ""
    if not stat.S_ISREG(status.st_mode):
        problem = "is no regular file"
    elif status.st_nlink > 1:
        problem = "has a second name (a hard link)"
    elif status.st_uid != os.geteuid():
        problem = "belongs to another user"
    if problem:
        os.close(descriptor)
        raise _no_log_file(name, problem)
    return descriptor


_NO_LOG_FILE: Final = {
    errno.ELOOP: "is a symbolic link",
    errno.EISDIR: "is a directory",
    errno.ENXIO: "is no regular file",  # a pipe that nobody reads, or a socket
}


def _no_log_file(name: str, problem: str) -> MemshrError:
    return MemshrError(f"{name} {problem}", remedy="name a file of your own, or a new one, for --log")


def _lasting(record: logging.LogRecord) -> logging.LogRecord:
    # The record, such that it can be formatted at any time and keeps nothing alive: exceptions hold the frames that
    # they went through, with all buffers in them. Numbers and texts are left to be formatted when somebody asks.
    arguments = record.args or ()
    if not record.exc_info and isinstance(arguments, tuple) and _LASTING.issuperset(map(type, arguments)):
        return record
    record = copy.copy(record)  # other handlers have it, too
    record.msg, record.args = _message(record), None
    if record.exc_info and not record.exc_text:
        record.exc_text = _FORMATTER.formatException(record.exc_info)
    record.exc_info = None
    return record


_FORMATTER: Final = logging.Formatter()


def _message(record: logging.LogRecord) -> str:
    try:
        return record.getMessage()
    except (TypeError, ValueError, KeyError, OverflowError):  # what % raises: the arguments do not fit the text
        return f"{record.msg} {record.args!r}"


def _line(record: logging.LogRecord) -> str:
    # One line: time in UTC, level, logger, process, text; an exception's lines follow as escapes.
    when = datetime.fromtimestamp(record.created, UTC).isoformat(timespec="microseconds").replace("+00:00", "Z")
    text = _message(record)
    if record.exc_text:
        text = f"{text}: {record.exc_text}"
    if len(text) > LINE_CHARACTERS:
        text = f"{text[:LINE_CHARACTERS]}..."
    return f"{when} {record.levelname} {record.name} {record.process} {printable(text)}"


def _heading() -> str:
    # What somebody who is sent a record has to know first.
    try:
        version = importlib.metadata.version("memshr")
    except importlib.metadata.PackageNotFoundError:  # a source tree that is not installed
        version = "(not installed)"
    system = os.uname()
    command = shlex.join(["memshr", *sys.argv[1:]])
    return f"memshr {version}, Python {platform.python_version()}, {system.sysname} {system.release}: {command}"
