"""Fixtures for all tests."""

import pytest

from command_line import CommandLine


@pytest.fixture
def memshr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(monkeypatch, capsys)
