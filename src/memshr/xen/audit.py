"""The audit of a Xen host: what Xen's own walk finds, and the same books counted once more from outside.

Xen walks from its list of shared frames to the p2m of the domains. We come from the other side: every gfn
of every domain that shares is asked how many gfns are on its frame. If gfn i says n_i, then the shared pages number
what the domains' shr_pages say, and the sum of all 1/n_i is the number of frames (I6). The two walks have nothing in
common but the hypervisor.
"""

from __future__ import annotations

import ctypes
import errno
import time
from collections import Counter
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import TYPE_CHECKING, Protocol

import numpy as np

from memshr import errors
from memshr.types import AuditFinding, AuditReport, Counters, DomainInfo, DomId
from memshr.xen.bulk import CALLS, Bulk
from memshr.xen.search import NEAR_PAGES, SPREAD

if TYPE_CHECKING:
    from memshr.xen.connection import Connection

PATIENCE_S = 30.0
"""Seconds that our count takes unless somebody has more patience. A debug build of Xen writes two lines to its console
for every page asked about."""

_CONSOLE_BYTES = 1 << 16
_ATTEMPTS = 3
_GFNS_AT_ONCE = CALLS
# What Xen's audit says on its console, and which invariant is broken then; whatever else it says is of the p2m (I3).
# The words are those of audit() in Xen's mem_sharing.c.
_SAID = (
    ("owner", "I1"),
    ("not PGT_shared_page", "I1"),
    ("cannot be locked", "I1"),
    ("empty gfn list", "I2"),
    ("Mismatched counts", "I4"),
    ("shared mfns, found", "I6"),
)


class AuditedHost(Protocol):
    """What an audit asks of the mechanism (``XenHypervisor`` says what each of these does)."""

    def domains(self) -> list[DomainInfo]:
        """Every domain."""

    def counters(self) -> Counters:
        """Xen's own counters."""

    def sharing_enabled(self, domid: DomId) -> bool | None:
        """Whether sharing is enabled on a domain; None: nobody can tell."""

    def maximum_gfn(self, domid: DomId) -> int:
        """The highest gfn that was ever populated."""


