"""After share and detach a guest's process is as it was, in everything that /proc shows; and its RAM meanwhile, too."""

import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

from guests.asitwas import Snapshot, memory_ranges, ram_ranges
from guests.linux import LinuxGuest
from guests.machine import GuestFailedError, Machine, wait_until
from guests.peculiar import process_status
from guests.qtest import QtestGuest
from live.commands import memshr
from live.qemu_host import FIRST_GFN, booted
from memshr.types import PAGE_SIZE

MEMORY_MIB = 64
LEAVING_DEADLINE_S = 5.0
"""the agent's thread ends, and QEMU closes what a monitor had, a moment after the command"""
SMALL_MIB = 192
CHECKER_PAGES = 2048

MERGE_EVERYTHING = f"""#!{sys.executable}
import ctypes, os, sys
PR_SET_MEMORY_MERGE = 67  # linux/prctl.h, since Linux 6.4; a program that is executed inherits it
if ctypes.CDLL(None).prctl(PR_SET_MEMORY_MERGE, 1, 0, 0, 0):
    sys.exit("no PR_SET_MEMORY_MERGE")
os.execv({{qemu!r}}, [{{qemu!r}}, *sys.argv[1:]])
"""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of guest: QEMU's arguments, and whether ``in_effect`` what they ask for."""

    in_effect: Callable[[QtestGuest], bool]
    arguments: tuple[str, ...] = ()
    state: str = "running"
    merge_everything: bool = False


def backend(*options: str) -> tuple[str, ...]:
    """RAM of a memory backend of its own."""
    object_ = ",".join(["memory-backend-ram", "id=ram", f"size={MEMORY_MIB}M", *options])
    return ("-object", object_, "-machine", "pc,memory-backend=ram")


def ram_of(guest: Machine) -> tuple[int, int]:
    """Where RAM begins in QEMU, and its bytes; a machine this small has it in one piece."""
    return int(guest.hmp("gpa2hva 0").split()[-1], 16), guest.memory_mib << 20


def has_flag(flag: str) -> Callable[[Machine], bool]:
    """Whether all of RAM has this VmFlag."""

    def look(guest: Machine) -> bool:
        hva, length_bytes = ram_of(guest)
        ranges = [each for each in memory_ranges(guest.pid) if each.start < hva + length_bytes and each.end > hva]
        return all(flag in each.vm_flags for each in ranges)

    return look


def lacks_flag(flag: str) -> Callable[[Machine], bool]:
    """Whether some of RAM lacks this VmFlag."""
    return lambda guest: not has_flag(flag)(guest)


def is_state(guest: Machine) -> str:
    """QEMU's word for the state that it is in."""
    return str(guest.execute("query-status")["status"])


KINDS = {
    "plain": Kind(has_flag("hg")),
    "paused": Kind(lambda guest: is_state(guest) == "paused", state="paused"),
    "never-started": Kind(lambda guest: is_state(guest) == "prelaunch", state="prelaunch"),
    "numa-bound": Kind(
        lambda guest: all("policy bind:0" in each for each in ram_ranges(guest.pid, *ram_of(guest))),
        backend("host-nodes=0", "policy=bind"),
    ),
    "numa-preferred": Kind(
        lambda guest: all("policy prefer" in each for each in ram_ranges(guest.pid, *ram_of(guest))),
        backend("host-nodes=0", "policy=preferred"),
        state="paused",
    ),
    "no-core-dump": Kind(has_flag("dd"), ("-machine", "pc,dump-guest-core=off")),
    "core-dump": Kind(lacks_flag("dd"), ("-machine", "pc,dump-guest-core=on")),
    "mergeable": Kind(has_flag("mg"), ("-machine", "pc,mem-merge=on")),
    "not-mergeable": Kind(lacks_flag("mg"), ("-machine", "pc,mem-merge=off")),
    "preallocated": Kind(
        lambda guest: int(process_status(guest.pid)["RssAnon"].split()[0]) >= MEMORY_MIB << 10, backend("prealloc=on")
    ),
    "merge-everything": Kind(
        lambda guest: "ksm_merge_any: yes" in Path(f"/proc/{guest.pid}/ksm_stat").read_text(),
        ("-machine", "pc,mem-merge=off"),
        merge_everything=True,
    ),
}


