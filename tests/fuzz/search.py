"""The process that searches: ``fuzz.images`` starts it. Needs atheris, which has to see memshr being imported."""

from __future__ import annotations

import importlib
import resource
import sys
import tempfile
import zlib
from pathlib import Path

atheris = importlib.import_module("atheris")
with atheris.instrument_imports(include=["memshr"]):
    from fuzz.images import FORMAT_NAMES, MAX_UNPACKED_BYTES, exercise


def main() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (MAX_UNPACKED_BYTES, MAX_UNPACKED_BYTES))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)

        def one_input(data: bytes) -> None:
            # As one more format besides the one that is detected: with all of them a third as many inputs are tried.
            exercise(data, folder, formats=[FORMAT_NAMES[zlib.crc32(data) % len(FORMAT_NAMES)]])

        atheris.Setup(sys.argv, one_input)
        atheris.Fuzz()


if __name__ == "__main__":
    main()
