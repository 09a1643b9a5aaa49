"""memshr shares identical memory pages between virtual machines, and proves that it did so safely.

``memshr.types`` and ``memshr.errors`` hold the words, ``memshr.hypervisor`` the seam (Xen's calls as a Protocol),
``memshr.embedded`` the reference hypervisor behind it, ``memshr.images`` the memory-image formats, ``memshr.sharing``
the policy above it, ``memshr.testing`` the contract kit that every mechanism must pass, ``memshr.backends`` opens a
mechanism by name and ``memshr.cli`` is the command line. ARCHITECTURE.md draws the picture.
"""

from memshr.errors import MemshrError
from memshr.hypervisor import Capability, Hypervisor

__all__ = ["Capability", "Hypervisor", "MemshrError"]
