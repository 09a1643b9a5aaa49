"""The fuzzer's seeds without the fuzzer: as they are, cut short, and with bytes changed."""

import os
import random
import struct
from pathlib import Path

import pytest

from fuzz import area, maps, monitor
from fuzz.campaign import CORPUS, MAX_INPUT_BYTES, TARGETS
from fuzz.images import exercise
from fuzz.seeds import CORPORA, area_seeds, seeds
from memshr.images import FORMATS
from memshr.qemu import syscalls
from memshr.qemu.control_area import DATA, TABLE

SEEDS = seeds()
CHANGES = 50
"""Changed inputs for each seed."""


@pytest.mark.parametrize("target", CORPORA)
def test_corpus_is_what_the_writers_write(target: str) -> None:
    assert {file.name: file.read_bytes() for file in (CORPUS / target).iterdir()} == CORPORA[target]()
    assert CORPORA.keys() == TARGETS.keys()


def test_seeds_are_small() -> None:
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


OTHERS = {"area": area.exercise, "maps": maps.exercise, "monitor": monitor.exercise}
OTHER_SEEDS = [(target, name) for target in OTHERS for name in CORPORA[target]()]


@pytest.mark.parametrize(("target", "name"), OTHER_SEEDS)
def test_answers_areas_and_maps(tmp_path: Path, target: str, name: str) -> None:
    contents = CORPORA[target]()[name]
    OTHERS[target](contents, tmp_path)
    choice = random.Random(name)
    for _ in range(CHANGES):
        changed = bytearray(contents[: choice.choice([len(contents), choice.randrange(len(contents) + 1)])])
        for _ in range(choice.randint(1, 4) if changed else 0):
            place = choice.randrange(len(changed))
            changed[place : place + choice.choice([1, 1, 4])] = bytes([choice.choice([*INTERESTING, *b'0f{[\n" '])])
        OTHERS[target](bytes(changed), tmp_path)


@pytest.mark.parametrize(
    ("target", "name", "proper"),
    [
        ("monitor", "layout", "layout"),
        ("monitor", "drives", "drives"),
        ("monitor", "state", "state"),
        ("monitor", "drain", "drain"),
        ("monitor", "refused", "descriptor"),
        ("monitor", "refusals", "refusals"),
        ("area", "honest", "give"),
        ("area", "honest", "note"),
        ("maps", "frames", "/memfd:memshr-pool:a (deleted)"),
    ],
)
def test_proper_ones_get_through(tmp_path: Path, target: str, name: str, proper: str) -> None:
    assert proper in OTHERS[target](CORPORA[target]()[name], tmp_path)


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


def test_requests_of_userfaultfd_go_to_no_other_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []

    def noted(file: int, _features: int) -> int:
        asked.append(os.fspath(Path(f"/proc/self/fd/{file}").readlink()))
        return 0

    monkeypatch.setattr(syscalls, "userfaultfd_api", noted)
    reading, writing = os.pipe()
    data = bytearray(area_seeds()["honest"])
    struct.pack_into("<q", data, TABLE - DATA + 56, reading)  # the agent says that this is its userfaultfd
    assert "make" not in area.exercise(bytes(data), tmp_path)
    assert not [name for name in asked if "userfaultfd" not in name]
    os.close(reading)
    os.close(writing)
