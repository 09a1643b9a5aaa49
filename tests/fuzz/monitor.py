"""Whatever QEMU answers: a MemshrError comes out of what memshr asks of it, or an answer, and nothing else.

An input is lines of QMP, which are the answers in their order, whatever is asked: a hostile QEMU does not care.
``fuzz.campaign`` searches for inputs that break this.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from memshr.errors import ConnectionLostError, InvariantError, MemshrError
from memshr.procfs import Vmas
from memshr.qemu.guests import (
    GuestProcess,
    has_direct_drives,
    mapping_refusals,
    memory_layout,
    most_pages,
    parse_flat_view,
    refusals,
)
from memshr.qemu.monitor import LONGEST_WORD, Monitor, parsed, returned

CORPUS = Path(__file__).parent / "corpus" / "monitor"

MAPS = b"7f0000000000-7f0008000000 rw-p 00000000 00:00 0 \n7f0010000000-7f0010200000 rw-p 00000000 00:00 0 \n"
"""What the QEMU of every input has mapped: 128 MiB, and 2 MiB."""
GUEST = GuestProcess(os.getpid(), 0, "guest", ("qemu-system-x86_64",), None, False, os.getuid())
"""Refusals look at the process, too: at ours."""


class Script(Monitor):
    """Answers with the lines of an input."""

    def __init__(self, lines: list[bytes]) -> None:
        super().__init__()
        self._lines = iter(lines)

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        descriptor: int | None = None,
        deadline_s: float | None = None,
    ) -> Any:
        del arguments, descriptor, deadline_s
        line = next(self._lines, None)
        if line is None:
            raise ConnectionLostError("QEMU hung up")
        return returned(command, parsed(line))

    def close(self) -> None:
        pass


def exercise(data: bytes, folder: Path) -> list[str]:
    """Ask everything with the lines of ``data`` as answers; returns the names of what got a proper answer.

    :raises AssertionError: a promise was broken. So is anything but MemshrError.
    """
    del folder
    lines = data.split(b"\n")
    mappings = Vmas(MAPS)
    asked: dict[str, Callable[[Monitor], object]] = {
        "layout": lambda monitor: _layout(monitor, mappings),
        "refusals": lambda monitor: refusals(GUEST, monitor, [], mappings),
        "drives": has_direct_drives,
        "state": lambda monitor: (monitor.state(), monitor.runs()),
        "drain": lambda monitor: monitor.require_drain(),
        "descriptor": lambda monitor: monitor.take_back(),
    }
    parse_flat_view(data.decode(errors="replace"))
    proper = []
    for name, ask in asked.items():
        try:
            _require_shown(str(ask(Script(lines))))
            proper.append(name)
        except InvariantError:
            raise
        except MemshrError as error:
            _require_shown(str(error))
    return proper


def _layout(monitor: Monitor, mappings: Vmas) -> str:
    layout = memory_layout(monitor, mappings)
    assert sum(ram.pages for ram in layout) <= most_pages()
    for ram in layout:
        assert any(each.start <= ram.hva and ram.end_hva <= each.end for each in mappings)
    mapping_refusals(mappings, layout)
    return "".join(ram.block for ram in layout)


def _require_shown(text: str) -> None:
    # One line that can be shown, of no great length.
    assert text.isprintable()
    assert len(text) < 64 * LONGEST_WORD
