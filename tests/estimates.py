"""Estimates for tests, counted the plain way from lists of contents, apart from memshr's own analysis."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import combinations

from memshr.estimation.result import (
    Achievable,
    Content,
    CopiesBand,
    DomainEstimate,
    Estimate,
    GroupEstimate,
    Method,
    PairEstimate,
    Place,
)
from memshr.types import Counters, DomId, Gfn

ABSENT, VOLATILE, HOLE, ZERO = -3, -2, -1, 0
"""Contents that are no ordinary ones; those are numbers from 1 on."""

METHOD = Method(True, None, None, 256, 16384, 0, 0.25)


def counted(domains: Mapping[str, Sequence[int]], groups: Mapping[str, Sequence[str]] | None = None) -> Estimate:
    """The estimate of domains whose pages hold these contents, page after page from gfn 0 on.

    :param groups: trust group -> names of its domains; None: one group of all.
    """
    names = list(domains)
    groups = {"all": names} if groups is None else groups
    group_of = {name: group for group, members in groups.items() for name in members}
    holds = {name: Counter(page for page in pages if page > ZERO) for name, pages in domains.items()}
    held = {group: sum((holds[name] for name in members), Counter[int]()) for group, members in groups.items()}
    found = []
    for number, (name, pages) in enumerate(domains.items(), start=1):
        special = Counter(page for page in pages if page <= ZERO)
        shared = sum(copies for content, copies in holds[name].items() if held[group_of[name]][content] > 1)
        found.append(
            DomainEstimate(
                domid=DomId(number),
                name=name,
                kind="image",
                format="elfcore",
                group=group_of[name],
                total_pages=len(pages),
                absent_pages=special[ABSENT],
                hole_pages=special[HOLE],
                zero_pages=special[ZERO] + special[HOLE],
                unique_pages=holds[name].total() - shared,
                shared_pages=shared,
                intra_pages=holds[name].total() - len(holds[name]),
                huge_pages=None,
                mappings=2 * shared,
                dropped={"volatile": special[VOLATILE], "not_sharable": 0},
            )
        )
    domid = {domain.name: domain.domid for domain in found}
    trusted = []
    for group, members in groups.items():
        own = [domain for domain in found if domain.name in members]
        zero, intra = (sum(domain.zero_pages for domain in own), sum(domain.intra_pages for domain in own))
        inter = held[group].total() - len(held[group]) - intra
        trusted.append(
            GroupEstimate(group, tuple(domid[name] for name in members), zero + intra + inter, intra, inter, zero)
        )
    pairs = []
    for one, other in combinations(names, 2):
        if common := holds[one].keys() & holds[other].keys():
            together = group_of[one] == group_of[other]
            pairs.append(
                PairEstimate(
                    domids=(domid[one], domid[other]),
                    names=(one, other),
                    group=group_of[one] if together else None,
                    contents=len(common),
                    pages=sum(holds[one][content] + holds[other][content] for content in common),
                )
            )
    contents = []
    bands: dict[tuple[int, int | None], list[int]] = {}
    for group, members in groups.items():
        for content, copies in held[group].items():
            if copies > 1:
                owners = [name for name in members if content in holds[name]]
                first = Place(domid[owners[0]], Gfn(list(domains[owners[0]]).index(content)))
                contents.append(Content(copies, len(owners), copies - 1, f"content {content}", first))
                power = 1 << (copies.bit_length() - 1)
                band = (copies, copies) if copies < 4 else (power, 2 * power - 1)
                bands.setdefault(band, []).append(copies)
    contents.sort(key=lambda content: -content.saved_pages)
    everything = sum(holds.values(), Counter[int]())
    sums = {
        key: sum(getattr(domain, key) for domain in found)
        for key in ("total_pages", "absent_pages", "hole_pages", "zero_pages", "unique_pages", "shared_pages")
    }
    intra, inter = sum(group.intra_pages for group in trusted), sum(group.inter_pages for group in trusted)
    saved = sums["zero_pages"] + intra + inter
    frames = sum(1 for group in held.values() for copies in group.values() if copies > 1)
    return Estimate(
        method=METHOD,
        **sums,
        intra_pages=intra,
        inter_pages=inter,
        saved_pages=saved,
        between_groups_pages=everything.total() - len(everything) - intra - inter,
        collisions=0,
        stopped=None,
        dropped={
            "volatile": sum(domain.dropped["volatile"] for domain in found),
            "not_sharable": 0,
            "max_sharers": 0,
        },
        counters=Counters(freed_pages=intra + inter, used_frames=frames),
        achievable=Achievable(
            saved_pages=saved - saved // 10,
            mappings=sum(domain.mappings for domain in found),
            mapping_budget_pages_lost=saved // 10,
            huge_pages_only=saved // 3,
            huge_pages_known=False,
            split_huge_pages=saved // 300,
        ),
        domains=tuple(found),
        pairs=tuple(pairs),
        contents=tuple(contents[:20]),
        copies=tuple(
            CopiesBand(low, high, len(each), sum(each), sum(each) - len(each))
            for (low, high), each in sorted(bands.items(), key=lambda band: band[0][0])
        ),
        groups=tuple(trusted),
        bounds=None,
    )
