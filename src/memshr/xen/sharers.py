"""Which pages are on a frame that has several: what it takes to know before a frame may be given up.

Xen 4.17 dies ("mm locking order violation") when a share gives up a client's frame that some third domain maps, too.
Xen tells how many gfns are on a frame, not which. So this remembers, for a bounded number of frames, the pages that
were put together here, and those that others put together and that Xen gave the same handle for. Before a frame is
given up, that is compared with what Xen counts, and a share that cannot be proved safe is refused.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable

from memshr.types import DomId, Gfn, Handle

Page = tuple[DomId, Gfn]

MAX_FRAMES = 1 << 16
MAX_PAGES_OF_A_FRAME = 1024


class Sharers:
    """The pages of each shared frame, by the frame's handle, as far as this process has put or seen them there.

    Bounded: the frames that were touched longest ago, and frames with very many pages, are forgotten. To forget is
    safe; a frame that is not known is never given up while it has more than one page.
    """

    def __init__(self, max_frames: int = MAX_FRAMES) -> None:
        self._pages: OrderedDict[Handle, set[Page]] = OrderedDict()
        self._max_frames = max_frames

    def join(self, source: Page, source_handle: Handle, client: Page, client_handle: Handle) -> None:
        """The client's frame was given up for the source's."""
        moved = self._pages.pop(client_handle, None)
        self._add(source_handle, {source, client} if moved is None else moved | {source})

    def learn(self, handle: Handle, pages: Iterable[Page]) -> None:
        """These are all the pages of a frame, as was just found out."""
        self._pages[handle] = set(pages)

    def seen(self, handle: Handle, pages: Iterable[Page]) -> None:
        """These pages are on one frame: Xen has one handle for all of them."""
        self._add(handle, set(pages))

    def plug(self, source: Page, handle: Handle, client: Page) -> None:
        """A page was put on the source's frame without giving up another."""
        self._add(handle, {source, client})

    def _add(self, handle: Handle, pages: set[Page]) -> None:
        together = self._pages.pop(handle, set())
        together |= pages
        if len(together) > MAX_PAGES_OF_A_FRAME:
            return
        self._pages[handle] = together
        if len(self._pages) > self._max_frames:
            self._pages.popitem(last=False)

    def pages(self, handle: Handle) -> frozenset[Page]:
        """Every page that was put on the frame, also those that have left since; empty if nothing is known."""
        return frozenset(self._pages.get(handle, ()))
