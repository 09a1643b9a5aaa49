"""The agent: one thread inside QEMU that does system calls for us, and our end of it.

What makes this hard: guest pages can be remapped only from inside QEMU's own process, by code that QEMU does not have,
and memshr may die at any instant. So:

* **The control area** is a memory file that we and QEMU both have mapped: a page of code, then data. ``injector``
  maps it and makes the thread, once in the life of a QEMU. The thread has all signals blocked, a stack of its own and
  no ties to QEMU's locks; it is cloned with the flags of an ordinary thread, the only ones that QEMU's own sandbox lets
  pass. A later memshr finds the area in /proc/PID/maps and opens it through /proc/PID/map_files.
* **A session** is a Unix socket whose one end the thread holds and whose other end we hold. One byte from us: run the
  table. One byte back: done. *The end of the stream: memshr is gone*, and the thread closes everything that it had for
  us and goes to sleep until the next socket is offered. So nothing of ours stays behind, and nothing has to be cleaned
  up by whoever comes next.
* **The thread holds the userfaultfd as well as we do.** If we alone held it, our death would lift the protection of
  pages while a posted table still remaps them, and a write that slipped in between would be lost. As it is, the table
  that is under way ends under full protection; then the thread sees the end of the stream and closes its copy, the
  last one, and every writer that waits goes on.
* **A table stops at its first surprise.** Each call has the result that it must have (the address that a mapping must
  get, the bytes that must be copied); at any other the thread stores what it got and does nothing further.

Layout of the control area and numbers of the calls: constants below. x86-64 only; its strong store order is what
makes plain stores of table and state enough.
"""

from __future__ import annotations

import contextlib
import json
import mmap
import os
import socket
import struct
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np
from numpy.typing import NDArray

from memshr.errors import BackendError, ConnectionLostError, InvariantError, RefusedDomainError
from memshr.procfs import process_mappings
from memshr.qemu import syscalls
from memshr.qemu.monitor import Monitor

CONTROL_NAME: Final = "memshr-agent"
"""Name of the control area's memory file; the kernel prints it in /proc/PID/maps."""

MAPPED_CONTROL: Final = f"/memfd:{CONTROL_NAME} (deleted)"

PAGE: Final = mmap.PAGESIZE
MAGIC: Final = 0x31746E6761726873  # "shragnt1", little-endian; the digit is the version of layout and code

# Control area, offsets in the file. The first page is mapped to execute, the rest (from DATA) to read and write.
PARAMETERS: Final = 0x800
"""In the code page: where the data goes, its length, the file's number in QEMU, then (from +0x20) the registers that
the borrowed thread gets back (REGISTER_ORDER), then an all-ones signal mask."""
DATA: Final = 0x1000
TABLE: Final = DATA + 0x2000
LOCAL_PIECES: Final = TABLE + 0x8000
REMOTE_PIECES: Final = LOCAL_PIECES + 0x4000
CONTROL_BYTES: Final = REMOTE_PIECES + 0x4000

REGISTER_ORDER: Final = (
    *("eflags", "rax", "rbx", "rcx", "rdx", "rsi", "rdi", "rbp", "r8", "r9", "r10", "r11", "r12", "r13", "r14", "r15"),
    *("rsp", "rip"),
)

# Data, offsets from DATA.
_MAGIC_AT: Final = 0
_OFFER_AT: Final = 16
"""i32, futex: number of a socket for the thread to take, -1 if there is none"""
_STATE_AT: Final = 28
"""u32: 0 nothing posted, 1 posted, 2 under way, 4 done; the thread goes from 1 to 2 by compare-and-swap"""
_COUNT_AT: Final = 32
_DONE_AT: Final = 36
TID_AT: Final = 40
_BIRTH_AT: Final = 64
"""the call that makes the session's userfaultfd, in the form of a table entry; the result goes into _SLOTS_AT[1]"""
_SLOTS_AT: Final = 128
"""eight i32: descriptors that the thread closes when we are gone; [0] its socket, [1] the userfaultfd, then ours"""
_EXPECTED_SOCKET_AT: Final = 160
"""st_dev and st_ino that the offered socket must have: its number may mean another file if we died since the offer"""

