"""memshr demo."""

from __future__ import annotations

import contextlib
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import click

from memshr.cli.options import as_json, print_json
from memshr.cli.running import exit_with, run_session
from memshr.embedded import EmbeddedHypervisor
from memshr.errors import BackendError, InvariantError
from memshr.images.capture import capture_process
from memshr.opening.images import open_images
from memshr.render.sharing_text import print_report
from memshr.render.wording import mib
from memshr.types import Gfn, PageRef

_LIMIT_BYTES = 1 << 30
_READY = "ready"
_WAIT = f"\nimport sys\nprint({_READY!r}, flush=True)\nsys.stdin.read()\n"

WORKERS = {
    "json": "import json\nrows = [json.loads(json.dumps({'id': i, 'name': f'user {i}'})) for i in range(40_000)]",
    "sqlite": (
        "import sqlite3\ndb = sqlite3.connect(':memory:')\ndb.execute('create table t (id integer, name text)')\n"
        "db.executemany('insert into t values (?, ?)', ((i, f'user {i}') for i in range(60_000)))"
    ),
    "numpy": "import numpy\nmatrix = numpy.arange(1_000_000.0).reshape(1000, 1000)\ntotal = (matrix @ matrix.T).sum()",
    "text": (
        "import collections, pathlib, re, zlib\nimport this as zen\ntext = pathlib.Path(re.__file__).read_text() * 20\n"
        "words = collections.Counter(re.findall(r'\\w+', text))\npacked = zlib.compress(text.encode())"
    ),
}
"""The programs that the demo runs, each doing different work."""


@click.command(short_help="The whole story on real memory, in seconds.")
@as_json
def demo(as_json: bool) -> None:
    """The whole story on real memory, without any privileges, in less than a minute.

    Starts four programs that do different work, captures their memory, makes each a domain, shares first within each
    domain and then among all of them, writes into a shared page, audits, and says what it saved.
    """
    say = (lambda _text: None) if as_json else click.echo
    with tempfile.TemporaryDirectory(prefix="memshr-demo-") as folder:
        say("1. Four programs do some work, and their memory is captured, each into an ELF core:")
        paths = []
        with _running(WORKERS) as processes:
            for name, pid in processes.items():
                result = capture_process(pid, Path(folder) / f"{name}.core", limit_bytes=_LIMIT_BYTES)
                say(f"   process {pid} ({name}): {result.pages:,} pages, {mib(result.pages)} MiB")
                paths.append(str(result.path))
        say("\n2. Each core becomes a domain, and shares within itself only, as is the default:")
        with open_images(paths) as hypervisor:
            alone = run_session(hypervisor, ())
        say(f"   {mib(alone.saved_pages)} MiB saved, {alone.counters.used_frames:,} frames shared.")
        say("\n3. The same in one trust group (--group all):\n")
        with open_images(paths) as hypervisor:
            together = run_session(hypervisor, ("all",))
            if not as_json:
                print_report(together, verb="saved")
            say("\n4. A guest writes into a page that it shares with others:")
            for line in _write_into_a_shared_page(hypervisor):
                say(f"   {line}")
            audited = hypervisor.audit()
        say(f"   Audit after the write: {len(audited.findings)} findings.")
    if as_json:
        print_json({"alone": alone.to_dict(), "together": together.to_dict()})
    say("\nNext, on memory of your own:")
    say("   memshr capture pid:N -o a.core        (or QEMU's dump-guest-memory, or gcore)")
    say("   memshr estimate a.core b.core --group all")
    exit_with(together)


@contextlib.contextmanager
def _running(programs: dict[str, str]) -> Iterator[dict[str, int]]:
    """Run Python programs until each has done its work and waits; gives their process numbers by name."""
    with contextlib.ExitStack() as stack:
        processes = {}
        for name, program in programs.items():
            command = [sys.executable, "-c", program + _WAIT]
            process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
            stack.enter_context(process)  # closes its standard input on the way out, on which it ends
            processes[name] = process
        for name, process in processes.items():
            assert process.stdout is not None
            if not any(line.strip() == _READY for line in process.stdout):  # the lines end when the program dies
                raise BackendError(f"the program {name!r} of the demo did not come up")
        yield {name: process.pid for name, process in processes.items()}


def _write_into_a_shared_page(hypervisor: EmbeddedHypervisor) -> Iterator[str]:
    writer, *others = _widely_shared_page(hypervisor)
    before = hypervisor.counters()
    contents = hypervisor.read(writer.domid, writer.gfn)
    names = hypervisor.names()
    sharers = ", ".join(sorted({names[page.domid] for page in (writer, *others)}))
    yield f"gfn {writer.gfn:#x} of {names[writer.domid]} is on one frame with {len(others)} other pages ({sharers})."
    hypervisor.write(writer.domid, writer.gfn, b"written by one guest")
    after = hypervisor.counters()
    if hypervisor.read(writer.domid, writer.gfn)[:20] != b"written by one guest":
        raise InvariantError("the writer does not read its own write (I7)")
    if any(hypervisor.read(page.domid, page.gfn) != contents for page in others):
        raise InvariantError("somebody else reads the write (I7)")
    yield "The writer reads what it wrote, in a frame of its own; all the others read what they read before."
    yield f"Pages freed by sharing: {before.freed_pages:,} before the write, {after.freed_pages:,} after it."


def _widely_shared_page(hypervisor: EmbeddedHypervisor) -> list[PageRef]:
    """The pages on one frame, of as many domains as can be found among the first domain's pages."""
    info = hypervisor.domains()[0]
    best: list[PageRef] = []
    for first, count in hypervisor.populated_ranges(info.domid).tolist():
        for gfn in range(first, first + count):
            sharers = hypervisor.sharers(info.domid, Gfn(gfn))
            if len({page.domid for page in sharers}) > len({page.domid for page in best}):
                best = sorted(sharers, key=lambda page: page != PageRef(info.domid, Gfn(gfn)))
    return best
