"""The control area: the memory that we and the agent inside a QEMU both see, its layout, and what the agent runs.

``agent`` says what it is for. This module does without numpy, and so do ``syscalls`` and ``injector``: the injector is
a program of its own that runs for some milliseconds, and loading numpy would cost it thirty times as much as its work.
"""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import re
import struct
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Final, Self

from memshr.qemu import syscalls

CONTROL_NAME: Final = "memshr-agent"
"""Name of the control area's memory file; the kernel prints it in /proc/PID/maps."""

MAPPED_CONTROL: Final = f"/memfd:{CONTROL_NAME} (deleted)"

_MAPPED_CODE: Final = re.compile(
    rb"^([0-9a-f]+-[0-9a-f]+) ..x. .* " + re.escape(MAPPED_CONTROL.encode()) + rb"$", re.MULTILINE
)

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
OFFER_AT: Final = 16
"""i32, futex: number of a socket for the thread to take, -1 if there is none"""
STATE_AT: Final = 28
"""u32: 0 nothing posted, 1 posted, 2 under way, 4 done; the thread goes from 1 to 2 by compare-and-swap"""
COUNT_AT: Final = 32
DONE_AT: Final = 36
TID_AT: Final = 40
BIRTH_AT: Final = 64
"""the call that makes the session's userfaultfd, in the form of a table entry; the result goes into SLOTS_AT[1]"""
SLOTS_AT: Final = 128
"""eight i32: descriptors that the thread closes when we are gone; [0] its socket, [1] the userfaultfd, then ours"""
EXPECTED_SOCKET_AT: Final = 160
"""st_dev and st_ino that the offered socket must have: its number may mean another file if we died since the offer"""

SLOTS: Final = 8
TABLE_ENTRIES: Final = (LOCAL_PIECES - TABLE) // 64
SIDE_OFFSET: Final = 1 << 30
"""From the control area to the addresses where pages are built before they are moved into place."""
SIDE_BYTES: Final = 1 << 30

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


class ControlArea:
    """A control area that is mapped in some QEMU, and here.

    :param file: its memory file; owned by this object from now on.
    :param code_address: where QEMU has its first page.
    """

    def __init__(self, file: int, code_address: int = 0) -> None:
        self.file = file
        self.code_address = code_address
        self.memory = mmap.mmap(file, CONTROL_BYTES)
        self._start = ctypes.c_char.from_buffer(self.memory)

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
        control.put(OFFER_AT, "<i", -1)
        control.put(SLOTS_AT, f"<{SLOTS}i", *[-1] * SLOTS)
        return control

    @classmethod
    def find(cls, pid: int, places: Sequence[str] | None = None) -> Self | None:
        """The control area that some memshr has put into this QEMU, if its thread lives.

        :param places: as for ``find_all``.
        :raises OSError: the process is gone, or we may not look into it.
        """
        found = None
        for control in cls.find_all(pid, places):
            if found is None and control.thread_lives(pid):
                found = control
            else:
                control.close()
        return found

    @classmethod
    def find_all(cls, pid: int, places: Sequence[str] | None = None) -> list[Self]:
        """Every control area in a QEMU, also such whose thread has ended; the caller closes them.

        There is more than one if a memshr died while it put one in.

        :param places: the addresses of the executable mappings of ``MAPPED_CONTROL``, as the kernel writes them, if the
            caller has just looked.
        :raises OSError: the process is gone, or we may not look into it.
        """
        found = []
        if places is None:
            places = [place.decode() for place in _MAPPED_CODE.findall(Path(f"/proc/{pid}/maps").read_bytes())]
        for addresses in places:
            # SAFETY: a QEMU that has been broken out of could show us a file of its own under this name; only we can
            # make one that belongs to us.
            try:
                file = os.open(f"/proc/{pid}/map_files/{addresses}", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # taken out since: a memshr died while it put this one in, and its injector cleans up
            status = os.fstat(file)
            if status.st_uid != os.geteuid() or status.st_size != CONTROL_BYTES:
                os.close(file)
                continue
            control = cls(file, int(addresses.partition("-")[0], 16))
            if control.get(_MAGIC_AT, "<Q") == (MAGIC,):
                found.append(control)
            else:
                control.close()
        return found

    def thread(self, pid: int) -> int | None:
        """The agent's thread, as we number it, in the QEMU that we know as ``pid``; None: it is not there.

        The thread has noted its number as QEMU's own PID namespace counts (gettid(2)), which is another than ours if
        QEMU lives in a container: proc(5), NSpid.
        """
        (tid,) = self.get(TID_AT, "<i")
        return next((ours for ours, inside in _threads(pid) if inside == tid != 0), None)

    def thread_lives(self, pid: int) -> bool:
        """Whether the agent's thread is there."""
        return self.thread(pid) is not None

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

    def is_taken(self) -> bool:
        """Whether a memshr has a session with the agent, or has died just now: the agent needs a moment to see it."""
        offered = self.get(OFFER_AT, "<i")[0] != -1
        if offered:
            syscalls.futex_wake(self.word_address(OFFER_AT))  # whoever offered may have died before it could do that
        return offered or self.get(SLOTS_AT, "<i")[0] != -1

    def word_address(self, offset: int) -> int:
        """Where *we* have a word of the data: for futex calls."""
        return ctypes.addressof(self._start) + DATA + offset

    def close(self) -> None:
        """Close the file. The memory stays mapped as long as arrays of it are in use."""
        os.close(self.file)
        del self._start
        with contextlib.suppress(BufferError):
            self.memory.close()


def _threads(pid: int) -> Iterator[tuple[int, int]]:
    # The threads of a process: their numbers here, and in its own PID namespace.
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            lines = status.read_text().splitlines()
        except OSError:  # it has ended
            continue
        for line in lines:
            if line.startswith("NSpid:"):
                yield int(status.parent.name), int(line.split()[-1])
