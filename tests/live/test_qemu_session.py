"""Whole sharing sessions on running Linux guests: the policy and the mechanism together, as memshr share runs them.

The fixtures fail a test after which a guest has found a mismatch in its memory, or does not go on.
"""

import secrets
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from guests.linux import LinuxGuest
from guests.pages import backed_pages, count_pages
from memshr.content.fingerprint import SEED_BITS
from memshr.procfs import process_mappings
from memshr.qemu.agent import is_linked
from memshr.qemu.guests import inspect_process
from memshr.qemu.hypervisor import QemuHypervisor
from memshr.sharing.result import SharingReport
from memshr.sharing.session import SharingOptions, share
from memshr.trust import trust_groups

MOST_PAGES_OUTSIDE = 2000

Pair = tuple[LinuxGuest, LinuxGuest]


@contextmanager
def opened(guests: Sequence[LinuxGuest], groups: Mapping[str, Sequence[int]]) -> Iterator[QemuHypervisor]:
    """The guests under the mechanism; at the end they are as before."""
    processes = [process for guest in guests if (process := inspect_process(guest.pid)) is not None]
    with QemuHypervisor(processes, groups=groups) as hypervisor:
        try:
            yield hypervisor
        finally:
            for domain in hypervisor.domains():
                hypervisor.detach(domain.domid)


def run(hypervisor: QemuHypervisor, groups: Mapping[str, Sequence[int]]) -> SharingReport:
    """One session."""
    specs = [f"{name}={','.join(map(str, members))}" for name, members in groups.items()]
    trusted = trust_groups(hypervisor.names(), specs, lambda: secrets.randbits(SEED_BITS))
    report = share(hypervisor, trusted, wait=time.sleep, options=SharingOptions(huge_page_pages=0))
    assert not report.audit_findings
    assert report.stopped is None
    return report


def pool_inodes(guest: LinuxGuest) -> set[int]:
    """The frame pools that a guest's QEMU has mapped, as the kernel says."""
    return {each.inode for each in process_mappings(guest.pid) if each.path.startswith("/memfd:memshr-pool:")}


def test_a_session_saves_what_an_exact_count_says(guest_pair: Pair) -> None:
    groups = {"all": [1, 2]}
    for guest in guest_pair:
        guest.pause()
    exact = count_pages([backed_pages(guest.pid) for guest in guest_pair])
    with opened(guest_pair, groups) as hypervisor:
        report = run(hypervisor, groups)
        # The count has QEMU's copies of firmware and tables besides the guests' RAM: small, and most of it zeros.
        outside = exact.total_pages - (report.total_pages - report.absent_pages)
        assert 0 <= outside < MOST_PAGES_OUTSIDE
        found = report.saved_pages + report.dropped.get("max_sharers", 0)
        assert exact.saved_pages - outside <= found <= exact.saved_pages
        assert exact.zero_pages - outside <= report.zero_pages <= exact.zero_pages
        again = run(hypervisor, groups)
        assert again.counters == report.counters
        assert again.zero_pages == 0
        for guest in guest_pair:
            guest.resume()
        for guest in guest_pair:
            guest.wait_rounds(1, ("files", "checker"))
        hypervisor.fold_back()
        assert run(hypervisor, groups).shared_pages > 0


def test_a_run_over_unchanged_guests_attaches_to_none_of_them(guest_pair: Pair) -> None:
    groups = {"all": [1, 2]}
    processes = [process for guest in guest_pair if (process := inspect_process(guest.pid)) is not None]
    for guest in guest_pair:
        guest.pause()
    with QemuHypervisor(processes, groups=groups) as hypervisor:
        first = run(hypervisor, groups)
        hypervisor.fold_back(seen=first.counters)
    # Now and then the first run leaves a page to the second; the next after that has nothing left to find.
    for _ in range(3):
        guest_pair[0].wait(
            lambda: not any(is_linked(guest.pid) for guest in guest_pair), 10.0, "the agents put away what they had"
        )
        with QemuHypervisor(processes, groups=groups) as hypervisor:
            again = run(hypervisor, groups)
            given_back = hypervisor.fold_back(seen=again.counters)
            attached = any(is_linked(guest.pid) for guest in guest_pair)
        if not attached:
            break
        first = again
    assert not attached
    assert given_back == 0
    assert again.counters == first.counters
    assert (again.shared_pages, again.zero_pages) == (first.shared_pages, 0)
    for guest in guest_pair:
        guest.resume()
    for guest in guest_pair:
        guest.wait_rounds(1, ("files", "checker"))
    with opened(guest_pair, groups) as hypervisor:
        copied = sum(hypervisor.guest_figures(info.domid).copied_pages for info in hypervisor.domains())
        assert copied > 0, "the guests have rewritten their memory"
        hypervisor.fold_back(seen=hypervisor.counters())
        left = sum(hypervisor.guest_figures(info.domid).copied_pages for info in hypervisor.domains())
        assert left < copied / 2, "they go on, but most of what they had copied has been folded back"
        assert not hypervisor.audit().findings


def test_frames_of_a_group_that_was_dissolved_take_no_new_sharers(guest_pair: Pair) -> None:
    """The guests shared, then their operator sets them apart: what is shared stays, and nothing is added to it."""
    together = {"all": [1, 2]}
    apart = {"red": [1], "blue": [2]}
    processes = [process for guest in guest_pair if (process := inspect_process(guest.pid)) is not None]
    with QemuHypervisor(processes, groups=together) as hypervisor:
        run(hypervisor, together)
        before = {each.group: each.sharing_pages for each in hypervisor.pool_figures()}
    with opened(guest_pair, apart) as hypervisor:
        specs = [f"{name}={member}" for name, (member,) in apart.items()]
        trusted = trust_groups(hypervisor.names(), specs, lambda: secrets.randbits(SEED_BITS))
        report = share(hypervisor, trusted, wait=time.sleep, options=SharingOptions(huge_page_pages=0))
        assert {finding.invariant for finding in report.audit_findings} == {"I10"}
        after = {each.group: each.sharing_pages for each in hypervisor.pool_figures()}
        assert after["all"] <= before["all"]


def test_pages_of_two_trust_groups_never_meet(guest_pair: Pair) -> None:
    alpha, beta = guest_pair
    groups = {"red": [1], "blue": [2]}
    with opened(guest_pair, groups) as hypervisor:
        report = run(hypervisor, groups)
        assert report.inter_pages == 0
        assert all(domain.intra_pages > 0 for domain in report.domains)
        assert len(pool_inodes(alpha)) == len(pool_inodes(beta)) == 1
        assert not pool_inodes(alpha) & pool_inodes(beta)
