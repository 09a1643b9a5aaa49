"""A memshr to be killed: shares, releases and unshares pages of some guests without end.

``python -m live.sharing_worker SEED FIRST_GFN PAGES PID...``; prints ``ready`` when it begins.
"""

import random
import sys

import numpy as np

from memshr.qemu.guests import inspect_process
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.types import PAGE_SIZE, DomId, Gfn, PageArray


def share_everything(
    hypervisor: QemuHypervisor, pages: PageArray, buffer: np.ndarray[tuple[int, int], np.dtype[np.uint8]]
) -> None:
    """What a policy does, in its simplest form: nominate, read, compare whole pages, share with the first equal one."""
    handles, statuses = hypervisor.nominate_gfns(pages)
    hypervisor.read_pages(pages, buffer)
    zero = ~buffer.any(axis=1) & (statuses == 0)
    hypervisor.release_zero_pages(pages[zero], handles[zero])
    rest = np.flatnonzero(~zero & (statuses == 0))
    contents = np.ascontiguousarray(buffer[rest]).view(f"V{PAGE_SIZE}").ravel()
    _, first, inverse = np.unique([bytes(content) for content in contents], return_index=True, return_inverse=True)
    sources, clients = rest[first[inverse]], rest
    some = sources != clients
    sources, clients = sources[some], clients[some]
    hypervisor.share_gfns_many(pages[sources], handles[sources], pages[clients], handles[clients])


def main() -> None:
    """Work until killed."""
    seed, first, count, *pids = map(int, sys.argv[1:])
    chance = random.Random(seed)
    processes = [process for pid in pids if (process := inspect_process(pid)) is not None]
    with QemuHypervisor(processes, groups={"all": range(1, len(processes) + 1)}) as hypervisor:
        domids = [DomId(number + 1) for number in range(len(processes))]
        gfns = np.arange(first, first + count)
        pages = PageArray(np.repeat(np.array(domids, np.uint16), count), np.tile(gfns, len(domids)))
        buffer = np.empty((len(pages), PAGE_SIZE), np.uint8)
        print("ready", flush=True)
        while True:
            some = pages[np.flatnonzero(np.random.default_rng(chance.getrandbits(32)).random(len(pages)) < 0.8)]
            share_everything(hypervisor, some, buffer[: len(some)])
            match chance.randrange(5):
                case 0:
                    hypervisor.fold_back()
                case 1:
                    hypervisor.unshare_gfns(pages[np.arange(0, len(pages), 3)])
                case 2:
                    hypervisor.unshare_guest(chance.choice(domids))
                case 3:
                    hypervisor.detach(chance.choice(domids))
                case _:
                    hypervisor.unshare_gfn(domids[0], Gfn(first))


if __name__ == "__main__":
    main()
