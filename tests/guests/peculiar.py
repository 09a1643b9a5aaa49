"""Guests with something special about them: those that memshr must not touch, and those that it must handle with care.

Each is a QEMU whose firmware finds nothing to boot and idles: it has real RAM and costs no processor. ``in_effect``
looks, by QMP and /proc, whether QEMU really does what its options say.
"""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from guests.kit import MissingPartError, find_qemu, need_root
from guests.machine import Machine

MEMORY_MIB = 64
MIGRATION_DEADLINE_S = 30.0
HUGE_PAGE_MIB = 2
HUGE_PAGES = Path("/sys/kernel/mm/hugepages/hugepages-2048kB")


@dataclass(frozen=True, slots=True)
class Peculiarity:
    """One kind of special guest.

    ``arguments`` are QEMU's; ``disturb`` is done to it once it runs; ``host`` is what the host must provide meanwhile.
    """

    name: str
    arguments: tuple[str, ...]
    in_effect: Callable[[Machine], bool]
    disturb: Callable[[Machine], object] | None = None
    host: Callable[[], Any] = nullcontext
    user: str | None = None
    needs_root: bool = False

    @contextmanager
    def started(self, name: str) -> Iterator[Machine]:
        """A guest of this kind, until the end of the ``with``.

        :raises MissingPartError: the host cannot provide what it needs.
        :raises GuestFailedError: QEMU did not come up.
        """
        if self.needs_root:
            need_root(f"a guest of the kind {self.name}")
        with self.host(), Machine(name, find_qemu(), memory_mib=MEMORY_MIB, user=self.user) as machine:
            machine.start(["-accel", "tcg,tb-size=16", *self.arguments])
            if self.disturb is not None:
                self.disturb(machine)
            yield machine


def ram_mapping(machine: Machine) -> dict[str, str]:
    """The fields of /proc/PID/smaps of the mapping that holds guest-physical address 0.

    ``mapping`` has the first line (addresses, permissions, offset, device, inode, path); sizes are kept as written.
    """
    hva = int(machine.hmp("gpa2hva 0").split()[-1], 16)
    fields: dict[str, str] = {}
    for line in Path(f"/proc/{machine.pid}/smaps").read_text().splitlines():
        word, _, rest = line.partition(" ")
        if word.endswith(":"):
            if fields:
                fields[word[:-1]] = rest.strip()
            continue
        if fields:
            break
        first, _, last = word.partition("-")
        if int(first, 16) <= hva < int(last, 16):
            fields["mapping"] = line
    return fields


