"""From findings, tally and limits to the ``Estimate``: figures put together, and extrapolated if there was a sample."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import combinations

import numpy as np

from memshr.estimation.count import Counts, Tally, band_edges
from memshr.estimation.guesses import ZERO_PAGE
from memshr.estimation.limits import Limits
from memshr.estimation.look import Findings, Verdict
from memshr.estimation.population import Population
from memshr.estimation.result import (
    Achievable,
    Bounds,
    Content,
    CopiesBand,
    DomainEstimate,
    Estimate,
    GroupEstimate,
    Method,
    PairEstimate,
    Sample,
)
from memshr.estimation.sampling import CONFIDENCE, Drawn, Inference, Interval, SampleOptions
from memshr.types import Counters


@dataclass(frozen=True, slots=True)
class Groups:
    """The trust groups: names, the numbers of their subjects, and the group of each subject."""

    names: list[str]
    members: list[list[int]]
    group_of: list[int]


class Assembly:
    """Puts the figures of an estimate together."""

    def __init__(self, population: Population, groups: Groups, findings: Findings, tally: Tally) -> None:
        self._population = population
        self._groups = groups
        self._findings = findings
        self._tally = tally

    def exact(self, method: Method, contents: tuple[Content, ...], collisions: int, within: Limits) -> Estimate:
        """The estimate where every page was looked at."""
        domains = tuple(
            self._domain(number, within.mappings[number]) for number in range(len(self._population.subjects))
        )
        groups = tuple(self._group(number, domains) for number in range(len(self._groups.names)))
        tally = self._tally
        dropped = {reason: sum(domain.dropped[reason] for domain in domains) for reason in ("volatile", "not_sharable")}
        shared_pages = sum(domain.shared_pages for domain in domains)
        saved_by_sharing = int(tally.saved_pages.sum())
        saved_pages = sum(group.saved_pages for group in groups)
        return Estimate(
            method=method,
            total_pages=self._population.rows,
            absent_pages=sum(domain.absent_pages for domain in domains),
            hole_pages=sum(domain.hole_pages for domain in domains),
            zero_pages=sum(domain.zero_pages for domain in domains),
            unique_pages=sum(domain.unique_pages for domain in domains),
            shared_pages=shared_pages,
            intra_pages=sum(group.intra_pages for group in groups),
            inter_pages=sum(group.inter_pages for group in groups),
            saved_pages=saved_pages,
            between_groups_pages=tally.saved_in_one_group - saved_by_sharing,
            collisions=collisions,
            stopped=None,
            dropped={**dropped, "max_sharers": int(tally.lost_to_max_sharers.sum())},
            counters=Counters(freed_pages=saved_by_sharing, used_frames=tally.used_frames),
            achievable=Achievable(
                saved_pages=within.saved_pages,
                mappings=within.used_mappings,
                mapping_budget_pages_lost=saved_pages - within.saved_pages,
                huge_pages_only=within.huge_pages_only,
                huge_pages_known=all(subject.huge_pages_known for subject in self._population.subjects),
                split_huge_pages=within.split_huge_pages,
            ),
            domains=domains,
            pairs=tuple(self._pairs()),
            contents=contents,
            copies=tuple(
                CopiesBand(first, last, *(int(figures[i]) for figures in self._bands()))
                for i, (first, last) in enumerate(band_edges())
            ),
            groups=groups,
            bounds=None,
        )

    def sampled(
        self,
        method: Method,
        contents: tuple[Content, ...],
        collisions: int,
        drawn: Drawn,
        inference: Inference,
        sample: SampleOptions,
    ) -> Estimate:
        """The estimate where a sample was looked at: figures of the sample, extrapolated so that they add up.

        Domains get their part of what all save as the sample has it. What a limit of max_sharers costs is only in the
        lower bound.
        """
        domains = self._extrapolated_domains(drawn, inference)
        groups = self._extrapolated_groups(domains, inference)
        zero_pages = sum(domain.zero_pages for domain in domains)
        saved_pages = sum(group.saved_pages for group in groups)
        shared_pages = sum(domain.shared_pages for domain in domains)
        holes = sum(domain.hole_pages for domain in domains)
        all_pages = int(drawn.pages_of.sum())
        one_frame_less = 1 - 1 / method.max_sharers
        savable = Interval(inference.saved_pages.low * one_frame_less, 0.0, inference.saved_pages.high)
        bounds = {
            "zero_pages": _bounds(inference.zero_pages, holes, zero_pages),
            "saved_pages": _bounds(savable, holes, saved_pages),
            "between_groups_pages": Bounds(
                0, max(0, int(all_pages - inference.distinct_in_all - inference.saved_pages.low))
            ),
        }
        return Estimate(
            method=replace(
                method,
                sample=Sample(f"1/{sample.denominator}", sample.seed, self._findings.pages_read, CONFIDENCE),
            ),
            total_pages=self._population.rows,
            absent_pages=sum(domain.absent_pages for domain in domains),
            hole_pages=holes,
            zero_pages=zero_pages,
            unique_pages=sum(domain.unique_pages for domain in domains),
            shared_pages=shared_pages,
            intra_pages=sum(group.intra_pages for group in groups),
            inter_pages=sum(group.inter_pages for group in groups),
            saved_pages=saved_pages,
            between_groups_pages=0,
            collisions=collisions,
            stopped=None,
            dropped={
                **{name: sum(domain.dropped[name] for domain in domains) for name in ("volatile", "not_sharable")},
                "max_sharers": 0,
            },
            counters=Counters(
                freed_pages=saved_pages - zero_pages, used_frames=max(0, shared_pages - saved_pages + zero_pages)
            ),
            achievable=None,
            domains=tuple(domains),
            pairs=(),
            contents=tuple(
                replace(content, copies=zero_pages, saved_pages=zero_pages)
                if content.guess == ZERO_PAGE
                else replace(
                    content,
                    copies=round(content.copies / drawn.rate),
                    saved_pages=round(content.saved_pages / drawn.rate),
                )
                for content in contents
            ),
            copies=(),
            groups=tuple(groups),
            bounds=bounds,
        )

    def _copies(self, inference: Inference) -> tuple[float, int]:
        # How many copies there are in all, zero pages apart, and how many of them the sample has.
        copies = inference.saved_pages.figure - inference.zero_pages.figure
        seen = int(self._tally.intra_pages.sum() + self._tally.inter_pages.sum())
        return copies, max(1, seen)

    def _extrapolated_domains(self, drawn: Drawn, inference: Inference) -> list[DomainEstimate]:
        seen = [self._domain(number, 0) for number in range(len(self._population.subjects))]
        looked_at = np.bincount(self._population.subjects_of(drawn.rows), minlength=len(seen)).tolist()
        zero_of_all = inference.zero_pages.figure / max(1, int(drawn.pages_of.sum()))
        copies, copies_seen = self._copies(inference)
        return [
            extrapolated(domain, int(drawn.pages_of[number]), looked_at[number], zero_of_all, copies, copies_seen)
            for number, domain in enumerate(seen)
        ]

    def _extrapolated_groups(self, domains: Sequence[DomainEstimate], inference: Inference) -> list[GroupEstimate]:
        copies, copies_seen = self._copies(inference)
        groups = []
        for number in range(len(self._groups.names)):
            group = self._group(number, domains)
            inter = round(copies * int(self._tally.inter_pages[number]) / copies_seen)
            saved = group.zero_pages + group.intra_pages + inter
            groups.append(replace(group, inter_pages=inter, saved_pages=saved))
        return groups

    def _bands(self) -> tuple[Counts, Counts, Counts]:
        return self._tally.band_contents, self._tally.band_pages, self._tally.band_saved

    def _domain(self, number: int, mappings: int) -> DomainEstimate:
        subject = self._population.subjects[number]
        ours = self._population.slice_of(number)
        counts = np.bincount(self._findings.verdicts[ours], minlength=len(Verdict)).tolist()
        shared_pages = int(self._tally.shared_pages[number])
        return DomainEstimate(
            domid=self._population.domid(number),
            name=subject.pages.name,
            kind=subject.kind,
            format=subject.format,
            group=self._groups.names[self._groups.group_of[number]],
            total_pages=ours.stop - ours.start,
            absent_pages=counts[Verdict.ABSENT],
            hole_pages=counts[Verdict.HOLE],
            zero_pages=counts[Verdict.ZERO] + counts[Verdict.HOLE],
            unique_pages=counts[Verdict.OPEN] - shared_pages,
            shared_pages=shared_pages,
            intra_pages=int(self._tally.intra_pages[number]),
            huge_pages=int(np.count_nonzero(self._findings.huge[ours])) if subject.huge_pages_known else None,
            mappings=mappings,
            dropped={"volatile": counts[Verdict.VOLATILE], "not_sharable": counts[Verdict.UNREADABLE]},
        )

    def _group(self, number: int, domains: Sequence[DomainEstimate]) -> GroupEstimate:
        members = [domains[each] for each in self._groups.members[number]]
        zero_pages = sum(domain.zero_pages for domain in members)
        return GroupEstimate(
            name=self._groups.names[number],
            domids=tuple(domain.domid for domain in members),
            saved_pages=int(self._tally.saved_pages[number]) + zero_pages,
            intra_pages=sum(domain.intra_pages for domain in members),
            inter_pages=int(self._tally.inter_pages[number]),
            zero_pages=zero_pages,
        )

    def _pairs(self) -> list[PairEstimate]:
        groups, tally, population = self._groups, self._tally, self._population
        pairs = []
        for a, b in combinations(range(len(population.subjects)), 2):
            if contents := int(tally.common_contents[a, b]):
                same = groups.group_of[a] == groups.group_of[b]
                pairs.append(
                    PairEstimate(
                        (population.domid(a), population.domid(b)),
                        (population.subjects[a].pages.name, population.subjects[b].pages.name),
                        groups.names[groups.group_of[a]] if same else None,
                        contents,
                        int(tally.pages_of_common[a, b] + tally.pages_of_common[b, a]),
                    )
                )
        return pairs


def extrapolated(
    seen: DomainEstimate, pages: int, looked_at: int, zero_of_all: float, copies: float, copies_seen: int
) -> DomainEstimate:
    """One domain, from what the sample has of it. Its figures add up to ``pages``, besides absent pages and holes.

    :param pages: how many of its pages might be drawn; ``looked_at``: how many of them were.
    :param zero_of_all: the part of zero pages in all domains, for one of which no page was drawn.
    :param copies: pages of all domains that could be saved, zero pages apart.
    :param copies_seen: how many of these copies the sample has.

    An example: of 1,000 pages 100 were looked at. 20 of them are zero, 5 volatile: so 200 and 50 of all. The sample has
    6 copies, 3 of them inside this domain, and there are 80 copies in all: so 40 are inside this domain. A copy is seen
    only if both pages are in the sample. That is why copies are not multiplied by ten as the others are.
    """
    part = pages / looked_at if looked_at else 0.0
    dropped = {reason: int(count * part) for reason, count in seen.dropped.items()}
    left = pages - sum(dropped.values())
    zero = min(left, round((seen.zero_pages - seen.hole_pages) * part if looked_at else zero_of_all * pages))
    intra = min(left - zero, round(copies * seen.intra_pages / copies_seen))
    others = round((seen.shared_pages - seen.intra_pages) * max(1.0, copies / copies_seen))
    shared = min(left - zero, intra + others)
    return replace(
        seen,
        zero_pages=seen.hole_pages + zero,
        unique_pages=left - zero - shared,
        shared_pages=shared,
        intra_pages=intra,
        dropped=dropped,
    )


def _bounds(interval: Interval, known: int, figure: int) -> Bounds:
    # Rounded outwards; the figure, which was rounded so that figures add up, is never outside.
    return Bounds(min(known + int(interval.low), figure), max(known + int(-(-interval.high // 1)), figure))
