"""Running memshr's command line in this process, as ``main`` does."""

from __future__ import annotations

import io
import sys
from dataclasses import dataclass

import pytest

from memshr.cli.main import main


@dataclass(frozen=True, slots=True)
class Outcome:
    """What a command left: its exit code and what it printed."""

    code: int
    out: str
    err: str


class CommandLine:
    """``memshr ARGUMENT...``; the fixture ``memshr`` is one."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
        self._monkeypatch = monkeypatch
        self._capsys = capsys

    def __call__(self, *arguments: object, stdin: str = "") -> Outcome:
        self._monkeypatch.setattr(sys, "argv", ["memshr", *map(str, arguments)])
        self._monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        self._capsys.readouterr()
        with pytest.raises(SystemExit) as exit_:
            main(keep_rights=True)
        captured = self._capsys.readouterr()
        code = exit_.value.code
        assert isinstance(code, int)
        return Outcome(code, captured.out, captured.err)
