"""Commands of memshr in processes of their own, as an operator gives them."""

import json
import signal
import subprocess
import sys
from typing import Any

DEADLINE_S = 120


class CommandFailedError(Exception):
    """A command did not end, or not as it should; the text has its own words."""


def start(*arguments: str) -> "subprocess.Popen[str]":
    """Begin a command. What it prints goes into pipes: read them, or let it print little."""
    return subprocess.Popen(
        [sys.executable, "-X", "faulthandler", "-m", "memshr", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(command: "subprocess.Popen[str]") -> tuple[str, str]:
    """What a command printed.

    :raises CommandFailedError: it does not end; it was made to say where it is.
    """
    try:
        return command.communicate(timeout=DEADLINE_S)
    except subprocess.TimeoutExpired:
        command.send_signal(signal.SIGABRT)
        raise CommandFailedError(f"{command.args!r} does not end: {command.communicate()[1]}") from None


def memshr(*arguments: str) -> Any:
    """What a command prints with --json.

    :raises CommandFailedError: its exit code is not 0, or it says anything else.
    """
    with start(*arguments, "--json") as command:
        out, err = finish(command)
    if command.returncode != 0 or err:
        raise CommandFailedError(f"memshr {' '.join(arguments)}: exit code {command.returncode}; {err or out}")
    return json.loads(out)
