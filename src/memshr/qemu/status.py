"""What can be said about a guest without touching it: who it is, whether it may be touched, what it shares."""

from __future__ import annotations

from dataclasses import dataclass

from memshr.errors import MemshrError
from memshr.qemu.guests import (
    GuestProcess,
    RamRange,
    Refusal,
    explain,
    guest_state,
    host_refusals,
    memory_layout,
    refusals,
)
from memshr.qemu.hypervisor import GuestFigures, QemuHypervisor
from memshr.types import DomId


@dataclass(frozen=True, slots=True)
class GuestStatus:
    """One guest. ``state`` is QEMU's word (running, paused, ...), or ``unknown`` when it could not be asked.

    ``figures`` come from the kernel and are right whether or not a memshr is running; None if they cannot be read.
    """

    process: GuestProcess
    state: str
    refusals: tuple[Refusal, ...]
    figures: GuestFigures | None
    groups: tuple[str, ...]
    """The trust groups whose frames it has mapped."""


def guest_status(process: GuestProcess) -> GuestStatus:
    """Look at a guest; nothing is changed, and nothing is raised for what cannot be found out: it is a refusal."""
    layout: list[RamRange] = []
    state = "unknown"
    figures = None
    groups: tuple[str, ...] = ()
    try:
        with process.monitor() as monitor:
            state = guest_state(monitor)
            layout = memory_layout(monitor)
            found = refusals(process, monitor, layout)
    except MemshrError as error:
        # Reasons that lie in the host hold for every guest, so they come first.
        return GuestStatus(process, state, (*host_refusals(), explain(error)), None, ())
    try:
        with QemuHypervisor([process]) as hypervisor:
            figures = hypervisor.guest_figures(DomId(1))
            groups = tuple(sorted(pool.group for pool in hypervisor.pool_figures()))
    except MemshrError as error:
        found = found or (explain(error),)
    return GuestStatus(process, state, found, figures, groups)
