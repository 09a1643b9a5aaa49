"""What changed between two estimates. Domains are the same if they have the same name; domids are not kept."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from memshr.estimation.result import DomainEstimate, Estimate

SCHEMA = "memshr-comparison"
VERSION = 1

TOTALS = (
    "total_pages",
    "absent_pages",
    "zero_pages",
    "unique_pages",
    "shared_pages",
    "intra_pages",
    "inter_pages",
    "saved_pages",
    "between_groups_pages",
)
"""Figures of an estimate that are compared."""

DOMAIN_FIGURES = (
    "total_pages",
    "absent_pages",
    "zero_pages",
    "unique_pages",
    "shared_pages",
    "intra_pages",
    "mappings",
)
"""Figures of a domain that are compared."""

DomainKey = tuple[str, int]
"""A domain's name, and which of the domains of this name it is, from 0 on in the order of the estimate."""


@dataclass(frozen=True, slots=True)
class Change:
    """One figure in the first and in the second estimate."""

    before: int
    after: int

    @property
    def difference(self) -> int:
        """What was added; negative if it became less."""
        return self.after - self.before


@dataclass(frozen=True, slots=True)
class DomainChange:
    """A domain of both estimates: its trust group before and after, and its figures by name."""

    name: str
    groups: tuple[str, str]
    figures: dict[str, Change]


@dataclass(frozen=True, slots=True)
class PairChange:
    """Two domains of both estimates, and the distinct contents that both of them have.

    * ``groups``: their trust group before and after; None: they were, or are, in different ones.
    """

    names: tuple[str, str]
    groups: tuple[str | None, str | None]
    contents: Change


@dataclass(frozen=True, slots=True)
class Difference:
    """What changed between two estimates; every figure counts pages, but ``mappings``.

    * ``totals``: figures of TOTALS, and ``achievable_pages`` (``saved_pages`` of ``achievable``) if both have that.
    * ``domains``: those in both, in the order of the second estimate; ``new`` and ``gone``: names of the others.
    * ``pairs``: of the domains in both, those with a change, the greatest first.
    * ``remarks``: why the two may not be comparable, in words.
    """

    totals: dict[str, Change]
    domains: tuple[DomainChange, ...]
    new: tuple[str, ...]
    gone: tuple[str, ...]
    pairs: tuple[PairChange, ...]
    remarks: tuple[str, ...]

    def to_dict(self) -> dict[str, Any]:
        """The comparison in plain dicts, lists, strings and numbers: what ``--json`` prints."""
        plain = asdict(self)
        for key in ("domains", "new", "gone", "pairs", "remarks"):
            plain[key] = list(plain[key])
        for domain in plain["domains"]:
            domain["groups"] = list(domain["groups"])
        for pair in plain["pairs"]:
            pair["names"], pair["groups"] = list(pair["names"]), list(pair["groups"])
        return {"schema": SCHEMA, "version": VERSION, **plain}


def difference(before: Estimate, after: Estimate) -> Difference:
    """What changed from ``before`` to ``after``."""
    totals = {name: Change(getattr(before, name), getattr(after, name)) for name in TOTALS}
    if before.achievable is not None and after.achievable is not None:
        totals["achievable_pages"] = Change(before.achievable.saved_pages, after.achievable.saved_pages)
    old, new = _by_key(before.domains), _by_key(after.domains)
    return Difference(
        totals=totals,
        domains=tuple(_domain_change(old[key], domain) for key, domain in new.items() if key in old),
        new=tuple(domain.name for key, domain in new.items() if key not in old),
        gone=tuple(domain.name for key, domain in old.items() if key not in new),
        pairs=_pair_changes(before, after, old, new),
        remarks=tuple(_remarks(before, after)),
    )


def _by_key(domains: Iterable[DomainEstimate]) -> dict[DomainKey, DomainEstimate]:
    seen: Counter[str] = Counter()
    found = {}
    for domain in domains:
        found[domain.name, seen[domain.name]] = domain
        seen[domain.name] += 1
    return found


def _domain_change(old: DomainEstimate, new: DomainEstimate) -> DomainChange:
    figures = {name: Change(getattr(old, name), getattr(new, name)) for name in DOMAIN_FIGURES}
    return DomainChange(new.name, (old.group, new.group), figures)


def _pair_changes(
    before: Estimate,
    after: Estimate,
    old: Mapping[DomainKey, DomainEstimate],
    new: Mapping[DomainKey, DomainEstimate],
) -> tuple[PairChange, ...]:
    if before.method.sample is not None or after.method.sample is not None:
        return ()  # a sample knows nothing of pairs
    both = old.keys() & new.keys()
    contents: dict[frozenset[DomainKey], list[int]] = {}
    for place, (estimate, domains) in enumerate(((before, old), (after, new))):
        key_of = {domain.domid: key for key, domain in domains.items()}
        for pair in estimate.pairs:
            keys = frozenset(key_of[domid] for domid in pair.domids)
            if keys <= both and len(keys) == 2:
                contents.setdefault(keys, [0, 0])[place] = pair.contents
    changes = []
    for keys, (was, now) in contents.items():
        if was != now:
            one, other = sorted(keys, key=lambda key: new[key].domid)
            groups = tuple(
                domains[one].group if domains[one].group == domains[other].group else None for domains in (old, new)
            )
            changes.append(PairChange((one[0], other[0]), (groups[0], groups[1]), Change(was, now)))
    return tuple(sorted(changes, key=lambda pair: (-abs(pair.contents.difference), pair.names)))


def _remarks(before: Estimate, after: Estimate) -> Iterable[str]:
    for which, estimate in (("first", before), ("second", after)):
        if not estimate.method.exact:
            yield f"the {which} estimate is of a sample: small changes may be chance"
        if estimate.stopped is not None:
            yield f"the {which} estimate ended early: {estimate.stopped}"
    for name, words in (
        ("max_sharers", "sharers of one frame"),
        ("mappings_per_domain", "mappings of a domain"),
    ):
        was, now = getattr(before.method, name), getattr(after.method, name)
        if was != now:
            yield f"the limit on {words} was {was:,} and is {now:,}"
    if (before.method.samples_s is None) != (after.method.samples_s is None):
        yield "one estimate left volatile pages out and the other did not look for them"
