"""A real process with memory of known contents, which does what it is told line by line."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager

_PROGRAM = """
import ctypes, mmap, os, sys
import numpy as np

PAGE = 4096
libc = ctypes.CDLL(None, use_errno=True)
# SAFETY: addresses of mappings that this process made itself and keeps to the end, called with the types given here.
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
kept = []

def words(mapping, first, count):
    pages = np.frombuffer(mapping, dtype=np.uint64).reshape(-1, PAGE // 8)
    pages[:count] = np.arange(first, first + count, dtype=np.uint64)[:, None]
    return pages.ctypes.data

def anonymous(pages, first, count, flags=mmap.MAP_PRIVATE):
    mapping = mmap.mmap(-1, pages * PAGE, flags=flags | mmap.MAP_ANONYMOUS)
    kept.append(mapping)
    # Small pages only: a huge page would make untouched neighbours of touched pages present.
    if flags == mmap.MAP_PRIVATE:
        mapping.madvise(mmap.MADV_NOHUGEPAGE)
    return words(mapping, first, count)

def shared(pages, first):
    return anonymous(pages, first, pages, mmap.MAP_SHARED)

def every_other(pages, first):
    address = anonymous(pages, 0, 0)
    array = np.frombuffer(kept[-1], dtype=np.uint64).reshape(pages, PAGE // 8)
    array[::2] = np.arange(first, first + pages, 2, dtype=np.uint64)[:, None]
    return address

def private_file(path):
    with open(path, 'rb') as file:
        mapping = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    kept.append(mapping)
    return np.frombuffer(mapping, dtype=np.uint8).ctypes.data

def unreadable(address, pages):
    return libc.mprotect(address, pages * PAGE, 0)

def unmap(address, pages):
    return libc.munmap(address, pages * PAGE)

def forbid_looking():
    PR_SET_DUMPABLE = 4
    return libc.prctl(PR_SET_DUMPABLE, 0, 0, 0, 0)

def run_other_program():
    os.execv('/bin/sh', ['sh', '-c', 'echo 1; read line'])

for line in sys.stdin:
    print(eval(line), flush=True)
"""


class Child:
    """The running process; ``ask`` calls one of the functions of its program and gives what it returns."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self.process = process
        self.pid = process.pid

    def ask(self, call: str) -> int:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(call + "\n")
        self.process.stdin.flush()
        return int(self.process.stdout.readline())

    def kill(self) -> None:
        """End it, and reap it: afterwards its number stands for no process."""
        self.process.kill()
        self.process.communicate()


@contextmanager
def child() -> Iterator[Child]:
    process = subprocess.Popen(
        [sys.executable, "-c", _PROGRAM], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    running = Child(process)
    try:
        assert running.ask("12345") == 12345
        yield running
    finally:
        running.kill()
