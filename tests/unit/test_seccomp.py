"""Seccomp filters are judged as the kernel runs them, also those that somebody hostile wrote."""

import struct

import pytest

from memshr.qemu import seccomp, syscalls
from memshr.qemu.seccomp import run_filter

ALLOW, ERRNO = 0x7FFF0000, 0x00050001
LOAD_NUMBER = (0x20, 0, 0, 0)
RETURN_A = (0x16, 0, 0, 0)


def program(*instructions: tuple[int, int, int, int]) -> bytes:
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)


def allowing_but(number: int) -> bytes:
    return program(LOAD_NUMBER, (0x15, 0, 1, number), (0x06, 0, 0, ERRNO), (0x06, 0, 0, ALLOW))


@pytest.mark.parametrize(("number", "answer"), [(310, ERRNO), (9, ALLOW), (0, ALLOW)])
def test_filters_are_judged_as_the_kernel_does(number: int, answer: int) -> None:
    assert run_filter(allowing_but(310), number, ()) == answer


@pytest.mark.parametrize(
    ("instructions", "answer"),
    [
        ([(0x00, 0, 0, 7), (0x34, 0, 0, 2), RETURN_A], 3),  # A = 7 / 2
        ([(0x00, 0, 0, 7), (0x01, 0, 0, 2), (0x3C, 0, 0, 0), RETURN_A], 3),  # the same by X
        ([(0x00, 0, 0, 7), (0x01, 0, 0, 0), (0x3C, 0, 0, 0), (0x06, 0, 0, ALLOW)], 0),  # by zero: it kills
        ([(0x00, 0, 0, 1), (0x64, 0, 0, 33), RETURN_A], 2),  # a shift counts modulo 32
        ([(0x00, 0, 0, 0), (0x84, 0, 0, 0), (0x14, 0, 0, 1), RETURN_A], 0xFFFFFFFF),
        ([(0x02, 0, 0, 0), (0x00, 0, 0, 5), (0x02, 0, 0, 15), (0x61, 0, 0, 15), (0x87, 0, 0, 0), RETURN_A], 5),
        ([(0x80, 0, 0, 0), RETURN_A], 64),
        ([(0x05, 0, 0, 1), (0x06, 0, 0, ERRNO), (0x06, 0, 0, ALLOW)], ALLOW),
        ([(0x05, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, ALLOW)], 0),  # a jump beyond the end
        ([(0x20, 0, 0, 64), (0x06, 0, 0, ALLOW)], 0),  # a load from beyond the data
        ([(0x60, 0, 0, 16), (0x06, 0, 0, ALLOW)], 0),  # from beyond the memory, and into it
        ([(0x02, 0, 0, 0xFFFFFFFF), (0x06, 0, 0, ALLOW)], 0),
        ([(0x94, 0, 0, 3), (0x06, 0, 0, ALLOW)], 0),  # MOD, which seccomp does not know
        ([(0x55, 0, 0, 3), (0x06, 0, 0, ALLOW)], 0),
        ([(0x40, 0, 0, 0), (0x06, 0, 0, ALLOW)], 0),
        ([], 0),
    ],
)
def test_each_kind_of_instruction(instructions: list[tuple[int, int, int, int]], answer: int) -> None:
    assert run_filter(program(*instructions), 0, ()) == answer


def test_the_longest_filter_ends() -> None:
    longest = program(*[(0x04, 0, 0, 1)] * 4094, RETURN_A)
    assert run_filter(longest, 0, ()) == 4094


def test_calls_that_are_forbidden_are_named_once() -> None:
    both = [allowing_but(syscalls.NR_MBIND), allowing_but(syscalls.NR_MADVISE)]
    assert seccomp.forbidden(both, seccomp.OPTIONAL_CALLS) == [syscalls.NR_MADVISE, syscalls.NR_MBIND]
    assert seccomp.forbidden(both, seccomp.NEEDED_CALLS) == [syscalls.NR_MADVISE]
    assert seccomp.forbidden([], seccomp.NEEDED_CALLS) == []
