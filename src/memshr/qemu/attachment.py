"""One QEMU that memshr looks at or works on: its RAM by page number, and what can be done to its pages.

Pages are counted through all RAM ranges of the guest, in order of gfn; page ``i`` is at ``hvas[i]`` in QEMU. Looking
needs no agent. Everything that changes a mapping goes through the agent, in tables that end under full protection even
if we die (see ``agent``). This module knows nothing of handles, groups or who shares with whom.
"""

from __future__ import annotations

import contextlib
import errno
import itertools
import os
from collections.abc import Generator, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import numpy as np
from numpy.typing import NDArray

from memshr.errors import BackendError, HostMemoryError, NoSuchDomainError, RefusedDomainError
from memshr.procfs import Mapping, Mappings, count_mappings, process_mappings
from memshr.qemu import agent, control_area, guests, pagemap, syscalls
from memshr.qemu.agent import Session
from memshr.qemu.control_area import ControlArea
from memshr.qemu.guests import GuestProcess
from memshr.qemu.injection import Injector
from memshr.qemu.pagemap import Pagemap
from memshr.qemu.pool import FramePool, group_of, of_pools
from memshr.types import HUGE_PAGE_PAGES, PAGE_SHIFT, PAGE_SIZE, DomId, Gfns, PageBytes

Pages = NDArray[np.int64]
"""page numbers of one guest, shape ``(n,)``, ascending and distinct unless said otherwise"""

BATCH_ENTRIES: Final = 384
"""Mappings that one table changes: a writer of one of its pages waits for the rest of the table (7 to 20 us for each
isolated page on the development machine, so 8 ms at most if nobody is in the agent's way)."""
BATCH_PAGES: Final = BATCH_ENTRIES
"""Pages that are in flight together, for the same reason: each may be an isolated one."""
MOVED_PAGES: Final = 1024
"""Pages of one run that a table copies back into memory of their own."""

_HUGE_BYTES: Final = HUGE_PAGE_PAGES * PAGE_SIZE
_ADVICE_GAP_BYTES: Final = 64 * PAGE_SIZE
"""Mappings that are nearer than this get their flags back in one madvise. It looks at every mapping in between, of
which there may be ten thousand in a guest: over a gap like this one that costs less than another call."""
MAP_RESERVE: Final = 2048
"""Mappings that QEMU is left for itself."""

MAPPING_OVER_IS_SAFE = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 9)
"""Whether an mmap(MAP_FIXED) that fails leaves what was there. Before Linux 6.9 it may leave a hole: there mappings are
made beside and moved into place by mremap, which looks for what may fail before it takes anything away."""

_ADVICE: Final = {
    "dd": syscalls.MADV_DONTDUMP,
    "dc": syscalls.MADV_DONTFORK,
    "mg": syscalls.MADV_MERGEABLE,
    "hg": syscalls.MADV_HUGEPAGE,
    "nh": syscalls.MADV_NOHUGEPAGE,
}
"""VmFlags that QEMU sets on guest RAM -> what puts them back onto a new mapping"""
_FRAME_FLAGS: Final = ("dd", "dc", "mg")


Steps = Generator[None, None, int]
"""Work of one agent, table by table: each step ends when a table is posted. Returns how much was done."""


def carry_out(works: Iterable[Steps]) -> list[int]:
    """Let agents do their work, those of different guests at the same time; returns what each returned.

    :raises BaseException: the first that one raises; the others are done, too.
    """
    under_way = dict(enumerate(works))
    results = [0] * len(under_way)
    failure: BaseException | None = None
    while under_way:
        for number, steps in list(under_way.items()):
            try:
                next(steps)
            except StopIteration as end:
                results[number] = end.value
                del under_way[number]
            except BaseException as error:
                failure = failure or error
                del under_way[number]
    if failure is not None:
        raise failure
    return results


@dataclass(frozen=True, slots=True)
class PoolMappings:
    """Where a QEMU has one frame pool mapped.

    :param sample: one of the mappings.
    :param group: the trust group that the pool claims to be of.
    :param hvas: the address of each page, shape ``(n,)``.
    :param frames: the number of the frame that is mapped there, shape ``(n,)``.
    """

    sample: Mapping
    group: str
    hvas: NDArray[np.int64]
    frames: NDArray[np.int64]


