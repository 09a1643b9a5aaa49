"""System calls that Python has no name for, each once: numbers, structures and the header that they come from.

Everything here is for x86-64 Linux. A call that fails raises OSError with the kernel's errno. The caller says what that
means; nothing here decides anything.

Sources (Linux 6.1 headers, stable ABI): ``asm/unistd_64.h``, ``asm-generic/mman-common.h``, ``linux/mman.h``,
``linux/userfaultfd.h``, ``linux/ptrace.h``, ``asm/ptrace.h`` (struct user_regs_struct), ``linux/futex.h``,
``linux/memfd.h``, ``linux/fcntl.h``, ``linux/openat2.h``, ``linux/prctl.h``, ``linux/kcmp.h``, ``linux/mempolicy.h``.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import fcntl
import os
from collections.abc import Iterable, Iterator
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

# -- numbers (asm/unistd_64.h); those that memshr has QEMU's agent call are listed by name because refusals need them --

NR_READ: Final = 0
NR_CLOSE: Final = 3
NR_PREAD64: Final = 17
NR_FSTAT: Final = 5
NR_MMAP: Final = 9
NR_MUNMAP: Final = 11
NR_RT_SIGPROCMASK: Final = 14
NR_RT_SIGRETURN: Final = 15
NR_IOCTL: Final = 16
NR_MREMAP: Final = 25
NR_MADVISE: Final = 28
NR_SENDTO: Final = 44
NR_RECVMSG: Final = 47
NR_CLONE: Final = 56
NR_EXIT: Final = 60
NR_GETPID: Final = 39
NR_FCNTL: Final = 72
NR_PRCTL: Final = 157
NR_FUTEX: Final = 202
NR_RESTART_SYSCALL: Final = 219
NR_MBIND: Final = 237
NR_SET_MEMPOLICY: Final = 238
NR_GET_MEMPOLICY: Final = 239
NR_PROCESS_VM_READV: Final = 310
NR_KCMP: Final = 312
NR_USERFAULTFD: Final = 323
NR_OPENAT2: Final = 437
NR_PIDFD_GETFD: Final = 438
NR_PROCESS_MADVISE: Final = 440

# asm-generic/mman-common.h, linux/mman.h
PROT_READ: Final = 1
PROT_WRITE: Final = 2
PROT_EXEC: Final = 4
MAP_SHARED: Final = 0x01
MAP_PRIVATE: Final = 0x02
MAP_FIXED: Final = 0x10
MAP_ANONYMOUS: Final = 0x20
MAP_NORESERVE: Final = 0x4000
MAP_FIXED_NOREPLACE: Final = 0x100000
MREMAP_MAYMOVE: Final = 1
MREMAP_FIXED: Final = 2
MADV_DONTNEED: Final = 4
MADV_DONTFORK: Final = 10
MADV_MERGEABLE: Final = 12
MADV_UNMERGEABLE: Final = 13
MADV_HUGEPAGE: Final = 14
MADV_NOHUGEPAGE: Final = 15
MADV_DONTDUMP: Final = 16
MADV_COLD: Final = 20

# linux/mempolicy.h
MPOL_BIND: Final = 2
MPOL_MODE_FLAGS: Final = 0xE000

# linux/prctl.h
PR_SET_MEMORY_MERGE: Final = 67
PR_GET_MEMORY_MERGE: Final = 68

_MOST_URGENT: Final = -20
"""the lowest nice value: sys/resource.h"""

# linux/fcntl.h, linux/memfd.h
F_DUPFD_CLOEXEC: Final = 1030
F_ADD_SEALS: Final = 1033
F_GET_SEALS: Final = 1034
F_SEAL_SEAL: Final = 1
F_SEAL_SHRINK: Final = 2
F_SEAL_GROW: Final = 4
_MFD_CLOEXEC: Final = 1
_MFD_ALLOW_SEALING: Final = 2
_MFD_NOEXEC_SEAL: Final = 8
_MFD_EXEC: Final = 16
_FALLOC_FL_KEEP_SIZE: Final = 1
_FALLOC_FL_PUNCH_HOLE: Final = 2

# linux/openat2.h
RESOLVE_NO_MAGICLINKS: Final = 0x02
RESOLVE_BENEATH: Final = 0x08
RESOLVE_IN_ROOT: Final = 0x10

# linux/userfaultfd.h
USERFAULTFD_IOC_NEW: Final = 0xAA00
UFFD_FEATURE_PAGEFAULT_FLAG_WP: Final = 1 << 0
UFFD_FEATURE_WP_HUGETLBFS_SHMEM: Final = 1 << 12
UFFD_FEATURE_WP_UNPOPULATED: Final = 1 << 13
UFFD_EVENT_PAGEFAULT: Final = 0x12
_UFFD_API: Final = 0xAA
_UFFDIO_API: Final = 0xC018AA3F
_UFFDIO_REGISTER: Final = 0xC020AA00
_UFFDIO_WAKE: Final = 0x8010AA02
_UFFDIO_WRITEPROTECT: Final = 0xC018AA06
_UFFDIO_REGISTER_MODE_WP: Final = 2
_UFFDIO_WRITEPROTECT_MODE_WP: Final = 1

# linux/ptrace.h
PTRACE_CONT: Final = 7
PTRACE_DETACH: Final = 17
PTRACE_SYSCALL: Final = 24
PTRACE_EVENT_EXEC: Final = 4
PTRACE_EVENT_STOP: Final = 128
PTRACE_O_TRACESYSGOOD: Final = 1
PTRACE_O_TRACEEXEC: Final = 1 << PTRACE_EVENT_EXEC
WALL: Final = 0x40000000
_PTRACE_GETREGS: Final = 12
_PTRACE_SETREGS: Final = 13
_PTRACE_GETREGSET: Final = 0x4204
_PTRACE_SEIZE: Final = 0x4206
_PTRACE_INTERRUPT: Final = 0x4207
_PTRACE_GETSIGMASK: Final = 0x420A
_PTRACE_SECCOMP_GET_FILTER: Final = 0x420C
_NT_X86_XSTATE: Final = 0x202
"""linux/elf.h"""
_XSTATE_MOST_BYTES: Final = 1 << 15

# linux/kcmp.h
_KCMP_FILE: Final = 0

# linux/futex.h
_FUTEX_WAKE: Final = 1
_FUTEX_WAKE_OP: Final = 5
_FUTEX_OP_ANDN: Final = 3

_IOVEC_BYTES: Final = 16
IOV_MAX: Final = 1024
"""Most pieces in one vectored call (``linux/uio.h``, UIO_MAXIOV)."""

_libc = ctypes.CDLL(None, use_errno=True)
_libc.syscall.restype = ctypes.c_long
_libc.ptrace.restype = ctypes.c_long
_libc.ptrace.argtypes = [ctypes.c_long, ctypes.c_long, ctypes.c_void_p, ctypes.c_void_p]
_libc.ioctl.restype = ctypes.c_int
_libc.ioctl.argtypes = [ctypes.c_int, ctypes.c_ulong, ctypes.c_void_p]
_libc.fallocate.restype = ctypes.c_int
_libc.fallocate.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_long, ctypes.c_long]
for _name in ("process_vm_readv", "process_vm_writev"):
    _function = getattr(_libc, _name)
    _function.restype = ctypes.c_ssize_t
    _function.argtypes = [
        ctypes.c_int,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_void_p,
        ctypes.c_ulong,
        ctypes.c_ulong,
    ]


class Registers(ctypes.Structure):
    """struct user_regs_struct (``asm/user_64.h``)."""

    _fields_ = [
        (name, ctypes.c_ulonglong)
        for name in (
            *("r15", "r14", "r13", "r12", "rbp", "rbx", "r11", "r10", "r9", "r8", "rax", "rcx", "rdx", "rsi", "rdi"),
            *("orig_rax", "rip", "cs", "eflags", "rsp", "ss", "fs_base", "gs_base", "ds", "es", "fs", "gs"),
        )
    ]


def _failed(call: str) -> OSError:
    number = ctypes.get_errno()
    return OSError(number, f"{call}: {os.strerror(number)}")


def _checked(call: str, result: int) -> int:
    if result == -1:
        raise _failed(call)
    return int(result)


def _syscall(call: str, number: int, *arguments: int | None) -> int:
    # SAFETY: only called below, with numbers and with addresses of buffers that live until the call returns.
    return _checked(call, _libc.syscall(ctypes.c_long(number), *(ctypes.c_long(each or 0) for each in arguments)))


# -- descriptors of other processes ------------------------------------------------------------------------------------


def pidfd_getfd(pidfd: int, number: int) -> int:
    """Our own copy of descriptor ``number`` of the process behind ``pidfd``, closed on exec."""
    return _syscall("pidfd_getfd", NR_PIDFD_GETFD, pidfd, number, 0)


def is_same_open_file(one: int, other: int) -> bool:
    """Whether two descriptors of ours stand for one open file (kcmp(2)), and not only for one inode.

    :raises OSError: this kernel has no kcmp, or we may not use it.
    """
    return _syscall("kcmp", NR_KCMP, os.getpid(), os.getpid(), _KCMP_FILE, one, other) == 0


def process_madvise(pidfd: int, pieces: NDArray[np.void], advice: int) -> int:
    """madvise on memory of another process; returns how many bytes were done.

    :param pieces: shape ``(n <= IOV_MAX,)``, an array of struct iovec.
    """
    assert pieces.itemsize == _IOVEC_BYTES
    assert pieces.flags.c_contiguous
    return _syscall("process_madvise", NR_PROCESS_MADVISE, pidfd, pieces.ctypes.data, len(pieces), advice, 0)


def process_vm_readv(pid: int, local: NDArray[np.void], remote: NDArray[np.void]) -> int:
    """Copy from the memory of another process; returns how many bytes were copied, which may be fewer than asked for.

    :param local: an array of struct iovec, ours; ``remote`` likewise, theirs; at most IOV_MAX of each.
    """
    # SAFETY: the caller built ``local`` from the addresses of arrays that it keeps alive over this call.
    got = _libc.process_vm_readv(pid, local.ctypes.data, len(local), remote.ctypes.data, len(remote), 0)
    return _checked("process_vm_readv", got)


# -- files below the folders of others ---------------------------------------------------------------------------------


def openat2(folder: int, path: str, flags: int, resolve: int) -> int:
    """Open ``path`` below the folder behind a descriptor, with rules for what may be passed on the way.

    :param resolve: RESOLVE_* of ``linux/openat2.h``.
    """
    name = ctypes.create_string_buffer(os.fsencode(path))
    how = (ctypes.c_uint64 * 3)(flags, 0, resolve)  # struct open_how: flags, mode, resolve
    size_bytes = ctypes.sizeof(how)
    return _syscall("openat2", NR_OPENAT2, folder, ctypes.addressof(name), ctypes.addressof(how), size_bytes)


# -- files in memory ---------------------------------------------------------------------------------------------------


def memfd_create(name: str, *, executable: bool = False) -> int:
    """A file in memory that can be sealed and is closed on exec.

    :param executable: may be mapped with PROT_EXEC and run even where the host restricts that (Linux 6.3 and later).
    """
    flags = _MFD_CLOEXEC | _MFD_ALLOW_SEALING
    try:
        return os.memfd_create(name, flags | (_MFD_EXEC if executable else _MFD_NOEXEC_SEAL))
    except OSError as error:
        if error.errno != errno.EINVAL:
            raise
    return os.memfd_create(name, flags)


@contextlib.contextmanager
def memory_policy(mode: int, nodes: bytes) -> Iterator[None]:
    """This thread's new memory comes from where a NUMA policy allows (set_mempolicy(2)), until the end of the ``with``.

    :param mode: with its mode flags; 0 is the default, and then nothing is done. ``nodes``: their bits.
    """
    if not mode:
        yield
        return
    mask = ctypes.create_string_buffer(nodes, len(nodes))
    # SAFETY: the kernel reads as many bits as it is told that the mask has, which lives until the call returns.
    _syscall("set_mempolicy", NR_SET_MEMPOLICY, mode, ctypes.addressof(mask), 8 * len(nodes) + 1)
    try:
        yield
    finally:
        _syscall("set_mempolicy", NR_SET_MEMPOLICY, 0, 0, 0)


def add_seals(file: int, seals: int) -> None:
    """Forbid for good what ``seals`` say (fcntl(2), F_ADD_SEALS)."""
    fcntl.fcntl(file, F_ADD_SEALS, seals)


def get_seals(file: int) -> int:
    """What is forbidden of a memory file. :raises OSError: EINVAL: it cannot be sealed."""
    return int(fcntl.fcntl(file, F_GET_SEALS))


def punch_hole(file: int, offset: int, length_bytes: int) -> None:
    """Give the memory behind a piece of a file back; it reads as zeros from then on."""
    mode = _FALLOC_FL_PUNCH_HOLE | _FALLOC_FL_KEEP_SIZE
    _checked("fallocate", _libc.fallocate(file, mode, offset, length_bytes))


# -- userfaultfd -------------------------------------------------------------------------------------------------------


_Words = ctypes.c_uint64 * 4
"""the structures of userfaultfd's requests: three or four numbers"""


