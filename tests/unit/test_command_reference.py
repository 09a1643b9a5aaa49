"""docs/commands.md says what the commands' own help says."""

from pathlib import Path

from memshr.cli.main import commands
from memshr.cli.reference import command_reference

REFERENCE = Path(__file__).parents[2] / "docs" / "commands.md"


def test_reference_is_up_to_date() -> None:
    assert REFERENCE.read_text() == command_reference(), "run make docs"


def test_every_command_and_option_has_a_help_text() -> None:
    for name, command in commands.each():
        assert command.help, name
        for parameter in command.params:
            assert parameter.param_type_name == "argument" or getattr(parameter, "help", None), (name, parameter.name)
