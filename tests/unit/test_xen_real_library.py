"""What the real libxenctrl makes of our calls, seen at the device that its hypercalls go to.

tests/xen_privcmd.c is preloaded in the place of Linux's /dev/xen/privcmd. So the whole way is the real one but for the
hypervisor: our ctypes prototypes, the library's marshalling, its bounce buffers, its errno, and our reading of what
comes back.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from memshr.xen import runs_xen
from memshr.xen.libxc import Release
from xen_headers import INCLUDE, release_of_headers

TESTS = Path(__file__).parents[1]
DEVICE = TESTS / "xen_privcmd.c"


@pytest.fixture(scope="module")
def release() -> Release:
    """The release whose headers and library are both here."""
    if runs_xen():
        pytest.skip("this machine has a Xen of its own")
    return release_of_headers()


@pytest.fixture
def on_the_device(tmp_path: Path, release: Release) -> "OnTheDevice":
    return OnTheDevice(tmp_path, release)


class OnTheDevice:
    """Runs Python with the real library and the device that writes everything down."""

    def __init__(self, directory: Path, release: Release) -> None:
        self.release = release
        self._log = directory / "hypercalls"
        self._device = directory / "privcmd.so"
        command = ["gcc", "-Wall", "-Werror", "-shared", "-fPIC", "-I", str(INCLUDE)]
        command += ["-o", str(self._device), str(DEVICE)]
        command += [f"-DXEN_MAJOR={release.major}", f"-DXEN_MINOR={release.minor}"]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    def run(self, script: str) -> tuple[list[str], list[str]]:
        """What the script printed, and the hypercalls that it made."""
        head = (
            "from memshr.xen import open_host, connect\nimport numpy as np\nfrom memshr.types import *\n"
            "from memshr.errors import *\nhost = open_host()\n"
        )
        environment = os.environ | {
            "LD_PRELOAD": str(self._device),
            "PRIVCMD_LOG": str(self._log),
            "PYTHONPATH": os.fspath(TESTS),
        }
        command = [sys.executable, "-W", "error", "-c", head + script]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
        calls = self._log.read_text().splitlines() if self._log.exists() else []
        self._log.unlink(missing_ok=True)
        return done.stdout.splitlines(), calls


def test_the_host_is_opened_and_described(on_the_device: OnTheDevice) -> None:
    said, _ = on_the_device.run(
        "print(host.facts.version, host.facts.library, host.facts.capabilities, host.facts.sharing)\n"
        "for info in host.domains():\n"
        "    print(info.domid, info.kind, info.tot_pages, info.shr_pages, info.max_pages, info.pause_count)\n"
        "print(host.counters())\n"
        "print(host.maximum_gfn(1))\n"
    )
    release = on_the_device.release
    assert said == [
        f"{release}.99 libxenctrl.so.{release} hvm-3.0-x86_64 True",
        "1 hvm 15 1 65 1",
        "2 hvm 15 1 66 1",
        "3 hvm 0 0 67 1",
        "Counters(freed_pages=1, used_frames=1)",
        "19",
    ]


def test_pages_are_read_through_the_real_foreign_memory_library(on_the_device: OnTheDevice) -> None:
    said, calls = on_the_device.run(
        "print(host.populated_ranges(1).tolist())\n"
        "buffer = np.zeros((8, PAGE_SIZE), np.uint8)\n"
        "print(host.read_range(1, 2, 5, buffer)[:, 0].tolist())\n"
        "pages = PageArray(np.array([2, 1, 2, 9], np.uint16), np.array([14, 3, 40, 1]))\n"
        "print(host.read_pages(pages, buffer).tolist(), buffer[:2, 0].tolist())\n"
        "host.unshare_gfn(2, 5)\n"
        "try: host.read_range(1, 14, 4, buffer)\n"
        "except NotSharableError as error: print(error)\n"
    )
    assert said == [
        "[[0, 16]]",
        "[2, 3, 4, 5, 6]",
        "[0, 0, -22, -3] [14, 3]",
        "read_range: gfn 16 of domain 1 is not populated with plain RAM",
    ]
    assert calls == [
        "map dom=1 pages=20 first=0",
        "map dom=1 pages=5 first=0x2",
        "map dom=1 pages=1 first=0x3",
        "map dom=2 pages=2 first=0xe",
        "map dom=2 pages=1 first=0x5",
        "map dom=1 pages=4 first=0xe",
    ]


def test_every_sharing_call_reaches_the_hypervisor_with_its_arguments_in_place(on_the_device: OnTheDevice) -> None:
    # XENMEM_FORK_RESET_STATE and _MEMORY came with 4.17
    resets = {(True, False): "0x4", (False, True): "0x8", (True, True): "0xc"}
    resets = resets if on_the_device.release >= Release(4, 17) else {(True, True): "0"}
    said, calls = on_the_device.run(
        f"resets = {list(resets)}\n"
        "host.control(1, True)\n"
        "host.control(2, True)\n"
        "print(host.nominate_gfn(1, 0x33), host.nominate_gref(2, 8))\n"
        "host.share_gfns(1, 0x10, 2, 2, 0x20, 3)\n"
        "for handles in ((1, 3), (2, 1)):\n"
        "    try: host.share_gfns(1, 0x10, handles[0], 2, 0x20, handles[1])\n"
        "    except StaleHandleError as error: print(error.side, error.status)\n"
        "host.share_grefs(1, 4, 5, 2, 6, 7)\n"
        "host.add_to_physmap(1, 0x11, 2, 2, 0x21)\n"
        "host.range_share(1, 2, 3, 5)\n"
        "print(host.debug_gfn(1, 3), host.debug_gref(2, 6))\n"
        "host.pause(1)\n"
        "host.unpause(1)\n"
        "host.fork(1, 3)\n"
        "for state, memory in resets:\n"
        "    host.fork_reset(3, state=state, memory=memory)\n"
        "for call in (lambda: host.nominate_gfn(1, 7), lambda: host.debug_gfn(1, 9), lambda: host.control(77, True)):\n"
        "    try: call()\n"
        "    except CallError as error: print(type(error).__name__, error.status.name)\n"
    )
    assert said == [
        f"{0x100000033} 5",
        "source -10",
        "client -9",
        "1 1",
        "BusyPageError E2BIG",
        "NotSharableError EINVAL",
        "NoSuchDomainError ESRCH",
    ]
    share = "share sdom=1 sgfn=0x10 sh={:#x} cdom=2 cgfn=0x20 ch={:#x}"
    grefs = "share sdom=1 sgfn=0x4000000000000004 sh={:#x} cdom=2 cgfn=0x4000000000000006 ch={:#x}"
    expected = [
        "control dom=1 enable=1",
        "control dom=2 enable=1",
        "nominate dom=1 gfn=0x33",
        "nominate_gref dom=2 ref=8",
        "debug_gfn dom=2 gfn=0x20",
        share.format(2, 3),
        "debug_gfn dom=2 gfn=0x20",
        share.format(1, 3),
        "debug_gfn dom=2 gfn=0x20",
        share.format(2, 1),
        grefs.format(0, 0).replace("0x0", "0"),
        "debug_gref dom=2 ref=6",
        grefs.format(5, 7),
        "add_physmap sdom=1 sgfn=0x11 sh=0x2 cdom=2 cgfn=0x21",
        "debug_gfn dom=2 gfn=0x3",
        "debug_gfn dom=2 gfn=0x4",
        "debug_gfn dom=2 gfn=0x5",
        "range sdom=1 cdom=2 first=0x3 last=0x5",
        "debug_gfn dom=1 gfn=0x3",
        "debug_gref dom=2 ref=6",
        "pause dom=1",
        "unpause dom=1",
        "control dom=3 enable=1",
        "fork child=3 parent=1 flags=0",
        *(f"fork_reset child=3 flags={flags}" for flags in resets.values()),
        "nominate dom=1 gfn=0x7",
        "debug_gfn dom=1 gfn=0x9",
        "control dom=77 enable=1",
    ]
    assert calls == expected


def test_the_audit_asks_xen_and_counts(on_the_device: OnTheDevice) -> None:
    said, calls = on_the_device.run("print(host.audit())\n")
    # The device says of every page but one that it is shared: we find more of them than shr_pages says.
    (line,) = said
    assert line.startswith("AuditReport(findings=(AuditFinding(invariant='I6', domid=1"), line
    assert line.count("found='19 gfns that debug_gfn knows to be shared'") == 2
    # The domain that is made to ask with has a number of its own on a real host.
    made = calls[1 : calls.index("max_mem dom=2 max_memkb=256")]
    assert made[0].startswith("create flags=0x3")
    assert calls == [
        "audit",
        *made,
        "max_mem dom=2 max_memkb=256",
        "control dom=2 enable=1",
        "share sdom=2 sgfn=0 sh=0 cdom=1 cgfn=0 ch=0",
        *(f"debug_gfn dom={domid} gfn={gfn:#x}".replace("0x0", "0") for domid in (1, 2) for gfn in range(20)),
        "destroy dom=2",
    ]


def test_a_throw_away_domain_is_made_step_by_step(on_the_device: OnTheDevice) -> None:
    _, calls = on_the_device.run(
        "from guests.throwaway import ThrowawayDomains\n"
        "connection = connect()\n"
        "with ThrowawayDomains(connection) as domains:\n"
        "    domid = domains.create(20, slack_pages=44)\n"
        "    domains.write(domid, 3, b'x')\n"
    )
    later = ["grant_opts=1 vmtrace_size=0 misc=0"] if on_the_device.release >= Release(4, 16) else []
    mempool = "mempool dom=2 size=4194304" if on_the_device.release >= Release(4, 17) else "shadow_op dom=2 op=31 mb=4"
    assert calls == [
        "create flags=0x3 vcpus=1 evtchn=1023 grants=-1,-1 emulation=0x1 ssidref=0 iommu=0",
        *later,
        "max_vcpus dom=2 max=1",
        mempool,
        "max_mem dom=2 max_memkb=256",
        "populate dom=2 extents=20 order=0 first=0",
        "map dom=2 pages=1 first=0x3",
        "destroy dom=2",
    ]
