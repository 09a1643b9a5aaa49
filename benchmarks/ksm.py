"""memshr beside KSM: how soon, and at what cost, each gives memory back on freshly booted guests.

Each measurement has guests of its own, booted and loaded alike, in one of three states: ``paused`` through QMP,
``idle`` (running, with nothing to do), or ``busy`` (rewriting and checking their memory, and timing their own writes).
What could be shared is counted exactly beforehand, by a path that neither KSM nor memshr has a part in.

KSM is measured with all brakes off and at its defaults; its settings are put back afterwards, whatever happens. memshr
is measured as ``memshr share qemu:... --group all`` works: a session, then folding back and giving up unread frames.
Needs root; nothing else on the host may use KSM meanwhile.
"""

import argparse
import json
import multiprocessing
import os
import re
import resource
import secrets
import signal
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

from guests.kit import LinuxKit, MissingPartError, linux_kit, need_root
from guests.linux import LinuxGuest
from guests.machine import GuestFailedError
from guests.pages import Census, backed_pages, count_pages, mergeable_ranges, used_frames
from memshr.content.fingerprint import SEED_BITS
from memshr.qemu.guests import inspect_process
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.sharing.session import share
from memshr.trust import trust_groups
from memshr.types import PAGE_SIZE

KSM = Path("/sys/kernel/mm/ksm")
SETTINGS = ("pages_to_scan", "sleep_millisecs", "use_zero_pages", "max_page_sharing", "merge_across_nodes")
FULL_THROTTLE = {"pages_to_scan": 100_000, "sleep_millisecs": 0, "use_zero_pages": 1}
DEFAULTS = {"pages_to_scan": 100, "sleep_millisecs": 20, "use_zero_pages": 0}

STOP, RUN, UNMERGE = 0, 1, 2
"""what can be written to ``run``"""

GOAL = 0.95
POLL_S = 0.01
WATCH_S = 0.05
"""between two counts of frames; one takes some 30 ms of a processor that what is measured may want, too"""
PRECISION = 0.01
"""of times that are long: looking more often would cost processor time and find nothing new"""

REST_S = 1.0
SETTLED_SCANS = 3
"""KSM has done what it will do when its count has not grown in so many full scans"""

FILES = 48
CHECKER_PAGES = 16384

DEADLINE_S = {"paused": 300.0, "idle": 300.0, "busy": 60.0}
"""what KSM may take; it never settles while guests rewrite their memory"""

State = Literal["paused", "idle", "busy"]


@dataclass(frozen=True, slots=True)
class Result:
    """One mechanism on one set of guests.

    ``given_back_pages`` is how many frames fewer the guests have afterwards, counted in /proc/PID/pagemap (for memshr
    by up to its number of shared frames too many: one that no guest has read since it was mapped does not show there);
    ``to_goal_s`` when that reached GOAL of what is sharable, None if not at all; ``seconds`` until it had done.
    ``cpu_s`` is all processor time: its own, the kernel's for it, and that of the agent threads in QEMU (of paused
    guests: all that QEMU used); for memshr until it had done, its audit included, for KSM until it had merged the last
    page that it did merge. ``resting_cpu`` is what it goes on using, as a share of one processor;
    ``again_cpu_s`` what a second run with nothing changed costs (paused guests, memshr only: KSM never stops looking).
    Write times are the guests' own measurement, the worst of all guests.
    """

    mechanism: str
    state: State
    sharable: Census
    given_back_pages: int
    to_goal_s: float | None
    seconds: float
    cpu_s: float
    resting_cpu: float
    again_cpu_s: float | None
    memory_gained_mib: float
    write_p99_ns: int | None
    write_longest_ns: int | None


# -- the guests -------------------------------------------------------------------------------------------------------


@contextmanager
def fresh_guests(kit: LinuxKit, count: int, state: State) -> Iterator[list[LinuxGuest]]:
    """Freshly booted guests whose memory has been filled alike, in ``state``.

    :raises GuestFailedError: at the end, if a guest has found a page of its own that is wrong.
    """
    with ExitStack() as ending:
        guests = [ending.enter_context(LinuxGuest(f"bench-{number}", kit).boot()) for number in range(1, count + 1)]
        for seed, guest in enumerate(guests, start=1):
            guest.wait_ready()
            guest.start_files(FILES)
            guest.start_checker(CHECKER_PAGES, seed=seed)
        for guest in guests:
            guest.wait_rounds(1, ("files", "checker"))
        if state != "busy":
            for guest in guests:
                guest.run("killall -STOP files checker")
        if state == "paused":
            for guest in guests:
                guest.pause()
        yield guests
        if state == "paused":
            for guest in guests:
                guest.resume()
        if state != "busy":
            for guest in guests:
                guest.run("killall -CONT files checker")
        for guest in guests:
            guest.wait_rounds(1, ("files", "checker"))
            if wrong := guest.mismatches():
                raise GuestFailedError(f"guest {guest.name}: {wrong[0]}")


