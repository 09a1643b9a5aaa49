"""Each special guest really is what its name says: what memshr makes of it can then be believed."""

from collections.abc import Callable

import pytest

from guests.machine import Machine, QmpError
from guests.peculiar import PECULIARITIES

DEFAULTS = {"plain", "core-dump", "mergeable"}
"""what QEMU is without any option"""


def in_effect(kind: str, machine: Machine) -> bool:
    """Is the guest of this kind? QEMU refuses some questions about what it does not have."""
    try:
        return PECULIARITIES[kind].in_effect(machine)
    except QmpError:
        return False


@pytest.mark.parametrize("kind", PECULIARITIES)
def test_special_guest_is_what_its_name_says(kind: str, start_peculiar: Callable[[str], Machine]) -> None:
    assert in_effect(kind, start_peculiar(kind))


def test_plain_guest_is_none_of_them(start_peculiar: Callable[[str], Machine]) -> None:
    plain = start_peculiar("plain")
    assert {kind for kind in PECULIARITIES if in_effect(kind, plain)} == DEFAULTS
