"""memshr shares identical memory pages between virtual machines, and proves that it did so safely.

``memshr.types`` and ``memshr.errors`` hold the words. ``memshr.hypervisor`` is the seam: Xen's calls as a Protocol.
Three mechanisms stand behind it: ``memshr.embedded`` (the reference hypervisor), ``memshr.qemu`` and ``memshr.xen``.
``memshr.images`` reads memory images. ``memshr.sharing`` shares, ``memshr.estimation`` says beforehand what that would
save, ``memshr.render`` shows the results. ``memshr.opening`` opens what a user names, ``memshr.cli`` is the command
line. ``memshr.testing`` is the contract kit that every mechanism must pass. ARCHITECTURE.md draws the picture.

Programs and notebooks call ``memshr.estimate`` (docs/python.md).
"""

from typing import TYPE_CHECKING, Any

from memshr.errors import MemshrError

if TYPE_CHECKING:
    from memshr.estimation.estimate import estimate
    from memshr.hypervisor import Capability, Hypervisor

__all__ = ["Capability", "Hypervisor", "MemshrError", "estimate"]


def __getattr__(name: str) -> Any:
    # When it is first asked for: ``estimate`` imports every mechanism, and most who import memshr want one thing of it;
    # ``hypervisor`` imports numpy, which the injector (memshr.qemu) has no time for.
    if name == "estimate":
        from memshr.estimation.estimate import estimate  # noqa: PLC0415  # the reason is above

        return estimate
    if name in {"Capability", "Hypervisor"}:
        from memshr import hypervisor  # noqa: PLC0415  # the reason is above

        return getattr(hypervisor, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
