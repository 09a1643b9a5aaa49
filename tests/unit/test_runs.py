"""Runs, held against a loop that anybody can read."""

from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshr import runs

numbers = st.lists(st.integers(0, 5), max_size=12)


def by_loop(count: int, belongs: list[bool]) -> list[int]:
    """The edges, when ``belongs[i]`` says whether element i + 1 goes on with element i."""
    return [0, *(i + 1 for i in range(count - 1) if not belongs[i]), *([count] if count else [])]


@given(numbers)
def test_runs_of_equal_values(values: list[int]) -> None:
    array = np.array(values, np.int64)
    pairs = list(pairwise(values))
    expected = by_loop(len(values), [a == b for a, b in pairs])
    assert runs.alike(array).tolist() == expected
    assert np.flatnonzero(runs.run_starts(array)).tolist() == expected[:-1]


@given(numbers, st.integers(1, 3))
def test_jumps(values: list[int], step: int) -> None:
    expected = [b - a != step for a, b in pairwise(values)]
    assert runs.jumps(np.array(values, np.int64), step).tolist() == expected


@given(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 3)), max_size=12))
def test_runs_of_consecutive_numbers(rows: list[tuple[int, int]]) -> None:
    one, other = (np.array([row[side] for row in rows], np.int64) for side in (0, 1))
    belongs = [b[0] == a[0] + 1 and b[1] == a[1] + 1 for a, b in pairwise(rows)]
    edges = runs.consecutive(one, other)
    assert edges.tolist() == by_loop(len(rows), belongs)
    assert [list(range(len(rows)))[part] for part in runs.slices(edges)] == [
        list(range(begin, end)) for begin, end in pairwise(edges.tolist())
    ]


@given(st.lists(st.booleans(), max_size=12))
def test_runs_of_true(mask: list[bool]) -> None:
    found = runs.true_runs(np.array(mask, np.bool_))
    covered = np.zeros(len(mask), np.bool_)
    for begin, end in found.tolist():
        assert begin < end
        assert begin == 0 or not mask[begin - 1]
        assert end == len(mask) or not mask[end]
        covered[begin:end] = True
    assert covered.tolist() == mask


@pytest.mark.parametrize("dtype", [np.uint64, np.int32])
def test_numbers_of_any_dtype(dtype: type[np.integer]) -> None:
    assert runs.consecutive(np.array([4, 5, 6, 9, 10, 20], dtype)).tolist() == [0, 3, 5, 6]


@given(st.lists(st.tuples(st.integers(0, 50), st.integers(0, 4)), max_size=6))
def test_members_of_ranges(ranges: list[tuple[int, int]]) -> None:
    firsts, counts = (np.array([each[side] for each in ranges], np.int64) for side in (0, 1))
    assert runs.range_members(firsts, counts).tolist() == [first + at for first, count in ranges for at in range(count)]


@given(st.sets(st.integers(0, 30)))
def test_ranges_that_touch_are_joined(members: set[int]) -> None:
    pieces = [[number, number + 1] for number in sorted(members, key=lambda number: number * 7 % 31)]
    found = runs.joined_ranges(np.array(pieces, np.int64).reshape(-1, 2))
    mask = np.zeros(32, np.bool_)
    mask[list(members)] = True
    expected = runs.true_runs(mask)
    assert found.tolist() == [[begin, end - begin] for begin, end in expected.tolist()]
