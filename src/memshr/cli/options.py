"""Options and arguments that several commands take."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import click
from click.core import ParameterSource

from memshr.errors import MemshrError

_Command = TypeVar("_Command", bound=Callable[..., Any])

sources = click.argument("sources", nargs=-1, required=True, metavar="SOURCE...")

guests = click.argument("guests", nargs=-1, required=True, metavar="qemu:GUEST...")

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON with stable keys instead of text.")

image_format = click.option(
    "--format", "image_format", metavar="NAME", help="Read the images as this format instead of detecting it."
)

groups = click.option(
    "--group",
    "groups",
    multiple=True,
    metavar="NAME=DOMAIN,DOMAIN|all",
    help="Let these domains share with each other; 'all' puts every domain into one group. May be given several times."
    " Domains that no group names share within themselves only.",
)

max_sharers = click.option(
    "--max-sharers",
    type=click.IntRange(2),
    metavar="N",
    default=256,
    show_default=True,
    help="How many pages may be on one frame; beyond that a second frame is used.",
)


reserve_mib = click.option(
    "--reserve-mib",
    type=click.IntRange(0),
    metavar="N",
    default=256,
    show_default=True,
    help="Running guests: stop before the host's MemAvailable falls below this, in MiB.",
)


huge_pages = click.option(
    "--huge-pages",
    type=click.Choice(["share", "spare"]),
    default="share",
    show_default=True,
    help="Running guests: share pieces of the host's huge pages, which splits them; or leave huge pages whole.",
)

huge_share = click.option(
    "--huge-share",
    type=click.FloatRange(0, 1),
    metavar="PART",
    default=1 / 32,
    show_default=True,
    help="Running guests: split a huge page only if at least this part of it can be shared.",
)


def sharing_options(command: _Command) -> _Command:
    """The arguments and options of every command that runs a sharing session."""
    for option in (as_json, max_sharers, image_format, groups, sources):
        command = option(command)
    return command


def refuse_options(names: Iterable[str], why: str) -> None:
    """Refuse options that were typed although they do not apply.

    :param names: the parameters of the command that is running, as the command's function calls them.
    :raises MemshrError: one of them was on the command line.
    """
    context = click.get_current_context()
    for parameter in context.command.params:
        typed = context.get_parameter_source(parameter.name or "") is ParameterSource.COMMANDLINE
        if parameter.name in names and typed:
            raise MemshrError(f"{parameter.opts[0]} {why}")


def print_json(value: object) -> None:
    """Print one JSON document."""
    click.echo(json.dumps(value, indent=2))
