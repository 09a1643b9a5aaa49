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
DRIVE_BLOCKS = 16384


class MissingPartError(Exception):
    """Something that a guest needs is not on this machine; the text says what, and how to get it.

    :param part: what a test run calls it that must not go without: ``qemu``, ``kvm`` or ``hugepages``.
    """

    def __init__(self, message: str, part: str = "qemu") -> None:
        super().__init__(message)
        self.part = part


def need_root(what: str) -> None:
    """Make sure of being root.

    :param what: what only root can have.
    :raises MissingPartError: this is another user.
    """
    if os.geteuid() != 0:
        raise MissingPartError(f"only root can have {what}: run the tests as root")


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
    if b"/ld-linux" in busybox.read_bytes():
        raise MissingPartError(f"{busybox} is linked dynamically; apt-get install busybox-static")
    find_program("cpio", "cpio")
    module_files = sorted(modules.glob("*.ko")) if modules else []
    built = _cached("initramfs", [busybox, *module_files, *PROGRAMS.iterdir()])
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
        for program in ("checker", "reader"):
            compile_c([PROGRAMS / f"{program}.c", "-static", "-O2"], root / f"bin/{program}")
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


def build_drive() -> Path:
    """A drive of DRIVE_BLOCKS blocks of 4 KiB with the contents that the program ``reader`` of a guest expects.

    :raises MissingPartError: there is no compiler.
    """
    built = _cached("drive", [PROGRAMS / "reader.c", PROGRAMS / "pattern.h"])
    if built.exists():
        return built
    with _replacing(built) as unfinished, tempfile.TemporaryDirectory(prefix="memshr-drive-") as name:
        reader = Path(name) / "reader"
        compile_c([PROGRAMS / "reader.c", "-O2"], reader)
        subprocess.run([reader, "--make", unfinished, str(DRIVE_BLOCKS)], check=True)
    return built


def build_freestanding() -> Path:
    """The 32-bit guest without an operating system, a multiboot kernel.

    :raises MissingPartError: there is no compiler, or it cannot make 32-bit code.
    """
    built = _cached("freestanding", [PROGRAMS / "freestanding.c"])
    if built.exists():
        return built
    # No C library, no start files, no instructions that need an operating system to switch them on.
    plain = "-m32 -O2 -ffreestanding -nostdlib -static -fno-pie -no-pie -mgeneral-regs-only -fno-stack-protector"
    layout = (
        "-fcf-protection=none -fno-asynchronous-unwind-tables -Wl,-Ttext=0x100000,-z,noseparate-code,--build-id=none"
    )
    with _replacing(built) as unfinished:
        compile_c([PROGRAMS / "freestanding.c", *plain.split(), *layout.split()], unfinished)
    return built


def build_hostile() -> Path:
    """The program of a hostile QEMU (guests.hostile): linked statically, so that it also runs in a root of its own.

    :raises MissingPartError: there is no compiler that links statically.
    """
    return _built_program("hostile")


def build_canary() -> Path:
    """A program that does nothing for ever: what a hostile QEMU turns into.

    :raises MissingPartError: there is no compiler that links statically.
    """
    return _built_program("canary")


def _built_program(name: str) -> Path:
    built = _cached(name, [PROGRAMS / f"{name}.c"])
    if not built.exists():
        with _replacing(built) as unfinished:
            compile_c([PROGRAMS / f"{name}.c", "-static", "-O2", "-pthread"], unfinished)
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


def find_kvm() -> None:
    """See whether QEMU can make a KVM virtual machine here.

    :raises MissingPartError: it cannot; the text has its words.
    """
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        remedy = "run on a KVM host, as root or in the group kvm"
        raise MissingPartError(f"no /dev/kvm that this user may open; {remedy}", part="kvm")
    command = [str(find_qemu()), "-accel", "kvm", "-machine", "none", "-display", "none", "-monitor", "stdio"]
    done = subprocess.run(command, input="quit\n", capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise MissingPartError(f"QEMU cannot use /dev/kvm: {done.stderr.strip()}", part="kvm")


def _cached(name: str, inputs: list[Path]) -> Path:
    # Where a file that is built from these inputs (and by this module) is kept.
    digest = hashlib.sha256()
    for path in sorted([*inputs, Path(__file__)]):
        digest.update(path.name.encode() + b"\0" + hashlib.sha256(path.read_bytes()).digest())
    return cache_folder() / f"{name}-{digest.hexdigest()[:16]}"


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