def process_status(pid: int) -> dict[str, str]:
    """The fields of /proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def _backend(kind: str, options: str) -> tuple[str, ...]:
    return ("-object", f"{kind},id=ram,size={MEMORY_MIB}M,{options}", "-machine", "pc,memory-backend=ram")


def _is_shared(machine: Machine) -> bool:
    return ram_mapping(machine)["mapping"].split()[1] == "rw-s"


def _has_flag(flag: str) -> Callable[[Machine], bool]:
    return lambda machine: flag in ram_mapping(machine)["VmFlags"].split()


def _lacks_flag(flag: str) -> Callable[[Machine], bool]:
    return lambda machine: flag not in ram_mapping(machine)["VmFlags"].split()


def _has_status(status: str) -> Callable[[Machine], bool]:
    return lambda machine: machine.execute("query-status")["status"] == status


def _property(device: str, name: str) -> Callable[[Machine], bool]:
    where = {"path": f"/machine/peripheral/{device}", "property": name}
    return lambda machine: machine.execute("qom-get", where) is True


def _migrate_for_ever(machine: Machine) -> None:
    machine.execute("migrate-set-parameters", {"max-bandwidth": 1})
    # The other side never reads; QEMU's end is its end, for it would not get the signal that ends QEMU.
    machine.execute("migrate", {"uri": "exec:exec setpriv --pdeathsig=KILL sleep infinity"})
    machine.wait(lambda: _is_migrating(machine), MIGRATION_DEADLINE_S, "a migration begins")


def _snapshot_for_ever(machine: Machine) -> None:
    capability = {"capability": "background-snapshot", "state": True}
    machine.execute("migrate-set-capabilities", {"capabilities": [capability]})
    _migrate_for_ever(machine)


def _is_migrating(machine: Machine) -> bool:
    return bool(machine.execute("query-migrate").get("status") == "active")


@contextmanager
def _huge_pages() -> Iterator[None]:
    # Enough pages of 2 MiB for one guest, for as long as it lives.
    count = HUGE_PAGES / "nr_hugepages"
    try:
        before = int(count.read_text())
        wanted = before + MEMORY_MIB // HUGE_PAGE_MIB
        count.write_text(f"{wanted}\n")
    except OSError as error:
        raise MissingPartError(f"cannot reserve huge pages: {error}; run as root", part="hugepages") from error
    try:
        if int(count.read_text()) < wanted:
            message = f"the kernel found no room for {wanted} huge pages; free memory on this host"
            raise MissingPartError(message, part="hugepages")
        yield
    finally:
        count.write_text(f"{before}\n")


SANDBOX = "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"

_KINDS = (
    Peculiarity("plain", (), _has_status("running")),
    # RAM that is not private anonymous memory
    Peculiarity("shared-ram", _backend("memory-backend-ram", "share=on"), _is_shared),
    Peculiarity("memfd", _backend("memory-backend-memfd", "share=on"), _is_shared),
    Peculiarity(
        "private-memfd",
        _backend("memory-backend-memfd", "share=off"),
        lambda machine: "memfd:" in ram_mapping(machine)["mapping"] and not _is_shared(machine),
    ),
    Peculiarity(
        "private-file",
        _backend("memory-backend-file", "mem-path=/dev/shm,share=off"),
        lambda machine: "/dev/shm/" in ram_mapping(machine)["mapping"] and not _is_shared(machine),
    ),
    Peculiarity(
        "huge-pages",
        _backend("memory-backend-memfd", "share=off,hugetlb=on,hugetlbsize=2M"),
        lambda machine: ram_mapping(machine)["KernelPageSize"] == "2048 kB",
        host=_huge_pages,
    ),
    Peculiarity(
        "mem-lock",
        ("-overcommit", "mem-lock=on"),
        lambda machine: process_status(machine.pid)["VmLck"] != "0 kB",
        needs_root=True,
    ),
    # RAM whose flags a new mapping would lose
    Peculiarity("no-core-dump", ("-machine", "pc,dump-guest-core=off"), _has_flag("dd")),
    Peculiarity("core-dump", ("-machine", "pc,dump-guest-core=on"), _lacks_flag("dd")),
    Peculiarity("mergeable", ("-machine", "pc,mem-merge=on"), _has_flag("mg")),
    Peculiarity("not-mergeable", ("-machine", "pc,mem-merge=off"), _lacks_flag("mg")),
    # what QEMU may and may not do
    Peculiarity("sandbox", ("-sandbox", SANDBOX), lambda machine: process_status(machine.pid)["Seccomp"] == "2"),
    Peculiarity(
        "other-user",
        (),
        lambda machine: process_status(machine.pid)["Uid"].split()[0] != str(os.getuid()),
        user="nobody",
        needs_root=True,
    ),
    # devices that give guest RAM back to the host on their own
    Peculiarity(
        "virtio-mem",
        (
            *("-m", "slots=1,maxmem=256M", "-object", "memory-backend-ram,id=more,size=128M"),
            *("-device", "virtio-mem-pci,id=plug,memdev=more"),
        ),
        lambda machine: [device["type"] for device in machine.execute("query-memory-devices")] == ["virtio-mem"],
    ),
    Peculiarity(
        "free-page-reporting",
        ("-device", "virtio-balloon-pci,id=balloon,free-page-reporting=on"),
        _property("balloon", "free-page-reporting"),
    ),
    Peculiarity(
        "balloon",
        ("-device", "virtio-balloon-pci,id=balloon"),
        lambda machine: machine.execute("query-balloon")["actual"] == MEMORY_MIB << 20,
    ),
    # states
    Peculiarity("paused", (), _has_status("paused"), disturb=Machine.pause),
    Peculiarity("never-started", ("-S",), _has_status("prelaunch")),
    Peculiarity("incoming", ("-incoming", "defer"), _has_status("inmigrate")),
    Peculiarity("outgoing", (), _is_migrating, disturb=_migrate_for_ever),
    Peculiarity("background-snapshot", (), _is_migrating, disturb=_snapshot_for_ever, needs_root=True),
    # layout
    Peculiarity(
        "q35",
        ("-machine", "q35"),
        lambda machine: "q35" in machine.execute("qom-get", {"path": "/machine", "property": "type"}),
    ),
    Peculiarity(
        "numa",
        (
            *("-object", "memory-backend-ram,id=low,size=32M", "-object", "memory-backend-ram,id=high,size=32M"),
            *("-numa", "node,memdev=low", "-numa", "node,memdev=high"),
        ),
        lambda machine: {backend["id"] for backend in machine.execute("query-memdev")} == {"low", "high"},
    ),
)
PECULIARITIES = {kind.name: kind for kind in _KINDS}
"""every kind, by name"""
