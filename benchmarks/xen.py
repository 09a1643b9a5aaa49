"""What the Xen mechanism costs besides Xen: against a library of the same functions that do nothing.

The library is compiled by gcc when the benchmark runs. It has every function of ``memshr.xen.libxc``, so what is
measured is the whole way from a call of the seam to C and back; what a hypercall takes comes on top, for C and Python
alike. Its foreign mappings are mappings of a memory file with the page tables filled: what Linux has to do for real
ones, without Xen's part.
"""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np

from memshr.types import PAGE_SIZE, DomId, Gfn, Handle, PageArray, PageBytes
from memshr.xen import XenHypervisor, connect
from memshr.xen.libxc import PROTOTYPES, Libxc, Release
from memshr.xen.mappings import BATCH_PAGES
from memshr.xen.names import Names

CALLS = 200_000
SCAN_PAGES = 1 << 17
ROUNDS = 5

NOTHING = r"""
#define _GNU_SOURCE
#include <stdint.h>
#include <string.h>
#include <sys/mman.h>
static int memory = -1;
static char *mapped;
int xc_version(void *xch, int command, void *text) { if (text) *(char *)text = 0; return command ? 0 : 4 << 16 | 17; }
int xc_domain_getinfolist(void *xch, uint32_t first, unsigned count, char *infos) {
    memset(infos, 0, 112);
    *(uint16_t *)infos = first;
    *(uint32_t *)(infos + 4) = first ? 0x102 : 0;
    return 1;
}
int xc_memshr_nominate_gfn(void *xch, uint32_t domid, unsigned long gfn, uint64_t *handle) { *handle = gfn; return 0; }
int xc_memshr_debug_gfn(void *xch, uint32_t domid, unsigned long gfn) { return 1; }
void *xenforeignmemory_map(void *fmem, uint32_t domid, int prot, size_t pages, const uint64_t *gfns, int *errs) {
    if (mapped) return mapped + (gfns[0] << 12);
    return mmap(0, pages << 12, prot, MAP_SHARED | MAP_POPULATE, memory, gfns[0] << 12);
}
int xenforeignmemory_unmap(void *fmem, void *address, size_t pages) {
    return mapped ? 0 : munmap(address, pages << 12);
}
void *give_memory(unsigned long pages, int keep_mapped) {
    memory = memfd_create("guest", 0);
    char *all = ftruncate(memory, pages << 12) ? 0 : mmap(0, pages << 12, 3, MAP_SHARED, memory, 0);
    memset(all, 0x5a, pages << 12);
    mapped = keep_mapped ? all : 0;
    return all;
}
void nominate_from_c(unsigned long count) {
    uint64_t handle;
    int (*volatile nominate)(void *, uint32_t, unsigned long, uint64_t *) = xc_memshr_nominate_gfn;
    for (unsigned long gfn = 0; gfn < count; gfn++) nominate(0, 1, gfn, &handle);
}
void share_from_c(unsigned long count) {
    int (*volatile debug)(void *, uint32_t, unsigned long) = xc_memshr_debug_gfn;
    int (*volatile share)(void *, uint32_t, unsigned long, uint64_t, uint32_t, unsigned long, uint64_t) =
        (void *)xc_memshr_share_gfns;
    for (unsigned long gfn = 0; gfn < count; gfn++) { debug(0, 2, gfn); share(0, 1, gfn, 2, 2, gfn, 3); }
}
"""


def _library(directory: Path) -> tuple[Libxc, ctypes.CDLL]:
    written = {name for name in (prototype.name for prototype in PROTOTYPES) if f" {name}(" in NOTHING}
    written |= {name for name in (prototype.name for prototype in PROTOTYPES) if f"*{name}(" in NOTHING}
    empty = "\n".join(
        f"{'void *' if prototype.restype is ctypes.c_void_p else 'long '}{prototype.name}() "
        f"{{ return {'(void *)8' if prototype.restype is ctypes.c_void_p else '0'}; }}"
        for prototype in PROTOTYPES
        if prototype.name not in written
    )
    source, library = directory / "nothing.c", directory / "libnothing.so"
    source.write_text(f"#define _GNU_SOURCE\n#include <unistd.h>\n{empty}\n{NOTHING}")
    subprocess.run(["gcc", "-O2", "-w", "-shared", "-fPIC", "-o", library, source], check=True)
    nothing = ctypes.CDLL(str(library), use_errno=True)
    functions = {}
    for prototype in PROTOTYPES:
        function = nothing[prototype.name]
        function.restype, function.argtypes = prototype.restype, prototype.argtypes
        functions[prototype.name] = function
    return Libxc(functions, Release(4, 17), "libnothing.so"), nothing


