"""Real virtual machines for tests, demonstrations and benchmarks.

``kit``      finds QEMU and a guest kernel, builds what the guests run (programs/), keeps it in the cache folder
``machine``  one QEMU process with its monitor socket, ended for sure
``linux``    a Linux guest that rewrites and checks its own memory
``pages``    counts equal pages, by a path that shares nothing with memshr

Nothing here imports memshr: what memshr says is compared with what these find on their own.
"""
