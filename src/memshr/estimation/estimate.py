"""``memshr.estimate``: what sharing would save in images, processes and guests, for programs and notebooks."""

from __future__ import annotations

import contextlib
import os
import secrets
from collections.abc import Callable, Sequence

from memshr.content.fingerprint import SEED_BITS
from memshr.estimation.analysis import EstimateOptions, EstimateProgress, analyse
from memshr.estimation.result import Estimate
from memshr.estimation.sampling import SampleOptions, denominator_of
from memshr.opening.sources import open_sources
from memshr.pagesource import PageSource, Subject
from memshr.qemu.mapping_budget import mapping_budget


def estimate(
    sources: Sequence[str | os.PathLike[str] | PageSource],
    *,
    groups: Sequence[str] = (),
    format: str | None = None,
    max_sharers: int = 256,
    mappings: int | None = None,
    interval_s: float = 1.0,
    rate_mib_per_s: float | None = None,
    sample: str | None = None,
    seed: int | None = None,
    against: Sequence[str | os.PathLike[str]] = (),
    threads: int | None = None,
    progress: Callable[[EstimateProgress], None] = lambda _: None,
    notice: Callable[[str], None] = lambda _: None,
) -> Estimate:
    """What sharing would save. Reads only.

    :param sources: paths of memory images; ``pid:N``, ``qemu:all``, ``qemu:NAME``, ``xen:all``, ``xen:DOMID``; or
        objects that are a ``memshr.pagesource.PageSource``. All of them in one estimate, in this order.
    :param groups: trust groups, ``NAME=DOMAIN,DOMAIN`` each, or ``all``; a domain that is in none shares alone.
    :param format: read the images as this format; None: detect it.
    :param max_sharers: pages that one frame takes at most.
    :param mappings: mappings that each domain may spend on sharing; None: what this host's limit leaves.
    :param interval_s: seconds between the two samples of live sources.
    :param rate_mib_per_s: read no faster than that; None: no limit.
    :param sample: ``1/N``: look at one in N pages that have contents, chosen by position, and give bounds.
    :param seed: of the sample; None: a fresh one, which the estimate names.
    :param against: files whose pages are looked for among the contents that save most.
    :param threads: None: one for each core, 8 at most.
    :param progress: called now and then, by any thread.
    :param notice: told, in one line each, of guests of ``qemu:all`` and of Xen domains that are left out.
    :raises MemshrError: a source cannot be read, changed although it is no live one, or ended; or the options make no
        sense.

    Cost: reading everything once, and once more what may be shared. Memory: at most 40 bytes a page.
    """
    options = EstimateOptions(
        groups=groups,
        max_sharers=max_sharers,
        mappings=mapping_budget() if mappings is None else mappings,
        interval_s=interval_s,
        rate_bytes_per_s=None if rate_mib_per_s is None else rate_mib_per_s * 2**20,
        against=[os.fspath(path) for path in against],
        threads=threads,
    )
    if seed is None:
        seed = secrets.randbits(32)
    sampling = None if sample is None else SampleOptions(denominator_of(sample), seed)
    named = [os.fspath(source) for source in sources if isinstance(source, str | os.PathLike)]
    with contextlib.ExitStack() as stack:
        opened = iter(stack.enter_context(open_sources(named, format=format, notice=notice)))
        subjects: list[Subject] = []
        for source in sources:
            if isinstance(source, str | os.PathLike):
                subjects += next(opened)
            else:
                subjects.append(Subject(source, kind="process" if source.live else "image"))
        return analyse(
            subjects,
            options,
            sample=sampling,
            new_seed=lambda: secrets.randbits(SEED_BITS),
            progress=progress,
        )
