"""Trust groups: who may share with whom.

By default each domain is a group of its own, and shares within itself only. A wider group is something that an
operator writes down. Nothing is common to two groups: each has a fingerprint seed and an index of its own, and is
worked through alone, so pages of different groups cannot meet (invariant I10).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from memshr.errors import MemshrError
from memshr.types import DomId

__all__ = [
    "EVERY_DOMAIN",
    "Group",
    "GroupError",
    "trust_groups",
]

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


def trust_groups(
    names: Mapping[DomId, str],
    specs: Sequence[str],
    new_seed: Callable[[], int],
    users: Mapping[DomId, str] | None = None,
) -> list[Group]:
    """The trust groups of some domains: those that ``specs`` name, and one for each domain that no spec names.

    :param names: the domains to be shared, as ``Hypervisor.names`` says.
    :param specs: ``NAME=DOMAIN,DOMAIN...`` each, a domain being named by its name or its domid; or the one spec
        ``all``, which puts all domains into one group, or those of each user into one.
    :param new_seed: gives an unpredictable seed of ``fingerprint.SEED_BITS`` bits at each call.
    :param users: whose each domain is, where that matters: ``all`` makes a group for each user, since nobody has said
        that they trust each other. The user "" has the group ``all``, another one ``all (USER)``. None: all are of "".
    :returns: groups in the order of the specs, then the single domains in the order of ``names``.
    :raises GroupError: a spec that has no name or no domains, two groups of one name or one of the name of a domain
        outside it, a domain that is unknown, ambiguous, or named twice.
    """
    if EVERY_DOMAIN in specs:
        if len(specs) > 1:
            raise GroupError(f"group {EVERY_DOMAIN!r} takes every domain, so there can be no other group")
        of_users: dict[str, list[DomId]] = {}
        for domid in names:
            of_users.setdefault((users or {}).get(domid, ""), []).append(domid)
        return [
            Group(f"{EVERY_DOMAIN} ({user})" if user else EVERY_DOMAIN, tuple(domids), new_seed())
            for user, domids in of_users.items()
        ]
    groups: list[Group] = []
    group_of: dict[DomId, str] = {}
    for spec in specs:
        name, domids = _parse(spec, names)
        if name in (group.name for group in groups):
            raise GroupError(f"there are two groups of the name {name!r}", remedy="write all its domains into one")
        for domid in domids:
            if domid in group_of:
                where = "twice in" if group_of[domid] == name else f"in group {group_of[domid]!r} and again in"
                raise GroupError(f"domain {names[domid]!r} is {where} group {name!r}")
            group_of[domid] = name
        groups.append(Group(name, domids, new_seed()))
    alone = {domid: name for domid, name in names.items() if domid not in group_of}
    for group in groups:
        if group.name in alone.values():
            raise GroupError(
                f"group {group.name!r} has the name of a domain that is not in it",
                remedy="give it another name, or put that domain in",
            )
    return groups + [Group(name, (domid,), new_seed()) for domid, name in alone.items()]


def _parse(spec: str, names: Mapping[DomId, str]) -> tuple[str, tuple[DomId, ...]]:
    name, equals, listed = spec.partition("=")
    name = name.strip()
    if not equals or not name:
        raise GroupError(f"group {spec!r} has no name", remedy=f"write NAME=DOMAIN,DOMAIN... or {EVERY_DOMAIN!r}")
    wanted = [domain.strip() for domain in listed.split(",") if domain.strip()]
    if not wanted:
        raise GroupError(f"group {name!r} has no domains", remedy=f"write {name}=DOMAIN,DOMAIN...")
    return name, tuple(_find(domain, name, names) for domain in wanted)


def _find(wanted: str, group: str, names: Mapping[DomId, str]) -> DomId:
    found = [domid for domid, name in names.items() if name == wanted]
    if not found and wanted.isdecimal():
        found = [domid for domid in names if domid == int(wanted)]
    if not found:
        known = ", ".join(names.values()) or "none"
        raise GroupError(
            f"group {group!r} names the domain {wanted!r}, which is not here", remedy=f"there are: {known}"
        )
    if len(found) > 1:
        domids = ", ".join(str(domid) for domid in found)
        raise GroupError(f"group {group!r}: several domains have the name {wanted!r}", remedy=f"use a domid: {domids}")
    return found[0]
