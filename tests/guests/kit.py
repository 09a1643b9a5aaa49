"""What test guests are made of: the QEMU of this machine, a guest kernel, and programs that are built here.

Built files are kept in the cache folder (``$MEMSHR_CACHE``, else ``~/.cache/memshr``) under the hash of their inputs,
so that a change of an input builds a new one and a second session builds nothing.
"""

import hashlib
import os
import random
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

PROGRAMS = Path(__file__).with_name("programs")
FETCH_KERNEL = Path(__file__).with_name("fetch-kernel")

BLOBS = 4
BLOB_BYTES = 1 << 20


class MissingPartError(Exception):
    """Something that a guest needs is not on this machine; the text says what, and how to get it."""


@dataclass(frozen=True, slots=True)
class LinuxKit:
    """The parts of a Linux guest."""

    qemu: Path
    kernel: Path
    initramfs: Path


def cache_folder() -> Path:
    """Where fetched kernels and built guests are kept."""
    if named := os.environ.get("MEMSHR_CACHE"):
        return Path(named)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "memshr"


def find_program(name: str, package: str) -> Path:
    """The path of an installed program.

    :raises MissingPartError: it is not installed.
    """
    found = shutil.which(name)
    if found is None:
        raise MissingPartError(f"{name} is not installed; apt-get install {package}")
    return Path(found)


def find_qemu() -> Path:
    """The QEMU that runs x86-64 guests.

    :raises MissingPartError: it is not installed.
    """
    return find_program("qemu-system-x86_64", "qemu-system-x86")


def find_kernel() -> tuple[Path, Path | None]:
    """A Linux kernel image for guests and the folder of its modules, if one is there.

    The newest in the cache folder (fetch-kernel puts it there), else the newest readable one of this machine.

    :raises MissingPartError: there is neither.
    """
    cached = sorted(cache_folder().glob("kernel/*/vmlinuz"), key=lambda path: path.stat().st_mtime)
    if cached:
        return cached[-1], cached[-1].with_name("modules")
    installed = [path for path in Path("/boot").glob("vmlinuz-*") if os.access(path, os.R_OK)]
    if installed:
        return max(installed, key=lambda path: path.stat().st_mtime), None
    raise MissingPartError(f"no guest kernel in {cache_folder()} and none readable in /boot; run {FETCH_KERNEL}")


def linux_kit() -> LinuxKit:
    """Everything that a Linux guest needs, built if it has to be.

    :raises MissingPartError: a program or the kernel is missing.
    """
    qemu = find_qemu()
    kernel, modules = find_kernel()
    return LinuxKit(qemu, kernel, build_initramfs(modules))


def build_initramfs(modules: Path | None) -> Path:
    """The file system of the Linux guests: busybox, the programs of this package, files to fill memory with.

    :param modules: folder of kernel modules, loaded in the order of their names; None if the kernel has all built in.
    :raises MissingPartError: busybox, cpio, or a compiler that links statically is missing.
    """
    busybox = find_program("busybox", "busybox-static")
    find_program("cpio", "cpio")
    module_files = sorted(modules.glob("*.ko")) if modules else []
    inputs = [Path(__file__), busybox, *module_files, *(PROGRAMS / name for name in ("init", "files", "checker.c"))]
    built = cache_folder() / f"initramfs-{_digest(inputs)}.cpio"
    if built.exists():
        return built

    with _replacing(built) as unfinished, tempfile.TemporaryDirectory(prefix="memshr-initramfs-") as name:
        root = Path(name)
        for folder in ("bin", "blobs", "modules"):
            (root / folder).mkdir()
        shutil.copy(busybox, root / "bin/busybox")
        shutil.copy(PROGRAMS / "init", root / "init")
        shutil.copy(PROGRAMS / "files", root / "bin/files")
        for file in (root / "init", root / "bin/files", root / "bin/busybox"):
            file.chmod(0o755)
        compile_c([PROGRAMS / "checker.c", "-static", "-O2"], root / "bin/checker")
        for module in module_files:
            shutil.copy(module, root / "modules")
        for number in range(BLOBS):
            blob = random.Random(number).randbytes(BLOB_BYTES)
            (root / f"blobs/{number}").write_bytes(blob)
            (root / f"blobs/{number}.md5").write_text(hashlib.md5(blob).hexdigest() + "\n")
        names = "\n".join(sorted(str(path.relative_to(root)) for path in root.rglob("*")))
        with unfinished.open("wb") as archive:
            command = ["cpio", "--quiet", "--create", "--format=newc", "--owner=0:0", "--reproducible"]
            subprocess.run(command, input=names.encode(), stdout=archive, cwd=root, check=True)
    return built


def compile_c(arguments: list[str | Path], output: Path) -> None:
    """Compile with the C compiler of this machine; every warning is an error.

    :raises MissingPartError: there is no compiler, or it cannot make this kind of program.
    """
    find_program("gcc", "gcc libc6-dev")
    command = ["gcc", "-Wall", "-Wextra", "-Werror", *arguments, "-o", output]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MissingPartError(f"gcc cannot build {output.name} (apt-get install gcc libc6-dev): {done.stderr.strip()}")


def _digest(inputs: list[Path]) -> str:
    digest = hashlib.sha256()
    for path in inputs:
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return digest.hexdigest()[:16]


@contextmanager
def _replacing(final: Path) -> Iterator[Path]:
    # Two sessions may build the same file at once: each writes its own, and the rename is atomic.
    final.parent.mkdir(parents=True, exist_ok=True)
    unfinished = final.with_name(f".{final.name}.{os.getpid()}")
    try:
        yield unfinished
        unfinished.replace(final)
    finally:
        unfinished.unlink(missing_ok=True)
