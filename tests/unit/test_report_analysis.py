"""The analysis behind ``memshr estimate``, held against a session of the embedded hypervisor and plain counting."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import nullcontext

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from memshr.embedded import EmbeddedHypervisor
from memshr.report import comparing, tally
from memshr.report.analysis import EstimateOptions, analyse
from memshr.report.estimate import DomainEstimate, Estimate
from memshr.sharing.fingerprint import Fingerprinter, Fingerprints
from memshr.sharing.groups import trust_groups
from memshr.sharing.session import SharingOptions, share
from memshr.sources import PageState, Rows, Subject
from memshr.types import PAGE_SIZE, Extent, Gfn, PageBytes

HOLE, ABSENT, UNREADABLE = -1, -2, -3
"""Contents of pages that are no ordinary ones; 0 is zeros."""


class Memory:
    """A source in memory. ``contents`` has a number for each page; pages of one number are equal."""

    def __init__(self, name: str, contents: Sequence[int], *, first_gfn: int = 0, live: bool = False) -> None:
        self.name = name
        self.live = live
        self.contents = list(contents)
        self.ranges: NDArray[np.int64] = np.array([[first_gfn, len(contents)]] * bool(contents), np.int64).reshape(
            -1, 2
        )
        self.huge: set[int] = set()
        self.rows_read: Counter[int] = Counter()
        self.before_read: Callable[[int], None] = lambda row: None

    @property
    def total_pages(self) -> int:
        return int(self.ranges[:, 1].sum())

    def states(self, first_row: int, count: int) -> NDArray[np.uint8]:
        special = {HOLE: PageState.HOLE, ABSENT: PageState.ABSENT}
        return np.array(
            [
                special.get(self.contents[row], PageState.HUGE if row in self.huge else PageState.STORED)
                for row in range(first_row, first_row + count)
            ],
            np.uint8,
        )

    def read_run(self, first_row: int, out: PageBytes) -> NDArray[np.bool_]:
        return self.read(np.arange(first_row, first_row + len(out)), out)

    def read(self, rows: Rows, out: PageBytes) -> NDArray[np.bool_]:
        for i, row in enumerate(rows.tolist()):
            self.before_read(row)
            self.rows_read[row] += 1
            out[i] = np.frombuffer(page(self.contents[row]), np.uint8)
        return np.array([self.contents[row] != UNREADABLE for row in rows.tolist()], np.bool_)


def page(content: int) -> bytes:
    """The page of a number from 1 on: numbers that differ by 1,000 differ in their last byte only."""
    if content <= 0:
        return bytes(PAGE_SIZE)
    return np.random.default_rng(content % 1000).bytes(PAGE_SIZE - 1) + bytes([content // 1000])


def estimate(
    *sources: Memory,
    groups: Sequence[str] = (),
    huge_pages_known: bool = False,
    fingerprinting: Callable[[int], nullcontext[Callable[[PageBytes], Fingerprints]]] | None = None,
    wait: Callable[[float], None] = lambda _: None,
    **options: int,
) -> Estimate:
    subjects = [Subject(source, huge_pages_known=huge_pages_known) for source in sources]
    found = analyse(
        subjects,
        EstimateOptions(groups=groups, **options),  # type: ignore[arg-type]  # the tests name figures only
        new_seed=lambda: 7,
        wait=wait,
        **({"fingerprinting": fingerprinting} if fingerprinting else {}),  # type: ignore[arg-type]
    )
    check_sums(found)
    assert Estimate.from_dict(found.to_dict()) == found
    return found


def check_sums(found: Estimate) -> None:
    """Every equation of docs/report.md."""
    parts: list[Estimate | DomainEstimate] = [found, *found.domains]
    for part in parts:
        left_out = part.dropped["volatile"] + part.dropped["not_sharable"]
        assert part.total_pages == (
            part.absent_pages + part.zero_pages + part.unique_pages + part.shared_pages + left_out
        )
        assert part.hole_pages <= part.zero_pages
    limit = found.dropped["max_sharers"]
    assert found.saved_pages == found.zero_pages + found.intra_pages + found.inter_pages - limit
    assert found.counters.freed_pages == found.saved_pages - found.zero_pages
    contents = sum(band.contents for band in found.copies)
    assert found.shared_pages == found.intra_pages + found.inter_pages + contents
    assert sum(band.pages for band in found.copies) == found.shared_pages
    assert sum(band.saved_pages for band in found.copies) == found.saved_pages - found.zero_pages
    for name in ("saved_pages", "intra_pages", "inter_pages", "zero_pages"):
        assert getattr(found, name) == sum(getattr(group, name) for group in found.groups)
    for name in ("total_pages", "absent_pages", "hole_pages", "zero_pages", "shared_pages", "unique_pages"):
        assert getattr(found, name) == sum(getattr(domain, name) for domain in found.domains)
    assert found.achievable.saved_pages + found.achievable.mapping_budget_pages_lost == found.saved_pages
    assert 0 <= found.achievable.huge_pages_only <= found.saved_pages
    assert found.achievable.saved_pages >= found.zero_pages


def session_figures(sources: Sequence[Memory], groups: Sequence[str], max_sharers: int) -> dict[str, object]:
    """What sharing for good in the embedded hypervisor finds in the same pages."""
    host = EmbeddedHypervisor()
    for source in sources:
        pages = np.frombuffer(b"".join(map(page, source.contents)), np.uint8).reshape(-1, PAGE_SIZE).copy()
        host.create_domain(source.name, extents=[Extent(Gfn(0), pages)] if len(pages) else [])
    options = SharingOptions(max_sharers=max_sharers, threads=1)
    report = share(host, trust_groups(host.domains(), groups, lambda: 5), wait=lambda _: None, options=options)
    assert not report.audit_findings
    return {
        **{name: getattr(report, name) for name in FIGURES},
        "counters": report.counters,
        "max_sharers": report.dropped.get("max_sharers", 0),
        "domains": [tuple(getattr(each, name) for name in DOMAIN_FIGURES) for each in report.domains],
        "pairs": {pair.domids: (pair.contents, pair.pages) for pair in report.pairs if pair.contents},
    }


FIGURES = ("total_pages", "zero_pages", "unique_pages", "shared_pages", "intra_pages", "inter_pages", "saved_pages")
DOMAIN_FIGURES = ("name", "group", "total_pages", "zero_pages", "unique_pages", "shared_pages", "intra_pages")


def figures_of(found: Estimate) -> dict[str, object]:
    return {
        **{name: getattr(found, name) for name in FIGURES},
        "counters": found.counters,
        "max_sharers": found.dropped["max_sharers"],
        # A session goes group by group.
        "domains": [
            tuple(getattr(each, name) for name in DOMAIN_FIGURES)
            for group in found.groups
            for each in found.domains
            if each.domid in group.domids
        ],
        "pairs": {pair.domids: (pair.contents, pair.pages) for pair in found.pairs if pair.group is not None},
    }


class Crippled:
    """Fingerprints that are hardly any: 0 for the zero page, as promised, and one of few values for any other."""

    def __init__(self, values: int) -> None:
        self._values = values

    def __call__(self, pages: PageBytes) -> Fingerprints:
        with Fingerprinter(3, threads=1) as fingerprint:
            honest = fingerprint(pages)
        return np.where(honest == 0, honest, honest % np.uint64(self._values) + np.uint64(1))


small_contents = st.lists(st.lists(st.integers(HOLE, 6), max_size=24), min_size=1, max_size=5)


@given(small_contents, st.sampled_from([(), ("all",), ("x=0,1", "y=2"), ("x=0,2",)]), st.integers(2, 5), st.data())
def test_figures_are_those_of_a_session(
    contents: list[list[int]], groups: tuple[str, ...], max_sharers: int, data: st.DataObject
) -> None:
    groups = tuple(spec for spec in groups if len(contents) > 2 or spec == "all")
    sources = [Memory(str(number), pages) for number, pages in enumerate(contents)]
    crippled = data.draw(st.sampled_from([None, 1, 2]))
    with pytest.MonkeyPatch.context() as patch:
        # Small enough that classes go on over batches, pieces and strides.
        patch.setattr(comparing, "_BATCH_PAGES", data.draw(st.integers(1, 9)))
        patch.setattr(tally, "_PIECE_PAGES", data.draw(st.integers(1, 9)))
        found = estimate(
            *sources,
            groups=groups,
            max_sharers=max_sharers,
            fingerprinting=None if crippled is None else lambda _: nullcontext(Crippled(crippled)),
        )
    assert figures_of(found) == session_figures(sources, groups, max_sharers)


def test_a_large_case_agrees_as_well() -> None:
    rng = np.random.default_rng(1)
    sources = [Memory(str(number), rng.zipf(1.3, 4000).clip(0, 900).tolist()) for number in range(3)]
    sources[1].contents[1000:2000] = sources[0].contents[2000:3000]
    for groups in ((), ("all",)):
        found = estimate(*sources, groups=groups)
        assert figures_of(found) == session_figures(sources, groups, 256)
