"""Finding QEMU guests on this host: who they are, where their RAM lies, and whether memshr may touch them.

A guest is a process whose program is QEMU. Its name and its QMP socket are taken from its command line; where its RAM
lies in its address space is asked of QEMU itself (``info mtree -f`` for the guest-physical side, ``gpa2hva`` for the
host side), so the hole below 4 GiB, memory that was plugged in, and several NUMA nodes need no rules of ours. What a
process says of itself is no evidence: a socket is used when its listener is that process or the operator named it, and
a layout when there are mappings behind it.

``refusals`` has every reason why a guest must be left alone, each with its remedy. A reason is a fact about the guest
or the host, never a guess: what could not be found out is itself a reason.
"""

from __future__ import annotations

import errno
import itertools
import os
import platform
import pwd
import re
import socket
import struct
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from memshr.errors import BackendError, ConnectionLostError, NoSuchDomainError, PermissionDeniedError, printable
from memshr.procfs import Vmas, process_mappings
from memshr.qemu import syscalls
from memshr.qemu.libvirt_monitor import LibvirtMonitor
from memshr.qemu.monitor import LONGEST_WORD, Monitor, MonitorError, SocketMonitor
from memshr.qemu.pool import of_pools
from memshr.types import PAGE_SHIFT, PAGE_SIZE, Gfn

_PROGRAM = re.compile(r"^(qemu-system-\w+|qemu-kvm|kvm)$")
_FLAT_RANGE = re.compile(
    r"^  ([0-9a-f]{16})-([0-9a-f]{16}) \(prio -?\d+, ([^)]*)\): (.*?)(?: @[0-9a-f]{16})?(?: KVM)?$"
)
_HOST_ADDRESS = re.compile(r"is 0x([0-9a-f]{1,16})\b")
_LONGEST_FLAT_RANGE = 4096
"""letters"""
_MOST_RANGES = 4096
_ADDRESSES_END = 1 << 63
_HOSTS_MEMORY = 4
"""How many times the memory of the host the RAM of one guest may be: what a look at it costs goes with that."""
_MIGRATION_UNDER_WAY = frozenset(
    (
        *("setup", "cancelling", "active", "postcopy-active", "postcopy-paused", "postcopy-recover"),
        *("device", "wait-unplug", "pre-switchover", "colo"),
    )
)
_MIGRATION_STATES = frozenset(("inmigrate", "finish-migrate", "save-vm", "restore-vm", "postmigrate", "colo"))
_ELF_X86_64 = 62
_ENDED_STATES = frozenset("ZXx")
"""proc(5): zombie, dead"""
_SO_PEERPIDFD = 77
"""asm-generic/socket.h, Linux 6.5"""
_RESOLVE_TRIES = 16


@dataclass(frozen=True, slots=True)
class Refusal:
    """One reason why memshr leaves a guest alone, and what would change it. Both are printable, also words of QEMU."""

    reason: str
    remedy: str

    def __post_init__(self) -> None:
        for name in ("reason", "remedy"):
            object.__setattr__(self, name, printable(getattr(self, name)))

    def __str__(self) -> str:
        return f"{self.reason}; {self.remedy}"


_WITHOUT_LOCK = "start QEMU without -overcommit mem-lock=on"
_ORDINARY_PAGES = "use ordinary memory; transparent huge pages are fine"
_UNSHARED = "use a memory backend with share=off (no vhost-user)"
_IN_NO_FILE = "use memory-backend-ram"
_NO_REPORTING = "free-page-reporting=off"
_IN_LIBVIRT = {
    _WITHOUT_LOCK: "remove <locked/> from its <memoryBacking>",
    _ORDINARY_PAGES: "remove <hugepages/> from its <memoryBacking>; transparent huge pages are fine",
    _UNSHARED: "remove <source> and <access> from its <memoryBacking> (no vhost-user, no virtiofs)",
    _IN_NO_FILE: "remove <source> from its <memoryBacking>",
    _NO_REPORTING: "set freePageReporting='off' on its <memballoon>",
}
"""remedies as options of QEMU -> the same in a domain's description, where libvirt chooses the options"""
NO_SOCKET = Refusal("it has no QMP socket", "start QEMU with -qmp unix:/path,server=on,wait=off")


