"""The embedded hypervisor under the contract kit, and the kit under a hypervisor that breaks its promises."""

from collections.abc import Callable, Sequence

import pytest

from memshr.embedded import EmbeddedHypervisor
from memshr.hypervisor import Hypervisor
from memshr.testing import CONTRACT, ContractError, GuestHost, check_hypervisor
from memshr.types import DomId, Gfn, Handle


class EmbeddedHost:
    """Two domains of the embedded hypervisor, played through its guest access."""

    def __init__(self, hypervisor: EmbeddedHypervisor) -> None:
        self.embedded = hypervisor
        self.domids = (hypervisor.create_domain("A", 16), hypervisor.create_domain("B", 12, first_gfn=100))
        for domid in self.domids:
            hypervisor.control(domid, True)

    @property
    def hypervisor(self) -> Hypervisor:
        return self.embedded

    def gfns(self, domid: DomId) -> Sequence[Gfn]:
        first = 0 if domid == self.domids[0] else 100
        return [Gfn(first + i) for i in (0, 1, 2, 3, 5, 7, 8, 9)]

    def hole(self, domid: DomId) -> Gfn:
        return Gfn(50)

    def write(self, domid: DomId, gfn: Gfn, data: bytes, offset: int = 0) -> None:
        self.embedded.write(domid, gfn, data, offset)

    def read(self, domid: DomId, gfn: Gfn) -> bytes:
        return self.embedded.read(domid, gfn)


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_embedded_keeps_the_contract(check: Callable[[GuestHost], None]) -> None:
    check(EmbeddedHost(EmbeddedHypervisor()))


def test_embedded_keeps_the_whole_contract_on_one_host() -> None:
    check_hypervisor(EmbeddedHost(EmbeddedHypervisor(scrub_byte=0xC2)))


class _ForgetsHandles(EmbeddedHypervisor):
    def share_gfns(  # shares whatever the handles say
        self,
        source_domid: DomId,
        source_gfn: Gfn,
        source_handle: Handle,
        client_domid: DomId,
        client_gfn: Gfn,
        client_handle: Handle,
    ) -> None:
        source = self.nominate_gfn(source_domid, source_gfn)
        client = self.nominate_gfn(client_domid, client_gfn)
        super().share_gfns(source_domid, source_gfn, source, client_domid, client_gfn, client)


class _NominatesHoles(EmbeddedHypervisor):
    def nominate_gfn(self, domid: DomId, gfn: Gfn) -> Handle:
        return super().nominate_gfn(domid, gfn) if gfn < 1 << 36 and gfn != 50 else Handle(77)


class _KeepsNominations(EmbeddedHypervisor):
    def unshare_gfn(self, domid: DomId, gfn: Gfn) -> None:
        pass


@pytest.mark.parametrize(
    ("broken", "check"),
    [
        (_ForgetsHandles, "dead_handles_are_refused"),
        (_NominatesHoles, "what_cannot_be_nominated"),
        (_KeepsNominations, "share_puts_two_pages_on_one_frame"),
    ],
)
def test_the_kit_names_the_broken_promise(broken: type[EmbeddedHypervisor], check: str) -> None:
    with pytest.raises(ContractError, match=check):
        check_hypervisor(EmbeddedHost(broken()))