def _ioctl(call: str, file: int, request: int, argument: ctypes.Array[ctypes.c_uint64]) -> None:
    # SAFETY: no request of userfaultfd has a structure of more than four numbers.
    _checked(call, _libc.ioctl(file, request, argument))


def userfaultfd_api(uffd: int, features: int) -> int:
    """Shake hands with a new userfaultfd (once); returns the features that the kernel has.

    :raises OSError: EINVAL: the kernel lacks one of ``features``.
    """
    argument = _Words(_UFFD_API, features)
    _ioctl("UFFDIO_API", uffd, _UFFDIO_API, argument)
    return int(argument[1])


def open_userfaultfd() -> int:
    """A userfaultfd on our own memory, by whichever way this kernel has.

    :raises OSError: there is none, or not for this user.
    """
    try:
        device = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
    except FileNotFoundError:
        return _syscall("userfaultfd", NR_USERFAULTFD, os.O_CLOEXEC)
    try:
        return _checked("USERFAULTFD_IOC_NEW", _libc.ioctl(device, USERFAULTFD_IOC_NEW, os.O_CLOEXEC))
    finally:
        os.close(device)


def userfaultfd_features() -> int:
    """What this kernel's userfaultfd can do, found out with one that is thrown away.

    :raises OSError: there is none, or not for this user.
    """
    uffd = open_userfaultfd()
    try:
        return userfaultfd_api(uffd, 0)
    finally:
        os.close(uffd)


