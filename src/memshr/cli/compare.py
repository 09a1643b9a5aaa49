"""memshr compare."""

from __future__ import annotations

import click

from memshr.cli.options import as_json, print_json
from memshr.cli.rights import given_up
from memshr.estimation.result import read_estimate
from memshr.render.difference import difference
from memshr.render.difference_text import print_difference


@click.command("compare", short_help="What changed between two estimates?")
@click.argument("before", metavar="A.json")
@click.argument("after", metavar="B.json")
@as_json
def compare_(before: str, after: str, as_json: bool) -> None:
    """What changed from one estimate to another?

    A.json and B.json are what memshr estimate --json printed, such as before and after an update of the guests, or with
    two ways to group them. Domains are the same if they have the same name. Shown are the totals, what changed in each
    domain, new and gone domains, and the pairs of domains whose common contents changed most.
    """
    with given_up(estimates=(before, after)):
        changes = difference(read_estimate(before), read_estimate(after))
    if as_json:
        print_json(changes.to_dict())
    else:
        print_difference(changes)
