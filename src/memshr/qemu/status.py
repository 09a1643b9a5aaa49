"""What ``memshr status`` shows: every QEMU of the host, whether it may be touched, and what it shares. Touches nothing.

All of it comes from QEMU and the kernel, so it is right whether or not a memshr is at work, and after one has died.
"""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from memshr.errors import BackendError, NoSuchDomainError
from memshr.procfs import Vma, Vmas
from memshr.qemu import guests, pagemap
from memshr.qemu.control_area import MAPPED_CONTROL
from memshr.qemu.guests import GuestProcess, Refusal
from memshr.qemu.pool import groups_in, of_pools
from memshr.types import PAGE_SIZE


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """One guest.

    ``state`` is QEMU's word (running, paused, prelaunch, ...), printable, or ``unknown`` if its monitor cannot be used.
    ``refusals``: why memshr would leave it alone, each with its remedy; empty: it may be shared. ``attached``: an agent
    is in it. ``groups``: the trust groups whose frames it reads. ``sharing_pages`` lie on frames; ``copied_pages`` were
    on one until they were written, and still cost a mapping; ``frames`` are the different frames that it reads.
    ``ksm_pages`` are those that the kernel's KSM has merged: memshr takes them back before it shares (nominations.md).
    """

    process: GuestProcess
    state: str
    ram_bytes: int
    refusals: tuple[Refusal, ...]
    attached: bool
    groups: tuple[str, ...]
    sharing_pages: int
    copied_pages: int
    frames: int
    ksm_pages: int


def guest_statuses() -> list[GuestStatus]:
    """Every QEMU of this host, in order of pid; those that end meanwhile are left out. What is odd about one is a
    refusal in its row.
    """
    found = []
    for process in guests.find_guests():
        with contextlib.suppress(NoSuchDomainError):
            found.append(status_of(process))
    return found


def status_of(process: GuestProcess) -> GuestStatus:
    """One guest.

    :raises NoSuchDomainError: it has ended.
    """
    state, ram_bytes = "unknown", 0
    mappings, pools = Vmas(b""), list[Vma]()
    sharing = frames = 0
    groups = list[str]()
    try:
        mappings = process.mappings()
        with process.monitor() as monitor:
            state = monitor.state()
            layout = guests.memory_layout(monitor, mappings)
            ram_bytes = sum(ram.pages for ram in layout) * PAGE_SIZE
            refusals = guests.refusals(process, monitor, layout)
    except OSError as error:
        refusals = guests.refusals(process, guests.unreadable(error), [])
    except BackendError as error:
        unreachable = process.qmp_path is None and not process.libvirt
        reason = guests.NO_SOCKET if unreachable else Refusal(error.args[0], error.remedy or "look again")
        refusals = guests.refusals(process, reason, [])
    try:
        groups = groups_in(process.pid, mappings)
        pools = mappings.of(of_pools(mappings))
        sharing, frames = _sharing(process.pid, pools)
    except OSError as error:
        refusals = (*refusals, guests.unreadable(error))
    except BackendError as error:
        refusals = (*refusals, Refusal(error.args[0], error.remedy))
    if not process.running:
        raise NoSuchDomainError(f"guest {process.name} ({process.pid}) has ended")
    return GuestStatus(
        process=process,
        state=state,
        ram_bytes=ram_bytes,
        refusals=refusals,
        attached=MAPPED_CONTROL in mappings.paths,
        groups=tuple(groups),
        sharing_pages=sharing,
        copied_pages=sum(mapping.pages for mapping in pools) - sharing,
        frames=frames,
        ksm_pages=_ksm_pages(process.pid),
    )


def _ksm_pages(pid: int) -> int:
    try:
        return pagemap.ksm_pages(pid)
    except OSError:  # it has ended, or we may not look; both are told elsewhere
        return 0


def groups_in_force(processes: Sequence[GuestProcess]) -> dict[str, list[int]]:
    """The trust groups whose frames these guests have mapped: name -> numbers of the guests, counted from 1.

    A guest that has frames of several is named in the first of them only; audit finds what does not belong there.
    """
    found: dict[str, list[int]] = {}
    for number, process in enumerate(processes, start=1):
        try:
            groups = groups_in(process.pid, process.mappings())
        except (OSError, BackendError):  # whoever opens it says what is wrong with it
            continue
        if groups:
            found.setdefault(groups[0], []).append(number)
    return found


def _sharing(pid: int, pools: list[Vma]) -> tuple[int, int]:
    # Pages on frames, and how many different frames they are.
    if not pools:
        return 0, 0
    if sum(each.pages for each in pools) > guests.most_pages():
        raise BackendError(
            "it has mapped what is called a frame pool, and is many times the memory of this host",
            remedy="leave it alone: memshr does not do that",
        )
    reader = pagemap.Pagemap(pid)
    try:
        hvas = np.concatenate([np.arange(each.start, each.end, PAGE_SIZE, dtype=np.int64) for each in pools])
        frames = np.concatenate([each.offset // PAGE_SIZE + np.arange(each.pages, dtype=np.int64) for each in pools])
        inodes = np.repeat([each.inode for each in pools], [each.pages for each in pools])
        on_frame = pagemap.on_frame(reader.entries(hvas))
    finally:
        reader.close()
    different = np.unique(np.stack([inodes[on_frame], frames[on_frame]]), axis=1)
    return int(on_frame.sum()), different.shape[1]
