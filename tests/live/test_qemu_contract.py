"""The contract of the seam, on two real QEMU processes."""

from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from live.qemu_host import QtestHost, booted
from memshr.qemu import attachment, syscalls
from memshr.testing import CONTRACT, GuestHost


@pytest.fixture(scope="module", params=["this kernel", "older kernel"])
def host(qemu: Path, request: pytest.FixtureRequest) -> Iterator[QtestHost]:
    """Two guests for all the checks; once with what is done on kernels that lack what newer ones have.

    An older kernel cannot protect pages that are not there (Linux before 6.4), and must not be asked to map over
    something that is there (before 6.9).
    """
    with pytest.MonkeyPatch.context() as patch:
        if request.param == "older kernel":
            patch.setattr(syscalls, "UFFD_FEATURE_WP_UNPOPULATED", 0)
            patch.setattr(attachment, "MAPPING_OVER_IS_SAFE", False)
        with booted(qemu, "contract-1", "contract-2") as guests, QtestHost(guests) as made:
            yield made


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_qemu_keeps_the_contract(check: Callable[[GuestHost], None], host: QtestHost) -> None:
    check(host)
