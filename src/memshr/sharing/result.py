"""What a sharing session found, gave back and left out. Every figure is in pages; the names are stable JSON keys.

The figures add up. Of the session, and with the same names of each domain::

    total_pages  = absent_pages + zero_pages + unique_pages + shared_pages + sum(dropped of REASONS_TO_DROP)
    saved_pages  = zero_pages + intra_pages + inter_pages - sum(dropped of REASONS_TO_KEEP)      (session only)
    shared_pages = intra_pages + inter_pages + distinct contents of shared pages                 (session only)

A page that dropped out (REASONS_TO_DROP) is in no other figure, because its contents were not verified. REASONS_TO_KEEP
count frames that were kept although their contents exist on another frame: that is the saving that a limit cost. The
pages of these frames were verified and are counted.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from memshr.types import AuditFinding, Counters, DomId

__all__ = [
    "REASONS_TO_DROP",
    "REASONS_TO_KEEP",
    "DomainReport",
    "PairReport",
    "SharingReport",
]

REASONS_TO_DROP = {
    "volatile": "changed between the two samples of a running guest",
    "not_sharable": "no plain RAM any more when it was nominated or read",
    "busy": "its frame has references besides the domain's own, such as a foreign mapping",
    "refused": "the hypervisor refused the page or its whole domain, for another reason",
    "huge_page": "is part of a huge page of the host of which too few pages could be shared to pay for splitting it",
    "written": "written by its guest after it had been nominated, or since the scan if it was to be a zero page",
    "no_memory": "the host ran out of memory, and the session stopped before it came to this page",
    "domain_gone": "its domain was destroyed while the session ran",
}
"""Why a page is in none of the other figures."""

REASONS_TO_KEEP = {
    "max_sharers": "a frame takes at most max_sharers gfns; further copies need further frames",
    "separate_frames": "a frame of an earlier session that could not be joined, or a copy that its partners missed",
    "zero_frames": "zero pages that kept a frame, as this mechanism cannot give zero pages back without one",
}
"""Why a frame was kept although another frame of the group holds the same bytes (or it holds only zeros)."""


@dataclass(frozen=True, slots=True)
class DomainReport:
    """The figures of one domain.

    * ``total_pages``: populated gfns.
    * ``absent_pages``: those that the host spends no memory on: no saving.
    * ``zero_pages``: all-zero pages; each can be given back.
    * ``unique_pages``: non-zero pages whose contents exist once in the trust group.
    * ``shared_pages``: non-zero pages whose contents exist more than once in the trust group.
    * ``intra_pages``: what sharing inside this domain alone saves: ``shared_pages`` less their distinct contents.
    * ``dropped``: reason -> pages, reasons of REASONS_TO_DROP.
    """

    domid: DomId
    name: str
    group: str
    total_pages: int
    absent_pages: int
    zero_pages: int
    unique_pages: int
    shared_pages: int
    intra_pages: int
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class PairReport:
    """What two domains of one trust group have in common, zero pages left out.

    * ``contents``: how many distinct contents both have; that many pages the two save together beyond what each saves
      alone.
    * ``pages``: how many pages of the two hold these contents.
    """

    domids: tuple[DomId, DomId]
    names: tuple[str, str]
    group: str
    contents: int
    pages: int


@dataclass(frozen=True, slots=True)
class SharingReport:
    """The figures of a session; see the module's docstring for how they add up, and DomainReport for the sums.

    * ``inter_pages``: what sharing between the domains of each group saves on top of ``intra_pages``.
    * ``saved_pages``: pages really given back to the host, counting those that were shared before the session.
    * ``collisions``: pages that had the fingerprint of others but not their contents: each cost one compare.
    * ``counters``: the host's own, after the session.
    * ``stopped``: why the session ended early, in one line; None if it came to its end.
    * ``left_out``: domains whose pages the hypervisor did not let us look at, with the reason, a line each.
    * ``audit_unchecked``: what the audit afterwards could not check, a line each.
    """

    total_pages: int
    absent_pages: int
    zero_pages: int
    unique_pages: int
    shared_pages: int
    intra_pages: int
    inter_pages: int
    saved_pages: int
    counters: Counters
    audit_findings: tuple[AuditFinding, ...]
    domains: tuple[DomainReport, ...]
    pairs: tuple[PairReport, ...]
    dropped: dict[str, int]
    collisions: int
    stopped: str | None
    left_out: tuple[str, ...] = ()
    audit_unchecked: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The report in plain dicts, lists, strings and numbers: what ``--json`` prints."""
        plain: dict[str, Any] = asdict(self)
        for key in ("audit_findings", "domains", "pairs", "left_out", "audit_unchecked"):
            plain[key] = list(plain[key])
        for pair in plain["pairs"]:
            pair["domids"], pair["names"] = list(pair["domids"]), list(pair["names"])
        return plain
