"""Estimates from a sample: some runs of pages, drawn at random by position, and what can be said of all from them.

What makes this hard: zero pages are counted like votes, but copies are not. Of two equal pages both must be in the
sample to be seen, so of contents that exist twice a sample of 1/64 sees one pair in 4,096. No method can tell from a
small sample how many distinct contents there are (Charikar, Chaudhuri, Motwani, Narasayya, *Towards Estimation Error
Guarantees for Distinct Values*, PODS 2000; Harnik, Khaitzin, Sotnikov, *Estimating Unseen Deduplication*, FAST 2016).
So there are bounds, wide where they must be, and the figures between them are no more than a guess.

Choosing pages by their contents would see every copy of a content or none, but takes reading all of them. A sample is
made to read little.

The sample: pages that have contents are cut into *clusters* of ``CLUSTER_PAGES`` in order, and each cluster is drawn by
itself, with probability q. So a content that is in c clusters is seen in a binomial number J of them. What the sample
holds is compared byte for byte, like everything.

What is saved is the sum of three parts, each with a bound of its own:

* Holes are known.
* Zero pages and copies *within a cluster*: a mean over clusters, each of which is seen wholly. Its bounds are those of
  Hoeffding and Bernstein for draws without replacement (Bardenet and Maillard, *Concentration inequalities for
  sampling without replacement*, Bernoulli 2015), which hold for any memory.
* Copies *between clusters*: the sum of c - 1 over all contents. A weight g(J) for each content that is seen J times
  sums up to a figure whose expectation is the sum of h(c), h(c) being the expectation of g(J). If h(c) <= c - 1 for
  every c, that is a lower bound in expectation; if h(c) >= c - 1, an upper one. ``lower_weights`` and
  ``upper_weights`` make such g, and make sure of it for each c. The spread is judged by leaving out each cluster in
  turn (the inequality of Efron and Stein says that this does not underrate the variance), and the normal
  distribution; what may exist and was not seen at all is added by the rule of three.
* And always: no more is saved than all pages less the distinct contents that were seen.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memshr.content.classes import PackedClasses
from memshr.errors import MemshrError
from memshr.estimation.look import Findings, Verdict
from memshr.estimation.population import Population
from memshr.indices import Row, of_kind
from memshr.pagesource import Rows
from memshr.runs import run_starts

CLUSTER_PAGES = 16
"""64 KiB: so much comes from a disk in little more time than one page."""
CONFIDENCE = 0.95
MAX_DENOMINATOR = 4096

_DELTA = 1 - CONFIDENCE
_QUANTILE = 2.4
"""Of the normal distribution, for one side at 0.8%: 5% are shared by six one-sided bounds."""
_RARE_EVENTS = 4.8
"""-ln(0.8%): more events than that would not all have been missed."""
_GAINS = (2.0, 4.0, 16.0)
"""Lower bounds that are tried: the larger, the more a pair counts, and the more triples count against it."""

Weights = NDArray[np.float64]
"""g(J) for J = 0 to 3; from 4 on it is J / q - 1 (lower) or J / q (upper)."""


@dataclass(frozen=True, slots=True)
class SampleOptions:
    """What sample to draw: one in ``denominator`` clusters; the same seed draws the same ones of the same memory.

    :raises MemshrError: the denominator is not 2 to MAX_DENOMINATOR.
    """

    denominator: int
    seed: int

    def __post_init__(self) -> None:
        if not 2 <= self.denominator <= MAX_DENOMINATOR:
            raise MemshrError(
                f"a sample of 1/{self.denominator} cannot be drawn", remedy=f"write 1/2 to 1/{MAX_DENOMINATOR}"
            )
        if self.seed < 0:
            raise MemshrError("the seed of a sample is a number from 0 on")


def denominator_of(rate: str) -> int:
    """The N of ``1/N``. :raises MemshrError: the text is something else."""
    one, slash, denominator = rate.partition("/")
    if one.strip() != "1" or not slash or not (denominator.isascii() and denominator.isdecimal()):
        raise MemshrError(f"{rate!r} is no rate of a sample", remedy="write 1/N, such as 1/64")
    return int(denominator[:9])


@dataclass(frozen=True, slots=True)
class Drawn:
    """A sample.

    :param rows: ascending, shape ``(n,)``. :param clusters: the cluster that each is of, same shape.
    :param all_clusters: how many there are.
    :param pages_of: pages with contents that each subject has, drawn or not.
    """

    rate: float
    rows: Rows
    clusters: NDArray[np.int64]
    all_clusters: int
    pages_of: NDArray[np.int64]


def draw(population: Population, findings: Findings, denominator: int, seed: int) -> Drawn:
    """Draw one in ``denominator`` clusters of OPEN pages; all other OPEN pages become NOT_LOOKED_AT."""
    random = np.random.Generator(np.random.PCG64(seed))
    rows, clusters, pages_of, all_clusters = [], [], [], 0
    for number in range(len(population.subjects)):
        ours = population.slice_of(number)
        (open_rows,) = np.nonzero(findings.verdicts[ours] == Verdict.OPEN)
        count = -(-len(open_rows) // CLUSTER_PAGES)
        (chosen,) = np.nonzero(random.random(count) < 1 / denominator)
        places = (chosen[:, None] * CLUSTER_PAGES + np.arange(CLUSTER_PAGES)).ravel()
        places = places[places < len(open_rows)]
        findings.verdicts[ours][open_rows] = Verdict.NOT_LOOKED_AT
        taken = open_rows[places] + ours.start
        findings.verdicts[taken] = Verdict.OPEN
        rows.append(taken)
        clusters.append(places // CLUSTER_PAGES + all_clusters)
        pages_of.append(len(open_rows))
        all_clusters += count
    none = np.empty(0, np.int64)
    return Drawn(
        1 / denominator,
        np.concatenate([none, *rows]),
        np.concatenate([none, *clusters]),
        all_clusters,
        np.array(pages_of, np.int64),
    )


@dataclass(frozen=True, slots=True)
class Interval:
    """A figure with its bounds."""

    low: float
    figure: float
    high: float


@dataclass(frozen=True, slots=True)
class Inference:
    """What a sample says of all pages with contents (holes are not among them).

    ``saved_pages`` are zero pages, and copies whatever they are copies of. ``distinct_in_all`` contents were seen,
    of zeros apart, without regard to groups.
    """

    zero_pages: Interval
    saved_pages: Interval
    distinct_in_all: int


def infer(
    population: Population, findings: Findings, classes: PackedClasses, drawn: Drawn, group_of: Sequence[int]
) -> Inference:
    """What the sample says, after its pages have been compared.

    :param classes: of equal contents, among the pages of the sample.
    """
    pages = int(drawn.pages_of.sum())
    verdicts = findings.verdicts[drawn.rows]
    first = np.unique(drawn.clusters, return_index=True)[1]
    everything = slice(None)
    rows, leaders = of_kind(Row, classes.rows(everything)), classes.leaders(everything)
    groups = np.asarray(group_of, np.int64)[population.subjects_of(rows)]
    clusters = drawn.clusters[np.searchsorted(drawn.rows, rows)]
    # One incidence for each cluster that holds a content; what a cluster holds besides is a copy within it.
    order = np.lexsort((clusters, groups, leaders))
    content = leaders[order] * (1 + len(population.subjects)) + groups[order]
    cluster = clusters[order]
    new_content = run_starts(content)
    new = new_content | run_starts(cluster)
    within = _per_cluster(drawn, first, cluster[~new])
    zeros = _per_cluster(drawn, first, drawn.clusters[verdicts == Verdict.ZERO])
    nonzero = int(np.count_nonzero(verdicts == Verdict.OPEN))
    between = _between_clusters((np.cumsum(new_content) - 1)[new], cluster[new], drawn)
    scale = CLUSTER_PAGES * drawn.all_clusters
    zero_pages = _scaled(_mean_bounds(zeros / CLUSTER_PAGES, drawn.all_clusters), scale, pages)
    own = _scaled(_mean_bounds((zeros + within) / CLUSTER_PAGES, drawn.all_clusters), scale, pages)
    distinct = nonzero - len(content) + int(np.count_nonzero(new_content))
    most = pages - distinct
    saved = Interval(
        min(own.low + between.low, most),
        min(own.figure + between.figure, most),
        min(own.high + between.high, most),
    )
    distinct_in_all = nonzero - len(rows) + len(np.unique(leaders))
    return Inference(zero_pages, saved, distinct_in_all)


def _per_cluster(drawn: Drawn, first: NDArray[np.int64], clusters: NDArray[np.int64]) -> NDArray[np.float64]:
    # How often each drawn cluster is named; a drawn cluster has at least one page.
    names = drawn.clusters[first]
    return np.bincount(np.searchsorted(names, clusters), minlength=len(names)).astype(np.float64)


def _scaled(bounds: Interval, scale: int, most: int) -> Interval:
    return Interval(*(min(max(0.0, each) * scale, most) for each in (bounds.low, bounds.figure, bounds.high)))


def _mean_bounds(values: NDArray[np.float64], population: int) -> Interval:
    # Of the mean of ``population`` values in 0 to 1, of which these were drawn without replacement.
    count = len(values)
    if not count:
        return Interval(0.0, 0.0, float(population > 0))
    mean = float(values.mean())
    delta = _DELTA / 12  # two ends of two figures, and two inequalities for each; copies between clusters have the rest
    left = 1 - (count - 1) / population
    hoeffding = math.sqrt(left * math.log(1 / delta) / (2 * count))
    bernstein = (
        float(values.std()) * math.sqrt(2 * left * math.log(5 / delta) / count)
        + (7 / 3 + 3 / math.sqrt(2)) * math.log(5 / delta) / count
    )
    error = min(hoeffding, bernstein)
    return Interval(max(0.0, mean - error), mean, min(1.0, mean + error))


def _between_clusters(content: NDArray[np.int64], cluster: NDArray[np.int64], drawn: Drawn) -> Interval:
    # The sum of (clusters that hold it - 1) over contents. ``content`` and ``cluster`` are incidences in the sample.
    rate = drawn.rate
    seen = np.bincount(content) if len(content) else np.zeros(0, np.int64)
    lows, figures = [0.0], [0.0]
    for gain in _GAINS:
        total, spread = _weighed(seen, content, cluster, lower_weights(rate, gain), -1.0, rate)
        lows.append(total - _QUANTILE * spread)
        figures.append(total)
    weights = upper_weights(rate)
    total, spread = _weighed(seen, content, cluster, weights, 0.0, rate)
    unseen = _RARE_EVENTS * CLUSTER_PAGES * float(weights[2])
    low, high = max(lows), max(0.0, total) + _QUANTILE * spread + unseen
    # Between what a lower and an upper estimator expect, the geometric mean is least wrong in the worst case.
    figure = math.sqrt(max(figures) * max(total, *figures))
    return Interval(low, min(max(figure, low), high), high)


def _weighed(
    seen: NDArray[np.int64],
    content: NDArray[np.int64],
    cluster: NDArray[np.int64],
    weights: Weights,
    offset: float,
    rate: float,
) -> tuple[float, float]:
    # The sum of g(J), and its standard deviation by leaving out each cluster in turn.
    value, before = _weight(seen, weights, offset, rate), _weight(seen - 1, weights, offset, rate)
    without = np.bincount(cluster, (value - before)[content]) if len(cluster) else np.zeros(1)
    return float(value.sum()), math.sqrt((1 - rate) * float(np.square(without).sum()))


def _weight(seen: NDArray[np.int64], weights: Weights, offset: float, rate: float) -> NDArray[np.float64]:
    return np.where(seen > 3, seen / rate + offset, weights[np.clip(seen, 0, 3)])


def lower_weights(rate: float, gain: float) -> Weights:
    """Weights with h(c) <= c - 1 for every c: a pair counts ``gain / rate``, and a triple what that leaves.

    With ``g(J) = J / rate - 1`` for all J from 2 on, c - 1 - h(c) is ``(c - 1) (1 - rate)**c``, so there is room.
    """
    chance = _chances(rate)
    weights = np.array([0.0, 0.0, min(gain / rate, 1 / rate**2), 0.0])
    # c - 1 - h(c), without the triples' part: E[J] = c rate, so what is not said of J from 4 on is said of J up to 3.
    room = (1 / rate - 1) * chance[1] - chance[0] + (2 / rate - 1 - weights[2]) * chance[2]
    weights[3] = min(3 / rate - 1, 3 / rate - 1 + float((room[2:] / chance[3][2:]).min()))
    return weights


def upper_weights(rate: float) -> Weights:
    """Weights with h(c) >= c - 1 for every c: a pair counts ``1 / rate**2``, which is exact where c is 2."""
    chance = _chances(rate)
    weights = np.array([0.0, 0.0, 1 / rate**2, 0.0])
    missing = (chance[1] + 2 * chance[2] + 3 * chance[3]) / rate - 1 - weights[2] * chance[2]
    weights[3] = float((missing[2:] / chance[3][2:]).max())
    return weights


def _chances(rate: float) -> NDArray[np.float64]:
    # The chances that J is 0 to 3, shape (4, n), for c from 1 to where it is larger for all practical purposes.
    clusters = np.arange(1, math.ceil(60 / rate) + 1, dtype=np.float64)
    chance = np.empty((4, len(clusters)))
    chance[0] = (1 - rate) ** clusters
    for seen in range(1, 4):
        chance[seen] = chance[seen - 1] * (clusters - seen + 1) / seen * (rate / (1 - rate))
    return chance
