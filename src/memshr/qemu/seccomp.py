"""Whether the seccomp filters of a QEMU let the agent's system calls pass.

A call that a filter forbids may kill QEMU. So the filters are run, as the kernel would run them, before the agent is
put in. If they forbid a call that the agent needs, the guest is refused. Calls that serve only some guests or hosts are
noted, and whoever would make one asks first.

This module does without numpy: see ``control_area``.

Source: ``linux/seccomp.h``, ``linux/filter.h``, the kernel's ``kernel/seccomp.c`` (seccomp_check_filter).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Final, TypeAlias

from memshr.qemu import syscalls

_CLONE_THREAD: Final = 0x3D0F00
"""CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|SETTLS|PARENT_SETTID|CHILD_CLEARTID, as in the agent's code"""

Call: TypeAlias = tuple[int, tuple[int, ...]]
"""number and arguments of a system call"""

NEEDED_CALLS: Final[Sequence[Call]] = (
    (syscalls.NR_MMAP, (0, 4096, 5, syscalls.MAP_SHARED | syscalls.MAP_FIXED_NOREPLACE)),
    (syscalls.NR_MMAP, (0, 4096, 3, syscalls.MAP_SHARED | syscalls.MAP_FIXED_NOREPLACE)),
    (syscalls.NR_MMAP, (0, 4096, 3, syscalls.MAP_PRIVATE | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE)),
    (syscalls.NR_MMAP, (0, 4096, 3, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED)),
    (syscalls.NR_MUNMAP, (0, 4096)),
    (syscalls.NR_MREMAP, (0, 4096, 4096, syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED)),
    (syscalls.NR_MADVISE, (0, 4096, syscalls.MADV_DONTNEED)),
    (syscalls.NR_MADVISE, (0, 4096, syscalls.MADV_DONTFORK)),
    (syscalls.NR_RT_SIGPROCMASK, (2, 0, 0, 8)),
    (syscalls.NR_RT_SIGRETURN, ()),
    (syscalls.NR_CLONE, (_CLONE_THREAD,)),
    (syscalls.NR_FUTEX, (0, 0)),
    (syscalls.NR_FCNTL, (3, syscalls.F_DUPFD_CLOEXEC, 3)),
    (syscalls.NR_FSTAT, (3,)),
    (syscalls.NR_IOCTL, (3, syscalls.USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    if Path("/dev/userfaultfd").exists()
    else (syscalls.NR_USERFAULTFD, (os.O_CLOEXEC,)),
    (syscalls.NR_RECVMSG, (3, 0, 0)),
    (syscalls.NR_SENDTO, (3, 0, 1, 0x4000)),
    (syscalls.NR_READ, (3, 0, 1)),
    (syscalls.NR_PREAD64, (3, 0, 4096, 0)),
    (syscalls.NR_CLOSE, (3,)),
    (syscalls.NR_PROCESS_VM_READV, (1, 0, 1, 0, 1, 0)),
    (syscalls.NR_EXIT, (0,)),
)
"""Every system call without which the agent is of no use, and those by which its thread is borrowed."""

OPTIONAL_CALLS: Final[Sequence[Call]] = (
    (syscalls.NR_MADVISE, (0, 4096, syscalls.MADV_UNMERGEABLE)),
    (syscalls.NR_MADVISE, (0, 4096, syscalls.MADV_MERGEABLE)),
    (syscalls.NR_PRCTL, (syscalls.PR_SET_MEMORY_MERGE, 0, 0, 0, 0)),
    (syscalls.NR_PRCTL, (syscalls.PR_GET_MEMORY_MERGE, 0, 0, 0, 0)),
    (syscalls.NR_MBIND, (0, 4096, 2, 0, 64, 0)),
    (syscalls.NR_GET_MEMPOLICY, (0, 0, 0, 0, 2)),
)
"""System calls that serve guests under KSM, or with memory that is bound to NUMA nodes."""

_ALLOWING: Final = frozenset({0x7FFF, 0x7FFC})
"""SECCOMP_RET_ALLOW and SECCOMP_RET_LOG"""


def forbidden(programs: Sequence[bytes], calls: Sequence[Call]) -> list[int]:
    """The numbers of those ``calls`` that one of the filters does not let pass, each once, in order."""
    return sorted(
        {
            number
            for number, arguments in calls
            if any(run_filter(program, number, arguments) >> 16 not in _ALLOWING for program in programs)
        }
    )


def run_filter(program: bytes, number: int, arguments: Sequence[int]) -> int:
    """What a seccomp filter answers to a system call: classic BPF over struct seccomp_data, as the kernel runs it.

    It always ends, because jumps lead forward only. An instruction that seccomp does not know gives 0, which is to
    kill; so do a division by zero and running past the end.
    """
    values = [*arguments, *[0] * (6 - len(arguments))]
    data = struct.unpack("<16I", struct.pack("<IIQ6Q", number, 0xC000003E, 0, *values))
    accumulator = index = 0
    scratch = [0] * 16
    place = 0
    instructions = list(struct.iter_unpack("<HBBI", program))
    while place < len(instructions):
        code, if_true, if_false, k = instructions[place]
        place += 1
        operand = index if code & 0x08 else k
        match code & 0x07:
            case 0x00 | 0x01:  # load into A, X
                match code & 0xE0:
                    case 0x00:
                        loaded = k
                    case 0x20 if k < 64:
                        loaded = data[k // 4]
                    case 0x60 if k < 16:
                        loaded = scratch[k]
                    case 0x80:
                        loaded = 64
                    case _:
                        return 0
                if code & 0x07:
                    index = loaded
                else:
                    accumulator = loaded
            case 0x02 if k < 16:
                scratch[k] = accumulator
            case 0x03 if k < 16:
                scratch[k] = index
            case 0x04:
                calculated = _calculate(code & 0xF0, accumulator, operand)
                if calculated is None:
                    return 0
                accumulator = calculated
            case 0x05:
                match code & 0xF0:
                    case 0x00:
                        place += k
                        continue
                    case 0x10:
                        holds = accumulator == operand
                    case 0x20:
                        holds = accumulator > operand
                    case 0x30:
                        holds = accumulator >= operand
                    case 0x40:
                        holds = bool(accumulator & operand)
                    case _:
                        return 0
                place += if_true if holds else if_false
            case 0x06:
                return accumulator if code & 0x18 == 0x10 else k
            case 0x07:
                if code & 0x80:
                    accumulator = index
                else:
                    index = accumulator
            case _:
                return 0
    return 0


def _calculate(operation: int, left: int, right: int) -> int | None:
    match operation:
        case 0x00:
            result = left + right
        case 0x10:
            result = left - right
        case 0x20:
            result = left * right
        case 0x30:
            if right == 0:
                return None
            result = left // right
        case 0x40:
            result = left | right
        case 0x50:
            result = left & right
        case 0x60:
            result = left << (right & 31)
        case 0x70:
            result = left >> (right & 31)
        case 0x80:
            result = -left
        case 0xA0:
            result = left ^ right
        case _:
            return None
    return result & 0xFFFFFFFF
