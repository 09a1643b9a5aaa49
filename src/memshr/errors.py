"""Every error that memshr raises on purpose. The class answers one question: may I go on?

::

    MemshrError
      PageError             skip this page
        NotSharableError      no plain, populated RAM, or no such page
        BusyPageError         somebody else holds a reference to the frame
        StaleHandleError      the page changed since its handle was given out (or never had one); .side says which page
      DomainError           skip this domain
        NoSuchDomainError     unknown domid, or the domain is gone
        SharingDisabledError  sharing is not enabled on the second domain of a call
        DomainDyingError      the domain is being destroyed
        RefusedDomainError    this domain may not be touched; .reasons says why, each with its remedy
      HostMemoryError       stop sharing, relieve the host: no memory to give a page its own copy
      ImageError            this file is no usable memory image
      BackendError          stop
        UnsupportedError      this mechanism cannot do that call
        PermissionDeniedError the operating system or hypervisor does not let us
        ConnectionLostError   the other side went away in mid-call: the outcome is unknown, look again
      InvariantError        our bug: stop and dump state

Errors of hypervisor calls carry ``call`` (the name of the call), ``status`` (Xen's number for it) and the pages they
are about. The text is one line that a user can act on; commands print it and exit, never a traceback.
"""

from __future__ import annotations

import enum
import errno
import os
from collections.abc import Sequence
from typing import Literal

__all__ = [
    "BackendError",
    "BusyPageError",
    "CallError",
    "ConnectionLostError",
    "DomainDyingError",
    "DomainError",
    "HostMemoryError",
    "ImageError",
    "InvariantError",
    "MemshrError",
    "NoSuchDomainError",
    "NotSharableError",
    "PageError",
    "PermissionDeniedError",
    "RefusedDomainError",
    "SharingDisabledError",
    "Side",
    "StaleHandleError",
    "Status",
    "UnsupportedError",
]

Side = Literal["source", "client"]


class Status(enum.IntEnum):
    """What a hypervisor call answers for one page: 0, or Xen's error number (negative, as the hypercall returns it).

    The two handle errors have numbers of their own in Xen's public header ``memory.h``; libxc hands them out as
    errno 10 and 9, which read as ECHILD and EBADF.
    """

    OK = 0
    EPERM = -errno.EPERM
    ENOENT = -errno.ENOENT
    ESRCH = -errno.ESRCH
    ENXIO = -errno.ENXIO
    E2BIG = -errno.E2BIG
    C_HANDLE_INVALID = -9
    S_HANDLE_INVALID = -10
    EAGAIN = -errno.EAGAIN
    ENOMEM = -errno.ENOMEM
    EFAULT = -errno.EFAULT
    EBUSY = -errno.EBUSY
    EXDEV = -errno.EXDEV
    ENODEV = -errno.ENODEV
    EINVAL = -errno.EINVAL
    ENOSYS = -errno.ENOSYS
    EOPNOTSUPP = -errno.EOPNOTSUPP

    @property
    def errno(self) -> int:
        """The errno that libxc would set."""
        return -self.value


def printable(text: str) -> str:
    """Words of strangers as one line that can be shown: bytes that are no text, and control characters, as escapes.

    Names, what QEMU says, what a file holds: everything foreign goes through this before it reaches a terminal or page.
    """
    if text.isprintable():
        return text
    encoded = text.encode("utf-8", "backslashreplace").decode()
    return "".join(letter if letter.isprintable() else letter.encode("unicode_escape").decode() for letter in encoded)


class MemshrError(Exception):
    """The root of the tree. ``remedy`` is what a user can do about it, where there is something."""

    exit_code = 2
    """What a command exits with: 2 for wrong input, 3 for a host that refuses."""

    def __init__(self, message: str, *, remedy: str = "") -> None:
        super().__init__(message)
        self.remedy = remedy

    def __str__(self) -> str:
        text = super().__str__()
        return f"{text}; {self.remedy}" if self.remedy else text


class CallError(MemshrError):
    """A hypervisor call that was refused. Not in the tree by itself: PageError and DomainError are its branches."""

    def __init__(
        self,
        message: str,
        *,
        call: str = "",
        status: Status = Status.EINVAL,
        domid: int | None = None,
        gfn: int | None = None,
        remedy: str = "",
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.call = call
        self.status = status
        self.domid = domid
        self.gfn = gfn


class PageError(CallError):
    """Skip this page; the rest of the run may go on."""


class NotSharableError(PageError):
    """There is no plain RAM at this gfn: a hole, out of range, read-only, a grant frame, a ring page."""


class BusyPageError(PageError):
    """Something besides the domain holds a reference to the frame, such as a foreign mapping or DMA."""


class StaleHandleError(PageError):
    """A handle does not name the present version of the page. ``side`` says whose it is."""

    def __init__(
        self,
        message: str,
        *,
        side: Side,
        call: str = "",
        status: Status = Status.S_HANDLE_INVALID,
        domid: int | None = None,
        gfn: int | None = None,
    ) -> None:
        super().__init__(message, call=call, status=status, domid=domid, gfn=gfn)
        self.side = side


class DomainError(CallError):
    """Skip this domain; the others may go on."""


class NoSuchDomainError(DomainError):
    """No domain has this domid, or it has been destroyed."""


class SharingDisabledError(DomainError):
    """Memory sharing is not enabled on a domain that the call names second."""


class DomainDyingError(DomainError):
    """The domain is being destroyed; its pages go away by themselves."""


class RefusedDomainError(DomainError):
    """The domain is of a kind, or in a state, that memshr must not touch. ``reasons`` has a line for each."""

    exit_code = 3

    def __init__(
        self,
        message: str,
        *,
        reasons: Sequence[str] = (),
        call: str = "",
        status: Status = Status.EINVAL,
        domid: int | None = None,
        remedy: str = "",
    ) -> None:
        super().__init__(message, call=call, status=status, domid=domid, remedy=remedy)
        self.reasons = tuple(reasons)


class HostMemoryError(CallError):
    """No memory for a private copy: nothing was changed, sharing stays as it was."""

    exit_code = 3


class ImageError(MemshrError):
    """A file that is no usable memory image.

    :param path: the file.
    :param offset: byte offset in the file at which reading failed, if it is about a place.
    """

    def __init__(
        self, message: str, *, path: str | os.PathLike[str] = "", offset: int | None = None, remedy: str = ""
    ) -> None:
        super().__init__(message, remedy=remedy)
        self.path = os.fspath(path)
        self.offset = offset

    def __str__(self) -> str:
        place = f" at offset {self.offset:#x}" if self.offset is not None else ""
        # A file name may hold line ends or bytes that no terminal can print; the message stays one printable line.
        name = self.path if self.path.isprintable() else repr(self.path)
        remedy = f"; {self.remedy}" if self.remedy else ""
        return f"{name}: {self.args[0]}{place}{remedy}" if name else f"{self.args[0]}{place}{remedy}"


class BackendError(MemshrError):
    """Stop: this host cannot go on serving."""

    exit_code = 3


class UnsupportedError(BackendError):
    """The mechanism does not have this call (its capabilities said so), or this machine does not."""


class PermissionDeniedError(BackendError):
    """The operating system or the hypervisor does not let this user do it."""


class ConnectionLostError(BackendError):
    """The other side went away in mid-call; what it did of the call is unknown."""


class InvariantError(MemshrError):
    """A bug in memshr: the books contradict themselves. Nothing that follows can be trusted."""

    exit_code = 1
