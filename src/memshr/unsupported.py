"""The calls that a mechanism need not have, refused: the base class of a mechanism that lacks some capabilities."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar, NoReturn

import numpy as np
from numpy.typing import NDArray

from memshr.errors import UnsupportedError
from memshr.hypervisor import Capability
from memshr.types import DomId, Gfn, GrantRef, Handle, Handles, PageArray, RingRequest, Statuses


class UnsupportedCalls:
    """Every call of the seam that a ``Capability`` stands for raises UnsupportedError.

    A mechanism overrides the calls of the capabilities that it has.
    """

    WHY_NOT: ClassVar[Mapping[Capability, str]]
    """for each capability that the mechanism lacks: the reason, as the end of "call: ..." """

    def _refuse(self, call: str, capability: Capability) -> NoReturn:
        raise UnsupportedError(f"{call}: {self.WHY_NOT[capability]}")

    def nominate_gref(self, domid: DomId, ref: GrantRef) -> Handle:
        """Needs GREF."""
        self._refuse("nominate_gref", Capability.GREF)

    def share_grefs(
        self,
        source_domid: DomId,
        source_ref: GrantRef,
        source_handle: Handle,
        client_domid: DomId,
        client_ref: GrantRef,
        client_handle: Handle,
    ) -> None:
        """Needs GREF."""
        self._refuse("share_grefs", Capability.GREF)

    def debug_gref(self, domid: DomId, ref: GrantRef) -> int:
        """Needs GREF."""
        self._refuse("debug_gref", Capability.GREF)

    def add_to_physmap(
        self, source_domid: DomId, source_gfn: Gfn, source_handle: Handle, client_domid: DomId, client_gfn: Gfn
    ) -> None:
        """Needs PHYSMAP."""
        self._refuse("add_to_physmap", Capability.PHYSMAP)

    def range_share(self, source_domid: DomId, client_domid: DomId, first: Gfn, last: Gfn) -> None:
        """Needs RANGE."""
        self._refuse("range_share", Capability.RANGE)

    def release_zero_pages(self, pages: PageArray, handles: Handles) -> Statuses:
        """Needs ZERO."""
        self._refuse("release_zero_pages", Capability.ZERO)

    def frames_of(self, pages: PageArray) -> NDArray[np.int64]:
        """Needs FRAMES."""
        self._refuse("frames_of", Capability.FRAMES)

    def ring_enable(self, domid: DomId) -> int:
        """Needs RING."""
        self._refuse("ring_enable", Capability.RING)

    def ring_disable(self, domid: DomId) -> None:
        """Needs RING."""
        self._refuse("ring_disable", Capability.RING)

    def ring_requests(self, domid: DomId) -> Sequence[RingRequest]:
        """Needs RING."""
        self._refuse("ring_requests", Capability.RING)

    def ring_respond(self, domid: DomId, count: int | None = None) -> None:
        """Needs RING."""
        self._refuse("ring_respond", Capability.RING)

    def domain_resume(self, domid: DomId) -> None:
        """Needs RING."""
        self._refuse("domain_resume", Capability.RING)

    def fork(self, parent: DomId, child: DomId) -> None:
        """Needs FORK."""
        self._refuse("fork", Capability.FORK)

    def fork_reset(self, child: DomId, *, state: bool = False, memory: bool = False) -> None:
        """Needs FORK."""
        self._refuse("fork_reset", Capability.FORK)
