"""Samples: the bounds that are printed hold, for memory of many kinds, and the weights behind them keep their word."""

from __future__ import annotations

import math

import numpy as np
import pytest
from numpy.typing import NDArray

from memshr.errors import MemshrError
from memshr.estimation.analysis import EstimateOptions, analyse
from memshr.estimation.assembly import extrapolated
from memshr.estimation.result import DomainEstimate, Estimate
from memshr.estimation.sampling import SampleOptions, denominator_of, lower_weights, upper_weights
from memshr.indices import Row, of_kind
from memshr.pagesource import PageState, Rows, Subject
from memshr.types import DomId, PageBytes

MAPPINGS = 63_482
"""What a domain may have, where a test does not say how many."""

TRIALS = 100
PAGES = 24_000


class Numbers:
    """A source whose pages hold one number each; 0 is zeros, and -1 is a hole."""

    live = False

    def __init__(self, name: str, numbers: NDArray[np.int64]) -> None:
        self.name = name
        self.numbers = numbers
        self.ranges = np.array([[0, len(numbers)]], np.int64)
        self.total_pages = len(numbers)
        self.pages_read = 0

    def states(self, first_row: int, count: int) -> NDArray[np.uint8]:
        holes = self.numbers[first_row : first_row + count] < 0
        return np.where(holes, np.uint8(PageState.HOLE), np.uint8(PageState.STORED))

    def read_run(self, first_row: int, out: PageBytes) -> NDArray[np.bool_]:
        return self.read(of_kind(Row, np.arange(first_row, first_row + len(out))), out)

    def read(self, rows: Rows, out: PageBytes) -> NDArray[np.bool_]:
        out[:] = 0
        out.view(np.int64)[:, 0] = self.numbers[rows]
        self.pages_read += len(rows)
        return np.ones(len(rows), np.bool_)


def analysed(memory: list[NDArray[np.int64]], sample: SampleOptions | None) -> Estimate:
    sources = [Numbers(str(number), numbers) for number, numbers in enumerate(memory)]
    options = EstimateOptions(MAPPINGS, groups=["all"], threads=1)
    found = analyse([Subject(source) for source in sources], options, sample=sample, new_seed=lambda: 11)
    assert Estimate.from_dict(found.to_dict()) == found
    return found


def distinct(first: int, count: int) -> NDArray[np.int64]:
    return np.arange(first, first + count)


