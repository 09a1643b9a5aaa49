"""Finding and opening the hypervisor: which library, which release, and whether both are ones that we know.

Nothing is guessed: the library's release is in its soname, the hypervisor tells its own, and the size of the one
structure that matters is measured by letting the library fill one.
"""

from __future__ import annotations

import ctypes
import errno
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from memshr.errors import ConnectionLostError, PermissionDeniedError, UnsupportedError
from memshr.xen import libxc
from memshr.xen.libxc import RELEASES, DominfFlag, Libxc, Release

Loader = Callable[[Release], Libxc | None]

_NO_XEN = "boot this machine into Xen (docs/xen-host.md says what host is needed)"
_CANARY = 0xA5
_PROBE_BYTES = 4096


@dataclass(frozen=True, slots=True)
class HostFacts:
    """What was found when the host was opened, for ``status`` to print."""

    version: str
    """The hypervisor's own, such as "4.17.7"."""
    library: str
    """The soname that was loaded."""
    capabilities: str
    """XENVER_capabilities: the kinds of guests that this machine can run."""
    sharing: bool
    """Memory sharing is compiled into the hypervisor."""


class Connection:
    """An open control interface and foreign-memory interface of one library.

    :raises UnsupportedError: no Xen here, or a release or a dom0 that memshr does not know how to handle.
    :raises PermissionDeniedError: this user, or this domain, may not control the hypervisor.
    """

    def __init__(self, functions: Libxc) -> None:
        self.libxc = functions
        # Without a logger of ours the library writes its own story to stderr; users get one line, from us.
        self._logger = functions.xtl_createlogger_stdiostream(libxc.standard_error(), libxc.XTL_SILENT, 0)
        self.xch = self.fmem = None
        self.logger = self._logger
        """The library's logger, which says nothing; for other libraries of Xen."""
        ctypes.set_errno(0)
        self.xch = functions.xc_interface_open(self._logger, self._logger, 0)
        if not self.xch:
            raise self._refused("the hypervisor's control interface", ctypes.get_errno())
        self.fmem = functions.xenforeignmemory_open(self._logger, 0)
        if not self.fmem:
            number = ctypes.get_errno()
            self.close()
            raise self._refused("the foreign-memory interface", number)

    @staticmethod
    def _refused(what: str, number: int) -> UnsupportedError | PermissionDeniedError:
        reason = os.strerror(number)
        if number in (errno.EACCES, errno.EPERM):
            return PermissionDeniedError(f"{what} cannot be opened: {reason}", remedy="run as root in dom0")
        return UnsupportedError(
            f"{what} cannot be opened: {reason}: this is not the control domain of a Xen host", remedy=_NO_XEN
        )

    def close(self) -> None:
        """Give everything back; the object is of no use afterwards."""
        if self.fmem:
            self.libxc.xenforeignmemory_close(self.fmem)
        if self.xch:
            self.libxc.xc_interface_close(self.xch)
        if self._logger:
            self.libxc.xtl_logger_destroy(self._logger)
        self.fmem = self.xch = self._logger = None

    def hypervisor_release(self) -> Release:
        """What the hypervisor says that it is.

        :raises PermissionDeniedError: it does not answer this domain.
        """
        answer = self.libxc.xc_version(self.xch, libxc.XENVER_VERSION, None)
        if answer < 0:
            raise self._refused("the hypervisor's version", ctypes.get_errno())
        return Release(answer >> 16, answer & 0xFFFF)

    def text(self, command: int, size: int) -> str:
        """One of the hypervisor's texts about itself; "" if it does not tell."""
        buffer = ctypes.create_string_buffer(size)
        # SAFETY: size is that of the type which version.h names for the command; the library fills no more.
        if self.libxc.xc_version(self.xch, command, ctypes.addressof(buffer)) < 0:
            return ""
        return buffer.value.decode(errors="replace").strip()

    def check_domaininfo(self) -> None:
        """Let the library fill one xc_domaininfo_t, and see that it has the size that we think, and dom0 in it.

        :raises UnsupportedError: it has not, or dom0 is one from which sharing cannot be driven.
        :raises PermissionDeniedError: this is not a privileged domain.
        """
        release = self.libxc.release
        dtype = libxc.domaininfo_dtype(release)
        probe = np.full(_PROBE_BYTES, _CANARY, np.uint8)
        # SAFETY: the library writes one structure; no release has one of more than 128 bytes, and here are 4096.
        found = self.libxc.xc_domain_getinfolist(self.xch, 0, 1, probe.ctypes.data)
        if found < 0:
            number = ctypes.get_errno()
            if number in (errno.EPERM, errno.EACCES):
                raise PermissionDeniedError(
                    "the hypervisor does not let this domain list domains",
                    remedy=f"run in dom0, with the tools of the hypervisor that runs ({release} is loaded)",
                )
            raise ConnectionLostError(f"the list of domains cannot be read: {os.strerror(number)}")
        touched = np.flatnonzero(probe != _CANARY)
        filled = int(touched[-1]) + 1 if len(touched) else 0
        # The structure ends in words that are small numbers, so its last bytes are zeros, not canaries.
        if not dtype.itemsize - 8 < filled <= dtype.itemsize:
            raise UnsupportedError(
                f"{self.libxc.soname} fills {filled} bytes for a domain, Xen {release} has {dtype.itemsize}: this is a "
                "modified library, and memshr will not guess",
                remedy=f"install the unmodified library of Xen {release}",
            )
        dom0 = probe[: dtype.itemsize].view(dtype)[0]
        if found != 1 or dom0["domain"] != 0:
            raise UnsupportedError(f"{self.libxc.soname}: the first domain is not dom0: this is no list of domains")
        if dom0["flags"] & DominfFlag.HVM_GUEST:
            raise UnsupportedError(
                "dom0 is PVH, and Xen lets no PVH dom0 map a shared page, so contents could not be compared",
                remedy="boot Xen without dom0=pvh",
            )


def connect(loader: Loader = libxc.load) -> Connection:
    """Open the hypervisor of this machine with the library that belongs to it.

    :param loader: gives the library of a release, or None if it is not installed.
    :raises UnsupportedError: no library, no Xen, or a release that is not known.
    :raises PermissionDeniedError: this user or domain may not.
    """
    installed = {release: functions for release in RELEASES if (functions := loader(release)) is not None}
    if not installed:
        first, last = min(RELEASES), max(RELEASES)
        raise UnsupportedError(
            f"no libxenctrl found (looked for libxenctrl.so.{first} to .{last})",
            remedy="install the tools of the Xen that runs here, on Debian xen-utils",
        )
    connection = Connection(installed[max(installed)])
    try:
        running = connection.hypervisor_release()
        if running not in RELEASES:
            raise UnsupportedError(
                f"Xen {running} is not known to this memshr, which knows {_listed(RELEASES)}",
                remedy="use a memshr that knows it; structures differ between releases and are not guessed",
            )
        if running not in installed:
            raise UnsupportedError(
                f"Xen {running} runs here, but the installed library is that of {_listed(installed)}",
                remedy=f"install libxenctrl.so.{running}",
            )
        if connection.libxc.release != running:
            connection.close()
            connection = Connection(installed[running])
        connection.check_domaininfo()
    except BaseException:
        connection.close()
        raise
    return connection


def _listed(releases: Mapping[Release, object]) -> str:
    return ", ".join(str(release) for release in sorted(releases))


def runs_xen(sys_hypervisor: Path = Path("/sys/hypervisor/type")) -> bool:
    """True if this kernel runs on Xen, whatever may be installed."""
    try:
        return sys_hypervisor.read_text().strip() == "xen"
    except OSError:
        return False
