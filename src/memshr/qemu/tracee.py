"""A thread of a QEMU that is stopped, does one system call for us, and goes on as if nothing had happened.

Two things make this hard. We may be killed at any instant, and then nobody gives the thread its registers back. And
QEMU may be hostile: it executes another program, a set-uid one, while we are at work on what we take for QEMU.

**Killed at any instant.** The thread is borrowed only where it is stopped inside a system call: its registers hold
nothing there that the kernel has not saved, and the call can be started again. Before any register is set, a frame is
written below its stack, as the kernel writes one for a signal handler, with all that the thread had: registers,
floating point and vectors, signal mask. Then *one* PTRACE_SETREGS points the thread at a ``syscall; ret`` of QEMU's own
libraries, with the stack such that the ``ret`` leads to the C library's way back from a signal handler: it calls
rt_sigreturn, and the kernel gives everything back from the frame. So wherever we die, the thread does the system call
and then goes on by itself. (A call that the kernel would continue by its restart block, such as a poll with a time
limit, then starts again from the beginning, so it waits at most once more. That is the whole difference.) As long as we
live, the thread never gets that far: it stops again at the end of the system call, and we set its registers.

**Another program.** The thread is seized first and checked then, in this order, so nothing slips between:

* The thread itself cannot execute anything while it is stopped. When it runs, an exec is a stop of its own
  (PTRACE_O_TRACEEXEC) before the first instruction of the new program, and we let it go untouched.
* When another thread executes a program, the kernel ends all others, ours too, and the new program takes over the pid,
  *without being traced*: every later ptrace call fails with ESRCH.
* The memory is read and written through /proc/PID/mem, opened after the thread has stopped and before the identity is
  checked: the open file stands for that address space, whatever the process executes later.

So once the identity has been checked, we set registers and memory of that very program or of nothing. What other
threads of QEMU do meanwhile to their own memory (the borrowed instructions, the frame, the descriptors) can only make
QEMU run its own code with its own rights.

Every wait has a deadline. A thread that is running and does not stop cannot be let go by ptrace, only by our end, and
neither can one that was killed: ``Stuck`` says so, and the injector ends after it.

Sources: ptrace(2); the kernel's ``arch/x86/kernel/signal_64.c`` (rt_sigreturn, struct rt_sigframe),
``asm/sigcontext.h`` (struct sigcontext_64, struct _fpx_sw_bytes), ``fs/exec.c`` (de_thread), ``kernel/ptrace.c``.
"""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import struct
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO, Final, NamedTuple

from memshr.qemu import syscalls
from memshr.qemu.identity import Identity
from memshr.qemu.syscalls import Registers

STOP_DEADLINE_S: Final = 2.0
"""for all that is waited for while a thread is borrowed"""

_SYSCALL_RETURN: Final = b"\x0f\x05\xc3"
_SYSCALL_BYTES: Final = 2
_RETURN_FROM_SIGNAL: Final = (b"\x48\xc7\xc0\x0f\x00\x00\x00\x0f\x05", b"\xb8\x0f\x00\x00\x00\x0f\x05")
"""``mov $15, %rax; syscall``, as glibc and musl have it, and its shorter form"""
_RED_ZONE_BYTES: Final = 128
_NO_CALL: Final = 2**64 - 1
"""orig_rax of a thread for which the kernel must not restart anything by itself"""
_RESTARTED: Final = frozenset({-512, -513, -514})
"""-ERESTARTSYS, -ERESTARTNOINTR, -ERESTARTNOHAND (``linux/errno.h``): the call is to be made again as it was"""
_RESTART_BLOCK: Final = -516
"""-ERESTART_RESTARTBLOCK: it is to be continued by restart_syscall"""
_USER_CODE: Final = 0x33
"""cs of 64-bit code (``asm/segment.h``: __USER_CS)"""
_BETWEEN_TRIES_S: Final = 0.0005

_SEARCH_PIECE_BYTES: Final = 1 << 20
_SEARCH_MOST_BYTES: Final = 1 << 28
_MAPS_MOST_LINES: Final = 1 << 17
"""twice the usual limit of mappings; each line is read for itself, so memory is bounded too"""
_LINE_MOST_BYTES: Final = 1 << 14
"""a path has at most 4096 bytes, and the kernel writes some of them as four"""

