"""Raw images: page after page from guest physical address 0 on, and nothing else.

QEMU's ``pmemsave 0 SIZE`` writes this, and so do Firecracker (``mem_file``) and VMware (``.vmem``) for guests below
3 GiB; of larger ones, which they split, the files next to the memory know more (firecracker.py, vmware.py). The
format has no magic number, so a raw image is what no other format claims; files that plainly are something else are
refused, because counting the pages of a compressed file answers a question that nobody asked.
"""

from __future__ import annotations

import numpy as np

from memshr.images.file import RUN, ImageFile, Layout
from memshr.types import MAX_GFN_BITS, PAGE_SIZE

_OTHERS: dict[bytes, tuple[str, str]] = {
    b"\x1f\x8b": ("a gzip file", "unpack it first"),
    b"\x28\xb5\x2f\xfd": ("a zstd file", "unpack it first"),
    b"\xfd7zXZ\0": ("an xz file", "unpack it first"),
    b"BZh": ("a bzip2 file", "unpack it first"),
    b"PK\x03\x04": ("a zip file", "unpack it first"),
    b"7z\xbc\xaf\x27\x1c": ("a 7z file", "unpack it first"),
    b"QFI\xfb": ("a qcow2 disk", "name an image of memory, not of a disk"),
    b"KDMV": ("a VMDK disk", "name an image of memory, not of a disk"),
    b"LibvirtQemudSave": ("a saved guest of libvirt", "write an ELF dump: virsh dump --memory-only"),
}
"""First bytes of files that are no raw images -> what they are, and what to do about it."""


class Raw:
    """Pages from address 0 on. Claims every file, so it must be asked last."""

    name = "raw"

    def detect(self, file: ImageFile) -> bool:
        """True.

        :raises ImageError: the file begins like one of the kinds that are no raw images.
        """
        for magic, (what, remedy) in _OTHERS.items():
            if file.starts_with(magic):
                raise file.error(f"this is {what}, not a raw image", remedy=f"{remedy}, or say --format raw")
        return True

    def layout(self, file: ImageFile) -> Layout:
        """The whole file as one run at gfn 0.

        :raises ImageError: its size is not a multiple of PAGE_SIZE, or exceeds what a guest can address.
        """
        count, rest = divmod(file.size, PAGE_SIZE)
        if rest:
            raise file.error(
                f"no known image format, and no raw image: {file.size} bytes are not a multiple of {PAGE_SIZE}",
                remedy="a raw image holds whole pages; write or copy it again if it was cut short",
            )
        if count > 1 << MAX_GFN_BITS:
            raise file.error(f"{count} pages are more than a guest can have ({1 << MAX_GFN_BITS})")
        return Layout(np.array([(0, 0, count)], RUN), file)
