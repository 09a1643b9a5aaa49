"""The record: what it keeps, what it writes where, and that neither names of strangers nor full disks can harm it."""

from __future__ import annotations

import contextlib
import io
import logging
import os
import re
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from memshr.errors import MemshrError
from memshr.record import KEPT_LINES, LINE_CHARACTERS, QUEUED_LINES, Record

LOG = logging.getLogger("memshr.test")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{6}Z (DEBUG|INFO|WARNING|ERROR|CRITICAL) memshr\S* \d+ .+")


@pytest.fixture
def record() -> Iterator[Record]:
    """A record that listens."""
    record = Record()
    yield record
    record.close()


def texts(lines: list[str]) -> list[str]:
    """The lines without time, level, logger and process."""
    return [line.split(" ", 4)[4] for line in lines]


def test_last_hundred_are_kept_at_every_level(record: Record) -> None:
    for number in range(KEPT_LINES + 7):
        LOG.debug("number %d", number)
    assert texts(record.lines()) == [f"number {number}" for number in range(7, KEPT_LINES + 7)]
    assert all(LINE.fullmatch(line) for line in record.lines())
    assert f" DEBUG memshr.test {os.getpid()} " in record.lines()[0]


def test_nothing_is_formatted_before_somebody_asks(record: Record) -> None:
    # The text of a record that nobody reads is never put together: that is what makes it cheap.
    LOG.debug("number %d", 3)
    (kept,) = record._kept
    assert (kept.msg, kept.args) == ("number %d", (3,))


def test_what_may_change_is_formatted_at_once_and_not_held(record: Record) -> None:
    numbers = [1]
    error = OSError(5, "no")
    LOG.info("%s %s", numbers, error)
    numbers.append(2)
    assert texts(record.lines()) == ["[1] [Errno 5] no"]
    assert record._kept[0].args is None


def test_an_exception_is_one_line_and_its_frames_are_let_go(record: Record, caplog: pytest.LogCaptureFixture) -> None:
    try:
        raise ValueError("two\nlines")
    except ValueError:
        LOG.exception("watch %d", 7)
    (line,) = record.lines()
    assert LINE.fullmatch(line)
    assert "watch 7: Traceback (most recent call last):\\n" in line
    assert line.endswith("ValueError: two\\nlines")
    assert record._kept[0].exc_info is None
    assert caplog.records[0].exc_info is not None  # other handlers get the record as it was


def test_a_record_that_does_not_fit_its_text_is_kept_all_the_same(
    record: Record, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LOG.parent, "propagate", False)  # pytest's own handler makes an error of it
    LOG.info("%d pages", "no number")
    LOG.info("%d pages", ["no number"])
    assert texts(record.lines()) == ["%d pages ('no number',)", "%d pages (['no number'],)"]


@pytest.mark.parametrize("name", ["a\nb", "\x1b[2Ja", "a\r\u2028b", "\udc80", "a\x00b"])
def test_a_name_writes_neither_lines_nor_commands_of_a_terminal(record: Record, tmp_path: Path, name: str) -> None:
    record.enable(tmp_path / "log", 0)
    LOG.info("guest %s", name)
    record.close()
    text = (tmp_path / "log").read_text()
    assert [bool(LINE.fullmatch(line)) for line in text.split("\n")] == [True, True, False]
    assert all(letter.isprintable() for letter in text.replace("\n", ""))


def test_a_long_text_is_cut(record: Record) -> None:
    LOG.info("guest %s", "x" * 1_000_000)
    assert len(texts(record.lines())[0]) == LINE_CHARACTERS + 3


