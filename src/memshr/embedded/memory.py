"""Machine memory: frames with contents, their owners, and the references that others hold on them.

Frames come in banks. A bank of RAM is anonymous memory that is touched only when a frame of it is written; a bank of an
image is the image itself, mapped copy-on-write, so its contents stay in the file until a guest writes. A frame of RAM
that is freed is handed out again; a frame of an image is not.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memshr.embedded.columns import CHUNK, CHUNK_BITS, Column, Index, Spots
from memshr.types import DOMID_COW, PageBytes, page_buffer

NOBODY = 0
"""Owner of a free frame. (dom0's number: its frames are not modelled.)"""

_SCRUB = 1


@dataclass(slots=True)
class _Bank:
    first_mfn: int
    pages: PageBytes
    owner: int
    ram: bool


class MachineMemory:
    """All the machine frames of a host.

    :param limit_pages: how many frames domains may own together, image frames included; None: no limit.
    :param scrub_byte: what a fresh frame of RAM is filled with. 0 costs nothing; Xen's debug build uses 0xc2.
    """

    def __init__(self, limit_pages: int | None = None, scrub_byte: int = 0) -> None:
        self._banks: list[_Bank] = []
        self._bank_of_chunk: dict[int, _Bank] = {}
        self._next_mfn = CHUNK  # chunk 0 stays empty, so that mfn 0 is never a frame
        self._free: list[int] = []  # last in, first out; mfn << 1 | must be scrubbed before anybody sees it
        self._limit_pages = limit_pages
        self._scrub_byte = scrub_byte
        self.allocated_pages = 0
        self.owner = Column(np.uint16, self._default_owner)
        self.extra_refs: dict[int, int] = {}
        """References to a frame besides its owner's, such as foreign mappings: mfn -> how many (at least 1)."""
        self.writable_frames: set[int] = set()
        """Frames that the hypervisor itself writes, such as rings: they cannot be shared."""
        self._parked: set[int] = set()  # frames without an owner that wait for their last extra reference

    def _default_owner(self, key: int) -> NDArray[np.uint16] | None:
        bank = self._bank_of_chunk.get(key)
        if bank is None or bank.owner == NOBODY:
            return None
        owners = np.zeros(CHUNK, np.uint16)
        owners[: bank.first_mfn + len(bank.pages) - (key << CHUNK_BITS)] = bank.owner
        return owners

    def _add_bank(self, pages: PageBytes, owner: int, *, ram: bool) -> _Bank:
        bank = _Bank(self._next_mfn, pages, owner, ram)
        chunks = -(-len(pages) // CHUNK)
        for key in range(self._next_mfn >> CHUNK_BITS, (self._next_mfn >> CHUNK_BITS) + chunks):
            self._bank_of_chunk[key] = bank
        self._next_mfn += chunks << CHUNK_BITS
        self._banks.append(bank)
        return bank

    @property
    def free_pages(self) -> int | None:
        """How many more frames can be allocated; None: no limit."""
        return None if self._limit_pages is None else self._limit_pages - self.allocated_pages

    def add_image(self, pages: PageBytes, owner: int) -> int:
        """Make the pages of an image frames of ``owner``; returns the mfn of the first. The array is kept, not copied.

        Cost: none for each page.
        """
        self.allocated_pages += len(pages)
        return self._add_bank(pages, owner, ram=False).first_mfn

    def allocate_run(self, owner: int, count: int) -> int | None:
        """``count`` fresh frames of RAM in a row for ``owner``, the mfn of the first; None if there is no room."""
        if self._limit_pages is not None and self.allocated_pages + count > self._limit_pages:
            return None
        try:
            pages = page_buffer(count)
        except OSError:  # more than this process may map
            return None
        self.allocated_pages += count
        bank = self._add_bank(pages, owner, ram=True)
        if self._scrub_byte:
            bank.pages[:] = self._scrub_byte
        return bank.first_mfn

    def allocate(self, owner: int, *, overwritten: bool = False) -> int | None:
        """A frame of RAM for ``owner``; None if the machine has none left.

        :param overwritten: the caller fills all of it at once, so it need not be scrubbed before.

        As in Xen, a frame that a living domain gave back is handed out as it is, contents and all, and last in comes
        first out; fresh frames, those of dead domains and those that were shared hold the scrub byte.
        """
        if self._limit_pages is not None and self.allocated_pages >= self._limit_pages:
            return None
        if not self._free:
            bank = self._add_bank(page_buffer(CHUNK), NOBODY, ram=True)
            fresh = range(bank.first_mfn, bank.first_mfn + CHUNK)  # handed out from the top, as in Xen
            self._free.extend(mfn << 1 | (_SCRUB if self._scrub_byte else 0) for mfn in fresh)
        free = self._free.pop()
        mfn = free >> 1
        if free & _SCRUB and not overwritten:
            self.page(mfn)[:] = self._scrub_byte
        self.allocated_pages += 1
        self.owner.set(mfn, owner)
        return mfn

    def free(self, mfn: int, *, scrub: bool = False) -> None:
        """Take a frame from its owner. While extra references are held its contents stay; then it can be reused.

        :param scrub: nobody may see its contents again; so it is with a shared frame in any case.
        """
        scrub |= self.owner.get(mfn) == DOMID_COW
        self.owner.set(mfn, NOBODY)
        self.allocated_pages -= 1
        if mfn in self.extra_refs:
            self._parked.add(mfn)
        elif self._bank_of_chunk[mfn >> CHUNK_BITS].ram:
            self._free.append(mfn << 1 | scrub)

    def free_many(self, mfns: Index) -> None:
        """``free`` for many distinct frames, which belonged to dead domains or were shared: all are scrubbed."""
        self.owner.scatter(Spots(mfns), NOBODY)
        self.allocated_pages -= len(mfns)
        if self.extra_refs:
            held = np.isin(mfns, np.fromiter(self.extra_refs, np.int64))
            self._parked.update(mfns[held].tolist())
            mfns = mfns[~held]
        for key in np.unique(mfns >> CHUNK_BITS).tolist():
            if self._bank_of_chunk[key].ram:
                self._free.extend((mfns[mfns >> CHUNK_BITS == key] << 1 | _SCRUB).tolist())

    def hold(self, mfn: int) -> None:
        """Take an extra reference."""
        self.extra_refs[mfn] = self.extra_refs.get(mfn, 0) + 1

    def release(self, mfn: int) -> None:
        """Give an extra reference back; the last one on a frame that was freed meanwhile makes it free at last."""
        left = self.extra_refs[mfn] - 1
        if left:
            self.extra_refs[mfn] = left
            return
        del self.extra_refs[mfn]
        if mfn in self._parked:
            self._parked.remove(mfn)
            if self._bank_of_chunk[mfn >> CHUNK_BITS].ram:
                self._free.append(mfn << 1 | _SCRUB)

    def page(self, mfn: int) -> NDArray[np.uint8]:
        """The contents of one frame, shape ``(PAGE_SIZE,)``, writable: the frame itself, not a copy."""
        bank = self._bank_of_chunk[mfn >> CHUNK_BITS]
        return bank.pages[mfn - bank.first_mfn]  # type: ignore[no-any-return]  # a row of an array

    def run(self, mfn: int, count: int) -> PageBytes | None:
        """Frames ``mfn`` to ``mfn + count`` as one view; None if they are not in one bank."""
        bank = self._bank_of_chunk[mfn >> CHUNK_BITS]
        start = mfn - bank.first_mfn
        return bank.pages[start : start + count] if start + count <= len(bank.pages) else None

    def read(self, mfns: Index, out: PageBytes, rows: NDArray[np.intp] | None = None) -> None:
        """Copy frame ``mfns[i]`` to row i of ``out``, or to row ``rows[i]``."""
        if not len(mfns):
            return
        keys = mfns >> CHUNK_BITS
        for key in np.unique(keys).tolist():
            bank = self._bank_of_chunk[key]
            here = keys == key
            indices = mfns[here] - bank.first_mfn
            if rows is None and len(indices) == len(mfns):
                np.take(bank.pages, indices, axis=0, out=out[: len(mfns)], mode="clip")
            else:
                out[np.flatnonzero(here) if rows is None else rows[here]] = bank.pages[indices]

    def copy(self, source_mfn: int, client_mfn: int) -> None:
        """Copy one frame to another. An image's page that is equal already is not touched: that would cost memory."""
        source, client = self.page(source_mfn), self.page(client_mfn)
        if self._bank_of_chunk[client_mfn >> CHUNK_BITS].ram or not np.array_equal(source, client):
            client[:] = source