@dataclass(frozen=True, slots=True)
class GuestProcess:
    """A running QEMU.

    ``start_ticks`` tells this process from a later one of the same pid (field 22 of /proc/PID/stat). ``qmp_path`` is
    where we reach its QMP socket, through the guest's own root if it lives in a container; None if it has none that
    we may use, and then ``libvirt`` says whether libvirt holds one, through which it is reached. ``uid`` is the user
    that runs it. ``socket_given``: the operator named the socket, and vouches for who listens there; else that is
    checked. All but that is what the process says of itself.
    """

    pid: int
    start_ticks: int
    name: str
    arguments: tuple[str, ...]
    qmp_path: Path | None
    libvirt: bool
    uid: int
    socket_given: bool = False

    def monitor(self) -> Monitor:
        """Connect to its QMP socket, or to libvirt if that holds it; the caller hangs up.

        :raises BackendError: it has none, or it cannot be used.
        """
        if self.qmp_path is not None and self.socket_given:
            return SocketMonitor(self.qmp_path)
        if self.qmp_path is not None:
            place = _open_socket_file(self.qmp_path)
            try:
                return SocketMonitor(self.qmp_path, place=place, check=self._check_listener)
            finally:
                os.close(place)
        if self.libvirt:
            return LibvirtMonitor(self.name, self.uuid)
        raise BackendError(f"guest {self.name} ({self.pid}): {NO_SOCKET.reason}", remedy=NO_SOCKET.remedy)

    def _check_listener(self, connected: socket.socket) -> None:
        # Else a command line that names the socket of another guest would have us send commands to that one. The kernel
        # keeps who called listen(); a pidfd for it stands for that process and no later one of its number.
        pid, uid, _ = struct.unpack("3i", connected.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
        try:
            pidfd = connected.getsockopt(socket.SOL_SOCKET, _SO_PEERPIDFD)
        except OSError as error:
            if error.errno != errno.ENOPROTOOPT:
                pid = 0  # the listener has ended
            elif uid != self.uid:  # before Linux 6.5: a number that may be another's by now is not enough
                pid = 0
        else:
            try:
                pid = _process_behind(pidfd)
            finally:
                os.close(pidfd)
        if pid != self.pid or not self.running:
            raise ConnectionLostError(
                f"the QMP socket on the command line of guest {printable(self.name)} ({self.pid}) is that of "
                f"{f'process {pid}' if pid > 0 else 'a process that is not there'}",
                remedy=f"if that is right, name it: qemu:{self.pid}@/path/qmp.sock",
            )

    @property
    def user(self) -> str:
        """The name of the user that runs it, or the number of one without a name here."""
        try:
            return pwd.getpwuid(self.uid).pw_name
        except KeyError:
            return str(self.uid)

    @property
    def key(self) -> str:
        """What tells this process from any other, now or later."""
        return f"{self.pid}.{self.start_ticks}"

    @property
    def uuid(self) -> str:
        """Its UUID as its command line has it, which it always does under libvirt; else empty."""
        return next(_arguments_of(self.arguments, "uuid"), "")

    def mappings(self) -> Vmas:
        """What it has mapped now. :raises OSError: it has ended, or we may not look."""
        return process_mappings(self.pid)

    @property
    def running(self) -> bool:
        """Whether this very process is still there, and no zombie: that has no memory any more."""
        try:
            state, start_ticks = _state_and_start(self.pid)
        except OSError:
            return False
        return start_ticks == self.start_ticks and state not in _ENDED_STATES


@dataclass(frozen=True, slots=True)
class RamRange:
    """Consecutive guest pages of RAM: gfns from ``first_gfn``, in QEMU's address space from ``hva``."""

    first_gfn: Gfn
    pages: int
    hva: int
    block: str

    @property
    def end_hva(self) -> int:
        """The first address after it."""
        return self.hva + self.pages * PAGE_SIZE


# -- who is there ------------------------------------------------------------------------------------------------------


def find_guests() -> list[GuestProcess]:
    """Every QEMU of this host that we can see, in order of pid."""
    found = []
    for entry in sorted(int(path.name) for path in Path("/proc").iterdir() if path.name.isdigit()):
        try:
            guest = inspect_process(entry)
        except OSError:  # exited meanwhile, or not ours to look at
            continue
        if guest is not None:
            found.append(guest)
    return found


def inspect_process(pid: int) -> GuestProcess | None:
    """The QEMU with this pid; None if it runs something else.

    :raises OSError: there is no such process, or we may not look at it.
    """
    program = Path(f"/proc/{pid}/exe").readlink().name.removesuffix(" (deleted)")
    if not _PROGRAM.match(program):
        return None
    _, start_ticks = _state_and_start(pid)
    uid, *_ = _user_ids(Path(f"/proc/{pid}/status").read_text())
    arguments = tuple(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes()).split("\0")[:-1])
    if not arguments:
        return None  # it is exiting
    socket_path, libvirt = _qmp_socket(arguments)
    return GuestProcess(
        pid=pid,
        start_ticks=start_ticks,
        name=_name_of(arguments) or f"pid-{pid}",
        arguments=arguments,
        qmp_path=_seen_from_here(pid, socket_path) if socket_path else None,
        libvirt=libvirt,
        uid=uid,
    )


