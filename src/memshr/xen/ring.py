"""The sharing ring of a domain: the page through which Xen asks for memory, and in which the answers are put.

What makes this hard: Xen initialises nothing, believes the page, and counts for itself how many responses it has taken.
On a page of garbage ``xc_memshr_domain_resume`` takes what lies there for up to 2**32 responses, and the hypervisor
prints a line for each. So a ring that was enabled here carries a mark, and Xen is not told to look at any other.

The layout is that of Xen's public ``io/ring.h`` and ``vm_event.h`` (version 7, which entries say of themselves). Xen is
the ring's front end: it puts requests in, and we put responses over them, one for each, in order; so request i and
response i lie in one place, and what is unanswered is what lies between the two producers' indices.
"""

from __future__ import annotations

import ctypes
import struct
from typing import TYPE_CHECKING

import numpy as np

from memshr import errors
from memshr.errors import Status
from memshr.hypervisor import error_of
from memshr.types import PAGE_SIZE, Gfn, RingRequest
from memshr.xen import libxc

if TYPE_CHECKING:
    from memshr.xen.connection import Connection
    from memshr.xen.mappings import Mappings

ENTRIES = 8
"""(4096 - 64) / 400 rounded down to a power of two, as __RING_SIZE of io/ring.h does."""

_INDICES = struct.Struct("<IIII")  # req_prod, req_event, rsp_prod, rsp_event
_RSP_PROD_OFFSET = 8
_ENTRY_HEAD = struct.Struct("<IIII")  # version, flags, reason, vcpu_id
_MARK = b"memshr's sharing ring, version 7"
_MODULUS = 1 << 32


class SharingRing:
    """The ring of one domain, seen through mappings that last for one call.

    The page stays in the domain's own address space, so what it says is the word of a guest: indices are checked
    against each other. One process that enables and serves the ring also knows how much it has answered, and notices
    what a guest has written; processes that take turns (``memshr ctl``) do not: they are for guests that are trusted.
    """

    def __init__(self, connection: Connection, mappings: Mappings, domid: int) -> None:
        self._mappings = mappings
        self._domid = domid
        gfn = ctypes.c_uint64()
        parameter = libxc.HVM_PARAM_SHARING_RING_PFN
        answer = connection.libxc.xc_hvm_param_get(connection.xch, domid, parameter, ctypes.byref(gfn))
        self.gfn = Gfn(gfn.value) if answer >= 0 else Gfn(0)
        """Where it is; 0 if the domain has no page for it."""

    def initialise(self) -> None:
        """Make the page an empty ring of ours. Xen must not be putting requests in meanwhile.

        :raises HostMemoryError: :raises NotSharableError: the page cannot be written.
        """
        page = bytearray(PAGE_SIZE)
        _INDICES.pack_into(page, 0, 0, 1, 0, 1)  # SHARED_RING_INIT
        page[libxc.RING_PAD_OFFSET : libxc.RING_PAD_OFFSET + len(_MARK)] = _MARK
        self._write(bytes(page), 0, "ring_enable")

    def _write(self, data: bytes, offset: int, call: str) -> None:
        status = self._mappings.write(self._domid, self.gfn, data, offset)
        if status != Status.OK:
            raise error_of(call, status, domid=self._domid, gfn=self.gfn)

    def _page(self, call: str) -> bytes:
        page = np.zeros((1, PAGE_SIZE), np.uint8)
        status = int(self._mappings.read(self._domid, np.array([self.gfn], np.int64), page)[0]) if self.gfn else 1
        data = page.tobytes()
        mark = data[libxc.RING_PAD_OFFSET : libxc.RING_PAD_OFFSET + len(_MARK)]
        if status != Status.OK or mark != _MARK:
            raise self._refused(call, "has no sharing ring that memshr has enabled")
        return data

    def _refused(self, call: str, why: str) -> errors.RefusedDomainError:
        text = f"{call}: domain {self._domid} {why}"
        return errors.RefusedDomainError(
            text,
            reasons=(text,),
            call=call,
            status=Status.EINVAL,
            domid=self._domid,
            remedy="enable it anew with ring_disable and ring_enable; Xen would take garbage for responses",
        )

    def _unanswered(self, page: bytes, call: str) -> range:
        requests, _, responses, _ = _INDICES.unpack_from(page, 0)
        count = (requests - responses) % _MODULUS
        if count > ENTRIES:
            raise self._refused(call, f"has a sharing ring with {count} unanswered requests, and it holds {ENTRIES}")
        return range(responses, responses + count)

    def check(self, call: str, responses: int | None) -> None:
        """See that this is a ring that Xen may be told to look at.

        :param responses: what ``respond`` said last; None: that is not known, because another process did it.
        :raises RefusedDomainError: EINVAL: it is not.
        """
        unanswered = self._unanswered(self._page(call), call)
        if responses not in (None, unanswered.start):
            raise self._refused(call, "has written into its sharing ring")

    def requests(self) -> list[RingRequest]:
        """What is unanswered, oldest first.

        :raises RefusedDomainError: EINVAL: this is no ring of ours.
        :raises UnsupportedError: its entries have a layout that memshr does not know.
        """
        page = self._page("ring_requests")
        return [self._request(page, index) for index in self._unanswered(page, "ring_requests")]

    def _request(self, page: bytes, index: int) -> RingRequest:
        place = libxc.RING_ENTRIES_OFFSET + index % ENTRIES * libxc.VM_EVENT_BYTES
        version, flags, _, vcpu = _ENTRY_HEAD.unpack_from(page, place)
        if version != libxc.VM_EVENT_VERSION:
            raise errors.UnsupportedError(
                f"an entry of the sharing ring of domain {self._domid} has version {version} of Xen's vm_event.h,"
                f" memshr knows version {libxc.VM_EVENT_VERSION}"
            )
        (gfn,) = struct.unpack_from("<Q", page, place + libxc.VM_EVENT_GFN_OFFSET)
        return RingRequest(Gfn(gfn), vcpu if flags & libxc.VM_EVENT_VCPU_PAUSED else None)

    def respond(self, count: int | None) -> int:
        """Answer the ``count`` oldest requests; None: all. A response is its request, which Xen finds in its place.

        :returns: the ring's index of responses, modulo 2**32.
        :raises RefusedDomainError: EINVAL: this is no ring of ours, or the ring has fewer requests.
        """
        page = self._page("ring_respond")
        unanswered = self._unanswered(page, "ring_respond")
        count = len(unanswered) if count is None else count
        if not 0 <= count <= len(unanswered):
            raise error_of("ring_respond", Status.EINVAL, domid=self._domid)
        for index in unanswered[:count]:
            self._request(page, index)  # its layout is known, or nothing is answered
        responses = (unanswered.start + count) % _MODULUS
        self._write(struct.pack("<I", responses), _RSP_PROD_OFFSET, "ring_respond")
        return responses
