"""Everything that /proc shows of a process and that must be the same after memshr has been and gone.

A ``Snapshot`` is a set of lines of text, each a fact that can be read on its own; ``differences`` says which came and
which went. What changes in a process that nobody touches is left out (counters, sizes, the place of a heap's end), and
what two looks may cut differently is joined: mappings that lie next to each other and are alike are one.

Sources: proc(5), numa(7), the kernel's ``Documentation/filesystems/proc.rst`` (VmFlags).
"""

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Self

PAGE_SIZE = 4096

ARENA_BYTES = 64 << 20
"""``HEAP_MAX_SIZE`` of glibc's ``malloc/arena.c``: an arena of a thread is so large and so aligned. Its first part can
be written, the rest is reserved, and where the one ends moves with what the thread allocates."""

CHANGING_STATUS = re.compile(
    r"State|Vm(Peak|Size|HWM|RSS|Data|PTE|Swap)|Rss\w+|HugetlbPages|FDSize|SigQ|SigPnd|ShdPnd|\w*ctxt_switches"
    r"|(Cpus|Mems)_allowed_list"
)
"""Fields of /proc/PID/status that change by themselves, or that repeat another. VmLck and VmPin are not among them."""

WHILE_ATTACHED = frozenset({"mg", "ac", "nr"})
"""VmFlags of RAM that may differ while memshr is in a guest: it is not for KSM then, and the memory of frames is
accounted to the pool, not to the guest."""

ON_FRAMES = frozenset({"hg", "nh"})
"""VmFlags that RAM need not have where a frame lies: a guest's own copies in a private mapping of a file are never huge
pages (``mm/memory.c``), so there the advice could only make the kernel move the pool's frames."""

_STABLE_TRIES = 50


class RestlessProcessError(Exception):
    """A process mapped and unmapped memory each time it was looked at."""


@dataclass(frozen=True, slots=True)
class MemoryRange:
    """Addresses of a process that are alike in everything: ``start`` up to, not including, ``end``.

    ``offset`` is where in its file it begins, ``device`` and ``inode`` name the file; ``vm_flags`` are the kernel's
    flags of two letters, ``policy`` is the NUMA policy as numa_maps has it.
    """

    start: int
    end: int
    permissions: str
    offset: int
    device: str
    inode: int
    path: str
    vm_flags: frozenset[str]
    policy: str

    def joins(self, after: Self) -> bool:
        """Whether ``after`` begins where this ends and is alike."""
        offset = self.offset + (self.end - self.start if self.inode else 0)
        return replace(self, start=0, end=0, offset=offset) == replace(after, start=0, end=0) and (
            self.end == after.start
        )

    def __str__(self) -> str:
        where = f"{self.start:x}-{self.end:x}" if self.path != "[heap]" else f"{self.start:x}-"
        file = f" offset={self.offset:x} device={self.device} inode={self.inode}" if self.inode else ""
        flags = " ".join(sorted(self.vm_flags))
        return f"mapping {where} {self.permissions}{file} {self.path or 'anonymous'}; {flags}; policy {self.policy}"


def joined(ranges: Iterable[MemoryRange]) -> list[MemoryRange]:
    """Ranges in order of address, those that are alike and next to each other as one."""
    found: list[MemoryRange] = []
    for each in ranges:
        if found and found[-1].joins(each):
            found[-1] = replace(found[-1], end=each.end)
        else:
            found.append(each)
    return found


def memory_ranges(pid: int) -> list[MemoryRange]:
    """Every mapping of a process, joined.

    :raises RestlessProcessError: its mappings do not keep still for two looks.
    :raises OSError: it has ended, or we may not look.
    """
    process = Path(f"/proc/{pid}")
    for _ in range(_STABLE_TRIES):
        before = (process / "maps").read_text()
        smaps = (process / "smaps").read_text()
        # A kernel without NUMA has no policies either.
        numa_maps = (process / "numa_maps").read_text() if (process / "numa_maps").exists() else ""
        if (process / "maps").read_text() == before:
            return joined(_parsed(smaps, numa_maps))
    raise RestlessProcessError(f"process {pid} maps and unmaps memory all the time")


def _parsed(smaps: str, numa_maps: str) -> Iterator[MemoryRange]:
    policies = {int(line.split()[0], 16): line.split()[1] for line in numa_maps.splitlines()}
    header: list[str] = []
    for line in smaps.splitlines():
        name, _, rest = line.partition(" ")
        if not name.endswith(":"):
            header = line.split(maxsplit=5)
        elif name == "VmFlags:":
            addresses, permissions, offset, device, inode, *path = header
            start, end = (int(each, 16) for each in addresses.split("-"))
            yield MemoryRange(
                start=start,
                end=end,
                permissions=permissions,
                offset=int(offset, 16) if int(inode) else 0,
                device=device,
                inode=int(inode),
                path=path[0] if path else "",
                vm_flags=frozenset(rest.split()),
                policy=policies.get(start, "none"),
            )