class Console:
    """Xen's console ring, from where it is now on; it may not be readable at all."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._index = ctypes.c_uint32()
        self._readable = True
        while self._readable and self._read():
            pass

    def _read(self) -> bytes:
        buffer = ctypes.create_string_buffer(_CONSOLE_BYTES)
        count = ctypes.c_uint(_CONSOLE_BYTES)
        # SAFETY: the buffer has the bytes that count says; the library writes no more and puts into count how many.
        answer = self._connection.libxc.xc_readconsolering(
            self._connection.xch, ctypes.addressof(buffer), ctypes.byref(count), 0, 1, ctypes.byref(self._index)
        )
        if answer < 0:
            self._readable = False
            return b""
        return buffer.raw[: count.value]

    def lines(self) -> list[str]:
        """What was said since this object was made."""
        said = b""
        while self._readable and (more := self._read()):
            said += more
        return [line.strip() for line in said.decode(errors="replace").splitlines()]


class Auditor:
    """One audit of one host.

    :param patience_s: how long our count may take; Xen's walk takes what it takes.
    """

    def __init__(self, hypervisor: AuditedHost, connection: Connection, patience_s: float = PATIENCE_S) -> None:
        self._hypervisor = hypervisor
        self._connection = connection
        self._patience_s = patience_s
        self._unchecked: list[str] = []

    def run(self) -> AuditReport:
        """Both walks. Where pages change while we count, our count is not judged: it proves nothing."""
        xen_errors, said = self._xen_audit()
        findings = [self._finding(line) for line in said]
        if xen_errors and not said:
            findings.append(
                AuditFinding(
                    *("I3", None, None, None),
                    "0 errors in Xen's audit",
                    str(xen_errors),
                    "Xen's console, which says what they are, cannot be read",
                )
            )
        findings += self._count()
        return AuditReport(tuple(findings), xen_errors, self._hypervisor.counters(), tuple(self._unchecked))

    def _xen_audit(self) -> tuple[int | None, list[str]]:
        console = Console(self._connection)
        answer = self._connection.libxc.xc_memshr_audit(self._connection.xch)
        if answer < 0:
            number = ctypes.get_errno()
            if number in (errno.ENOSYS, errno.EOPNOTSUPP):
                self._unchecked.append("Xen's own audit: it is left out of release builds of the hypervisor")
                return None, []
            raise errors.PermissionDeniedError(f"audit: the hypervisor refuses it (errno {number})")
        return int(answer), [line for line in console.lines() if "mem_sharing.c" in line] if answer else []

    @staticmethod
    def _finding(line: str) -> AuditFinding:
        invariant = next((number for word, number in _SAID if word in line), "I3")
        return AuditFinding(invariant, None, None, None, "books that Xen's audit accepts", line, "said by Xen's audit")

    def _count(self) -> list[AuditFinding]:
        bulk = Bulk(self._connection)
        try:
            return self._count_with(bulk)
        finally:
            bulk.close()

    def _count_with(self, bulk: Bulk) -> list[AuditFinding]:
        # Three times at most; a count under which something changed is not judged.
        hypervisor = self._hypervisor
        # Who must not be asked is found out first: it may take a domain more, and asking enables nothing.
        askable = {info.domid: hypervisor.sharing_enabled(info.domid) for info in self._sharing()}
        deadline_s = time.monotonic() + self._patience_s
        for _ in range(_ATTEMPTS):
            before, domains = hypervisor.counters(), self._sharing()
            if hypervisor.counters() != before:
                continue
            total = sum(info.shr_pages for info in domains)
            if total != before.used_frames + before.freed_pages:
                return [
                    AuditFinding(
                        *("I6", None, None, None),
                        f"shr_pages of all domains together {before.used_frames + before.freed_pages}",
                        str(total),
                        "used_frames and freed_pages count other pages than the domains do",
                    )
                ]
            counts = [_Count(bulk, info, askable.get(info.domid)) for info in domains]
            for count in counts:
                count.go_through(hypervisor.maximum_gfn, deadline_s)
            if hypervisor.counters() != before or self._sharing() != domains:
                continue
            self._unchecked += [why for count in counts if (why := count.why_unfinished)]
            return self._judged(counts, total, before.used_frames)
        self._unchecked.append("our own count: pages went on being shared and written while we counted")
        return []

    def _sharing(self) -> list[DomainInfo]:
        return [info for info in self._hypervisor.domains() if info.shr_pages]

    @staticmethod
    def _judged(counts: Sequence[_Count], total_pages: int, used_frames: int) -> list[AuditFinding]:
        findings = [
            AuditFinding(
                *("I6", count.info.domid, None, None),
                f"{count.info.shr_pages} shared pages, as the domain's shr_pages says",
                f"{count.pages} gfns that debug_gfn knows to be shared",
                "a p2m entry was lost under the reverse map, or the counter is wrong",
            )
            for count in counts
            if not count.why_unfinished and count.pages != count.info.shr_pages
        ]
        frames = sum((count.frames for count in counts), Fraction())
        if sum(count.pages for count in counts) == total_pages and frames != used_frames:
            findings.append(
                AuditFinding(
                    *("I4", None, None, None),
                    f"{used_frames} shared frames, as used_frames says",
                    f"{float(frames):.3f}, by the number of gfns that each shared page says are on its frame",
                    "a frame's reference count is not the number of its gfns",
                )
            )
        return findings


class _Count:
    """How many gfns of a domain are shared, and how many frames that makes.

    No page is mapped for it: that would fill the holes of a fork. To ask about a page enables sharing on its domain, so
    where somebody switched it off nothing is asked.
    """

    def __init__(self, bulk: Bulk, info: DomainInfo, enabled: bool | None) -> None:
        self._bulk = bulk
        self.info = info
        self.pages = 0
        self.frames = Fraction()
        self.why_unfinished = ""
        self._of_sharers: Counter[int] = Counter()
        name = f"the {info.shr_pages} shared pages of domain {info.domid}"
        if info.dying:
            self.why_unfinished = f"{name}: it is being destroyed"
        elif enabled is False:
            self.why_unfinished = f"{name}: sharing was switched off on it, and to ask would switch it on again"
        elif enabled is None:
            self.why_unfinished = f"{name}: to ask might switch sharing on, and no domain could be made to find out"

    def go_through(self, maximum_gfn: Callable[[DomId], int], deadline_s: float) -> None:
        """Ask about one gfn after the other, where guests have pages first: low down, and at the top."""
        if self.why_unfinished:
            return
        reach = (self.info.tot_pages + self.info.shr_pages) * SPREAD
        end = maximum_gfn(self.info.domid) + 1
        low, near = min(end, reach + _GFNS_AT_ONCE), min(end, NEAR_PAGES + reach)
        far = max(near, end - reach - _GFNS_AT_ONCE)
        in_time = True
        for gfns in (range(low), range(end - 1, far - 1, -1), range(low, near)):
            for start in range(0, len(gfns), _GFNS_AT_ONCE):
                if in_time and self.pages < self.info.shr_pages:
                    self._ask(gfns[start : start + _GFNS_AT_ONCE])
                    in_time = time.monotonic() <= deadline_s
        self.frames = sum((Fraction(times, sharers) for sharers, times in self._of_sharers.items()), Fraction())
        lacking = self.info.shr_pages - self.pages
        if lacking > 0 and (far > near or not in_time):
            self.why_unfinished = (
                f"{lacking} of the {self.info.shr_pages} shared pages of domain {self.info.domid}: "
                + ("they lie in a part of its address space that is not looked at" if in_time else "time was up")
            )

    def _ask(self, gfns: range) -> None:
        sharers = self._bulk.sharers(self.info.domid, np.arange(gfns.start, gfns.stop, gfns.step))
        shared = sharers[sharers > 0].tolist()
        self._of_sharers.update(shared)
        self.pages += len(shared)
