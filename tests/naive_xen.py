"""A second implementation of the whole sharing interface, as simple as it can be, to hold the embedded one against.

A frame is an object with its bytes and the set of pages that are on it. Nothing is counted that can be looked at:
the counters are sums over the frames, the page counts of a domain are the sizes of sets. There are no machine frame
numbers, no tables and no many-page forms. Every call answers with a number: 0, a handle or a count, or a negative Xen
error number; ``EITHER`` stands for either handle error, where Xen looks at the lower machine frame first.
"""

from __future__ import annotations

import errno
from collections.abc import Iterator
from dataclasses import dataclass, field

PAGE = 4096
ADDRESS_BITS = 36
GRANTS = 512
RING_PARAMETER = 29
SPECIAL_PARAMETERS = (1, 5, 6, 17)

CLIENT, SOURCE, EITHER = -9, -10, -910

HOLE, RW, RO, SHARED, LOGDIRTY, MMIO, GRANT, POD = "hole", "rw", "ro", "shared", "logdirty", "mmio", "grant", "pod"
RAM = (RW, RO, SHARED, LOGDIRTY, POD)
EMPTY = (HOLE, MMIO)
SHARABLE = (RW, LOGDIRTY)


@dataclass(eq=False)
class Frame:
    """A page of machine memory. ``data`` is None while nobody knows what a fresh frame holds."""

    data: bytes | None = None
    handle: int = 0
    sharers: set[tuple[int, int]] = field(default_factory=set)
    refs: int = 0
    ring: bool = False


@dataclass(eq=False)
class Page:
    """What a gfn is."""

    kind: str = HOLE
    frame: Frame | None = None


@dataclass(eq=False)
class Domain:
    """One domain. ``owned`` are its frames, at a gfn or not, in the order in which they came to it; ``leaving`` those
    of them that wait to be released.
    """

    domid: int
    max_pages: int
    kind: str
    vcpus: int
    pauses: int = 1
    enabled: bool = False
    dying: bool = False
    crashed: bool = False
    log_dirty: bool = False
    parent: Domain | None = None
    max_gfn: int = -1
    pages: dict[int, Page] = field(default_factory=dict)
    owned: dict[Frame, None] = field(default_factory=dict)
    leaving: set[Frame] = field(default_factory=set)
    grants: dict[int, int] = field(default_factory=dict)
    parameters: dict[int, int] = field(default_factory=dict)
    ring: Frame | None = None
    events: list[tuple[int, int | None]] = field(default_factory=list)
    answers: int = 0
    waiting: set[int] = field(default_factory=set)

    def page(self, gfn: int) -> Page:
        """The page at a gfn; a hole that nobody keeps, if there is none."""
        return self.pages.get(gfn) or Page()

    def put(self, gfn: int, kind: str, frame: Frame | None) -> None:
        """Change what a gfn is."""
        self.pages[gfn] = Page(kind, frame)
        if kind not in (HOLE, MMIO):
            self.max_gfn = max(self.max_gfn, gfn)

    @property
    def shr_pages(self) -> int:
        """Its gfns on shared frames."""
        return sum(page.kind == SHARED for page in self.pages.values())


def in_range(gfn: int) -> bool:
    """True if a gfn is within the address width."""
    return 0 <= gfn < 1 << ADDRESS_BITS


