"""An estimate: what sharing would save in some sources of memory. Reads only, whatever the sources are.

What makes this hard: the sources are larger than memory, the figures are to be exact, and it should cost what reading
costs. So pages become fingerprints of 8 bytes; equal fingerprints only suggest, and the pages that have them are
compared, byte for byte, as sharing would compare them. Nothing else is kept of a page.

The order is: ``scan`` (every page once), ``comparing`` (every page that may be shared once more), ``tally`` (what the
classes of equal contents save), ``achievable`` (what a running host leaves of that).

There is one seed for all trust groups, which sharing would never do: an estimate is not watched by a guest, the seed is
fresh and secret, and what one group for all would save on top (``between_groups_pages``) can be told in no other way.

Memory: at most 40 bytes a page, and some MiB for each thread. A page costs 1 byte for its verdict, 1 for its huge
page, 8 for its fingerprint, 4 for its frame, and up to 17 while candidates are sorted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import combinations

import numpy as np

from memshr.errors import MemshrError
from memshr.report.achievable import Limits, limits
from memshr.report.comparing import compare
from memshr.report.estimate import (
    Achievable,
    Content,
    CopiesBand,
    DomainEstimate,
    Estimate,
    GroupEstimate,
    Method,
    PairEstimate,
    Place,
)
from memshr.report.guesses import ZERO_PAGE, guess, pages_of_files
from memshr.report.population import Population, page_buffer
from memshr.report.reading import Readers
from memshr.report.scan import Findings, Verdict, look_again_at_zeros, scan, survey
from memshr.report.tally import TOP_CONTENTS, Counts, Tally, TopContent, band_edges
from memshr.sharing.fingerprint import Fingerprinter
from memshr.sharing.groups import trust_groups
from memshr.sharing.session import Fingerprinting
from memshr.sources import Subject
from memshr.types import Counters, DomainInfo

DEFAULT_MAPPINGS = 65_530 - 2_048
"""The default of Linux's vm.max_map_count, less what sharing leaves to QEMU itself."""


@dataclass(frozen=True, slots=True)
class EstimateOptions:
    """How an estimate is made.

    :param groups: trust groups, as ``sharing.groups.trust_groups`` reads them.
    :param max_sharers: pages that one frame takes at most. At least 2.
    :param mappings: mappings that each domain may spend on sharing.
    :param interval_s: seconds between the two samples of live sources.
    :param rate_bytes_per_s: read no faster than that; None: no limit.
    :param against: files whose pages are looked for among the contents that save most.
    :param threads: None: one for each core.
    """

    groups: Sequence[str] = ()
    max_sharers: int = 256
    mappings: int = DEFAULT_MAPPINGS
    interval_s: float = 1.0
    rate_bytes_per_s: float | None = None
    against: Sequence[str] = ()
    threads: int | None = None

    def __post_init__(self) -> None:
        if self.max_sharers < 2:
            raise MemshrError(f"max_sharers is {self.max_sharers}, but sharing takes at least 2")
        if self.mappings < 0 or self.interval_s < 0:
            raise MemshrError("mappings and the interval cannot be negative")
        if self.rate_bytes_per_s is not None and self.rate_bytes_per_s <= 0:
            raise MemshrError("the rate must be above 0")


@dataclass(frozen=True, slots=True)
class Progress:
    """How far an estimate is; ``phase`` is ``scan`` or ``compare``."""

    phase: str
    done_pages: int
    total_pages: int


