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

from memshr.content.fingerprint import Fingerprinter, Fingerprints
from memshr.embedded import EmbeddedHypervisor
from memshr.errors import MemshrError
from memshr.estimation import compare, count
from memshr.estimation.analysis import EstimateOptions, EstimateProgress, analyse
from memshr.estimation.result import DomainEstimate, Estimate
from memshr.indices import Row, of_kind
from memshr.pagesource import PageState, Rows, Subject
from memshr.sharing.session import SharingOptions, share
from memshr.trust import trust_groups
from memshr.types import PAGE_SIZE, Extent, Gfn, PageBytes

MAPPINGS = 63_482
"""What a domain may have, where a test does not say how many."""

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
        return self.read(of_kind(Row, np.arange(first_row, first_row + len(out))), out)

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
        EstimateOptions(**{"mappings": MAPPINGS} | options, groups=groups),  # type: ignore[arg-type]  # figures only
        new_seed=lambda: 7,
        wait=wait,
        **({"fingerprinting": fingerprinting} if fingerprinting else {}),  # type: ignore[arg-type]  # only if one is given
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
    assert found.achievable is not None
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
    report = share(host, trust_groups(host.names(), groups, lambda: 5), wait=lambda _: None, options=options)
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
        patch.setattr(compare, "_BATCH_PAGES", data.draw(st.integers(1, 9)))
        patch.setattr(count, "_PIECE_PAGES", data.draw(st.integers(1, 9)))
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


# -- live sources ----------------------------------------------------------------------------------------------------


def test_pages_that_change_between_the_samples_are_volatile() -> None:
    source = Memory("a", [1, 1, 2, 3, 0, 0, 4, 5, 5, 5], live=True)
    waited: list[float] = []

    def meanwhile(seconds: float) -> None:
        waited.append(seconds)
        source.contents[1] = 77  # one of two equal pages
        source.contents[4] = 78  # a zero page
        source.contents[7] = 79  # the first of three equal pages: the others are equal all the same

    found = estimate(source, wait=meanwhile)
    assert waited == [1.0]
    assert found.method.samples_s == 1.0
    assert found.dropped == {"volatile": 3, "not_sharable": 0, "max_sharers": 0}
    assert (found.zero_pages, found.shared_pages, found.intra_pages, found.unique_pages) == (1, 2, 1, 4)
    assert found.collisions == 0


def test_only_what_could_be_shared_is_read_twice() -> None:
    source = Memory("a", [1, 1, 2, 3, 0, HOLE, ABSENT], live=True)
    found = estimate(source)
    assert source.rows_read == {0: 3, 1: 2, 2: 1, 3: 1, 4: 2}  # and what is guessed at, once more
    assert found.method.pages_read == 8


def test_images_wait_for_nothing_and_holes_are_not_read() -> None:
    def never(_: float) -> None:
        pytest.fail("images have no second sample")

    source = Memory("a", [HOLE, 1, 0, HOLE, 2, ABSENT])
    found = estimate(source, wait=never)
    assert found.method.samples_s is None
    assert (found.hole_pages, found.zero_pages, found.absent_pages, found.unique_pages) == (2, 3, 1, 2)
    assert {0, 3, 5} & set(source.rows_read) == set()


def test_pages_that_cannot_be_read_are_told() -> None:
    found = estimate(Memory("a", [1, UNREADABLE, 1, UNREADABLE, 0]), Memory("b", [1, UNREADABLE]), groups=["all"])
    assert [domain.dropped["not_sharable"] for domain in found.domains] == [2, 1]
    assert (found.intra_pages, found.inter_pages, found.zero_pages) == (1, 1, 1)


def test_a_page_that_can_no_longer_be_read_when_it_is_compared() -> None:
    source = Memory("a", [1, 1, 1, 2], live=True)
    found = estimate(source, wait=lambda _: source.contents.__setitem__(0, UNREADABLE))
    assert found.dropped["not_sharable"] == 1
    assert (found.shared_pages, found.unique_pages) == (2, 1)


def test_an_image_that_changes_is_refused() -> None:
    source = Memory("disk.raw", [1, 1, 2])

    def change(row: int) -> None:
        if row == 1 and source.rows_read[1]:
            source.contents[1] = 9

    source.before_read = change
    with pytest.raises(MemshrError, match=r"disk\.raw: its contents changed while it was read"):
        estimate(source)


