"""How many mappings sharing may use of those that this host lets a process have (``vm.max_map_count``)."""

from __future__ import annotations

from pathlib import Path
from typing import Final

MAP_RESERVE: Final = 2048
"""Vmas that QEMU is left for itself."""
DEFAULT_MAP_COUNT: Final = 65_530
"""What Linux sets unless told otherwise (``DEFAULT_MAX_MAP_COUNT`` of ``include/linux/mm.h``)."""


def map_count_limit() -> int:
    """How many mappings a process may have. :raises OSError: the kernel does not tell."""
    return int(Path("/proc/sys/vm/max_map_count").read_text())


def mapping_budget() -> int:
    """How many of them an estimate counts on: for a QEMU that has few of its own, what sharing would use."""
    try:
        limit = map_count_limit()
    except (OSError, ValueError):
        limit = DEFAULT_MAP_COUNT
    return max(0, limit - MAP_RESERVE)
