"""Many questions to Xen in one hypercall: how many gfns are on the frame of each of a domain's pages.

libxenctrl asks about one page a call, and nearly all of the time goes into getting there. Xen's multicall takes a list
of hypercalls, and libxencall, which libxenctrl itself stands on, lets us make one. Where that library is not to be had,
pages are asked about one by one.
"""

from __future__ import annotations

import ctypes
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from memshr.errors import ConnectionLostError, Status
from memshr.types import PAGE_SIZE, Gfns
from memshr.xen import libxc

if TYPE_CHECKING:
    from memshr.xen.connection import Connection

CALLS = 1024
"""Hypercalls in one list: their entries and arguments fill 28 pages."""

_ENTRY = np.dtype([("op", "<u8"), ("result", "<i8"), ("args", "<u8", 6)])
"""struct multicall_entry of xen/xen.h on x86-64."""
_SHARING_OP = np.dtype(
    {"names": ["op", "domain", "gfn"], "formats": ["u1", "<u2", "<u8"], "offsets": [0, 2, 8], "itemsize": 48}
)
"""struct xen_mem_sharing_op of xen/memory.h, as far as debug_gfn uses it."""
_ENTRY_PAGES = -(-CALLS * _ENTRY.itemsize // PAGE_SIZE)
_PAGES = _ENTRY_PAGES + -(-CALLS * _SHARING_OP.itemsize // PAGE_SIZE)


class Bulk:
    """Asks about many pages of a domain. Naming the domain enables sharing on it, as by debug_gfn."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        functions = connection.libxc
        self._xcall = self._buffer = None
        if functions.xencall_open is None or functions.xencall_alloc_buffer_pages is None:
            return
        self._xcall = functions.xencall_open(connection.logger, 0)
        if self._xcall:
            self._buffer = functions.xencall_alloc_buffer_pages(self._xcall, _PAGES)
        if not self._buffer:
            self.close()
            return
        # SAFETY: the buffer has _PAGES pages, lives until close, and the views end within it.
        memory = np.ctypeslib.as_array((ctypes.c_uint8 * (_PAGES * PAGE_SIZE)).from_address(self._buffer))
        self._entries = memory[: CALLS * _ENTRY.itemsize].view(_ENTRY)
        first = _ENTRY_PAGES * PAGE_SIZE
        self._ops = memory[first : first + CALLS * _SHARING_OP.itemsize].view(_SHARING_OP)

    def close(self) -> None:
        """Give the library's handle and memory back."""
        functions, xcall, buffer = self._connection.libxc, self._xcall, self._buffer
        self._xcall = self._buffer = None
        if buffer and functions.xencall_free_buffer_pages is not None:
            functions.xencall_free_buffer_pages(xcall, buffer, _PAGES)
        if xcall and functions.xencall_close is not None:
            functions.xencall_close(xcall)

    def sharers(self, domid: int, gfns: Gfns) -> NDArray[np.int64]:
        """How many gfns are on the frame of each of these pages, at most CALLS; 0 where a page is not shared.

        :raises ConnectionLostError: the hypervisor does not take the list.
        """
        if not self._buffer:
            debug, xch = self._connection.libxc.xc_memshr_debug_gfn, self._connection.xch
            return np.maximum([debug(xch, domid, gfn) for gfn in gfns.tolist()], 0, dtype=np.int64)
        count = len(gfns)
        ops, entries = self._ops[:count], self._entries[:count]
        ops["op"], ops["domain"], ops["gfn"] = libxc.SHARING_OP_DEBUG_GFN, domid, gfns
        entries["op"], entries["result"] = libxc.HYPERVISOR_MEMORY_OP, 0
        entries["args"][:, 0] = libxc.XENMEM_SHARING_OP
        entries["args"][:, 1] = ops.ctypes.data + np.arange(count) * _SHARING_OP.itemsize
        multicall = self._connection.libxc.xencall2
        assert multicall is not None  # it comes with xencall_open
        # SAFETY: the list has count entries, each of which points at an argument of its own in the same buffer. Xen
        # writes the results into the entries, and nothing into the arguments of debug_gfn.
        if multicall(self._xcall, libxc.HYPERVISOR_MULTICALL, entries.ctypes.data, count) < 0:
            raise ConnectionLostError(
                f"asking about {count} pages of domain {domid} at once: errno {ctypes.get_errno()}"
            )
        answers: NDArray[np.int64] = entries["result"].copy()
        debug, xch = self._connection.libxc.xc_memshr_debug_gfn, self._connection.xch
        for row in np.flatnonzero((answers < 0) & (answers != Status.EINVAL)).tolist():
            answers[row] = debug(xch, domid, int(gfns[row]))  # not "it is not shared": the call itself tells what it is
        return np.maximum(answers, 0)
