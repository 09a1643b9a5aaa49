"""Xen's control libraries through ctypes: every prototype and structure that memshr uses, each with its source.

This is the one place that knows C. Everything above it calls plain attributes of ``Libxc`` with Python numbers.
The prototypes were read in the headers that Debian ships as ``libxen-dev`` 4.14.6, 4.17.7 and 4.20.3 and Ubuntu as
4.16.0 (``xenctrl.h``, ``xenforeignmemory.h``, ``xentoollog.h``; structures: ``xen/domctl.h``, ``xen/arch-x86/xen.h``,
``xen/version.h``). Where releases differ, ``RELEASES`` says how; a release that is not in it is refused by name.

Errors: libxenctrl's calls return -1 and set errno. The functions are made with ``use_errno=True``, so
``ctypes.get_errno()`` has the errno of the last call of this thread, whatever Python did in between.
"""

from __future__ import annotations

import ctypes
import enum
from collections.abc import Callable, Mapping
from ctypes import POINTER, c_bool, c_int, c_long, c_size_t, c_uint, c_uint32, c_uint64, c_ulong, c_void_p
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from memshr.errors import UnsupportedError

Function = Callable[..., Any]


class Release(NamedTuple):
    """A release of Xen, as its libraries' sonames and the hypervisor itself tell it."""

    major: int
    minor: int

    def __str__(self) -> str:
        return f"{self.major}.{self.minor}"


@dataclass(frozen=True, slots=True)
class Abi:
    """How one release differs from the others, in what memshr uses."""

    domaininfo_bytes: int
    """sizeof(xc_domaininfo_t) on x86-64: ``gpaddr_bits`` and its padding came with 4.16."""
    fork_reset_has_flags: bool
    """xc_memshr_fork_reset takes what to reset, since 4.17; before, it always resets both."""
    createdomain_fields: tuple[str, ...]
    """Of struct xen_domctl_createdomain, what lies between max_maptrack_frames and the end. Only throw-away domains
    need it."""


_EMULATION = ("emulation_flags", "misc_flags")

RELEASES: dict[Release, Abi] = {
    Release(4, 14): Abi(104, False, ("emulation_flags",)),
    Release(4, 15): Abi(104, False, ("vmtrace_size", *_EMULATION)),
    Release(4, 16): Abi(112, False, ("grant_opts", "vmtrace_size", *_EMULATION)),
    Release(4, 17): Abi(112, True, ("grant_opts", "vmtrace_size", "cpupool_id", *_EMULATION)),
    Release(4, 18): Abi(112, True, ("grant_opts", "vmtrace_size", "cpupool_id", *_EMULATION)),
    Release(4, 19): Abi(112, True, ("grant_opts", "altp2m_opts", "vmtrace_size", "cpupool_id", *_EMULATION)),
    Release(4, 20): Abi(112, True, ("grant_opts", "altp2m_opts", "vmtrace_size", "cpupool_id", *_EMULATION)),
}
"""Every release of Xen that memshr knows."""


# -- structures ------------------------------------------------------------------------------------------------------

_DOMAININFO = {
    "domain": ("<u2", 0),
    "flags": ("<u4", 4),
    "tot_pages": ("<u8", 8),
    "max_pages": ("<u8", 16),
    "outstanding_pages": ("<u8", 24),
    "shr_pages": ("<u8", 32),
    "paged_pages": ("<u8", 40),
    "shared_info_frame": ("<u8", 48),
    "cpu_time": ("<u8", 56),
    "nr_online_vcpus": ("<u4", 64),
    "max_vcpu_id": ("<u4", 68),
    "ssidref": ("<u4", 72),
    "handle": ("V16", 76),
    "cpupool": ("<u4", 92),
}
# These offsets are the same from 4.14 to 4.20; what follows them is not, and is not used.


def domaininfo_dtype(release: Release) -> np.dtype[np.void]:
    """xc_domaininfo_t (struct xen_domctl_getdomaininfo, xen/domctl.h) of a release."""
    formats, offsets = zip(*_DOMAININFO.values(), strict=True)
    return np.dtype(
        {
            "names": list(_DOMAININFO),
            "formats": list(formats),
            "offsets": list(offsets),
            "itemsize": RELEASES[release].domaininfo_bytes,
        }
    )


def createdomain_dtype(release: Release) -> np.dtype[np.void]:
    """struct xen_domctl_createdomain (xen/domctl.h) of a release."""
    fields = RELEASES[release].createdomain_fields
    head = ("flags", "iommu_opts", "max_vcpus", "max_evtchn_port", "max_grant_frames", "max_maptrack_frames")
    return np.dtype([("ssidref", "<u4"), ("handle", "V16"), *((name, "<u4") for name in head + fields)])