def test_an_error_in_a_thread_is_the_error() -> None:
    source = Memory("a", [1, 2] * 3000)

    def fail(row: int) -> None:
        if row == 4000:
            raise MemshrError("the process is gone")

    source.before_read = fail
    with pytest.raises(MemshrError, match="the process is gone"):
        estimate(source, threads=3)


def test_the_rate_is_kept() -> None:
    now = 0.0

    def wait(seconds: float) -> None:
        nonlocal now
        now += seconds

    pages = 10240
    analyse(
        [Subject(Memory("a", [HOLE] * 100 + list(range(1, pages + 1))))],
        EstimateOptions(MAPPINGS, rate_bytes_per_s=1 << 20, threads=1),
        new_seed=lambda: 1,
        clock=lambda: now,
        wait=wait,
    )
    assert 35.9 <= now <= 40  # 40 MiB at 1 MiB a second; the last piece of 4 MiB is not waited for


# -- limits ----------------------------------------------------------------------------------------------------------


def test_runs_on_consecutive_frames_are_one_mapping() -> None:
    # Two runs of 4 pages, which are the same frames in the same order, amid pages of their own; and two pages alone.
    contents = [50, 1, 2, 3, 4, 51, 1, 2, 3, 4, 52, 9, 53, 9, 0]
    found = estimate(Memory("a", contents))
    assert found.achievable is not None
    assert found.domains[0].mappings == 2 * 4  # each run is a mapping and cuts one in two
    assert (found.achievable.mappings, found.achievable.saved_pages) == (8, found.saved_pages)
    assert found.saved_pages == 4 + 1 + 1


def test_longest_runs_first_where_mappings_are_short() -> None:
    contents = [50, 1, 2, 3, 4, 51, 1, 2, 3, 4, 52, 9, 53, 9, 0]
    found = estimate(Memory("a", contents), mappings=5)
    assert found.achievable is not None
    assert (found.achievable.mappings, found.achievable.saved_pages) == (4, 4 + 1)
    assert found.achievable.mapping_budget_pages_lost == 1
    assert found.domains[0].mappings == 8
    none = estimate(Memory("a", contents), mappings=0).achievable
    assert none is not None
    assert (none.mappings, none.saved_pages) == (0, 1)  # the zero page needs none


def test_runs_that_touch_cut_nothing() -> None:
    # 1 2 and 2 1: the second is two runs, since the frames go backwards.
    found = estimate(Memory("a", [1, 2, 2, 1]))
    assert found.domains[0].mappings == 3 + 1
    apart = Memory("b", [1, 2, 1, 2])
    apart.ranges = np.array([[0, 2], [100, 2]], np.int64)
    assert estimate(apart).domains[0].mappings == 2 * 2


def test_huge_pages_of_images_are_a_question() -> None:
    # Aligned 2 MiB: one all zeros, one with a copy in it, one untouched; and 100 pages that fill no huge page.
    contents = [0] * 512 + [7] * 2 + list(range(100, 610)) + list(range(1100, 1612)) + [7, 0, *range(5000, 5098)]
    found = estimate(Memory("a", contents))
    assert found.achievable is not None
    assert found.domains[0].huge_pages is None
    assert (found.achievable.huge_pages_known, found.achievable.split_huge_pages) == (False, 1)
    assert found.saved_pages == 512 + 1 + 2
    assert found.achievable.huge_pages_only == 512 + 1
    shifted = estimate(Memory("b", contents, first_gfn=1)).achievable
    assert shifted is not None
    # 511 zeros fill no huge page, nor does the end; the last of 512 zeros lies with the copies.
    assert (shifted.split_huge_pages, shifted.huge_pages_only) == (1, 512)


def test_huge_pages_that_are_known() -> None:
    source = Memory("a", [7, 7, *range(100, 610), 7, 7, *range(1100, 1610)], live=True)
    source.huge = set(range(512))
    found = estimate(source, huge_pages_known=True)
    assert found.achievable is not None
    assert found.domains[0].huge_pages == 512
    assert (found.achievable.huge_pages_known, found.achievable.split_huge_pages) == (True, 1)
    assert (found.saved_pages, found.achievable.huge_pages_only) == (3, 1)


