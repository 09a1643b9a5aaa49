"""Puts the agent into a QEMU, and takes its mapping out: the only code that stops a guest's process, for under 2 ms.

Runs as a process of its own, see ``injection``: it has one thread, as ptrace needs, it ignores every signal that can be
ignored, and it ends what it has begun when its parent dies. Its standard input is a Unix socket (SOCK_SEQPACKET): a
request is ``attach IDENTITY NUMBER``, ``detach IDENTITY ADDRESS`` or ``judge IDENTITY 0``, with the control area's file
as a descriptor; an answer is JSON; the end of the stream is its end. It believes nothing that QEMU can write: the file
is read and written by calls that give an error where it has become shorter.

``tracee`` says how a thread is borrowed: killed at any instant, we leave it going on as if nothing had been, and what
is not the program that our parent has looked at never gets a register set. **attach** has the thread map the file. At
the end of that system call the thread stands still, and what lies at the address must be our file with our code; then
the thread is pointed at the code, which makes the agent, gives all registers back and lets the interrupted system call
start again. If we are killed before that, a mapping without a thread stays; the next memshr finds it and takes it out.
**detach** has the thread unmap it.
"""

from __future__ import annotations

import contextlib
import errno
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
from typing import Final

from memshr.qemu import control_area, seccomp, syscalls
from memshr.qemu.identity import Identity
from memshr.qemu.tracee import (
    STOP_DEADLINE_S,
    Interrupted,
    Refused,
    Stuck,
    Vma,
    borrowed,
    ended,
    look_at,
    mappings,
    seized,
)

REQUEST_DEADLINE_S: Final = 8.0
"""An alarm ends us when a request takes longer: QEMU can make a read of its memory last for ever."""
REQUEST_MOST_BYTES: Final = 1 << 14

_WITHOUT_FILTER: Final = "start QEMU without -sandbox (libvirt: seccomp_sandbox = 0 in /etc/libvirt/qemu.conf)"
_TRIES: Final = 5
_LOOK_EVERY_S: Final = 0.0002


def judge(identity: Identity) -> list[int]:
    """Which optional calls the thread's seccomp filters forbid (``seccomp``), by number.

    :raises Refused: they forbid a call that the agent needs, or cannot be read.
    """
    status = Path(f"/proc/{identity.pid}/status").read_text(errors="surrogateescape")
    if "\nSeccomp:\t0\n" in status:
        return []  # and who attaches checks the identity
    programs: list[bytes] = []
    with seized(identity.pid, time.monotonic() + STOP_DEADLINE_S) as tracee:
        tracee.check(identity)
        try:
            while (program := syscalls.ptrace_seccomp_filter(identity.pid, len(programs))) is not None:
                programs.append(program)
        except OSError as error:
            raise Refused(
                f"its seccomp filter cannot be read ({error.strerror})", f"{_WITHOUT_FILTER}, or run as root"
            ) from error
    if needed := seccomp.forbidden(programs, seccomp.NEEDED_CALLS):
        raise Refused(f"its seccomp filter forbids system call {needed[0]}", _WITHOUT_FILTER)
    return seccomp.forbidden(programs, seccomp.OPTIONAL_CALLS)


def attach(identity: Identity, number: int, control: int) -> dict[str, object]:
    """Map the control area ``control``, which QEMU has as descriptor ``number``, and make the agent thread.

    :raises Refused: QEMU is not the program that we mean, the descriptor is not that file, or QEMU is not able to.
    """
    forbidden = judge(identity)
    program = look_at(identity.pid)
    code_address = _free_address(program.mappings)
    parameters = (code_address + control_area.DATA, control_area.CONTROL_BYTES - control_area.DATA, number)
    _write(control, control_area.PARAMETERS, struct.pack("<3Q", *parameters))
    arguments = (
        *(code_address, control_area.DATA, syscalls.PROT_READ | syscalls.PROT_EXEC),
        *(syscalls.MAP_SHARED | syscalls.MAP_FIXED_NOREPLACE, number, 0),
    )
    with borrowed(identity) as tracee:
        if not _is_descriptor(identity.pid, number, control):
            raise Refused("the descriptor that it names is not our file", "it is no honest QEMU")
        registers = [getattr(tracee.onward, name) for name in control_area.REGISTER_ORDER]
        _write(control, control_area.PARAMETERS + 0x20, struct.pack("<18Q", *registers))
        mapped = tracee.call(program, syscalls.NR_MMAP, arguments)
        # SAFETY: another thread may have put another file at that number since; the code must be what we run.
        ours = mapped == code_address and _is_mapped(identity.pid, code_address, control)
        if ours and tracee.holds(code_address, control_area.CODE):
            tracee.run(code_address)
        else:
            tracee.go_on()
            ours = False
    if not ours:
        if -4096 < mapped < 0:
            raise Refused(f"QEMU cannot map the agent ({os.strerror(-mapped)})", "free some of its mappings or memory")
        raise Refused("what it has mapped is not our file", "it is no honest QEMU")
    tid = _started(control)
    if tid < 0:
        raise Refused(f"QEMU cannot make a thread ({os.strerror(-tid)})", "raise its limit of threads (pids cgroup)")
    return {"code_address": code_address, "forbidden": forbidden}