class Attachment:
    """One QEMU, open for reading; ``attach`` makes it one whose pages can be protected and remapped.

    :raises NoSuchDomainError: it has ended.
    :raises BackendError: QEMU does not tell where its RAM is.
    """

    def __init__(self, domid: DomId, process: GuestProcess) -> None:
        self.domid = domid
        self.process = process
        self.session: Session | None = None
        self.must_drain = False
        self.dead = False
        self._control: ControlArea | None = None
        self._pool_numbers: dict[int, int] = {}
        self._flags: frozenset[str] = frozenset()
        self._mappings_left = 0
        self._last_mappings: Mappings | None = None
        with contextlib.ExitStack() as undo:
            try:
                self.pidfd = os.pidfd_open(process.pid)
                undo.callback(os.close, self.pidfd)
                self.pagemap = Pagemap(process.pid)
                undo.callback(self.pagemap.close)
            except OSError as error:
                raise self._failed(error) from error
            if not process.running:
                raise self.gone()
            with process.monitor() as monitor:
                self.layout = guests.memory_layout(monitor)
            self._closing = undo.pop_all()
        self.first_gfns = np.array([ram.first_gfn for ram in self.layout], dtype=np.int64)
        self.range_pages = np.array([ram.pages for ram in self.layout], dtype=np.int64)
        self._range_starts = np.cumsum(self.range_pages) - self.range_pages
        self.pages = int(self.range_pages.sum())
        self.hvas = np.concatenate(
            [ram.hva + PAGE_SIZE * np.arange(ram.pages, dtype=np.int64) for ram in self.layout]
            or [np.empty(0, dtype=np.int64)]
        )
        by_hva = np.argsort([ram.hva for ram in self.layout])
        self._hva_starts = np.array([self.layout[i].hva for i in by_hva], dtype=np.int64)
        self._hva_pages = self.range_pages[by_hva]
        self._hva_first = self._range_starts[by_hva]
        self.in_pool = np.zeros(self.pages, dtype=np.bool_)
        """pages in mappings of a pool; kept by the hypervisor, which knows who shares"""
        self._unregistered = np.zeros(self.pages, dtype=np.bool_)
        """pages in mappings that were made after the last UFFDIO_REGISTER"""

    def gone(self) -> NoSuchDomainError:
        """The error for a guest that has ended."""
        return NoSuchDomainError(f"guest {self.process.name} ({self.process.pid}) has ended", domid=self.domid)

    def _has_ended(self) -> bool:
        # A process that has exited and waits to be reaped has maps, but nothing in them.
        try:
            return not self.process.running or not Path(f"/proc/{self.process.pid}/maps").read_text()
        except OSError:
            return True

    def _failed(self, error: OSError) -> Exception:
        if error.errno in {errno.ESRCH, errno.ENOENT, errno.EBADF, errno.ENODEV}:
            if not self._has_ended():
                name = f"guest {self.process.name} ({self.process.pid})"
                return BackendError(f"{name} changed while memshr looked at it: {error.strerror}", remedy="try again")
            self.dead = True
            return self.gone()
        if error.errno in {errno.EACCES, errno.EPERM}:
            return RefusedDomainError(
                f"may not look into guest {self.process.name} ({self.process.pid})",
                reasons=["no permission"],
                domid=self.domid,
                remedy="run as root (capabilities SYS_PTRACE, SYS_ADMIN and SYS_NICE)",
            )
        if error.errno == errno.ENOMEM:
            return HostMemoryError(f"no memory: {error.strerror}", domid=self.domid, remedy="relieve the host")
        return error

    # -- page numbers ----------------------------------------------------------------------------------------------

    def pages_of_gfns(self, gfns: Gfns) -> NDArray[np.int64]:
        """Page number of each gfn, -1 where there is no RAM."""
        if not len(self.first_gfns):
            return np.full(len(gfns), -1, dtype=np.int64)
        row = np.maximum(np.searchsorted(self.first_gfns, gfns, side="right") - 1, 0)
        inside = gfns - self.first_gfns[row]
        return np.where((inside >= 0) & (inside < self.range_pages[row]), self._range_starts[row] + inside, -1)

    def gfns_of_pages(self, pages: Pages) -> Gfns:
        """The gfn of each page."""
        row = np.searchsorted(self._range_starts, pages, side="right") - 1
        return np.asarray(self.first_gfns[row] + pages - self._range_starts[row])

    def pages_of_hvas(self, hvas: NDArray[np.int64]) -> NDArray[np.int64]:
        """Page number of each address, -1 where it is no guest RAM."""
        row = np.maximum(np.searchsorted(self._hva_starts, hvas, side="right") - 1, 0)
        inside = (hvas - self._hva_starts[row]) >> PAGE_SHIFT
        return np.where((inside >= 0) & (inside < self._hva_pages[row]), self._hva_first[row] + inside, -1)

    # -- looking ---------------------------------------------------------------------------------------------------

    def entries(self, pages: Pages) -> NDArray[np.uint64]:
        """The pagemap entries of pages, in any order."""
        try:
            return self.pagemap.entries(self.hvas[pages])
        except (OSError, NoSuchDomainError) as error:
            self.dead = True
            raise self.gone() from error

    def mappings(self) -> Mappings:
        """What QEMU has mapped now; the same object as the last time in this session if nothing has changed since."""
        try:
            mappings = process_mappings(self.process.pid, last=self._last_mappings)
        except OSError as error:
            raise self._failed(error) from error
        if not len(mappings):
            self.dead = True
            raise self.gone()
        self._last_mappings = mappings
        return mappings

    def read_run(self, first: int, out: PageBytes) -> None:
        """Contents of consecutive pages. Pages that were never touched are not touched by this."""
        rows = np.arange(first, first + len(out))
        entries = self.entries(rows)
        # In a pool's mapping a page that is not there reads as its frame; in anonymous memory it is zeros.
        absent = ~pagemap.is_there(entries) & ~self.in_pool[rows]
        edges = [0, *(np.flatnonzero(np.diff(absent)) + 1).tolist(), len(out)]
        for start, end in itertools.pairwise(edges):
            if absent[start]:
                out[start:end] = 0
            else:
                self.read_scattered(rows[start:end], out[start:end])

    def read_scattered(self, pages: Pages, out: PageBytes, rows: NDArray[np.int64] | None = None) -> None:
        """Contents of pages in any order.

        :param rows: the row of ``out`` that each goes into, shape ``(n,)``; None: page i into row i.
        """
        rows = np.arange(len(pages)) if rows is None else rows
        hvas = self.hvas[pages]
        (at,) = np.nonzero((np.diff(hvas, prepend=-1) != PAGE_SIZE) | (np.diff(rows, prepend=-1) != 1))
        pieces = np.empty((2, len(at)), dtype=agent.IOVEC)
        pieces["length"] = np.diff(at, append=len(hvas)) * PAGE_SIZE
        pieces["base"][0], pieces["base"][1] = out.ctypes.data + rows[at] * PAGE_SIZE, hvas[at]
        for first in range(0, len(at), syscalls.IOV_MAX):
            local, remote = pieces[:, first : first + syscalls.IOV_MAX]
            try:
                got = syscalls.process_vm_readv(self.process.pid, local, remote)
            except OSError as error:
                raise self._failed(error) from error
            if got != int(remote["length"].sum()):
                self.dead = True
                raise self.gone()

    @staticmethod
    def pool_mappings(mappings: Mappings) -> Iterator[PoolMappings]:
        """Where QEMU has frame pools mapped, one by one; made for tens of thousands of mappings.

        :param mappings: what it has mapped.
        """
        (left,) = np.nonzero(of_pools(mappings))
        while len(left):
            same = mappings.inode[left] == mappings.inode[left[0]]
            same &= mappings.name[left] == mappings.name[left[0]]
            rows, left = left[same], left[~same]
            starts = mappings.start[rows].astype(np.int64)
            lengths = (mappings.end[rows].astype(np.int64) - starts) >> PAGE_SHIFT
            first_frames = mappings.offset[rows].astype(np.int64) >> PAGE_SHIFT
            inside = np.arange(int(lengths.sum())) - np.repeat(np.cumsum(lengths) - lengths, lengths)
            sample = mappings[int(rows[0])]
            yield PoolMappings(
                sample,
                group_of(sample.path),
                np.repeat(starts, lengths) + inside * PAGE_SIZE,
                np.repeat(first_frames, lengths) + inside,
            )

    # -- attaching -------------------------------------------------------------------------------------------------

    @property
    def has_agent(self) -> bool:
        """Whether some memshr has been at work in it."""
        try:
            found = ControlArea.find_all(self.process.pid)
        except OSError as error:
            raise self._failed(error) from error
        for control in found:
            control.close()
        return bool(found)

    def attach(self, injector: Injector) -> Mappings:
        """Find or install the agent, open a session, make all RAM one that can be write-protected.

        :returns: what QEMU has mapped since the session began.
        :raises RefusedDomainError: the guest must not be touched; ``reasons`` says why.
        """
        pid, name = self.process.pid, self.process.name
        with self.process.monitor() as monitor:
            mappings = self.mappings()
            reasons = guests.refusals(self.process, monitor, self.layout, mappings)
            if reasons:
                raise RefusedDomainError(
                    f"guest {name} ({pid}) must not be touched: {'; '.join(map(str, reasons))}",
                    reasons=[str(reason) for reason in reasons],
                    domid=self.domid,
                )
            self.must_drain = guests.has_direct_drives(monitor)
            try:
                code = mappings.named(control_area.MAPPED_CONTROL.__eq__) & mappings.executable
                places = [f"{place.start:x}-{place.end:x}" for place in mappings.of(code)]
                control = ControlArea.find(pid, places) or agent.install(pid, name, monitor, injector)
                try:
                    self.session = Session.open(pid, self.pidfd, name, control, monitor)
                except BaseException:
                    control.close()
                    raise
                self._control = control
                mappings = self.mappings()
                self._flags = self._ram_flags(mappings)
                self.register()
                self._note_count(len(mappings))
                self._clear_side(mappings)
            except OSError as error:
                raise self._failed(error) from error
        return mappings

    def _ram_flags(self, mappings: Mappings) -> frozenset[str]:
        # Of memory that we have not replaced, if any is left; ours have the same, but for huge pages.
        for ram in self.layout:
            inside = mappings.ordinary & (mappings.start < ram.end_hva) & (mappings.end > ram.hva)
            if inside.any():
                address = max(int(mappings.start[np.argmax(inside)]), ram.hva)
                return pagemap.mapping_flags(self.process.pid, address)
        return pagemap.mapping_flags(self.process.pid, self.layout[0].hva)

    def _advise(self, start: int, length_bytes: int, flags: tuple[str, ...]) -> list[list[int]]:
        return [
            [syscalls.NR_MADVISE, start, length_bytes, _ADVICE[flag], 0, 0, 0, 0]
            for flag in flags
            if flag in self._flags
        ]

    def count_mappings(self) -> None:
        """See how many mappings QEMU may still get."""
        try:
            mappings = count_mappings(self.process.pid)
        except OSError as error:
            raise self._failed(error) from error
        if not mappings:
            self.dead = True
            raise self.gone()
        self._note_count(mappings)

    def _note_count(self, mappings: int) -> None:
        self._mappings_left = pagemap.map_count_limit() - MAP_RESERVE - mappings

    @property
    def mappings_left(self) -> int:
        """How many more mappings QEMU may get, by a careful estimate."""
        return self._mappings_left

    def working_session(self) -> Session:
        """The session. :raises NoSuchDomainError: there is none (any more)."""
        if self.session is None or self.dead:
            raise self.gone()
        return self.session

    def pool_number(self, pool: FramePool) -> int:
        """The number that ``pool`` has in QEMU, as a descriptor that can only read and that ends with the session."""
        number = self._pool_numbers.get(pool.inode)
        if number is None:
            readable = pool.readable()
            try:
                with self.process.monitor() as monitor:
                    number = self.working_session().take_descriptor(monitor.add_descriptor(readable))
                    monitor.remove_descriptors()
            finally:
                os.close(readable)
            self._pool_numbers[pool.inode] = number
        return number

    @contextlib.contextmanager
    def stopped(self) -> Iterator[None]:
        """The guest stands still, and QEMU has ended every disk request of it that was under way.

        A guest that does not run has none: QEMU ends them when it stops. Nothing may be in flight when this begins or
        ends, because it needs QEMU's main thread.
        """
        with self.process.monitor() as monitor:
            if not monitor.execute("query-status")["running"]:
                yield
                return
            try:
                monitor.execute("stop")
                yield
            finally:
                monitor.execute("cont")

    def drain(self) -> None:
        """Wait until every disk request of the guest that is under way has ended, by stopping it for a moment."""
        with self.stopped():
            pass

    def drop_session(self) -> None:
        """End the session, whatever state the guest is in: all protection ends."""
        session, self.session = self.session, None
        control, self._control = self._control, None
        self._pool_numbers.clear()
        self._last_mappings = None
        if session is not None:
            session.close()
        if control is not None:
            control.close()

    def detach(self, injector: Injector) -> None:
        """Take the agent out of QEMU: thread, mappings, descriptors. No page may be on a frame any more."""
        pid, name = self.process.pid, self.process.name
        session, self.session = self.working_session(), None
        control, self._control = self._control, None
        self._pool_numbers.clear()
        self._last_mappings = None
        session.end_agent(pid)
        if control is not None:
            control.close()
        for each in ControlArea.find_all(pid):
            try:
                if each.thread_lives(pid):
                    with self.process.monitor() as monitor:
                        Session.open(pid, self.pidfd, name, each, monitor).end_agent(pid)
                agent.uninstall(pid, each, injector)
            finally:
                each.close()

    def close(self) -> None:
        """End the session and close every file; the agent stays, asleep."""
        self.drop_session()
        self._closing.close()

    # -- protecting ------------------------------------------------------------------------------------------------

    def register(self) -> None:
        """Make every mapping of RAM one that can be write-protected; those that can already are left alone."""
        session = self.working_session()
        try:
            for ram in self.layout:
                syscalls.userfaultfd_register(session.uffd, ram.hva, ram.pages * PAGE_SIZE)
        except OSError as error:
            raise self._failed(error) from error
        self._unregistered[:] = False

    def protect(self, pages: Pages) -> None:
        """Let writers of these pages wait from now on."""
        session = self.working_session()
        if self._unregistered[pages].any():
            self.register()
        try:
            if not session.features & syscalls.UFFD_FEATURE_WP_UNPOPULATED:
                self._touch(pages)
            syscalls.userfaultfd_write_protect(session.uffd, self._runs(pages), True)
        except OSError as error:
            raise self._failed(error) from error

    def _touch(self, pages: Pages) -> None:
        # Without WP_UNPOPULATED a page that is not there cannot be protected: reading makes it the zero page first.
        absent = pages[~pagemap.is_there(self.entries(pages))]
        if len(absent):
            self.read_scattered(absent, np.empty((len(absent), PAGE_SIZE), dtype=np.uint8))

    def await_agent(self) -> None:
        """Wait until nothing is being remapped any more; before protections are lifted. See Session.await_answer."""
        self.working_session().await_answer()

    def unprotect(self, pages: Pages) -> None:
        """Let writers of these pages go on."""
        session = self.working_session()
        for run in self._runs(pages):
            try:
                syscalls.userfaultfd_write_protect(session.uffd, [run], False)
            except OSError as error:
                if error.errno != errno.ENOENT:  # a mapping of ours that is not registered has no protection to lift
                    raise self._failed(error) from error

    def wake(self) -> None:
        """Let everybody who waits at a protected page try again."""
        session = self.working_session()
        try:
            for ram in self.layout:
                syscalls.userfaultfd_wake(session.uffd, ram.hva, ram.pages * PAGE_SIZE)
        except OSError as error:
            raise self._failed(error) from error

    def _runs(self, pages: Pages) -> list[tuple[int, int]]:
        # (address, bytes) of each run of adjacent pages
        starts, lengths = self._pieces(pages)
        return list(zip(starts.tolist(), lengths.tolist(), strict=True))

    def _pieces(self, pages: Pages) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        # The addresses of the runs of adjacent pages, and their bytes.
        hvas = self.hvas[pages]
        first = np.ones(len(hvas), dtype=np.bool_)
        np.not_equal(np.diff(hvas), PAGE_SIZE, out=first[1:])
        (at,) = np.nonzero(first)
        return hvas[at], np.diff(at, append=len(hvas)) * PAGE_SIZE

    def split_huge_pages(self, pages: Pages) -> None:
        """Split the huge pages that these pages are parts of, so that the host gets back what is remapped of them.

        MADV_COLD on a part of a huge page does it, from outside; on other pages it only marks them as seldom used.
        """
        hvas = self.hvas[pages]
        chunks, at = np.unique(hvas >> 21, return_index=True)
        pieces = np.zeros(len(chunks), dtype=agent.IOVEC)
        pieces["base"] = hvas[at]
        pieces["length"] = PAGE_SIZE
        for start in range(0, len(pieces), syscalls.IOV_MAX):
            with contextlib.suppress(OSError):  # a saving that comes later, no error
                some = np.ascontiguousarray(pieces[start : start + syscalls.IOV_MAX])
                syscalls.process_madvise(self.pidfd, some, syscalls.MADV_COLD)

    def huge(self, pages: Pages) -> NDArray[np.bool_]:
        """Which pages are part of a transparent huge page; looks at one page of each 2 MiB."""
        _, first, inverse = np.unique(self.hvas[pages] >> 21, return_index=True, return_inverse=True)
        return np.asarray(self.pagemap.huge(self.entries(pages[first]))[inverse])

    # -- remapping -------------------------------------------------------------------------------------------------

    def map_frames(self, pages: Pages, frames: NDArray[np.int64], pool: FramePool) -> Steps:
        """Map frames of one pool, which QEMU has been given, over protected pages, as many tables as it takes.

        :param frames: the frame (its number in the pool) of each page, shape ``(n,)``.
        :returns: how many of the pages, from the first on, were mapped; fewer than all if the host had no more
            memory or mappings.
        """
        number = self._pool_numbers[pool.inode]
        hvas = self.hvas[pages]
        new = (np.diff(hvas) != PAGE_SIZE) | (np.diff(frames) != 1)
        starts = np.concatenate([[0], np.flatnonzero(new) + 1]) if len(pages) else np.empty(0, dtype=np.int64)
        ends = np.append(starts[1:], len(pages))
        table = np.zeros((len(starts), 8), dtype=np.uint64)
        table[:, 0] = syscalls.NR_MMAP
        table[:, 1] = table[:, 7] = hvas[starts]
        table[:, 2] = (ends - starts) * PAGE_SIZE
        table[:, 3] = syscalls.PROT_READ | syscalls.PROT_WRITE
        table[:, 4] = syscalls.MAP_PRIVATE | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE
        table[:, 5] = number
        table[:, 6] = frames[starts] * PAGE_SIZE
        done = yield from self._remap(table, _FRAME_FLAGS)
        mapped = int(ends[done - 1]) if done else 0
        self._unregistered[pages[:mapped]] = True
        return mapped

    def map_nothing(self, pages: Pages, anonymous: NDArray[np.bool_]) -> Steps:
        """Give the memory of protected pages back: they read as zeros afterwards. Returns how many, as map_frames.

        :param anonymous: which pages lie in anonymous memory, where the page can just be dropped; the others get a
            new anonymous mapping.
        """
        hvas = self.hvas[pages]
        new = (np.diff(hvas) != PAGE_SIZE) | np.diff(anonymous)
        starts = np.concatenate([[0], np.flatnonzero(new) + 1]) if len(pages) else np.empty(0, dtype=np.int64)
        ends = np.append(starts[1:], len(pages))
        drop = anonymous[starts]
        table = np.zeros((len(starts), 8), dtype=np.uint64)
        table[:, 0] = np.where(drop, syscalls.NR_MADVISE, syscalls.NR_MMAP)
        table[:, 1] = hvas[starts]
        table[:, 2] = (ends - starts) * PAGE_SIZE
        table[:, 3] = np.where(drop, syscalls.MADV_DONTNEED, syscalls.PROT_READ | syscalls.PROT_WRITE)
        flags = syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED | syscalls.MAP_NORESERVE
        table[~drop, 4] = flags
        table[~drop, 5] = np.uint64(2**64 - 1)
        table[~drop, 7] = hvas[starts[~drop]]
        done = yield from self._remap(table, tuple(_ADVICE) if not drop.all() else ())
        emptied = int(ends[done - 1]) if done else 0
        self._unregistered[pages[:emptied][~anonymous[:emptied]]] = True
        return emptied

    def _remap(self, table: NDArray[np.uint64], flags: tuple[str, ...]) -> Steps:
        # How many calls of the table were done. The flags of the old mappings are put back after each batch.
        session = self.working_session()
        at_once = BATCH_ENTRIES if MAPPING_OVER_IS_SAFE else BATCH_ENTRIES // 2
        done = 0
        while done < len(table):
            batch = table[done : done + at_once]
            maps = batch[:, 0] == syscalls.NR_MMAP
            growth = 2 * int(maps.sum())
            if growth > self._mappings_left:
                self.count_mappings()
                if growth > self._mappings_left:
                    break
            calls, ends = (batch, np.arange(1, len(batch) + 1)) if MAPPING_OVER_IS_SAFE else self._beside(batch, maps)
            advice = self._advice_for(batch, flags, control_area.TABLE_ENTRIES - len(calls))
            session.post(np.concatenate([calls, np.array(advice, dtype=np.uint64).reshape(-1, 8)]))
            self._mappings_left -= growth
            yield
            session.await_answer()
            finished = int(np.searchsorted(ends, session.done, side="right"))
            done += finished
            if finished < len(batch):
                self._clear_side(self.mappings())
                break
        return done

    def _beside(
        self, batch: NDArray[np.uint64], maps: NDArray[np.bool_]
    ) -> tuple[NDArray[np.uint64], NDArray[np.int64]]:
        # Each mmap of the batch as two calls: map beside, move into place. Also the place after the last call of each.
        side = self.working_session().control.side_address
        counts = np.where(maps, 2, 1)
        ends = np.cumsum(counts)
        calls = np.repeat(batch, counts, axis=0)
        made, moved = ends[maps] - 2, ends[maps] - 1
        calls[made, 1] = calls[made, 7] = side
        calls[made, 4] ^= np.uint64(syscalls.MAP_FIXED | syscalls.MAP_FIXED_NOREPLACE)
        place, length = batch[maps, 1], batch[maps, 2]
        calls[moved] = 0
        calls[moved, 0] = syscalls.NR_MREMAP
        calls[moved, 1] = side
        calls[moved, 2] = calls[moved, 3] = length
        calls[moved, 4] = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED
        calls[moved, 5] = calls[moved, 7] = place
        return calls, ends

    def _advice_for(self, batch: NDArray[np.uint64], flags: tuple[str, ...], most: int) -> list[list[int]]:
        # At most ``most`` calls that put flags back onto the mappings of a batch.
        gap_bytes = _ADVICE_GAP_BYTES
        while True:
            stretches = self._stretches(batch, gap_bytes)
            advice = [row for start, length in stretches for row in self._advise(start, length, flags)]
            if len(advice) <= most:
                return advice
            gap_bytes *= 2

    def _stretches(self, batch: NDArray[np.uint64], gap_bytes: int) -> list[tuple[int, int]]:
        # (address, bytes) of stretches of one RAM range that hold the mappings of a batch, with no larger gaps inside.
        starts = batch[:, 1].astype(np.int64)
        ends = starts + batch[:, 2].astype(np.int64)
        row = np.searchsorted(self._hva_starts, starts, side="right") - 1
        gaps = starts[1:] - ends[:-1]
        (breaks,) = np.nonzero((np.diff(row) != 0) | (gaps > gap_bytes))
        firsts, lasts = starts[[0, *(breaks + 1)]], ends[[*breaks, -1]]
        return list(zip(firsts.tolist(), (lasts - firsts).tolist(), strict=True))

    # -- memory of its own -----------------------------------------------------------------------------------------

    def make_private(self, pages: Pages, filled: NDArray[np.bool_]) -> int:
        """Give protected pages memory of their own: copied beside, then moved into place.

        :param pages: at most MOVED_PAGES, in at most BATCH_ENTRIES runs.
        :param filled: which of them have contents; the others become pages that were never touched.
        :returns: how many of the pages, from the first on, were moved.
        :raises HostMemoryError: the host has no memory for them; nothing was moved.
        """
        session = self.working_session()
        runs = self._runs(pages)
        side = session.control.side_address
        places: list[int] = []
        at = side
        for start, length in runs:
            if length >= _HUGE_BYTES:  # keep the place within 2 MiB, so that it can be a huge page
                at += (start - at) % _HUGE_BYTES
            places.append(at)
            at += length
        length = at - side
        all_huge = all(size >= _HUGE_BYTES for _, size in runs)
        # Small pieces must not become huge pages while they are built: most of one would be thrown away again.
        before = tuple(_ADVICE) if all_huge else ("dd", "dc", "mg")
        anonymous = (
            syscalls.MAP_PRIVATE | syscalls.MAP_ANONYMOUS | syscalls.MAP_FIXED_NOREPLACE | syscalls.MAP_NORESERVE
        )
        both = syscalls.PROT_READ | syscalls.PROT_WRITE
        table = [[syscalls.NR_MMAP, side, length, both, anonymous, 2**64 - 1, 0, side]]
        table += self._advise(side, length, before)
        copies, copied_bytes = self._fill_pieces(session, pages, filled, runs, places)
        if copies:
            control = session.control
            local = control.code_address + control_area.LOCAL_PIECES
            remote = control.code_address + control_area.REMOTE_PIECES
            table.append(
                [syscalls.NR_PROCESS_VM_READV, self._pid_inside(), local, copies, remote, copies, 0, copied_bytes]
            )
        if not all_huge:
            table += self._advise(side, length, ("hg", "nh"))
        before_moves = len(table)
        flags = syscalls.MREMAP_MAYMOVE | syscalls.MREMAP_FIXED
        table += [
            [syscalls.NR_MREMAP, place, size, size, flags, start, 0, start]
            for (start, size), place in zip(runs, places, strict=True)
        ]
        table.append([syscalls.NR_MUNMAP, side, length, 0, 0, 0, 0, 0])
        done = session.run(np.array(table, dtype=np.uint64))
        self._mappings_left -= len(runs)
        moved_runs = min(max(done - before_moves, 0), len(runs))
        moved = sum(size for _, size in runs[:moved_runs]) >> PAGE_SHIFT
        self._unregistered[pages[:moved]] = True
        if done < len(table):
            failure = session.failure(done, "copying pages back")
            self._clear_side(self.mappings())
            if not moved:
                raise HostMemoryError(
                    f"no memory to give pages of guest {self.process.name} their own copy: {failure}",
                    domid=self.domid,
                    remedy="relieve the host",
                ) from failure
        return moved

    def _fill_pieces(
        self, session: Session, pages: Pages, filled: NDArray[np.bool_], runs: list[tuple[int, int]], places: list[int]
    ) -> tuple[int, int]:
        # What process_vm_readv copies, from where to where; returns how many pieces and bytes.
        hvas = self.hvas[pages]
        shifts = np.repeat(
            np.array(places, dtype=np.int64) - np.array([start for start, _ in runs], dtype=np.int64),
            [size >> PAGE_SHIFT for _, size in runs],
        )
        hvas, shifts = hvas[filled], shifts[filled]
        new = (np.diff(hvas) != PAGE_SIZE) | (np.diff(shifts) != 0)
        starts = np.concatenate([[0], np.flatnonzero(new) + 1]) if len(hvas) else np.empty(0, dtype=np.int64)
        lengths = (np.append(starts[1:], len(hvas)) - starts) * PAGE_SIZE
        session.local_pieces["base"][: len(starts)] = hvas[starts] + shifts[starts]
        session.remote_pieces["base"][: len(starts)] = hvas[starts]
        for pieces in (session.local_pieces, session.remote_pieces):
            pieces["length"][: len(starts)] = lengths
        return len(starts), int(lengths.sum())

    def _clear_side(self, mappings: Mappings) -> None:
        # Whatever a memshr that died, or a table that stopped, has left where pages are built. Nothing of QEMU's is
        # there: the addresses are ours from the moment on that the agent was put in.
        session = self.working_session()
        side = session.control.side_address
        inside = (side <= mappings.start) & (mappings.start < side + control_area.SIDE_BYTES)
        left = [
            [syscalls.NR_MUNMAP, mapping.start, mapping.end - mapping.start, 0, 0, 0, 0, 0]
            for mapping in mappings.of(inside)
        ]
        if left:
            session.run(np.array(left[: control_area.TABLE_ENTRIES], dtype=np.uint64))

    def _pid_inside(self) -> int:
        # QEMU's own idea of its pid, which in a container is another.
        for line in Path(f"/proc/{self.process.pid}/status").read_text().splitlines():
            if line.startswith("NSpid:"):
                return int(line.split()[-1])
        raise self.gone()
