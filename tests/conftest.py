"""Fixtures for all tests."""

import pytest
from hypothesis import settings

from command_line import CommandLine

settings.register_profile("memshr", deadline=None)  # no test asserts a time
settings.load_profile("memshr")


@pytest.fixture
def memshr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> CommandLine:
    """The command line."""
    return CommandLine(monkeypatch, capsys)
