"""The command reference, docs/commands.md, made from the help texts of the commands (``make docs``)."""

from __future__ import annotations

import inspect
import re
import sys

import click

from memshr.cli.main import commands

_HEAD = """# Command reference

Made from the help texts of the commands by `make docs`; a test fails when it is out of date. Every command also has
`-h` and `--help`.
"""


def command_reference() -> str:
    """The text of docs/commands.md."""
    usage, options = _usage_and_options("memshr", commands)
    parts = [_HEAD, usage, *_texts(commands), *options]
    for name, command in commands.each():
        usage, options = _usage_and_options(f"memshr {name}", command)
        parts += [f"\n## memshr {name}\n", usage, *_texts(command), *options]
    return "\n".join(parts)


def _usage_and_options(name: str, command: click.Command) -> tuple[str, list[str]]:
    with click.Context(command, info_name=name) as context:
        usage = " ".join([context.command_path, *command.collect_usage_pieces(context)])
        options = [each.get_help_record(context) for each in command.params if isinstance(each, click.Option)]
    rows = [_row(*option) for option in options if option is not None]
    return f"```text\n{usage}\n```\n", ["| option | |", "|---|---|", *rows, ""] if rows else []


def _texts(command: click.Command) -> list[str]:
    # A paragraph that begins with \b is laid out by hand: it stays as it is, in a code block.
    texts = []
    for text in (command.help, command.epilog):
        for paragraph in re.split(r"\n\s*\n", inspect.cleandoc(text or "")):
            if paragraph.startswith("\b"):
                texts.append(f"```text\n{paragraph.removeprefix(chr(8)).strip(chr(10))}\n```\n")
            elif paragraph:
                texts.append(paragraph + "\n")
    return texts


def _row(names: str, text: str) -> str:
    names, text = (" ".join(cell.replace("|", "\\|").split()) for cell in (names, text))
    return f"| `{names}` | {text} |"


if __name__ == "__main__":
    sys.stdout.write(command_reference())
