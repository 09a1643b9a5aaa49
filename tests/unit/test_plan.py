"""Who goes onto whose frame: the example of the docstring, and what holds for any batch."""

from collections import Counter

import numpy as np
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from memshr.sharing.plan import who_goes_where


def planned(frames: list[str], domids: list[int], classes: list[int], max_sharers: int) -> list[int]:
    """The plan for pages. ``-`` is a fresh one; others are on the frame of that name, whose sharers are all here."""
    names = [name if name != "-" else f"fresh {page}" for page, name in enumerate(frames)]
    handles = np.array([1 + sorted(set(names)).index(name) for name in names], np.uint64)
    sharers = Counter(names)

    def sharers_of(pages: NDArray[np.intp]) -> NDArray[np.int64]:
        return np.array([sharers[names[page]] for page in pages.tolist()], np.int64)

    fresh = np.array([name == "-" for name in frames])
    found = who_goes_where(handles, fresh, np.array(domids, np.uint16), np.array(classes), max_sharers, sharers_of)
    return [int(page) for page in found]


def test_the_example_of_the_docstring() -> None:
    assert planned(list("AAB----"), [1] * 7, [0] * 7, 4) == [0, 1, 0, 0, 4, 4, 4]


def test_old_frames_fill_bins_the_larger_first() -> None:
    assert planned(list("AABCCD"), [1] * 6, [0] * 6, 4) == [0, 1, 2, 0, 4, 2]


def test_fresh_pages_take_the_room_of_old_frames_in_order() -> None:
    assert planned(list("AAABB-----"), [1, 1, 1, 2, 3, 1, 1, 1, 1, 1], [0] * 10, 4) == [0, 1, 2, 3, 4, 3, 3, 0, 8, 8]


def test_a_frame_of_several_domains_never_joins_another() -> None:
    assert planned(list("AABB"), [1, 2, 1, 2], [0] * 4, 8) == [0, 1, 2, 3]


def test_fresh_pages_alone_are_led_by_the_first_of_each_class() -> None:
    assert planned(list("-----"), [1] * 5, [3, 3, 3, 5, 5], 2) == [0, 0, 2, 3, 3]


@given(
    st.lists(st.tuples(st.sampled_from("-ABCDE"), st.integers(1, 3)), min_size=1, max_size=14),
    st.integers(2, 5),
)
def test_no_plan_breaks_a_rule(pages: list[tuple[str, int]], max_sharers: int) -> None:
    # A frame holds one content, so frames A, B belong to class 0, the others to class 1; fresh pages to either.
    pages = [
        (frame, domid)
        for frame, domid in pages
        if Counter(name for name, _ in pages)[frame] <= max_sharers or frame == "-"
    ]
    rows = sorted(
        ((0 if frame in "AB" or (frame == "-" and number % 2) else 1), frame, domid)
        for number, (frame, domid) in enumerate(pages)
    )
    if not rows:
        return
    classes = [row[0] for row in rows]
    frames = [row[1] for row in rows]
    domids = [row[2] for row in rows]
    goes_onto = planned(frames, domids, classes, max_sharers)
    names = [name if name != "-" else f"fresh {page}" for page, name in enumerate(frames)]
    ends_on = {name: name for name in names}
    for page, target in enumerate(goes_onto):
        assert classes[page] == classes[target]
        if target != page:
            ends_on[names[page]] = names[target]
            assert len({domids[each] for each, name in enumerate(names) if name == names[page]}) == 1, (
                "a client of one domain"
            )
            assert goes_onto[target] == target, "a leader stays"
    load = Counter(ends_on[name] for name in names)
    assert max(load.values()) <= max_sharers
