"""Puts the agent into a QEMU, and takes its mapping out: the only code that stops a guest's process, for under 2 ms.

Runs as a process of its own (``python -m memshr.qemu.injector``, see ``agent.Injector``): it has one thread, as ptrace
needs, it ignores every signal that can be ignored, and it ends what it has begun when its parent dies. Its standard
input is a Unix socket (SOCK_SEQPACKET): a request is ``attach PID NUMBER`` or ``detach PID ADDRESS`` with the control
area's file, an answer is JSON, and the end of the stream is its end.

How a thread of QEMU is borrowed. The main thread is stopped inside a system call (QEMU's waits in ppoll), where its
registers hold nothing that the kernel has not saved and the system call can be started again. **One PTRACE_SETREGS is
the whole commitment:** it points the thread at a ``syscall; ret`` that QEMU's own libraries contain, with the arguments
of the mmap that brings in the agent's code, and with that code's address as the place to return to. From then on the
thread needs nobody: the code makes the agent, gives all registers back and lets the interrupted system call start
again. We watch the mmap to its end only because a failed one must be undone. If we are killed before the commitment,
nothing was changed; after it, the thread goes through by itself.

Taking the mapping out cannot be done by code that lies in it, so there the registers are given back by us, some ten
microseconds later; being killed by SIGKILL just then is the one thing in memshr that can hurt a guest.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import json
import os
import signal
import socket
import struct
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Final, NamedTuple

from memshr.qemu import control_area, syscalls
from memshr.qemu.syscalls import Registers

_SYSCALL_RETURN: Final = b"\x0f\x05\xc3"
_RED_ZONE_BYTES: Final = 128
_RESTARTED: Final = frozenset({-512, -513, -514})
"""-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND (``linux/errno.h``): the call is to be made again as it was"""
_RESTART_BLOCK: Final = -516
"""-ERESTART_RESTARTBLOCK: it is to be continued by restart_syscall"""
_STOP_DEADLINE_S: Final = 2.0
_WITHOUT_FILTER: Final = "start QEMU without -sandbox (libvirt: seccomp_sandbox = 0 in /etc/libvirt/qemu.conf)"
_TRIES: Final = 200
_LOOK_EVERY_S: Final = 0.00005

_CLONE_THREAD: Final = 0x3D0F00
"""CLONE_VM|FS|FILES|SIGHAND|THREAD|SYSVSEM|SETTLS|PARENT_SETTID|CHILD_CLEARTID, as in the agent's code"""

