"""The monitor of a guest of libvirt, which holds its QMP socket: commands go through libvirt's passthrough.

libvirt keeps its own connection open and hands our commands on between its own (``virDomainQemuMonitorCommand``, and
``...WithFiles`` to hand over descriptors, which needs libvirt 8.2). It then marks the domain *tainted: custom-monitor*
until it is shut down: a note in its log and in ``virsh dominfo``, without other effect. libvirt gives the requests
their ids; what it hands back comes from QEMU and is looked at as it is on a socket.

libvirt is asked at ``LIBVIRT_DEFAULT_URI``, or at ``qemu:///system``. Its Python bindings are imported when the first
such guest is opened, and may be missing. A guest is found by the UUID of its command line, which is what that process
says of itself: that libvirt leads to that very process is seen when a descriptor that was handed over turns up in it.

Source: libvirt's ``libvirt-qemu.h`` and ``virterror.h``; observed on libvirt 9.0.
"""

from __future__ import annotations

import errno
import json
import os
import threading
from collections.abc import Callable, Mapping
from types import ModuleType
from typing import Any, TypeVar

from memshr.errors import BackendError, ConnectionLostError, PermissionDeniedError, UnsupportedError, printable
from memshr.qemu.monitor import ANSWER_DEADLINE_S, LONGEST_WORD, Monitor, parsed, returned

SYSTEM_URI = "qemu:///system"

_SECOND_SOCKET = "give the guest a second QMP socket"

Answer = TypeVar("Answer")


class LibvirtMonitor(Monitor):
    """The passthrough to one guest.

    :param name: the guest, for messages.
    :param uuid: its UUID.
    :raises UnsupportedError: libvirt's Python bindings are missing or too old.
    :raises PermissionDeniedError: libvirt does not let us in.
    :raises ConnectionLostError: libvirt does not answer, or does not know the guest.
    """

    def __init__(self, name: str, uuid: str) -> None:
        super().__init__()
        self._name = printable(name)
        self._stuck = False
        self._libvirt, self._passthrough = _bindings(name)
        self._uri = os.environ.get("LIBVIRT_DEFAULT_URI") or SYSTEM_URI
        self._connection = self._call("the connection", lambda: self._libvirt.open(self._uri))
        try:
            self._domain = self._call("a look-up", lambda: self._connection.lookupByUUIDString(uuid))
        except BaseException:
            self.close()
            raise

    def execute(
        self,
        command: str,
        arguments: Mapping[str, object] | None = None,
        *,
        descriptor: int | None = None,
        deadline_s: float | None = None,
    ) -> Any:
        if self._stuck:
            raise ConnectionLostError(
                f"libvirt at {self._uri} has left us waiting, so {command} was not sent to guest {self._name}",
                remedy="is libvirt or QEMU stopped or frozen?",
            )
        request = json.dumps({"execute": command, "arguments": arguments or {}})

        def plain() -> str:
            return str(self._passthrough.qemuMonitorCommand(self._domain, request, 0))

        def with_descriptor() -> str:
            answer, _ = self._passthrough.qemuMonitorCommandWithFiles(self._domain, request, [descriptor], 0)
            return str(answer)

        answer = self._call(command, plain if descriptor is None else with_descriptor, deadline_s)
        return returned(command, parsed(answer.encode("utf-8", "surrogatepass")))

    def _call(self, what: str, call: Callable[[], Answer], deadline_s: float | None = None) -> Answer:
        # libvirt's calls have no deadline, and no signal interrupts them: a thread of its own waits for each, and is
        # left behind if it takes too long. A daemon, for it must not hold up our end.
        answers: list[Answer] = []
        errors: list[BaseException] = []

        def wait() -> None:
            try:
                answers.append(call())
            except BaseException as error:  # handed over to the caller
                errors.append(error)

        waiting = threading.Thread(target=wait, name="memshr-libvirt", daemon=True)
        with self._waiting(ANSWER_DEADLINE_S if deadline_s is None else deadline_s) as patience_s:
            waiting.start()
            waiting.join(patience_s)
        if answers:
            return answers[0]
        if not errors:
            self._stuck = True
            raise ConnectionLostError(
                f"libvirt at {self._uri} did not answer {what} for guest {self._name} in time",
                remedy="is libvirt or QEMU stopped or frozen?",
            )
        if isinstance(errors[0], self._libvirt.libvirtError):
            raise self._translated(what, errors[0]) from errors[0]
        raise errors[0]

    def _translated(self, what: str, error: Any) -> BackendError:
        libvirt = self._libvirt
        code = error.get_error_code()
        said = printable(" ".join(str(error).split())[:LONGEST_WORD])
        no_entry = {
            libvirt.VIR_ERR_AUTH_FAILED,
            libvirt.VIR_ERR_AUTH_CANCELLED,
            libvirt.VIR_ERR_AUTH_UNAVAILABLE,
            libvirt.VIR_ERR_ACCESS_DENIED,
            libvirt.VIR_ERR_OPERATION_DENIED,
        }
        if code in no_entry or (code == libvirt.VIR_ERR_SYSTEM_ERROR and error.get_int1() == errno.EACCES):
            return PermissionDeniedError(f"libvirt at {self._uri} does not let us in: {said}", remedy="run as root")
        if code == libvirt.VIR_ERR_NO_DOMAIN:
            return ConnectionLostError(
                f"libvirt at {self._uri} does not know guest {self._name}",
                remedy="name its own libvirt with LIBVIRT_DEFAULT_URI, such as "
                "qemu+unix:///session?socket=/run/user/1000/libvirt/libvirt-sock",
            )
        if code == libvirt.VIR_ERR_OPERATION_TIMEOUT:
            return ConnectionLostError(
                f"libvirt is busy with guest {self._name}: {said}",
                remedy="wait until its migration, backup or save has ended",
            )
        if code in {libvirt.VIR_ERR_NO_SUPPORT, libvirt.VIR_ERR_OPERATION_UNSUPPORTED}:
            return UnsupportedError(
                f"libvirt at {self._uri} cannot do {what}: {said}",
                remedy=f"use libvirt 8.2 or later, or {_SECOND_SOCKET}",
            )
        return ConnectionLostError(
            f"libvirt at {self._uri} failed at {what} for guest {self._name}: {said}",
            remedy="do libvirtd (or virtqemud) and the guest run? LIBVIRT_DEFAULT_URI names another libvirt",
        )

    def close(self) -> None:
        """Hang up."""
        if self._stuck:  # so would this be
            return
        try:
            self._call("the end of the connection", self._connection.close)
        except ConnectionLostError:  # it is gone, which is what was asked for
            return


def _bindings(name: str) -> tuple[ModuleType, ModuleType]:
    try:
        import libvirt  # noqa: PLC0415  # optional
        import libvirt_qemu  # noqa: PLC0415  # optional
    except ImportError as error:
        raise UnsupportedError(
            f"libvirt holds the QMP socket of guest {name}, and its Python bindings are missing ({error})",
            remedy=f"pip install 'memshr[libvirt]' (apt-get install python3-libvirt), or {_SECOND_SOCKET}",
        ) from error
    if not hasattr(libvirt_qemu, "qemuMonitorCommandWithFiles"):
        raise UnsupportedError(
            "libvirt's Python bindings are too old to hand over descriptors",
            remedy=f"use libvirt-python 8.2 or later: pip install 'memshr[libvirt]', or {_SECOND_SOCKET}",
        )
    # It prints every error to standard error unless somebody takes them.
    libvirt.registerErrorHandler(lambda context, error: None, None)
    return libvirt, libvirt_qemu
