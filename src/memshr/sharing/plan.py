"""Who goes onto whose frame: the plan by which the pages of one batch are shared.

What makes this hard: some pages may be on frames of earlier sessions. Such a frame already has sharers, perhaps in
other domains and outside the batch. A frame takes a limited number of sharers. And the client of a share must be a page
with a fresh frame, or a frame all of whose gfns are known to be in one domain (rule 4 of ``session``).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from memshr.content.classes import BatchRows, Classes
from memshr.runs import run_starts
from memshr.types import DomIds, Handles

Mask = NDArray[np.bool_]


@dataclass(frozen=True, slots=True)
class _Frames:
    # The frames that the pages of a batch are on, in order of handle. All arrays have shape (frames,).
    first: BatchRows
    """a page of each: the first of the batch"""
    fresh: Mask
    """whether its page was nominated just now"""
    size: NDArray[np.int64]
    """pages of the batch that are on it"""
    several: Mask
    """whether they are of several domains: such a frame cannot be the client of a share"""
    class_: Classes
    usable: Mask
    """whether it may take part: it has room, something to share with, and no sharer outside the batch"""


def who_goes_where(
    handles: Handles,
    fresh: Mask,
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

    An example: pages of one content, at most 4 sharers for each frame. Pages 0 and 1 are on frame A of an earlier
    session, page 2 is on frame B, the others are fresh::

        page       0  1  2  3  4  5  6
        frame      A  A  B  -  -  -  -
        goes onto  0  1  0  0  4  4  4

    Frame A leads. B joins it, because both have room in one bin of 4. That leaves room for page 3. Pages 4 to 6 go onto
    a frame of their own, that of page 4.
    """
    if fresh.all():
        return _led_by_the_first(classes, max_sharers)
    frames = _frames(handles, fresh, domids, classes, max_sharers, sharers_of)
    goes_onto = np.arange(len(classes))
    old, leader, joins = _old_frames_in_bins(frames, max_sharers)
    goes_onto[frames.first[old[joins]]] = frames.first[old[leader[joins]]]
    # What is left on each old frame that leads or stays, when those that join it are there.
    joined = np.bincount(leader[joins], frames.size[old[joins]], minlength=len(old)).astype(np.int64)
    room = np.where(joins, 0, max_sharers - frames.size[old] - joined)
    new, seat = _seats_of_fresh_pages(frames, old, room, max_sharers)
    goes_onto[frames.first[new]] = seat
    return goes_onto


def _led_by_the_first(classes: Classes, max_sharers: int) -> BatchRows:
    # All pages are fresh: of each class, the first of each max_sharers pages leads them.
    pages = np.arange(len(classes))
    first = _begin_of_run(run_starts(classes), pages)
    return pages - (pages - first) % max_sharers


def _begin_of_run(starts: Mask, values: NDArray[np.int64]) -> NDArray[np.int64]:
    # For each element the value at the begin of its run; the values there ascend.
    return np.asarray(np.maximum.accumulate(np.where(starts, values, 0)))


def _frames(
    handles: Handles,
    fresh: Mask,
    domids: DomIds,
    classes: Classes,
    max_sharers: int,
    sharers_of: Callable[[BatchRows], NDArray[np.int64]],
) -> _Frames:
    _, first, frame_of, size = np.unique(handles, return_index=True, return_inverse=True, return_counts=True)
    strangers = domids != domids[first[frame_of]]
    several = np.bincount(frame_of[strangers], minlength=len(first)) > 0
    is_fresh = fresh[first]
    class_ = classes[first] - classes[0]
    usable = is_fresh | (size < max_sharers)
    usable &= np.bincount(class_[usable], minlength=int(class_.max()) + 1)[class_] > 1
    old = np.flatnonzero(usable & ~is_fresh)
    usable[old] = sharers_of(first[old]) == size[old]
    return _Frames(first, is_fresh, size, several, class_, usable)


def _old_frames_in_bins(frames: _Frames, max_sharers: int) -> tuple[NDArray[np.int64], NDArray[np.int64], Mask]:
    # The usable old frames of each class, put into bins of max_sharers gfns: the frames; for each the number (among
    # them) of the one that leads its bin; whether it joins that one. Frames of several domains come first, because they
    # cannot join; of the others the larger comes before the smaller.
    #
    #     sizes of one class, max_sharers 4    2  1  2  1
    #     in order of size                     2  2  1  1
    #     bin                                  0  0  1  1
    #     leads                                x     x
    old = np.flatnonzero(frames.usable & ~frames.fresh)
    size, class_, several = frames.size[old], frames.class_[old], frames.several[old]
    order = np.lexsort((frames.first[old], -size, ~several, class_))
    old, size, class_, several = old[order], size[order], class_[order], several[order]
    starts = run_starts(class_)
    end = np.cumsum(size)
    end -= _begin_of_run(starts, end - size)
    bin_ = (end - size) // max_sharers
    leads = starts | run_starts(bin_)
    leader = _begin_of_run(leads, np.arange(len(old)))
    joins = ~leads & ~several & (end <= (bin_ + 1) * max_sharers)
    return old, leader, joins


def _seats_of_fresh_pages(
    frames: _Frames, old: NDArray[np.int64], room: NDArray[np.int64], max_sharers: int
) -> tuple[NDArray[np.int64], BatchRows]:
    # The usable fresh frames, and the page onto whose frame each goes: first those with room on old frames of the same
    # class, in order, then new ones of max_sharers pages each.
    #
    #     room of old frames A, B    1  2
    #     fresh pages                p  q  r  s  t
    #     go onto                    A  B  B  s  s
    new = np.flatnonzero(frames.usable & frames.fresh)
    new = new[np.lexsort((frames.first[new], frames.class_[new]))]
    class_ = frames.class_[new]
    rank = np.arange(len(new))
    rank -= _begin_of_run(run_starts(class_), rank)
    class_count = int(frames.class_.max()) + 1
    room_until = np.cumsum(np.bincount(frames.class_[old], room, minlength=class_count)).astype(np.int64)
    room_before = np.concatenate([[0], room_until])[class_]
    surplus = rank - (room_until[class_] - room_before)
    inside = surplus < 0
    seat = np.empty(len(new), np.int64)
    on_old = np.searchsorted(np.cumsum(room), (room_before + rank)[inside], side="right")
    seat[inside] = frames.first[old[on_old]]
    (own,) = np.nonzero(~inside)
    seat[own] = frames.first[new[own - surplus[own] % max_sharers]]
    return new, seat
