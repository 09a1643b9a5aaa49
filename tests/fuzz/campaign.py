"""Searches for inputs that break what a target promises, guided by coverage of memshr's own code, with atheris.

``python -m fuzz.campaign --seconds 600`` (or ``make fuzz``) goes through all targets; ``--target`` names one. A search
starts from ``corpus/TARGET``, and from what earlier runs kept in ``.fuzz/TARGET``. What breaks is left there as
``crash-...``, ``timeout-...`` or ``oom-...``; ``python -m fuzz.campaign --target TARGET FILE...`` shows it again.
"""

from __future__ import annotations

import argparse
import importlib
import os
import subprocess
import sys
import tempfile
from pathlib import Path

CORPUS = Path(__file__).parent / "corpus"
KEPT = Path(__file__).parents[2] / ".fuzz"

TARGETS = {"images": 5, "monitor": 2, "area": 1, "maps": 1}
"""Module with an ``exercise(data, folder)`` -> how many parts of the time it gets."""

MAX_INPUT_BYTES = 1 << 16
MAX_AREA_BYTES = 1 << 17
"""All that memshr reads from a control area lies before that."""
MAX_MEMORY_MIB = 1024
MAX_SECONDS_EACH = 10


MOST_SECONDS = 30
"""Of one process: atheris never frees the inputs that a mutator of ours has made."""


def search(target: str, seconds: int, seed: int) -> int:
    """Search for inputs that break a target; returns the exit code of the search that found one, or 0."""
    for begin in range(0, seconds, MOST_SECONDS):
        code = _search(target, min(seconds - begin, MOST_SECONDS), seed + begin if seed else 0)
        if code:
            return code
    return 0


def _search(target: str, seconds: int, seed: int) -> int:
    # In a process of its own.
    kept = KEPT / target
    kept.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.access("/dev/shm", os.W_OK) else None) as folder:
        command = [sys.executable, "-m", "fuzz.search", target, str(kept), str(CORPUS / target)]
        command += [f"-max_total_time={seconds}", f"-seed={seed}", f"-artifact_prefix={kept}/", "-print_final_stats=1"]
        command += [f"-max_len={MAX_AREA_BYTES if target == 'area' else MAX_INPUT_BYTES}"]
        command += [f"-timeout={MAX_SECONDS_EACH}", f"-rss_limit_mb={MAX_MEMORY_MIB}"]
        # The search ends by itself; an end from outside is for a target that hangs where no timeout can reach it.
        return subprocess.run(
            command, env=os.environ | {"TMPDIR": folder}, timeout=seconds + 120, check=False
        ).returncode


def main() -> int:
    parser = argparse.ArgumentParser(prog="fuzz.campaign")
    parser.add_argument("--seconds", type=int, default=600, help="how long to search, all in all (default: 600)")
    parser.add_argument("--seed", type=int, default=1, help="of the search's random numbers; 0: another each time")
    parser.add_argument("--target", choices=TARGETS, help="only this one")
    parser.add_argument("files", nargs="*", help="inputs to try again instead of searching")
    arguments = parser.parse_args()
    targets = [arguments.target] if arguments.target else list(TARGETS)
    if arguments.files and not arguments.target:
        parser.error("say which --target the files are for")
    if not arguments.files:
        parts = sum(TARGETS[target] for target in targets)
        codes = [
            search(target, max(arguments.seconds * TARGETS[target] // parts, 1), arguments.seed) for target in targets
        ]
        return max(codes, key=abs)
    exercise = importlib.import_module(f"fuzz.{arguments.target}").exercise
    with tempfile.TemporaryDirectory() as folder:
        for file in map(Path, arguments.files):
            print(f"{file}: {exercise(file.read_bytes(), Path(folder)) or 'refused'}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