# struct rt_sigframe, from the address to return to: ucontext (flags, link, stack), sigcontext, mask.
_FRAME: Final = struct.Struct("<Q QQ QiiQ 18Q 4H 4Q Q 64x Q")
_FRAME_REGISTERS: Final = (
    *("r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rdi", "rsi", "rbp", "rbx", "rdx", "rax", "rcx", "rsp", "rip", "eflags"),
)
_FRAME_FLAGS: Final = 7
"""UC_FP_XSTATE, UC_SIGCONTEXT_SS, UC_STRICT_RESTORE_SS (``asm/ucontext.h``)"""
_NO_SIGNAL_STACK: Final = 7
"""no valid value for the flags of a signal stack: sigaltstack refuses it, rt_sigreturn does not mind, and so the
thread keeps the one that it has"""
_SOFTWARE_BYTES_AT: Final = 464
_XSTATE_BV_AT: Final = 512
_LEAST_XSTATE_BYTES: Final = 576
_FP_XSTATE_MAGIC1: Final = 0x46505853
_FP_XSTATE_MAGIC2: Final = 0x46505845
_TILE_DATA: Final = 1 << 18
_TILE_DATA_AT: Final = 2816


class Refused(Exception):
    """The guest cannot be attached; the two arguments are the reason and its remedy."""


class Stuck(Refused):
    """It cannot, and we must end now, because nothing else lets a thread go that we have seized."""


def ended() -> Refused:
    """What to say of a process that is not there any more, or not as the program that it was."""
    return Refused("it has ended, or runs another program now", "start it again")


# -- looking for what is needed ----------------------------------------------------------------------------------------


class Vma(NamedTuple):
    """One line of /proc/PID/maps."""

    start: int
    end: int
    permissions: str
    path: str


def mappings(pid: int) -> Iterator[Vma]:
    """The lines of /proc/PID/maps, in order of address. Not procfs.process_mappings: see ``control_area`` on numpy.

    :raises Refused: there are too many.
    :raises OSError: the process is gone, or we may not look into it.
    """
    with Path(f"/proc/{pid}/maps").open("rb") as maps:
        for _ in range(_MAPS_MOST_LINES):
            line = maps.readline(_LINE_MOST_BYTES)
            if not line:
                return
            addresses, permissions, _offset, _device, _inode, *path = line.split(maxsplit=5)
            start, end = (int(address, 16) for address in addresses.split(b"-"))
            yield Vma(start, end, permissions.decode(), os.fsdecode(b"".join(path).rstrip(b"\n")))
    raise Refused("it has too many mappings", "nothing; report which QEMU it is")


class Program(NamedTuple):
    """What a program offers to who borrows its thread, found while it runs.

    ``syscall_return`` is where it has ``syscall; ret``, ``return_from_signal`` where it has the C library's way back
    from a signal handler.
    """

    mappings: Sequence[Vma]
    syscall_return: int
    return_from_signal: int


def look_at(pid: int) -> Program:
    """Look for the instructions in the code of a process, in its C library first.

    :raises Refused: it does not have them, or cannot return through an address of ours.
    :raises OSError: the process is gone, or we may not look into it.
    """
    if b"shstk" in Path(f"/proc/{pid}/status").read_bytes().partition(b"x86_Thread_features:")[2].partition(b"\n")[0]:
        raise Refused("it runs with a shadow stack", "start QEMU with GLIBC_TUNABLES=glibc.cpu.x86_shstk=off")
    found = list(mappings(pid))
    executable = [each for each in found if each.permissions[2:] == "xp" and each.path != "[vsyscall]"]
    executable.sort(key=lambda each: ("libc" not in each.path, each.path != "[vdso]"))
    syscall_return = return_from_signal = 0
    with Path(f"/proc/{pid}/mem").open("rb", buffering=0) as memory:
        for start, piece in _pieces(memory, executable):
            if not syscall_return and (place := piece.find(_SYSCALL_RETURN)) >= 0:
                syscall_return = start + place
            for form in _RETURN_FROM_SIGNAL:
                if not return_from_signal and (place := piece.find(form)) >= 0:
                    return_from_signal = start + place
            if syscall_return and return_from_signal:
                return Program(found, syscall_return, return_from_signal)
    raise Refused("its program has no instruction sequence to borrow", "nothing; report which QEMU it is")


