"""Sharing pages between running, unmodified QEMU guests on Linux, and giving the memory back to the host.

``guests``      finds them, asks QEMU where their RAM lies, says why one must be left alone
``monitor``     QMP, with descriptors; ``libvirt_monitor`` the same through libvirt
``agent``       the thread inside QEMU that remaps pages, and our end of it; ``control_area`` is what both ends see
``injector``    a program of its own that puts it there; ``injection`` asks it, ``tracee`` borrows the thread for it,
                ``identity`` tells QEMU from whatever has its pid later, ``seccomp`` judges QEMU's filters
``pool``        the frames: one sealed memory file for each trust group
``protection``  userfaultfd: a write to a protected page is told to us and waits
``pagemap``     what the kernel says about each page
``status``      every guest of the host with what it shares, for ``memshr status`` and ``top``
``lock``        one memshr at a time for each guest
``attachment``  one guest whose pages can be protected and remapped
``books``       who is on which frame, as the kernel says; figures and audit
``remapping``   pages in flight: until when their writers wait
``hypervisor``  the seam, on top of these
``syscalls``    ctypes, all of it
"""
