"""Examples in documents: found, run, and held against what the document says they print.

Two kinds of fenced blocks are examples; every other block is left alone.

``memshr-ctl``: lines after ``> `` are typed to ``memshr ctl embedded:``, the others are what it prints. A block that is
marked ``memshr-ctl continued`` goes on in the session of the block before it.

``console``: lines after ``$ `` are commands of a shell, the others are what they print. The blocks of a document run
one after the other in one directory, in which the files of the project can be read by their names.

In what is printed ``...`` stands for anything on a line, and a line of just ``...`` for any lines.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(r"^```(?P<kind>memshr-ctl|console)(?P<continued> continued)?\n(?P<body>.*?)^```$", re.M | re.S)
_PROMPTS = {"memshr-ctl": "> ", "console": "$ "}


@dataclass(frozen=True, slots=True)
class Example:
    """One block: where it is, what is typed, and what should be printed by all of it."""

    path: Path
    line: int
    kind: str
    typed: tuple[str, ...]
    printed: tuple[str, ...]
    continues: Example | None = None

    def __str__(self) -> str:
        return f"{self.path.name}:{self.line}"

    def session(self) -> tuple[str, ...]:
        """Everything that is typed, in the blocks before it, too."""
        return (self.continues.session() if self.continues else ()) + self.typed

    def session_printed(self) -> tuple[str, ...]:
        """Everything that should be printed, by the blocks before it, too."""
        return (self.continues.session_printed() if self.continues else ()) + self.printed


def examples(path: Path) -> Iterator[Example]:
    """The examples of a document, in order."""
    text = path.read_text()
    before: Example | None = None
    for block in _BLOCK.finditer(text):
        prompt = _PROMPTS[block["kind"]]
        lines = block["body"].splitlines()
        before = Example(
            path,
            text.count("\n", 0, block.start()) + 1,
            block["kind"],
            tuple(line.removeprefix(prompt) for line in lines if line.startswith(prompt)),
            tuple(line for line in lines if not line.startswith(prompt)),
            before if block["continued"] else None,
        )
        yield before


def matches(expected: tuple[str, ...], printed: list[str]) -> bool:
    """True if ``printed`` is what a document promises."""
    lines = [
        r"(?:.*\n)*" if line == "..." else r".*".join(map(re.escape, line.split("..."))) + r"\n" for line in expected
    ]
    return re.fullmatch("".join(lines), "".join(f"{line.rstrip()}\n" for line in printed)) is not None
