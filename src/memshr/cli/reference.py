"""The command reference, docs/commands.md, made from the help of each command (``make docs``)."""

from __future__ import annotations

import sys

import click

from memshr.cli.main import commands

_HEAD = """# Command reference

Made from `memshr COMMAND --help` by `make docs`; a test fails if it is out of date.
"""

_WIDTH = 100


def command_reference() -> str:
    """The text of docs/commands.md."""
    parts = [_HEAD, _section(commands, "memshr", None)]
    context = click.Context(commands, info_name="memshr")
    parts += [_section(command, name, context) for name, command in sorted(commands.commands.items())]
    return "\n".join(parts)


def _section(command: click.Command, name: str, parent: click.Context | None) -> str:
    context = click.Context(command, info_name=name, parent=parent, terminal_width=_WIDTH)
    title = f"memshr {name}" if parent else name
    return f"## {title}\n\n```text\n{command.get_help(context)}\n```\n"


if __name__ == "__main__":
    sys.stdout.write(command_reference())
