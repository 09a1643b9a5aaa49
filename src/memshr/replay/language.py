"""The language of the traces, a line an operation: ``nominate dom=A gfn=1 save=ha``.

Values are numbers (``16``, ``0x41``, ``-1``), words or quoted texts, and ``$name`` or ``$name+1`` for a handle that an
earlier line kept with ``save=name``. The values may also stand without their names, in the order of the operation's
parameters: ``nominate A 1``. ``#`` begins a comment. Errors name the column.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

from memshr.replay.operations import OPERATIONS, ScriptError

_TOKEN = re.compile(r'\s*(?:#.*|(?:(?P<key>[A-Za-z_][A-Za-z0-9_]*)=)?(?P<value>"(?:[^"\\]|\\.)*"|[^\s"#]+))')
_SAVED = re.compile(r"\$(\w+)(?:\+(\d{1,20}))?$")
_LONGEST_NUMBER = 64
_NUMBER = re.compile(r"-?(?:0[xX][0-9a-fA-F]+|[0-9]+)$")


@dataclass(frozen=True, slots=True)
class Line:
    """One operation as it was written: its name, its arguments by parameter name, and the name to keep a handle by."""

    operation: str
    arguments: Mapping[str, int | str]
    save: str | None


def _value(text: str, saved: Mapping[str, int], column: int) -> int | str:
    if text.startswith('"'):
        return re.sub(r"\\(.)", r"\1", text[1:-1])
    if match := _SAVED.match(text):
        name, plus = match.groups()
        if name not in saved:
            raise ScriptError(f"no handle was kept as ${name}", column=column, remedy=f"keep one with save={name}")
        return saved[name] + int(plus or 0)
    if not _NUMBER.match(text) or re.match(r"-?0\d", text):
        return text
    if len(text) > _LONGEST_NUMBER:
        raise ScriptError(f"a number of {len(text)} digits", column=column, remedy="numbers have 64 bits")
    return int(text, 0)


def parse_line(text: str, saved: Mapping[str, int]) -> Line | None:
    """Read one line; None if there is nothing on it.

    :param saved: the handles that were kept so far.
    :raises ScriptError: with the column: it does not follow the language, or the operation is not known.
    """
    words: list[tuple[str | None, str, int]] = []
    position = 0
    while text[position:].strip():
        match = _TOKEN.match(text, position)
        if match is None:
            raise ScriptError("a quote that is not closed", column=text.index('"', position) + 1)
        if match["value"] is not None:
            start = match.start("key") if match["key"] else match.start("value")
            words.append((match["key"], match["value"], start + 1))
        position = match.end()
    if not words:
        return None
    key, name, column = words[0]
    name = name.replace("-", "_")
    if key is not None or name not in OPERATIONS:
        word = text.split(maxsplit=1)[0]
        raise ScriptError(
            f"unknown operation {word!r}", column=column, remedy="known are " + ", ".join(sorted(OPERATIONS))
        )
    parameters = [parameter.name for parameter in OPERATIONS[name].parameters]
    arguments: dict[str, int | str] = {}
    save = None
    place = -1
    for key, value, column in words[1:]:
        if key == "save":
            if not re.fullmatch(r"\w+", value):
                raise ScriptError(f"{value!r} is no name to keep a handle by", column=column)
            save = value
            continue
        place += 1
        if key is None and place >= len(parameters):
            raise ScriptError(f"{name} takes at most {len(parameters)} values", column=column)
        parameter = key or parameters[place]
        if parameter not in parameters:
            takes = " ".join(parameters) or "no parameters"
            raise ScriptError(f"{name}: no parameter {parameter!r}; it takes {takes}", column=column)
        if parameter in arguments:
            raise ScriptError(f"{name}: {parameter} is given twice", column=column)
        arguments[parameter] = _value(value, saved, column)
    return Line(name, arguments, save)
