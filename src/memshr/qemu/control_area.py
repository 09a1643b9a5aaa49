"""The control area: the memory that we and the agent inside a QEMU both see, its layout, and what the agent runs.

``agent`` says what it is for. This module does without numpy, and so do ``syscalls`` and ``injector``: the injector is
a program of its own that runs for some milliseconds, and loading numpy would cost it thirty times as much as its work.

A QEMU may write into the area whatever it likes. What is read from it concerns that QEMU alone, and is bounded here.
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
from typing import Final, NamedTuple, Self

from memshr.errors import BackendError
from memshr.qemu import mark, syscalls

CONTROL_NAME: Final = "memshr-agent"
"""Name of the control area's memory file; the kernel prints it in /proc/PID/maps."""

MAPPED_CONTROL: Final = f"/memfd:{CONTROL_NAME} (deleted)"

_MARK: Final = b"agent"
_SEALS: Final = syscalls.F_SEAL_SHRINK | syscalls.F_SEAL_GROW | syscalls.F_SEAL_SEAL

_MAPPED_CODE: Final = re.compile(
    rb"^([0-9a-f]+-[0-9a-f]+) ..x. .* " + re.escape(MAPPED_CONTROL.encode()) + rb"$", re.MULTILINE
)

PAGE: Final = mmap.PAGESIZE
MAGIC: Final = 0x32746E6761726873  # "shragnt2", little-endian; the digit is the version of layout and code

# Control area, offsets in the file. The first page is mapped to execute, the rest (from DATA) to read and write.
PARAMETERS: Final = 0x800
"""In the code page: where the data goes, its length, the file's number in QEMU, then (from +0x20) the registers that
the borrowed thread gets back (REGISTER_ORDER), then an all-ones signal mask."""
DATA: Final = 0x1000
TABLE: Final = DATA + 0x2000
LOCAL_PIECES: Final = TABLE + 0x10000
REMOTE_PIECES: Final = LOCAL_PIECES + 0x4000
_SLOTS: Final = REMOTE_PIECES + 0x4000
"""descriptors that the thread closes when we are gone, an i32 each, -1 for none; [0] is its socket"""
_RECORDS: Final = _SLOTS + 0x1000
"""how QEMU's RAM was before we changed it: a count, then an Original each"""
_COMPARED: Final = _RECORDS + 0x4000
"""what the thread compares: the bytes of frames, then those of pages"""
CONTROL_BYTES: Final = _COMPARED + 0x20000

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
EXPECTED_SOCKET_AT: Final = 160
"""st_dev and st_ino that the offered socket must have: its number may mean another file if we died since the offer"""
PID_AT: Final = 176
"""i32: QEMU's own idea of its pid, for the thread's process_vm_readv of itself"""
MESSAGE_AT: Final = 0x100
"""struct msghdr, its iovec and byte, and the control message in which the thread receives a descriptor"""
RECEIVED_AT: Final = 0x190
"""i32 in that control message: the number of the descriptor"""

_FORBIDDEN_AT: Final = 0x5C0
SCRATCH_AT: Final = 0x600
"""bytes that a call may leave for us"""

SLOTS: Final = 1024
TABLE_ENTRIES: Final = (LOCAL_PIECES - TABLE) // 64
IF_EQUAL: Final = 0x10000
"""Bit of an entry's number: the call is made only if the bytes at its second word (an address), as many as its third
word says, are those of the file of its sixth at the offset of its seventh, as in mmap; else its result is NOT_EQUAL."""
NOT_EQUAL: Final = 1
KEEP: Final = 0x20000
"""Bit of an entry's number: the descriptor that the call makes goes into the first slot that is free, by the thread
itself: if we die just then, nothing stays."""
KEEP_RECEIVED: Final = 0x60000
"""As KEEP, for the descriptor that a message has brought (RECEIVED_AT)."""
FORGET: Final = 0x80000
"""Bit of an entry's number: its first argument is a descriptor that is taken out of its slot before the call."""
SIDE_OFFSET: Final = 1 << 30
"""From the control area to the addresses where pages are built before they are moved into place."""
SIDE_BYTES: Final = 1 << 30

_ORIGINAL: Final = struct.Struct("<QQQi4x128s")
_MOST_ORIGINALS: Final = (_COMPARED - _RECORDS - 8) // _ORIGINAL.size
NODE_MASK_BYTES: Final = 128
"""room for 1,024 NUMA nodes, the most that Linux can be built for (``CONFIG_NODES_SHIFT``)"""

