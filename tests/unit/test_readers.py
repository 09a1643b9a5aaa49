"""The threads that read: when one fails, or we are interrupted, the others stop."""

import signal
import threading
from collections.abc import Callable

import pytest

from memshr.estimation.readers import Readers

TASKS = 3000
THREADS = 3
MOMENT_S = 0.001
"""what a task takes: all of them together, some seconds; those that are under way when one fails, next to nothing"""


def run(work: Callable[[int, int], None], threads: int = THREADS) -> None:
    """Tasks with the number of the thread, counted as they come."""
    numbers = iter(range(threads))
    Readers(threads, clock=lambda: 0.0, wait=lambda _: None).run(range(TASKS), work, lambda: next(numbers))


@pytest.mark.parametrize("failing", range(THREADS))
def test_an_error_in_one_thread_stops_the_others(failing: int) -> None:
    """Whichever it is: we wait for them one after the other, and must not wait for one that reads all that is left."""
    all_at_work = threading.Barrier(THREADS, timeout=10)
    begun = threading.local()
    never = threading.Event()
    done: list[int] = []

    def work(task: int, thread: int) -> None:
        if not getattr(begun, "yes", False):
            begun.yes = True
            all_at_work.wait()
            if thread == failing:
                raise OSError("the disk is gone")
        never.wait(MOMENT_S)
        done.append(task)

    with pytest.raises(OSError, match="the disk is gone"):
        run(work)
    assert len(done) < TASKS - THREADS


@pytest.mark.parametrize("when", [0, 30])
def test_ctrl_c_stops_all_threads(when: int) -> None:
    """With the first task we may not have started all threads yet."""
    never = threading.Event()
    done: list[int] = []

    def work(task: int, _: int) -> None:
        if task == when:
            signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
        never.wait(MOMENT_S)
        done.append(task)

    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores it
    try:
        with pytest.raises(KeyboardInterrupt):
            run(work)
    finally:
        signal.signal(signal.SIGINT, before)
    assert len(done) < TASKS


@pytest.mark.parametrize("threads", [1, 2])
def test_every_task_is_done_once(threads: int) -> None:
    done: list[int] = []
    run(lambda task, _: done.append(task), threads)
    assert sorted(done) == list(range(TASKS))
