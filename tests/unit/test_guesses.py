"""Guesses what a page is, on pages that really are it."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import numpy as np
import pytest

from memshr.errors import ImageError
from memshr.estimation.guesses import guess, pages_of_files
from memshr.procfs import ProcessMemory
from memshr.types import PAGE_SIZE


@pytest.mark.parametrize(
    ("page", "words"),
    [
        (bytes(PAGE_SIZE), "zero page"),
        (b"\xaa" * PAGE_SIZE, "filled with the byte 0xaa"),
        (b"\x01\x02" * 2048, "filled with the 2-byte word 0x0201"),
        (b"\x00\x00\x00\x01" * 1024, "filled with the 4-byte word 0x01000000"),
        (struct.pack("<Q", 0xDEADBEEF) * 512, "filled with the 8-byte word 0x00000000deadbeef"),
        (b"\x7fELF\x02\x01" + b"\x05\x09" * 2045, "start of an ELF file"),
        ((b"A line of text, and another one.\n" * 128)[:PAGE_SIZE], "text (guess)"),
        (np.random.default_rng(1).bytes(PAGE_SIZE), ""),
        (bytes(PAGE_SIZE - 1) + b"\x01", ""),
    ],
)
def test_guess(page: bytes, words: str) -> None:
    assert guess(page) == words


def test_machine_code_is_told_from_data() -> None:
    with ProcessMemory(os.getpid()) as memory:
        mappings = list(memory.mappings())
    library = next(each for each in mappings if each.executable and Path(each.path).name.startswith("libc.so"))
    with Path(library.path).open("rb") as file:
        file.seek(library.offset)
        text = file.read(library.end - library.start)
    code = [text[at : at + PAGE_SIZE] for at in range(0, len(text) - PAGE_SIZE, PAGE_SIZE)]
    found = sum(guess(page) == "x86-64 code (guess)" for page in code)
    assert found > 0.9 * len(code)
    random = np.random.default_rng(2)
    data = [random.bytes(PAGE_SIZE) for _ in range(200)]
    data += [random.integers(0, 1000, 512).astype(np.int64).tobytes() for _ in range(200)]
    data += [random.normal(size=512).tobytes() for _ in range(200)]
    assert {guess(page) for page in data} == {""}


def test_pages_of_files_are_named(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    first, second = tmp_path / "one.bin", tmp_path / "two.bin"
    contents = random.bytes(600 * PAGE_SIZE + 10)
    first.write_bytes(contents)
    second.write_bytes(b"x" + contents)
    alike = bytearray(contents[:PAGE_SIZE])
    alike[-1] ^= 1  # as long as the first words are equal, all of a page must be
    wanted = [contents[500 * PAGE_SIZE : 501 * PAGE_SIZE], bytes(alike), contents[-10:] + bytes(PAGE_SIZE - 10)]
    wanted.append(second.read_bytes()[PAGE_SIZE : 2 * PAGE_SIZE])
    pages = np.frombuffer(b"".join(wanted), np.uint8).reshape(-1, PAGE_SIZE)
    assert pages_of_files(pages, [first, second]) == [
        "one.bin at page 500", "", "one.bin at page 600", "two.bin at page 1"
    ]  # fmt: skip
    assert pages_of_files(pages[:0], [first]) == []


def test_files_that_cannot_be_compared(tmp_path: Path) -> None:
    page = np.zeros((1, PAGE_SIZE), np.uint8)
    for path, words in ((tmp_path / "none", "cannot be read"), (tmp_path, "regular file")):
        with pytest.raises(ImageError, match=words):
            pages_of_files(page, [path])
