"""The fuzzer's seeds without the fuzzer: as they are, cut short, and with bytes changed."""

import random
from pathlib import Path

import pytest

from fuzz.images import CORPUS, MAX_INPUT_BYTES, exercise
from fuzz.seeds import seeds
from memshr.images import FORMATS

SEEDS = seeds()
CHANGES = 50
"""Changed inputs for each seed."""


def test_corpus_is_what_the_writers_write() -> None:
    assert {file.name: file.read_bytes() for file in CORPUS.iterdir()} == SEEDS
    assert sum(map(len, SEEDS.values())) < 300 << 10
    assert max(map(len, SEEDS.values())) <= MAX_INPUT_BYTES


def test_every_format_has_a_seed() -> None:
    for row in FORMATS:
        assert any(name.startswith(f"{row.name}-") for name in SEEDS), row.name


@pytest.mark.parametrize("name", SEEDS)
def test_seed_is_read_as_what_it_is(tmp_path: Path, name: str) -> None:
    detected = exercise(SEEDS[name], tmp_path)[0]
    assert name.startswith(f"{detected}-")


@pytest.mark.parametrize("name", SEEDS)
def test_seed_cut_short(tmp_path: Path, name: str) -> None:
    contents = SEEDS[name]
    choice = random.Random(name)
    for size in {*range(0, 64, 3), *(choice.randrange(len(contents)) for _ in range(30))}:
        exercise(contents[:size], tmp_path)


INTERESTING = [0, 1, 0x7F, 0x80, 0xFF]


@pytest.mark.parametrize("name", SEEDS)
def test_seed_with_bytes_changed(tmp_path: Path, name: str) -> None:
    choice = random.Random(name)
    for _ in range(CHANGES):
        contents = bytearray(SEEDS[name])
        for _ in range(choice.randint(1, 4)):
            # Headers are at the start, so that is where most changes are.
            place = choice.randrange(min(len(contents), choice.choice([16, 64, 512, MAX_INPUT_BYTES])))
            width = choice.choice([1, 1, 2, 4, 8])
            contents[place : place + width] = bytes([choice.choice([*INTERESTING, choice.randrange(256)])]) * width
        exercise(bytes(contents), tmp_path)
