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
from fractions import Fraction
from typing import TYPE_CHECKING

from memshr import errors
from memshr.types import AuditFinding, AuditReport, DomainInfo
from memshr.xen.mappings import NEAR_PAGES

if TYPE_CHECKING:
    from memshr.xen.connection import Connection
    from memshr.xen.hypervisor import XenHypervisor

PATIENCE_S = 30.0
"""Seconds that our count may take. A debug build of Xen writes two lines to its console for every page asked about."""

_CONSOLE_BYTES = 1 << 16
_ATTEMPTS = 3
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
    """One audit of one host."""

    def __init__(self, hypervisor: XenHypervisor, connection: Connection) -> None:
        self._hypervisor = hypervisor
        self._connection = connection

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
        return AuditReport(tuple(findings), xen_errors, self._hypervisor.counters())

    def _xen_audit(self) -> tuple[int, list[str]]:
        console = Console(self._connection)
        answer = self._connection.libxc.xc_memshr_audit(self._connection.xch)
        if answer < 0:
            number = ctypes.get_errno()
            if number in (errno.ENOSYS, errno.EOPNOTSUPP):
                return 0, []  # left out of this build
            raise errors.PermissionDeniedError(f"audit: the hypervisor refuses it (errno {number})")
        return int(answer), [line for line in console.lines() if "mem_sharing.c" in line] if answer else []

    @staticmethod
    def _finding(line: str) -> AuditFinding:
        invariant = next((number for word, number in _SAID if word in line), "I3")
        return AuditFinding(invariant, None, None, None, "books that Xen's audit accepts", line, "said by Xen's audit")

    def _count(self) -> list[AuditFinding]:
        hypervisor = self._hypervisor
        deadline_s = time.monotonic() + PATIENCE_S
        for _ in range(_ATTEMPTS):
            before = hypervisor.counters()
            domains = hypervisor.domains()
            total = sum(info.shr_pages for info in domains)
            if hypervisor.counters() != before:
                continue
            if total != before.used_frames + before.freed_pages:
                return [
                    AuditFinding(
                        *("I6", None, None, None),
                        f"shr_pages of all domains together {before.used_frames + before.freed_pages}",
                        str(total),
                        "used_frames and freed_pages count other pages than the domains do",
                    )
                ]
            findings, frames, counted = [], Fraction(), 0
            for info in domains:
                if (found := self._count_domain(info, deadline_s)) is None:
                    continue
                counted += found[0]
                frames += found[1]
                if found[0] != info.shr_pages:
                    findings.append(
                        AuditFinding(
                            *("I6", info.domid, None, None),
                            f"{info.shr_pages} shared pages, as the domain's shr_pages says",
                            f"{found[0]} gfns that debug_gfn knows to be shared",
                            "a p2m entry was lost under the reverse map, or the counter is wrong",
                        )
                    )
            if hypervisor.counters() != before or hypervisor.domains() != domains:
                continue
            if counted == total and frames != before.used_frames:
                findings.append(
                    AuditFinding(
                        *("I4", None, None, None),
                        f"{before.used_frames} shared frames, as used_frames says",
                        f"{float(frames):.3f}, by the number of gfns that each shared page says are on its frame",
                        "a frame's reference count is not the number of its gfns",
                    )
                )
            return findings
        return []

    def _count_domain(self, info: DomainInfo, deadline_s: float) -> tuple[int, Fraction] | None:
        # How many gfns are shared, and how many frames that makes; None if it was not counted to the end. No page is
        # mapped for it: that would fill the holes of a fork. To ask about a page enables sharing on its domain, so
        # where somebody switched it off nothing is asked.
        hypervisor = self._hypervisor
        if not info.shr_pages:
            return 0, Fraction()
        if info.dying or not hypervisor.sharing_enabled(info.domid):
            return None
        pages, frames = 0, Fraction()
        highest = hypervisor.maximum_gfn(info.domid)
        debug, xch = self._connection.libxc.xc_memshr_debug_gfn, self._connection.xch
        for gfn in range(min(highest + 1, NEAR_PAGES)):
            if (sharers := debug(xch, info.domid, gfn)) > 0:
                pages += 1
                frames += Fraction(1, sharers)
                if pages == info.shr_pages:
                    return pages, frames
            if not gfn & 0xFFF and time.monotonic() > deadline_s:
                return None
        return None if highest >= NEAR_PAGES else (pages, frames)