def userfaultfd_register(uffd: int, address: int, length_bytes: int) -> None:
    """Make a range of memory one that can be write-protected. Never asks for missing-page events."""
    _ioctl("UFFDIO_REGISTER", uffd, _UFFDIO_REGISTER, _Words(address, length_bytes, _UFFDIO_REGISTER_MODE_WP))


def userfaultfd_write_protect(uffd: int, runs: Iterable[tuple[int, int]], protect: bool) -> None:
    """Protect registered memory against writing, or let writers go on (and wake those that wait).

    :param runs: address and bytes of each piece; those before one that fails are done.
    """
    argument = _Words(0, 0, _UFFDIO_WRITEPROTECT_MODE_WP if protect else 0)
    ioctl = _libc.ioctl
    for argument[0], argument[1] in runs:
        while ioctl(uffd, _UFFDIO_WRITEPROTECT, argument):
            # EAGAIN: the address space is changing under us (linux/userfaultfd.h: mmap_changing); the change ends.
            if ctypes.get_errno() != errno.EAGAIN:
                raise _failed("UFFDIO_WRITEPROTECT")


def userfaultfd_wake(uffd: int, address: int, length_bytes: int) -> None:
    """Let whoever waits at a fault in this range try again; the range need not be registered any more."""
    _ioctl("UFFDIO_WAKE", uffd, _UFFDIO_WAKE, _Words(address, length_bytes))