SLOTS: Final = 8
TABLE_ENTRIES: Final = (LOCAL_PIECES - TABLE) // 64
SIDE_OFFSET: Final = 1 << 30
"""From the control area to the addresses where pages are built before they are moved into place."""
SIDE_BYTES: Final = 1 << 30

ANSWER_DEADLINE_S: Final = 10.0

_IDLE, _POSTED, _UNDER_WAY, _DONE = 0, 1, 2, 4

CODE: Final = bytes.fromhex(
    # stub:  runs once, on the thread that was borrowed
    "488b3df9070000"  # mov rdi,[rip+0x7f9]
    "488b35fa070000"  # mov rsi,[rip+0x7fa]
    "4c8b05fb070000"  # mov r8,[rip+0x7fb]
    "b809000000"  # mov eax,0x9
    "ba03000000"  # mov edx,0x3
    "41ba01001000"  # mov r10d,0x100001
    "41b900100000"  # mov r9d,0x1000
    "0f05"  # syscall
    "488b1dcc070000"  # mov rbx,[rip+0x7cc]
    "4839d8"  # cmp rax,rbx
    "755f"  # jne leave
    "b80e000000"  # mov eax,0xe
    "bf02000000"  # mov edi,0x2
    "488d3566080000"  # lea rsi,[rip+0x866]
    "488d5338"  # lea rdx,[rbx+0x38]
    "41ba08000000"  # mov r10d,0x8
    "0f05"  # syscall
    "b838000000"  # mov eax,0x38
    "bf000f3d00"  # mov edi,0x3d0f00
    "488db300200000"  # lea rsi,[rbx+0x2000]
    "488d5328"  # lea rdx,[rbx+0x28]
    "4989d2"  # mov r10,rdx
    "4531c0"  # xor r8d,r8d
    "0f05"  # syscall
    "4885c0"  # test rax,rax
    "0f8499000000"  # je idle
    "48894328"  # mov [rbx+0x28],rax
    "b80e000000"  # mov eax,0xe
    "bf02000000"  # mov edi,0x2
    "488d7338"  # lea rsi,[rbx+0x38]
    "31d2"  # xor edx,edx
    "41ba08000000"  # mov r10d,0x8
    "0f05"  # syscall
    # leave:  give the thread its registers back
    "ff3582070000"  # push [rip+0x782]
    "9d"  # popf
    "488b0582070000"  # mov rax,[rip+0x782]
    "488b1d83070000"  # mov rbx,[rip+0x783]
    "488b0d84070000"  # mov rcx,[rip+0x784]
    "488b1585070000"  # mov rdx,[rip+0x785]
    "488b3586070000"  # mov rsi,[rip+0x786]
    "488b3d87070000"  # mov rdi,[rip+0x787]
    "488b2d88070000"  # mov rbp,[rip+0x788]
    "4c8b0589070000"  # mov r8,[rip+0x789]
    "4c8b0d8a070000"  # mov r9,[rip+0x78a]
    "4c8b158b070000"  # mov r10,[rip+0x78b]
    "4c8b1d8c070000"  # mov r11,[rip+0x78c]
    "4c8b258d070000"  # mov r12,[rip+0x78d]
    "4c8b2d8e070000"  # mov r13,[rip+0x78e]
    "4c8b358f070000"  # mov r14,[rip+0x78f]
    "4c8b3d90070000"  # mov r15,[rip+0x790]
    "488b2591070000"  # mov rsp,[rip+0x791]
    "ff2593070000"  # jmp [rip+0x793]
    # idle:  sleep until a socket is offered
    "837b10ff"  # cmp [rbx+0x10],0xffffffff
    "7517"  # jne adopt
    "b8ca000000"  # mov eax,0xca
    "488d7b10"  # lea rdi,[rbx+0x10]
    "31f6"  # xor esi,esi
    "baffffffff"  # mov edx,0xffffffff
    "4531d2"  # xor r10d,r10d
    "0f05"  # syscall
    "ebe3"  # jmp idle
    # adopt:  take a copy of the socket, make sure that it is that socket
    "b848000000"  # mov eax,0x48
    "8b7b10"  # mov edi,[rbx+0x10]
    "be06040000"  # mov esi,0x406
    "ba03000000"  # mov edx,0x3
    "0f05"  # syscall
    "c74310ffffffff"  # mov [rbx+0x10],0xffffffff
    "85c0"  # test eax,eax
    "78c4"  # js idle
    "898380000000"  # mov [rbx+0x80],eax
    "89c7"  # mov edi,eax
    "b805000000"  # mov eax,0x5
    "488db300040000"  # lea rsi,[rbx+0x400]
    "0f05"  # syscall
    "41bc07000000"  # mov r12d,0x7
    "488b8300040000"  # mov rax,[rbx+0x400]
    "483b83a0000000"  # cmp rax,[rbx+0xa0]
    "7566"  # jne hangup
    "488b8308040000"  # mov rax,[rbx+0x408]
    "483b83a8000000"  # cmp rax,[rbx+0xa8]
    "7556"  # jne hangup
    "4c8d6b40"  # lea r13,[rbx+0x40]
    "e8c2000000"  # call entry
    "898384000000"  # mov [rbx+0x84],eax
    # answer:  tell memshr that it is done
    "b82c000000"  # mov eax,0x2c
    "8bbb80000000"  # mov edi,[rbx+0x80]
    "488d7330"  # lea rsi,[rbx+0x30]
    "ba01000000"  # mov edx,0x1
    "41ba00400000"  # mov r10d,0x4000
    "4531c0"  # xor r8d,r8d
    "4531c9"  # xor r9d,r9d
    "0f05"  # syscall
    # receive:  wait for a table
    "31c0"  # xor eax,eax
    "8bbb80000000"  # mov edi,[rbx+0x80]
    "488d7330"  # lea rsi,[rbx+0x30]
    "ba01000000"  # mov edx,0x1
    "0f05"  # syscall
    "4883f801"  # cmp rax,0x1
    "7435"  # je posted
    "4883f8fc"  # cmp rax,0xfffffffffffffffc
    "74e1"  # je receive
    "41bc07000000"  # mov r12d,0x7
    # hangup:  memshr is gone: close everything that we had for it
    "428bbca380000000"  # mov edi,[rbx+r12*4+0x80]
    "85ff"  # test edi,edi
    "7807"  # js closed
    "b803000000"  # mov eax,0x3
    "0f05"  # syscall
    # closed:
    "42c784a380000000ffffffff"  # mov [rbx+r12*4+0x80],0xffffffff
    "41ffcc"  # dec r12d
    "79dc"  # jns hangup
    "e909ffffff"  # jmp idle
    # posted:  claim the table, unless it was withdrawn
    "b801000000"  # mov eax,0x1
    "b902000000"  # mov ecx,0x2
    "f00fb14b1c"  # lock cmpxchg [rbx+0x1c],ecx
    "75a1"  # jne receive
    "4531e4"  # xor r12d,r12d
    "44896324"  # mov [rbx+0x24],r12d
    "4c8dab00200000"  # lea r13,[rbx+0x2000]
    # next:
    "443b6320"  # cmp r12d,[rbx+0x20]
    "731b"  # jae finished
    "4d8b7538"  # mov r14,[r13+0x38]
    "e81e000000"  # call entry
    "4c39f0"  # cmp rax,r14
    "750d"  # jne finished
    "41ffc4"  # inc r12d
    "44896324"  # mov [rbx+0x24],r12d
    "4983c540"  # add r13,0x40
    "ebdf"  # jmp next
    # finished:
    "c7431c04000000"  # mov [rbx+0x1c],0x4
    "e944ffffff"  # jmp answer
    # entry:  one system call of a table
    "498b4500"  # mov rax,[r13+0x0]
    "498b7d08"  # mov rdi,[r13+0x8]
    "498b7510"  # mov rsi,[r13+0x10]
    "498b5518"  # mov rdx,[r13+0x18]
    "4d8b5520"  # mov r10,[r13+0x20]
    "4d8b4528"  # mov r8,[r13+0x28]
    "4d8b4d30"  # mov r9,[r13+0x30]
    "0f05"  # syscall
    "49894538"  # mov [r13+0x38],rax
    "c3"  # ret
)
"""What runs inside QEMU. Registers of the thread: rbx the data, r12 counter, r13 entry, r14 the result it must have."""


