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
    parts = [_HEAD, *_texts(commands)]
    for name, command in sorted(commands.commands.items()):
        arguments = [parameter for parameter in command.params if isinstance(parameter, click.Argument)]
        usage = " ".join(["memshr", name, "[OPTIONS]", *(_argument(argument) for argument in arguments)])
        parts += [f"\n## memshr {name}\n", f"```text\n{usage}\n```\n", *_texts(command)]
        options = [parameter for parameter in command.params if isinstance(parameter, click.Option)]
        if options:
            parts += ["| option | |", "|---|---|", *(_option(option) for option in options), ""]
    return "\n".join(parts)


def _argument(argument: click.Argument) -> str:
    name = argument.metavar or (argument.name or "").upper()
    return name if argument.required else f"[{name}]..." if argument.nargs == -1 else f"[{name}]"


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


def _option(option: click.Option) -> str:
    names = ", ".join(option.opts)
    if not option.is_flag:
        names += f" {option.metavar or option.type.name.upper()}"
    text = option.help or ""
    if option.show_default:
        text += f" Default: {option.default}."
    return f"| `{names}` | {text} |".replace("|all", "\\|all")


if __name__ == "__main__":
    sys.stdout.write(command_reference())
