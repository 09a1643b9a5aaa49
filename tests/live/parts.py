"""What a test does when this machine lacks something that it needs."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from guests.kit import MissingPartError

KNOWN_PARTS = {"chromium", "gdb", "hugepages", "kvm", "libvirt", "mount", "qemu", "xen-headers"}


def required_parts() -> set[str]:
    """What MEMSHR_REQUIRE names, separated by commas: parts that this machine must have."""
    named = {part for part in os.environ.get("MEMSHR_REQUIRE", "").split(",") if part}
    if unknown := named - KNOWN_PARTS:
        pytest.exit(f"MEMSHR_REQUIRE names {sorted(unknown)}; known are {sorted(KNOWN_PARTS)}", returncode=2)
    return named


@contextmanager
def needed_parts() -> Iterator[None]:
    """Skip the test if a part turns out to be missing inside the ``with``; fail it if MEMSHR_REQUIRE names the part."""
    try:
        yield
    except MissingPartError as missing:
        if missing.part in required_parts():
            pytest.fail(f"MEMSHR_REQUIRE={missing.part}, but {missing}", pytrace=False)
        pytest.skip(str(missing))
