"""Two QEMU guests that a test plays, as the contract kit wants them."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Self

from guests.qtest import QtestGuest
from memshr.qemu.guests import GuestProcess, inspect_process
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.types import PAGE_SIZE, DomId, Gfn

FIRST_GFN = 0x400
"""beyond what firmware would use; in 2 MiB of its own"""


def process_of(guest: QtestGuest) -> GuestProcess:
    """A guest as memshr finds it."""
    found = inspect_process(guest.pid)
    assert found is not None
    return found


@contextmanager
def booted(qemu: Path, *names: str, memory_mib: int = 64, arguments: Sequence[str] = ()) -> Iterator[list[QtestGuest]]:
    """Some guests, ended for sure."""
    guests: list[QtestGuest] = []
    try:
        for name in names:
            guests.append(QtestGuest(name, qemu, memory_mib=memory_mib).boot(arguments))
        yield guests
    finally:
        for guest in guests:
            guest.kill()


class QtestHost:
    """Guests under the mechanism. All are one trust group unless ``groups`` says otherwise."""

    def __init__(self, guests: Sequence[QtestGuest], groups: Mapping[str, Sequence[int]] | None = None) -> None:
        self.guests = list(guests)
        everybody = {"all": range(1, len(guests) + 1)}
        self.hypervisor = QemuHypervisor(
            [process_of(guest) for guest in guests], groups=everybody if groups is None else groups
        )
        try:
            for domain in self.hypervisor.domains():
                self.hypervisor.control(domain.domid, True)
        except BaseException:
            self.hypervisor.close()
            raise

    @property
    def domids(self) -> tuple[DomId, DomId]:
        """The first two."""
        return DomId(1), DomId(2)

    def gfns(self, domid: DomId) -> Sequence[Gfn]:
        """Sixteen pages: some in a row, some apart, some of them in another 2 MiB."""
        spread = [*range(6), 8, 10, 13, 40, 41, 512, 513, 1024, 1030, 2000]
        return [Gfn(FIRST_GFN + each) for each in spread]

    def hole(self, domid: DomId) -> Gfn:
        """The old graphics memory, 640 KiB and up."""
        return Gfn(0xC0)

    def write(self, domid: DomId, gfn: Gfn, data: bytes, offset: int = 0) -> None:
        """As the guest would."""
        self.guests[domid - 1].write(gfn * PAGE_SIZE + offset, data)

    def read(self, domid: DomId, gfn: Gfn) -> bytes:
        """As the guest would."""
        return self.guests[domid - 1].read(gfn * PAGE_SIZE, PAGE_SIZE)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.hypervisor.close()