def _started(control: int) -> int:
    # The number of the agent's thread, or a negative errno.
    end = time.monotonic() + STOP_DEADLINE_S
    while True:
        word = os.pread(control, 8, control_area.DATA + control_area.TID_AT)
        tid = int.from_bytes(word, "little", signed=True)
        if tid:
            return tid
        if time.monotonic() > end:
            raise Refused("QEMU did not start the agent", "is the process stopped or frozen?")
        time.sleep(_LOOK_EVERY_S)


def detach(identity: Identity, code_address: int, control: int) -> dict[str, object]:
    """Unmap the control area ``control`` at ``code_address``; its thread has ended.

    :raises Refused: QEMU is not the program that we mean, has something else there, or cannot be stopped.
    """
    program = look_at(identity.pid)
    with borrowed(identity) as tracee:
        if not _is_mapped(identity.pid, code_address, control):
            raise Refused("our mapping is not where it was", "it is no honest QEMU")
        result = tracee.call(program, syscalls.NR_MUNMAP, (code_address, control_area.CONTROL_BYTES))
        tracee.go_on()
    if result != 0:
        raise Refused(f"munmap: {os.strerror(-result)}", "nothing needs to be done")
    return {}


def _write(control: int, offset: int, content: bytes) -> None:
    if os.pwrite(control, content, offset) != len(content):
        raise Refused("the control area is too short", "it is no honest QEMU")


def _is_descriptor(pid: int, number: int, control: int) -> bool:
    """Whether ``number`` is, in a process that is stopped and was checked, the file ``control``."""
    pidfd = os.pidfd_open(pid)
    try:
        copy = syscalls.pidfd_getfd(pidfd, number)
    except OSError as error:
        if error.errno != errno.EBADF:
            raise
        return False
    finally:
        os.close(pidfd)
    try:
        return os.path.samestat(os.fstat(copy), os.fstat(control))
    finally:
        os.close(copy)


def _is_mapped(pid: int, code_address: int, control: int) -> bool:
    """Whether the file ``control`` is executable at ``code_address``, and nothing else where its data would be."""
    end = code_address + control_area.CONTROL_BYTES
    own = os.fstat(control)
    executable = False
    for each in mappings(pid):
        if each.end <= code_address:
            continue
        if each.start >= end:
            break
        executable |= each.start == code_address and each.permissions == "r-xs"
        try:
            found = Path(f"/proc/{pid}/map_files/{each.start:x}-{each.end:x}").stat()
        except FileNotFoundError:  # anonymous memory, or changed meanwhile
            return False
        if each.start < code_address or each.end > end or not os.path.samestat(found, own):
            return False
    return executable


def _free_address(found: Sequence[Vma]) -> int:
    """The middle of the largest hole between mappings, where nothing of its own will grow to."""
    gaps = [(after.start - before.end, before.end) for before, after in itertools.pairwise(found)]
    # The hole up to [vsyscall] lies in the kernel's half of the address space.
    size, start = max(((size, start) for size, start in gaps if start + size < 1 << 47), default=(0, 0))
    if size < 4 * (control_area.SIDE_OFFSET + control_area.SIDE_BYTES):
        raise Refused("its address space is full", "nothing; report which QEMU it is")
    return (start + size // 2) & ~0x1FFFFF


def answer(request: str, control: int) -> dict[str, object]:
    """Do what one request asks for; the answer has ``stuck`` if we must end now."""
    action, text, number = request.split()
    identity = Identity.parse(text)
    for _ in range(_TRIES):
        try:
            match action:
                case "judge":
                    return {"forbidden": judge(identity)}
                case "attach":
                    return attach(identity, int(number), control)
                case "detach":
                    return detach(identity, int(number), control)
                case _:
                    raise ValueError(f"no such request: {action}")
        except Interrupted:
            continue
        except Refused as refused:
            return {"refused": refused.args[0], "remedy": refused.args[1], "stuck": isinstance(refused, Stuck)}
        except (ProcessLookupError, FileNotFoundError):
            reason, remedy = ended().args
            return {"refused": reason, "remedy": remedy, "stuck": False}
    return {"refused": "signals keep its main thread busy", "remedy": "try again", "stuck": False}


def main() -> None:
    """The program."""
    for ignored in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT, signal.SIGPIPE, signal.SIGTSTP):
        signal.signal(ignored, signal.SIG_IGN)
    for kept in (signal.SIGCHLD, signal.SIGALRM):  # whoever started us may have ignored them
        signal.signal(kept, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, {signal.SIGCHLD})
    gc.disable()
    # On a busy host others would get their turn while the guest's thread stands still; every wait here sleeps.
    with contextlib.suppress(OSError):
        os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(1))
    with socket.socket(fileno=sys.stdin.fileno()) as wire:
        while True:
            request, files, _, _ = socket.recv_fds(wire, REQUEST_MOST_BYTES, 1)
            if not request:
                return
            signal.setitimer(signal.ITIMER_REAL, REQUEST_DEADLINE_S)
            said = answer(request.decode(), files[0])
            signal.setitimer(signal.ITIMER_REAL, 0)
            os.close(files[0])
            wire.send(json.dumps(said).encode())
            if said.get("stuck"):
                return


if __name__ == "__main__":
    main()
