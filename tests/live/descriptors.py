"""Files in memory of a test's own, and whether a QEMU has them open."""

import os
import random
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from guests.machine import Machine


@contextmanager
def memory_file() -> Iterator[tuple[int, str]]:
    """A file in memory, and its name, which no other file has."""
    name = f"by-name-{random.SystemRandom().getrandbits(64):x}"
    file = os.memfd_create(name)
    try:
        yield file, name
    finally:
        os.close(file)


def numbers_of(machine: Machine, name: str) -> list[int]:
    """The descriptors of a QEMU that are the file in memory with this name."""
    found = []
    for entry in Path(f"/proc/{machine.pid}/fd").iterdir():
        with suppress(FileNotFoundError):  # closed meanwhile
            if f"/memfd:{name} " in os.fspath(entry.readlink()):
                found.append(int(entry.name))
    return found