def test_absent_pages_make_no_huge_page() -> None:
    contents = [7, 7, ABSENT, *range(100, 609)]
    found = estimate(Memory("a", contents)).achievable
    assert found is not None
    assert (found.split_huge_pages, found.huge_pages_only) == (0, 1)


# -- the rest of the breakdown ---------------------------------------------------------------------------------------


def test_what_trust_groups_cost() -> None:
    sources = [Memory(name, [1, 2, 3, 0]) for name in "abc"]
    apart = estimate(*sources)
    assert (apart.inter_pages, apart.between_groups_pages) == (0, 6)
    pair = estimate(*sources, groups=["x=a,b"])
    assert (pair.inter_pages, pair.between_groups_pages) == (3, 3)
    assert [(each.names, each.group, each.contents) for each in pair.pairs] == [
        (("a", "b"), "x", 3),
        (("a", "c"), None, 3),
        (("b", "c"), None, 3),
    ]
    together = estimate(*sources, groups=["all"])
    assert (together.inter_pages, together.between_groups_pages) == (6, 0)
    limited = estimate(*sources, groups=["all"], max_sharers=2)
    assert (limited.dropped["max_sharers"], limited.saved_pages) == (3, 3 + 6 - 3)


def test_contents_that_save_most_come_first() -> None:
    found = estimate(Memory("a", [9, 1, 1, 1, 0, 0]), Memory("b", [1, 2, 2]), groups=["all"])
    assert [(each.copies, each.domains, each.saved_pages) for each in found.contents] == [
        (4, 2, 3),
        (2, 1, 2),
        (2, 1, 1),
    ]
    assert [(each.first.domid, each.first.gfn) for each in found.contents] == [(1, 1), (1, 4), (2, 1)]
    assert found.contents[1].guess == "zero page"


def test_only_the_best_contents_are_named() -> None:
    contents = [content for content in range(1, 60) for _ in range(content)]
    found = estimate(Memory("a", contents)).contents
    assert [each.copies for each in found] == list(range(59, 39, -1))


def test_bands_of_copies() -> None:
    contents = [content for content, copies in enumerate([1, 2, 3, 4, 7, 8, 1100], start=1) for _ in range(copies)]
    found = estimate(Memory("a", contents), max_sharers=4096)
    bands = {(band.copies_from, band.copies_to): (band.contents, band.pages) for band in found.copies if band.contents}
    assert bands == {(2, 2): (1, 2), (3, 3): (1, 3), (4, 7): (2, 11), (8, 15): (1, 8), (1024, None): (1, 1100)}


def test_gfns_of_ranges_apart() -> None:
    source = Memory("a", [1, 2, 3, 3])
    source.ranges = np.array([[16, 3], [1 << 30, 1]], np.int64)
    (content,) = estimate(source).contents
    assert (content.first.domid, content.first.gfn) == (1, 18)


def test_nothing_at_all() -> None:
    assert estimate(Memory("a", []), Memory("b", [ABSENT])).saved_pages == 0
    assert estimate().total_pages == 0


def test_progress_ends_where_it_said() -> None:
    seen: list[EstimateProgress] = []
    options = EstimateOptions(MAPPINGS, threads=1)
    source = Memory("a", [1, 1, 2] * 2000)
    analyse([Subject(source)], options, new_seed=lambda: 1, progress=seen.append)
    for phase in ("look", "compare"):
        ours = [each for each in seen if each.phase == phase]
        assert ours[-1].done_pages == ours[-1].total_pages == 6000


@pytest.mark.parametrize("options", [{"max_sharers": 1}, {"mappings": -1}, {"interval_s": -1}, {"rate_bytes_per_s": 0}])
def test_options_that_make_no_sense(options: dict[str, int]) -> None:
    with pytest.raises(MemshrError):
        EstimateOptions(**{"mappings": MAPPINGS} | options)  # type: ignore[arg-type]  # what is tested


def test_arrow_tables_have_the_figures_of_the_json() -> None:
    found = estimate(Memory("a", [1, 1, 2, 0]), Memory("b", [1, 2]), groups=["all"])
    plain = found.to_dict()
    tables = found.to_arrow()
    assert {name: table.to_pylist() for name, table in tables.items()} == {
        name: plain[name] for name in ("domains", "pairs", "contents", "copies", "groups")
    }
    empty = estimate().to_arrow()["domains"]
    assert (empty.num_rows, empty.column_names[:2]) == (0, ["domid", "name"])
