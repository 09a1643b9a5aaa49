"""Settings of the kernel's own workers for a while, KSM's above all, and everything as it was afterwards.

They are settings of the whole host. A small process of its own puts them back. It waits for the end of a pipe: at the
end of the ``with``, after Ctrl-C, or when this process is killed.
"""

import fcntl
import os
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

from guests.kit import MissingPartError, need_root

SETTINGS = Path("/sys/kernel/mm/ksm")
RUN = SETTINGS / "run"
FULL_SPEED = {"advisor_mode": "none", "pages_to_scan": "100000", "sleep_millisecs": "0", "smart_scan": "0"}
"""in this order: the advisor would choose pages_to_scan; smart_scan leaves out what was not equal before"""

UNMERGE = "2"
"""written to ``run``: stop, and give every page that was merged a frame of its own"""

# Arguments: pairs of a file and what to write into it.
RESTORE = """
trap '' INT TERM HUP
read -r _
while [ $# -gt 0 ]; do
    echo "$2" >"$1"
    shift 2
done
"""


@contextmanager
def kernel_settings(
    values: Mapping[Path, str], *, first_undo: Sequence[tuple[Path, str]] = (), lock: int | None = None
) -> Iterator[None]:
    """Write files of sysfs, in this order; what they said before is written back at the end, the last file first.

    :param values: what to write into each file. A file that this kernel does not have is left out.
    :param first_undo: what is written at the end before all else.
    :param lock: a descriptor that stays open until everything is as it was, also if this process is killed.
    """
    known = [path for path in values if path.exists()]
    undo = [*first_undo, *((path, _chosen(path.read_text())) for path in reversed(known))]
    command = ["sh", "-c", RESTORE, "restore-settings", *(str(word) for pair in undo for word in pair)]
    kept = () if lock is None else (lock,)
    with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=kept, start_new_session=True) as restorer:
        assert restorer.stdin is not None
        try:
            for path in known:
                path.write_text(values[path])
            yield
        finally:
            restorer.stdin.close()
            restorer.wait()


@contextmanager
def ksm_at_work(*, zero_pages: bool = False, run: bool = True) -> Iterator[Path]:
    """KSM scans as fast as it can. One such ``with`` on a host at a time: the others wait.

    Every process whose memory is mergeable has its equal pages merged meanwhile, whoever started it. If nothing was
    merged before, nothing is afterwards. Yields KSM's switch, ``/sys/kernel/mm/ksm/run``.

    :param zero_pages: whether pages of zeros become the kernel's zero page.
    :param run: False: KSM does nothing before its switch is written 1.
    :raises MissingPartError: this kernel has no KSM, or we are not root.
    """
    need_root("KSM's settings")
    if not SETTINGS.exists():
        raise MissingPartError("this kernel has no KSM (CONFIG_KSM)")
    folder = os.open(SETTINGS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        values = {SETTINGS / name: value for name, value in FULL_SPEED.items()}
        values[SETTINGS / "use_zero_pages"] = str(int(zero_pages))
        # The switch comes first when all is put back, because a page may be merged until then.
        values[RUN] = str(int(run))
        unmerge = [] if int((SETTINGS / "pages_sharing").read_text()) else [(RUN, UNMERGE)]
        with kernel_settings(values, first_undo=unmerge, lock=folder):
            yield RUN
    finally:
        os.close(folder)


def _chosen(text: str) -> str:
    # Of "[none] scan-time" the word in brackets; a number as it is.
    return text.partition("[")[2].partition("]")[0] or text.strip()