def count_sharable(guests: Sequence[LinuxGuest]) -> Census:
    """What an exact count says of all guests together; they are paused meanwhile, if they run."""
    running = [guest for guest in guests if guest.execute("query-status")["running"]]
    for guest in running:
        guest.pause()
    counted = count_pages([backed_pages(guest.pid) for guest in guests])
    for guest in running:
        guest.resume()
    return counted


# -- what is measured -------------------------------------------------------------------------------------------------


def thread_cpu_s(pid: int) -> float:
    """Processor time of a single thread, to the nanosecond."""
    return int(Path(f"/proc/{pid}/schedstat").read_text().split()[0]) / 1e9


def process_cpu_s(pid: int) -> float:
    """Processor time of all threads of a process, ended ones too, to the clock tick."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def own_cpu_s() -> float:
    """Processor time of this process and of its children that have ended."""
    spent = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in spent)


def available_mib() -> float:
    """MemAvailable of the host, and the free pages that it leaves out: those on the lists of each processor.

    What has just been freed lies on them (``mm/page_alloc.c``, per_cpu_pages), some tens of MiB.
    """
    lines = Path("/proc/meminfo").read_text().splitlines()
    available_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    on_lists = re.findall(r"^ +count: +(\d+)$", Path("/proc/zoneinfo").read_text(), re.MULTILINE)
    return (available_kib + sum(map(int, on_lists)) * PAGE_SIZE // 1024) / 1024


class FrameWatch:
    """Samples, in a process of its own, how many frames the guests have; from ``with`` on."""

    def __init__(self, guests: Sequence[LinuxGuest]) -> None:
        ranges = {guest.pid: mergeable_ranges(guest.pid) for guest in guests}
        context = multiprocessing.get_context("spawn")
        self._samples: list[tuple[float, int]] = []
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_watch_frames, args=(ranges, theirs), daemon=True)

    def __enter__(self) -> Self:
        self._process.start()
        self._connection.recv()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._connection.send("stop")
        self._samples = self._connection.recv()
        self._process.join()

    def given_back_pages(self) -> int:
        """By how much the number of frames fell in all."""
        return self._samples[0][1] - self._samples[-1][1]

    def when_given_back(self, pages: float) -> float | None:
        """The time (of time.monotonic) of the first sample with at least so many frames fewer; None: never."""
        frames = self._samples[0][1]
        return next((when for when, sample in self._samples if frames - sample >= pages), None)


def _watch_frames(ranges: Mapping[int, Sequence[tuple[int, int]]], connection: Connection) -> None:
    begin = time.monotonic()
    samples = [(begin, used_frames(ranges))]
    connection.send("ready")
    while not connection.poll(max(WATCH_S, PRECISION * (time.monotonic() - begin))):
        samples.append((time.monotonic(), used_frames(ranges)))
    samples.append((time.monotonic(), used_frames(ranges)))
    connection.send(samples)


def _measure(
    mechanism: str,
    state: State,
    guests: Sequence[LinuxGuest],
    run: Callable[[], float | None],
    cpu_s: Callable[[], float],
    *,
    again: bool = False,
) -> Result:
    sharable = count_sharable(guests)
    if state == "busy":
        for guest in guests:
            guest.forget_times()
        for guest in guests:
            guest.wait_rounds(1)
    with FrameWatch(guests) as watch:
        available_before, cpu_before, begin = available_mib(), cpu_s(), time.monotonic()
        cpu_at_last = run()
        end, cpu_after, available_after = time.monotonic(), cpu_at_last or cpu_s(), available_mib()
        timed = [guest.checker() for guest in guests] if state == "busy" else []
    rest_begin, rest_cpu = time.monotonic(), cpu_s()
    time.sleep(REST_S)
    resting_cpu = (cpu_s() - rest_cpu) / (time.monotonic() - rest_begin)
    again_begin = cpu_s()
    if again:
        run()
    again_cpu_s = cpu_s() - again_begin
    reached_at = watch.when_given_back(GOAL * sharable.saved_pages)
    return Result(
        mechanism=mechanism,
        state=state,
        sharable=sharable,
        given_back_pages=watch.given_back_pages(),
        to_goal_s=None if reached_at is None else reached_at - begin,
        seconds=end - begin,
        cpu_s=cpu_after - cpu_before,
        resting_cpu=resting_cpu,
        again_cpu_s=again_cpu_s if again else None,
        memory_gained_mib=available_after - available_before,
        write_p99_ns=max((status.p99_ns for status in timed), default=None),
        write_longest_ns=max((status.longest_ns for status in timed), default=None),
    )


def agent_cpu_s(pid: int) -> float:
    """Processor time of the thread that memshr has put into a QEMU; 0 if there is none.

    It is the only thread that has every signal blocked: those of QEMU let through what the C library needs.
    """
    spent = 0.0
    for status in Path(f"/proc/{pid}/task").glob("*/status"):
        try:
            if "\nSigBlk:\tffffffff" in status.read_text():
                spent += thread_cpu_s(int(status.parent.name))
        except OSError:  # it ended while we looked
            continue
    return spent


def measure_memshr(state: State, guests: Sequence[LinuxGuest]) -> Result:
    """Measure one run of memshr over the guests as one trust group; of paused guests a second run, too."""

    def cpu_s() -> float:
        of_qemu = process_cpu_s if state == "paused" else agent_cpu_s
        return own_cpu_s() + sum(of_qemu(guest.pid) for guest in guests)

    return _measure("memshr", state, guests, lambda: share_all(guests), cpu_s, again=state == "paused")


def share_all(guests: Sequence[LinuxGuest]) -> None:
    """What ``memshr share`` does.

    :raises GuestFailedError: the audit at the end of the session found something.
    """
    processes = [process for guest in guests if (process := inspect_process(guest.pid)) is not None]
    with QemuHypervisor(processes, groups={"all": range(1, len(processes) + 1)}) as hypervisor:
        groups = trust_groups(hypervisor.names(), ["all"], lambda: secrets.randbits(SEED_BITS))
        report = share(hypervisor, groups, wait=time.sleep)
        hypervisor.fold_back(seen=report.counters)
    if report.audit_findings:
        raise GuestFailedError(f"audit: {report.audit_findings[0]}")


# -- KSM --------------------------------------------------------------------------------------------------------------


def ksm_value(name: str) -> int:
    """One of KSM's settings or counters."""
    return int((KSM / name).read_text())


