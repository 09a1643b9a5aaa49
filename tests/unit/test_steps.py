"""Agents of several guests at work at the same time."""

import select
import socket
from collections.abc import Iterator
from typing import Any, cast

import pytest

from memshr.qemu.agent import AgentLink
from memshr.qemu.attachment import Steps, carry_out


class Posted:
    """Stands for a link that has posted a table: what ``carry_out`` looks at, and nothing else."""

    def __init__(self, rest_s: float = 60.0) -> None:
        self.rest_s = rest_s
        self._ours, self._theirs = socket.socketpair()

    def fileno(self) -> int:
        """Readable once the agent has answered."""
        return self._ours.fileno()

    def answer(self) -> None:
        """As the agent does."""
        self._theirs.send(b"\1")

    def take(self) -> None:
        """As await_answer does."""
        self._ours.recv(64)

    def close(self) -> None:
        """Both ends."""
        self._ours.close()
        self._theirs.close()


@pytest.fixture
def links() -> Iterator[list[Posted]]:
    """Four of them."""
    made = [Posted() for _ in range(4)]
    yield made
    for each in made:
        each.close()


def waiting_for(link: Posted) -> AgentLink:
    return cast(AgentLink, link)


def test_every_table_is_posted_before_the_first_answer_is_awaited(links: list[Posted]) -> None:
    seen: list[str] = []

    def work(name: str, link: Posted, tables: int) -> Steps:
        for number in range(tables):
            seen.append(f"post {name}{number}")
            link.answer()
            yield waiting_for(link)
            link.take()
            seen.append(f"answer {name}{number}")
        return tables

    a, b, c, _ = links
    assert carry_out([work("a", a, 2), work("b", b, 1), work("c", c, 0)]) == [2, 1, 0]
    assert seen[:2] == ["post a0", "post b0"]
    assert sorted(seen[2:4]) in (["answer a0", "post a1"], ["answer a0", "answer b0"], ["answer b0", "post a1"])
    assert len(seen) == 6


def test_nobody_waits_for_the_agent_of_another(links: list[Posted]) -> None:
    """The first has not answered; the second goes on, and it is the second that lets the first answer."""
    first, second, *_ = links
    seen: list[str] = []

    def slow() -> Steps:
        yield waiting_for(first)
        first.take()
        seen.append("slow")
        return 1

    def quick() -> Steps:
        for _ in range(3):
            second.answer()
            yield waiting_for(second)
            second.take()
        seen.append("quick")
        first.answer()
        return 3

    assert carry_out([slow(), quick()]) == [1, 3]
    assert seen == ["quick", "slow"]


def test_work_goes_on_when_the_time_for_an_answer_is_over(links: list[Posted]) -> None:
    """What that means is for whoever waits to say; here nothing hangs."""
    silent = links[0]
    silent.rest_s = 0.0

    def work() -> Steps:
        yield waiting_for(silent)
        return 7

    assert carry_out([work()]) == [7]


def test_those_under_way_are_told_when_waiting_itself_fails(
    links: list[Posted], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever their tables do then, nobody will note it."""
    told: list[str] = []

    def work(name: str, link: Posted) -> Steps:
        try:
            yield waiting_for(link)
        except GeneratorExit:
            told.append(name)
            raise
        return 1

    class Fails:
        """Stands for select.poll."""

        def register(self, *_: object) -> None:
            """As poll."""

        def poll(self, _: float) -> None:
            """As poll."""
            raise MemoryError

    monkeypatch.setattr(select, "poll", Fails)
    with pytest.raises(MemoryError):
        carry_out([work("a", links[0]), work("b", links[1])])
    assert told == ["a", "b"]


def test_work_of_others_is_done_when_one_fails(links: list[Posted]) -> None:
    done: list[str] = []

    def work(name: str, link: Posted, error: type[BaseException] | None) -> Steps:
        link.answer()
        yield waiting_for(link)
        link.take()
        if error is not None:
            raise error(name)
        link.answer()
        yield waiting_for(link)
        done.append(name)
        return 1

    errors: list[Any] = [None, KeyboardInterrupt, None, None]
    works = [work(str(at), link, error) for at, (link, error) in enumerate(zip(links, errors, strict=True))]
    with pytest.raises(KeyboardInterrupt, match="1"):
        carry_out(works)
    assert sorted(done) == ["0", "2", "3"]
