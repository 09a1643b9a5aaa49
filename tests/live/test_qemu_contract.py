"""The contract of the seam, on two real QEMU processes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from live.qemu_host import QtestHost, booted
from memshr.testing import CONTRACT, GuestHost


@pytest.fixture(scope="module")
def host(qemu: Path) -> Iterator[QtestHost]:
    """Two guests for all the checks."""
    with booted(qemu, "contract-1", "contract-2") as guests, QtestHost(guests) as made:
        yield made


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_qemu_keeps_the_contract(check: Callable[[GuestHost], None], host: QtestHost) -> None:
    check(host)