class AgentCallError(BackendError):
    """A call of a table did not give the result that it must; ``errno`` is the kernel's, 0 if it was no error.

    ``done`` calls before it were done.
    """

    def __init__(self, message: str, *, errno: int, done: int) -> None:
        super().__init__(message)
        self.errno = errno
        self.done = done


class ControlArea:
    """A control area that is mapped in some QEMU, and here.

    :param file: its memory file; owned by this object from now on.
    :param code_address: where QEMU has its first page.
    """

    def __init__(self, file: int, code_address: int = 0) -> None:
        self.file = file
        self.code_address = code_address
        self.memory = mmap.mmap(file, CONTROL_BYTES)
        self._bytes = np.frombuffer(self.memory, dtype=np.uint8)

    @classmethod
    def create(cls) -> Self:
        """A new one, with code but not yet mapped in any QEMU."""
        file = syscalls.memfd_create(CONTROL_NAME, executable=True)
        os.fchmod(file, 0o600)
        os.ftruncate(file, CONTROL_BYTES)
        control = cls(file)
        control.memory[: len(CODE)] = CODE
        control.memory[PARAMETERS + 0xB0 : PARAMETERS + 0xB8] = b"\xff" * 8
        control.put(_MAGIC_AT, "<Q", MAGIC)
        control.put(_OFFER_AT, "<i", -1)
        control.put(_SLOTS_AT, f"<{SLOTS}i", *[-1] * SLOTS)
        return control

    @classmethod
    def find(cls, pid: int) -> Self | None:
        """The control area that some memshr has put into this QEMU, if its thread lives.

        :raises OSError: the process is gone, or we may not look into it.
        """
        found = None
        for control in cls.find_all(pid):
            if found is None and control.thread_lives(pid):
                found = control
            else:
                control.close()
        return found

    @classmethod
    def find_all(cls, pid: int) -> list[Self]:
        """Every control area in a QEMU, also such whose thread has ended; the caller closes them.

        There is more than one if a memshr died while it put one in.

        :raises OSError: the process is gone, or we may not look into it.
        """
        found = []
        for mapping in process_mappings(pid, of=MAPPED_CONTROL):
            if mapping.path != MAPPED_CONTROL or not mapping.executable:
                continue
            # SAFETY: a QEMU that has been broken out of could show us a file of its own under this name; only we can
            # make one that belongs to us.
            try:
                file = os.open(f"/proc/{pid}/map_files/{mapping.start:x}-{mapping.end:x}", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # taken out since: a memshr died while it put this one in, and its injector cleans up
            status = os.fstat(file)
            if status.st_uid != os.geteuid() or status.st_size != CONTROL_BYTES:
                os.close(file)
                continue
            control = cls(file, mapping.start)
            if control.get(_MAGIC_AT, "<Q") == (MAGIC,):
                found.append(control)
            else:
                control.close()
        return found

    def thread_lives(self, pid: int) -> bool:
        """Whether the agent's thread is there, in the QEMU that we know as ``pid``.

        The thread has noted its number as QEMU's own PID namespace counts (gettid(2)), which is another than ours if
        QEMU lives in a container: proc(5), NSpid.
        """
        (tid,) = self.get(TID_AT, "<i")
        return tid != 0 and any(number == tid for number in _threads_inside(pid))

    @property
    def data_address(self) -> int:
        """Where QEMU has its data."""
        return self.code_address + DATA

    @property
    def side_address(self) -> int:
        """Where pages are built before they are moved into place: SIDE_BYTES of addresses that nobody else uses."""
        return self.code_address + SIDE_OFFSET

    def get(self, offset: int, form: str) -> tuple[int, ...]:
        """Read numbers from the data, ``offset`` counted from DATA."""
        return struct.unpack_from(form, self.memory, DATA + offset)

    def put(self, offset: int, form: str, *values: int) -> None:
        """Write numbers into the data."""
        struct.pack_into(form, self.memory, DATA + offset, *values)

    def word_address(self, offset: int) -> int:
        """Where *we* have a word of the data: for futex calls."""
        return int(self._bytes.ctypes.data) + DATA + offset

    def view(self, offset: int, count: int, dtype: np.dtype[np.void] | np.dtype[np.uint64]) -> NDArray[np.void]:
        """An array over a part of the control area (``offset`` in the file) that QEMU sees too."""
        return np.frombuffer(self.memory, dtype=dtype, count=count, offset=offset)

    def close(self) -> None:
        """Close the file. The memory stays mapped as long as arrays of it are in use."""
        os.close(self.file)
        del self._bytes
        with contextlib.suppress(BufferError):
            self.memory.close()


def _threads_inside(pid: int) -> Iterator[int]:
    # The numbers that the threads of a process have in its own PID namespace.
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:  # it has ended
            continue
        for line in lines:
            if line.startswith("NSpid:"):
                yield int(line.split()[-1])


def is_in_session(pid: int) -> bool:
    """Whether an agent in this QEMU is at work for some memshr, a living one or one that has died just now.

    :raises OSError: the process is gone, or we may not look into it.
    """
    busy = False
    for control in ControlArea.find_all(pid):
        busy |= control.get(_SLOTS_AT, "<i")[0] != -1 or control.get(_OFFER_AT, "<i")[0] != -1
        control.close()
    return busy


def install(pid: int, name: str, monitor: Monitor) -> ControlArea:
    """Put an agent into a QEMU that has none.

    A process of its own does it (``injector``): it goes on when we die.

    :raises RefusedDomainError: the guest's seccomp filter forbids what the agent does, or QEMU cannot be stopped.
    """
    control = ControlArea.create()
    try:
        number = monitor.add_descriptor(control.file)
        try:
            answer = _run_injector("attach", pid, number, control.file)
        finally:
            monitor.remove_descriptors()
        if "refused" in answer:
            raise RefusedDomainError(
                f"guest {name} ({pid}) cannot be attached: {answer['refused']}",
                reasons=[str(answer["refused"])],
                remedy=str(answer["remedy"]),
            )
        control.code_address = int(str(answer["code_address"]))
    except BaseException:
        control.close()
        raise
    return control


def uninstall(pid: int, control: ControlArea) -> None:
    """Unmap the control area of a QEMU whose agent thread has ended.

    :raises RefusedDomainError: QEMU cannot be stopped for it; only the mapping stays, which does nothing.
    """
    answer = _run_injector("detach", pid, control.code_address, control.file)
    if "refused" in answer:
        raise RefusedDomainError(f"process {pid} keeps an unused mapping of memshr: {answer['refused']}")


def _run_injector(action: str, pid: int, number: int, file: int) -> dict[str, object]:
    command = [sys.executable, "-m", "memshr.qemu.injector", action, str(pid), str(number), str(file)]
    done = subprocess.run(
        command, stdin=subprocess.DEVNULL, capture_output=True, pass_fds=[file], start_new_session=True, check=False
    )
    if done.returncode != 0:
        raise BackendError(f"the injector failed on process {pid}: {done.stderr.decode(errors='replace').strip()}")
    answer: dict[str, object] = json.loads(done.stdout)
    return answer


class Session:
    """A connection with the agent of one QEMU, from ``open`` until ``close`` or our death.

    ``uffd`` is our copy of the userfaultfd of QEMU's memory, which has shaken hands already; ``features`` are what the
    kernel's userfaultfd can do.
    """

    def __init__(self, control: ControlArea, wire: socket.socket, uffd: int, features: int) -> None:
        self.control = control
        self.uffd = uffd
        self.features = features
        self._wire = wire
        self._table = control.view(TABLE, TABLE_ENTRIES * 8, np.dtype("<u8")).reshape(TABLE_ENTRIES, 8)
        self.local_pieces = control.view(LOCAL_PIECES, syscalls.IOV_MAX, syscalls.IOVEC)
        self.remote_pieces = control.view(REMOTE_PIECES, syscalls.IOV_MAX, syscalls.IOVEC)
        _open_sessions.add(self)

    @classmethod
    def open(cls, pid: int, pidfd: int, name: str, control: ControlArea, monitor: Monitor) -> Self:
        """Offer a socket to the sleeping agent and get the userfaultfd that it makes.

        :raises RefusedDomainError: another memshr has a session, or QEMU may not make a userfaultfd.
        :raises ConnectionLostError: the agent does not answer.
        """
        _wait_until_free(control, pid, name)
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
        with contextlib.ExitStack() as undo:
            undo.callback(ours.close)
            try:
                device: int | None = os.open("/dev/userfaultfd", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                device = None
            with theirs:
                status = os.fstat(theirs.fileno())
                number = monitor.add_descriptor(theirs.fileno())
                if device is None:
                    birth = [syscalls.NR_USERFAULTFD, os.O_CLOEXEC, 0]
                else:
                    try:
                        birth = [syscalls.NR_IOCTL, monitor.add_descriptor(device), syscalls.USERFAULTFD_IOC_NEW]
                    finally:
                        os.close(device)
                control.put(_BIRTH_AT, "<8Q", *birth, os.O_CLOEXEC, 0, 0, 0, 0)
                control.put(_EXPECTED_SOCKET_AT, "<2Q", status.st_dev, status.st_ino)
                control.put(_STATE_AT, "<I", _IDLE)
                control.put(_OFFER_AT, "<i", number)
                syscalls.futex_wake(control.word_address(_OFFER_AT))
            ours.settimeout(ANSWER_DEADLINE_S)
            try:
                hello = ours.recv(1)
            except TimeoutError:
                hello = b""
            if not hello:
                control.put(_OFFER_AT, "<i", -1)
                raise ConnectionLostError(
                    f"the agent in guest {name} ({pid}) does not answer", remedy="is QEMU stopped or frozen?"
                )
            monitor.remove_descriptors()
            (made,) = control.get(_SLOTS_AT + 4, "<i")
            if made < 0:
                raise RefusedDomainError(
                    f"guest {name} ({pid}) cannot have a userfaultfd: {os.strerror(-made)}",
                    reasons=["QEMU may not make a userfaultfd"],
                    remedy="run Linux 6.1 or later as root, or set vm.unprivileged_userfaultfd=1",
                )
            uffd = syscalls.pidfd_getfd(pidfd, made)
            undo.callback(os.close, uffd)
            features = syscalls.userfaultfd_features()
            wanted = syscalls.UFFD_FEATURE_PAGEFAULT_FLAG_WP | syscalls.UFFD_FEATURE_WP_HUGETLBFS_SHMEM
            wanted |= features & syscalls.UFFD_FEATURE_WP_UNPOPULATED
            syscalls.userfaultfd_api(uffd, wanted)
            os.set_blocking(uffd, False)
            undo.pop_all()
        return cls(control, ours, uffd, wanted)

    def run(self, table: NDArray[np.uint64]) -> int:
        """Have the agent do the calls of ``table``, in order, until one does not give the result that it must.

        :param table: shape ``(n <= TABLE_ENTRIES, 8)``: number, six arguments, the result that it must have.
        :returns: how many calls were done; ``result(i)`` tells what call ``i`` gave.
        :raises ConnectionLostError: QEMU died, or does not run; in the second case nothing of the table was done.
        """
        self._post(table)
        try:
            while True:
                try:
                    answer = self._wire.recv(1)
                except TimeoutError:
                    self._withdraw()
                    continue
                if not answer:
                    raise ConnectionLostError("QEMU has ended")
                break
        except OSError as error:
            raise ConnectionLostError("QEMU has ended") from error
        return int(self.control.get(_DONE_AT, "<I")[0])

    def _post(self, table: NDArray[np.uint64]) -> None:
        if not 0 < len(table) <= TABLE_ENTRIES:
            raise InvariantError(f"a table of {len(table)} calls")
        self._table[: len(table)] = table
        self.control.put(_COUNT_AT, "<2I", len(table), 0)
        self.control.put(_STATE_AT, "<I", _POSTED)
        try:
            self._wire.sendall(b"\1")
        except OSError as error:
            raise ConnectionLostError("QEMU has ended") from error

    def _withdraw(self) -> None:
        # Atomic against the agent's own step from posted to under way: afterwards the state is nothing posted (0), or
        # what the agent made of it.
        syscalls.atomic_clear_bits(self.control.word_address(_STATE_AT), _POSTED)
        if self.control.get(_STATE_AT, "<I") == (_IDLE,):
            raise ConnectionLostError(
                f"QEMU did not run for {ANSWER_DEADLINE_S:.0f} s",
                remedy="continue the process (kill -CONT, or thaw it)",
            )

    def result(self, index: int) -> int:
        """What call ``index`` of the last table gave: a value, or a negative errno."""
        value = int(self._table[index, 7])
        return value - (1 << 64) if value >> 63 else value

    def call(self, number: int, *arguments: int) -> int:
        """One system call in QEMU; returns what it gave, as ``result``."""
        self.run(entries([(number, *arguments)], results=[1 << 63]))
        return self.result(0)

    def run_all(self, table: NDArray[np.uint64], what: str) -> None:
        """``run`` for calls that must all succeed.

        :raises AgentCallError: one did not.
        """
        done = self.run(table)
        if done < len(table):
            raise self.failure(done, what)

    def failure(self, done: int, what: str) -> AgentCallError:
        """The error for a table that ended after ``done`` calls."""
        got = self.result(done)
        number = -got if -4096 < got < 0 else 0
        text = os.strerror(number) if number else f"unexpected result {got:#x}"
        return AgentCallError(f"{what}: {text}", errno=number, done=done)

    def take_descriptor(self, number: int) -> int:
        """Have the agent take its own copy of descriptor ``number`` of QEMU, to be closed when the session ends.

        :returns: the copy's number in QEMU.
        :raises AgentCallError: QEMU has no such descriptor, or too many.
        """
        slots = self.control.get(_SLOTS_AT, f"<{SLOTS}i")
        if -1 not in slots:
            raise AgentCallError("no place for another descriptor in the agent", errno=24, done=0)
        copy = self.call(syscalls.NR_FCNTL, number, syscalls.F_DUPFD_CLOEXEC, 3)
        if copy < 0:
            raise self.failure(0, "copying a descriptor in QEMU")
        self.control.put(_SLOTS_AT + 4 * slots.index(-1), "<i", copy)
        return copy

    def end_agent(self, pid: int) -> None:
        """Have the agent close its descriptors and end; the session is closed then.

        :raises ConnectionLostError: it has not ended; QEMU does not run.
        """
        slots = [slot for slot in self.control.get(_SLOTS_AT, f"<{SLOTS}i") if slot >= 0]
        calls = [*((syscalls.NR_CLOSE, slot) for slot in slots), (syscalls.NR_EXIT, 0)]
        self._post(entries(calls, results=[0] * len(calls)))
        # Not the end of our stream: a paused QEMU keeps its own descriptor of the socket until it runs.
        end = time.monotonic() + ANSWER_DEADLINE_S
        while self.control.thread_lives(pid):
            if time.monotonic() > end:
                self._withdraw()
            time.sleep(0.001)
        self.close()

    def release_files(self) -> None:
        """Close our ends without ending the session; for the child of a fork."""
        uffd, self.uffd = self.uffd, -1
        if uffd >= 0:
            os.close(uffd)
        self._wire.close()

    def abandon(self) -> None:
        """Let everybody who waits go on, from whatever thread: the agent sees the end of the stream."""
        with contextlib.suppress(OSError):
            self._wire.shutdown(socket.SHUT_RDWR)
        uffd, self.uffd = self.uffd, -1
        if uffd >= 0:
            os.close(uffd)

    def close(self) -> None:
        """End the session: the agent closes its descriptors, all protection ends, waiting writers go on."""
        self.abandon()
        self._wire.close()
        _open_sessions.discard(self)
        del self._table, self.local_pieces, self.remote_pieces

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()


_open_sessions: weakref.WeakSet[Session] = weakref.WeakSet()


def _let_go_in_child() -> None:
    # A forked child that kept a socket open would hide our death from the agent, and writers would wait for it.
    for session in list(_open_sessions):
        session.release_files()


os.register_at_fork(after_in_child=_let_go_in_child)


def entries(calls: Sequence[tuple[int, ...]], results: Sequence[int]) -> NDArray[np.uint64]:
    """A small table: each call as its number and up to six arguments, and the result that it must have."""
    table = np.zeros((len(calls), 8), dtype=np.uint64)
    for row, call in enumerate(calls):
        table[row, : len(call)] = call
    table[:, 7] = results
    return table


def _wait_until_free(control: ControlArea, pid: int, name: str) -> None:
    # The agent of a memshr that has just died needs a moment to see it.
    end = time.monotonic() + ANSWER_DEADLINE_S
    while control.get(_SLOTS_AT, "<i")[0] != -1 or control.get(_OFFER_AT, "<i")[0] != -1:
        if time.monotonic() > end:
            raise RefusedDomainError(
                f"another memshr has a session with guest {name} ({pid})",
                reasons=["another memshr is at work on it"],
                remedy="end the other one first",
            )
        time.sleep(0.001)
