"""Pages in flight: from the moment on that their writers wait, through their remapping, until the writers go on.

What makes this hard: a page that is being remapped must not be written, and neither Ctrl-C nor the end of a guest may
leave a writer waiting or let one go too soon. So everything that remaps pages does it here, in this order:

1. ``take`` (by handle) or ``hold`` (from a frame): the page is IN_FLIGHT, and the write watch leaves its writers alone.
2. ``map``, ``empty`` or ``make_private``: the agents of all guests concerned work at the same time. What is done is in
   the books before its writers are woken.
3. ``settle``, whatever happens: what was not remapped is a nominated page again, or let go; but not before its guest's
   agent has ended the table that is under way.
"""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import ConnectionLostError, NoSuchDomainError
from memshr.qemu import pagemap
from memshr.qemu.attachment import BATCH_ENTRIES, MOVED_PAGES, Attachment, Steps, carry_out
from memshr.qemu.books import IN_FLIGHT, NOMINATED, NOWHERE, PLAIN, GuestBooks, Ids
from memshr.types import Handles

_HANDS: Final = min(8, len(os.sched_getaffinity(0)))
"""Guests that are remapped at the same time; more than there are processors would only hold each other up."""


class Remapping:
    """What is in flight of the pages in ``books``."""

    def __init__(self, books: GuestBooks) -> None:
        self._books = books

    # -- taking off ------------------------------------------------------------------------------------------------

    def flights(self, ids: Ids, onto: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        """Cut ascending pages into what is in flight at once: of each guest as many as one table can remap.

        :param onto: what each is mapped to; pages in a run that go to a run are remapped in one call.
        :returns: places in ``ids``.
        """
        of_guests = [rows for _, rows in self._books.by_guest(ids)]
        for first in range(0, len(of_guests), _HANDS):
            flights = [self._flights_of(ids[rows], onto[rows], rows) for rows in of_guests[first : first + _HANDS]]
            for together in itertools.zip_longest(*flights, fillvalue=ids[:0]):
                yield np.concatenate(together)

    @staticmethod
    def _flights_of(ids: Ids, onto: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        piece = np.cumsum((np.diff(ids, prepend=ids[:1]) != 1) | (np.diff(onto, prepend=onto[:1]) != 1))
        first = 0
        while first < len(rows):
            end = min(first + MOVED_PAGES, int(np.searchsorted(piece, piece[first] + BATCH_ENTRIES)))
            yield rows[first:end]
            first = end

    def take(self, ids: Ids, handles: Handles) -> NDArray[np.bool_]:
        """Take those pages in flight that are still nominated under these handles; returns which."""
        with self._books.lock:
            standing = np.asarray((self._books.phase[ids] == NOMINATED) & (self._books.handle[ids] == handles))
            self._books.phase[ids[standing]] = IN_FLIGHT
        return standing

    def hold(self, ids: Ids) -> NDArray[np.bool_]:
        """Take pages in flight that are on frames, protected; returns which still were when it held."""
        with self._books.lock:
            self._books.phase[ids] = IN_FLIGHT
        for guest, rows in self._books.by_guest(ids):
            try:
                guest.protect(self._books.local(guest, ids[rows]))
            except (NoSuchDomainError, ConnectionLostError) as error:
                self._books.note_end(guest, error)
        kept = self._books.on_frame(ids)
        self.settle(ids[~kept])
        return kept

    # -- in flight -------------------------------------------------------------------------------------------------

    def map(self, ids: Ids, frames: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Map frames over in-flight pages, in all their guests at once; returns for which it was done."""
        done = np.zeros(len(ids), dtype=np.bool_)
        carry_out(
            self._map_in(guest, ids[rows], frames[rows], rows, done)
            for guest, rows in self._books.by_guest(ids)
            if not guest.dead
        )
        return done

    def _map_in(
        self,
        guest: Attachment,
        ids: Ids,
        frames: NDArray[np.int64],
        places: NDArray[np.int64],
        done: NDArray[np.bool_],
    ) -> Steps:
        # The part of map that is of one guest; notes in ``done`` at which places it was done.
        mapped = 0
        for books, rows, numbers in self._books.by_pool(frames):
            local = self._books.local(guest, ids[rows])
            try:
                mapped = yield from guest.map_frames(local, numbers, books.pool)
            except (NoSuchDomainError, ConnectionLostError) as error:
                self._books.note_end(guest, error)
                break
            finished = rows[:mapped]
            self._landed(guest, ids[finished], frames[finished])
            done[places[finished]] = True
        return mapped

    def empty(self, ids: Ids) -> NDArray[np.bool_]:
        """Give the memory of in-flight pages back, in all their guests at once; returns for which it was done."""
        done = np.zeros(len(ids), dtype=np.bool_)
        carry_out(
            self._empty_in(guest, ids[rows], rows, done) for guest, rows in self._books.by_guest(ids) if not guest.dead
        )
        return done

    def _empty_in(self, guest: Attachment, ids: Ids, places: NDArray[np.int64], done: NDArray[np.bool_]) -> Steps:
        # The part of empty that is of one guest; notes in ``done`` at which places it was done.
        try:
            emptied = yield from guest.map_nothing(self._books.local(guest, ids), self._books.frame[ids] == NOWHERE)
        except (NoSuchDomainError, ConnectionLostError) as error:
            self._books.note_end(guest, error)
            return 0
        self._landed(guest, ids[:emptied], np.full(emptied, NOWHERE))
        done[places[:emptied]] = True
        return emptied

    def make_private(self, guest: Attachment, ids: Ids) -> int:
        """Give pages of one guest (at most what one table can copy), none of them in flight or nominated, anonymous
        memory of their own; returns how many, from the first on, got it.

        :raises HostMemoryError: the host has no memory for them; nothing was done.
        """
        local = self._books.local(guest, ids)
        with self._books.lock:
            self._books.phase[ids] = IN_FLIGHT
        moved = 0
        try:
            guest.protect(local)
            # Not before: a guest may write to a page that was empty, and what it wrote would not be copied.
            entries = guest.entries(local)
            filled = (pagemap.is_there(entries) & ~guest.pagemap.zero_pages(entries)) | guest.in_pool[local]
            moved = guest.make_private(local, filled)
        except (NoSuchDomainError, ConnectionLostError) as error:
            self._books.note_end(guest, error)
        finally:
            if not guest.dead:
                self._landed(guest, ids[:moved], np.full(moved, NOWHERE))
                self.settle(ids[moved:])
        return moved

    def _landed(self, guest: Attachment, ids: Ids, frames: NDArray[np.int64]) -> None:
        # These pages of one guest are on these frames now (NOWHERE: on none), and their writers may go on.
        self._books.note_frames(guest, ids, frames)
        with self._books.lock:
            self._books.phase[ids] = PLAIN
            self._books.handle[ids] = 0
        self._wake(guest)

    # -- landing ---------------------------------------------------------------------------------------------------

    def settle(self, ids: Ids) -> None:
        """End the flight of pages that were not remapped: a nominated one keeps its handle, others are let go."""
        for guest, _ in self._books.by_guest(ids[self._books.phase[ids] == IN_FLIGHT]):
            with contextlib.suppress(NoSuchDomainError, ConnectionLostError):
                guest.await_agent()
        with self._books.lock:
            flying = ids[self._books.phase[ids] == IN_FLIGHT]
            again = flying[self._books.handle[flying] != 0]
            loose = np.unique(flying[self._books.handle[flying] == 0])
            self._books.phase[again] = NOMINATED
            self._books.phase[loose] = PLAIN
        for guest, rows in self._books.by_guest(loose):
            if not guest.dead:
                guest.unprotect(self._books.local(guest, loose[rows]))
        for guest, _ in self._books.by_guest(again):
            self._wake(guest)

    @staticmethod
    def _wake(guest: Attachment) -> None:
        try:
            guest.wake()
        except NoSuchDomainError:
            guest.dead = True