def ram_ranges(pid: int, hva: int, length_bytes: int) -> list[str]:
    """What a stretch of guest RAM must keep while memshr is at work: permissions, VmFlags and NUMA policy.

    :param hva: where it begins in QEMU; frames of a pool may lie in it, so files are left out.
    """
    end = hva + length_bytes
    ranges = [each for each in memory_ranges(pid) if each.start < end and each.end > hva]
    # Where a frame lies, the advice is taken to be that of its neighbours.
    huge = frozenset().union(*(each.vm_flags for each in ranges if not each.inode)) & ON_FRAMES
    parts = [
        replace(
            each,
            start=max(each.start, hva),
            end=min(each.end, end),
            offset=0,
            device="",
            inode=0,
            path="",
            vm_flags=each.vm_flags - WHILE_ATTACHED | (huge if each.inode else frozenset()),
        )
        for each in ranges
    ]
    return [str(each) for each in joined(parts)]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What a process is, as facts in lines of text."""

    facts: frozenset[str]

    @classmethod
    def take(cls, pid: int) -> Self:
        """Look at a process.

        :raises RestlessProcessError: as ``memory_ranges``. :raises OSError: it has ended, or we may not look.
        """
        process = Path(f"/proc/{pid}")
        facts = [str(each) for each in _without_arenas(memory_ranges(pid))]
        facts += _descriptors(process)
        facts += _status(process, "process")
        for thread in sorted(process.glob("task/*"), key=lambda path: int(path.name)):
            facts += _thread(thread)
        facts += [f"limit {' '.join(line.split())}" for line in (process / "limits").read_text().splitlines()[1:]]
        for name in ("oom_score_adj", "coredump_filter", "personality", "cgroup", "autogroup", "cmdline", "comm"):
            facts.append(f"{name} {(process / name).read_text().strip()}")
        facts += [f"{name} is {(process / name).readlink()}" for name in ("exe", "cwd", "root")]
        facts += [f"namespace {each.readlink()}" for each in sorted((process / "ns").iterdir())]
        ksm = (process / "ksm_stat").read_text().splitlines() if (process / "ksm_stat").exists() else []
        facts += [line for line in ksm if line.startswith(("ksm_merge_any", "ksm_mergeable"))]
        return cls(frozenset(facts))

    def differences(self, later: Self) -> list[str]:
        """What went (``-``) and what came (``+``) until ``later``; nothing if all is as it was."""
        went = [f"- {fact}" for fact in self.facts - later.facts]
        came = [f"+ {fact}" for fact in later.facts - self.facts]
        return sorted([*went, *came], key=lambda line: line[2:])


def _without_arenas(ranges: list[MemoryRange]) -> list[MemoryRange]:
    # An arena of malloc as one range.
    found: list[MemoryRange] = []
    for each in ranges:
        last = found[-1] if found else None
        if (
            last
            and (last.permissions, each.permissions, last.path, each.path) == ("rw-p", "---p", "", "")
            and last.end == each.start
            and each.end % ARENA_BYTES == 0
            and last.start == each.end - ARENA_BYTES
        ):
            found[-1] = replace(last, end=each.end, permissions="arena")
        else:
            found.append(each)
    return found


def _descriptors(process: Path) -> list[str]:
    facts = []
    for entry in sorted((process / "fd").iterdir(), key=lambda path: int(path.name)):
        try:
            link = entry.readlink()
            info = (process / "fdinfo" / entry.name).read_text()
        except FileNotFoundError:  # closed meanwhile
            continue
        flags = next(line.split()[1] for line in info.splitlines() if line.startswith("flags:"))
        facts.append(f"descriptor {entry.name} {link} flags {flags}")
    return facts


def _status(where: Path, whose: str) -> list[str]:
    lines = (line.partition(":") for line in (where / "status").read_text().splitlines())
    return [f"{whose} {name} {value.strip()}" for name, _, value in lines if not CHANGING_STATUS.fullmatch(name)]


def _thread(thread: Path) -> list[str]:
    whose = f"thread {thread.name}"
    try:
        stat = (thread / "stat").read_text()
        # Fields are counted from 1 in proc(5); the third is the first behind the name, which may hold anything.
        fields = stat[stat.rindex(")") + 2 :].split()
        nice, priority, policy = fields[19 - 3], fields[40 - 3], fields[41 - 3]
        # /proc/TID is there for every thread, though not listed.
        slack = Path(f"/proc/{thread.name}/timerslack_ns").read_text().strip()
        facts = _status(thread, whose)
    except (FileNotFoundError, ProcessLookupError):  # ended meanwhile
        return []
    return [*facts, f"{whose} nice {nice} policy {policy} priority {priority} timer slack {slack} ns"]