@contextmanager
def started(kind: Kind, qemu: Path, folder: Path) -> Iterator[list[QtestGuest]]:
    """Two guests of a kind, full of equal pages, in the state that it says."""
    if kind.merge_everything:
        wrapper = folder / "merge-everything"
        wrapper.write_text(MERGE_EVERYTHING.format(qemu=str(qemu)))
        wrapper.chmod(0o755)
        qemu = wrapper
    with booted(qemu, "was-1", "was-2", memory_mib=MEMORY_MIB, arguments=kind.arguments) as guests:
        for guest in guests:
            if kind.state != "prelaunch":
                guest.resume()
            if kind.state == "paused":
                guest.pause()
            guest.write(FIRST_GFN * PAGE_SIZE, contents())
            assert kind.in_effect(guest), f"QEMU or the kernel does not do {kind.arguments}"
            assert is_state(guest) == kind.state
        yield guests


def contents() -> bytes:
    """Pages that every guest has: one twenty times over, zeros, and a run of different ones."""
    random = np.random.default_rng(16)
    return random.bytes(PAGE_SIZE) * 20 + bytes(PAGE_SIZE) * 20 + random.bytes(600 * PAGE_SIZE)


def unlike(before: list[list[str]], later: list[list[str]]) -> list[str]:
    """The ranges that went (``-``) and came (``+``), of all guests."""
    then, now = ({line for each in found for line in each} for found in (before, later))
    return sorted([*(f"- {line}" for line in then - now), *(f"+ {line}" for line in now - then)], key=lambda s: s[2:])


def left_behind(guest: Machine, before: Snapshot) -> list[str]:
    """What is not as it was, once the guest has had time to leave."""

    def look() -> list[str]:
        return before.differences(Snapshot.take(guest.pid))

    try:
        wait_until(lambda: not look(), LEAVING_DEADLINE_S, "a guest is as it was")
    except GuestFailedError:
        return look()
    return []


@pytest.mark.parametrize("kind", KINDS)
def test_guest_is_as_it_was(kind: str, qemu: Path, tmp_path: Path) -> None:
    with started(KINDS[kind], qemu, tmp_path) as guests:
        sources = [f"qemu:{guest.pid}" for guest in guests]
        memshr("status", *sources)  # what QEMU allocates for the commands of a monitor it keeps
        before = [Snapshot.take(guest.pid) for guest in guests]
        places = [ram_of(guest) for guest in guests]
        ram = [ram_ranges(guest.pid, *place) for guest, place in zip(guests, places, strict=True)]

        report = memshr("share", *sources, "--group", "all", "--huge-share", "0")
        assert report["inter_pages"] >= 600
        meanwhile = [ram_ranges(guest.pid, *place) for guest, place in zip(guests, places, strict=True)]
        undone = memshr("detach", *sources)["guests"]
        assert all(each["unshared_pages"] >= 600 for each in undone)

        left = [line for guest, facts in zip(guests, before, strict=True) for line in left_behind(guest, facts)]
        lost = [f"while attached, {line}" for line in unlike(ram, meanwhile)]
        if found := [*lost, *left]:
            pytest.fail("\n".join(["not as it was:", *found]), pytrace=False)
        for guest in guests:
            assert is_state(guest) == KINDS[kind].state
            assert guest.execute("query-fdsets") == []
            assert guest.read(FIRST_GFN * PAGE_SIZE, len(contents())) == contents()


