"""A real Xen host, through its own libraries: the mechanism behind ``xen:``.

``open_host`` gives the seam. ``libxc`` holds every C prototype and structure, ``connection`` finds library and
hypervisor and checks both, ``mappings`` maps pages of domains to read them, ``search`` finds where they are,
``sharers`` remembers which pages are on one frame, ``ring`` is the page through which Xen asks for memory, ``names``
asks xenstore for names, ``hypervisor`` is the seam on them, and ``audit`` counts Xen's books once more from outside,
with ``bulk`` for many questions at once. ``domains`` makes a domain without memory for a question that
needs one.
"""

from memshr.xen.connection import Connection, HostFacts, connect, runs_xen
from memshr.xen.hypervisor import XenHypervisor

__all__ = ["Connection", "HostFacts", "XenHypervisor", "connect", "open_host", "runs_xen"]


def open_host() -> XenHypervisor:
    """Open the Xen host that this machine is the control domain of.

    :raises UnsupportedError: no Xen, no library, a release that is not known, a PVH dom0.
    :raises PermissionDeniedError: not root, or not the control domain.
    """
    connection = connect()
    try:
        return XenHypervisor(connection)
    except BaseException:
        connection.close()
        raise
