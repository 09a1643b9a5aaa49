"""Candidates: classes of equal fingerprint, found without a look at single pages."""

from __future__ import annotations

import tracemalloc
from collections import defaultdict

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from memshr.content import classes as candidates
from memshr.content.classes import classify, one_of_each, refined, repeated

ALIKE = 5 << 60
"""Fingerprints that begin like each other: a sort by their top bits alone does not tell them apart."""

fingerprint_lists = st.lists(
    st.one_of(st.integers(0, 5), st.integers(ALIKE, ALIKE + 3), st.integers(0, 2**64 - 1)), max_size=60
)


@given(fingerprint_lists)
def test_classes_are_what_a_dictionary_finds(values: list[int]) -> None:
    expected = defaultdict(list)
    for row, value in enumerate(values):
        expected[value].append(row)
    found = classify(np.array(values, dtype=np.uint64))
    by_class = defaultdict(list)
    for row, number in zip(found.rows.tolist(), found.classes.tolist(), strict=True):
        by_class[number].append(row)
    zeros = expected.pop(0, [])
    assert list(by_class.values()) == [rows for rows in [zeros, *expected.values()] if len(rows) > 1]
    assert list(by_class) == list(range(len(by_class)))
    assert (np.diff(found.classes) >= 0).all()


@given(fingerprint_lists)
def test_repeated_names_each_fingerprint_that_comes_twice(values: list[int]) -> None:
    assert repeated(np.array(values, dtype=np.uint64)).tolist() == [values.count(value) > 1 for value in values]


def test_strides_do_not_cut_a_class(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(candidates, "_STRIDE", 3)
    values = np.array([7] * 4 + [1] * 3 + [5] + [9] * 5, dtype=np.uint64)
    assert classify(values).classes.tolist() == [0] * 4 + [1] * 3 + [2] * 5
    assert repeated(values).tolist() == [value != 5 for value in values.tolist()]


def test_memory_is_bounded_for_each_page() -> None:
    distinct = np.random.default_rng(1).integers(1, 2**64, 1 << 19, dtype=np.uint64)
    fingerprints = np.concatenate([distinct, distinct[::-1]])
    tracemalloc.start()
    found = classify(fingerprints)
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert len(found) == 1 << 20
    assert peak <= 32 << 20


def test_one_row_of_each_class_and_key() -> None:
    assert one_of_each(np.array([0, 0, 0, 1, 1]), np.array([7, 7, 9, 7, 8])).tolist() == [0, 2, 3, 4]
    assert one_of_each(np.array([1, 0, 1, 0]), np.array([3, 3, 2, 3])).tolist() == [1, 2, 0]


def test_classes_are_divided_by_a_second_key() -> None:
    rows, classes = refined(np.array([0, 0, 0, 1, 1]), np.array([5, 6, 5, 5, 5]))
    assert (rows.tolist(), classes.tolist()) == ([0, 2, 3, 4], [0, 0, 1, 1])
    rows, classes = refined(np.array([0, 0]), np.array([1, 2]))
    assert (rows.tolist(), classes.tolist()) == ([], [])
