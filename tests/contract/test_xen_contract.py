"""The Xen mechanism under the contract kit, on the stand-in for Xen's libraries."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import pytest

from guests.throwaway import ThrowawayDomains, ThrowawayGuests
from memshr.testing import CONTRACT, GuestHost, check_hypervisor
from memshr.xen import Connection, XenHypervisor, connect
from memshr.xen.names import Names
from standin.xen import StandIn


@contextmanager
def guests(stand_in: StandIn) -> Iterator[ThrowawayGuests]:
    connection: Connection = connect(stand_in.load)
    with XenHypervisor(connection, Names("")) as hypervisor, ThrowawayDomains(connection) as domains:
        yield ThrowawayGuests(hypervisor, domains)
    assert not stand_in.mapped_pages
    assert not stand_in.crashes


@pytest.mark.parametrize("check", CONTRACT, ids=lambda check: check.__name__)
def test_xen_keeps_the_contract_on_the_stand_in(check: Callable[[GuestHost], None]) -> None:
    with guests(StandIn()) as host:
        check(host)


def test_xen_keeps_the_whole_contract_on_one_host_of_the_stand_in() -> None:
    with guests(StandIn()) as host:
        check_hypervisor(host)
