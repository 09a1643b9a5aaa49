"""How much memory a piece of a test takes at its peak."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path


def _status_bytes(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:")) * 1024


def peak_growth_bytes(work: Callable[[], object]) -> int:
    """How far the resident memory of this process rises above what it is now, while ``work`` runs.

    The kernel keeps the peak (VmHWM), and starts it anew when asked (proc(5), /proc/pid/clear_refs).
    """
    Path("/proc/self/clear_refs").write_text("5")
    before = _status_bytes("VmRSS")
    work()
    return _status_bytes("VmHWM") - before