# -- scheduling --------------------------------------------------------------------------------------------------------


def set_priority(tid: int | None) -> None:
    """Have the scheduler prefer a thread (setpriority(2), which on Linux is of threads); None is no thread.

    What is not permitted is left as it is: it is a question of how long, and of nothing else.
    """
    if tid is not None:
        with contextlib.suppress(OSError):
            os.setpriority(os.PRIO_PROCESS, tid, _MOST_URGENT)


# -- futex -------------------------------------------------------------------------------------------------------------


def futex_wake(address: int) -> None:
    """Wake everybody who waits on the 32-bit word at ``address`` (not the process-private kind)."""
    _syscall("futex", NR_FUTEX, address, _FUTEX_WAKE, 0x7FFFFFFF, 0, 0, 0)


def atomic_clear_bits(address: int, bits: int) -> None:
    """Clear bits of the 32-bit word at ``address`` in one atomic step, which the kernel makes (FUTEX_WAKE_OP).

    :param bits: below 0x800.
    """
    _syscall("futex", NR_FUTEX, address, _FUTEX_WAKE_OP, 0, 0, address, _FUTEX_OP_ANDN << 28 | bits << 12)


# -- ptrace ------------------------------------------------------------------------------------------------------------
# SAFETY of all of these: the caller is the one thread that seized ``tid``; all but seize and interrupt need it stopped.


