"""The embedded reference hypervisor: Xen's memory sharing in this process, with real page contents.

``EmbeddedHypervisor`` is all that the outside needs. Inside: ``columns`` (sparse tables), ``memory`` (machine frames
and their contents), ``p2m`` (what each gfn of a domain is), ``shared_frames`` (handles and reverse maps),
``mem_sharing`` (every change of state), ``fork`` (domains that fill themselves from their parent), ``host`` (what
a toolstack and guests do: domains, writes, foreign mappings, grants), ``audit`` (the books checked both ways), and
``hypervisor``, the sharing calls on top.
"""

from memshr.embedded.host import ForeignMapping
from memshr.embedded.hypervisor import EmbeddedHypervisor

__all__ = ["EmbeddedHypervisor", "ForeignMapping"]
