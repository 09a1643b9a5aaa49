"""The names of domains, from xenstore: the hypervisor itself knows numbers only."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterable

_PATIENCE_S = 2.0


class Names:
    """Names of domains by domid, read through ``xenstore-read`` where it is at hand.

    libxenstore would wait for ever where no xenstored answers; a process can be given up on. A name that was found
    is kept; a domain without one, or on a host without xenstore, is called ``dom<domid>``.
    """

    def __init__(self, command: str | None = None) -> None:
        self._command = shutil.which("xenstore-read") if command is None else command
        self._names: dict[int, str] = {}

    def __getitem__(self, domid: int) -> str:
        if domid not in self._names and (name := self._read(domid)):
            self._names[domid] = name
        return self._names.get(domid, f"dom{domid}")

    def forget_all_but(self, domids: Iterable[int]) -> None:
        """Domids are used again: keep only the names of the domains that there are."""
        alive = set(domids)
        self._names = {domid: name for domid, name in self._names.items() if domid in alive}

    def _read(self, domid: int) -> str:
        if not self._command:
            return ""
        try:
            done = subprocess.run(
                [self._command, f"/local/domain/{domid}/name"],
                stdin=subprocess.DEVNULL,
                capture_output=True,
                timeout=_PATIENCE_S,
                check=False,
            )
        except (OSError, subprocess.TimeoutExpired):
            self._command = None  # nobody answers: do not wait again for every domain
            return ""
        name = done.stdout.decode(errors="replace").strip() if done.returncode == 0 else ""
        return name if name.isprintable() else ""
