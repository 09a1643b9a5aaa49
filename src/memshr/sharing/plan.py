"""Who goes onto whose frame: the plan by which the pages of one batch are shared.

What makes this hard: among the pages may be frames of earlier sessions, which already have sharers, perhaps in other
domains and outside the batch. A frame takes only so many sharers; and the client of a share may only be a page with a
fresh frame, or a frame all of whose gfns are known to be in one domain (rule 4 of ``session``).
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from numpy.typing import NDArray

from memshr.content.classes import BatchRows, Classes
from memshr.runs import run_starts
from memshr.types import DomIds, Handles


def who_goes_where(
    handles: Handles,
    fresh: NDArray[np.bool_],
    domids: DomIds,
    classes: Classes,
    max_sharers: int,
    sharers_of: Callable[[BatchRows], NDArray[np.int64]],
) -> BatchRows:
    """For each page of a batch the page onto whose frame it goes, or itself if it stays where it is.

    :param handles: of the nominated pages, shape ``(n,)``; equal handles are one frame.
    :param fresh: which were nominated just now, so that nobody else is on their frame, shape ``(n,)``.
    :param domids: whose they are, shape ``(n,)``.
    :param classes: what they hold, in runs of equal numbers, shape ``(n,)``.
    :param max_sharers: gfns that one frame takes.
    :param sharers_of: how many gfns are on the frame of the page at each of these places; 0 where it cannot be said.
    """
    places = np.arange(len(classes))
    if fresh.all():
        first = np.maximum.accumulate(np.where(run_starts(classes), places, 0))
        return places - (places - first) % max_sharers
    # Frames of earlier sessions are among them: plan with frames. ``first`` is a page of each.
    _, first, frame_of, size = np.unique(handles, return_index=True, return_inverse=True, return_counts=True)
    strangers = domids != domids[first[frame_of]]
    several = np.bincount(frame_of[strangers], minlength=len(first)) > 0
    fresh = fresh[first]
    class_ = classes[first] - classes[0]
    usable = fresh | (size < max_sharers)
    usable &= np.bincount(class_[usable], minlength=int(class_.max()) + 1)[class_] > 1
    (old,) = np.nonzero(usable & ~fresh)
    usable[old] = sharers_of(first[old]) == size[old]
    # Old frames first, into bins of ``max_sharers`` gfns: the first of a bin leads, the others join it. Frames of
    # several domains cannot be clients, so they lead or stay; of the others the larger comes before the smaller.
    old = np.flatnonzero(usable & ~fresh)
    old = old[np.lexsort((first[old], -size[old], ~several[old], class_[old]))]
    end = np.cumsum(size[old])
    starts = run_starts(class_[old])
    end -= np.maximum.accumulate(np.where(starts, end - size[old], 0))
    bin_ = (end - size[old]) // max_sharers
    leads = starts | run_starts(bin_)
    leader = np.maximum.accumulate(np.where(leads, np.arange(len(old)), 0))
    joins = ~leads & ~several[old] & (end <= (bin_ + 1) * max_sharers)
    places[first[old[joins]]] = first[old[leader[joins]]]
    # Then the fresh pages: first into the room that is left on old frames, then onto frames of their own.
    room = max_sharers - size[old] - np.bincount(leader[joins], size[old[joins]], minlength=len(old)).astype(np.int64)
    room[joins] = 0
    new = np.flatnonzero(usable & fresh)
    new = new[np.lexsort((first[new], class_[new]))]
    rank = np.arange(len(new))
    rank -= np.maximum.accumulate(np.where(run_starts(class_[new]), rank, 0))
    rooms = np.cumsum(np.bincount(class_[old], room, minlength=int(class_.max()) + 1)).astype(np.int64)
    room_before = np.concatenate([[0], rooms])[class_[new]]
    surplus = rank - (rooms[class_[new]] - room_before)
    inside = surplus < 0
    seat = np.searchsorted(np.cumsum(room), (room_before + rank)[inside], side="right")
    places[first[new[inside]]] = first[old[seat]]
    (own,) = np.nonzero(~inside)
    places[first[new[own]]] = first[new[own - surplus[own] % max_sharers]]
    return places