def _set_ksm(values: Mapping[str, int]) -> None:
    for name, value in values.items():
        (KSM / name).write_text(f"{value}\n")


@contextmanager
def ksm_settings(values: Mapping[str, int]) -> Iterator[None]:
    """KSM stopped, with these settings. At the end all its pages are unmerged and every setting is as it was.

    :raises RuntimeError: KSM is in use on this host.
    """
    before = {name: ksm_value(name) for name in (*SETTINGS, "run")}
    if before["run"] == RUN or ksm_value("pages_sharing"):
        raise RuntimeError("KSM is in use on this host: stop it first (echo 2 > /sys/kernel/mm/ksm/run)")
    try:
        _set_ksm({"run": STOP, **values})
        yield
    finally:
        _set_ksm({"run": UNMERGE})
        _set_ksm(before)


def ksm_thread() -> int:
    """The pid of the kernel's ksmd."""
    for comm in Path("/proc").glob("[0-9]*/comm"):
        try:
            if comm.read_text() == "ksmd\n":
                return int(comm.parent.name)
        except OSError:  # it ended while we looked
            continue
    raise RuntimeError("this kernel has no ksmd (CONFIG_KSM)")


def measure_ksm(state: State, guests: Sequence[LinuxGuest], values: Mapping[str, int], deadline_s: float) -> Result:
    """Let KSM run with these settings until it has settled, or for ``deadline_s``."""
    ksmd = ksm_thread()

    def run() -> float:
        most, at_scan, cpu_s = 0, 0, 0.0
        deadline = time.monotonic() + deadline_s
        _set_ksm({"run": RUN})
        while time.monotonic() < deadline and not (most and ksm_value("full_scans") >= at_scan + SETTLED_SCANS):
            time.sleep(POLL_S)
            if (sharing := ksm_value("pages_sharing") + ksm_value("ksm_zero_pages")) > most:
                most, at_scan, cpu_s = sharing, ksm_value("full_scans"), thread_cpu_s(ksmd)
        return cpu_s

    name = "KSM" if values["pages_to_scan"] == FULL_THROTTLE["pages_to_scan"] else "KSM at defaults"
    with ksm_settings(values):
        return _measure(name, state, guests, run, lambda: thread_cpu_s(ksmd))


# -- the command ------------------------------------------------------------------------------------------------------