class DominfFlag(enum.IntFlag):
    """XEN_DOMINF_* of xen/domctl.h."""

    DYING = 1 << 0
    HVM_GUEST = 1 << 1
    SHUTDOWN = 1 << 2
    PAUSED = 1 << 3
    HAP = 1 << 8


DOMINF_SHUTDOWN_SHIFT = 16
DOMINF_SHUTDOWN_MASK = 255
"""XEN_DOMINF_shutdownshift and XEN_DOMINF_shutdownmask of xen/domctl.h: where the flags tell why it was shut down."""
SHUTDOWN_CRASH = 3
"""SHUTDOWN_crash of xen/sched.h."""


class CreateFlag(enum.IntFlag):
    """XEN_DOMCTL_CDF_* of xen/domctl.h."""

    HVM = 1 << 0
    HAP = 1 << 1


X86_EMU_LAPIC = 1 << 0
"""XEN_X86_EMU_LAPIC of xen/arch-x86/xen.h: all that a PVH guest has emulated."""
GRANT_VERSION_1 = 1
"""XEN_DOMCTL_GRANT_version(1) of xen/domctl.h."""
SHADOW_OP_SET_ALLOCATION = 31
"""XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION of xen/domctl.h."""
HVM_PARAM_SHARING_RING_PFN = 29
"""xen/hvm/params.h: the parameter that holds the gfn of the sharing ring's page; 0: there is none."""
RING_ENTRIES_OFFSET = 64
"""Where the entries begin in a shared ring page (xen/io/ring.h)."""
RING_PAD_OFFSET = 20
RING_PAD_BYTES = 44
"""What nobody uses in front of them."""
VM_EVENT_VERSION = 7
VM_EVENT_BYTES = 400
VM_EVENT_GFN_OFFSET = 24
VM_EVENT_VCPU_PAUSED = 1
VM_EVENT_REASON_MEM_SHARING = 2
"""VM_EVENT_INTERFACE_VERSION of xen/vm_event.h, and of that version: the size of an entry, where the gfn of a sharing
event lies in it, VM_EVENT_FLAG_VCPU_PAUSED and VM_EVENT_REASON_MEM_SHARING. Every entry begins with four uint32_t:
version, flags, reason, vcpu_id."""
HYPERVISOR_MEMORY_OP = 12
HYPERVISOR_MULTICALL = 13
XENMEM_SHARING_OP = 22
SHARING_OP_DEBUG_GFN = 3
"""__HYPERVISOR_memory_op and __HYPERVISOR_multicall of xen/xen.h; XENMEM_sharing_op and XENMEM_sharing_op_debug_gfn of
xen/memory.h."""
XENVER_VERSION = 0
XENVER_EXTRAVERSION = 1
EXTRAVERSION_BYTES = 16
XENVER_CAPABILITIES = 3
CAPABILITIES_BYTES = 1024
"""XENVER_* and the sizes of what they fill in, xen/version.h."""
PROT_READ = 1
PROT_WRITE = 2
XTL_SILENT = 10
"""XTL_NUM_LEVELS of xentoollog.h: a level above every message."""


# -- prototypes ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Prototype:
    """One C function: where it is, what it takes and gives, and the header that says so."""

    name: str
    library: str
    restype: Any
    argtypes: tuple[Any, ...]
    header: str = "xenctrl.h"
    optional: bool = False
    """It is not everywhere; where it is missing the attribute is None."""


_XCH = c_void_p  # xc_interface *
_FMEM = c_void_p  # xenforeignmemory_handle *
_XCALL = c_void_p  # xencall_handle *
_DOMID = c_uint32
_GREF = c_uint32  # grant_ref_t, xen/grant_table.h
_ADDRESS = c_void_p  # of an array or structure that the caller keeps alive, as a number
XENCTRL, FOREIGNMEMORY, TOOLLOG, XENCALL = "xenctrl", "xenforeignmemory", "xentoollog", "xencall"


def _xc(name: str, *argtypes: Any, restype: Any = c_int, optional: bool = False) -> Prototype:
    return Prototype(name, XENCTRL, restype, (_XCH, *argtypes), optional=optional)


