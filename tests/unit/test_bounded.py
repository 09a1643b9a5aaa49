"""Calls with a deadline."""

import threading

import pytest

from memshr.qemu.bounded import Bounded, StuckError


def test_what_a_call_returns_or_raises() -> None:
    bounded = Bounded("counting")
    assert [bounded.call(lambda: 3), bounded.call(lambda: 4)] == [3, 4]

    def fails() -> int:
        raise OSError(14, "bad address")

    with pytest.raises(OSError, match="bad address"):
        bounded.call(fails)
    assert bounded.call(lambda: 5) == 5
    bounded.close()


def test_a_call_that_does_not_return_is_given_up_and_the_next_one_waits_for_it() -> None:
    bounded = Bounded("reading guest web (7)", deadline_s=0.05)
    release = threading.Event()

    def blocks() -> int:
        release.wait()
        return 1

    for _ in range(2):
        with pytest.raises(StuckError, match=r"reading guest web \(7\) does not end.*leave this guest out"):
            bounded.call(blocks)
    release.set()
    bounded.deadline_s = 60.0
    assert bounded.call(lambda: 2) == 2, "not the answer of the call that was given up"
    bounded.close()
