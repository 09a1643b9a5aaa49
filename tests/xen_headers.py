"""Xen's headers and libraries as a part that a test machine may lack.

On Debian 12: libxenmisc4.17, libxen-dev and gcc. To test against another release, unpack its packages somewhere, point
XEN_INCLUDE at the headers and LD_LIBRARY_PATH at the library.
"""

import os
import re
import shutil
from pathlib import Path

import pytest

from memshr.xen import libxc
from memshr.xen.libxc import Release

INCLUDE = Path(os.environ.get("XEN_INCLUDE", "/usr/include"))
_RELEASE_OF_DOMCTL = {0x12: Release(4, 14), 0x14: Release(4, 16), 0x15: Release(4, 17), 0x17: Release(4, 20)}
# XEN_DOMCTL_INTERFACE_VERSION; 4.19 has that of 4.20, and the same structures.


def release_of_headers() -> Release:
    """The release whose headers are here, with its library.

    Without them the test is skipped, and says what is missing; MEMSHR_REQUIRE=xen-headers makes that a failure.
    """
    domctl = INCLUDE / "xen" / "domctl.h"
    if domctl.exists() and shutil.which("gcc"):
        version = re.search(r"XEN_DOMCTL_INTERFACE_VERSION (0x\w+)", domctl.read_text())
        release = _RELEASE_OF_DOMCTL.get(int(version[1], 16)) if version else None
        if release is not None and libxc.load(release) is not None:
            return release
    missing = "Xen's headers with their library, and gcc (Debian: libxen-dev libxenmisc4.17 gcc)"
    if "xen-headers" in os.environ.get("MEMSHR_REQUIRE", "").split(","):
        pytest.fail(f"MEMSHR_REQUIRE has xen-headers, and this machine lacks {missing}")
    pytest.skip(f"this machine lacks {missing}")
