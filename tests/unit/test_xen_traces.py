"""A real Xen's recordings replayed through the Xen mechanism: every call goes through ctypes into the stand-in."""

from collections.abc import Sequence
from pathlib import Path

import pytest

from memshr.embedded import EmbeddedHypervisor
from memshr.errors import BusyPageError
from memshr.replay import replay, trace
from memshr.types import AuditReport, Counters, DomainInfo, DomId, Gfn, GrantRef, Handle, RingRequest
from memshr.xen import XenHypervisor, audit
from standin.xen import StandIn, open_stand_in

TRACES = Path(__file__).parents[1] / "traces"
CRASHES = "merge_group_with_third_domain_"
FORKS_NOT_ISSUED = [TRACES / f"{name}.json" for name in ("fork_child_with_memory", "fork_errors", "raw_bad_ops")]
FILES = sorted(
    path for path in TRACES.glob("*.json") if not path.name.startswith(CRASHES) and path not in FORKS_NOT_ISSUED
)
CRASH_FILES = sorted(TRACES.glob(f"{CRASHES}*.json"))


class ThroughBinding(EmbeddedHypervisor):
    """A host whose guests and toolstack are the embedded one's, and whose sharing calls are the Xen mechanism's."""

    made: "ThroughBinding"

    def __init__(self, *, limit_pages: int | None = None, scrub_byte: int = 0) -> None:
        super().__init__(limit_pages=limit_pages, scrub_byte=scrub_byte)
        library = object.__new__(EmbeddedHypervisor)
        library.__dict__ = self.__dict__  # one host: the library plays with this one's books, not through the binding
        self.stand_in = StandIn(library)
        self.xen = open_stand_in(self.stand_in)
        ThroughBinding.made = self

    def control(self, domid: DomId, enable: bool) -> None:
        self.xen.control(domid, enable)

    def nominate_gfn(self, domid: DomId, gfn: Gfn) -> Handle:
        return self.xen.nominate_gfn(domid, gfn)

    def nominate_gref(self, domid: DomId, ref: GrantRef) -> Handle:
        return self.xen.nominate_gref(domid, ref)

    def share_gfns(self, sdom: DomId, sgfn: Gfn, sh: Handle, cdom: DomId, cgfn: Gfn, ch: Handle) -> None:
        self.xen.share_gfns(sdom, sgfn, sh, cdom, cgfn, ch)

    def share_grefs(self, sdom: DomId, sref: GrantRef, sh: Handle, cdom: DomId, cref: GrantRef, ch: Handle) -> None:
        self.xen.share_grefs(sdom, sref, sh, cdom, cref, ch)

    def add_to_physmap(self, sdom: DomId, sgfn: Gfn, sh: Handle, cdom: DomId, cgfn: Gfn) -> None:
        self.xen.add_to_physmap(sdom, sgfn, sh, cdom, cgfn)

    def range_share(self, sdom: DomId, cdom: DomId, first: Gfn, last: Gfn) -> None:
        self.xen.range_share(sdom, cdom, first, last)

    def debug_gfn(self, domid: DomId, gfn: Gfn) -> int:
        return self.xen.debug_gfn(domid, gfn)

    def debug_gref(self, domid: DomId, ref: GrantRef) -> int:
        return self.xen.debug_gref(domid, ref)

    def ring_enable(self, domid: DomId) -> int:
        return self.xen.ring_enable(domid)

    def ring_disable(self, domid: DomId) -> None:
        self.xen.ring_disable(domid)

    def ring_requests(self, domid: DomId) -> tuple[RingRequest, ...]:
        return tuple(self.xen.ring_requests(domid))

    def ring_respond(self, domid: DomId, count: int | None = None) -> None:
        self.xen.ring_respond(domid, count)

    def domain_resume(self, domid: DomId) -> None:
        self.xen.domain_resume(domid)

    def fork(self, parent: DomId, child: DomId) -> None:
        self.xen.fork(parent, child)

    def fork_reset(self, child: DomId, *, state: bool = False, memory: bool = False) -> None:
        self.xen.fork_reset(child, state=state, memory=memory)

    def counters(self) -> Counters:
        return self.xen.counters()

    def audit(self) -> AuditReport:
        return self.xen.audit()

    def domain_info(self, domid: DomId) -> DomainInfo:
        return self.xen.domain_info(domid)

    def pause(self, domid: DomId) -> None:
        self.xen.pause(domid)

    def unpause(self, domid: DomId) -> None:
        self.xen.unpause(domid)


@pytest.fixture(autouse=True)
def _through_the_binding(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trace, "EmbeddedHypervisor", ThroughBinding)
    monkeypatch.setattr(audit, "NEAR_PAGES", 1 << 12)  # the stand-in's calls take longer than Xen's
    monkeypatch.setattr(XenHypervisor, "_hire_asker", lambda _: None)  # it would take a domid, and recordings have them


def excuses_of(path: Path) -> Sequence[str]:
    return sorted(replay(path).excuses())


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.stem)
def test_the_binding_answers_as_xen_did(path: Path) -> None:
    result = replay(path)
    assert result.differences == ()
    assert any(name.startswith("xc_memshr_") for name, *_ in ThroughBinding.made.stand_in.calls)
    assert ThroughBinding.made.stand_in.crashes == []
    assert ThroughBinding.made.stand_in.deaths == []


@pytest.mark.parametrize("path", FORKS_NOT_ISSUED, ids=lambda path: path.stem)
def test_a_domain_with_memory_is_not_made_a_fork(path: Path) -> None:
    first = replay(path).differences[0]
    assert (first.what, first.xen, first.memshr) == ("rc", 0, -1)
    assert first.source.startswith(("fork parent=", "raw_memop op=9 dom=A"))
    assert ThroughBinding.made.stand_in.deaths == []


@pytest.mark.parametrize("path", CRASH_FILES, ids=lambda path: path.stem)
def test_the_share_that_killed_xen_is_not_issued(path: Path) -> None:
    result = replay(path)
    host = ThroughBinding.made
    (difference,) = result.differences
    assert (difference.what, difference.memshr) == ("Xen died", "rc -1, errno 16")
    assert host.stand_in.crashes == []
    shares = [arguments for name, *arguments in host.stand_in.calls if name == "xc_memshr_share_gfns"]
    a, b = (domid for domid in sorted(host.books.domains) if host.books.domains[domid].p2m.max_gfn == 15)
    assert [a, 1, 2, b, 1, 4] not in shares
    with pytest.raises(BusyPageError, match="may be mapped by a third domain, and Xen"):
        host.xen.share_gfns(DomId(a), Gfn(1), Handle(2), DomId(b), Gfn(1), Handle(4))
    # The same call below the binding: the stand-in does see that this one kills Xen.
    EmbeddedHypervisor.share_gfns(host.stand_in.embedded, DomId(a), Gfn(1), Handle(2), DomId(b), Gfn(1), Handle(4))
    assert host.stand_in.crashes == [(b, 1)]
