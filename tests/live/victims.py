"""Two guests of another user beside a hostile QEMU, which check their memory, and what must hold for them."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Final, Self

import numpy as np

from guests.hostile import FIRST_GFN, PAGE_BYTES
from guests.machine import GuestFailedError, wait_until
from guests.qtest import QtestGuest

USER: Final = "daemon"
COMMON_PAGES: Final = 128
TWIN_PAGES: Final = 32
HOT_PAGES: Final = 16
PAGES: Final = COMMON_PAGES + 2 * TWIN_PAGES + HOT_PAGES
CLEAN_DEADLINE_S = 30.0

_START: Final = FIRST_GFN * PAGE_BYTES
_HOT_START: Final = _START + (COMMON_PAGES + 2 * TWIN_PAGES) * PAGE_BYTES


def common_pages() -> bytes:
    """What everybody has, a hostile QEMU too: COMMON_PAGES different pages."""
    return np.random.default_rng(17).bytes(COMMON_PAGES * PAGE_BYTES)


@dataclass(frozen=True, slots=True)
class _Traces:
    # What memshr could leave in a process.
    threads: int
    descriptors: int
    memshr: tuple[str, ...]

    @classmethod
    def of(cls, pid: int) -> Self:
        links = []
        for entry in Path(f"/proc/{pid}/fd").iterdir():
            try:
                links.append(os.fspath(entry.readlink()))
            except OSError:  # closed meanwhile
                continue
        own = [link for link in links if link.startswith(("/memfd:memshr", "/dev/userfaultfd", "anon_inode:[userf"))]
        maps = Path(f"/proc/{pid}/maps").read_text().splitlines()
        own += [line for line in maps if "/memfd:memshr" in line]
        return cls(len(list(Path(f"/proc/{pid}/task").iterdir())), len(links), tuple(own))


class Victim:
    """A guest of ``USER`` whose memory the test knows.

    It has the common pages; twins, which only it has, each twice; and hot pages, whose contents change between that of
    common pages and others.
    """

    def __init__(self, name: str, qemu: Path, secret: int) -> None:
        self.guest = QtestGuest(name, qemu, user=USER)
        self.twins = np.random.default_rng(secret).bytes(TWIN_PAGES * PAGE_BYTES)
        self._lock = threading.Lock()
        self._expected = common_pages() + 2 * self.twins + common_pages()[: HOT_PAGES * PAGE_BYTES]

    def boot(self) -> Self:
        """Start it, let its firmware run into its end, and write its memory."""
        self.guest.boot()
        self.guest.resume()  # it finds nothing to boot; a paused QEMU would not show that a descriptor was closed
        self.rewrite()
        self._before = _Traces.of(self.guest.pid)
        return self

    @property
    def source(self) -> str:
        """How it is named to memshr."""
        return f"qemu:{self.guest.pid}"

    def rewrite(self) -> None:
        """Write all its pages anew."""
        with self._lock:
            self.guest.write(_START, self._expected)

    def check(self) -> None:
        """It runs, and every page holds what it wrote last."""
        assert self.guest.alive, f"victim {self.guest.name} is dead: {self.guest.stderr}"
        with self._lock:
            found = self.guest.read(_START, PAGES * PAGE_BYTES)
        wrong = [
            page
            for page in range(PAGES)
            if found[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
            != self._expected[page * PAGE_BYTES : (page + 1) * PAGE_BYTES]
        ]
        assert not wrong, f"victim {self.guest.name} reads other contents than it wrote in pages {wrong}"

    def write_hot_page(self, page: int, round_: int) -> None:
        """Give one hot page contents of its own, read them, and give it back the common ones."""
        place = _HOT_START + page * PAGE_BYTES
        own = np.random.default_rng((round_, page)).bytes(PAGE_BYTES)
        common = self._expected[(COMMON_PAGES + 2 * TWIN_PAGES + page) * PAGE_BYTES :][:PAGE_BYTES]
        with self._lock:
            for content in (own, common):
                self.guest.write(place, content)
                if self.guest.read(place, PAGE_BYTES) != content:
                    raise AssertionError(f"victim {self.guest.name}: hot page {page} is not what was just written")

    @property
    def traces(self) -> tuple[str, ...]:
        """What is left of memshr in it."""
        return _Traces.of(self.guest.pid).memshr

    def wait_clean(self) -> None:
        """Nothing of memshr is left in it: no mapping, no descriptor, no thread.

        :raises GuestFailedError: something is.
        """

        def clean() -> bool:
            now = _Traces.of(self.guest.pid)
            return (
                not now.memshr and now.threads <= self._before.threads and now.descriptors <= self._before.descriptors
            )

        try:
            self.guest.wait(clean, CLEAN_DEADLINE_S, "nothing of memshr is left in it")
        except GuestFailedError as error:
            raise GuestFailedError(f"{error}: {self._before} before, {_Traces.of(self.guest.pid)} now") from error


class Victims:
    """A pair, of which the second has its hot pages rewritten and checked by a thread all the time."""

    def __init__(self, qemu: Path) -> None:
        self._ending = ExitStack()
        self._end = threading.Event()
        self._rounds = 0
        self._failure: BaseException | None = None
        self.pair: tuple[Victim, Victim]
        try:
            calm, busy = (Victim(name, qemu, secret) for secret, name in enumerate(("calm", "busy"), start=100))
            for victim in (calm, busy):
                self._ending.callback(victim.guest.kill)
                victim.boot()
            self.pair = calm, busy
        except BaseException:
            self._ending.close()
            raise
        self._writer = threading.Thread(target=self._write)
        self._writer.start()

    def _write(self) -> None:
        try:
            while not self._end.is_set():
                self.pair[1].write_hot_page(self._rounds % HOT_PAGES, self._rounds)
                self._rounds += 1
                self._end.wait(0.002)
        except (AssertionError, GuestFailedError, OSError) as error:
            self._failure = error

    @property
    def sources(self) -> list[str]:
        """How they are named to memshr."""
        return [victim.source for victim in self.pair]

    def check(self) -> None:
        """Both run, read what they wrote, and the busy one goes on writing.

        :raises AssertionError: one does not.
        """
        begin = self._rounds
        wait_until(lambda: self._rounds > begin + 1 or self._failure is not None, 30.0, "the busy victim writes")
        assert self._failure is None, f"the busy victim: {self._failure}"
        for victim in self.pair:
            victim.check()

    @property
    def fit(self) -> bool:
        """Whether they are alive, right, and free of memshr, so that another test may have them."""
        try:
            self.check()
        except (AssertionError, GuestFailedError, OSError):
            return False
        return not any(victim.traces for victim in self.pair)

    def close(self) -> None:
        """End them."""
        self._end.set()
        self._ending.close()
        self._writer.join()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


@contextmanager
def kept_victims(qemu: Path) -> Iterator[list[Victims]]:
    """A place for one pair that several tests use one after the other, ended for sure."""
    place: list[Victims] = []
    try:
        yield place
    finally:
        for victims in place:
            victims.close()