CODE: Final = bytes.fromhex(
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
    # leave
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
    # idle
    "837b10ff"  # cmp [rbx+0x10],0xffffffff
    "7517"  # jne adopt
    "b8ca000000"  # mov eax,0xca
    "488d7b10"  # lea rdi,[rbx+0x10]
    "31f6"  # xor esi,esi
    "baffffffff"  # mov edx,0xffffffff
    "4531d2"  # xor r10d,r10d
    "0f05"  # syscall
    "ebe3"  # jmp idle
    # adopt
    "b848000000"  # mov eax,0x48
    "8b7b10"  # mov edi,[rbx+0x10]
    "be06040000"  # mov esi,0x406
    "ba03000000"  # mov edx,0x3
    "0f05"  # syscall
    "c74310ffffffff"  # mov [rbx+0x10],0xffffffff
    "85c0"  # test eax,eax
    "78c4"  # js idle
    "898300a00100"  # mov [rbx+0x1a000],eax
    "89c7"  # mov edi,eax
    "b805000000"  # mov eax,0x5
    "488db300040000"  # lea rsi,[rbx+0x400]
    "0f05"  # syscall
    "488b8300040000"  # mov rax,[rbx+0x400]
    "483b83a0000000"  # cmp rax,[rbx+0xa0]
    "7551"  # jne hangup
    "488b8308040000"  # mov rax,[rbx+0x408]
    "483b83a8000000"  # cmp rax,[rbx+0xa8]
    "7541"  # jne hangup
    # answer
    "b82c000000"  # mov eax,0x2c
    "8bbb00a00100"  # mov edi,[rbx+0x1a000]
    "488d7330"  # lea rsi,[rbx+0x30]
    "ba01000000"  # mov edx,0x1
    "41ba00400000"  # mov r10d,0x4000
    "4531c0"  # xor r8d,r8d
    "4531c9"  # xor r9d,r9d
    "0f05"  # syscall
    # receive
    "31c0"  # xor eax,eax
    "8bbb00a00100"  # mov edi,[rbx+0x1a000]
    "488d7330"  # lea rsi,[rbx+0x30]
    "ba01000000"  # mov edx,0x1
    "0f05"  # syscall
    "4883f801"  # cmp rax,0x1
    "7435"  # je posted
    "4883f8fc"  # cmp rax,0xfffffffffffffffc
    "74e1"  # je receive
    # hangup
    "41bcff030000"  # mov r12d,0x3ff
    "428bbca300a00100"  # mov edi,[rbx+r12*4+0x1a000]
    "85ff"  # test edi,edi
    "7807"  # js hangup+0x19
    "b803000000"  # mov eax,0x3
    "0f05"  # syscall
    "42c784a300a00100ffffffff"  # mov [rbx+r12*4+0x1a000],0xffffffff
    "41ffcc"  # dec r12d
    "79dc"  # jns hangup+0x6
    "e91effffff"  # jmp idle
    # posted
    "b801000000"  # mov eax,0x1
    "b902000000"  # mov ecx,0x2
    "f00fb14b1c"  # lock cmpxchg [rbx+0x1c],ecx
    "75a1"  # jne receive
    "4531e4"  # xor r12d,r12d
    "44896324"  # mov [rbx+0x24],r12d
    "4c8dab00200000"  # lea r13,[rbx+0x2000]
    # next
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
    # finished
    "c7431c04000000"  # mov [rbx+0x1c],0x4
    "e944ffffff"  # jmp answer
    # entry
    "410fba650010"  # bt [r13+0x0],0x10
    "7309"  # jae entry+0x11
    "e887000000"  # call compare
    "85c0"  # test eax,eax
    "7535"  # jne entry+0x46
    "410fba650013"  # bt [r13+0x0],0x13
    "730e"  # jae entry+0x27
    "418b4508"  # mov eax,[r13+0x8]
    "b9ffffffff"  # mov ecx,0xffffffff
    "e84f000000"  # call note
    "410fb74500"  # movzx eax,[r13+0x0]
    "498b7d08"  # mov rdi,[r13+0x8]
    "498b7510"  # mov rsi,[r13+0x10]
    "498b5518"  # mov rdx,[r13+0x18]
    "4d8b5520"  # mov r10,[r13+0x20]
    "4d8b4528"  # mov r8,[r13+0x28]
    "4d8b4d30"  # mov r9,[r13+0x30]
    "0f05"  # syscall
    "49894538"  # mov [r13+0x38],rax
    "410fba650011"  # bt [r13+0x0],0x11
    "7323"  # jae entry+0x75
    "4885c0"  # test rax,rax
    "781e"  # js entry+0x75
    "89c1"  # mov ecx,eax
    "410fba650012"  # bt [r13+0x0],0x12
    "7306"  # jae entry+0x67
    "8b8b90010000"  # mov ecx,[rbx+0x190]
    "b8ffffffff"  # mov eax,0xffffffff
    "e805000000"  # call note
    "498b4538"  # mov rax,[r13+0x38]
    "c3"  # ret
    # note
    "31d2"  # xor edx,edx
    "39849300a00100"  # cmp [rbx+rdx*4+0x1a000],eax
    "740b"  # je note+0x16
    "ffc2"  # inc edx
    "81faff030000"  # cmp edx,0x3ff
    "76ed"  # jbe note+0x2
    "c3"  # ret
    "898c9300a00100"  # mov [rbx+rdx*4+0x1a000],ecx
    "c3"  # ret
    # compare
    "498b6d08"  # mov rbp,[r13+0x8]
    "4d8b7d10"  # mov r15,[r13+0x10]
    "4d8b4530"  # mov r8,[r13+0x30]
    "ba00000100"  # mov edx,0x10000
    "4939d7"  # cmp r15,rdx
    "490f42d7"  # cmovb rdx,r15
    "b811000000"  # mov eax,0x11
    "418b7d28"  # mov edi,[r13+0x28]
    "488db300f00100"  # lea rsi,[rbx+0x1f000]
    "4d89c2"  # mov r10,r8
    "0f05"  # syscall
    "4839d0"  # cmp rax,rdx
    "0f8588000000"  # jne compare+0xbe
    "48899308020000"  # mov [rbx+0x208],rdx
    "48899318020000"  # mov [rbx+0x218],rdx
    "488d8300f00200"  # lea rax,[rbx+0x2f000]
    "48898300020000"  # mov [rbx+0x200],rax
    "4889ab10020000"  # mov [rbx+0x210],rbp
    "4150"  # push r8
    "b836010000"  # mov eax,0x136
    "8bbbb0000000"  # mov edi,[rbx+0xb0]
    "488db300020000"  # lea rsi,[rbx+0x200]
    "ba01000000"  # mov edx,0x1
    "4c8d9310020000"  # lea r10,[rbx+0x210]
    "41b801000000"  # mov r8d,0x1
    "4531c9"  # xor r9d,r9d
    "0f05"  # syscall
    "4158"  # pop r8
    "488b8b08020000"  # mov rcx,[rbx+0x208]
    "4839c8"  # cmp rax,rcx
    "752c"  # jne compare+0xbe
    "4801cd"  # add rbp,rcx
    "4901c8"  # add r8,rcx
    "4929cf"  # sub r15,rcx
    "48c1e903"  # shr rcx,0x3
    "488db300f00100"  # lea rsi,[rbx+0x1f000]
    "488dbb00f00200"  # lea rdi,[rbx+0x2f000]
    "f348a7"  # repz cmps ds:[rsi],es:[rdi]
    "750c"  # jne compare+0xbe
    "4d85ff"  # test r15,r15
    "0f8551ffffff"  # jne compare+0xc
    "31c0"  # xor eax,eax
    "c3"  # ret
    "b801000000"  # mov eax,0x1
    "c3"  # ret
)
"""What runs inside QEMU: ``agent.S``, assembled. A test holds the two against each other."""