def table(results: Sequence[Result]) -> str:
    """The results as lines of text."""
    heads: tuple[str, ...] = ("mechanism", "guests", "sharable", "given back", "to 95%", "in all", "CPU", "at rest")
    heads += ("second run", "MemAvailable", "write p99", "longest")
    rows = [heads, *(_cells(result) for result in results)]
    widths = [max(len(row[column]) for row in rows) for column in range(len(heads))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def _cells(result: Result) -> tuple[str, ...]:
    return (
        result.mechanism,
        result.state,
        str(result.sharable.saved_pages),
        str(result.given_back_pages),
        f"> {result.seconds:.2f} s" if result.to_goal_s is None else f"{result.to_goal_s:.2f} s",
        f"{result.seconds:.2f} s",
        f"{result.cpu_s:.2f} s",
        f"{result.resting_cpu:.0%}",
        "" if result.again_cpu_s is None else f"{result.again_cpu_s:.2f} s",
        f"{result.memory_gained_mib:+.0f} MiB",
        "" if result.write_p99_ns is None else f"{result.write_p99_ns / 1e6:.3f} ms",
        "" if result.write_longest_ns is None else f"{result.write_longest_ns / 1e6:.3f} ms",
    )


@dataclass(frozen=True, slots=True)
class Target:
    """What memshr is to reach beside KSM, and what it reached; ``value`` None: it could not be measured."""

    text: str
    value: float | None
    limit: float
    at_least: bool = False

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        if self.value is None:
            return False
        return self.value >= self.limit if self.at_least else self.value <= self.limit

    def __str__(self) -> str:
        value = "no figure" if self.value is None else f"{self.value:.2f}"
        sign = "at least" if self.at_least else "at most"
        return f"{'met    ' if self.met else 'NOT met'}  {self.text}: {value} ({sign} {self.limit:g})"


def targets(results: Sequence[Result]) -> list[Target]:
    """memshr beside KSM at full throttle, for each state in which both were measured."""
    found = []
    for ours in results:
        theirs = next((each for each in results if each.mechanism == "KSM" and each.state == ours.state), None)
        if ours.mechanism != "memshr" or theirs is None:
            continue
        state = f"{ours.state} guests"
        if ours.state != "busy":
            # If KSM does not get there at all, the time that it was given is the most that can be said for it.
            soon = None if ours.to_goal_s is None else ours.to_goal_s / (theirs.to_goal_s or theirs.seconds)
            # On a host where others allocate meanwhile KSM's gain may come out as none: then there is no ratio.
            gained = ours.memory_gained_mib / theirs.memory_gained_mib if theirs.memory_gained_mib > 0 else None
            found.append(Target(f"{state}, time to 95% as a part of KSM's", soon, 1 / 3))
            found.append(Target(f"{state}, CPU as a part of KSM's", ours.cpu_s / theirs.cpu_s, 1 / 3))
            found.append(Target(f"{state}, MemAvailable gained, by KSM's", gained, 1.3, at_least=True))
        if ours.again_cpu_s is not None:
            found.append(Target(f"{state}, CPU of a second run by the first's", ours.again_cpu_s / ours.cpu_s, 0.2))
        if ours.write_p99_ns is not None and ours.write_longest_ns is not None:
            found.append(Target(f"{state}, p99 of a guest's write, ms", ours.write_p99_ns / 1e6, 2))
            found.append(Target(f"{state}, longest of a guest's write, ms", ours.write_longest_ns / 1e6, 50))
    return found


def compare(kit: LinuxKit, count: int, states: Sequence[State], *, defaults: bool) -> list[Result]:
    """KSM and memshr in turn, each on guests of its own."""
    results = []
    for state in states:
        with fresh_guests(kit, count, state) as guests:
            results.append(measure_ksm(state, guests, FULL_THROTTLE, deadline_s=DEADLINE_S[state]))
        with fresh_guests(kit, count, state) as guests:
            results.append(measure_memshr(state, guests))
        if defaults:
            with fresh_guests(kit, count, state) as guests:
                results.append(measure_ksm(state, guests, DEFAULTS, deadline_s=DEADLINE_S[state]))
    return results


def bench() -> None:
    """The table and the targets, or one line that says what is missing on this machine."""
    try:
        need_root("the frame numbers and KSM's settings that are measured")
        kit = linux_kit()
        ksm_thread()
    except MissingPartError as missing:
        print(f"left out: {missing}")
        return
    except RuntimeError as error:
        print(f"left out: {error}")
        return
    results = compare(kit, 3, ("paused", "idle", "busy"), defaults=False)
    print(f"load of the host: {os.getloadavg()[0]:.1f} on {os.cpu_count()} processors")
    print(table(results))
    print("\n".join(map(str, targets(results))))


def main() -> None:
    """Measure and print the table, or single results as JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--guests", type=int, default=3, help="how many guests of 256 MiB (default: %(default)s)")
    parser.add_argument("--states", nargs="+", choices=("paused", "idle", "busy"), default=["paused", "idle", "busy"])
    parser.add_argument("--defaults", action="store_true", help="also KSM at its defaults (some minutes)")
    parser.add_argument("--json", action="store_true", help="print one JSON object a line instead of a table")
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(128 + signal.SIGTERM))  # so that KSM is put back
    results = compare(linux_kit(), options.guests, options.states, defaults=options.defaults)
    if options.json:
        print("\n".join(json.dumps(asdict(result)) for result in results))
    else:
        print(table(results))
        print("\n".join(map(str, targets(results))))


if __name__ == "__main__":
    main()