def select_guests(selector: str) -> list[GuestProcess]:
    """The guests that a user means by ``all``, a name, a pid, or either with a socket: ``NAME@/path/qmp.sock``.

    :raises NoSuchDomainError: there is none, or the name is that of several.
    """
    wanted, _, given_path = selector.partition("@")
    guests = find_guests()
    if wanted == "all" and not given_path:
        return guests
    # A number is a pid first: a guest may be given any name, also the number of another.
    matching = [guest for guest in guests if str(guest.pid) == wanted]
    matching = matching or [guest for guest in guests if guest.name == wanted]
    if not matching:
        names = ", ".join(f"{guest.name} ({guest.pid})" for guest in guests) or "none"
        raise NoSuchDomainError(f"no QEMU guest is called {wanted}", remedy=f"guests that run here: {names}")
    if len(matching) > 1:
        pids = ", ".join(str(guest.pid) for guest in matching)
        raise NoSuchDomainError(f"{len(matching)} guests are called {wanted}", remedy=f"name one by its pid: {pids}")
    if not given_path:
        return matching
    return [replace(matching[0], qmp_path=Path(given_path), libvirt=False, socket_given=True)]


def _state_and_start(pid: int) -> tuple[str, int]:
    # The letter of its state, and when it started. The program's name may hold spaces and brackets, and any bytes.
    line = Path(f"/proc/{pid}/stat").read_bytes().decode(errors="replace")
    fields = line[line.rindex(")") + 2 :].split()
    return fields[0], int(fields[19])


def _user_ids(status: str) -> list[int]:
    # Real, effective, saved, and that of file accesses, from /proc/PID/status.
    fields = next((line.split()[1:] for line in status.splitlines() if line.startswith("Uid:")), [])
    return [int(each) for each in fields]


def _process_behind(pidfd: int) -> int:
    # The process that a pidfd stands for; -1 when it has ended and its number may be another's.
    lines = Path(f"/proc/self/fdinfo/{pidfd}").read_text().splitlines()
    return next((int(line.split()[1]) for line in lines if line.startswith("Pid:")), -1)


def _options(argument: str) -> dict[str, str]:
    # QEMU's "first,key=value,..." with ",," for a comma; the first may lack its key.
    options: dict[str, str] = {}
    for number, part in enumerate(argument.replace(",,", "\0").split(",")):
        key, separator, value = part.replace("\0", ",").partition("=")
        if separator:
            options[key] = value
        elif number == 0:
            options[""] = key
        else:
            options[key] = "on"
    return options


def _arguments_of(arguments: Sequence[str], *names: str) -> Iterator[str]:
    # The values of an option that may be given with one dash or two.
    for argument, value in itertools.pairwise(arguments):
        if argument.startswith("-") and argument.lstrip("-") in names:
            yield value


def _name_of(arguments: Sequence[str]) -> str:
    for value in _arguments_of(arguments, "name"):
        options = _options(value)
        return options.get("guest") or options.get("", "")
    return ""


