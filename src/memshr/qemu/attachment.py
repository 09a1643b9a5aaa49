"""One QEMU that memshr looks at or works on: the state that it is in, and what can be done to its pages.

What makes this hard: between our look at a guest and what we then do, everything may fail, and a guest whose pages we
have protected waits for us. So a guest is in one of these states, and ``_become`` alone changes it:

* *looking*: nothing of it has been changed. *attaching*: a link is being made; if that fails in whatever way, the
  link is given up and the guest is as before. *attached*: its pages can be protected and remapped.
* *lost*: a look or a call failed, or an answer did not come, while a link was open. The link is given up at once:
  the kernel lets every writer go on. Nothing more is done to the guest unless it is attached anew.
* *gone*: the process has ended; the pidfd says so and nothing else does.

Everything that changes a mapping goes through the agent, in tables that end under full protection even if we die (see
``agent``). This module knows nothing of handles, groups or who shares with whom.
"""

from __future__ import annotations

import contextlib
import enum
import errno
import logging
import os
import select
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator
from dataclasses import dataclass
from typing import Final, NoReturn

import numpy as np
from numpy.typing import NDArray

from memshr.errors import (
    ConnectionLostError,
    HostMemoryError,
    InvariantError,
    MemshrError,
    NoSuchDomainError,
    RefusedDomainError,
    Status,
)
from memshr.indices import GuestPage, of_kind
from memshr.procfs import Vma, Vmas
from memshr.qemu import control_area, pagemap, syscalls, tables
from memshr.qemu.agent import AgentCallError, AgentLink, entries
from memshr.qemu.bounded import StuckError
from memshr.qemu.control_area import NOT_EQUAL, Original
from memshr.qemu.guests import GuestProcess
from memshr.qemu.injection import Injector
from memshr.qemu.interrupts import uninterrupted
from memshr.qemu.mapping_budget import MAP_RESERVE
from memshr.qemu.pool import FramePool, files_of_pools
from memshr.qemu.ram import GuestRam, Pages
from memshr.qemu.tables import Kept, Table
from memshr.qemu.target import Target
from memshr.runs import alike, range_members, slices
from memshr.types import PAGE_SHIFT, PAGE_SIZE, DomId, Gfns, PageBytes

_log = logging.getLogger(__name__)

BATCH_ENTRIES: Final = 384
"""Vmas that one table changes: a writer of one of its pages waits for the rest of the table (7 to 20 us for each
isolated page on the development machine, so 8 ms at most if nobody is in the agent's way)."""
BATCH_PAGES: Final = BATCH_ENTRIES
"""Pages that are in flight together, for the same reason: each may be an isolated one."""
MOVED_PAGES: Final = 1024
"""Pages of one run that a table copies back into memory of their own."""

MAPPING_OVER_IS_SAFE = tuple(int(part) for part in os.uname().release.split("-")[0].split(".")[:2]) >= (6, 9)
"""Whether an mmap(MAP_FIXED) that fails leaves what was there. Before Linux 6.9 it may leave a hole: there mappings are
made beside and moved into place by mremap, which looks for what may fail before it takes anything away."""

_NO_PROCESS: Final = frozenset({errno.ESRCH, errno.ENOENT})
MAPPED, DIFFERS = 1, 2
_MOST_DIFFERENCES: Final = 64
"""How often the agent may stop in one flight because a page is not what it was. Even once takes somebody else who
changes guest memory, or a QEMU that cheats."""

_UNMERGE_BYTES: Final = 64 << 20
"""Memory that is taken from KSM in one call, which keeps QEMU's other threads from faulting meanwhile."""
_MPOL_F_ADDR: Final = 2
_MOST_POLICIES: Final = 1 << 16
"""modes of NUMA policies with their mode flags are below that (linux/mempolicy.h)"""
_MERGEABLE: Final = tables.bits_of(frozenset({"mg"}))


class GuestState(enum.Enum):
    """See the module."""

    LOOKING = "looking"
    ATTACHING = "attaching"
    ATTACHED = "attached"
    LOST = "lost"
    GONE = "gone"


_TRANSITIONS: Final = {
    GuestState.LOOKING: {GuestState.ATTACHING, GuestState.GONE},
    GuestState.ATTACHING: {GuestState.ATTACHED, GuestState.LOOKING, GuestState.LOST, GuestState.GONE},
    GuestState.ATTACHED: {GuestState.LOOKING, GuestState.LOST, GuestState.GONE},
    GuestState.LOST: {GuestState.ATTACHING, GuestState.GONE},
    GuestState.GONE: set(),
}