class Original(NamedTuple):
    """How a range of guest RAM was before memshr changed it: addresses, and what a new mapping would lose.

    ``flags`` is a set of bits whose meaning is the caller's. ``policy`` is the mode of its NUMA policy with its mode
    flags (get_mempolicy(2)), ``nodes`` the bits of its nodes, NODE_MASK_BYTES.
    """

    start: int
    end: int
    flags: int
    policy: int
    nodes: bytes


class ControlArea:
    """A control area that is mapped in some QEMU, and here.

    :param file: its memory file; owned by this object from now on. It must be sealed: see ``is_ours``.
    :param code_address: where QEMU has its first page.
    """

    def __init__(self, file: int, code_address: int = 0) -> None:
        self.file = file
        self.code_address = code_address
        # SAFETY: the file cannot get shorter under the mapping (F_SEAL_SHRINK): no access to it is a SIGBUS.
        self.memory = mmap.mmap(file, CONTROL_BYTES)
        self._start = ctypes.c_char.from_buffer(self.memory)

    @classmethod
    def create(cls) -> Self:
        """A new one, with code but not yet mapped in any QEMU.

        :raises PermissionDeniedError: we may not mark it as ours.
        """
        file = syscalls.memfd_create(CONTROL_NAME, executable=True)
        try:
            os.fchmod(file, 0o600)
            os.ftruncate(file, CONTROL_BYTES)
            mark.put(file, _MARK)
            syscalls.add_seals(file, _SEALS)
            control = cls(file)
        except BaseException:
            os.close(file)
            raise
        control.memory[: len(CODE)] = CODE
        control.memory[PARAMETERS + 0xB0 : PARAMETERS + 0xB8] = b"\xff" * 8
        control.put(_MAGIC_AT, "<Q", MAGIC)
        control.put(OFFER_AT, "<i", -1)
        control.slots = [-1] * SLOTS
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
        for addresses in places[:_MOST_AREAS]:
            try:
                file = os.open(f"/proc/{pid}/map_files/{addresses}", os.O_RDWR | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # taken out since: a memshr died while it put this one in, and its injector cleans up
            if not is_ours(file):
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

    @property
    def slots(self) -> list[int]:
        """The descriptors that the thread closes when we are gone: SLOTS numbers, -1 for none. The first is its own."""
        return list(struct.unpack_from(f"<{SLOTS}i", self.memory, _SLOTS))

    @slots.setter
    def slots(self, numbers: Sequence[int]) -> None:
        struct.pack_into(f"<{SLOTS}i", self.memory, _SLOTS, *numbers)

    def set_slot(self, index: int, number: int) -> None:
        """Set one of ``slots``."""
        struct.pack_into("<i", self.memory, _SLOTS + 4 * index, number)

    @property
    def forbidden(self) -> list[int]:
        """System calls that QEMU's sandbox does not let pass, of those that the agent can do without."""
        return [number for number in self.get(_FORBIDDEN_AT, "<16I") if number]

    @forbidden.setter
    def forbidden(self, numbers: Sequence[int]) -> None:
        self.put(_FORBIDDEN_AT, "<16I", *[*numbers, *[0] * 16][:16])

    @property
    def originals(self) -> list[Original]:
        """How the RAM was before the first memshr changed it, as noted here by whichever memshr was first."""
        (count,) = struct.unpack_from("<Q", self.memory, _RECORDS)
        places = range(min(count, _MOST_ORIGINALS))
        return [Original(*_ORIGINAL.unpack_from(self.memory, _RECORDS + 8 + _ORIGINAL.size * at)) for at in places]

    @originals.setter
    def originals(self, records: Sequence[Original]) -> None:
        if len(records) > _MOST_ORIGINALS:
            raise BackendError(
                f"notes of {len(records)} ranges of RAM, and there is room for {_MOST_ORIGINALS}",
                remedy="leave this guest alone, or detach it first if its RAM has changed often",
            )
        for at, record in enumerate(records):
            _ORIGINAL.pack_into(self.memory, _RECORDS + 8 + _ORIGINAL.size * at, *record)
        # The count comes last: if we die before, the records that were there stand.
        struct.pack_into("<Q", self.memory, _RECORDS, len(records))

    def nodes_address(self, at: int) -> int:
        """Where QEMU has the nodes of record ``at``."""
        return self.code_address + _RECORDS + 8 + _ORIGINAL.size * at + _ORIGINAL.size - NODE_MASK_BYTES

    def is_taken(self) -> bool:
        """Whether a memshr has a link with the agent, or has died just now: the agent needs a moment to see it."""
        offered = self.get(OFFER_AT, "<i")[0] != -1
        if offered:
            syscalls.futex_wake(self.word_address(OFFER_AT))  # the memshr that offered it may have died before
        return offered or self.slots[0] != -1

    def word_address(self, offset: int) -> int:
        """Where *we* have a word of the data: for futex calls."""
        return ctypes.addressof(self._start) + DATA + offset

    def close(self) -> None:
        """Close the file. The memory stays mapped as long as arrays of it are in use. Closing twice does nothing."""
        file, self.file = self.file, -1
        if file < 0:
            return
        os.close(file)
        del self._start
        with contextlib.suppress(BufferError):
            self.memory.close()


_MOST_AREAS: Final = 64
"""Areas that are looked at in one QEMU: memshrs that died while they put one in have left the others."""


def is_ours(file: int) -> bool:
    """Whether a file is a control area that a memshr made: root's own mark, the size, and the seals that keep it.

    SAFETY: a QEMU that has been broken out of could show us a file of its own under this name, and cut it short while
    we have it mapped. Only root can set the mark, and nobody can take the seals off.
    """
    if mark.of(file) != _MARK or os.fstat(file).st_size != CONTROL_BYTES:
        return False
    return syscalls.get_seals(file) & _SEALS == _SEALS


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
