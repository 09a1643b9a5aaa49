"""An estimate: what sharing would save in some sources of memory. Reads only, whatever the sources are.

What makes this hard: the sources are larger than memory, the figures must be exact, and an estimate should cost what
reading costs. So a page becomes a fingerprint of 8 bytes, and nothing else is kept of it. Equal fingerprints only
suggest: the pages that have them are compared, byte for byte, as sharing would compare them.

The order is: ``look`` (every page once), ``compare`` (every page that may be shared once more), ``count`` (what the
classes of equal contents save), ``limits`` (what a running host leaves of that).

There is one seed for all trust groups. Sharing would never do that. Here it is safe, because no guest watches an
estimate and the seed is fresh and secret. And it is the only way to tell what one group for all would save on top
(``between_groups_pages``).

Memory: at most 40 bytes a page, and some MiB for each thread. A page costs 1 byte for its verdict, 1 for its huge
page, 8 for its fingerprint, 4 for its frame, and up to 17 while candidates are sorted.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from memshr.content.fingerprint import Fingerprinter, Fingerprinting
from memshr.errors import MemshrError
from memshr.estimation.assembly import Assembly, Groups
from memshr.estimation.compare import compare
from memshr.estimation.count import TOP_CONTENTS, Tally, TopContent
from memshr.estimation.guesses import ZERO_PAGE, guess, pages_of_files
from memshr.estimation.limits import limits
from memshr.estimation.look import Findings, Verdict, look, look_again_at_zeros, survey
from memshr.estimation.population import Population
from memshr.estimation.readers import Readers
from memshr.estimation.result import Content, Estimate, Method, Place
from memshr.estimation.sampling import SampleOptions, draw, infer
from memshr.indices import Row, of_kind
from memshr.pagesource import Subject
from memshr.trust import trust_groups
from memshr.types import page_buffer


@dataclass(frozen=True, slots=True)
class EstimateOptions:
    """How an estimate is made.

    :param mappings: mappings that each domain may spend on sharing.
    :param groups: trust groups, as ``trust.trust_groups`` reads them.
    :param max_sharers: pages that one frame takes at most. At least 2.
    :param interval_s: seconds between the two samples of live sources.
    :param rate_bytes_per_s: read no faster than that; None: no limit.
    :param against: files whose pages are looked for among the contents that save most.
    :param threads: None: one for each core, 8 at most.
    """

    mappings: int
    groups: Sequence[str] = ()
    max_sharers: int = 256
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
class EstimateProgress:
    """How far an estimate is; ``phase`` is ``look`` or ``compare``."""

    phase: str
    done_pages: int
    total_pages: int


def analyse(
    subjects: Sequence[Subject],
    options: EstimateOptions,
    *,
    sample: SampleOptions | None = None,
    new_seed: Callable[[], int],
    clock: Callable[[], float] = time.monotonic,
    wait: Callable[[float], None] = time.sleep,
    progress: Callable[[EstimateProgress], None] = lambda _: None,
    fingerprinting: Fingerprinting | None = None,
) -> Estimate:
    """What sharing would save in ``subjects``: exactly, or within bounds if a sample is drawn.

    :param subjects: those without a domid get the numbers 1, 2, ... in this order; no two may have the same domid.
    :param new_seed: gives an unpredictable seed of ``fingerprint.SEED_BITS`` bits.
    :param clock: gives seconds; only differences count. :param wait: waits for a number of seconds.
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
    drawn = draw(population, findings, sample.denominator, sample.seed) if sample is not None else None
    if drawn is not None:
        # What is read lies apart, and a disk is faster with several requests to choose from.
        readers = Readers(options.threads or _SAMPLE_THREADS, options.rate_bytes_per_s, clock=clock, wait=wait)
    with fingerprinting(seed) as fingerprint_pages:
        look(population, findings, fingerprint_pages, readers, _advancing(progress, "look", population.rows))
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
    method = Method(
        exact=drawn is None,
        sample=None,
        samples_s=options.interval_s if live else None,
        max_sharers=options.max_sharers,
        mappings_per_domain=options.mappings,
        pages_read=findings.pages_read,
        elapsed_s=0.0,
    )
    contents = _top_contents(population, findings, tally, options.against)
    if drawn is None or sample is None:
        del classes
        within = limits(population, findings, tally, groups.members, options.mappings)
        estimate = Assembly(population, groups, findings, tally).exact(method, contents, collisions, within)
    else:
        inference = infer(population, findings, classes, drawn, groups.group_of)
        estimate = Assembly(population, groups, findings, tally).sampled(
            method, contents, collisions, drawn, inference, sample
        )
    return replace(estimate, method=replace(estimate.method, elapsed_s=round(clock() - started_s, 3)))


_SAMPLE_THREADS = 8


def _groups(population: Population, specs: Sequence[str]) -> Groups:
    names = {population.domid(number): subject.pages.name for number, subject in enumerate(population.subjects)}
    found = trust_groups(names, specs, lambda: 0)
    number_of = {domid: number for number, domid in enumerate(population.domids)}
    members = [[number_of[domid] for domid in group.domids] for group in found]
    group_of = [0] * len(names)
    for group, numbers in enumerate(members):
        for number in numbers:
            group_of[number] = group
    return Groups([group.name for group in found], members, group_of)


def _advancing(progress: Callable[[EstimateProgress], None], phase: str, total_pages: int) -> Callable[[int], None]:
    done_pages = 0

    def advance(pages: int) -> None:
        nonlocal done_pages
        done_pages += pages
        progress(EstimateProgress(phase, done_pages, total_pages))

    return advance


def _top_contents(
    population: Population, findings: Findings, tally: Tally, against: Sequence[str]
) -> tuple[Content, ...]:
    rows = of_kind(Row, np.array(sorted(each.row for each in tally.top), np.int64))
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