PROTOTYPES: tuple[Prototype, ...] = (
    Prototype("xc_interface_open", XENCTRL, _XCH, (c_void_p, c_void_p, c_uint)),
    _xc("xc_interface_close"),
    _xc("xc_version", c_int, _ADDRESS),
    _xc("xc_domain_getinfolist", _DOMID, c_uint, _ADDRESS),
    _xc("xc_domain_maximum_gpfn", _DOMID, POINTER(c_ulong)),
    _xc("xc_domain_get_pod_target", _DOMID, POINTER(c_uint64), POINTER(c_uint64), POINTER(c_uint64)),
    _xc("xc_hvm_param_get", _DOMID, c_uint32, POINTER(c_uint64)),
    _xc("xc_availheap", c_int, c_int, c_int, POINTER(c_uint64)),
    _xc("xc_domain_pause", _DOMID),
    _xc("xc_domain_unpause", _DOMID),
    _xc("xc_readconsolering", _ADDRESS, POINTER(c_uint), c_int, c_int, POINTER(c_uint32)),
    # Memory sharing.
    _xc("xc_memshr_control", _DOMID, c_int),
    _xc("xc_memshr_ring_enable", _DOMID, POINTER(c_uint32)),
    _xc("xc_memshr_ring_disable", _DOMID),
    _xc("xc_memshr_domain_resume", _DOMID),
    _xc("xc_memshr_nominate_gfn", _DOMID, c_ulong, POINTER(c_uint64)),
    _xc("xc_memshr_nominate_gref", _DOMID, _GREF, POINTER(c_uint64)),
    _xc("xc_memshr_share_gfns", _DOMID, c_ulong, c_uint64, _DOMID, c_ulong, c_uint64),
    _xc("xc_memshr_share_grefs", _DOMID, _GREF, c_uint64, _DOMID, _GREF, c_uint64),
    _xc("xc_memshr_add_to_physmap", _DOMID, c_ulong, c_uint64, _DOMID, c_ulong),
    _xc("xc_memshr_range_share", _DOMID, _DOMID, c_uint64, c_uint64),
    _xc("xc_memshr_fork", _DOMID, _DOMID, c_bool, c_bool),
    # Up to 4.16 it has the first two parameters only; the caller asks Abi.fork_reset_has_flags.
    _xc("xc_memshr_fork_reset", _DOMID, c_bool, c_bool),
    _xc("xc_memshr_debug_gfn", _DOMID, c_ulong),
    _xc("xc_memshr_debug_gref", _DOMID, _GREF),
    _xc("xc_memshr_audit"),
    _xc("xc_sharing_freed_pages", restype=c_long),
    _xc("xc_sharing_used_frames", restype=c_long),
    # Throw-away domains, for tools/xen-selftest.
    _xc("xc_domain_create", POINTER(c_uint32), _ADDRESS),
    _xc("xc_domain_destroy", _DOMID),
    _xc("xc_domain_max_vcpus", _DOMID, c_uint),
    _xc("xc_domain_setmaxmem", _DOMID, c_uint64),
    _xc("xc_domain_populate_physmap_exact", _DOMID, c_ulong, c_uint, c_uint, _ADDRESS),
    _xc("xc_hvm_param_set", _DOMID, c_uint32, c_uint64),
    _xc("xc_set_paging_mempool_size", _DOMID, c_uint64, optional=True),  # 4.17 and later
    _xc("xc_shadow_control", _DOMID, c_uint, POINTER(c_uint), c_uint),  # 4.16 and later; before, with other parameters
    Prototype("xenforeignmemory_open", FOREIGNMEMORY, _FMEM, (c_void_p, c_uint), "xenforeignmemory.h"),
    Prototype("xenforeignmemory_close", FOREIGNMEMORY, c_int, (_FMEM,), "xenforeignmemory.h"),
    Prototype(
        "xenforeignmemory_map",
        FOREIGNMEMORY,
        c_void_p,
        (_FMEM, _DOMID, c_int, c_size_t, _ADDRESS, _ADDRESS),
        "xenforeignmemory.h",
    ),
    Prototype("xenforeignmemory_unmap", FOREIGNMEMORY, c_int, (_FMEM, c_void_p, c_size_t), "xenforeignmemory.h"),
    # Many hypercalls in one, where that library is there. Its soname has not changed since it came with 4.7.
    Prototype("xencall_open", XENCALL, _XCALL, (c_void_p, c_uint), "xencall.h", optional=True),
    Prototype("xencall_close", XENCALL, c_int, (_XCALL,), "xencall.h", optional=True),
    Prototype("xencall2", XENCALL, c_int, (_XCALL, c_uint, c_uint64, c_uint64), "xencall.h", optional=True),
    Prototype("xencall_alloc_buffer_pages", XENCALL, c_void_p, (_XCALL, c_size_t), "xencall.h", optional=True),
    Prototype("xencall_free_buffer_pages", XENCALL, None, (_XCALL, c_void_p, c_size_t), "xencall.h", optional=True),
    Prototype("xtl_createlogger_stdiostream", TOOLLOG, c_void_p, (c_void_p, c_int, c_uint), "xentoollog.h"),
    Prototype("xtl_logger_destroy", TOOLLOG, None, (c_void_p,), "xentoollog.h"),
)
"""Every C function that memshr calls."""


