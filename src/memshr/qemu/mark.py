"""The mark on memory files that a memshr made: an extended attribute that only root of the host can set or see.

A QEMU can make memory files of any name, mode and owner that it has the rights to, and map them where ours would be.
It cannot set ``trusted.*`` attributes: that takes CAP_SYS_ADMIN in the first user namespace, which a QEMU of uid 0 in a
container, or one that gave its capabilities up, has not. The mark is a property of the file itself. So it is known from
the descriptor and not from a name, it lives as long as the file does, and it survives our death.

Source: xattr(7), trusted extended attributes; the kernel's ``mm/shmem.c`` (``CONFIG_TMPFS_XATTR``).
"""

from __future__ import annotations

import errno
import os
from typing import Final

from memshr.errors import PermissionDeniedError, UnsupportedError

_NAME: Final = "trusted.memshr"


def put(file: int, words: bytes) -> None:
    """Mark a memory file.

    :raises PermissionDeniedError: we are not root.
    :raises UnsupportedError: the kernel has no such attributes on memory files.
    """
    try:
        os.setxattr(file, _NAME, words)
    except OSError as error:
        if error.errno in {errno.EPERM, errno.EACCES}:
            raise PermissionDeniedError(
                "only root can make memory files that no guest can imitate", remedy="run as root (SYS_ADMIN)"
            ) from error
        raise UnsupportedError(
            f"the kernel cannot mark memory files ({error.strerror})", remedy="use a kernel with CONFIG_TMPFS_XATTR"
        ) from error


def of(file: int) -> bytes | None:
    """What a file is marked with; None: it has no mark, so no memshr made it."""
    try:
        return os.getxattr(file, _NAME)
    except OSError as error:
        if error.errno in {errno.ENODATA, errno.EOPNOTSUPP, errno.EPERM, errno.EACCES}:
            return None
        raise