def test_linux_guest_is_as_it_was_running_and_paused(boot: Callable[..., LinuxGuest]) -> None:
    guest = boot("was-linux", memory_mib=SMALL_MIB).wait_ready()
    guest.start_checker(CHECKER_PAGES)
    guest.wait_rounds(1)
    source = f"qemu:{guest.pid}"
    left: list[str] = []
    for state, change in (("running", guest.resume), ("paused", guest.pause)):
        change()
        memshr("status", source)
        before = Snapshot.take(guest.pid)
        assert memshr("share", source, "--huge-share", "0")["saved_pages"] > 0
        assert is_state(guest) == state
        memshr("detach", source)
        left += [f"{state}: {line}" for line in left_behind(guest, before)]
        assert is_state(guest) == state
    guest.resume()
    guest.wait_rounds(2)
    assert guest.mismatches() == []
    if left:
        pytest.fail("\n".join(["not as it was:", *left]), pytrace=False)


CHANGES = {
    "": "",
    "madvise": "libc.madvise(place, 8192, 16)",  # MADV_DONTDUMP
    "mprotect": "libc.mprotect(place, 4096, 1)",
    "mmap": "mmap.mmap(-1, 1 << 20)",
    "noreserve": "libc.mmap(place, 4096, 3, 0x4032, -1, 0)",  # over it: private, fixed, anonymous, without account
    "mbind": "libc.syscall(237, place, 8192, 2, ctypes.byref(ctypes.c_ulong(1)), 64, 0)",  # MPOL_BIND to node 0
    "descriptor": "os.open('/dev/null', os.O_RDONLY)",
    "descriptor flags": "os.set_blocking(1, False)",
    "thread": "threading.Thread(target=threading.Event().wait, daemon=True).start()",
    "nice": "os.nice(1)",
    "policy": "os.sched_setscheduler(0, os.SCHED_BATCH, os.sched_param(0))",
    "timer slack": "libc.prctl(29, 4711)",
    "signal mask": "signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGUSR1})",
    "lock": "libc.mlock(place, 4096, 0)",
    "limit": "resource.setrlimit(resource.RLIMIT_CORE, (0, 0))",
    "oom": "open('/proc/self/oom_score_adj', 'w').write('7')",
    "coredump": "open('/proc/self/coredump_filter', 'w').write('1')",
    "privileges": "libc.prctl(38, 1, 0, 0, 0)",  # PR_SET_NO_NEW_PRIVS
    "name": "libc.prctl(15, b'somebody')",
}
CHANGING = """
import ctypes, mmap, os, resource, signal, sys, threading
libc = ctypes.CDLL(None)
libc.mmap.restype, libc.mmap.argtypes = ctypes.c_void_p, [ctypes.c_void_p, ctypes.c_size_t, *[ctypes.c_int] * 3,
                                                          ctypes.c_long]
for call in (libc.madvise, libc.mprotect, libc.mlock):
    call.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.syscall.argtypes = [ctypes.c_long, ctypes.c_void_p, ctypes.c_ulong, ctypes.c_int, ctypes.c_void_p, ctypes.c_ulong,
                         ctypes.c_uint]
place = libc.mmap(None, 1 << 16, 3, 0x22, -1, 0)
os.write(1, b".")
os.read(0, 1)
kept = CHANGE
os.write(1, b".")
os.read(0, 1)
"""


@pytest.mark.parametrize("change", CHANGES)
def test_every_change_is_seen(change: str) -> None:
    """The judge judged: a process of our own that changes one thing of itself, or nothing."""
    program = CHANGING.replace("CHANGE", CHANGES[change] or "None")
    with subprocess.Popen([sys.executable, "-c", program], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stdout.read(1) == b"."
        before = Snapshot.take(process.pid)
        process.stdin.write(b".")
        process.stdin.flush()
        assert process.stdout.read(1) == b"."
        found = before.differences(Snapshot.take(process.pid))
        process.stdin.close()
    assert bool(found) == bool(change), found
