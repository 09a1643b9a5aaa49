"""Trust groups: what an operator writes, and the one clear line when it makes no sense."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import count

import pytest

from memshr.cli.share import group_members
from memshr.trust import Group, GroupError, trust_groups
from memshr.types import DomId

DOMAINS = {DomId(i): name for i, name in enumerate(["web", "db", "mail", "7"], start=1)}


def groups(*specs: str, domains: Mapping[DomId, str] = DOMAINS) -> list[Group]:
    return trust_groups(domains, specs, count(100).__next__)


def names_and_domids(found: list[Group]) -> list[tuple[str, tuple[int, ...]]]:
    return [(group.name, tuple(group.domids)) for group in found]


def test_each_domain_is_a_group_of_its_own_by_default() -> None:
    assert names_and_domids(groups()) == [("web", (1,)), ("db", (2,)), ("mail", (3,)), ("7", (4,))]


def test_domains_are_named_by_name_or_domid_and_the_rest_stays_alone() -> None:
    assert names_and_domids(groups("front = web , 3")) == [("front", (1, 3)), ("db", (2,)), ("7", (4,))]


def test_a_name_goes_before_a_domid() -> None:
    seven = DOMAINS | {DomId(7): "other"}
    assert names_and_domids(groups("g=7", domains=seven))[0] == ("g", (4,))


def test_all_puts_every_domain_into_one_group() -> None:
    assert names_and_domids(groups("all")) == [("all", (1, 2, 3, 4))]
    assert groups("all", domains={}) == []


def test_domains_of_one_name_are_told_apart() -> None:
    twins = {DomId(i): "twin" for i in (1, 2)}
    assert group_members(["all"], twins) == {"all": (1, 2)}
    assert group_members(["both=1,2"], twins) == {"both": (1, 2)}
    assert group_members(["one=2"], twins) == {"one": (2,)}
    assert group_members([], twins) == {}


def test_guests_of_different_users_are_together_only_if_they_are_named() -> None:
    names = {DomId(1): "web", DomId(2): "db", DomId(3): "toy"}
    users = {DomId(1): "", DomId(2): "", DomId(3): "mallory"}
    groups = trust_groups(names, ["all"], lambda: 5, users)
    assert {group.name: group.domids for group in groups} == {"all": (1, 2), "all (mallory)": (3,)}
    assert group_members(["all"], names, users) == {"all": (1, 2), "all (mallory)": (3,)}
    assert group_members(["both=web,toy"], names, users) == {"both": (1, 3)}


def test_each_group_has_a_seed_of_its_own_and_does_not_show_it() -> None:
    found = groups("a=web,db")
    assert len({group.seed for group in found}) == len(found)
    assert "100" not in repr(found[0])


@pytest.mark.parametrize(
    ("specs", "message"),
    [
        (["web,db"], "group 'web,db' has no name; write NAME=DOMAIN,DOMAIN... or 'all'"),
        (["=web"], "group '=web' has no name"),
        (["a="], "group 'a' has no domains; write a=DOMAIN,DOMAIN..."),
        (["a=,"], "group 'a' has no domains"),
        (["a=web,nobody"], "group 'a' names the domain 'nobody', which is not here; there are: web, db, mail, 7"),
        (["a=web", "b=db,web"], "domain 'web' is in group 'a' and again in group 'b'"),
        (["a=web,1"], "domain 'web' is twice in group 'a'"),
        (["a=web", "a=db"], "there are two groups of the name 'a'"),
        (["mail=web,db"], "group 'mail' has the name of a domain that is not in it; give it another name"),
        (["all", "a=web"], "group 'all' takes every domain, so there can be no other group"),
    ],
)
def test_what_makes_no_sense_is_said_in_one_line(specs: list[str], message: str) -> None:
    with pytest.raises(GroupError) as caught:
        groups(*specs)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)
    assert caught.value.exit_code == 2


def test_a_group_may_have_the_name_of_one_of_its_domains() -> None:
    assert names_and_domids(groups("mail=web,mail"))[0] == ("mail", (1, 3))


def test_two_domains_of_one_name_need_their_domids() -> None:
    twins = {DomId(i): "twin" for i in (5, 6)}
    with pytest.raises(GroupError, match="several domains have the name 'twin'; use a domid: 5, 6"):
        groups("g=twin", domains=twins)
    assert names_and_domids(groups("g=5,6", domains=twins)) == [("g", (5, 6))]
