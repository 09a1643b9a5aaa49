"""When a command gives root's rights up: as soon as all that it needs them for is open."""

from __future__ import annotations

import contextlib
import importlib
import logging
import os
import resource
import tempfile
from collections.abc import Iterator, Sequence

from memshr import opened, privilege
from memshr.errors import MemshrError, printable
from memshr.estimation.guesses import keep_file_open
from memshr.images import keep_image_open
from memshr.render.files import FileWriter, WriteFile, write_file
from memshr.render.html import load_html_libraries

_log = logging.getLogger(__name__)

_LOADED_BEFORE = (
    *(
        "memshr.opening.hosts",
        "memshr.opening.sources",
        "memshr.embedded",
        "memshr.qemu.attachment",
        "memshr.images.process",
    ),
    *("numpy.ma", "numpy.random", "rich._emoji_codes"),
)
"""What commands import when they need it. ``nobody`` may not be able to read where memshr is installed."""


@contextlib.contextmanager
def given_up(
    *,
    images: Sequence[str | os.PathLike[str]] = (),
    compared: Sequence[str | os.PathLike[str]] = (),
    estimates: Sequence[str | os.PathLike[str]] = (),
    outputs: Sequence[str | os.PathLike[str] | None] = (),
    html: bool = False,
) -> Iterator[WriteFile]:
    """Open what is named here, and give root's rights up; without such rights nothing is done.

    :param images: for ``open_image``. :param compared: for ``pages_of_files``. :param estimates: for ``read_estimate``.
    :param outputs: files that can be written afterwards; None: none.
    :param html: a page is among them.
    :returns: what writes them.
    :raises MemshrError: a file cannot be opened, or the rights cannot be given up.
    """
    if not privilege.must_drop():
        yield write_file
        return
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    with contextlib.ExitStack() as stack:
        for image in images:
            keep_image_open(image)
        for path in compared:
            keep_file_open(path)
        for path in estimates:
            _hold(path)
        writers = [(os.fspath(path), stack.enter_context(FileWriter(path))) for path in outputs if path is not None]
        for module in _LOADED_BEFORE:
            importlib.import_module(module)
        if html:
            load_html_libraries()
        printable("\x1b")  # loads a codec
        tempfile.gettempdir()  # root may write everywhere, so this is the folder that TMPDIR names
        privilege.drop()
        _log.info("rights given up: this process is user %d now", os.geteuid())

        def write(path: str | os.PathLike[str], text: str) -> None:
            # Two reports may have one path: each writer writes once.
            at = [name for name, _ in writers].index(os.fspath(path))
            writers.pop(at)[1].write(text)

        yield write


def _hold(path: str | os.PathLike[str]) -> None:
    try:
        opened.keep(path, os.open(path, os.O_RDONLY | os.O_CLOEXEC))
    except OSError as error:
        name = os.fspath(path) if os.fspath(path).isprintable() else repr(os.fspath(path))
        raise MemshrError(f"{name}: cannot be read: {error.strerror}") from error
