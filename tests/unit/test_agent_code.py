"""The bytes that run inside QEMU are those of the source that a reader can read."""

import shutil
import subprocess
from pathlib import Path

import pytest

from memshr.qemu import control_area

SOURCE = Path(control_area.__file__).with_name("agent.S")
TOOL = Path(__file__).parents[2] / "tools" / "assemble-agent"


@pytest.fixture
def assembler() -> None:
    """binutils are there."""
    if shutil.which("as") is None or shutil.which("objdump") is None:
        pytest.skip("no assembler here; apt-get install binutils")


@pytest.mark.usefixtures("assembler")
def test_code_is_what_the_source_assembles_to() -> None:
    printed = subprocess.run([TOOL], check=True, capture_output=True, text=True).stdout
    assembled = bytes.fromhex("".join(line.split('"')[1] for line in printed.splitlines() if '"' in line))
    assert assembled == control_area.CODE


def test_code_and_source_know_the_same_layout() -> None:
    names = {
        "PARAMETERS": control_area.PARAMETERS,
        "OFFER": control_area.OFFER_AT,
        "STATE": control_area.STATE_AT,
        "COUNT": control_area.COUNT_AT,
        "DONE": control_area.DONE_AT,
        "TID": control_area.TID_AT,
        "EXPECTED_SOCKET": control_area.EXPECTED_SOCKET_AT,
        "PID": control_area.PID_AT,
        "TABLE": control_area.TABLE - control_area.DATA,
        "LAST_SLOT": control_area.SLOTS - 1,
    }
    words = [line.split() for line in SOURCE.read_text().splitlines()]
    said = {parts[1].rstrip(","): int(parts[2], 16) for parts in words if parts[:1] == [".set"]}
    assert {name: said[name] for name in names} == names
    assert len(control_area.CODE) < control_area.PARAMETERS