_AGENT_CALLS: Final[Sequence[tuple[int, tuple[int, ...]]]] = (
    (syscalls.NR_MMAP, (0, 4096, 5, syscalls.MAP_SHARED | syscalls.MAP_FIXED_NOREPLACE)),
    (syscalls.NR_MMAP, (0, 4096, 3, syscalls.MAP_SHARED | syscalls.MAP_FIXED_NOREPLACE)),
    (syscalls.NR_MMAP, (0, 4096, 3, syscalls.MAP_PRIVATE | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE)),
    (syscalls.NR_MMAP, (0, 4096, 3, syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED)),
    (syscalls.NR_MUNMAP, (0, 4096)),
    (syscalls.NR_MREMAP, (0, 4096, 4096, syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED)),
    (syscalls.NR_MADVISE, (0, 4096, syscalls.MADV_DONTNEED)),
    (syscalls.NR_MADVISE, (0, 4096, syscalls.MADV_DONTFORK)),
    (syscalls.NR_RT_SIGPROCMASK, (2, 0, 0, 8)),
    (syscalls.NR_CLONE, (_CLONE_THREAD,)),
    (syscalls.NR_FUTEX, (0, 0)),
    (syscalls.NR_FCNTL, (3, syscalls.F_DUPFD_CLOEXEC, 3)),
    (syscalls.NR_FSTAT, (3,)),
    (syscalls.NR_IOCTL, (3, syscalls.USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    if Path("/dev/userfaultfd").exists()
    else (syscalls.NR_USERFAULTFD, (os.O_CLOEXEC,)),
    (syscalls.NR_SENDTO, (3, 0, 1, 0x4000)),
    (syscalls.NR_READ, (3, 0, 1)),
    (syscalls.NR_CLOSE, (3,)),
    (syscalls.NR_PROCESS_VM_READV, (1, 0, 1, 0, 1, 0)),
    (syscalls.NR_EXIT, (0,)),
)
"""Every system call that the agent makes, for the judgement of a seccomp filter."""


class Refused(Exception):
    """The guest cannot be attached; the two arguments are the reason and its remedy."""


# -- stopping a thread -------------------------------------------------------------------------------------------------


def _stop(tid: int) -> None:
    """Seize and stop a thread.

    :raises Refused: it does not stop (it hangs in the kernel), or we may not.
    """
    try:
        syscalls.ptrace_seize(tid)
    except PermissionError as error:
        raise Refused(
            "we may not trace it", "run as root (capability SYS_PTRACE); end a debugger that has it"
        ) from error
    syscalls.ptrace_interrupt(tid)
    end = time.monotonic() + _STOP_DEADLINE_S
    while True:
        pid, status = os.waitpid(tid, syscalls.WALL | os.WNOHANG)
        if pid == 0:
            if time.monotonic() > end:
                # We end soon, and the kernel then lets the thread go whether or not it stopped meanwhile.
                raise Refused("its main thread does not stop", "is the process frozen, or hanging in a disk request?")
            time.sleep(_LOOK_EVERY_S)
            continue
        if not os.WIFSTOPPED(status):
            raise Refused("it has ended", "start it again")
        if status >> 16 == syscalls.PTRACE_EVENT_STOP:
            return
        syscalls.ptrace_resume(syscalls.PTRACE_CONT, tid, os.WSTOPSIG(status))  # a signal of its own comes first


def _wait_syscall_stop(tid: int) -> None:
    while True:
        _, status = os.waitpid(tid, syscalls.WALL)
        if not os.WIFSTOPPED(status):
            raise Refused("it has ended", "start it again")
        number = os.WSTOPSIG(status)
        if number == signal.SIGTRAP | 0x80:
            return
        passed_on = 0 if status >> 16 else number
        syscalls.ptrace_resume(syscalls.PTRACE_SYSCALL, tid, passed_on)


def _stop_in_system_call(tid: int) -> tuple[Registers, Registers]:
    """Stop a thread where it can be borrowed.

    :returns: its registers, and those with which it goes on as if nothing had been.
    """
    for _ in range(_TRIES):
        _stop(tid)
        registers = syscalls.ptrace_get_registers(tid)
        number = _signed(registers.orig_rax)
        if number >= 0:
            onward = Registers.from_buffer_copy(registers)
            result = _signed(registers.rax)
            if result in _RESTARTED or result == _RESTART_BLOCK:
                onward.rip -= len(_SYSCALL_RETURN) - 1  # back onto the syscall instruction
                onward.rax = number if result in _RESTARTED else syscalls.NR_RESTART_SYSCALL
            onward.orig_rax = 2**64 - 1  # whatever comes, the kernel must not restart anything by itself
            return registers, onward
        syscalls.ptrace_resume(syscalls.PTRACE_DETACH, tid)  # it was computing; look again a moment later
        time.sleep(0.0005)
    raise Refused("its main thread is never inside a system call", "try again when it is less busy")


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value


# -- looking for what is needed ----------------------------------------------------------------------------------------


class _Mapping(NamedTuple):
    start: int
    end: int
    permissions: str
    path: str


def _mappings(pid: int) -> list[_Mapping]:
    # /proc/PID/maps, in order of address. Not procfs.process_mappings: see control_area on numpy.
    found = []
    for line in Path(f"/proc/{pid}/maps").read_text(errors="surrogateescape").split("\n")[:-1]:
        addresses, permissions, _, _, _, *path = line.split(maxsplit=5)
        start, end = (int(address, 16) for address in addresses.split("-"))
        found.append(_Mapping(start, end, permissions, "".join(path)))
    return found


def _gadget(pid: int, mappings: Sequence[_Mapping]) -> int:
    """Where some library of the process has ``syscall; ret``."""
    executable = [each for each in mappings if each.permissions[2:] == "xp" and each.path != "[vsyscall]"]
    executable.sort(key=lambda each: ("libc" not in each.path, each.path != "[vdso]"))
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for mapping in executable:
            memory.seek(mapping.start)
            place = memory.read(mapping.end - mapping.start).find(_SYSCALL_RETURN)
            if place >= 0:
                return mapping.start + place
    raise Refused("its program has no instruction sequence to borrow", "nothing; report which QEMU it is")


def _free_address(mappings: Sequence[_Mapping]) -> int:
    """The middle of the largest hole between mappings, where nothing of its own will grow to."""
    gaps = [(after.start - before.end, before.end) for before, after in itertools.pairwise(mappings)]
    # The hole up to [vsyscall] lies in the kernel's half of the address space.
    size, start = max((size, start) for size, start in gaps if start + size < 1 << 47)
    if size < 4 * (control_area.SIDE_OFFSET + control_area.SIDE_BYTES):
        raise Refused("its address space is full", "nothing; report which QEMU it is")
    return (start + size // 2) & ~0x1FFFFF


def _judge_seccomp(tid: int) -> None:
    """Refuse a thread whose seccomp filters forbid a call that the agent makes."""
    status = Path(f"/proc/{tid}/status").read_text()
    if "\nSeccomp:\t0\n" in status:
        return
    programs: list[bytes] = []
    _stop(tid)
    try:
        while (program := syscalls.ptrace_seccomp_filter(tid, len(programs))) is not None:
            programs.append(program)
    except OSError as error:
        raise Refused(
            f"its seccomp filter cannot be read ({error.strerror})", f"{_WITHOUT_FILTER}, or run as root"
        ) from error
    finally:
        syscalls.ptrace_resume(syscalls.PTRACE_DETACH, tid)
    for number, arguments in _AGENT_CALLS:
        for program in programs:
            if run_filter(program, number, arguments) >> 16 not in {0x7FFF, 0x7FFC}:  # allow, log
                raise Refused(f"its seccomp filter forbids system call {number}", _WITHOUT_FILTER)


def run_filter(program: bytes, number: int, arguments: Sequence[int]) -> int:
    """What a seccomp filter answers to a system call: classic BPF over struct seccomp_data, as the kernel runs it.

    An instruction that seccomp does not know gives 0, which is to kill.
    Source: ``linux/seccomp.h``, ``linux/filter.h``.
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
                mode = code & 0xE0
                loaded = {0x00: k, 0x20: data[k // 4] if k < 64 else 0, 0x60: scratch[k % 16], 0x80: 64}.get(mode, 0)
                if code & 0x07:
                    index = loaded
                else:
                    accumulator = loaded
            case 0x02:
                scratch[k % 16] = accumulator
            case 0x03:
                scratch[k % 16] = index
            case 0x04:
                accumulator = _calculate(code & 0xF0, accumulator, operand)
            case 0x05 if code & 0xF0 == 0x00:
                place += k
            case 0x05:
                holds = {
                    0x10: accumulator == operand,
                    0x20: accumulator > operand,
                    0x30: accumulator >= operand,
                    0x40: bool(accumulator & operand),
                }[code & 0xF0]
                place += if_true if holds else if_false
            case 0x06:
                return accumulator if code & 0x18 == 0x10 else k
            case _:
                if code & 0x80:
                    accumulator = index
                else:
                    index = accumulator
    return 0


def _calculate(operation: int, left: int, right: int) -> int:
    results = {
        0x00: left + right,
        0x10: left - right,
        0x20: left * right,
        0x30: left // right if right else 0,
        0x40: left | right,
        0x50: left & right,
        0x60: left << (right & 31),
        0x70: left >> (right & 31),
        0x80: -left,
        0xA0: left ^ right,
    }
    return results[operation] & 0xFFFFFFFF


# -- the two actions ---------------------------------------------------------------------------------------------------


def attach(pid: int, number: int, control: control_area.ControlArea) -> dict[str, object]:
    """Map the control area, which QEMU has as descriptor ``number``, and make the agent thread."""
    _judge_seccomp(pid)
    mappings = _mappings(pid)
    gadget, code_address = _gadget(pid, mappings), _free_address(mappings)
    control.code_address = code_address
    sized = struct.pack("<3Q", control.data_address, control_area.CONTROL_BYTES - control_area.DATA, number)
    control.memory[control_area.PARAMETERS : control_area.PARAMETERS + len(sized)] = sized

    original, onward = _stop_in_system_call(pid)
    registers = struct.pack("<18Q", *(getattr(onward, name) for name in control_area.REGISTER_ORDER))
    control.memory[control_area.PARAMETERS + 0x20 : control_area.PARAMETERS + 0x20 + len(registers)] = registers
    borrowed = Registers.from_buffer_copy(original)
    borrowed.orig_rax = 2**64 - 1
    borrowed.rip = gadget
    # SAFETY: below the red zone the stack belongs to nobody while the thread stands inside a system call.
    borrowed.rsp = (original.rsp - _RED_ZONE_BYTES - 64) & ~0xF
    borrowed.rax, borrowed.rdi, borrowed.rsi = syscalls.NR_MMAP, code_address, control_area.DATA
    borrowed.rdx, borrowed.r8, borrowed.r9 = syscalls.PROT_READ | syscalls.PROT_EXEC, number, 0
    borrowed.r10 = syscalls.MAP_SHARED | syscalls.MAP_FIXED_NOREPLACE
    syscalls.ptrace_poke(pid, borrowed.rsp, code_address)
    syscalls.ptrace_set_registers(pid, borrowed)  # the commitment: from here on it gets through without us
    mapped = _finish_system_call(pid)
    if mapped != code_address:
        syscalls.ptrace_set_registers(pid, onward)
    syscalls.ptrace_resume(syscalls.PTRACE_DETACH, pid)
    if mapped != code_address:
        raise Refused(f"QEMU cannot map the agent ({os.strerror(-mapped)})", "free some of its mappings or memory")

    end = time.monotonic() + _STOP_DEADLINE_S
    while not (tid := control.get(control_area.TID_AT, "<q")[0]):
        if time.monotonic() > end:
            raise Refused("QEMU did not start the agent", "is the process stopped or frozen?")
        time.sleep(0.0002)
    if tid < 0:
        raise Refused(f"QEMU cannot make a thread ({os.strerror(-tid)})", "raise its limit of threads (pids cgroup)")
    return {"code_address": code_address}


def detach(pid: int, code_address: int) -> dict[str, object]:
    """Unmap the control area at ``code_address``; its thread has ended."""
    mappings = _mappings(pid)
    gadget = _gadget(pid, mappings)
    original, onward = _stop_in_system_call(pid)
    borrowed = Registers.from_buffer_copy(original)
    borrowed.orig_rax = 2**64 - 1
    borrowed.rip = gadget
    borrowed.rax, borrowed.rdi, borrowed.rsi = syscalls.NR_MUNMAP, code_address, control_area.CONTROL_BYTES
    syscalls.ptrace_set_registers(pid, borrowed)
    result = _finish_system_call(pid)
    syscalls.ptrace_set_registers(pid, onward)
    syscalls.ptrace_resume(syscalls.PTRACE_DETACH, pid)
    if result != 0:
        raise Refused(f"munmap: {os.strerror(-result)}", "nothing needs to be done")
    return {}


def _finish_system_call(tid: int) -> int:
    # Into the call and out of it.
    for _ in range(2):
        syscalls.ptrace_resume(syscalls.PTRACE_SYSCALL, tid)
        _wait_syscall_stop(tid)
    return _signed(syscalls.ptrace_get_registers(tid).rax)


def answer(request: Sequence[str], file: int) -> dict[str, object]:
    """Do what one request asks for."""
    action, pid, number = request[0], *map(int, request[1:])
    control = control_area.ControlArea(file)
    try:
        return attach(pid, number, control) if action == "attach" else detach(pid, number)
    except Refused as refused:
        return {"refused": refused.args[0], "remedy": refused.args[1]}
    except (ProcessLookupError, FileNotFoundError):
        return {"refused": "it has ended", "remedy": "start it again"}
    finally:
        control.close()


def main() -> None:
    """The program."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(ignored, signal.SIG_IGN)
    gc.disable()
    # On a busy host others would get their turn while the guest's thread stands still; every wait here sleeps.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    with socket.socket(fileno=sys.stdin.fileno()) as wire:
        while True:
            request, files, _, _ = socket.recv_fds(wire, 256, 1)
            if not request:
                return
            wire.send(json.dumps(answer(request.decode().split(), files[0])).encode())


if __name__ == "__main__":
    main()
