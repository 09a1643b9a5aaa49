"""The one door to what is nominated and what is in flight: the state of every page of every guest, and its handle.

A page is in one of these states:

* *plain*: we do not protect it.
* *protecting*: it is being write-protected, and we wait for the guest's disk requests that are under way. Nobody has
  seen a handle yet. A write takes it back to plain.
* *nominated*: it is protected and has a handle. A write kills the handle first, then goes on.
* *in flight*: it is protected, and its writers wait. It is being remapped.

What holds, whatever fails and whenever it is interrupted:

1. What is nominated is protected. So protection comes before the handle, and the handle goes before the protection.
2. A transition is done wholly or leaves no trace. If even undoing fails, the guest is given up: its protection ends,
   its writers go on, and none of its pages is nominated.
3. ``remapping`` takes pages in flight, and it alone lands or reverts them. The write watch leaves them alone.

No other module writes these arrays. They are of all guests. Each guest has a lock of its own, so a guest that is slow
to answer delays no other.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import DomainError, InvariantError
from memshr.indices import GuestPage, PageId, of_kind
from memshr.qemu.attachment import Attachment
from memshr.qemu.interrupts import uninterrupted
from memshr.qemu.ram import Pages
from memshr.types import Handles

PageIds = NDArray[PageId]
"""pages of all guests in one count: those of the first guest, then those of the second, ..."""

_PLAIN, _PROTECTING, _NOMINATED, _IN_FLIGHT = range(4)
_FIRST_HANDLE: Final = 2


class PageStates:
    """The states of the pages of some guests, all plain at first.

    :param guests: domid 1 first; their pages are numbered one guest after the other. A guest that gives its link up
        has its pages plain from then on.
    """

    def __init__(self, guests: Sequence[Attachment]) -> None:
        counts = [guest.pages for guest in guests]
        self._base = np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)
        self._phase = np.zeros(int(self._base[-1]), dtype=np.uint8)
        self._handle = np.zeros(int(self._base[-1]), dtype=np.uint64)
        # Entered again by the thread that has it when a guest is given up in the midst of a transition.
        self._locks = [threading.RLock() for _ in guests]
        self._next_handle = _FIRST_HANDLE

    # -- looking ---------------------------------------------------------------------------------------------------

    def nominated(self, ids: PageIds) -> NDArray[np.bool_]:
        """Which pages are nominated at this moment."""
        return np.asarray(self._phase[ids] == _NOMINATED)

    def plain(self, ids: PageIds) -> NDArray[np.bool_]:
        """Which pages are plain at this moment."""
        return np.asarray(self._phase[ids] == _PLAIN)

    def handles(self, ids: PageIds) -> Handles:
        """The handle of each page, 0 where it is not nominated."""
        return np.where(self._phase[ids] == _NOMINATED, self._handle[ids], np.uint64(0))

    def all_nominated(self) -> PageIds:
        """Every page that is nominated at this moment, ascending."""
        return of_kind(PageId, np.flatnonzero(self._phase == _NOMINATED))

    def new_handles(self, count: int) -> Handles:
        """Handles that nobody ever had, ascending."""
        first = self._next_handle
        self._next_handle += count
        return np.arange(first, first + count, dtype=np.uint64)

    # -- transitions -----------------------------------------------------------------------------------------------

    def nominate(self, guest: Attachment, ids: PageIds) -> Handles:
        """Plain -> protecting -> nominated: protect pages, then give them handles.

        :param ids: ascending and distinct, all of this guest and plain.
        :returns: the handle of each. One that was written before all were protected has a handle that is dead already.
        :raises DomainError: the guest has ended, or was given up. :raises HostMemoryError: no memory to protect them.
        """
        handles = self.new_handles(len(ids))
        try:
            with self._locks[guest.domid - 1]:
                if (self._phase[ids] != _PLAIN).any():
                    raise InvariantError("a page is nominated twice")
                self._phase[ids] = _PROTECTING
            guest.protect(self._local(guest, ids))
            if guest.must_drain:
                # A request that began before the protection writes past it: until it has ended no handle may be seen.
                guest.drain()
            with self._locks[guest.domid - 1]:
                still = self._phase[ids] == _PROTECTING
                self._handle[ids[still]] = handles[still]
                self._phase[ids[still]] = _NOMINATED
        except BaseException:
            self._undo(guest, ids)
            raise
        return handles

    def _undo(self, guest: Attachment, ids: PageIds) -> None:
        # These were plain before; nobody has seen a handle of theirs.
        with uninterrupted():
            try:
                with self._locks[guest.domid - 1]:
                    mine = ids[(self._phase[ids] == _PROTECTING) | (self._phase[ids] == _NOMINATED)]
                    self._handle[mine] = 0
                    self._phase[mine] = _PLAIN
                # Not only what the books say: protecting may have failed half-way, or been interrupted.
                if guest.link is not None:
                    guest.unprotect(self._local(guest, ids))
            except BaseException as error:
                guest.lose(error)
                if not isinstance(error, DomainError):
                    raise

    def take(self, guest: Attachment, ids: PageIds, handles: Handles) -> NDArray[np.bool_]:
        """Nominated -> in flight, those pages that are still nominated under these handles; returns which."""
        with self._locks[guest.domid - 1]:
            standing = np.asarray((self._phase[ids] == _NOMINATED) & (self._handle[ids] == handles))
            self._phase[ids[standing]] = _IN_FLIGHT
        return standing

    def pin(self, guest: Attachment, ids: PageIds) -> None:
        """Plain or nominated -> in flight, protected; a handle is dead then.

        :raises DomainError: the guest has ended, or was given up.
        """
        with self._locks[guest.domid - 1]:
            self._handle[ids] = 0
            self._phase[ids] = _IN_FLIGHT
        guest.protect(self._local(guest, ids))

    def land(self, guest: Attachment, ids: PageIds) -> None:
        """In flight -> plain: they were remapped, and their writers go on. The books have it already."""
        with self._locks[guest.domid - 1]:
            self._handle[ids] = 0
            self._phase[ids] = _PLAIN
        guest.wake()

    def drop(self, guest: Attachment, ids: PageIds) -> None:
        """In flight -> plain, as if written: they were not remapped, and must not be."""
        with self._locks[guest.domid - 1]:
            self._handle[ids] = 0
            self._phase[ids] = _PLAIN
        guest.unprotect(self._local(guest, ids))

    def complete_or_revert(self, guest: Attachment, ids: PageIds) -> None:
        """In flight -> nominated again, or plain where there is no handle: what was not remapped.

        No table of the guest may be under way. Never raises for a guest that has ended or was given up: none of its
        pages is in flight then.
        """
        flying = ids[self._phase[ids] == _IN_FLIGHT]
        if not len(flying):
            return
        try:
            with self._locks[guest.domid - 1]:
                flying = flying[self._phase[flying] == _IN_FLIGHT]
                again = flying[self._handle[flying] != 0]
                loose = flying[self._handle[flying] == 0]
                self._phase[again] = _NOMINATED
                self._phase[loose] = _PLAIN
            if len(loose):
                guest.unprotect(self._local(guest, np.unique(loose)))
            if len(again):
                guest.wake()
        except DomainError:
            return
        except BaseException as error:
            guest.lose(error)
            raise

    def written(self, guest: Attachment, pages: NDArray[np.int64]) -> None:
        """Nominated or protecting -> plain: a guest writes. The handle dies first, then the writer goes on.

        :param pages: page numbers of the guest, ascending and distinct. Those in flight are left alone.
        """
        ids = pages + self._base[guest.domid - 1]
        with self._locks[guest.domid - 1]:
            standing = self._phase[ids] != _IN_FLIGHT
            self._handle[ids[standing]] = 0
            self._phase[ids[standing]] = _PLAIN
            # Inside the lock: once it is open, the page may be nominated, and so protected, anew.
            guest.unprotect(pages[standing])

    def take_back(self, guest: Attachment, ids: PageIds) -> None:
        """Nominated -> plain: nobody wants to share them any more.

        :raises DomainError: the guest has ended, or was given up: then none of its pages is nominated either.
        """
        with uninterrupted():
            with self._locks[guest.domid - 1]:
                mine = ids[self._phase[ids] == _NOMINATED]
                self._handle[mine] = 0
                self._phase[mine] = _PLAIN
            if len(mine):
                try:
                    guest.unprotect(self._local(guest, mine))
                except DomainError:
                    raise
                except BaseException as error:
                    guest.lose(error)
                    raise

    def forget(self, guest: Attachment) -> None:
        """Whatever -> plain: the guest's link has been given up, and nothing of it is protected any more."""
        mine = slice(int(self._base[guest.domid - 1]), int(self._base[guest.domid]))
        with self._locks[guest.domid - 1]:
            self._handle[mine] = 0
            self._phase[mine] = _PLAIN

    def _local(self, guest: Attachment, ids: PageIds) -> Pages:
        return of_kind(GuestPage, ids - self._base[guest.domid - 1])