class NaiveXen:
    """A host. Domids come from outside, so that two hosts agree on them."""

    def __init__(self, limit_pages: int) -> None:
        self.limit_pages = limit_pages
        self.domains: dict[int, Domain] = {}
        self.next_handle = 2

    # -- sums --------------------------------------------------------------------------------------------------------

    def shared_frames(self) -> set[Frame]:
        """Every shared frame."""
        pages = (page for domain in self.domains.values() for page in domain.pages.values())
        return {page.frame for page in pages if page.kind == SHARED and page.frame is not None}

    def counters(self) -> tuple[int, int]:
        """freed_pages and used_frames."""
        frames = self.shared_frames()
        return sum(len(frame.sharers) - 1 for frame in frames), len(frames)

    def _has_room(self, pages: int = 1) -> bool:
        owned = sum(len(domain.owned) for domain in self.domains.values())
        return owned + len(self.shared_frames()) + pages <= self.limit_pages

    def _allocate(self, domain: Domain, data: bytes | None) -> Frame | None:
        if len(domain.owned) >= domain.max_pages or not self._has_room():
            return None
        frame = Frame(data)
        domain.owned[frame] = None
        return frame

    # -- domains -----------------------------------------------------------------------------------------------------

    def create(self, domid: int, pages: int, max_pages: int, kind: str, vcpus: int) -> int:
        if not self._has_room(pages):
            return -errno.ENOMEM
        domain = self.domains[domid] = Domain(domid, max_pages, kind, vcpus)
        for gfn in range(pages):
            frame = Frame()
            domain.owned[frame] = None
            domain.put(gfn, RW, frame)
        return 0

    def destroy(self, domid: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if domain.dying:
            return 0
        domain.dying = True
        domain.parent = None
        self._drop_ring(domain)
        for gfn, page in domain.pages.items():
            if page.kind == SHARED:
                self._leave(domid, gfn, page)
        domain.pages.clear()
        domain.owned = {frame: None for frame in domain.owned if frame.refs}
        domain.leaving = set(domain.owned)
        self._reap()
        return 0

    def _reap(self) -> None:
        parents = {domain.parent for domain in self.domains.values()}
        for domain in list(self.domains.values()):
            if domain.dying and not domain.owned and domain not in parents:
                del self.domains[domain.domid]

    def pause(self, domid: int) -> int:
        if domid not in self.domains:
            return -errno.ESRCH
        self.domains[domid].pauses += 1
        return 0

    def unpause(self, domid: int) -> int:
        if domid not in self.domains:
            return -errno.ESRCH
        if not self.domains[domid].pauses:
            return -errno.EINVAL
        self.domains[domid].pauses -= 1
        return 0

    def set_max_pages(self, domid: int, pages: int) -> int:
        if domid not in self.domains:
            return -errno.ESRCH
        self.domains[domid].max_pages = pages
        return 0

    # -- memory ------------------------------------------------------------------------------------------------------

    def _leave(self, domid: int, gfn: int, page: Page) -> None:
        assert page.frame is not None
        page.frame.sharers.remove((domid, gfn))

    def _give_up(self, domain: Domain, frame: Frame) -> None:
        if frame.refs:
            domain.leaving.add(frame)
        else:
            del domain.owned[frame]

    def _own(self, domain: Domain, gfn: int) -> int:
        """What a write does first: give the page a frame of its own."""
        page = domain.page(gfn)
        if page.kind == SHARED:
            assert page.frame is not None
            if page.frame.sharers == {(domain.domid, gfn)}:
                page.frame.sharers.clear()
                domain.owned[page.frame] = None
                domain.put(gfn, RW, page.frame)
                return 0
            frame = self._allocate(domain, page.frame.data)
            if frame is None:
                if domain.ring is not None:
                    domain.events.append((gfn, None))
                return -errno.ENOMEM
            self._leave(domain.domid, gfn, page)
            domain.put(gfn, RW, frame)
        elif page.kind == POD:
            frame = self._allocate(domain, bytes(PAGE))
            if frame is None:
                return -errno.ENOMEM
            domain.put(gfn, RW, frame)
        return 0

    def _nearest_with(self, domain: Domain | None, gfn: int) -> Domain | None:
        while domain is not None and domain.page(gfn).kind not in RAM:
            domain = domain.parent
        return domain

    def _copy_down(self, ancestor: Domain, child: Domain, gfn: int) -> int:
        source = ancestor.page(gfn)
        if child.dying:
            return -errno.ENOMEM
        frame = self._allocate(child, bytes(PAGE) if source.frame is None else source.frame.data)
        if frame is None:
            return -errno.ENOMEM
        child.put(gfn, RW, frame)
        return 0

    def _access(self, domid: int, gfn: int, *, write: bool) -> int:
        """Make a page ready for an access: fill it if its domain is a fork, unshare it for a write."""
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        self._fill(domain, gfn, write=write)
        if domain.page(gfn).kind not in RAM:
            return -errno.EINVAL
        return self._own(domain, gfn) if write else 0

    def _fill(self, domain: Domain, gfn: int, *, write: bool) -> None:
        ancestor = self._nearest_with(domain.parent, gfn)
        if domain.page(gfn).kind not in EMPTY or ancestor is None or not in_range(gfn):
            return
        if write or self._nominate(ancestor, gfn, 0) < 0:
            self._copy_down(ancestor, domain, gfn)
            return
        shared = ancestor.page(gfn).frame
        assert shared is not None
        shared.sharers.add((domain.domid, gfn))
        domain.put(gfn, SHARED, shared)

    def write(self, domid: int, gfn: int, data: bytes, vcpu: int | None) -> int:
        if vcpu is not None and domid in self.domains and self.domains[domid].page(gfn).kind == RO:
            return 0
        status = self._access(domid, gfn, write=True)
        if status == -errno.ENOMEM and vcpu is not None:
            domain = self.domains[domid]
            if domain.ring is None:
                domain.crashed = True
            else:
                domain.waiting.add(vcpu)
                domain.events[-1] = gfn, vcpu
        if status == 0:
            frame = self.domains[domid].page(gfn).frame
            assert frame is not None
            frame.data = data
        return status

    def read(self, domid: int, gfn: int) -> tuple[int, bytes | None]:
        """The status and the contents, None if nobody knows them."""
        if status := self._access(domid, gfn, write=False):
            return status, None
        frame = self.domains[domid].page(gfn).frame
        return 0, bytes(PAGE) if frame is None else frame.data

    def hold(self, domid: int, gfn: int, *, write: bool) -> tuple[int, Frame | None]:
        """A foreign mapping that is kept: the status, and the frame to give to ``release``."""
        status = self._access(domid, gfn, write=write)
        if status == 0 and self.domains[domid].page(gfn).kind == POD:
            status = self._access(domid, gfn, write=True)
        if status:
            return status, None
        frame = self.domains[domid].page(gfn).frame
        assert frame is not None
        frame.refs += 1
        return 0, frame

    def release(self, frame: Frame) -> None:
        frame.refs -= 1
        for domain in self.domains.values():
            if not frame.refs and frame in domain.leaving:
                domain.leaving.remove(frame)
                del domain.owned[frame]
        self._reap()

    def populate(self, domid: int, gfn: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if not in_range(gfn):
            return -errno.EINVAL
        frame = None if domain.dying else self._allocate(domain, None)
        if frame is None:
            return -errno.ENOMEM
        if domain.page(gfn).kind == SHARED and (status := self._own(domain, gfn)):
            return status
        domain.put(gfn, RW, frame)
        return 0

    def decrease_reservation(self, domid: int, gfn: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        page = domain.page(gfn)
        if page.kind not in RAM:
            return -errno.EINVAL
        if page.kind == POD:
            del domain.pages[gfn]
            return 0
        if status := self._own(domain, gfn):
            return status
        frame = domain.pages.pop(gfn).frame
        assert frame is not None
        self._give_up(domain, frame)
        return 0

    def remove_from_physmap(self, domid: int, gfn: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if not in_range(gfn):
            return -errno.EINVAL
        page = domain.page(gfn)
        if page.kind not in RAM:
            return -errno.ENOENT
        if page.kind == SHARED:
            self._leave(domid, gfn, page)
        del domain.pages[gfn]
        return 0

    def set_mem_type(self, domid: int, gfn: int, kind: str) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if not 0 <= gfn <= max(domain.max_gfn, 0) or kind not in (RW, RO, MMIO):
            return -errno.EINVAL
        self._fill(domain, gfn, write=True)
        if domain.page(gfn).kind in RAM:
            if self._own(domain, gfn):
                return -errno.EAGAIN
        elif kind != MMIO:
            return -errno.EINVAL
        domain.put(gfn, kind, domain.page(gfn).frame)
        return 0

    def map_grant_frame(self, domid: int, gfn: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if not in_range(gfn):
            return -errno.EINVAL
        if domain.page(gfn).kind in RAM and (status := self.decrease_reservation(domid, gfn)):
            return status
        domain.put(gfn, GRANT, None)
        return 0

    def modified_memory(self, domid: int, gfn: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if not domain.log_dirty:
            return 0
        if not 0 <= gfn < domain.max_gfn:
            return -errno.EINVAL
        if domain.page(gfn).kind == SHARED:
            self._own(domain, gfn)
        return 0

    def set_log_dirty(self, domid: int, enable: bool) -> int:
        if domid not in self.domains:
            return -errno.ESRCH
        if enable and self.domains[domid].log_dirty:
            return -errno.EINVAL
        self.domains[domid].log_dirty = enable
        before, after = (RW, LOGDIRTY) if enable else (LOGDIRTY, RW)
        for page in self.domains[domid].pages.values():
            if page.kind == before:
                page.kind = after
        return 0

    def grant(self, domid: int, ref: int, gfn: int) -> int:
        if domid not in self.domains:
            return -errno.ESRCH
        if not 0 <= ref < GRANTS:
            return -errno.ENOENT
        self.domains[domid].grants[ref] = gfn
        return 0

    def set_parameter(self, domid: int, parameter: int, value: int) -> int:
        if domid not in self.domains:
            return -errno.ESRCH
        self.domains[domid].parameters[parameter] = value
        return 0

    # -- who may be named --------------------------------------------------------------------------------------------

    def _named(self, domid: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH if domid else -errno.EPERM
        return -errno.EINVAL if domain.dying else 0

    @staticmethod
    def _refused(domain: Domain) -> int:
        return {"pv": -errno.EOPNOTSUPP, "shadow": -errno.ENODEV}.get(domain.kind, 0)

    def _first(self, domid: int) -> int:
        status = self._named(domid)
        if status == 0 and not self.domains[domid].enabled:
            status = self._refused(self.domains[domid])
            self.domains[domid].enabled = status == 0
        return status

    def _both(self, source: int, client: int) -> int:
        if status := self._first(source) or self._named(client):
            return status
        return 0 if self.domains[client].enabled else -errno.EINVAL

    def control(self, domid: int, enable: bool) -> int:
        if domid == 0:
            return -errno.EOPNOTSUPP
        if domid not in self.domains:
            return -errno.ESRCH
        status = self._refused(self.domains[domid]) if enable else 0
        if status == 0:
            self.domains[domid].enabled = enable
        return status

    def _granted(self, domid: int, ref: int) -> int:
        """The gfn behind a grant reference, or a status."""
        if not 0 <= ref < GRANTS:
            return -errno.ENOENT
        return self.domains[domid].grants.get(ref, -errno.ENXIO)

    # -- sharing -----------------------------------------------------------------------------------------------------

    def _nominate(self, domain: Domain, gfn: int, refs: int) -> int:
        page = domain.page(gfn)
        if page.kind == SHARED:
            assert page.frame is not None
            return page.frame.handle
        if status := self._why_not_nominable(page, refs):
            return status
        assert page.frame is not None
        page.frame.handle, self.next_handle = self.next_handle, self.next_handle + 1
        page.frame.sharers.add((domain.domid, gfn))
        del domain.owned[page.frame]
        page.kind = SHARED
        return page.frame.handle

    def _why_not_nominable(self, page: Page, refs: int) -> int:
        if page.kind not in SHARABLE or page.frame is None or page.frame.ring:
            return -errno.EINVAL
        return 0 if page.frame.refs == refs else -errno.E2BIG

    def nominate(self, domid: int, gfn: int) -> int:
        return self._first(domid) or self._nominate(self.domains[domid], gfn, 0)

    def nominate_gref(self, domid: int, ref: int) -> int:
        if status := self._first(domid):
            return status
        gfn = self._granted(domid, ref)
        return gfn if gfn < 0 else self._nominate(self.domains[domid], gfn, 3)

    def share(self, source: int, sgfn: int, sh: int, client: int, cgfn: int, ch: int) -> int:
        if status := self._both(source, client):
            return status
        ours, theirs = self.domains[source].page(sgfn), self.domains[client].page(cgfn)
        frames = [None if page.kind in EMPTY else page.frame for page in (ours, theirs)]
        if (source, sgfn) == (client, cgfn) or (frames[0] is frames[1] and GRANT not in (ours.kind, theirs.kind)):
            return 0
        if SHARED not in (ours.kind, theirs.kind):
            return EITHER
        if ours.kind != SHARED:
            return SOURCE
        if theirs.kind != SHARED:
            return CLIENT
        assert ours.frame is not None
        assert theirs.frame is not None
        if ours.frame.handle != sh:
            return SOURCE
        if theirs.frame.handle != ch:
            return CLIENT
        moving = theirs.frame
        for domid, gfn in moving.sharers:
            self.domains[domid].pages[gfn].frame = ours.frame
        ours.frame.sharers |= moving.sharers
        moving.sharers = set()
        return 0

    def share_grefs(self, source: int, sref: int, sh: int, client: int, cref: int, ch: int) -> int:
        if status := self._both(source, client):
            return status
        sgfn = self._granted(source, sref)
        cgfn = self._granted(client, cref)
        if sgfn < 0 or cgfn < 0:
            return min(sgfn, 0) or cgfn
        return self.share(source, sgfn, sh, client, cgfn, ch)

    def add_to_physmap(self, source: int, sgfn: int, sh: int, client: int, cgfn: int) -> int:
        if status := self._both(source, client):
            return status
        ours = self.domains[source].page(sgfn)
        if ours.kind != SHARED or ours.frame is None or ours.frame.handle != sh:
            return SOURCE
        if not in_range(cgfn):
            return -errno.ENOENT
        if self.domains[client].page(cgfn).kind not in EMPTY:
            return CLIENT
        ours.frame.sharers.add((client, cgfn))
        self.domains[client].put(cgfn, SHARED, ours.frame)
        return 0

    def range_share(self, source: int, client: int, first: int, last: int) -> int:
        if status := self._both(source, client):
            return status
        ours, theirs = self.domains[source], self.domains[client]
        outside = not all(0 <= gfn <= max(0, min(ours.max_gfn, theirs.max_gfn)) for gfn in (first, last))
        parents = [domain.parent for domain in self.domains.values()]
        if outside or not all(domain.pauses or domain in parents for domain in (ours, theirs)):
            return -errno.EINVAL
        status = 0
        for gfn in range(first, last + 1):
            handle = self._nominate(ours, gfn, 0)
            other = self._nominate(theirs, gfn, 0) if handle > 0 else handle
            status = self.share(source, gfn, handle, client, gfn, other) if other > 0 else other
        return 0 if status == -errno.EINVAL else status

    def unshare(self, domid: int, gfn: int) -> int:
        return self._access(domid, gfn, write=True)

    def release_zero(self, domid: int, gfn: int, handle: int) -> int:
        if status := self._first(domid):
            return status
        page = self.domains[domid].page(gfn)
        if page.kind != SHARED or page.frame is None or page.frame.handle != handle:
            return SOURCE
        self._leave(domid, gfn, page)
        self.domains[domid].put(gfn, POD, None)
        return 0

    def debug_gfn(self, domid: int, gfn: int) -> int:
        if status := self._first(domid):
            return status
        page = self.domains[domid].page(gfn)
        return len(page.frame.sharers) if page.kind == SHARED and page.frame is not None else -errno.EINVAL

    def debug_gref(self, domid: int, ref: int) -> int:
        if status := self._first(domid):
            return status
        gfn = self._granted(domid, ref)
        return gfn if gfn < 0 else self.debug_gfn(domid, gfn)

    # -- events and forks --------------------------------------------------------------------------------------------

    def ring_enable(self, domid: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if domain.dying:
            return 0
        if domain.kind != "hvm":
            return -errno.ENODEV
        if domain.ring is not None:
            return -errno.EBUSY
        if not domain.parameters.get(RING_PARAMETER):
            return -errno.EOPNOTSUPP
        gfn = domain.parameters[RING_PARAMETER]
        if status := self._access(domid, gfn, write=True):
            return status
        domain.ring = domain.page(gfn).frame
        assert domain.ring is not None
        domain.ring.ring = True
        domain.ring.refs += 1
        domain.events.clear()
        domain.answers = 0
        return 0

    def _drop_ring(self, domain: Domain) -> None:
        if domain.ring is not None:
            frame, domain.ring = domain.ring, None
            frame.ring = False
            self.release(frame)

    def ring_disable(self, domid: int) -> int:
        domain = self.domains.get(domid)
        if domain is None:
            return -errno.ESRCH
        if domain.ring is None and not domain.dying:
            return -errno.EINVAL
        self._drop_ring(domain)
        return 0

    def domain_resume(self, domid: int) -> int:
        if domid not in self.domains:
            return -errno.ESRCH
        domain = self.domains[domid]
        if domain.ring is None and not domain.dying:
            return -errno.ENODEV
        while domain.answers:
            domain.answers -= 1
            _, vcpu = domain.events.pop(0)
            if vcpu is not None and all(other != vcpu for _, other in domain.events):
                domain.waiting.discard(vcpu)
        return 0

    def ring_respond(self, domid: int, count: int) -> int:
        if domid not in self.domains:
            return -errno.ESRCH
        domain = self.domains[domid]
        if domain.ring is None and not domain.dying:
            return -errno.ENODEV
        if domain.answers + count > len(domain.events):
            return -errno.EINVAL
        domain.answers += count
        return 0

    def _line(self, domain: Domain | None) -> Iterator[Domain]:
        while domain is not None:
            yield domain
            domain = domain.parent

    def fork(self, parent: int, child: int) -> int:
        if status := self._first(child) or self._named(parent):
            return status
        old, new = self.domains[parent], self.domains[child]
        if old.vcpus != new.vcpus:
            return -errno.EINVAL
        if status := self._first(parent):
            return status
        if not new.pauses:
            return -errno.EBUSY
        if new.parent is None:
            if new in self._line(old):
                return -errno.EINVAL
            new.parent, new.max_pages = old, old.max_pages
            in_order = [new.pages[gfn].frame for gfn in sorted(new.pages)]
            at_gfns = {frame: None for frame in in_order if frame in new.owned}
            new.owned = {frame: None for frame in new.owned if frame not in at_gfns} | at_gfns
        if status := self._copy_settings(old, new):
            new.parent = None
            self._reap()
        return status

    def _copy_settings(self, parent: Domain, child: Domain) -> int:
        child.parameters.update({name: value for name, value in parent.parameters.items() if value})
        for name in SPECIAL_PARAMETERS:
            gfn = parent.parameters.get(name, 0)
            owner = self._nearest_with(parent, gfn) if gfn and in_range(gfn) else None
            if owner is None:
                continue
            before = child.page(gfn)
            if before.kind in EMPTY:
                if status := self._copy_down(owner, child, gfn):
                    return status
            elif before.kind in RAM and before.frame is not owner.page(gfn).frame:
                if status := self._own(child, gfn):
                    return status
                ours, theirs = child.page(gfn).frame, owner.page(gfn).frame
                assert ours is not None
                ours.data = bytes(PAGE) if theirs is None else theirs.data
        child.max_gfn = max(child.max_gfn, parent.max_gfn)
        return 0

    def fork_reset(self, domid: int, *, state: bool, memory: bool) -> int:
        if status := self._first(domid):
            return status
        domain = self.domains[domid]
        if not state and not memory:
            return -errno.EINVAL
        if domain.parent is None:
            return -errno.ENOSYS
        status = 0
        if memory:
            last = list(domain.owned)[-1:]
            status = -errno.EINVAL if last else 0
            for gfn, page in list(domain.pages.items()):
                if page.kind != SHARED and page.frame is not None:
                    refusal = self._why_not_nominable(page, 0)
                    if last == [page.frame]:
                        status = refusal
                    if refusal == 0:
                        del domain.owned[page.frame]
                        del domain.pages[gfn]
        return self._copy_settings(domain.parent, domain) if state else status
