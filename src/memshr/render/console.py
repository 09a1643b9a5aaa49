"""What every text for a terminal is made of: where it goes, names without harm, plain tables."""

from __future__ import annotations

import sys

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from memshr.render.wording import printable


def result_console() -> Console:
    """Where a result goes: standard output, 110 columns wide where that is no terminal."""
    return Console(width=None if sys.stdout.isatty() else 110, highlight=False)


def shown(words: str) -> str:
    """Words that may hold a name, which is data of strangers, for a console: no markup, no control characters."""
    return escape(printable(words))


def plain_table(*columns: str) -> Table:
    """A table whose first column is words, and whose others are figures."""
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False)
    table.add_column(columns[0])
    for column in columns[1:]:
        table.add_column(column, justify="right")
    return table
