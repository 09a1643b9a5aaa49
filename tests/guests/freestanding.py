"""A guest without an operating system, which fills, checks and rewrites its memory: the one for KVM."""

from pathlib import Path
from typing import Self

from guests.kit import build_freestanding
from guests.machine import Machine

ROUND_DEADLINE_S = 60.0


class FreestandingGuest(Machine):
    """The 32-bit guest of programs/freestanding.c.

    :param memory_mib: guest RAM; it uses 9 MiB of it.
    """

    def __init__(self, name: str, qemu: Path, *, memory_mib: int = 32) -> None:
        super().__init__(name, qemu, memory_mib=memory_mib)

    def boot(self, *, accelerator: str, seed: int = 1) -> Self:
        """Start QEMU; the guest needs some seconds under KVM implementations that emulate, else none.

        :param accelerator: ``kvm`` or ``tcg``.
        :param seed: 1 to 9, different in each guest: decides what it rewrites, and the pages that no other has.
        :raises GuestFailedError: QEMU did not come up.
        """
        return self.start(["-accel", accelerator, "-kernel", str(build_freestanding()), "-append", str(seed)])

    def rounds(self) -> int:
        """How often it has checked all its memory."""
        return len(self.console)

    def mismatches(self) -> int:
        """How many of these rounds found a page that did not hold what the guest had written."""
        return self.rounds() - self.console.count(".")

    def wait_rounds(self, rounds: int) -> None:
        """Wait until it has finished so many rounds more.

        :raises GuestFailedError: it does not go on.
        """
        begin = self.rounds()
        self.wait(lambda: self.rounds() >= begin + rounds, ROUND_DEADLINE_S, f"{rounds} rounds")