Steps = Generator[AgentLink, None, int]
"""Work of one agent, table by table: each step ends when one is posted to this link. Returns how much was done."""


def carry_out(works: Iterable[Steps]) -> list[int]:
    """Let agents do their work, those of different guests at the same time; returns what each returned.

    Whoever has answered goes on at once, whatever the others do: no guest waits for another's agent.

    :raises BaseException: the first that one raises; the others are done, too. If waiting itself is interrupted, those
        that are under way are closed (GeneratorExit).
    """
    results: dict[int, int] = {}
    waiting: dict[int, tuple[int, Steps, AgentLink]] = {}
    failure: BaseException | None = None
    poll = select.poll()

    def go_on(number: int, steps: Steps) -> None:
        nonlocal failure
        try:
            link = next(steps)
        except StopIteration as end:
            results[number] = end.value
            return
        except BaseException as error:
            results[number] = 0
            failure = failure or error
            return
        waiting[link.fileno()] = number, steps, link
        poll.register(link.fileno(), select.POLLIN)

    try:
        for number, steps in enumerate(works):
            go_on(number, steps)
        while waiting:
            rest_s = min(link.rest_s for _, _, link in waiting.values())
            ready = {fileno for fileno, _ in poll.poll(rest_s * 1000)}
            ready |= {fileno for fileno, (_, _, link) in waiting.items() if not link.rest_s}
            for fileno in ready:
                poll.unregister(fileno)
                number, steps, _ = waiting.pop(fileno)
                go_on(number, steps)
    except BaseException:
        # Tables are under way that nobody waits for any more. Their callers must know before anything is let go.
        for _, steps, _ in waiting.values():
            steps.close()
        raise
    if failure is not None:
        raise failure
    return [results[number] for number in sorted(results)]


@dataclass(frozen=True, slots=True)
class PoolMappings:
    """Where a QEMU has one file mapped that is called like a frame pool.

    :param sample: one of the mappings.
    :param hvas: the address of each page, shape ``(n,)``.
    :param frames: the number of the frame that is mapped there, shape ``(n,)``.
    """

    sample: Vma
    hvas: NDArray[np.int64]
    frames: NDArray[np.int64]

    @property
    def file(self) -> tuple[int, int]:
        """Device and inode of the file."""
        return os.makedev(self.sample.dev_major, self.sample.dev_minor), self.sample.inode


