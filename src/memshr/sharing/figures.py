"""The figures of a session while it runs: what became of every page of every domain, and what that saves."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import combinations

import numpy as np
from numpy.typing import NDArray

from memshr.content.classes import Classes
from memshr.content.overlap import overlap
from memshr.runs import run_starts
from memshr.sharing.result import REASONS_TO_DROP, REASONS_TO_KEEP, DomainReport, PairReport, SharingReport
from memshr.trust import Group
from memshr.types import AuditReport, DomId, DomIds, Handles, PageArray

_DOMID_BITS = 16


@dataclass(slots=True)
class DomainFigures:
    """One domain's; see ``DomainReport`` for what they are."""

    name: str = ""
    total_pages: int = 0
    absent_pages: int = 0
    zero_pages: int = 0
    shared_pages: int = 0
    intra_pages: int = 0
    dropped: Counter[str] = field(default_factory=Counter)
    gone: bool = False
    refusal: str = ""
    """Why the hypervisor does not let its pages be looked at; then none of them is in any other figure."""

    def rest(self) -> int:
        """The pages that are in no figure yet."""
        return self.total_pages - self.absent_pages - self.zero_pages - self.shared_pages - self.dropped.total()


class GroupFigures:
    """One trust group's: those of its domains, and those that are of no single domain."""

    def __init__(self, group: Group) -> None:
        self.group = group
        self.domains = {domid: DomainFigures() for domid in group.domids}
        self.inter_pages = 0
        self.saved_pages = 0
        self.collisions = 0
        self.kept: Counter[str] = Counter()
        self.pairs: list[PairReport] = []

    def drop(self, reason: str, pages: PageArray) -> None:
        """Count ``pages`` as dropped for one of REASONS_TO_DROP."""
        for domid, count in _by_domain(pages):
            self.domains[domid].dropped[reason] += count
            self.domains[domid].gone |= reason == "domain_gone"

    def release(self, pages: PageArray) -> None:
        """Count ``pages`` as zero pages that were given back."""
        for domid, count in _by_domain(pages):
            self.domains[domid].zero_pages += count

    def keep_zero_frame(self, domid: DomId) -> None:
        """Count a zero page that has a frame to itself, and keeps it."""
        self.domains[domid].zero_pages += 1
        self.kept["zero_frames"] += 1
        self.saved_pages -= 1

    def count_sharing(
        self, domids: DomIds, contents: Classes, frames: Handles, *, zero_content: int | None, max_sharers: int
    ) -> None:
        """Count the candidates that were compared and found equal to others, or whose partners went away.

        :param contents: a number for what each page holds, shape ``(n,)``; ``zero_content`` is that of zero pages.
        :param frames: the handle of the frame that each is on, shape ``(n,)``.
        """
        # One row for each content of each domain; contents are numbered anew, without gaps.
        keys, copies = np.unique(contents << _DOMID_BITS | domids, return_counts=True)
        owners = (keys & ((1 << _DOMID_BITS) - 1)).astype(np.uint16)
        keys >>= _DOMID_BITS
        content = np.cumsum(run_starts(keys)) - 1
        total_copies = np.bincount(content, copies).astype(np.int64)
        _, one_of_frame = np.unique(frames, return_index=True)
        frame_contents = np.sort(contents[one_of_frame])
        total_frames = np.bincount(np.cumsum(run_starts(frame_contents)) - 1)
        zero = np.zeros(len(total_copies), np.bool_)
        zero[:1] = zero_content is not None and keys[:1] == zero_content  # of all contents it has the smallest number

        shared = (total_copies > 1) & ~zero
        for domid, figures in self.domains.items():
            ours = owners == domid
            ours_shared = ours & shared[content]
            figures.zero_pages += int(copies[ours & zero[content]].sum())
            figures.shared_pages = int(copies[ours_shared].sum())
            figures.intra_pages = figures.shared_pages - int(np.count_nonzero(ours_shared))
        self.inter_pages = int(np.count_nonzero(shared[content]) - np.count_nonzero(shared))
        self.saved_pages += int(total_copies[~zero].sum() - total_frames.sum())
        needed = np.minimum(-(-total_copies // max_sharers), total_frames)
        self.kept["zero_frames"] += int(total_frames[zero].sum())
        self.kept["max_sharers"] += int((needed - 1)[~zero].sum())
        self.kept["separate_frames"] += int((total_frames - needed)[~zero].sum())
        relevant = shared[content]
        self.pairs = self._pairs(owners[relevant], content[relevant], copies[relevant])

    def _pairs(self, owners: DomIds, contents: Classes, copies: NDArray[np.int64]) -> list[PairReport]:
        ordered = sorted(self.domains)
        common, held = overlap(contents, np.searchsorted(ordered, owners), copies, len(ordered))
        return [
            PairReport(
                (ordered[a], ordered[b]),
                (self.domains[ordered[a]].name, self.domains[ordered[b]].name),
                self.group.name,
                int(common[a, b]),
                int(held[a, b] + held[b, a]),
            )
            for a, b in combinations(range(len(ordered)), 2)
        ]

    def close(self, *, reached: bool) -> None:
        """Count the pages that were not reached, and take those of domains that are gone out of the figures."""
        for figures in self.domains.values():
            if figures.refusal:
                figures.absent_pages = figures.zero_pages = 0
                figures.dropped = Counter(refused=figures.total_pages)
            elif figures.gone:
                figures.absent_pages = figures.zero_pages = 0
                figures.dropped = Counter(domain_gone=figures.total_pages)
            elif not reached:
                figures.dropped["no_memory"] += figures.rest()
        self.saved_pages += sum(figures.zero_pages for figures in self.domains.values())


def sharing_report(groups: Sequence[GroupFigures], audit: AuditReport, stopped: str | None) -> SharingReport:
    """What a session has to say.

    :param audit: of the host, afterwards.
    :param stopped: why it ended early, in one line; None if it did not.
    """
    dropped: Counter[str] = Counter()
    for group in groups:
        for counted in [*(figures.dropped for figures in group.domains.values()), group.kept]:
            dropped.update(counted)
    domains = tuple(
        DomainReport(
            domid,
            figures.name,
            group.group.name,
            figures.total_pages,
            figures.absent_pages,
            figures.zero_pages,
            figures.rest(),
            figures.shared_pages,
            figures.intra_pages,
            _in_order(figures.dropped),
        )
        for group in groups
        for domid, figures in group.domains.items()
    )
    return SharingReport(
        total_pages=sum(domain.total_pages for domain in domains),
        absent_pages=sum(domain.absent_pages for domain in domains),
        zero_pages=sum(domain.zero_pages for domain in domains),
        unique_pages=sum(domain.unique_pages for domain in domains),
        shared_pages=sum(domain.shared_pages for domain in domains),
        intra_pages=sum(domain.intra_pages for domain in domains),
        inter_pages=sum(group.inter_pages for group in groups),
        saved_pages=sum(group.saved_pages for group in groups),
        counters=audit.counters,
        audit_findings=audit.findings,
        domains=domains,
        pairs=tuple(pair for group in groups for pair in group.pairs),
        dropped=_in_order(dropped),
        collisions=sum(group.collisions for group in groups),
        stopped=stopped,
        left_out=tuple(
            f"{figures.name or 'domain'} ({domid}): {figures.refusal}"
            for group in groups
            for domid, figures in group.domains.items()
            if figures.refusal
        ),
        audit_unchecked=audit.unchecked,
    )


def _by_domain(pages: PageArray) -> list[tuple[DomId, int]]:
    domids, counts = np.unique(pages.domids, return_counts=True)
    return [(DomId(domid), count) for domid, count in zip(domids.tolist(), counts.tolist(), strict=True)]


def _in_order(dropped: Counter[str]) -> dict[str, int]:
    return {reason: dropped[reason] for reason in (*REASONS_TO_DROP, *REASONS_TO_KEEP) if dropped[reason]}