class Libxc:
    """The functions of PROTOTYPES, as attributes.

    :param functions: name -> ctypes function with the prototype's types.
    :param release: of the library, by its soname.
    :param soname: what was loaded, for people to read.
    """

    xc_interface_open: Function
    xc_interface_close: Function
    xc_version: Function
    xc_domain_getinfolist: Function
    xc_domain_maximum_gpfn: Function
    xc_domain_get_pod_target: Function
    xc_hvm_param_get: Function
    xc_availheap: Function
    xc_domain_pause: Function
    xc_domain_unpause: Function
    xc_readconsolering: Function
    xc_memshr_control: Function
    xc_memshr_ring_enable: Function
    xc_memshr_ring_disable: Function
    xc_memshr_domain_resume: Function
    xc_memshr_nominate_gfn: Function
    xc_memshr_nominate_gref: Function
    xc_memshr_share_gfns: Function
    xc_memshr_share_grefs: Function
    xc_memshr_add_to_physmap: Function
    xc_memshr_range_share: Function
    xc_memshr_fork: Function
    xc_memshr_fork_reset: Function
    xc_memshr_debug_gfn: Function
    xc_memshr_debug_gref: Function
    xc_memshr_audit: Function
    xc_sharing_freed_pages: Function
    xc_sharing_used_frames: Function
    xc_domain_create: Function
    xc_domain_destroy: Function
    xc_domain_max_vcpus: Function
    xc_domain_setmaxmem: Function
    xc_domain_populate_physmap_exact: Function
    xc_hvm_param_set: Function
    xc_set_paging_mempool_size: Function | None
    xc_shadow_control: Function
    xenforeignmemory_open: Function
    xenforeignmemory_close: Function
    xenforeignmemory_map: Function
    xenforeignmemory_unmap: Function
    xencall_open: Function | None
    xencall_close: Function | None
    xencall2: Function | None
    xencall_alloc_buffer_pages: Function | None
    xencall_free_buffer_pages: Function | None
    xtl_createlogger_stdiostream: Function
    xtl_logger_destroy: Function

    def __init__(self, functions: Mapping[str, Function], release: Release, soname: str) -> None:
        self.release = release
        self.soname = soname
        for prototype in PROTOTYPES:
            function = functions.get(prototype.name)
            if function is None and not prototype.optional:
                raise UnsupportedError(
                    f"{soname} has no function {prototype.name}",
                    remedy=f"install the unmodified library of Xen {release}",
                )
            setattr(self, prototype.name, function)


def sonames(release: Release) -> dict[str, str]:
    """The file that each library of a release is found by."""
    return {
        XENCTRL: f"libxenctrl.so.{release}",
        FOREIGNMEMORY: "libxenforeignmemory.so.1",
        TOOLLOG: "libxentoollog.so.1",
        XENCALL: "libxencall.so.1",
    }


def load(release: Release) -> Libxc | None:
    """The libraries of one release; None if its libxenctrl is not installed.

    :raises UnsupportedError: it is installed, but another library or a function is missing.
    """
    names = sonames(release)
    libraries: dict[str, ctypes.CDLL] = {}
    for key, name in names.items():
        try:
            libraries[key] = ctypes.CDLL(name, use_errno=True)
        except OSError as error:
            if key == XENCTRL and str(error).startswith(f"{name}: cannot open"):
                return None
            if key == XENCALL:
                continue  # it only saves time
            raise UnsupportedError(f"{name} cannot be loaded: {error}", remedy=f"reinstall Xen {release}") from error
    functions: dict[str, Function] = {}
    for prototype in PROTOTYPES:
        try:
            # SAFETY: a wrong prototype would let C read or write beyond what we pass. tests/unit/test_xen_libxc.py
            # compares each of these, and the layouts of the structures, with the header that belongs to the library.
            function = libraries[prototype.library][prototype.name]
        except (AttributeError, KeyError):
            continue
        function.restype = prototype.restype
        function.argtypes = argtypes_of(prototype, release)
        functions[prototype.name] = function
    return Libxc(functions, release, names[XENCTRL])


def argtypes_of(prototype: Prototype, release: Release) -> tuple[Any, ...]:
    """What a function takes in a release: what its prototype says, except for the two that changed."""
    if prototype.name == "xc_memshr_fork_reset" and not RELEASES[release].fork_reset_has_flags:
        return (_XCH, _DOMID)
    if prototype.name == "xc_shadow_control" and release < Release(4, 16):
        # xch, domid, sop, dirty_bitmap, pages, mb, mode, stats (xenctrl.h of 4.14)
        return (_XCH, _DOMID, c_uint, c_void_p, c_ulong, POINTER(c_ulong), c_uint32, c_void_p)
    return prototype.argtypes


def standard_error() -> int | None:
    """C's ``stderr``, as the FILE * that the logger of xentoollog.h wants."""
    return ctypes.c_void_p.in_dll(ctypes.CDLL(None), "stderr").value
