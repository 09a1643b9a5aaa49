"""What ``memshr estimate`` costs on image files: beside numpy.sum over the same files, in memory, and from a sample.

The files lie in TMPDIR. MEMSHR_BENCH_GIB says how many GiB they are (the issue that this answers asks for 16); without
it the size is what half of the free disk and half of the available memory can hold, at most 16, so that all of them
stay in the page cache.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path

import numpy as np

from measure import best_times_s, print_table
from memshr import estimate
from memshr.types import PAGE_SIZE

IMAGES = 4
ROUNDS = 5
CHUNK_PAGES = 256
MIB = 2**20
GIB = 2**30

KINDS = {
    "nothing equal": "u",
    "guests: 40% zeros, 30% in common": "zzzzcccuuu",
    "guests, zeros as holes": "hhhhcccuuu",
    "all files equal": "c",
}
"""What each MiB of an image is, again and again: zeros, a hole, contents in common with the others, or unique ones."""


def speed_and_memory() -> None:
    """Time and memory of an estimate, beside numpy.sum with as many threads."""
    gib = _size_gib()
    threads = len(os.sched_getaffinity(0))
    rows = []
    for kind, pattern in KINDS.items():
        with _images(pattern, gib) as paths:
            read_s, mapped_s, estimate_s = best_times_s(
                lambda paths=paths: _sum(paths, threads, _sum_of_reads),  # type: ignore[misc]  # a default that binds the value
                lambda paths=paths: _sum(paths, threads, _sum_of_mapping),  # type: ignore[misc]  # a default that binds the value
                lambda paths=paths: estimate(paths, groups=["all"]),  # type: ignore[misc]  # a default that binds the value
                rounds=ROUNDS,
            )
            peak_bytes, pages = _peak(paths)
        rows.append(
            [
                kind,
                f"{gib / estimate_s:.2f}",
                f"{read_s / estimate_s:.2f}",
                f"{mapped_s / estimate_s:.2f}",
                f"{peak_bytes / MIB:.0f}",
                f"{max(0, peak_bytes - 256 * MIB) / pages:.1f}",
            ]
        )
    head = ["images", "GiB/s", "of sum, read", "of sum, mapped", "peak MiB", "bytes a page over 256 MiB"]
    print_table(f"estimate: {gib:g} GiB in {IMAGES} files in the page cache, {threads} threads", head, rows)


def sample() -> None:
    """A sample of 1/64 beside everything, both from the disk."""
    gib = _size_gib()
    rows = []
    for kind in ("nothing equal", "guests: 40% zeros, 30% in common"):
        with _images(KINDS[kind], gib) as paths:
            everything_s = sample_s = float("inf")
            for _ in range(3):
                _forget(paths)
                everything_s = min(everything_s, *best_times_s(lambda paths=paths: estimate(paths), rounds=1))  # type: ignore[misc]  # a default that binds the value
                _forget(paths)
                sample_s = min(
                    sample_s,
                    *best_times_s(lambda paths=paths: estimate(paths, sample="1/64", seed=1), rounds=1),  # type: ignore[misc]  # a default that binds the value
                )
        rows.append([kind, f"{everything_s:.2f}", f"{sample_s:.2f}", f"{everything_s / sample_s:.1f}"])
    head = ["images", "all s", "1/64 s", "times faster"]
    print_table(f"estimate --sample 1/64: {gib:g} GiB in {IMAGES} files, none of it in the page cache", head, rows)


def _size_gib() -> float:
    if asked := os.environ.get("MEMSHR_BENCH_GIB"):
        return float(asked)
    free = shutil.disk_usage(tempfile.gettempdir()).free
    available = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(1.0, min(16.0, free // 2 // GIB, available // 2 // GIB))


@contextmanager
def _images(pattern: str, gib: float) -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory(prefix="memshr-bench-") as folder:
        paths = [Path(folder) / f"{number}.raw" for number in range(IMAGES)]
        chunks = int(gib * GIB / IMAGES / PAGE_SIZE / CHUNK_PAGES)
        for number, path in enumerate(paths):
            own, common = np.random.default_rng(number + 1), np.random.default_rng(0)
            with path.open("wb") as file:
                for chunk in range(chunks):
                    match pattern[chunk % len(pattern)]:
                        case "h":
                            file.seek(CHUNK_PAGES * PAGE_SIZE, os.SEEK_CUR)
                        case "z":
                            file.write(bytes(CHUNK_PAGES * PAGE_SIZE))
                        case "c":
                            file.write(common.bytes(CHUNK_PAGES * PAGE_SIZE))
                        case _:
                            file.write(own.bytes(CHUNK_PAGES * PAGE_SIZE))
                file.truncate(chunks * CHUNK_PAGES * PAGE_SIZE)
                os.fsync(file.fileno())
        yield paths


def _forget(paths: list[Path]) -> None:
    # Drop the files from the page cache; they have been written to the disk.
    for path in paths:
        with path.open("rb") as file:
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _sum(paths: list[Path], threads: int, sum_of: Callable[[Path], int]) -> None:
    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(sum_of, paths))


def _sum_of_reads(path: Path) -> int:
    buffer = np.empty(MIB // 8, np.uint64)
    total = 0
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer.data):
            total += int(buffer[: size // 8].sum())
    return total


def _sum_of_mapping(path: Path) -> int:
    return int(np.memmap(path, np.uint64, "r").sum())


_PEAK = """
import json, re, sys
from pathlib import Path
from memshr import estimate
pages = estimate(sys.argv[1:], groups=["all"]).total_pages
peak_kib = re.search(r"VmHWM:\\s*(\\d+) kB", Path("/proc/self/status").read_text())[1]
print(json.dumps([int(peak_kib) * 1024, pages]))
"""
# Not ru_maxrss, which a process takes over from the one that started it.


def _peak(paths: list[Path]) -> tuple[int, int]:
    # In a process of its own, which has nothing else to remember.
    command = [sys.executable, "-c", _PEAK, *map(str, paths)]
    peak_bytes, pages = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return peak_bytes, pages


BENCHES = (speed_and_memory, sample)
