"""Giving up root's rights for good, before data of strangers is parsed.

What needs root in memshr is small: finding guests, attaching to them, protecting pages, posting tables. What is large,
and sees bytes that anybody may have made, needs no rights at all once its files are open: parsing images, laying out
web pages. So a command that has opened everything calls ``drop`` and is ``nobody`` from then on.

Why ``nobody`` and not the user behind sudo (SUDO_UID): that user owns keys, shell start files and running programs, so
whoever broke a parser would be root with the user's next sudo. ``nobody`` owns nothing.

What remains: the descriptors that are open, among them the terminal, and what every user of the host may do. Every user
may read what all may read, use the network, and use processor time. Other processes of ``nobody`` can send us signals,
and we can send them signals.

Sources: credentials(7), capabilities(7), prctl(2), seccomp(2); ``seccomp_sync_threads`` of ``kernel/seccomp.c``.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import pwd
from pathlib import Path
from typing import Final

from memshr.errors import PermissionDeniedError

_NOBODY: Final = "nobody"
_NOBODY_ID: Final = 65534
"""Of a system without a user of that name: what the kernel calls overflowuid."""

_PR_SET_DUMPABLE: Final = 4
_PR_SET_NO_NEW_PRIVS: Final = 38
_PR_CAP_AMBIENT: Final = 47
_PR_CAP_AMBIENT_CLEAR_ALL: Final = 4
_CAPABILITY_VERSION_3: Final = 0x20080522
"""linux/capability.h"""
_NR_SECCOMP: Final = {"x86_64": 317, "aarch64": 277}
_SECCOMP_SET_MODE_FILTER: Final = 1
_SECCOMP_FILTER_FLAG_TSYNC: Final = 1
_BPF_RET: Final = 0x06
_SECCOMP_RET_ALLOW: Final = 0x7FFF0000

_CAPABILITIES: Final = ("CapPrm", "CapEff", "CapAmb")
"""Lines of /proc/PID/status. Inheritable ones (CapInh) give nothing by themselves."""


class _CapabilityHeader(ctypes.Structure):
    _fields_ = (("version", ctypes.c_uint32), ("pid", ctypes.c_int))


class _Instruction(ctypes.Structure):
    _fields_ = (("code", ctypes.c_uint16), ("jt", ctypes.c_uint8), ("jf", ctypes.c_uint8), ("k", ctypes.c_uint32))


class _Program(ctypes.Structure):
    _fields_ = (("length", ctypes.c_ushort), ("filter", ctypes.POINTER(_Instruction)))


_kept = False


def keep(rights: bool) -> None:
    """Whether ``must_drop`` is False whatever rights there are: others than memshr live in this process."""
    global _kept  # noqa: PLW0603  # rights are the process's, and so is this
    _kept = rights


def must_drop() -> bool:
    """Whether ``drop`` has work to do: this process is root, could become root again, or has a capability."""
    if _kept:
        return False
    try:
        return any(_rights_of(status) for status in _threads())
    except OSError:  # no Linux, or no /proc
        return 0 in os.getresuid()


def drop() -> None:
    """Become ``nobody`` without a group, a capability or a way back, in all threads, and see that it is so.

    Afterwards no program that this process executes gains rights, and no other process of ``nobody`` may look into it.

    :raises PermissionDeniedError: it could not be done. Then this process may have lost some rights, and must end.
    """
    try:
        user = pwd.getpwnam(_NOBODY)
        uid, gid = user.pw_uid, user.pw_gid
    except KeyError:
        uid = gid = _NOBODY_ID
    was_root = 0 in os.getresuid()
    try:
        if was_root:
            os.setgroups([])
            os.setresgid(gid, gid, gid)
            os.setresuid(uid, uid, uid)
        _drop_capabilities()
    except OSError as error:
        raise _not_dropped(error.strerror or str(error)) from error
    if problem := _what_is_left(groups=not was_root):
        raise _not_dropped(problem)


def _not_dropped(why: str) -> PermissionDeniedError:
    return PermissionDeniedError(
        f"root's rights could not be given up before files of strangers are read: {why}",
        remedy="run as an ordinary user who may read the files",
    )


def _drop_capabilities() -> None:
    libc = ctypes.CDLL(None, use_errno=True)

    def must(returned: int) -> None:
        if returned:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

    # SAFETY: plain numbers; nothing but the rights of this process changes. The kernel has cleared all sets but the
    # inheritable one of every thread of a process that was root; this is for one that has capabilities without.
    must(libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0))
    must(libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0))
    must(libc.prctl(_PR_CAP_AMBIENT, _PR_CAP_AMBIENT_CLEAR_ALL, 0, 0, 0))
    # SAFETY: a header and two sets of three words, as capset(2) has them for version 3; both outlive the call.
    must(libc.capset(ctypes.byref(_CapabilityHeader(_CAPABILITY_VERSION_3, 0)), (ctypes.c_uint32 * 6)()))
    if (number := _NR_SECCOMP.get(platform.machine())) is not None:
        # A filter that lets everything pass, for what comes with it: all threads get this one's no_new_privs. Threads
        # that libraries have started before would otherwise be without. A kernel without seccomp leaves them so.
        allow = _Instruction(_BPF_RET, 0, 0, _SECCOMP_RET_ALLOW)
        program = _Program(1, ctypes.pointer(allow))
        # SAFETY: the kernel copies the program, one instruction long, during the call.
        libc.syscall(number, _SECCOMP_SET_MODE_FILTER, _SECCOMP_FILTER_FLAG_TSYNC, ctypes.byref(program))


def _threads() -> list[dict[str, str]]:
    # /proc/PID/task/TID/status of each thread of ours.
    found = []
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):  # it has ended
            lines = (task / "status").read_text(errors="replace").splitlines()
            found.append({name: value.strip() for name, _, value in (line.partition(":") for line in lines)})
    return found


def _rights_of(status: dict[str, str]) -> str:
    # What rights a thread has, in words; nothing if it has none.
    if "0" in status["Uid"].split():
        return "it is still root"
    for name in _CAPABILITIES:
        if int(status.get(name, "0"), 16):
            return f"capabilities are left: {name} {status[name]}"
    return ""


def _what_is_left(*, groups: bool) -> str:
    # What should be gone and is not, in words. ``groups``: those of an ordinary user may stay.
    try:
        threads = _threads()
    except OSError as error:
        return f"/proc does not show it: {error.strerror}"
    for status in threads:
        if left := _rights_of(status):
            return left
        if not groups and (status["Groups"] or "0" in status["Gid"].split()):
            return f"groups are left: {status['Gid']} {status['Groups']}"
    with contextlib.suppress(PermissionError):
        os.setuid(0)
        return "it could become root again"
    return ""
