"""A stand-in for kernel, QEMU and agent: with it any user tests in seconds what ``memshr.qemu`` makes of their answers.

``kernel``   the memory of some processes, with userfaultfd, as far as memshr can tell it from the real one
``calls``    every call that can fail: recorded, and made to fail
``agent``    the agent's thread: it carries out the tables that the real ``AgentLink`` posts, on that memory
``machine``  a host with guests on it, for ``QemuHypervisor`` and for the contract kit

The contract kit and the state machine of ``two_guests`` run on it as they do on real QEMU; that keeps it true.
"""
