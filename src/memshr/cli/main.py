"""The command line: what every command has in common, and the table of commands."""

from __future__ import annotations

import importlib
import logging
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import click

from memshr import privilege
from memshr.errors import InvariantError, MemshrError
from memshr.record import Record
from memshr.render.wording import printable

_log = logging.getLogger(__name__)

EPILOG = """\b
Examples:
  memshr demo                                   the whole story on real memory, no root needed
  memshr capture pid:4711 -o a.core             write the memory of a process to a file
  memshr estimate a.core b.core --group all     what would sharing save?
  memshr status                                 the QEMU guests of this host, and what they share
  memshr share qemu:all --group all             give memory back to the host, the guests running
  memshr detach qemu:all                        take everything back
  memshr ctl embedded: < script                 Xen's calls by hand
  memshr replay tests/traces/*.json             does memshr answer as a real Xen did?

\b
Exit codes:
  0  done                         1  found a problem (audit finding, replay difference, call refused)
  2  wrong use or bad input       3  refused by the host

MEMSHR_DEBUG=1 shows the traceback of an internal error."""


COMMANDS = {
    "demo": "memshr.cli.demo:demo",
    "estimate": "memshr.cli.estimate:estimate",
    "compare": "memshr.cli.compare:compare_",
    "share": "memshr.cli.share:share",
    "status": "memshr.cli.status:status",
    "top": "memshr.cli.status:top",
    "audit": "memshr.cli.audit:audit",
    "unshare": "memshr.cli.leave:unshare",
    "detach": "memshr.cli.leave:detach",
    "capture": "memshr.cli.capture:capture",
    "ctl": "memshr.cli.ctl:ctl",
    "replay": "memshr.cli.replay:replay",
}
"""Where each command is. It is imported when it is used: an operator's share needs no image format and no report."""


class Commands(click.Group):
    """The commands of ``COMMANDS``."""

    def list_commands(self, ctx: click.Context) -> list[str]:  # click gives it
        return sorted(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:  # as above
        if cmd_name not in COMMANDS:
            return None
        module, _, name = COMMANDS[cmd_name].partition(":")
        command = getattr(importlib.import_module(module), name)
        assert isinstance(command, click.Command)
        return command

    def each(self) -> Iterator[tuple[str, click.Command]]:
        """Every command with its name."""
        context = click.Context(self)
        for name in self.list_commands(context):
            command = self.get_command(context, name)
            assert command is not None
            yield name, command


@click.group(
    cls=Commands, epilog=EPILOG, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110}
)
@click.version_option(package_name="memshr", message="memshr %(version)s")
@click.option(
    "--log", "log_file", metavar="FILE", help="Append a record of all that is done to this file; it is made if missing."
)
@click.option(
    "-v", "--verbose", count=True, help="Say on standard error what is done; -vv: also each step, for a bug report."
)
@click.pass_obj
def commands(record: Record, log_file: str | None, verbose: int) -> None:
    """Share identical memory pages between virtual machines, and prove that it was done safely.

    memshr finds pages with the same contents, checks them byte for byte under a handle that dies when either is
    written, and puts them on one frame. Pages are shared only within a trust group: each domain for itself, unless
    --group says otherwise.

    A SOURCE is a memory image: a raw file of pages, an ELF core (QEMU's dump-guest-memory, gcore, memshr capture), or
    one of the other formats of docs/images.md. Running QEMU guests on Linux are qemu:all, qemu:NAME, qemu:PID, or
    qemu:NAME@SOCKET with their QMP socket; domains of a Xen host are xen:all, xen:DOMID, xen:NAME; both as root. A
    process is pid:N.
    """
    record.enable(log_file, verbose)


def _on_terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that half-written files are taken away on the way out.
    sys.exit(128 + signal.SIGTERM)


def _open_standard_streams() -> None:
    # Where the shell has closed one (2>&-), the next file that is opened would get its number, and everything that is
    # written to standard error: a log, or an image.
    while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
        os.set_inheritable(descriptor, True)
    os.close(descriptor)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w", encoding="utf-8"))  # noqa: PTH123, SIM115  # open until the end


def main(*, keep_rights: bool = False) -> NoReturn:
    """Run the command line. An error is one line on standard error; its class decides the exit code.

    :param keep_rights: do not give root's rights up when strangers' files are read: this process is not memshr's alone.
    """
    privilege.keep(keep_rights)
    _open_standard_streams()
    signal.signal(signal.SIGTERM, _on_terminate)
    record = Record()
    try:
        _run(record)
    except SystemExit as end:
        _log.info("exit code %s", end.code)
        raise
    finally:
        record.close()


def _run(record: Record) -> NoReturn:
    try:
        try:
            code = commands.main(standalone_mode=False, obj=record) or 0
        finally:
            record.flush()  # what -v shows comes before the error that it led to
        sys.exit(code)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        _log.warning("interrupted")
        print("memshr: interrupted", file=sys.stderr)
        sys.exit(130)
    except InvariantError as error:
        _log.critical("a defect of memshr", exc_info=error)
        print(f"memshr: {printable(f'{error}; {record.kept_where()}')}", file=sys.stderr)
        sys.exit(error.exit_code)
    except MemshrError as error:
        _log.error("%s", error)
        print(f"memshr: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be written on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # a defect of ours: whoever runs us gets a line to report, and no traceback
        _log.critical("an internal error", exc_info=error)
        if os.environ.get("MEMSHR_DEBUG"):
            raise
        text = " ".join(str(error).split())
        print(f"memshr: internal error, please report it: {type(error).__name__}: {text}", file=sys.stderr)
        sys.exit(1)