class Attachment:
    """One QEMU, open for reading; ``attach`` makes it one whose pages can be protected and remapped.

    :param open_target: opens the process for looking; what it gives is closed by ``close``.
    :raises NoSuchDomainError: it has ended.
    :raises BackendError: QEMU does not tell where its RAM is.
    """

    def __init__(
        self, domid: DomId, process: GuestProcess, open_target: Callable[[GuestProcess], Target] = Target
    ) -> None:
        self.domid = domid
        self.process = process
        self.state = GuestState.LOOKING
        self.link: AgentLink | None = None
        self.must_drain = False
        self.why: BaseException | None = None
        """why it is lost, or could not be attached"""
        self.on_lost: Callable[[Attachment], None] = lambda _: None
        """called when a link is given up: books about the guest are to be forgotten"""
        self._giving_up = threading.Lock()
        self._kept: list[Kept] = []
        self._policies: list[tuple[int, bytes]] = []
        self._pool_numbers: dict[tuple[int, int], int] = {}
        self._mappings_left = 0
        self._stopped_at_a_difference = False
        try:
            self.target = open_target(process)
        except OSError as error:
            raise (self.ended() if error.errno in _NO_PROCESS else self._unreadable(error)) from error
        try:
            if self.target.has_ended():
                self._end()
            with self._asking():
                self.ram = GuestRam(self.target.layout())
        except BaseException:
            self.target.close()
            raise
        self.pages = self.ram.pages
        self.hvas = self.ram.hvas
        self.in_pool = np.zeros(self.pages, dtype=np.bool_)
        """pages in mappings of a pool; kept by the books, which know who shares"""
        self._unregistered = np.zeros(self.pages, dtype=np.bool_)
        """pages in mappings that were made after the last UFFDIO_REGISTER"""

    # -- states ----------------------------------------------------------------------------------------------------

    def _become(self, state: GuestState) -> None:
        if state is self.state:
            return
        if state not in _TRANSITIONS[self.state]:
            raise InvariantError(f"guest {self.process.name} cannot go from {self.state.value} to {state.value}")
        _log.info("guest %s (%d): %s", self.process.name, self.process.pid, state.value)
        self.state = state

    @property
    def dead(self) -> bool:
        """Whether nothing can be done with it: gone, or lost and not attached anew."""
        return self.state in {GuestState.GONE, GuestState.LOST}

    @property
    def gone(self) -> bool:
        """Whether the process has ended; looks."""
        if self.state is not GuestState.GONE and self.target.has_ended():
            self._give_up(GuestState.GONE)
        return self.state is GuestState.GONE

    def ended(self) -> NoSuchDomainError:
        """The error for a guest that has ended."""
        return NoSuchDomainError(f"guest {self.process.name} ({self.process.pid}) has ended", domid=self.domid)

    def _end(self) -> NoReturn:
        self._give_up(GuestState.GONE)
        raise self.ended()

    def lose(self, why: BaseException) -> None:
        """Give its link up, whatever is under way: all protection ends, every writer goes on. Never raises."""
        if self.link is None:
            return
        self.why = why
        _log.warning("guest %s (%d) is given up: %s", self.process.name, self.process.pid, why)
        self._give_up(GuestState.GONE if self.target.has_ended() else GuestState.LOST)

    def _give_up(self, state: GuestState) -> None:
        with uninterrupted():
            with self._giving_up:  # the write watch may find out at the same time
                link, self.link = self.link, None
                if self.state is not GuestState.GONE:
                    self._become(state)
            self._pool_numbers = {}
            if link is not None:
                link.abandon()
            self.target.forget_mappings()
            self.on_lost(self)
            if link is not None:
                link.close()

    def lost_error(self) -> RefusedDomainError:
        """The error for a guest that was given up."""
        text = f"guest {self.process.name} ({self.process.pid}) was given up: {self.why}"
        return RefusedDomainError(
            text, reasons=[text], status=Status.ESRCH, domid=self.domid, remedy="it goes on; run the command again"
        )

    def failed(self, error: OSError) -> MemshrError:
        """What a failed look or call means. A guest that is being worked on is lost: its writers must not wait."""
        if self.target.has_ended():
            self._give_up(GuestState.GONE)
            return self.ended()
        if self.state is GuestState.ATTACHED:
            self.lose(error)
            return self.lost_error()
        return self._unreadable(error)

    def _unreadable(self, error: OSError) -> MemshrError:
        name = f"guest {self.process.name} ({self.process.pid})"
        if error.errno in {errno.EACCES, errno.EPERM}:
            return RefusedDomainError(
                f"may not look into {name}",
                reasons=["no permission"],
                domid=self.domid,
                remedy="run as root (capabilities SYS_PTRACE, SYS_ADMIN and SYS_NICE)",
            )
        if error.errno == errno.ENOMEM:
            return HostMemoryError(f"no memory: {error.strerror}", domid=self.domid, remedy="relieve the host")
        text = f"{name} changed while memshr looked at it: {error.strerror or error}"
        return RefusedDomainError(text, reasons=[text], domid=self.domid, status=Status.ESRCH, remedy="try again")

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        # Around everything that is asked of the kernel, QEMU or its agent about this guest.
        try:
            yield
        except OSError as error:
            failure = self.failed(error)
            raise failure from error
        except StuckError as error:
            self.lose(error)
            raise
        except (ConnectionLostError, AgentCallError) as error:
            if self.target.has_ended():
                self._give_up(GuestState.GONE)
                raise self.ended() from error
            if self.state is not GuestState.ATTACHED:
                raise
            self.lose(error)
            raise self.lost_error() from error

    def working_link(self) -> AgentLink:
        """The link.

        :raises NoSuchDomainError: the guest has ended. :raises RefusedDomainError: it was given up.
        """
        if self.link is None:
            if self.gone:
                raise self.ended()
            raise self.lost_error()
        return self.link

    # -- looking ---------------------------------------------------------------------------------------------------

    def pages_of_gfns(self, gfns: Gfns) -> Pages:
        """Page number of each gfn, -1 where there is no RAM."""
        return self.ram.pages_of_gfns(gfns)

    def entries(self, pages: Pages) -> NDArray[np.uint64]:
        """The pagemap entries of pages, in any order."""
        with self._asking():
            return self.target.entries(self.hvas[pages])

    def zero_pages(self, entries_: NDArray[np.uint64]) -> NDArray[np.bool_]:
        """Which entries are of the kernel's own zero page."""
        with self._asking():
            return self.target.zero_pages(entries_)

    def mappings(self) -> Vmas:
        """What QEMU has mapped now; the same object as the last time in this link if nothing has changed since."""
        with self._asking():
            mappings = self.target.mappings()
            if not len(mappings):  # a process that is exiting has given its memory up before it is said to have ended
                raise ProcessLookupError(errno.ESRCH, "it has no memory any more")
            return mappings

    def read_run(self, first: int, out: PageBytes) -> None:
        """Contents of consecutive pages. Pages that were never touched are not touched by this."""
        rows = of_kind(GuestPage, np.arange(first, first + len(out)))
        found = self.entries(rows)
        # In a pool's mapping a page that is not there reads as its frame; in anonymous memory it is zeros. So is the
        # kernel's zero page, which a large guest that was looked at before may have for all that it never touched.
        absent = (~pagemap.is_there(found) | self.zero_pages(found)) & ~self.in_pool[rows]
        for run in slices(alike(absent)):
            if absent[run.start]:
                out[run] = 0
            else:
                self.read_scattered(rows[run], out[run])

    def read_scattered(self, pages: Pages, out: PageBytes, rows: NDArray[np.int64] | None = None) -> None:
        """Contents of pages in any order.

        :param rows: the row of ``out`` that each goes into, shape ``(n,)``; None: page i into row i.
        """
        rows = np.arange(len(pages)) if rows is None else rows
        with self._asking():
            if self.target.read(self.hvas[pages], out, rows) != len(pages) * PAGE_SIZE:
                raise OSError(errno.EFAULT, "some of its memory cannot be read")

    def read_for_others(self, pages: Pages, out: PageBytes) -> None:
        """``read_scattered``, of bytes that others are to see.

        SAFETY: a QEMU may execute a set-uid program at any time, whose memory is not its to share. What was read is
        thrown away if it is not the same program afterwards.
        """
        self.read_scattered(pages, out)
        with self._asking():
            if not self.target.is_itself():
                raise OSError(errno.ESRCH, "it has executed another program")

    @staticmethod
    def pool_mappings(mappings: Vmas) -> Iterator[PoolMappings]:
        """Where QEMU has files mapped that are called like frame pools, one by one; made for tens of thousands.

        :param mappings: what it has mapped.
        :raises BackendError: as ``files_of_pools``.
        """
        for rows in files_of_pools(mappings):
            starts = mappings.start[rows].astype(np.int64)
            lengths = (mappings.end[rows].astype(np.int64) - starts) >> PAGE_SHIFT
            first_frames = mappings.offset[rows].astype(np.int64) >> PAGE_SHIFT
            yield PoolMappings(
                mappings[int(rows[0])],
                range_members(starts >> PAGE_SHIFT, lengths) << PAGE_SHIFT,
                range_members(first_frames, lengths),
            )

    def huge(self, pages: Pages) -> NDArray[np.bool_]:
        """Which pages are part of a transparent huge page; looks at one page of each 2 MiB."""
        _, first, inverse = np.unique(self.hvas[pages] >> 21, return_index=True, return_inverse=True)
        found = self.entries(pages[first])
        with self._asking():
            return np.asarray(self.target.huge(found)[inverse])

    def split_huge_pages(self, pages: Pages) -> None:
        """Split the huge pages that these pages are parts of, so that the host gets back what is remapped of them.

        MADV_COLD on a part of a huge page does it, from outside; on other pages it only marks them as seldom used.
        """
        hvas = self.hvas[pages]
        _, at = np.unique(hvas >> 21, return_index=True)
        with contextlib.suppress(OSError):  # a saving that comes later, no error
            self.target.split_huge_pages(hvas[at])

    # -- attaching -------------------------------------------------------------------------------------------------

    @property
    def has_agent(self) -> bool:
        """Whether some memshr has been at work in it."""
        with self._asking():
            return self.target.has_agent()

    def attach(
        self, injector: Injector, available_bytes: int, watching: Callable[[Attachment, AgentLink], object]
    ) -> Vmas:
        """Find or install the agent, open a link, make all RAM one that can be write-protected.

        If it fails, in whatever way, no link is left.

        :param available_bytes: how much memory of the host giving KSM's pages back may take.
        :param watching: called before any page can be protected: from then on somebody hears of writes.
        :returns: what QEMU has mapped since the link began.
        :raises RefusedDomainError: the guest must not be touched; ``reasons`` says why.
        """
        began_s = time.monotonic()
        self._become(GuestState.ATTACHING)
        try:
            try:
                self.link = self.target.connect(list(self.ram.layout), injector, self.domid)
                self.must_drain = self.target.must_drain
                watching(self, self.link)
                self.target.forget_mappings()
                mappings = self.target.mappings()
                self._clear_side(mappings)
                self._keep_originals(self.link)
                self._take_from_ksm(self.link, available_bytes)
                self.register()
                self._mappings_left = self.target.mappings_left() - MAP_RESERVE
                mappings = self.target.mappings()
            except OSError as error:
                raise self.failed(error) from error
        except BaseException:
            if self.state is GuestState.ATTACHING or self.link is not None:
                self._give_up(GuestState.GONE if self.target.has_ended() else GuestState.LOOKING)
            raise
        self.why = None
        self._become(GuestState.ATTACHED)
        _log.info(
            "guest %s (%d): attached in %.1f ms; %d pages, %d more mappings fit, %s",
            *(self.process.name, self.process.pid, (time.monotonic() - began_s) * 1e3, self.pages),
            *(self._mappings_left, "disk requests are waited for" if self.must_drain else "no direct disk requests"),
        )
        return mappings

    def _keep_originals(self, link: AgentLink) -> None:
        # How QEMU had set each range of RAM, from the first memshr's notes; of ranges that are new it is noted now.
        notes = link.originals
        known = {(note.start, note.end): at for at, note in enumerate(notes)}
        for ram in self.ram.layout:
            if (ram.hva, ram.end_hva) not in known:
                known[ram.hva, ram.end_hva] = len(notes)
                policy, nodes = self._policy_at(link, ram.hva)
                flags = tables.bits_of(self.target.flags_at(ram.hva))
                notes.append(Original(ram.hva, ram.end_hva, flags, policy, nodes))
        link.originals = notes
        self._kept = []
        for ram in self.ram.layout:
            at = known[ram.hva, ram.end_hva]
            # A QEMU may have written into the notes: they are about nobody but itself, but they must be possible.
            policy = notes[at].policy if 0 <= notes[at].policy < _MOST_POLICIES else 0
            flags = notes[at].flags & tables.bits_of(frozenset(tables.FLAGS))
            self._kept.append(Kept(flags, policy, link.nodes_address(at)))
        self._policies = [
            (kept.policy, notes[known[where]].nodes) for kept, where in zip(self._kept, self._ranges(), strict=True)
        ]

    def _ranges(self) -> list[tuple[int, int]]:
        return [(ram.hva, ram.end_hva) for ram in self.ram.layout]

    @property
    def is_bound(self) -> bool:
        """Whether any of its RAM may be of certain NUMA nodes only."""
        return any(mode & ~syscalls.MPOL_MODE_FLAGS == syscalls.MPOL_BIND for mode, _ in self._policies)

    def policies(self, pages: Pages) -> tuple[NDArray[np.int64], list[tuple[int, bytes]]]:
        """By which NUMA policy QEMU asked for the memory of each page.

        :returns: a place in the list for each, shape ``(n,)``; the list: mode with mode flags, bits of the nodes.
        """
        distinct = list(dict.fromkeys(self._policies)) or [(0, b"")]
        of_range = np.array([distinct.index(each) for each in self._policies] or [0], dtype=np.int64)
        if len(distinct) == 1:
            return np.zeros(len(pages), dtype=np.int64), distinct
        return of_range[self.ram.range_of_hvas(self.hvas[pages])], distinct

    @staticmethod
    def _policy_at(link: AgentLink, hva: int) -> tuple[int, bytes]:
        # The NUMA policy of the mapping at an address, as get_mempolicy(2) tells QEMU itself.
        at, bits = link.scratch_address, tables.NODE_MASK_BITS
        if not link.may_call(syscalls.NR_GET_MEMPOLICY):
            return 0, b""
        if link.call(syscalls.NR_GET_MEMPOLICY, at, at + 8, bits, hva, _MPOL_F_ADDR) < 0:
            return 0, b""  # a kernel without NUMA has none
        found = link.scratch(8 + control_area.NODE_MASK_BYTES)
        return int.from_bytes(found[:4], "little", signed=True), found[8:]

    def _take_from_ksm(self, link: AgentLink, available_bytes: int) -> None:
        # What KSM merges anew loses its write protection (docs/nominations.md): none of this RAM may be its to merge.
        merged = self.target.ksm_pages()
        if merged * PAGE_SIZE > available_bytes:
            text = f"KSM has merged {merged:,} of its pages, and the host has no room to give them back"
            raise RefusedDomainError(
                f"guest {self.process.name} ({self.process.pid}) is left alone: {text}",
                reasons=[text],
                domid=self.domid,
                remedy="free memory, or have KSM unmerge all (write 2 to /sys/kernel/mm/ksm/run)",
            )
        if not link.may_call(syscalls.NR_MADVISE) and any(kept.flags & _MERGEABLE for kept in self._kept):
            text = "its seccomp filter does not let its memory be taken from KSM"
            raise RefusedDomainError(
                f"guest {self.process.name} ({self.process.pid}) is left alone: {text}",
                reasons=[text],
                domid=self.domid,
                remedy="start QEMU with -machine mem-merge=off",
            )
        rows = [
            (syscalls.NR_MADVISE, start, min(_UNMERGE_BYTES, ram.end_hva - start), syscalls.MADV_UNMERGEABLE)
            for ram, kept in zip(self.ram.layout, self._kept, strict=True)
            if kept.flags & _MERGEABLE
            for start in range(ram.hva, ram.end_hva, _UNMERGE_BYTES)
        ]
        for row in rows:
            if link.run(entries([row], results=[0])) != 1:
                raise link.failure(0, "taking its memory from KSM")

    def _give_to_ksm(self, link: AgentLink) -> None:
        for ram, kept in zip(self.ram.layout, self._kept, strict=True):
            if kept.flags & _MERGEABLE:
                link.call(syscalls.NR_MADVISE, ram.hva, ram.end_hva - ram.hva, syscalls.MADV_MERGEABLE)

    def count_mappings(self) -> None:
        """See how many mappings QEMU may still get."""
        with self._asking():
            self._mappings_left = self.target.mappings_left() - MAP_RESERVE

    @property
    def mappings_left(self) -> int:
        """How many more mappings QEMU may get, by a careful estimate."""
        return self._mappings_left

    def pool_number(self, pool: FramePool) -> int:
        """The number that ``pool`` has in QEMU, as a descriptor that can only read and that ends with the link."""
        number = self._pool_numbers.get(pool.file)
        if number is None:
            readable = pool.readable()
            try:
                with self._asking():
                    number = self.working_link().give(readable)
            finally:
                os.close(readable)
            self._pool_numbers[pool.file] = number
        return number

    def forget_pools(self, needed: Iterable[FramePool]) -> None:
        """Take all pools but these back from QEMU."""
        wanted = {pool.file for pool in needed}
        for file, number in list(self._pool_numbers.items()):
            if file not in wanted:
                with self._asking():
                    self.working_link().drop(number)
                del self._pool_numbers[file]

    def drain(self) -> None:
        """Wait until every disk request of the guest that is under way has ended; the guest goes on meanwhile."""
        began_s = time.monotonic()
        with self._asking():
            self.target.drain()
        _log.debug("guest %s: disk requests ended in %.1f ms", self.process.name, (time.monotonic() - began_s) * 1e3)

    def detach(self, injector: Injector) -> None:
        """Take the agent out of QEMU: thread, mappings, descriptors. No page may be on a frame any more."""
        link = self.working_link()
        try:
            with self._asking():
                self._give_to_ksm(link)
                link.originals = []
                self.target.disconnect(link, injector)
        finally:
            # Also if it fails: the agent may have ended by then, and nothing can be asked of it any more.
            self.drop_link()

    def drop_link(self) -> None:
        """End the link: all protection ends. The agent stays, asleep."""
        if self.link is not None:
            self._give_up(GuestState.LOOKING)

    def close(self) -> None:
        """End the link and close every file."""
        try:
            self.drop_link()
        finally:
            self.target.close()

    # -- protecting ------------------------------------------------------------------------------------------------

    def register(self) -> None:
        """Make every mapping of RAM one that can be write-protected; those that can already are left alone."""
        link = self.working_link()
        with self._asking():
            for ram in self.ram.layout:
                link.register(ram.hva, ram.pages * PAGE_SIZE)
        self._unregistered[:] = False

    def protect(self, pages: Pages) -> None:
        """Let writers of these pages wait from now on."""
        link = self.working_link()
        if self._unregistered[pages].any():
            self.register()
        if not link.features & syscalls.UFFD_FEATURE_WP_UNPOPULATED:
            self._touch(pages)
        with self._asking():
            link.protect(self.ram.runs(pages))

    def _touch(self, pages: Pages) -> None:
        # Without WP_UNPOPULATED a page that is not there cannot be protected: reading makes it the zero page first.
        absent = pages[~pagemap.is_there(self.entries(pages))]
        if len(absent):
            self.read_scattered(absent, np.empty((len(absent), PAGE_SIZE), dtype=np.uint8))

    def unprotect(self, pages: Pages) -> None:
        """Let writers of these pages go on."""
        link = self.working_link()
        with self._asking():
            for run in self.ram.runs(pages):
                try:
                    link.unprotect([run])
                except OSError as error:
                    if error.errno != errno.ENOENT:  # a mapping of ours that is not registered has no protection
                        raise

    def wake(self) -> None:
        """Let everybody who waits at a protected page try again."""
        link = self.working_link()
        with self._asking():
            for ram in self.ram.layout:
                link.wake(ram.hva, ram.pages * PAGE_SIZE)

    # -- remapping -------------------------------------------------------------------------------------------------

    def map_frames(self, pages: Pages, frames: NDArray[np.int64], pool: FramePool, fate: NDArray[np.int8]) -> Steps:
        """Map frames of one pool, which QEMU has been given, over protected pages that hold the same bytes.

        :param frames: the frame (its number in the pool) of each page, shape ``(n,)``.
        :param fate: shape ``(n,)``, all 0; becomes MAPPED, or DIFFERS for a page that does not hold what its frame
            holds; what stays 0 was not reached, as the host had no more memory or mappings.
        :returns: how many of the pages were mapped.
        """
        number = self._pool_numbers.get(pool.file)
        if number is None:
            raise InvariantError(f"guest {self.process.name} has not been given the pool of {pool.group}")
        waiting = [slice(0, len(pages))]
        differences = 0
        while waiting:
            some = waiting.pop()
            table, ends = tables.mapping_frames(self.hvas[pages[some]], frames[some], number)
            done = yield from self._remap(table)
            end = some.start + (int(ends[done - 1]) if done else 0)
            fate[some.start : end] = MAPPED
            self._unregistered[pages[some.start : end]] = True
            if done == len(table):
                continue
            if not self._stopped_at_a_difference:
                break
            differences += 1
            if differences > _MOST_DIFFERENCES:
                error = ConnectionLostError("its protected pages change all the time")
                self.lose(error)
                raise self.lost_error() from error
            # One page of a run differs: by halves until it is found. The others go on.
            after = some.start + int(ends[done])
            if after < some.stop:
                waiting.append(slice(after, some.stop))
            if after - end == 1:
                fate[end] = DIFFERS
            else:
                middle = (end + after) // 2
                waiting += [slice(middle, after), slice(end, middle)]
        return int((fate == MAPPED).sum())

    def map_nothing(self, pages: Pages, anonymous: NDArray[np.bool_]) -> Steps:
        """Give the memory of protected pages back: they read as zeros afterwards. Returns how many, as map_frames.

        :param anonymous: which pages lie in anonymous memory.
        """
        hvas = self.hvas[pages]
        table, ends = tables.emptying(hvas, anonymous, self._kept, self.ram.range_of_hvas(hvas))
        done = yield from self._remap(table)
        emptied = int(ends[done - 1]) if done else 0
        self._unregistered[pages[:emptied][~anonymous[:emptied]]] = True
        return emptied

    def _remap(self, table: Table) -> Steps:
        # How many calls of the table were done. What QEMU had set on the old mappings is put back after each batch.
        link = self.working_link()
        at_once = BATCH_ENTRIES if MAPPING_OVER_IS_SAFE else BATCH_ENTRIES // 2
        self._stopped_at_a_difference = False
        ranges = self.ram.range_of_hvas(table[:, 1].astype(np.int64))
        done = 0
        while done < len(table):
            batch = table[done : done + at_once]
            growth = 2 * int(((batch[:, 0] & np.uint64(0xFFFF)) == syscalls.NR_MMAP).sum())
            if growth > self._mappings_left:
                self.count_mappings()
                if growth > self._mappings_left:
                    break
            calls, ends = batch, np.arange(1, len(batch) + 1)
            if not MAPPING_OVER_IS_SAFE:
                calls, ends = tables.beside(batch, link.side_address, link.pid_inside)
            most = control_area.TABLE_ENTRIES - len(calls)
            advice = tables.restoring(batch, self._kept, ranges[done : done + len(batch)], most)
            began_s = time.monotonic()
            with self._asking():
                link.post(np.concatenate([calls, np.array(advice, dtype=np.uint64).reshape(-1, 8)]))
            self._mappings_left -= growth
            yield link
            with self._asking():
                link.await_answer()
            finished = int(np.searchsorted(ends, link.done, side="right"))
            self._stopped_at_a_difference = finished < len(batch) and link.result(link.done) == NOT_EQUAL
            if _log.isEnabledFor(logging.DEBUG):
                took_us = (time.monotonic() - began_s) * 1e6
                _log.debug("guest %s: %d of %d mappings, %.0f us", self.process.name, finished, len(batch), took_us)
            done += finished
            if finished < len(batch):
                with self._asking():
                    self._clear_side(self.target.mappings())
                break
        return done

    def make_private(self, pages: Pages, filled: NDArray[np.bool_]) -> Steps:
        """Give protected pages memory of their own: copied beside, then moved into place.

        Two runs of pages, the second of which was never touched::

            guest RAM    [ a b ][ . ]        pages of pools, or of nobody
            beside       [ a b ][   ]        1. mapped in one piece beside, with the flags that RAM had, and filled
            guest RAM    [ a b ][   ]        2. each run moved over its place by mremap, in one step

        The agent does this by one table. If it stops early, the runs before that are moved and the others are as they
        were.

        :param pages: at most MOVED_PAGES, in at most BATCH_ENTRIES runs.
        :param filled: which of them have contents; the others become pages that were never touched.
        :returns: how many of the pages, from the first on, were moved.
        :raises HostMemoryError: the host has no memory for them; nothing was moved.
        """
        link = self.working_link()
        runs = self.ram.runs(pages)
        ranges = self.ram.range_of_hvas(np.array([start for start, _ in runs], dtype=np.int64))
        moves = tables.copying(
            self.hvas[pages],
            filled,
            runs,
            [self._kept[at] for at in ranges.tolist()],
            side=link.side_address,
            pid=link.pid_inside,
            addresses=link.pieces_addresses,
        )
        with self._asking():
            link.set_pieces(moves.pieces)
            link.post(moves.table)
        yield link
        with self._asking():
            link.await_answer()
        done = link.done
        self._mappings_left -= len(runs)
        moved_runs = min(max(done - moves.before_moves, 0), len(runs))
        moved = sum(size for _, size in runs[:moved_runs]) >> PAGE_SHIFT
        self._unregistered[pages[:moved]] = True
        if done < len(moves.table):
            failure = link.failure(done, "copying pages back")
            with self._asking():
                self._clear_side(self.target.mappings())
            if not moved:
                raise HostMemoryError(
                    f"no memory to give pages of guest {self.process.name} their own copy: {failure}",
                    domid=self.domid,
                    remedy="relieve the host",
                ) from failure
        return moved

    def _clear_side(self, mappings: Vmas) -> None:
        # Whatever a memshr that died, or a table that stopped, has left where pages are built. Nothing of QEMU's is
        # there: the addresses are ours from the moment on that the agent was put in.
        link = self.working_link()
        side = link.side_address
        inside = (side <= mappings.start) & (mappings.start < side + control_area.SIDE_BYTES)
        left = [
            [syscalls.NR_MUNMAP, mapping.start, mapping.end - mapping.start, 0, 0, 0, 0, 0]
            for mapping in mappings.of(inside)
        ]
        for first in range(0, len(left), control_area.TABLE_ENTRIES):
            link.run(np.array(left[first : first + control_area.TABLE_ENTRIES], dtype=np.uint64))
