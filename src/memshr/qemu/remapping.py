"""Pages in flight: from the moment on that their writers wait, through their remapping, until the writers go on.

What makes this hard: a page that is being remapped must not be written, and neither an exception nor the end of a guest
may leave a writer waiting or let one go too soon. So everything that remaps pages does it here, inside ``flight``:

1. ``take`` (by handle) or ``pin``: the page is in flight, and the write watch leaves its writers alone.
2. Each page is looked at once more: is it still protected? A page that is not is dropped as if it were written, and it
   is reported: another part of the kernel has replaced its entry (docs/nominations.md).
3. ``map``, ``empty`` or ``make_private``: the agents of all these guests work at the same time, and none waits for
   another. The books are right before the writers of a page are woken.
4. The end of the ``with``, whatever happens: a page that was not remapped is nominated again, or let go. If waiting for
   a table failed, its guest has been given up before: the agent protects the pages until the table has ended. Ctrl-C
   waits for this.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
from collections.abc import Callable, Iterator
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import DomainError, HostMemoryError
from memshr.qemu import pagemap
from memshr.qemu.attachment import BATCH_ENTRIES, DIFFERS, MAPPED, MOVED_PAGES, Attachment, Steps, carry_out
from memshr.qemu.books import NOWHERE, GuestBooks
from memshr.qemu.interrupts import uninterrupted
from memshr.qemu.states import PageIds
from memshr.runs import jumps
from memshr.types import Handles

_log = logging.getLogger(__name__)

_HANDS: Final = min(8, len(os.sched_getaffinity(0)))
"""Guests that are remapped at the same time; more than there are processors would only hold each other up."""


class Remapping:
    """What is in flight of the pages in ``books``.

    ``unprotected_pages`` counts those that had lost their protection, or did not hold what was compared: they were left
    alone.
    """

    def __init__(self, books: GuestBooks) -> None:
        self._books = books
        self._states = books.states
        self.unprotected_pages = 0

    # -- taking off ------------------------------------------------------------------------------------------------

    def flights(self, ids: PageIds, onto: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
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
    def _flights_of(ids: PageIds, onto: NDArray[np.int64], rows: NDArray[np.int64]) -> Iterator[NDArray[np.int64]]:
        piece = np.cumsum(np.append(True, jumps(ids) | jumps(onto))[: len(ids)])
        first = 0
        while first < len(rows):
            end = min(first + MOVED_PAGES, int(np.searchsorted(piece, piece[first] + BATCH_ENTRIES)))
            yield rows[first:end]
            first = end

    @contextlib.contextmanager
    def flight(self, ids: PageIds) -> Iterator[None]:
        """Whatever of these pages is in flight at the end of the ``with`` is settled then."""
        with uninterrupted(), contextlib.ExitStack() as settling:  # each, whatever the others do
            for guest, rows in self._books.by_guest(ids):
                settling.callback(self._states.complete_or_revert, guest, ids[rows])
            yield

    def take(self, ids: PageIds, handles: Handles) -> NDArray[np.bool_]:
        """Take those pages in flight that are still nominated under these handles, and protected; returns which."""
        standing = np.zeros(len(ids), dtype=np.bool_)
        for guest, rows in self._books.by_guest(ids):
            if guest.link is not None:
                standing[rows] = self._states.take(guest, ids[rows], handles[rows])
        self._drop_unprotected(ids, standing)
        return standing

    def pin(self, ids: PageIds) -> NDArray[np.bool_]:
        """Take pages in flight, protected, whatever they are on; returns which."""
        held = np.zeros(len(ids), dtype=np.bool_)
        for guest, rows in self._books.by_guest(ids):
            if guest.link is not None:
                with contextlib.suppress(DomainError):
                    self._states.pin(guest, ids[rows])
                    held[rows] = True
        self._drop_unprotected(ids, held)
        return held

    def pin_sharers(self, ids: PageIds) -> NDArray[np.bool_]:
        """Take pages in flight that are on frames, protected; returns which still were when it held."""
        held = self.pin(ids)
        kept = held & self._books.on_frame(ids)
        for guest, rows in self._books.by_guest(ids[held & ~kept]):
            with contextlib.suppress(DomainError):
                self._states.drop(guest, ids[held & ~kept][rows])
        return kept

    def _drop_unprotected(self, ids: PageIds, flying: NDArray[np.bool_]) -> None:
        # Takes those pages out of ``flying`` that are not protected any more.
        for guest, rows in self._books.by_guest(ids):
            mine = rows[flying[rows]]
            try:
                bad = mine[~pagemap.is_protected(guest.entries(self._books.local(guest, ids[mine])))]
                if len(bad):
                    self.unprotected_pages += len(bad)
                    text = "guest %s: %d pages lost their write protection to somebody else in the kernel; left alone"
                    _log.error(text, guest.process.name, len(bad))
                    flying[bad] = False
                    self._states.drop(guest, ids[bad])
            except DomainError:
                flying[rows] = False

    # -- in flight -------------------------------------------------------------------------------------------------

    def map(self, ids: PageIds, frames: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Map frames over in-flight pages that hold the same bytes, in all their guests at once.

        :returns: for which it was done.
        """
        return self._in_all(ids, lambda guest, rows, done: self._map_in(guest, ids[rows], frames[rows], rows, done))

    def empty(self, ids: PageIds) -> NDArray[np.bool_]:
        """Give the memory of in-flight pages back, in all their guests at once; returns for which it was done."""
        return self._in_all(ids, lambda guest, rows, done: self._empty_in(guest, ids[rows], rows, done))

    def make_private(self, ids: PageIds) -> NDArray[np.bool_]:
        """Give in-flight pages (of each guest at most what one table can copy) anonymous memory of their own.

        :returns: which got it.
        """
        return self._in_all(ids, lambda guest, rows, done: self._make_private_in(guest, ids[rows], rows, done))

    def _in_all(
        self, ids: PageIds, work: Callable[[Attachment, NDArray[np.int64], NDArray[np.bool_]], Steps]
    ) -> NDArray[np.bool_]:
        # A guest that ends or is given up has done what it has done; the others go on.
        done = np.zeros(len(ids), dtype=np.bool_)

        def shielded(guest: Attachment, rows: NDArray[np.int64]) -> Steps:
            try:
                return (yield from work(guest, rows, done))
            except DomainError:
                return 0
            except BaseException as error:
                # Its mappings may not be what the books say any more.
                guest.lose(error)
                raise

        carry_out(shielded(guest, rows) for guest, rows in self._books.by_guest(ids) if guest.link is not None)
        return done

    def _map_in(
        self,
        guest: Attachment,
        ids: PageIds,
        frames: NDArray[np.int64],
        places: NDArray[np.int64],
        done: NDArray[np.bool_],
    ) -> Steps:
        mapped = 0
        for books, rows, numbers in self._books.by_pool(frames):
            fate = np.zeros(len(rows), dtype=np.int8)
            mapped += yield from guest.map_frames(self._books.local(guest, ids[rows]), numbers, books.pool, fate)
            finished = rows[fate == MAPPED]
            self._landed(guest, ids[finished], frames[finished])
            done[places[finished]] = True
            differing = rows[fate == DIFFERS]
            if len(differing):
                self.unprotected_pages += len(differing)
                text = "guest %s: %d nominated pages do not hold what was compared; left alone"
                _log.error(text, guest.process.name, len(differing))
                self._states.drop(guest, ids[differing])
        return mapped

    def _empty_in(self, guest: Attachment, ids: PageIds, places: NDArray[np.int64], done: NDArray[np.bool_]) -> Steps:
        emptied = yield from guest.map_nothing(self._books.local(guest, ids), self._books.frame[ids] == NOWHERE)
        self._landed(guest, ids[:emptied], np.full(emptied, NOWHERE))
        done[places[:emptied]] = True
        return emptied

    def _make_private_in(
        self, guest: Attachment, ids: PageIds, places: NDArray[np.int64], done: NDArray[np.bool_]
    ) -> Steps:
        local = self._books.local(guest, ids)
        # Not before: a guest may write to a page that was empty, and what it wrote would not be copied.
        entries = guest.entries(local)
        filled = (pagemap.is_there(entries) & ~guest.zero_pages(entries)) | guest.in_pool[local]
        try:
            moved = yield from guest.make_private(local, filled)
        except HostMemoryError as error:
            _log.warning("%s", error)
            return 0
        self._landed(guest, ids[:moved], np.full(moved, NOWHERE))
        done[places[:moved]] = True
        return moved

    def _landed(self, guest: Attachment, ids: PageIds, frames: NDArray[np.int64]) -> None:
        # These pages of one guest are on these frames now (NOWHERE: on none), and their writers may go on.
        self._books.note_frames(guest, ids, frames)
        self._states.land(guest, ids)
