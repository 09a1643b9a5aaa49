"""Ctrl-C and SIGTERM, put off."""

import signal
import threading
from collections.abc import Iterator
from types import FrameType

import pytest

from memshr.qemu.interrupts import uninterrupted


@pytest.fixture
def arrived() -> Iterator[list[int]]:
    """Signals whose handler has run."""
    seen: list[int] = []

    def note(number: int, _: FrameType | None) -> None:
        seen.append(number)

    before = {number: signal.signal(number, note) for number in (signal.SIGINT, signal.SIGTERM)}
    yield seen
    for number, handler in before.items():
        signal.signal(number, handler)


def test_signals_are_delivered_at_the_end(arrived: list[int]) -> None:
    with uninterrupted():
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
        assert arrived == []
    assert arrived == [signal.SIGINT, signal.SIGTERM]
    signal.raise_signal(signal.SIGINT)
    assert len(arrived) == 3


def test_ctrl_c_comes_after_what_it_must_not_interrupt() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    done: list[str] = []

    def interrupted() -> None:
        with uninterrupted():
            signal.raise_signal(signal.SIGINT)
            done.append("all of it")

    try:
        with pytest.raises(KeyboardInterrupt):
            interrupted()
    finally:
        signal.signal(signal.SIGINT, before)
    assert done == ["all of it"]


def test_handlers_are_put_back_also_after_an_exception(arrived: list[int]) -> None:
    handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)]
    with pytest.raises(ValueError, match="inside"), uninterrupted():
        raise ValueError("inside")
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)] == handlers
    assert arrived == []


def test_other_threads_are_as_they_were() -> None:
    entered = threading.Event()

    def enter() -> None:
        with uninterrupted():
            entered.set()

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert entered.is_set()
