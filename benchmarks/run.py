"""Benchmarks: tables of ratios, each of two things measured side by side in one run.

``python benchmarks/run.py`` runs all, ``python benchmarks/run.py fingerprint collisions`` the named ones. A benchmark
is one function without parameters that prints its table; add it to BENCHES. Times are the best of several rounds in
which the things that are compared take turns, so that a noisy machine disturbs both alike.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

import embedded
import estimating
import fingerprints
import sessions
import xen


def beside_ksm() -> None:
    """memshr and KSM on running guests."""
    try:
        import ksm  # noqa: PLC0415  # its guests are those of the tests
    except ModuleNotFoundError as missing:
        print(f"left out: there is no module {missing.name}; use make bench, or set PYTHONPATH=tests")
        return
    ksm.bench()


BENCHES: dict[str, Callable[[], None]] = {
    "fingerprint": fingerprints.speed,
    "collisions": fingerprints.collisions,
    **{bench.__name__: bench for bench in embedded.BENCHES},
    **{f"xen_{bench.__name__}": bench for bench in xen.BENCHES},
    "session": sessions.cost,
    **{f"estimate_{bench.__name__}": bench for bench in estimating.BENCHES},
    "ksm": beside_ksm,
}


def main(names: Sequence[str]) -> int:
    """Run the named benchmarks, or all."""
    unknown = [name for name in names if name not in BENCHES]
    if unknown:
        print(f"no such benchmark: {', '.join(unknown)}; there are: {', '.join(BENCHES)}", file=sys.stderr)
        return 2
    for name in names or BENCHES:
        print(f"\n[{name}]")
        BENCHES[name]()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
