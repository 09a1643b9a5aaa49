"""How figures and names are written for people."""

from __future__ import annotations

from dataclasses import dataclass

from memshr.errors import printable
from memshr.types import PAGE_SIZE

__all__ = ["Unit", "mib", "percent", "printable"]


def percent(part: int, whole: int) -> str:
    """``part`` of ``whole`` in percent; only nothing is 0%, and only everything is 100%."""
    if not whole or not part:
        return "0%"
    share = 100 * part / whole
    if share < 1:
        return "<1%" if share < 0.95 else "1%"
    return ">99%" if part < whole and share > 99 else f"{share:.0f}%"


@dataclass(frozen=True, slots=True)
class Unit:
    """What sizes are written in."""

    name: str
    size_bytes: int
    decimals: int

    def number(self, pages: int) -> str:
        """So many pages, without the name of the unit."""
        number = pages * PAGE_SIZE / self.size_bytes
        least = 10**-self.decimals
        return f"<{least:g}" if 0 < number < least / 2 else f"{number:,.{self.decimals}f}"

    def text(self, pages: int) -> str:
        """So many pages, with the unit."""
        return f"{self.number(pages)} {self.name}"

    @classmethod
    def of(cls, pages: int) -> Unit:
        """The unit in which a number of pages is easy to read."""
        size = pages * PAGE_SIZE
        for name, shift in (("TiB", 40), ("GiB", 30), ("MiB", 20)):
            if size >= 1 << shift:
                return cls(name, 1 << shift, 2 if size < 10 << shift else 1)
        return cls("KiB", 1 << 10, 0)


def mib(pages: int) -> str:
    """Pages as MiB, with one decimal."""
    return f"{pages * PAGE_SIZE / 2**20:,.1f}"