def _pieces(memory: BinaryIO, found: Sequence[Vma]) -> Iterator[tuple[int, bytes]]:
    # Pieces of these mappings that overlap by a sequence's length; as many as are worth a search.
    searched_bytes = 0
    for mapping in found:
        for start in range(mapping.start, mapping.end, _SEARCH_PIECE_BYTES):
            if searched_bytes > _SEARCH_MOST_BYTES:
                return
            memory.seek(start)
            try:
                piece = memory.read(min(mapping.end - start, _SEARCH_PIECE_BYTES + len(_RETURN_FROM_SIGNAL[0])))
            except OSError:  # nothing is behind this mapping: a file that became shorter, a device
                break
            searched_bytes += len(piece)
            yield start, piece


# -- a stopped thread --------------------------------------------------------------------------------------------------


class Tracee:
    """The main thread of a process, seized by us until ``close``.

    ``is_free`` says that it is not seized any more. A thread that was killed stays seized, and its parent does not hear
    of its end before we let it go.

    :param end: when (time.monotonic) every wait for it ends.
    :raises Refused: we may not trace it.
    :raises OSError: there is no such process.
    """

    def __init__(self, pid: int, end: float) -> None:
        self.pid = pid
        self._end = end
        self._original = Registers()
        self._memory = -1
        self._stands = False
        self.is_free = False
        try:
            syscalls.ptrace_seize(pid)
        except PermissionError as error:
            raise Refused(
                "we may not trace it", "run as root (capability SYS_PTRACE); end a debugger that has it"
            ) from error

    def stop(self) -> None:
        """Stop it.

        :raises Stuck: it does not stop (it hangs in the kernel).
        :raises Refused: it is stopped already, by a SIGSTOP; it executed another program; it has ended.
        """
        syscalls.ptrace_interrupt(self.pid)
        while True:
            status = self._next_stop("its main thread does not stop")
            number = os.WSTOPSIG(status)
            if status >> 16 == syscalls.PTRACE_EVENT_STOP:
                if number != signal.SIGTRAP:
                    raise Refused("it is stopped", "is the process stopped or frozen? continue it (kill -CONT)")
                return
            self._resume(syscalls.PTRACE_CONT, 0 if status >> 16 else number)  # a signal of its own comes first

    def _next_stop(self, reason: str) -> int:
        # Wait until the running thread stops for whatever reason; returns its status. The kernel sends its tracer
        # SIGCHLD, which ``injector.main`` blocks, so one that comes before we wait for it is not lost.
        while True:
            try:
                found, status = os.waitpid(self.pid, syscalls.WALL | os.WNOHANG)
            except ChildProcessError as error:
                # Another thread of it executed a program, which took over the pid and is not traced.
                raise ended() from error
            if found:
                break
            left_s = self._end - time.monotonic()
            if left_s <= 0:
                raise Stuck(reason, "is the process frozen, or hanging in a disk request?")
            signal.sigtimedwait({signal.SIGCHLD}, left_s)
        if not os.WIFSTOPPED(status):
            raise ended()
        self._stands = True
        if status >> 16 == syscalls.PTRACE_EVENT_EXEC:
            raise ended()
        return status

    def _resume(self, request: int, signal_number: int = 0) -> None:
        self._stands = False
        syscalls.ptrace_resume(request, self.pid, signal_number)
        self.is_free = request == syscalls.PTRACE_DETACH

    def check(self, identity: Identity) -> None:
        """Open the memory of the stopped thread and make sure that it runs the very program that is meant.

        What is set or written afterwards is that program's, or fails.

        :raises Refused: it runs another one.
        """
        # SAFETY: the memory is opened first. If an exec comes before that, the identity does not hold; if it comes
        # later, the file stands for an address space that is gone.
        self._memory = os.open(f"/proc/{self.pid}/mem", os.O_RDWR | os.O_CLOEXEC)
        if not identity.still_holds():
            raise ended()

    def is_in_system_call(self) -> bool:
        """Note the registers of the stopped thread; returns whether it stands where it can be borrowed."""
        self._original = syscalls.ptrace_get_registers(self.pid)
        return _signed(self._original.orig_rax) >= 0 and self._original.cs == _USER_CODE

    @property
    def onward(self) -> Registers:
        """The registers with which it goes on as if nothing had been."""
        return _restarting(self._original, syscalls.NR_RESTART_SYSCALL)

    def call(self, program: Program, number: int, arguments: Sequence[int]) -> int:
        """Have it do one system call. At the end of it it stands again; ``run`` or ``go_on`` must follow.

        :returns: the call's result.
        :raises Interrupted: a signal came first; the thread went on as if nothing had been.
        """
        address, frame = self._signal_frame(program)
        self._write(address, frame)
        borrowed = Registers.from_buffer_copy(self._original)
        borrowed.orig_rax = _NO_CALL
        borrowed.rip = program.syscall_return
        borrowed.rsp = address
        borrowed.rax = number
        for name, value in zip(("rdi", "rsi", "rdx", "r10", "r8", "r9"), arguments, strict=False):
            setattr(borrowed, name, value)
        # SAFETY: ``check`` holds. From here on the thread does the call and goes on even if we are gone.
        syscalls.ptrace_set_registers(self.pid, borrowed)
        registers = borrowed
        for _ in range(2):  # into the call and out of it
            self._resume(syscalls.PTRACE_SYSCALL)
            status = self._next_stop("its main thread does not come back from a system call")
            if status >> 16 or os.WSTOPSIG(status) != signal.SIGTRAP | 0x80:
                # A signal, or SIGSTOP, came before the call was begun. With the registers that the thread had, the
                # kernel does what it would have done: it ends the interrupted system call or starts it again.
                syscalls.ptrace_set_registers(self.pid, self._original)
                self._resume(syscalls.PTRACE_DETACH, 0 if status >> 16 else os.WSTOPSIG(status))
                raise Interrupted
            registers = syscalls.ptrace_get_registers(self.pid)
            if (registers.rip, registers.orig_rax) != (program.syscall_return + _SYSCALL_BYTES, number):
                raise Refused("its program was changed while we were at it", "it is no honest QEMU")
        return _signed(registers.rax)

    def _signal_frame(self, program: Program) -> tuple[int, bytes]:
        # What rt_sigreturn makes the thread's state of, and the address where it belongs.
        try:
            state = bytearray(syscalls.ptrace_get_extended_state(self.pid))
        except OSError as error:
            if error.errno != errno.ENODEV:
                raise
            raise Refused("this processor has no XSAVE", "share on a host that has it") from error
        features, in_use = (struct.unpack_from("<Q", state, at)[0] for at in (_SOFTWARE_BYTES_AT, _XSTATE_BV_AT))
        if features & _TILE_DATA and not in_use & _TILE_DATA:
            # The kernel takes no frame that is longer than what the thread may use: without leave no tiles (AMX).
            features, state = features & ~_TILE_DATA, state[:_TILE_DATA_AT]
        software = (_FP_XSTATE_MAGIC1, len(state) + 4, features, len(state))
        struct.pack_into("<IIQI28x", state, _SOFTWARE_BYTES_AT, *software)
        state += struct.pack("<I", _FP_XSTATE_MAGIC2)
        end = self._original.rsp - _RED_ZONE_BYTES
        state_address = (end - len(state)) & ~63
        address = (state_address - _FRAME.size) & ~15
        if not any(_can_hold_stack(each, address, end) for each in program.mappings):
            raise Refused("its main thread has no stack left", "try again")
        onward = _restarting(self._original, self._original.orig_rax)
        frame = _FRAME.pack(
            *(program.return_from_signal, _FRAME_FLAGS, 0, 0, _NO_SIGNAL_STACK, 0, 0),
            *(getattr(onward, name) for name in _FRAME_REGISTERS),
            *(onward.cs, 0, 0, onward.ss, 0, 0, 0, 0, state_address, syscalls.ptrace_get_signal_mask(self.pid)),
        )
        return address, frame.ljust(state_address - address, b"\0") + state

    def _write(self, address: int, content: bytes) -> None:
        # SAFETY: only below the red zone, where the stack belongs to nobody while the thread is in a system call.
        try:
            written = os.pwrite(self._memory, content, address)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            raise Refused("its main thread has no stack left", "try again") from error
        if not written:
            raise ended()  # the address space is gone
        if written != len(content):
            raise Refused("its main thread has no stack left", "try again")

    def holds(self, address: int, content: bytes) -> bool:
        """Whether these bytes are at ``address``."""
        try:
            return os.pread(self._memory, len(content), address) == content
        except OSError:
            return False

    def run(self, address: int) -> None:
        """Let the thread go into code at ``address``; the stack below its red zone is the code's."""
        registers = Registers.from_buffer_copy(self._original)
        registers.orig_rax = _NO_CALL
        registers.rip = address
        registers.rsp = (registers.rsp - _RED_ZONE_BYTES) & ~15
        # SAFETY: ``check`` holds, and the caller has made sure that this code gives the registers back.
        syscalls.ptrace_set_registers(self.pid, registers)

    def go_on(self) -> None:
        """Give the thread its registers back after ``call``: it starts the interrupted system call again."""
        syscalls.ptrace_set_registers(self.pid, self.onward)

    def close(self) -> None:
        """Let it go if it stands still; ``is_free`` then says whether it is."""
        if self._stands:
            with contextlib.suppress(ProcessLookupError):  # it was killed meanwhile
                self._resume(syscalls.PTRACE_DETACH)
        if self._memory >= 0:
            os.close(self._memory)