def _best_s(*things: Callable[[], object]) -> list[float]:
    best = [float("inf")] * len(things)
    for _ in range(ROUNDS):
        for i, thing in enumerate(things):
            start = time.perf_counter()
            thing()
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def _open(directory: str) -> tuple[XenHypervisor, ctypes.CDLL]:
    functions, nothing = _library(Path(directory))
    connection = connect(lambda release: functions if release == functions.release else None)
    return XenHypervisor(connection, Names("")), nothing


def overhead() -> None:
    """Time of a call of the seam less the time of the same C calls from C, for functions that do nothing."""
    with tempfile.TemporaryDirectory() as directory:
        hypervisor, nothing = _open(directory)
        first, second = DomId(1), DomId(2)
        for domid in (first, second):
            hypervisor.control(domid, True)
        gfns = [Gfn(gfn) for gfn in range(CALLS)]
        one, two = (PageArray.of_domain(domid, np.arange(CALLS)) for domid in (first, second))
        handles = np.arange(CALLS, dtype=np.uint64) + 2, np.arange(CALLS, dtype=np.uint64) + 2 + CALLS

        def share_one_by_one() -> None:
            for gfn in gfns:
                hypervisor.share_gfns(first, gfn, Handle(gfn + 2), second, gfn, Handle(gfn + 2 + CALLS))

        times_s = _best_s(
            lambda: nothing.nominate_from_c(CALLS),
            lambda: nothing.share_from_c(CALLS),
            lambda: [hypervisor.nominate_gfn(first, gfn) for gfn in gfns],
            lambda: hypervisor.nominate_gfns(one),
            share_one_by_one,
            lambda: hypervisor.share_gfns_many(one, handles[0], two, handles[1]),
        )
        nominate_s, share_s, *ours = times_s
        print(f"{'call':<17} {'C calls':>8} {'in C':>9} {'in Python':>10} {'over C':>9} {'for each C call':>16}   (us)")
        for name, calls, c_s, took_s in zip(
            ("nominate_gfn", "nominate_gfns", "share_gfns", "share_gfns_many"),
            (1, 1, 2, 2),
            (nominate_s, nominate_s, share_s, share_s),
            ours,
            strict=True,
        ):
            over = (took_s - c_s) / CALLS * 1e6
            in_c, took = c_s / CALLS * 1e6, took_s / CALLS * 1e6
            print(f"{name:<17} {calls:>8} {in_c:>9.3f} {took:>10.3f} {over:>9.3f} {over / calls:>16.3f}")


def scan() -> None:
    """Reading a domain in short mappings, against copying from pages that are mapped already."""
    for what, keep_mapped in (("mapping takes nothing", True), ("Linux fills and empties the page tables", False)):
        with tempfile.TemporaryDirectory() as directory:
            hypervisor, nothing = _open(directory)
            nothing.give_memory.restype = ctypes.c_void_p
            address = nothing.give_memory(ctypes.c_ulong(SCAN_PAGES), int(keep_mapped))
            bytes_of_guest = (ctypes.c_uint8 * (SCAN_PAGES * PAGE_SIZE)).from_address(address)
            pages = np.ctypeslib.as_array(bytes_of_guest).reshape(SCAN_PAGES, PAGE_SIZE)
            buffer = np.ones((2 * BATCH_PAGES, PAGE_SIZE), np.uint8)

            def read(hypervisor: XenHypervisor = hypervisor, buffer: PageBytes = buffer) -> None:
                for first in range(0, SCAN_PAGES, len(buffer)):
                    hypervisor.read_range(DomId(1), Gfn(first), len(buffer), buffer)

            def copy(pages: PageBytes = pages, buffer: PageBytes = buffer) -> None:
                for first in range(0, SCAN_PAGES, len(buffer)):
                    np.copyto(buffer, pages[first : first + len(buffer)])

            read_s, copy_s = _best_s(read, copy)
            gib = SCAN_PAGES * PAGE_SIZE / 2**30
            print(
                f"{what + ':':<41} read_range {gib / read_s:5.2f} GiB/s, memcpy {gib / copy_s:5.2f} GiB/s:"
                f" {copy_s / read_s:4.0%}; {SCAN_PAGES // BATCH_PAGES} mappings for {SCAN_PAGES} pages"
            )


BENCHES = (overhead, scan)

if __name__ == "__main__":
    for bench in BENCHES:
        print(f"\n{bench.__doc__}")
        bench()
