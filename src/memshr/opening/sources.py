"""What SOURCEs name, opened for an estimate: images and live memory in any mixture."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence

from memshr.errors import MemshrError
from memshr.opening.grammar import LIVE, pid_of, prefix_of
from memshr.opening.guests import guest_subjects
from memshr.opening.images import names_of, refuse_twice
from memshr.opening.xen import domain_subjects
from memshr.pagesource import Subject

_log = logging.getLogger(__name__)


@contextlib.contextmanager
def open_sources(
    sources: Sequence[str], *, format: str | None = None, notice: Callable[[str], None] = lambda _: None
) -> Iterator[list[list[Subject]]]:
    """What ``sources`` name, opened for an estimate: images and live memory of any kind, read in place.

    :param sources: paths, ``pid:N``, ``qemu:...``, ``xen:...``, in any mixture.
    :param format: read images as this format; None: detect it.
    :param notice: told, in one line each, of guests of ``qemu:all`` that cannot be reached, and of Xen domains that may
        not be looked at: they are left out.
    :returns: the subjects of each source; a domain or process that several sources name is in the first only.
    :raises MemshrError: a source cannot be opened, or an image or process is named twice.
    """
    from memshr.images import open_image  # noqa: PLC0415  # as above
    from memshr.images.process import ProcessSource  # noqa: PLC0415  # as above

    with contextlib.ExitStack() as stack:
        images = {
            number: stack.enter_context(open_image(source, format=format))
            for number, source in enumerate(sources)
            if prefix_of(source) not in LIVE
        }
        refuse_twice(list(images.values()))
        for name, image in zip(names_of([image.path for image in images.values()]), images.values(), strict=True):
            image.name = name
            _log.info("image %s, format %s", image.path, image.format)
        pids = [source for source in sources if prefix_of(source) == "pid"]
        if twice := [source for source in pids if pids.count(source) > 1]:
            raise MemshrError(f"{twice[0]} is named twice", remedy="name each process once")
        guests = guest_subjects(stack, [source for source in sources if prefix_of(source) == "qemu"], notice)
        domains = domain_subjects(stack, [source for source in sources if prefix_of(source) == "xen"], notice)
        opened: list[list[Subject]] = []
        for number, source in enumerate(sources):
            match prefix_of(source):
                case "pid":
                    process = stack.enter_context(ProcessSource(pid_of(source)))
                    _log.info("process %s", source)
                    opened.append([Subject(process, "process", huge_pages_known=process.huge_pages_known)])
                case "qemu":
                    opened.append(guests.pop(source, []))
                case "xen":
                    opened.append(domains.pop(source, []))
                case _:
                    opened.append([Subject(images[number], "image", images[number].format)])
        yield opened
