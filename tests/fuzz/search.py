"""The process that searches: ``fuzz.campaign`` starts it. Needs atheris, which has to see memshr being imported."""

from __future__ import annotations

import importlib
import json
import random
import resource
import sys
import tempfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

TARGET = sys.argv.pop(1)

atheris = importlib.import_module("atheris")
with atheris.instrument_imports(include=["memshr"]):
    from fuzz.images import FORMAT_NAMES, MAX_UNPACKED_BYTES

    exercise = importlib.import_module(f"fuzz.{TARGET}").exercise

ODD_VALUES: tuple[Any, ...] = (
    *(None, True, 0, -1, 1 << 64, 0.5, "", "\ud800\x1b[2J", "x" * 2000, [], {}, [[]], [{}], {"a": {"a": {}}}),
)


def mutate(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a piece of the input, mostly at its start: most bytes are contents of pages, which steer nothing."""
    choice = random.Random(seed)
    length = min(len(data), choice.choice([16, 64, 64, 256, 1024, max_size]))
    start = choice.choice([0, 0, 0, 0, len(data) - length, choice.randint(0, len(data) - length)])
    piece = data[start : start + length]
    changed = bytes(atheris.Mutate(piece, max(length, 16)))
    if choice.random() < 0.8:  # what comes behind stays in its place
        changed = changed[:length] + piece[len(changed) :]
    return (data[:start] + changed + data[start + length :])[:max_size]


def mutate_lines(data: bytes, max_size: int, seed: int) -> bytes:
    """Change a line; one of JSON stays JSON most times, and gets an odd value somewhere in it."""
    choice = random.Random(seed)
    lines = data.split(b"\n")
    at = choice.randrange(len(lines))
    try:
        tree = json.loads(lines[at])
    except (ValueError, RecursionError):
        tree = None
    if tree is not None and choice.random() < 0.7:
        lines[at] = json.dumps(_with_odd_value(tree, choice)).encode()
    elif choice.random() < 0.2:
        lines.insert(at, choice.choice(lines))
    else:
        lines[at] = bytes(atheris.Mutate(lines[at], max(len(lines[at]) + 16, 32)))
    return b"\n".join(lines)[:max_size]


def _with_odd_value(tree: Any, choice: random.Random) -> Any:
    # The tree, in which one value is another.
    if isinstance(tree, dict) and tree and choice.random() < 0.85:
        key = choice.choice(list(tree))
        return tree | {key: _with_odd_value(tree[key], choice)}
    if isinstance(tree, list) and tree and choice.random() < 0.85:
        at = choice.randrange(len(tree))
        return [*tree[:at], _with_odd_value(tree[at], choice), *tree[at + 1 :]]
    if isinstance(tree, str) and choice.random() < 0.6:
        return bytes(atheris.Mutate(tree.encode(errors="replace"), len(tree) + 32)).decode(errors="replace")
    return choice.choice(ODD_VALUES)


MUTATORS: dict[str, Callable[[bytes, int, int], bytes]] = {
    "images": mutate,
    "monitor": mutate_lines,
    "maps": mutate_lines,
}
"""Others are changed as atheris does it by itself."""


def main() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_UNPACKED_BYTES, MAX_UNPACKED_BYTES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def one_input(data: bytes) -> None:
            if TARGET == "images":
                # As one more format besides the one that is detected: with all of them a third as many are tried.
                exercise(data, folder, formats=[FORMAT_NAMES[zlib.crc32(data) % len(FORMAT_NAMES)]])
            else:
                exercise(data, folder)

        mutator = MUTATORS.get(TARGET)
        atheris.Setup(sys.argv, one_input, **({"custom_mutator": mutator} if mutator else {}))
        atheris.Fuzz()


if __name__ == "__main__":
    main()