class Interrupted(Exception):
    """A signal came before the thread had begun its call."""


@contextlib.contextmanager
def seized(pid: int, end: float) -> Iterator[Tracee]:
    """A stopped main thread, let go at the end.

    :raises Refused: as ``Tracee.stop``.
    :raises Stuck: it does not let itself be let go: it runs, or was killed.
    """
    tracee = Tracee(pid, end)
    reason, remedy = ended().args
    try:
        with contextlib.closing(tracee):
            tracee.stop()
            yield tracee
    except Refused as refused:
        reason, remedy = refused.args
        if tracee.is_free:
            raise
    except (ProcessLookupError, FileNotFoundError):
        if tracee.is_free:
            raise
    if not tracee.is_free:
        raise Stuck(reason, remedy)


@contextlib.contextmanager
def borrowed(identity: Identity) -> Iterator[Tracee]:
    """The main thread of this very program, stopped where it can do a system call for us; let go at the end.

    :raises Refused: it is another program now; it does not stop, or never in a system call.
    """
    end = time.monotonic() + STOP_DEADLINE_S
    while time.monotonic() < end:
        with seized(identity.pid, end) as tracee:
            if tracee.is_in_system_call():
                tracee.check(identity)
                yield tracee
                return
        time.sleep(_BETWEEN_TRIES_S)  # it was computing; look again a moment later
    raise Refused("its main thread is never inside a system call", "try again when it is less busy")


def _can_hold_stack(mapping: Vma, start: int, end: int) -> bool:
    # The main stack grows by itself when it is written to.
    return (
        mapping.permissions[:2] == "rw"
        and mapping.start < end <= mapping.end
        and (mapping.start <= start or mapping.path == "[stack]")
    )


def _restarting(original: Registers, continuing: int) -> Registers:
    # The registers with which the interrupted system call starts again; ``continuing`` is the call that continues one
    # that has a restart block.
    onward = Registers.from_buffer_copy(original)
    result = _signed(original.rax)
    if result in _RESTARTED or result == _RESTART_BLOCK:
        onward.rip -= _SYSCALL_BYTES
        onward.rax = original.orig_rax if result in _RESTARTED else continuing
    onward.orig_rax = _NO_CALL
    return onward


def _signed(value: int) -> int:
    return value - (1 << 64) if value >> 63 else value
