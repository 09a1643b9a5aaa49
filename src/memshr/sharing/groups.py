"""Trust groups: who may share with whom.

By default each domain is a group of its own, and shares within itself only. A wider group is something that an
operator writes down. Nothing is common to two groups: each has a fingerprint seed and an index of its own, and is
worked through alone, so pages of different groups cannot meet (invariant I10).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from memshr.errors import MemshrError
from memshr.types import DomainInfo, DomId

EVERY_DOMAIN = "all"


class GroupError(MemshrError):
    """What an operator wrote about trust groups makes no sense."""


@dataclass(frozen=True, slots=True)
class Group:
    """Domains that may share pages with each other.

    :param seed: seeds the fingerprints of this group; secret, and different for each group.
    """

    name: str
    domids: tuple[DomId, ...]
    seed: int = field(repr=False)


def trust_groups(domains: Sequence[DomainInfo], specs: Sequence[str], new_seed: Callable[[], int]) -> list[Group]:
    """The trust groups of ``domains``: those that ``specs`` name, and one for each domain that no spec names.

    :param domains: the domains to be shared.
    :param specs: ``NAME=DOMAIN,DOMAIN...`` each, a domain being named by its name or its domid; or the one spec
        ``all``, which puts all domains into one group.
    :param new_seed: gives an unpredictable seed of ``fingerprint.SEED_BITS`` bits at each call.
    :returns: groups in the order of the specs, then the single domains in the order of ``domains``.
    :raises GroupError: a spec that has no name or no domains, two groups of one name or one of the name of a domain
        outside it, a domain that is unknown, ambiguous, or named twice.
    """
    if EVERY_DOMAIN in specs:
        if len(specs) > 1:
            raise GroupError(f"group {EVERY_DOMAIN!r} takes every domain, so there can be no other group")
        return [Group(EVERY_DOMAIN, tuple(info.domid for info in domains), new_seed())] if domains else []
    groups: list[Group] = []
    group_of: dict[DomId, str] = {}
    for spec in specs:
        name, domids = _parse(spec, domains)
        if name in (group.name for group in groups):
            raise GroupError(f"there are two groups of the name {name!r}", remedy="write all its domains into one")
        for domid in domids:
            if domid in group_of:
                where = "twice in" if group_of[domid] == name else f"in group {group_of[domid]!r} and again in"
                raise GroupError(f"domain {_name_of(domid, domains)!r} is {where} group {name!r}")
            group_of[domid] = name
        groups.append(Group(name, domids, new_seed()))
    alone = [info for info in domains if info.domid not in group_of]
    for group in groups:
        if group.name in (info.name for info in alone):
            raise GroupError(
                f"group {group.name!r} has the name of a domain that is not in it",
                remedy="give it another name, or put that domain in",
            )
    return groups + [Group(info.name, (info.domid,), new_seed()) for info in alone]


def _parse(spec: str, domains: Sequence[DomainInfo]) -> tuple[str, tuple[DomId, ...]]:
    name, equals, listed = spec.partition("=")
    name = name.strip()
    if not equals or not name:
        raise GroupError(f"group {spec!r} has no name", remedy=f"write NAME=DOMAIN,DOMAIN... or {EVERY_DOMAIN!r}")
    wanted = [domain.strip() for domain in listed.split(",") if domain.strip()]
    if not wanted:
        raise GroupError(f"group {name!r} has no domains", remedy=f"write {name}=DOMAIN,DOMAIN...")
    return name, tuple(_find(domain, name, domains) for domain in wanted)


def _find(wanted: str, group: str, domains: Sequence[DomainInfo]) -> DomId:
    found = [info.domid for info in domains if info.name == wanted]
    if not found and wanted.isdecimal():
        found = [info.domid for info in domains if info.domid == int(wanted)]
    if not found:
        known = ", ".join(info.name for info in domains) or "none"
        raise GroupError(
            f"group {group!r} names the domain {wanted!r}, which is not here", remedy=f"there are: {known}"
        )
    if len(found) > 1:
        domids = ", ".join(str(domid) for domid in found)
        raise GroupError(f"group {group!r}: several domains have the name {wanted!r}", remedy=f"use a domid: {domids}")
    return found[0]


def _name_of(domid: DomId, domains: Sequence[DomainInfo]) -> str:
    return next(info.name for info in domains if info.domid == domid)
