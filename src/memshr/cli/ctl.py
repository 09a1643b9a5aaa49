"""memshr ctl."""

from __future__ import annotations

import contextlib
import json
import re
import sys
from collections import Counter
from collections.abc import Iterator

import click

from memshr.cli.options import as_json
from memshr.errors import MemshrError, Status
from memshr.hypervisor import Hypervisor
from memshr.opening.grammar import EMBEDDED, embedded_images
from memshr.opening.hosts import open_host
from memshr.replay import OPERATIONS, Answer, Operations, ScriptError, parse_line

_INFO = "info"
_ALIASES: dict[str, tuple[str, dict[str, int]]] = {
    "enable": ("control", {"enable": 1}),
    "disable": ("control", {"enable": 0}),
    "range": ("range_share", {}),
}
"""Calls by the names that Xen's own tool has for them: the operation, and what is added to its arguments."""


def _calls() -> str:
    lines = []
    for name in sorted(OPERATIONS):
        parameters = (
            parameter.name if parameter.required else f"[{parameter.name}]" for parameter in OPERATIONS[name].parameters
        )
        lines.append(f"  {' '.join([name, *parameters])}")
    return "\n".join(lines)


@click.command(
    short_help="Xen's memory-sharing calls by hand.",
    epilog="\b\nCalls and what they take:\n"
    + _calls()
    + "\n\b\n  info                       all domains and counters\n"
    "  enable DOM, disable DOM    control DOM 1, control DOM 0\n  range ...                  range_share ...",
)
@click.argument("host")
@click.argument("call", nargs=-1)
@as_json
def ctl(host: str, call: tuple[str, ...], as_json: bool) -> None:
    """Xen's memory-sharing calls by hand, on the mechanism HOST.

    HOST is 'embedded:', a hypervisor in this process that begins without domains, or 'embedded:IMAGE,IMAGE' with a
    domain for each image. A CALL is a name and its values, in order or by name:

    \b
      memshr ctl embedded:a.core,b.core nominate 1 0x20

    Without a CALL a script is read from standard input, a call a line; save=NAME keeps a handle, $NAME uses it, and
    domains go by the names that they were created with:

    \b
      create_domain name=A pages=16
      nominate dom=A gfn=1 save=h
      share sdom=A sgfn=1 sh=$h cdom=A cgfn=1 ch=$h

    Every call answers with what libxc would return. A call that is refused tells the error of Xen and what it means
    for that call; the exit code is 1 if there was one.
    """
    refused = False
    with contextlib.ExitStack() as stack:
        if host.startswith(EMBEDDED):
            from memshr.cli.rights import given_up  # noqa: PLC0415  # knows every image format

            stack.enter_context(given_up(images=embedded_images(host)))
        hypervisor = stack.enter_context(open_host(host))
        session = Operations(hypervisor)
        session.domains.update({name: domid for domid, name in hypervisor.names().items()})
        saved: dict[str, int] = {}
        for place, line in _lines(call):
            answer = _run(session, line, saved, place)
            if answer is None:
                continue
            refused |= bool(answer.error) and answer.rc <= 0
            click.echo(_as_json(answer) if as_json else _as_text(answer))
    if refused:
        raise click.exceptions.Exit(1)


def _lines(call: tuple[str, ...]) -> Iterator[tuple[str, str]]:
    # What to run, each with the place to name in errors.
    if call:
        yield "", " ".join(map(_quoted, call))
        return
    try:
        for number, line in enumerate(sys.stdin, 1):
            yield f"line {number}", line.rstrip("\n")
    except UnicodeDecodeError as error:
        raise MemshrError(f"the script is no text in {error.encoding}: {error.reason}") from error


def _quoted(word: str) -> str:
    # The shell has taken the quotes off; the language wants them back where they matter.
    match = re.fullmatch(r"([A-Za-z_]\w*=)?(.*)", word, re.DOTALL)
    if match is None or not re.search(r"""[\s"#]|^$""", match[2]):
        return word
    return (match[1] or "") + '"' + re.sub(r'(["\\])', r"\\\1", match[2]) + '"'


def _run(session: Operations, text: str, saved: dict[str, int], place: str) -> Answer | None:
    head = re.match(r"\s*([^\s#]*)", text)
    assert head is not None  # it matches anything
    if head[1] == _INFO:
        return _info(session.hypervisor)
    operation, added = _ALIASES.get(head[1], (head[1], {}))
    try:
        line = parse_line(text[: head.start(1)] + operation + text[head.end(1) :], saved)
        if line is None:
            return None
        if twice := added.keys() & line.arguments.keys():
            raise ScriptError(f"{head[1]} gives {', '.join(twice)} itself")
        answer = session.run(line.operation, {**line.arguments, **added})
    except ScriptError as error:
        longer = len(operation) - len(head[1])
        column = error.column - longer if error.column > head.start(1) + 1 else error.column
        where = f"{place}, column {column}: " if place and column else f"{place}: " if place else ""
        raise MemshrError(f"{where}{error}") from error
    if line.save is not None and answer.handle is not None:
        saved[line.save] = answer.handle
    return answer


def _info(hypervisor: Hypervisor) -> Answer:
    counters, domains = hypervisor.counters(), hypervisor.domains()
    times = Counter(info.name for info in domains)
    return Answer(
        values={
            "freed_pages": counters.freed_pages,
            "used_frames": counters.used_frames,
            "domains": {
                info.name if times[info.name] == 1 else f"{info.name} ({info.domid})": {
                    "domid": info.domid,
                    "tot_pages": info.tot_pages,
                    "shr_pages": info.shr_pages,
                }
                for info in domains
            },
        }
    )


def _as_json(answer: Answer) -> str:
    known = {"rc": answer.rc, "errno": answer.errno, "handle": answer.handle, "xen_rc": answer.handle_error}
    return json.dumps(known | dict(answer.values) | ({"error": answer.error} if answer.error else {}))


def _as_text(answer: Answer) -> str:
    parts = [str(answer.rc)]
    if answer.handle is not None:
        parts.append(f"handle={answer.handle}")
    parts += [f"{name}={json.dumps(value)}" for name, value in answer.values.items()]
    if answer.rc < 0:
        parts.append(_error_name(answer))
    if answer.error:
        parts.append(f"({answer.error})")
    return " ".join(parts)


def _error_name(answer: Answer) -> str:
    if answer.handle_error is not None:
        return {-9: "client handle invalid", -10: "source handle invalid"}[answer.handle_error]
    # Not errno.errorcode: it calls Xen's EOPNOTSUPP by its other name.
    return Status(answer.status).name if answer.status in list(Status) else str(answer.errno)
