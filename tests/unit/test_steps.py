"""Agents of several guests at work at the same time."""

import pytest

from memshr.qemu.attachment import Steps, carry_out


def test_every_table_is_posted_before_the_first_answer_is_awaited() -> None:
    seen: list[str] = []

    def work(name: str, tables: int) -> Steps:
        for number in range(tables):
            seen.append(f"post {name}{number}")
            yield
            seen.append(f"answer {name}{number}")
        return tables

    assert carry_out([work("a", 2), work("b", 1), work("c", 0)]) == [2, 1, 0]
    assert seen == ["post a0", "post b0", "answer a0", "post a1", "answer b0", "answer a1"]


def test_work_of_others_is_done_when_one_fails() -> None:
    done: list[str] = []

    def work(name: str, error: type[BaseException] | None) -> Steps:
        yield
        if error is not None:
            raise error(name)
        yield
        done.append(name)
        return 1

    works = [work("first", None), work("second", KeyboardInterrupt), work("third", OSError), work("fourth", None)]
    with pytest.raises(KeyboardInterrupt, match="second"):
        carry_out(works)
    assert done == ["first", "fourth"]