def analyse(
    subjects: Sequence[Subject],
    options: EstimateOptions,
    *,
    new_seed: Callable[[], int],
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
    progress: Callable[[Progress], None] = lambda _: None,
    fingerprinting: Fingerprinting | None = None,
) -> Estimate:
    """What sharing would save in ``subjects``, exactly.

    :param subjects: they get the domids 1, 2, ... in this order.
    :param new_seed: gives an unpredictable seed of ``fingerprint.SEED_BITS`` bits.
    :param clock: seconds, from anywhere on. :param wait: waits for so many seconds.
    :param progress: called now and then, by any thread.
    :param fingerprinting: makes what fingerprints pages, from a seed; called by several threads at once.
    :raises MemshrError: a source is gone, cannot be read, or has changed although it is not live.
    :raises GroupError: the trust groups make no sense.
    """
    started_s = clock()
    fingerprinting = fingerprinting or partial(Fingerprinter, threads=1)
    population = Population(subjects)
    groups = _groups(population, options.groups)
    seed = new_seed()
    readers = Readers(options.threads, options.rate_bytes_per_s, clock=clock, wait=wait)
    live = bool(population.live.any())
    findings = survey(population)
    with fingerprinting(seed) as fingerprint_pages:
        scan(population, findings, fingerprint_pages, readers, _advancing(progress, "scan", population.rows))
        if live:
            wait(options.interval_s)
            look_again_at_zeros(population, findings, fingerprint_pages, readers)
        classes, collisions = compare(
            population,
            findings,
            fingerprint_pages,
            seed,
            readers,
            lambda candidates: _advancing(progress, "compare", candidates),
        )
    findings.fingerprints = findings.fingerprints[:0].copy()
    tally = Tally(population, groups.group_of, options.max_sharers)
    tally.count(classes)
    del classes
    within = limits(population, findings, tally, groups.members, options.mappings)
    contents = _top_contents(population, findings, tally, options.against)
    method = Method(
        exact=True,
        sample=None,
        samples_s=options.interval_s if live else None,
        max_sharers=options.max_sharers,
        mappings_per_domain=options.mappings,
        pages_read=findings.pages_read,
        elapsed_s=round(clock() - started_s, 3),
    )
    return _Assembly(population, groups, findings, tally, within).estimate(method, contents, collisions)


@dataclass(frozen=True, slots=True)
class _Groups:
    # The trust groups: names, numbers of their subjects, and the group of each subject.
    names: list[str]
    members: list[list[int]]
    group_of: list[int]


def _groups(population: Population, specs: Sequence[str]) -> _Groups:
    infos = [
        DomainInfo(population.domid(number), subject.pages.name, tot_pages=0, shr_pages=0, max_pages=0)
        for number, subject in enumerate(population.subjects)
    ]
    found = trust_groups(infos, specs, lambda: 0)
    members = [[domid - 1 for domid in group.domids] for group in found]
    group_of = [0] * len(infos)
    for group, numbers in enumerate(members):
        for number in numbers:
            group_of[number] = group
    return _Groups([group.name for group in found], members, group_of)


def _advancing(progress: Callable[[Progress], None], phase: str, total_pages: int) -> Callable[[int], None]:
    done_pages = 0

    def advance(pages: int) -> None:
        nonlocal done_pages
        done_pages += pages
        progress(Progress(phase, done_pages, total_pages))

    return advance


def _top_contents(
    population: Population, findings: Findings, tally: Tally, against: Sequence[str]
) -> tuple[Content, ...]:
    rows = np.array(sorted(each.row for each in tally.top), np.int64)
    pages = page_buffer(len(rows))
    readable = population.read(rows, pages)
    files = pages_of_files(pages, against)
    guesses = {
        row: (file or guess(page.tobytes())) if known else ""
        for row, page, file, known in zip(rows.tolist(), pages, files, readable.tolist(), strict=True)
    }
    top = list(tally.top)
    if zeros := _zero_content(population, findings):
        guesses[zeros.row] = ZERO_PAGE
        top = sorted([*top, zeros], key=lambda each: (-each.saved_pages, each.row))[:TOP_CONTENTS]
    return tuple(
        Content(each.copies, each.domains, each.saved_pages, guesses[each.row], Place(*population.place(each.row)))
        for each in top
    )


def _zero_content(population: Population, findings: Findings) -> TopContent | None:
    first, pages, domains = None, 0, 0
    for number in range(len(population.subjects)):
        ours = population.slice_of(number)
        zero = (findings.verdicts[ours] == Verdict.ZERO) | (findings.verdicts[ours] == Verdict.HOLE)
        if count := int(np.count_nonzero(zero)):
            first = ours.start + int(zero.argmax()) if first is None else first
            pages += count
            domains += 1
    return None if first is None else TopContent(first, pages, domains, pages)


class _Assembly:
    # Puts the figures of an estimate together.

    def __init__(
        self, population: Population, groups: _Groups, findings: Findings, tally: Tally, within: Limits
    ) -> None:
        self._population = population
        self._groups = groups
        self._findings = findings
        self._tally = tally
        self._within = within

    def estimate(self, method: Method, contents: tuple[Content, ...], collisions: int) -> Estimate:
        domains = tuple(self._domain(number) for number in range(len(self._population.subjects)))
        groups = tuple(self._group(number, domains) for number in range(len(self._groups.names)))
        tally, within = self._tally, self._within
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

    def _bands(self) -> tuple[Counts, Counts, Counts]:
        return self._tally.band_contents, self._tally.band_pages, self._tally.band_saved

    def _domain(self, number: int) -> DomainEstimate:
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
            mappings=self._within.mappings[number],
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
