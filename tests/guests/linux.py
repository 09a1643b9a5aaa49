"""A Linux guest that rewrites and checks its own memory, and runs what a test tells it to."""

import shutil
import socket
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

from guests.kit import DRIVE_BLOCKS, LinuxKit, build_drive
from guests.machine import GuestFailedError, Machine

BOOT_DEADLINE_S = 180.0
COMMAND_DEADLINE_S = 60.0
HEARTBEAT_DEADLINE_S = 60.0


@dataclass(frozen=True, slots=True)
class CheckerStatus:
    """What the checker program said after its last round. The times are of single writes, since ``forget_times``."""

    round: int
    pages: int
    mismatches: int
    writes: int
    median_ns: int
    p99_ns: int
    longest_ns: int


def drive_arguments(aio: str) -> tuple[str, ...]:
    """QEMU arguments for a drive that QEMU reads straight into guest RAM (``cache=none``): a guest's ``/dev/vda``.

    :param aio: ``native``, ``io_uring`` or ``threads``.
    """
    file = f"file={build_drive()},format=raw,readonly=on,if=none,id=drive,cache=none,aio={aio}"
    return ("-drive", file, "-device", "virtio-blk-pci,drive=drive")


class LinuxGuest(Machine):
    """A Linux guest; ``boot`` returns at once and ``wait_ready`` waits for it, so that several boot side by side.

    :param memory_mib: guest RAM; below 192 the kernel has no room to unpack its initramfs.
    """

    def __init__(self, name: str, kit: LinuxKit, *, memory_mib: int = 256, user: str | None = None) -> None:
        super().__init__(name, kit.qemu, memory_mib=memory_mib, user=user)
        self._kit = kit
        self._commands: socket.socket | None = None
        self._number = 0

    def boot(self, arguments: Sequence[str] = (), *, accelerator: str = "tcg") -> Self:
        """Start QEMU and let the kernel boot.

        :param arguments: more QEMU arguments.
        :param accelerator: of QEMU; ``tcg`` works everywhere.
        :raises GuestFailedError: QEMU did not come up.
        """
        kernel, initramfs = self._kit.kernel, self._kit.initramfs
        if self._user is not None:  # the cache folder may be in a home that this user cannot look into
            kernel, initramfs = (Path(shutil.copy(file, self.folder)) for file in (kernel, initramfs))
        own = ["-accel", accelerator, "-no-reboot", "-kernel", str(kernel), "-initrd", str(initramfs)]
        # no_timer_check: on a busy host the emulated timer ticks too late for the kernel's check of it, which panics.
        return self.start([*own, "-append", "console=ttyS0 quiet panic=-1 no_timer_check", *arguments])

    def wait_ready(self) -> Self:
        """Wait until the guest takes commands.

        :raises GuestFailedError: it does not come up; the text has the end of its console.
        """
        self.wait(lambda: "memshr-guest ready" in self.console, BOOT_DEADLINE_S, "the kernel boots")
        self._commands = socket.socket(socket.AF_UNIX)
        self._commands.connect(str(self.port_path))
        return self

    def run(self, command: str, deadline_s: float = COMMAND_DEADLINE_S) -> str:
        """Run a shell command in the guest, one line, and return what it printed.

        :raises GuestFailedError: its status is not 0, or it did not end in time.
        """
        assert self._commands is not None, f"guest {self.name}: wait_ready comes first"
        self._number += 1
        self._commands.sendall(f"{self._number} {command}\n".encode())
        end = time.monotonic() + deadline_s
        answer = b""
        marker = f"\nmemshr-answer {self._number} ".encode()
        while not (marker in answer and answer.endswith(b"\n")):
            self._commands.settimeout(max(end - time.monotonic(), 0.001))
            try:
                received = self._commands.recv(1 << 16)
            except TimeoutError:
                raise GuestFailedError(f"guest {self.name}: no answer in {deadline_s:.0f} s to: {command}") from None
            if not received:
                raise GuestFailedError(f"guest {self.name} ended during: {command}; {self.stderr}")
            answer += received
        text, _, status = answer.rpartition(marker)
        if int(status) != 0:
            raise GuestFailedError(f"guest {self.name}: status {int(status)} of: {command}; {text.decode()}")
        return text.decode()

    def start_files(self, count: int) -> None:
        """Start the program that keeps ``count`` files of 1 MiB, equal in every guest, rewriting and checking them."""
        self.run(f"files {count} >/dev/ttyS0 2>&1 &")

    def start_checker(self, pages: int, *, seed: int = 1, rewrites: int = 256) -> None:
        """Start the program that keeps ``pages`` pages and checks them all again and again.

        :param seed: different in each guest, at least 1; decides what is rewritten, and the pages that no other has.
        :param rewrites: pages that it rewrites after each round.
        """
        self.run(f"checker {pages} {seed} {rewrites} /run/checker >/dev/ttyS0 2>&1 &")

    def start_reader(self, *, seed: int = 1, buffer_pages: int = 1024) -> None:
        """Start a program that reads ``/dev/vda`` past the page cache into its memory and checks what it read.

        Several may run at once, with different seeds; ``rounds`` calls them ``reader1``, ``reader2`` and so on.

        :param seed: decides what is read where to, 1 to 9.
        :param buffer_pages: how much memory it reads into.
        """
        self.run("test -b /dev/vda")
        name = f"reader{seed}"
        self.run(f"reader /dev/vda {DRIVE_BLOCKS} {buffer_pages} {seed} /run/{name} >/dev/ttyS0 2>&1 &")

    def checker(self) -> CheckerStatus:
        """What the checker said after its last round.

        :raises GuestFailedError: it has not finished a round.
        """
        pairs = (pair.split("=") for pair in self.run("cat /run/checker").split())
        return CheckerStatus(**{name: int(number) for name, number in pairs})

    def forget_times(self) -> None:
        """Let the checker measure its writes anew; takes effect at the end of its round."""
        self.run("kill -USR1 $(pidof checker)")

    def rounds(self) -> dict[str, int]:
        """The number of the last round of each program that was started and finished one."""
        lines = self.run("cd /run; grep -H round= files checker reader? 2>/dev/null || true").splitlines()
        return {line.partition(":")[0]: int(line.split("round=")[1].split()[0]) for line in lines}

    def mismatches(self) -> list[str]:
        """Every complaint of the programs about their memory, and every oops of the guest's kernel."""
        signs = ("MISMATCH", "Oops", "BUG:", "segfault", "general protection", "Call Trace", "I/O error")
        return [line for line in self.console.splitlines() if any(sign in line for sign in signs)]

    def wait_rounds(self, rounds: int, programs: Sequence[str] = ("checker",)) -> None:
        """Wait until each of the programs has finished so many rounds more.

        :raises GuestFailedError: one does not go on.
        """
        begin = self.rounds()

        def went_on() -> bool:
            now = self.rounds()
            return all(now.get(program, 0) >= begin.get(program, 0) + rounds for program in programs)

        self.wait(went_on, HEARTBEAT_DEADLINE_S, f"{rounds} rounds of {' and '.join(programs)}")

    def kill(self) -> None:
        """End QEMU at once and remove its folder."""
        if self._commands is not None:
            self._commands.close()
        super().kill()