def _ptrace(call: str, request: int, tid: int, address: int, data: int) -> None:
    _checked(call, _libc.ptrace(request, tid, address, data))


def ptrace_seize(tid: int) -> None:
    """Become the tracer of a thread without stopping it; if we die the kernel lets it go.

    Stops at system calls can be told from signals, and a thread that executes another program stops for it.
    """
    _ptrace("PTRACE_SEIZE", _PTRACE_SEIZE, tid, 0, PTRACE_O_TRACESYSGOOD | PTRACE_O_TRACEEXEC)


def ptrace_interrupt(tid: int) -> None:
    """Ask a seized thread to stop."""
    _ptrace("PTRACE_INTERRUPT", _PTRACE_INTERRUPT, tid, 0, 0)


def ptrace_resume(request: int, tid: int, signal_number: int = 0) -> None:
    """PTRACE_CONT, PTRACE_SYSCALL or PTRACE_DETACH, delivering a signal."""
    _ptrace("ptrace resume", request, tid, 0, signal_number)


def ptrace_get_registers(tid: int) -> Registers:
    """The registers of a stopped thread."""
    registers = Registers()
    _ptrace("PTRACE_GETREGS", _PTRACE_GETREGS, tid, 0, ctypes.addressof(registers))
    return registers


def ptrace_set_registers(tid: int, registers: Registers) -> None:
    """Set the registers of a stopped thread, all at once."""
    _ptrace("PTRACE_SETREGS", _PTRACE_SETREGS, tid, 0, ctypes.addressof(registers))


def ptrace_get_extended_state(tid: int) -> bytes:
    """The floating-point and vector registers of a stopped thread, in the layout of XSAVE.

    :raises OSError: ENODEV: this processor has no XSAVE.
    """
    buffer = ctypes.create_string_buffer(_XSTATE_MOST_BYTES)
    piece = (ctypes.c_uint64 * 2)(ctypes.addressof(buffer), len(buffer))  # struct iovec
    _ptrace("PTRACE_GETREGSET", _PTRACE_GETREGSET, tid, _NT_X86_XSTATE, ctypes.addressof(piece))
    return buffer.raw[: piece[1]]


def ptrace_get_signal_mask(tid: int) -> int:
    """The signals that a stopped thread blocks, as it set them itself: not the mask of a ppoll that is under way."""
    mask = ctypes.c_uint64()
    _ptrace("PTRACE_GETSIGMASK", _PTRACE_GETSIGMASK, tid, ctypes.sizeof(mask), ctypes.addressof(mask))
    return mask.value


def ptrace_seccomp_filter(tid: int, index: int) -> bytes | None:
    """The program of seccomp filter ``index`` of a stopped thread, the newest first; None: there is none.

    Eight bytes an instruction: struct sock_filter of ``linux/filter.h``.
    """
    instructions = _libc.ptrace(_PTRACE_SECCOMP_GET_FILTER, tid, index, 0)
    if instructions == -1:
        if ctypes.get_errno() == errno.ENOENT:
            return None
        raise _failed("PTRACE_SECCOMP_GET_FILTER")
    program = ctypes.create_string_buffer(8 * instructions)
    _ptrace("PTRACE_SECCOMP_GET_FILTER", _PTRACE_SECCOMP_GET_FILTER, tid, index, ctypes.addressof(program))
    return program.raw
