"""memshr shares identical memory pages between virtual machines, and proves that it did so safely.

``memshr.types`` and ``memshr.errors`` hold the words, ``memshr.hypervisor`` the seam (Xen's calls as a Protocol),
``memshr.embedded`` the reference hypervisor behind it, ``memshr.images`` the memory-image formats, ``memshr.sharing``
the policy above it, ``memshr.report`` what sharing would save, ``memshr.testing`` the contract kit that every mechanism
must pass, ``memshr.backends`` opens a mechanism by name and ``memshr.cli`` is the command line. ARCHITECTURE.md draws
the picture. ``memshr.estimate`` is the call for programs and notebooks (docs/python.md).
"""

from typing import TYPE_CHECKING, Any

from memshr.errors import MemshrError

if TYPE_CHECKING:
    from memshr.estimates import estimate
    from memshr.hypervisor import Capability, Hypervisor

__all__ = ["Capability", "Hypervisor", "MemshrError", "estimate"]


def __getattr__(name: str) -> Any:
    # When it is first asked for: ``estimate`` imports every mechanism, and most who import memshr want one thing of it;
    # ``hypervisor`` imports numpy, which the injector (memshr.qemu) has no time for.
    if name == "estimate":
        from memshr.estimates import estimate  # noqa: PLC0415  # the reason is above

        return estimate
    if name in {"Capability", "Hypervisor"}:
        from memshr import hypervisor  # noqa: PLC0415  # the reason is above

        return getattr(hypervisor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
