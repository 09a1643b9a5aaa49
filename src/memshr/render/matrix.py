"""Who has how much in common with whom, as CSV for spreadsheets and scripts."""

from __future__ import annotations

import csv
import io
import os

from memshr.estimation.result import Estimate
from memshr.render.files import WriteFile, write_file
from memshr.render.wording import printable

COLUMNS = ("domid", "domain", "other_domid", "other_domain", "group", "may_share", "contents", "pages")


def matrix_csv(estimate: Estimate) -> str:
    """The pairs of an estimate as CSV: a head, then one line for each two domains that have something in common.

    ``contents`` and ``pages`` are those of PairEstimate, in pages; ``group`` is empty and ``may_share`` is ``no`` for
    domains of different trust groups. Names that a spreadsheet would take for a formula have an apostrophe before them;
    control characters are escapes.
    """
    text = io.StringIO(newline="")
    lines = csv.writer(text, lineterminator="\n")
    lines.writerow(COLUMNS)
    for pair in estimate.pairs:
        (one, other), (one_name, other_name) = pair.domids, pair.names
        group, may_share = ("", "no") if pair.group is None else (_harmless(pair.group), "yes")
        lines.writerow(
            (one, _harmless(one_name), other, _harmless(other_name), group, may_share, pair.contents, pair.pages)
        )
    return text.getvalue()


def write_csv(estimate: Estimate, path: str | os.PathLike[str], write: WriteFile = write_file) -> None:
    """Write ``matrix_csv`` into a file.

    :param write: what writes it.
    :raises MemshrError: it cannot be written there; what was there is unchanged.
    """
    write(path, matrix_csv(estimate))


def _harmless(name: str) -> str:
    # OWASP, "CSV Injection": cells that begin so are formulas for Excel, LibreOffice and others.
    shown = printable(name)
    return f"'{shown}" if shown.startswith(("=", "+", "-", "@", "'")) else shown