def _qmp_socket(arguments: Sequence[str]) -> tuple[str, bool]:
    """The path of the first QMP socket on a command line (or nothing), and whether libvirt holds it."""
    for value in _arguments_of(arguments, "qmp", "qmp-pretty"):
        if value.startswith("unix:"):
            return _options(value.removeprefix("unix:")).get("", ""), False
    chardevs = {
        options.get("id", ""): options
        for options in map(_options, _arguments_of(arguments, "chardev"))
        if options.get("") == "socket"
    }
    libvirt = False
    for options in map(_options, _arguments_of(arguments, "mon")):
        if options.get("mode") != "control":
            continue
        name = options.get("chardev") or options.get("", "")
        chardev = chardevs.get(name, {})
        # libvirt makes the socket itself, passes it as a descriptor, and stays connected.
        if name == "charmonitor" or "fd" in chardev:
            libvirt = True
        elif path := chardev.get("path"):
            return path, False
    return "", libvirt


def _seen_from_here(pid: int, path: str) -> Path:
    # Relative paths are relative to QEMU's folder; both are looked up in its own root, which in a container is another.
    if path.startswith("/"):
        return Path(f"/proc/{pid}/root") / path.lstrip("/")
    return Path(f"/proc/{pid}/cwd") / path


def _open_socket_file(path: Path) -> int:
    """The file of a QMP socket of ``_seen_from_here`` as an O_PATH descriptor, found without leaving QEMU's own root.

    Absolute symbolic links are looked up in that root. A path relative to QEMU's folder must not lead out of it.

    :raises ConnectionLostError: there is none. :raises PermissionDeniedError: we may not look.
    """
    _, _, pid, base, *parts = path.parts
    rule = syscalls.RESOLVE_IN_ROOT if base == "root" else syscalls.RESOLVE_BENEATH
    try:
        folder = os.open(f"/proc/{pid}/{base}", os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            place = _resolved(folder, "/".join(parts), rule | syscalls.RESOLVE_NO_MAGICLINKS)
        finally:
            os.close(folder)
    except PermissionError as error:
        raise PermissionDeniedError(
            f"may not connect to the QMP socket {printable(os.fspath(path))}",
            remedy="run as root or as the user of QEMU",
        ) from error
    except OSError as error:
        why = "it leads out of QEMU's folder" if error.errno == errno.EXDEV else os.strerror(error.errno or 0)
        raise ConnectionLostError(
            f"cannot connect to the QMP socket {printable(os.fspath(path))}: {why}",
            remedy="give another one with NAME@/path/qmp.sock",
        ) from error
    return place


def _resolved(folder: int, path: str, rules: int) -> int:
    for _ in range(_RESOLVE_TRIES):
        try:
            return syscalls.openat2(folder, path, os.O_PATH | os.O_CLOEXEC, rules)
        except OSError as error:
            if error.errno != errno.EAGAIN:  # something was renamed meanwhile; openat2(2) says to try again
                raise
    raise OSError(errno.EAGAIN, os.strerror(errno.EAGAIN))


# -- where its memory is -----------------------------------------------------------------------------------------------


def memory_layout(monitor: Monitor, mappings: Vmas) -> list[RamRange]:
    """The guest's RAM as QEMU lays it out now, in order of gfn: no ROM, no device memory, whole pages only.

    :param mappings: what that QEMU has mapped now.
    :raises MonitorError: this QEMU lacks one of the commands.
    :raises BackendError: no such layout can be: ranges overlap or are too many, there is nothing mapped, or it is many
        times the host's memory.
    """
    backends = {device.text("id") for device in monitor.ask_list("query-memdev") if device.has("id")}
    places: list[tuple[int, int, str]] = []
    for first, last, block in parse_flat_view(monitor.human("info mtree -f")):
        if not (block.removeprefix("/objects/") in backends or block.endswith(".ram")):
            continue
        start, end = -(-first // PAGE_SIZE) * PAGE_SIZE, (last + 1) // PAGE_SIZE * PAGE_SIZE
        if start < end:
            places.append((start, end, block))
    _check_places(places)
    ranges: list[RamRange] = []
    for start, end, block in places:
        answer = monitor.human(f"gpa2hva {start:#x}")
        address = _HOST_ADDRESS.search(answer[:LONGEST_WORD])
        if address is None:
            raise MonitorError(
                f"QEMU does not say where guest address {start:#x} is: {printable(answer[:LONGEST_WORD].strip())}",
                command="gpa2hva",
                kind="GenericError",
            )
        ranges.append(RamRange(Gfn(start >> PAGE_SHIFT), (end - start) >> PAGE_SHIFT, int(address[1], 16), block))
    layout = _joined(ranges)
    _check_layout(layout, mappings)
    return layout


def _odd_layout(what: str) -> BackendError:
    return BackendError(f"QEMU tells of RAM that cannot be: {what}", remedy="look again; report it if it stays")


def _check_places(places: Sequence[tuple[int, int, str]]) -> None:
    # Before QEMU is asked about each.
    if len(places) > _MOST_RANGES:
        raise _odd_layout(f"{len(places):,} ranges")
    for (_, end, block), (start, _, other) in itertools.pairwise(sorted(places)):
        if start < end:
            raise _odd_layout(f"{block} and {other} overlap at {start:#x}")
    pages = sum(end - start for start, end, _ in places) >> PAGE_SHIFT
    if pages > most_pages():
        raise _odd_layout(f"{pages * PAGE_SIZE >> 20:,} MiB, which is many times the memory of this host")


def most_pages() -> int:
    """The most pages that are believed of one guest; more is refused before anything is reserved for them."""
    return _HOSTS_MEMORY * os.sysconf("SC_PHYS_PAGES")


def _check_layout(layout: Sequence[RamRange], mappings: Vmas) -> None:
    # Against what is there: each range is mapped from end to end, and none of it twice.
    for ram, after in itertools.pairwise([*sorted(layout, key=lambda ram: ram.hva), None]):
        assert ram is not None
        if ram.hva % PAGE_SIZE or ram.end_hva > _ADDRESSES_END:
            raise _odd_layout(f"{ram.block} at address {ram.hva:#x}")
        if after is not None and after.hva < ram.end_hva:
            raise _odd_layout(f"{ram.block} and {after.block} are at the same address {after.hva:#x}")
    if not layout:
        return
    if not len(mappings):
        raise _odd_layout("nothing is mapped in it")
    begins = np.concatenate([[True], mappings.start[1:] != mappings.end[:-1]])
    starts = mappings.start[begins]
    ends = mappings.end[np.append(begins[1:], True)]
    for ram in layout:
        at = int(np.searchsorted(starts, np.uint64(ram.hva), side="right")) - 1
        if at < 0 or int(ends[at]) < ram.end_hva:
            raise _odd_layout(f"{ram.block} at address {ram.hva:#x}, where QEMU has not mapped as much")


def parse_flat_view(text: str) -> list[tuple[int, int, str]]:
    """The RAM ranges (first address, last address, name of the memory region) of the system address space.

    :param text: what ``info mtree -f`` prints.
    """
    ranges = []
    for view in text.split("FlatView #")[1:]:
        if ' AS "memory"' not in view:
            continue
        for line in view.splitlines():
            found = _FLAT_RANGE.match(line) if len(line) < _LONGEST_FLAT_RANGE else None
            if found and found[3] == "ram":
                ranges.append((int(found[1], 16), int(found[2], 16), printable(found[4])))
    return ranges


def _joined(ranges: list[RamRange]) -> list[RamRange]:
    joined: list[RamRange] = []
    for each in sorted(ranges, key=lambda ram: ram.first_gfn):
        last = joined[-1] if joined else None
        if last and (last.first_gfn + last.pages, last.end_hva, last.block) == (each.first_gfn, each.hva, each.block):
            joined[-1] = RamRange(last.first_gfn, last.pages + each.pages, last.hva, last.block)
        else:
            joined.append(each)
    return joined


# -- may it be touched -------------------------------------------------------------------------------------------------


def host_refusals() -> tuple[Refusal, ...]:
    """Reasons that lie in this host and hold for every guest."""
    if platform.machine() != "x86_64" or platform.system() != "Linux":
        return (
            Refusal(
                f"this is {platform.system()} on {platform.machine()}",
                "live sharing works on x86-64 Linux only; estimate from memory images instead",
            ),
        )
    try:
        features = syscalls.userfaultfd_features()
    except PermissionError:
        return (
            Refusal(
                "this user may not use userfaultfd", "run as root (capabilities SYS_PTRACE, SYS_ADMIN and SYS_NICE)"
            ),
        )
    except OSError as error:
        return (
            Refusal(
                f"the kernel has no userfaultfd ({error.strerror})", "use Linux 6.1 or later with CONFIG_USERFAULTFD"
            ),
        )
    needed = syscalls.UFFD_FEATURE_PAGEFAULT_FLAG_WP | syscalls.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
    if features & needed != needed:
        return (Refusal("the kernel's userfaultfd cannot write-protect", "use Linux 6.1 or later"),)
    return ()


def refusals(
    guest: GuestProcess, monitor: Monitor | Refusal, layout: Sequence[RamRange], mappings: Vmas | None = None
) -> tuple[Refusal, ...]:
    """Every reason why this guest must not be touched; empty if there is none.

    A seccomp filter is not judged here: that takes stopping the guest's main thread for a moment, which attaching does.

    :param monitor: or why it cannot be used, which is a reason.
    :param layout: what ``memory_layout`` said.
    :param mappings: what the guest has mapped, if the caller has just looked.
    """
    found = [*host_refusals(), *_process_refusals(guest)]
    try:
        mappings = mappings or guest.mappings()
        found += mapping_refusals(mappings, layout, _on_hugetlbfs(guest.pid, mappings))
    except OSError as error:
        found.append(unreadable(error))
    if isinstance(monitor, Refusal):
        found.append(monitor)
    else:
        found += _machine_refusals(monitor)
    if guest.libvirt:
        found = [Refusal(each.reason, _IN_LIBVIRT.get(each.remedy, each.remedy)) for each in found]
    return tuple(dict.fromkeys(found))


def unreadable(error: OSError) -> Refusal:
    """The reason that lies in a look into the process that failed."""
    if error.errno in {errno.ENOENT, errno.ESRCH}:
        return Refusal("it has exited", "start it again")
    if error.errno in {errno.EACCES, errno.EPERM}:
        return Refusal("this user may not look into the process", "run as root (capability SYS_PTRACE)")
    return Refusal(f"it cannot be looked into: {error.strerror or error}", "leave it out")


def _process_refusals(guest: GuestProcess) -> list[Refusal]:
    found = []
    process = Path(f"/proc/{guest.pid}")
    try:
        with (process / "exe").open("rb") as program:
            header = program.read(20)
        status = (process / "status").read_text()
        descriptors = [_link(entry) for entry in (process / "fd").iterdir()]
    except OSError as error:
        return [unreadable(error)]
    if len(header) < 20 or header[4] != 2 or int.from_bytes(header[18:20], "little") != _ELF_X86_64:
        found.append(Refusal("QEMU itself is no x86-64 program", "run QEMU for the host's own processor"))
    if any(link.startswith("/dev/vfio/") or link == "anon_inode:[vfio-device]" for link in descriptors):
        found.append(
            Refusal("it has a passed-through device (VFIO)", "remove the device: its DMA needs every page in place")
        )
    found += status_refusals(status)
    return found


def _link(path: Path) -> str:
    try:
        return os.fspath(path.readlink())
    except OSError:  # closed meanwhile
        return ""


def status_refusals(status: str) -> list[Refusal]:
    """The reasons that /proc/PID/status shows: locked or pinned memory, shadow stacks.

    :param status: contents of that file.
    """
    found = []
    fields = dict(line.split(":", 1) for line in status.splitlines() if ":" in line)
    locked, pinned = (int(fields.get(name, "0").split()[0]) for name in ("VmLck", "VmPin"))
    if locked:
        found.append(Refusal(f"{locked} KiB of its memory are locked", _WITHOUT_LOCK))
    if pinned:
        found.append(
            Refusal(
                f"{pinned} KiB of its memory are pinned for DMA",
                "remove what pins it: VFIO, vDPA, RDMA, registered io_uring buffers",
            )
        )
    if len(set(_user_ids(status))) > 1:
        found.append(Refusal("it runs with the rights of several users", "start QEMU as the user that it is to run as"))
    if "shstk" in fields.get("x86_Thread_features", ""):
        found.append(Refusal("it runs with a shadow stack", "start QEMU with GLIBC_TUNABLES=glibc.cpu.hwcaps=-SHSTK"))
    return found


def _on_hugetlbfs(pid: int, mappings: Vmas) -> set[int]:
    # The inodes of those mapped files whose pages are larger than pages are.
    found = set()
    seen = set()
    for mapping in mappings.of((mappings.inode != 0) & ~of_pools(mappings)):
        file_of = (mapping.dev_major, mapping.dev_minor, mapping.inode)
        if mapping.writable and file_of not in seen:
            seen.add(file_of)
            try:
                file = Path(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}")
                if os.statvfs(file).f_bsize > PAGE_SIZE:
                    found.add(mapping.inode)
            except OSError:  # unmapped meanwhile
                continue
    return found


def mapping_refusals(mappings: Vmas, layout: Sequence[RamRange], huge_inodes: Collection[int] = ()) -> list[Refusal]:
    """The reasons that show in how the guest's RAM is mapped: only private anonymous memory can be shared.

    :param huge_inodes: the files among the mappings that lie on hugetlbfs.
    """
    found = []
    odd = ~mappings.ordinary & ~of_pools(mappings)
    for ram in layout:
        inside = (mappings.start < ram.end_hva) & (mappings.end > ram.hva)
        ends = np.minimum(mappings.end[inside], ram.end_hva)
        covered = int((ends - np.maximum(mappings.start[inside], ram.hva)).sum())
        for mapping in mappings.of(inside & odd):
            if "hugepage" in mapping.path or (mapping.inode and mapping.inode in huge_inodes):
                found.append(Refusal(f"its RAM {ram.block} is of hugetlbfs", _ORDINARY_PAGES))
            elif mapping.shared:
                found.append(Refusal(f"its RAM {ram.block} is shared memory", _UNSHARED))
            elif mapping.inode:
                found.append(Refusal(f"its RAM {ram.block} is a mapped file", _IN_NO_FILE))
            else:
                found.append(Refusal(f"its RAM {ram.block} is not writable to QEMU itself", _IN_NO_FILE))
            break
        else:
            if covered != ram.pages * PAGE_SIZE:
                found.append(
                    Refusal(f"its RAM {ram.block} is not where QEMU says it is", "look again; report it if it stays")
                )
    return list(dict.fromkeys(found))


def _machine_refusals(monitor: Monitor) -> list[Refusal]:
    found = []
    state, migration = monitor.state(), monitor.ask_object("query-migrate")
    if state in _MIGRATION_STATES or (migration.has("status") and migration.text("status") in _MIGRATION_UNDER_WAY):
        found.append(Refusal("it is being migrated or saved", "wait until that has ended"))
    confidential = _property(monitor, "/machine", "confidential-guest-support")
    if confidential or _encrypts(monitor):
        found.append(Refusal("its memory is encrypted (SEV, TDX)", "nothing: encrypted pages are never equal"))
    if any(device.text("type") == "virtio-mem" for device in monitor.ask_list("query-memory-devices")):
        found.append(Refusal("it has a virtio-mem device, which discards RAM", "remove the device"))
    for folder in ("/machine/peripheral", "/machine/peripheral-anon"):
        for device in monitor.ask_list("qom-list", {"path": folder}):
            path = f"{folder}/{device.text('name')}"
            if "balloon" in device.text("type") and _property(monitor, path, "free-page-reporting"):
                found.append(Refusal("its balloon reports free pages, which discards RAM", _NO_REPORTING))
    return found


def _encrypts(monitor: Monitor) -> bool:
    try:
        return monitor.ask_object("query-sev").truth("enabled")
    except MonitorError:  # a QEMU that was built without the command has nothing to say about it
        return False


def _property(monitor: Monitor, path: str, name: str) -> bool:
    # Whether it is set: true, or the path of something.
    try:
        return bool(monitor.execute("qom-get", {"path": path, "property": name}))
    except MonitorError:
        return False


def has_direct_drives(monitor: Monitor) -> bool:
    """Whether a drive reads by DMA of the host into guest RAM: O_DIRECT (cache.direct), aio=native or io_uring.

    Such a read has its pages pinned when it starts; protecting them later does not stop it.

    Source: ``query-named-block-nodes``.
    """
    return any(node.object("cache").truth("direct") for node in monitor.ask_list("query-named-block-nodes"))
