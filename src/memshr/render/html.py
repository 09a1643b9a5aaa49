"""The estimate as one self-contained HTML page, for people who have read nothing else about memshr."""

from __future__ import annotations

import os
from types import ModuleType

from memshr.errors import UnsupportedError
from memshr.estimation.result import Estimate
from memshr.render.files import WriteFile, write_file


def check_html_libraries() -> None:
    """Make sure that a page can be made, before an estimate that takes its time.

    :raises UnsupportedError: the libraries of the extra ``report`` are not installed.
    """
    _html_page()


def load_html_libraries() -> None:
    """Have the libraries load all that they would load later, in a process that may not be able to read it then.

    :raises UnsupportedError: the libraries of the extra ``report`` are not installed.
    """
    _html_page().load_libraries()


def estimate_html(estimate: Estimate) -> str:
    """The page: one text that loads nothing else, to be read on a screen, a telephone or paper, without JavaScript too.

    Takes a second or so, most of it to start Vega. The page has about 40 KB, and 300 KB with 40 domains.

    :raises UnsupportedError: the libraries of the extra ``report`` are not installed.
    """
    page: str = _html_page().page(estimate)
    return page


def write_html(estimate: Estimate, path: str | os.PathLike[str], write: WriteFile = write_file) -> None:
    """Write ``estimate_html`` into a file.

    :param write: what writes it.
    :raises UnsupportedError: the libraries of the extra ``report`` are not installed.
    :raises MemshrError: it cannot be written there; what was there is unchanged.
    """
    write(path, estimate_html(estimate))


def _html_page() -> ModuleType:
    try:
        from memshr.render import html_page  # noqa: PLC0415  # its libraries are an optional extra
    except ImportError as error:
        raise UnsupportedError(
            f"an HTML report needs the Python package {error.name}", remedy="pip install 'memshr[report]'"
        ) from error
    return html_page
