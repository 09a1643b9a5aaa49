"""The command line: what every command has in common, and the table of commands."""

from __future__ import annotations

import importlib
import os
import signal
import sys
from collections.abc import Iterator
from types import FrameType
from typing import NoReturn

import click

from memshr.errors import MemshrError
from memshr.report.wording import printable

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
def commands() -> None:
    """Share identical memory pages between virtual machines, and prove that it was done safely.

    memshr finds pages with the same contents, checks them byte for byte under a handle that dies when either is
    written, and puts them on one frame. Pages are shared only within a trust group: each domain for itself, unless
    --group says otherwise.

    A SOURCE is a memory image: a raw file of pages, an ELF core (QEMU's dump-guest-memory, gcore, memshr capture), or
    one of the other formats of docs/images.md. Running QEMU guests on Linux are qemu:all, qemu:NAME, qemu:PID, or
    qemu:NAME@SOCKET with their QMP socket; domains of a Xen host are xen:all, xen:DOMID, xen:NAME; both as root. A
    process is pid:N.
    """


def _on_terminate(_signal: int, _frame: FrameType | None) -> NoReturn:
    # As an exception, so that half-written files are taken away on the way out.
    sys.exit(128 + signal.SIGTERM)


def main() -> NoReturn:
    """Run the command line. An error is one line on standard error; its class decides the exit code."""
    signal.signal(signal.SIGTERM, _on_terminate)
    try:
        sys.exit(commands.main(standalone_mode=False) or 0)
    except click.exceptions.Exit as done:
        sys.exit(done.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(2)
    except (click.Abort, KeyboardInterrupt):
        print("memshr: interrupted", file=sys.stderr)
        sys.exit(130)
    except MemshrError as error:
        print(f"memshr: {printable(str(error))}", file=sys.stderr)
        sys.exit(error.exit_code)
    except BrokenPipeError:
        # Whoever read our output has seen enough; nothing may be written on the way out.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(0)
    except Exception as error:  # a defect of ours: whoever runs us gets a line to report, and no traceback
        if os.environ.get("MEMSHR_DEBUG"):
            raise
        text = " ".join(str(error).split())
        print(f"memshr: internal error, please report it: {type(error).__name__}: {text}", file=sys.stderr)
        sys.exit(1)