def memories() -> dict[str, list[NDArray[np.int64]]]:
    """Kinds of memory, PAGES pages each: what is easy for a sample, and what is hard."""
    random = np.random.default_rng(3)
    half, quarter = PAGES // 2, PAGES // 4
    guest = distinct(1, PAGES // 8)
    guest[: len(guest) // 3] = 0
    own = [guest.copy() for _ in range(8)]
    for number, numbers in enumerate(own):
        numbers[len(guest) // 2 :] += 1_000_000 * (number + 1)
    return {
        "nothing twice": [distinct(1, PAGES)],
        "everything twice, in runs": [distinct(1, half), distinct(1, half)],
        "everything twice, scattered": [random.permutation(np.tile(distinct(1, half), 2))],
        "twice, side by side": [np.repeat(distinct(1, half), 2)],
        "one content": [np.full(PAGES, 5)],
        "zeros, scattered": [np.where(random.random(PAGES) < 0.3, 0, distinct(1, PAGES))],
        "zeros in one piece": [np.concatenate([np.zeros(quarter, np.int64), distinct(1, PAGES - quarter)])],
        "holes": [np.concatenate([np.full(half, -1), distinct(1, quarter), np.zeros(quarter, np.int64)])],
        "eight guests": own,
        "a few of many copies": [random.zipf(1.4, PAGES).clip(0, 10**9)],
        "64 of each": [random.permutation(np.tile(distinct(1, PAGES // 64), 64))],
        "5 of some": [random.permutation(np.concatenate([np.tile(distinct(1, 800), 5), distinct(9000, PAGES - 4000)]))],
    }


@pytest.mark.parametrize("kind", memories())
@pytest.mark.parametrize("denominator", [16])
def test_bounds_hold_in_95_of_100_trials(kind: str, denominator: int) -> None:
    memory = memories()[kind]
    exact = analysed(memory, None)
    held = 0
    for seed in range(TRIALS):
        found = analysed(memory, SampleOptions(denominator, seed))
        assert found.bounds is not None
        held += all(
            low <= getattr(exact, name) <= high
            for name, (low, high) in found.bounds.items()
            if name != "between_groups_pages"
        )
        for name, (low, high) in found.bounds.items():
            assert low <= getattr(found, name) <= high
    assert held >= 95


def test_bounds_say_something() -> None:
    # What is told for certain: a few contents of many copies, and that there is hardly anything but zeros.
    sample = SampleOptions(8, 1)
    one = analysed([np.full(PAGES, 5)], sample).bounds
    assert one is not None
    assert one["saved_pages"].low > 0.8 * PAGES
    unlike = analysed([distinct(1, PAGES)], sample).bounds
    assert unlike is not None
    assert (unlike["saved_pages"].low, unlike["zero_pages"].high) < (1, 0.1 * PAGES)
    assert unlike["saved_pages"].high < 0.9 * PAGES
    clones = [distinct(1, PAGES // 8)] * 8
    eight = analysed(clones, sample).bounds
    assert eight is not None
    assert eight["saved_pages"].low > 0.2 * PAGES


def test_a_sample_reads_its_part_and_says_so() -> None:
    source = Numbers("a", distinct(1, PAGES))
    found = analyse([Subject(source)], EstimateOptions(MAPPINGS), sample=SampleOptions(64, 9), new_seed=lambda: 1)
    assert 0 < source.pages_read == found.method.pages_read < PAGES / 20
    sample = found.method.sample
    assert sample is not None
    assert (found.method.exact, sample.rate, sample.seed, sample.confidence) == (False, "1/64", 9, 0.95)
    assert sample.pages_read == source.pages_read
    assert (found.achievable, found.pairs, found.copies) == (None, (), ())


def test_figures_of_a_sample_add_up() -> None:
    for memory in memories().values():
        found = analysed(memory, SampleOptions(16, 4))
        parts: list[Estimate | DomainEstimate] = [found, *found.domains]
        for part in parts:
            assert part.total_pages == part.absent_pages + part.zero_pages + part.unique_pages + part.shared_pages
        assert found.saved_pages == found.zero_pages + found.intra_pages + found.inter_pages
        assert found.saved_pages == sum(group.saved_pages for group in found.groups)
        assert found.shared_pages == sum(domain.shared_pages for domain in found.domains)


def test_one_seed_draws_one_sample() -> None:
    memory = memories()["a few of many copies"]
    first, again, other = (analysed(memory, SampleOptions(16, seed)).to_dict() for seed in (1, 1, 2))
    for each in (first, again, other):
        del each["method"]
    assert first == again != other


def test_nothing_to_draw_from() -> None:
    for memory in ([np.full(100, -1)], [distinct(1, 3)]):
        found = analysed(memory, SampleOptions(4096, 0))
        assert found.bounds is not None
        assert found.total_pages == len(memory[0])
        assert found.bounds["saved_pages"].high <= len(memory[0])


@pytest.mark.parametrize("rate", [1 / 2, 1 / 3, 1 / 16, 1 / 64, 1 / 1000])
def test_weights_expect_too_little_and_too_much(rate: float) -> None:
    for clusters in (1, 2, 3, 4, 7, 20, 64, 200, 500, 1500):
        seen = np.arange(clusters + 1)
        logs = np.array([math.lgamma(each + 1) for each in range(clusters + 1)])
        chances = np.exp(
            logs[clusters] - logs[seen] - logs[clusters - seen]
            + seen * math.log(rate) + (clusters - seen) * math.log1p(-rate)
        )  # fmt: skip
        for gain in (2.0, 4.0, 16.0):
            lower = np.where(seen > 3, seen / rate - 1, lower_weights(rate, gain)[np.minimum(seen, 3)])
            assert float(chances @ lower) <= clusters - 1 + 1e-6
        upper = np.where(seen > 3, seen / rate, upper_weights(rate)[np.minimum(seen, 3)])
        assert float(chances @ upper) >= clusters - 1 - 1e-6


@pytest.mark.parametrize("text", ["64", "1/", "2/64", "1/1", "1/5000", "1/x", "1/-4", "1/²", ""])
def test_rates_that_are_none(text: str) -> None:
    with pytest.raises(MemshrError, match="1/"):
        SampleOptions(denominator_of(text), 0)


def test_rate() -> None:
    assert denominator_of("1/64") == 64


def test_a_domain_is_extrapolated_as_the_example_says() -> None:
    seen = DomainEstimate(
        domid=DomId(1),
        name="a",
        kind="image",
        format="raw",
        group="a",
        total_pages=1000,
        absent_pages=0,
        hole_pages=0,
        zero_pages=20,
        unique_pages=68,
        shared_pages=7,
        intra_pages=3,
        huge_pages=None,
        mappings=0,
        dropped={"volatile": 5, "not_sharable": 0},
    )
    found = extrapolated(seen, 1000, 100, 0.5, copies=80.0, copies_seen=6)
    assert (found.zero_pages, found.dropped["volatile"], found.intra_pages) == (200, 50, 40)
    assert found.shared_pages == 40 + round(4 * 80 / 6)
    assert found.zero_pages + found.unique_pages + found.shared_pages + 50 == 1000
    nothing_drawn = extrapolated(seen, 1000, 0, 0.5, copies=0.0, copies_seen=1)
    assert (nothing_drawn.zero_pages, nothing_drawn.unique_pages) == (500, 496)
