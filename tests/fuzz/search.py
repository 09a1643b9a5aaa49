"""The process that searches: ``fuzz.images`` starts it. Needs atheris, which has to see memshr being imported."""

from __future__ import annotations

import importlib
import random
import resource
import sys
import tempfile
import zlib
from pathlib import Path

atheris = importlib.import_module("atheris")
with atheris.instrument_imports(include=["memshr"]):
    from fuzz.images import FORMAT_NAMES, MAX_UNPACKED_BYTES, exercise


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


def main() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_UNPACKED_BYTES, MAX_UNPACKED_BYTES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def one_input(data: bytes) -> None:
            # As one more format besides the one that is detected: with all of them a third as many inputs are tried.
            exercise(data, folder, formats=[FORMAT_NAMES[zlib.crc32(data) % len(FORMAT_NAMES)]])

        atheris.Setup(sys.argv, one_input, custom_mutator=mutate)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
