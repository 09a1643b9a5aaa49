"""KSM at work for a while, and everything as it was afterwards, whatever happens to us.

KSM has one set of settings for the whole host. They are put back by a small process of their own that waits for the end
of a pipe: at the end of the ``with``, after Ctrl-C, or when this process is killed.
"""

import fcntl
import os
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from guests.kit import MissingPartError, need_root

SETTINGS = Path("/sys/kernel/mm/ksm")
FULL_SPEED = {"advisor_mode": "none", "pages_to_scan": "100000", "sleep_millisecs": "0", "smart_scan": "0", "run": "1"}
"""in this order: the advisor would choose pages_to_scan; smart_scan leaves out what was not equal before"""

UNMERGE = "2"
"""written to ``run``: stop, and give every page that was merged a frame of its own"""

# Arguments: pairs of a file and what to write into it. Older kernels lack some of the files.
RESTORE = """
trap '' INT TERM HUP
read -r _
while [ $# -gt 0 ]; do
    echo "$2" >"$1"
    shift 2
done
"""


@contextmanager
def ksm_at_work() -> Iterator[None]:
    """KSM scans as fast as it can. One such ``with`` on a host at a time: the others wait.

    Every guest whose RAM is mergeable has its equal pages merged meanwhile, whoever started it. If nothing was merged
    before, nothing is afterwards.

    :raises MissingPartError: this kernel has no KSM, or we are not root.
    """
    need_root("KSM's settings")
    if not SETTINGS.exists():
        raise MissingPartError("this kernel has no KSM (CONFIG_KSM)")
    folder = os.open(SETTINGS, os.O_RDONLY | os.O_DIRECTORY)
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        names = [name for name in FULL_SPEED if (SETTINGS / name).exists()]
        before = {name: _chosen((SETTINGS / name).read_text()) for name in names}
        undo = [] if int((SETTINGS / "pages_shared").read_text()) else [("run", UNMERGE)]
        # The advisor after what it chooses, which cannot be written while it is at work.
        undo += [(name, before[name]) for name in reversed(names) if name != "run"]
        undo.append(("run", before["run"]))
        # It has the lock, too, through its copy of the descriptor: nobody is let in before it has done its work.
        command = [
            "sh",
            "-c",
            RESTORE,
            "restore-ksm",
            *(str(word) for name, value in undo for word in (SETTINGS / name, value)),
        ]
        with subprocess.Popen(command, stdin=subprocess.PIPE, pass_fds=[folder], start_new_session=True) as restorer:
            assert restorer.stdin is not None
            try:
                for name in names:
                    (SETTINGS / name).write_text(FULL_SPEED[name])
                yield
            finally:
                restorer.stdin.close()
                restorer.wait()
    finally:
        os.close(folder)


def _chosen(text: str) -> str:
    # Of "[none] scan-time" the word in brackets; a number as it is.
    return text.partition("[")[2].partition("]")[0] or text.strip()