def test_the_file_has_all_levels_and_is_appended_to(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_text("before\n")
    path.chmod(0o644)
    record.enable(path, 0)
    LOG.debug("first")
    LOG.info("second")
    record.close()
    before, heading, *lines = path.read_text().splitlines()
    assert before == "before"
    assert re.search(r" INFO memshr\.record \d+ memshr .*Python 3.*: memshr", heading)
    assert texts(lines) == ["first", "second"]
    assert stat.S_IMODE(path.stat().st_mode) == 0o644


def test_a_new_file_is_private(record: Record, tmp_path: Path) -> None:
    record.enable(tmp_path / "log", 0)
    assert stat.S_IMODE((tmp_path / "log").stat().st_mode) == 0o600


def make_link(path: Path) -> None:
    (path.parent / "target").write_text("kept")
    path.symlink_to(path.parent / "target")


def make_second_name(path: Path) -> None:
    (path.parent / "target").write_text("kept")
    path.hardlink_to(path.parent / "target")


def make_pipe_with_reader(path: Path) -> None:
    os.mkfifo(path)
    os.open(path, os.O_RDONLY | os.O_NONBLOCK)


NO_FILES: dict[str, tuple[Callable[[Path], object], str]] = {
    "link": (make_link, "is a symbolic link; name a file"),
    "dangling": (lambda path: path.symlink_to("nowhere"), "is a symbolic link"),
    "second name": (make_second_name, "has a second name"),
    "directory": (Path.mkdir, "is a directory"),
    "pipe": (os.mkfifo, "is no regular file"),
    "read pipe": (make_pipe_with_reader, "is no regular file"),
    "no folder": (lambda _path: None, "the record cannot be written there: No such file"),
}


@pytest.mark.parametrize("kind", NO_FILES)
def test_what_is_no_file_of_ours_is_refused(record: Record, tmp_path: Path, kind: str) -> None:
    make, words = NO_FILES[kind]
    path = tmp_path / "log" if kind != "no folder" else tmp_path / "no" / "log"
    make(path)
    before = sorted(path.name for path in Path("/proc/self/fd").iterdir())
    with pytest.raises(MemshrError, match=re.escape(words)) as refusal:
        record.enable(path, 0)
    assert "\n" not in str(refusal.value)
    assert refusal.value.exit_code == 2
    assert sorted(path.name for path in Path("/proc/self/fd").iterdir()) == before
    if (tmp_path / "target").exists():
        assert (tmp_path / "target").read_text() == "kept"
    assert not (tmp_path / "nowhere").exists()


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can make a file of another user")
def test_a_file_of_another_user_is_refused(record: Record, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.touch()
    os.chown(path, 65534, 65534)
    with pytest.raises(MemshrError, match="belongs to another user"):
        record.enable(path, 0)
    assert path.read_text() == ""


@pytest.mark.parametrize(("verbose", "shown"), [(1, ["second"]), (2, ["first", "second"]), (3, ["first", "second"])])
def test_verbose_says_on_standard_error(
    record: Record, capsys: pytest.CaptureFixture[str], verbose: int, shown: list[str]
) -> None:
    record.enable(None, verbose)
    LOG.debug("first")
    LOG.info("second")
    record.flush()
    assert texts(capsys.readouterr().err.splitlines())[1:] == shown


class Terminal(io.StringIO):
    """A stream that says it is a terminal."""

    def isatty(self) -> bool:
        return True


def test_on_a_terminal_lines_go_to_what_stands_for_it_now(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    # A progress bar puts itself in the place of standard error, so that lines are shown above it.
    terminal, bar = Terminal(), Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    record.enable(None, 1)
    record.flush()
    monkeypatch.setattr(sys, "stderr", bar)
    LOG.info("above the bar")
    record.flush()
    assert "above" not in terminal.getvalue()
    assert texts(bar.getvalue().splitlines()) == ["above the bar"]


def test_nobody_is_written_to_unless_asked(record: Record, capfd: pytest.CaptureFixture[str]) -> None:
    LOG.critical("loud")
    record.flush()
    assert capfd.readouterr() == ("", "")


class Gate(io.TextIOBase):
    """A standard error that blocks whoever writes, until it is opened: a terminal held by Ctrl-S."""

    def __init__(self) -> None:
        super().__init__()
        self.opened, self.tried = threading.Event(), threading.Event()
        self.text = io.StringIO()

    def write(self, text: str) -> int:
        self.tried.set()
        assert self.opened.wait(60)
        return self.text.write(text)

    def isatty(self) -> bool:
        return True


def test_a_terminal_that_is_held_holds_no_logging_call(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    # If a logging call waited for the terminal, this test would not get to opening it.
    gate = Gate()
    monkeypatch.setattr(sys, "stderr", gate)
    record.enable(None, 1)
    assert gate.tried.wait(60)
    for number in range(QUEUED_LINES + 5):
        LOG.info("number %d", number)
    assert texts(record.lines())[-1] == f"number {QUEUED_LINES + 4}"
    gate.opened.set()
    while gate.text.getvalue().count("\n") < QUEUED_LINES:
        record.flush()
    LOG.info("later")
    record.close()
    lines = gate.text.getvalue().splitlines()
    # What was not written is told, by number, before what comes next.
    assert any(line.startswith("5 lines are missing here") for line in lines)
    assert lines[-1].endswith("later")


def test_the_end_does_not_wait_for_ever(record: Record, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate()
    monkeypatch.setattr(sys, "stderr", gate)
    monkeypatch.setattr(record, "_patience_s", 0.01)
    record.enable(None, 1)
    assert gate.tried.wait(60)
    record.flush()
    record.close()
    assert not gate.opened.is_set()
    assert record._patience_s == 0  # whoever has waited once does not wait again
    gate.opened.set()


IMPATIENT = """
import memshr.record
memshr.record.FLUSH_DEADLINE_S = 0.01
from memshr.cli.main import main
main()
"""


def test_a_command_ends_well_though_nobody_reads_its_standard_error(tmp_path: Path) -> None:
    (tmp_path / "image").write_bytes(bytes(8192))
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, bytes(4096))
    os.set_blocking(writer, True)
    command = [sys.executable, "-c", IMPATIENT, "-v", "share", str(tmp_path / "image"), "--json"]
    try:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=writer, timeout=300, check=False)
    finally:
        os.close(reader)
        os.close(writer)
    assert (done.returncode, done.stdout[:1]) == (0, b"{")


def test_last_records_are_in_the_file_of_log(record: Record, tmp_path: Path) -> None:
    record.enable(tmp_path / "log", 0)
    LOG.debug("the last")
    assert record.kept_where() == f"what led to it is at the end of {tmp_path / 'log'}"
    assert (tmp_path / "log").read_text().endswith("the last\n")


def test_last_records_are_in_a_private_file(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    LOG.debug("guest %s", "a\nb")
    LOG.debug("the last")
    where = record.kept_where()
    (path,) = tmp_path.iterdir()
    assert where == f"what led to it is in {path}"
    assert path.name.startswith("memshr-record-")
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    heading, *lines = path.read_text().splitlines()
    assert heading.startswith("memshr ")
    assert texts(lines) == ["guest a\\nb", "the last"]


def test_no_room_for_the_last_records_is_told(record: Record, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "none"))
    assert record.kept_where() == ("the record of what led to it could not be written: No such file or directory")


FULL_DISK = """
import logging, resource, sys
from memshr.record import Record
record, log = Record(), logging.getLogger("memshr.test")
record.enable(sys.argv[1], 0)
record.flush()
size = __import__("os").stat(sys.argv[1]).st_size
resource.setrlimit(resource.RLIMIT_FSIZE, (size + 20, resource.RLIM_INFINITY))
for number in range(3):
    log.info("number %d", number)
record.flush()
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
log.info("room again")
print(record.kept_where())
record.close()
"""


def test_a_full_disk_is_told_once_and_ends_nothing(tmp_path: Path) -> None:
    # A limit on the file's size plays the full disk: the kernel writes what fits, then refuses.
    environment = {**os.environ, "TMPDIR": str(tmp_path)}
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path / "log")]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert done.stderr == f"memshr: the record is not complete: {tmp_path / 'log'} cannot be written: File too large\n"
    _heading, cut, again = (tmp_path / "log").read_text().splitlines()
    assert len(cut) == 20
    assert LINE.fullmatch(again)
    assert again.endswith("room again")
    # The file lacks lines, so the last ones are written elsewhere.
    assert done.stdout.startswith(f"what led to it is in {tmp_path}/memshr-record-")


@pytest.mark.parametrize("redirection", ["2>&-", "2>/dev/full", "2> >(true)"])
def test_a_standard_error_that_cannot_be_written_ends_nothing(tmp_path: Path, redirection: str) -> None:
    (tmp_path / "image").write_bytes(bytes(8192))
    command = f"{sys.executable} -m memshr -vv share {tmp_path / 'image'} --json {redirection}"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout[:1], done.stderr) == (0, "{", "")


def test_closing_leaves_logging_as_it_was() -> None:
    logger = logging.getLogger("memshr")
    before = list(logger.handlers), logger.level
    record = Record()
    assert LOG.isEnabledFor(logging.DEBUG)
    record.close()
    record.close()
    assert (list(logger.handlers), logger.level) == before
    assert logger.level == logging.NOTSET
    LOG.warning("nobody hears it")
    assert record.lines() == []


LIBRARY = """
import logging, sys
import memshr.sharing.session, memshr.opening.sources
logger = logging.getLogger("memshr.opening.sources")
assert not logger.isEnabledFor(logging.INFO)
logger.critical("loud")
assert "memshr.record" not in sys.modules
"""


def test_a_program_that_imports_memshr_hears_nothing() -> None:
    done = subprocess.run([sys.executable, "-c", LIBRARY], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("", "")
