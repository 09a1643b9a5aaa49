"""Audit names every planted fault by its invariant, in both directions of the books."""

import pytest

from memshr.embedded import EmbeddedHypervisor
from memshr.embedded.p2m import TYPE_BITS
from memshr.embedded.shared_frames import page_id
from memshr.testing import FAULTS
from memshr.types import DomId, Gfn, P2mType


def shared_host(sharers: int = 3) -> tuple[EmbeddedHypervisor, DomId, Gfn]:
    """A host with ``sharers`` gfns of two domains on one frame; one of them, not the source."""
    hypervisor = EmbeddedHypervisor()
    first = hypervisor.create_domain("A", 4)
    second = hypervisor.create_domain("B", sharers + 4)
    handle = hypervisor.nominate_gfn(first, Gfn(1))
    for gfn in map(Gfn, range(1, sharers)):
        client = hypervisor.nominate_gfn(second, gfn)
        hypervisor.share_gfns(first, Gfn(1), handle, second, gfn, client)
    assert hypervisor.audit().clean
    return hypervisor, second, Gfn(1)


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_named(name: str) -> None:
    invariant, plant = FAULTS[name]
    hypervisor, domid, gfn = shared_host()
    plant(hypervisor, domid, gfn)
    report = hypervisor.audit()
    assert not report.clean
    assert invariant in {finding.invariant for finding in report.findings}, report.findings


# What Xen's mem_sharing_audit() checks, in its order -> the fault that breaks it, and the number that Xen answers then
# with three pages of two domains on the frame, two of them the faulty domain's. After an error in the frame itself Xen
# skips the frame, which then is missing in the total, too.
XEN_CHECKS = {
    "the frame cannot be locked, or has another type": ("frame that does not know that it is shared", 2),
    "owner": ("frame owned by a domain", 1),
    "empty reverse map": ("frame without sharers", 2),
    "unknown domain": ("page of a domain that is gone", 3),  # both its pages, and then the count
    "p2m maps another frame": ("p2m entry of another frame", 1),
    "p2m type": ("p2m entry of another type", 1),
    "p2m maps another frame, p2m type": ("p2m entry changed under the reverse map", 2),
    "entries and type count": ("reference count too high", 1),
    "entries and type count, the other way": ("page missing from the reverse map", 0),  # both lowered: Xen sees nothing
    "total of shared frames": ("used_frames too high", 1),
    "what Xen does not look at: handles": ("handle that was never given out", 0),
    "what Xen does not look at: freed pages": ("freed_pages too high", 0),
}


@pytest.mark.parametrize("check", XEN_CHECKS)
def test_xen_errors_is_the_number_that_xen_answers(check: str) -> None:
    name, errors = XEN_CHECKS[check]
    hypervisor, domid, gfn = shared_host()
    FAULTS[name][1](hypervisor, domid, gfn)
    assert hypervisor.audit().xen_errors == errors


def test_every_fault_is_held_against_xens_audit() -> None:
    assert {name for name, _ in XEN_CHECKS.values()} == set(FAULTS)


def test_types_that_do_not_exist_are_findings_too() -> None:
    hypervisor, domid, gfn = shared_host()
    hypervisor.books.entries.set(page_id(domid, gfn), hypervisor.books.entries.get(page_id(domid, gfn)) | 0xF)
    assert "the p2m says type 15" in {finding.found for finding in hypervisor.audit().findings}


def test_every_audited_invariant_has_a_fault() -> None:
    assert {invariant for invariant, _ in FAULTS.values()} == {"I1", "I2", "I3", "I4", "I5", "I6"}


def test_finding_says_where_and_what() -> None:
    hypervisor, domid, gfn = shared_host()
    FAULTS["p2m entry changed under the reverse map"][1](hypervisor, domid, gfn)
    finding = next(found for found in hypervisor.audit().findings if found.invariant == "I3")
    assert (finding.domid, finding.gfn) == (domid, gfn)
    mfn = hypervisor.books.entries.get(page_id(1, 1)) >> TYPE_BITS
    assert finding.mfn == mfn
    text = str(finding)
    assert f"domain {domid}" in text
    assert "gfn 0x1" in text
    assert f"mfn {mfn:#x}" in text
    assert "expected" in text
    assert "found" in text


def test_xen_counts_two_errors_for_a_page_that_left_its_p2m() -> None:
    # Recorded: remove_from_physmap of a shared gfn leaves Xen's books so, and its audit answers 2.
    hypervisor, domid, gfn = shared_host(2)
    FAULTS["p2m entry changed under the reverse map"][1](hypervisor, domid, gfn)
    assert hypervisor.audit().xen_errors == 2


def test_p2m_entry_that_no_reverse_map_knows_is_found_though_xen_does_not_see_it() -> None:
    hypervisor, domid, _ = shared_host()
    mfn = hypervisor.books.entries.get(page_id(domid, 1)) >> TYPE_BITS
    stray = page_id(domid, 6)
    hypervisor.memory.free(hypervisor.books.entries.get(stray) >> TYPE_BITS)
    hypervisor.books.entries.set(stray, mfn << TYPE_BITS | P2mType.RAM_SHARED)
    hypervisor.books.domains[domid].tot_pages -= 1
    hypervisor.books.domains[domid].shr_pages += 1
    hypervisor.books.freed_pages += 1
    report = hypervisor.audit()
    assert report.xen_errors == 0
    assert [(finding.invariant, finding.gfn) for finding in report.findings] == [("I3", 6)]


def test_broken_link_is_found() -> None:
    hypervisor, domid, gfn = shared_host(5)
    hypervisor.books.frames.prev.set(page_id(domid, gfn), page_id(domid, gfn))
    assert "I3" in {finding.invariant for finding in hypervisor.audit().findings}


def test_ring_cut_short_is_found() -> None:
    hypervisor, _domid, _ = shared_host(5)
    frames = hypervisor.books.frames
    head = frames.head.item(int(frames.slots()[0]))
    frames.next.set(head, head)
    found = {finding.invariant for finding in hypervisor.audit().findings}
    assert {"I3", "I4"} <= found


@pytest.mark.parametrize("sharers", [2, 100, 700, 3000])
def test_audit_walks_long_reverse_maps(sharers: int) -> None:
    hypervisor, domid, gfn = shared_host(sharers)
    assert hypervisor.debug_gfn(domid, gfn) == sharers
    hypervisor.books.frames.count[hypervisor.books.frames.slots()[0]] += 1
    findings = hypervisor.audit().findings
    assert [finding.invariant for finding in findings] == ["I4"]
    assert str(sharers) in findings[0].expected


def test_two_frames_with_one_handle() -> None:
    hypervisor, domid, _ = shared_host()
    hypervisor.nominate_gfn(domid, Gfn(5))
    frames = hypervisor.books.frames
    first, second = frames.slots().tolist()
    frames.handle[second] = frames.handle[first]
    assert [finding.invariant for finding in hypervisor.audit().findings] == ["I5"]


def test_wrong_page_counts_of_a_domain() -> None:
    hypervisor, domid, _ = shared_host()
    hypervisor.books.domains[domid].tot_pages += 1
    hypervisor.books.domains[domid].shr_pages += 1
    findings = hypervisor.audit().findings
    assert {finding.invariant for finding in findings} == {"I6"}
    assert len(findings) == 3  # both counts of the domain, and the sum
