"""Which program a process runs: what tells a QEMU that was looked at from whatever has its number later.

A pid is no identity. It is given to somebody else when its process has ended; and the process itself can execute
another program, one that is set-uid too, and keeps pid and start time when it does. memshr runs as root, so what it
does to a process it must do to the very program that it has looked at. Each part of an ``Identity`` is there for one
way in which a process becomes another one:

* *start time*: another process has got the number. Its unit is 10 ms, so it does not decide alone.
* *device and inode of the program*: the process has executed another program.
* *users and groups, all four of each*: it has got other rights, by executing a set-uid program or by itself.
* *the auxiliary vector*, which the kernel makes anew at each exec: the process has executed the same program again.
  AT_RANDOM, AT_SYSINFO_EHDR and AT_ENTRY are random addresses; a program that is started without randomness has them
  the same again, but a set-uid program never is (the kernel clears ADDR_NO_RANDOMIZE), and AT_SECURE says so too.
* *a zombie* has no program any more and counts as gone.

The parts are read one after the other, so an exec in between mixes two programs: the mixture is no identity that holds,
because the last part that is read is the one that changes at every exec. Whoever acts on an identity first makes sure
that an exec cannot pass unseen (see ``tracee``), then asks ``still_holds``.

This module does without numpy: see ``control_area``.

Sources: proc(5), getauxval(3); the kernel's ``fs/exec.c`` (begin_new_exec), ``fs/binfmt_elf.c`` (create_elf_tables).
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Final, Self

_ENDED: Final = frozenset("ZXx")
_AUXV_MOST_BYTES: Final = 4096
"""mm->saved_auxv has some 50 words"""


@dataclass(frozen=True, slots=True)
class Identity:
    """One program in one process.

    ``start_ticks`` is field 22 of /proc/PID/stat; ``device`` and ``inode`` are those of its program's file; ``users``
    and ``groups`` are the real, effective, saved and file system ids; ``auxv`` is /proc/PID/auxv.
    """

    pid: int
    start_ticks: int
    device: int
    inode: int
    users: tuple[int, int, int, int]
    groups: tuple[int, int, int, int]
    auxv: bytes

    def still_holds(self) -> bool:
        """Whether the process runs this very program. One that has ended does not, nor one that we may not look at."""
        try:
            return identity_of(self.pid) == self
        except OSError:
            return False

    def __str__(self) -> str:
        numbers = (self.pid, self.start_ticks, self.device, self.inode, *self.users, *self.groups)
        return f"{','.join(map(str, numbers))},{self.auxv.hex()}"

    @classmethod
    def parse(cls, text: str) -> Self:
        """The identity that ``str`` has turned into text.

        :raises ValueError: it is no such text.
        """
        *numbers, auxv = text.split(",")
        pid, start_ticks, device, inode, *ids = map(int, numbers)
        return cls(pid, start_ticks, device, inode, _four(ids[:4]), _four(ids[4:]), bytes.fromhex(auxv))


def identity_of(pid: int) -> Identity:
    """The identity of the program that a process runs now.

    :raises OSError: there is no such process, it is a zombie, or we may not look into it.
    """
    folder = Path(f"/proc/{pid}")
    stat = (folder / "stat").read_text(errors="surrogateescape")
    fields = stat[stat.rindex(")") + 2 :].split()  # the program's name may hold spaces and brackets
    if fields[0] in _ENDED:
        raise ProcessLookupError(f"process {pid} has ended")
    ids: dict[str, tuple[int, int, int, int]] = {}
    for line in (folder / "status").read_text(errors="surrogateescape").splitlines():
        name, _, values = line.partition(":\t")
        if name in {"Uid", "Gid"}:
            ids[name] = _four([int(value) for value in values.split()])
    program = (folder / "exe").stat()
    with (folder / "auxv").open("rb", buffering=0) as file:
        auxv = file.read(_AUXV_MOST_BYTES)
    if not auxv:
        raise ProcessLookupError(f"process {pid} is ending")  # its memory is gone
    return Identity(pid, int(fields[19]), program.st_dev, program.st_ino, ids["Uid"], ids["Gid"], auxv)


def _four(values: list[int]) -> tuple[int, int, int, int]:
    one, two, three, four = values
    return one, two, three, four
