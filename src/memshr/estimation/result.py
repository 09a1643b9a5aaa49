"""What an estimate says, as data: the JSON of ``memshr estimate --json``, schema version 2, and its Python form.

Every figure counts pages of PAGE_SIZE unless its name has another unit. The figures add up. Of the estimate, and with
the same names of each domain::

    total_pages  = absent_pages + zero_pages + unique_pages + shared_pages + dropped volatile + dropped not_sharable
    saved_pages  = zero_pages + intra_pages + inter_pages - dropped max_sharers       (estimate and group only)
    shared_pages = intra_pages + inter_pages + distinct contents of shared pages      (estimate only)

The dataclasses have the keys of the JSON as fields, in its order. A reader skips keys that it does not know, so that a
later memshr may add some; a key that changes its meaning or goes away makes a new version, which is refused.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import stat
import types
import typing
from dataclasses import dataclass
from typing import Any, NamedTuple, Self

from memshr import opened
from memshr.errors import MemshrError
from memshr.types import Counters, DomId, Gfn

__all__ = [
    "SCHEMA",
    "VERSION",
    "Achievable",
    "Bounds",
    "Content",
    "CopiesBand",
    "DomainEstimate",
    "Estimate",
    "GroupEstimate",
    "Method",
    "PairEstimate",
    "Place",
    "Sample",
    "read_estimate",
]

SCHEMA = "memshr-estimate"
VERSION = 2

MAX_FILE_BYTES = 1 << 28
"""No estimate is larger: 1000 domains, each with each, make about 100 MB of JSON."""

_MAX_NUMBER = 1 << 63
_REMEDY = "write one by `memshr estimate --json`"


class Bounds(NamedTuple):
    """Where a figure lies, both ends included, with the confidence of the sample. A list of two in JSON."""

    low: int
    high: int


@dataclass(frozen=True, slots=True)
class Sample:
    """How a sampled estimate was drawn.

    * ``rate``: which part of the pages that have contents was looked at, such as ``1/64``; chosen by position.
    * ``pages_read``: pages that were read to find them.
    * ``confidence``: the probability, 0 to 1, that a figure lies within its bounds.
    """

    rate: str
    seed: int
    pages_read: int
    confidence: float


@dataclass(frozen=True, slots=True)
class Method:
    """How the estimate was made.

    * ``exact``: whether every page was looked at and equal pages were compared; if not, ``sample`` says what was.
    * ``samples_s``: seconds between the two samples of live domains; None: one sample, so volatile pages are not known.
    * ``max_sharers``: pages that one frame takes at most.
    * ``mappings_per_domain``: mappings that a domain may spend on sharing (Linux limits them for each process).
    """

    exact: bool
    sample: Sample | None
    samples_s: float | None
    max_sharers: int
    mappings_per_domain: int
    pages_read: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class Achievable:
    """What remains of the saving within the limits of a running host.

    * ``saved_pages``: what can be had within the budget of mappings.
    * ``mappings``: mappings that this takes, of all domains.
    * ``mapping_budget_pages_lost``: the saving that the budget costs.
    * ``huge_pages_only``: what is saved if no huge page may be split (no aligned 2 MiB, where they are not known).
    * ``huge_pages_known``: whether the source told which pages are huge.
    * ``split_huge_pages``: blocks of 2 MiB that must be split to save everything.
    """

    saved_pages: int
    mappings: int
    mapping_budget_pages_lost: int
    huge_pages_only: int
    huge_pages_known: bool
    split_huge_pages: int


@dataclass(frozen=True, slots=True)
class DomainEstimate:
    """The figures of one domain.

    * ``kind``: ``image``, ``process``, ``qemu`` or ``xen``; ``format``: of an image, else None.
    * ``absent_pages``: live memory that the host has not backed: no saving.
    * ``hole_pages``: those of ``zero_pages`` that lie in holes of a sparse file: nobody can tell whether the host had
      memory behind them.
    * ``unique_pages``, ``shared_pages``: non-zero pages whose contents exist once, and more than once, in the group.
    * ``intra_pages``: what sharing inside this domain alone saves.
    * ``huge_pages``: pages of huge pages; None if the source does not tell.
    * ``mappings``: mappings that sharing takes in this domain.
    * ``dropped``: reason -> pages that are in no other figure.
    """

    domid: DomId
    name: str
    kind: str
    format: str | None
    group: str
    total_pages: int
    absent_pages: int
    hole_pages: int
    zero_pages: int
    unique_pages: int
    shared_pages: int
    intra_pages: int
    huge_pages: int | None
    mappings: int
    dropped: dict[str, int]


@dataclass(frozen=True, slots=True)
class PairEstimate:
    """What two domains have in common, zero pages left out.

    * ``group``: their trust group; None if they are in different ones and so may not share.
    * ``contents``: distinct contents that both have: the pages that the two save beyond what each saves alone.
    * ``pages``: how many pages of the two hold these contents.
    """

    domids: tuple[DomId, DomId]
    names: tuple[str, str]
    group: str | None
    contents: int
    pages: int


@dataclass(frozen=True, slots=True)
class Place:
    """Where a content was found first. Of a process, ``gfn`` is a virtual page number."""

    domid: DomId
    gfn: Gfn


@dataclass(frozen=True, slots=True)
class Content:
    """One content that many pages hold.

    * ``copies``: pages that hold it, and ``domains``: how many domains have it.
    * ``guess``: what it may be, in words; empty if there is no guess.
    """

    copies: int
    domains: int
    saved_pages: int
    guess: str
    first: Place


@dataclass(frozen=True, slots=True)
class CopiesBand:
    """How many contents exist in ``copies_from`` to ``copies_to`` copies (None: or more), and what they save."""

    copies_from: int
    copies_to: int | None
    contents: int
    pages: int
    saved_pages: int


@dataclass(frozen=True, slots=True)
class GroupEstimate:
    """What one trust group saves; ``inter_pages`` is what sharing between its domains adds to that inside them."""

    name: str
    domids: tuple[DomId, ...]
    saved_pages: int
    intra_pages: int
    inter_pages: int
    zero_pages: int


@dataclass(frozen=True, slots=True)
class Estimate:
    """What sharing would save; the module's docstring says how the figures add up, DomainEstimate what they mean.

    * ``saved_pages``: with every page that may share sharing; ``achievable`` says what the limits of a host leave
      (None: a sample cannot tell).
    * ``between_groups_pages``: what one single trust group would save on top.
    * ``collisions``: pages that had the fingerprint of others but not their contents.
    * ``stopped``: why the estimate ended early, in one line; None if it came to its end.
    * ``pairs``: every two domains that have something in common.
    * ``contents``: those that save most, best first.
    * ``bounds``: figure -> where it lies; None if the estimate is exact. With bounds every figure about contents is
      estimated, ``pairs`` and ``copies`` are empty, and ``contents`` are those of the sample, with copies extrapolated.
    """

    method: Method
    total_pages: int
    absent_pages: int
    hole_pages: int
    zero_pages: int
    unique_pages: int
    shared_pages: int
    intra_pages: int
    inter_pages: int
    saved_pages: int
    between_groups_pages: int
    collisions: int
    stopped: str | None
    dropped: dict[str, int]
    counters: Counters
    achievable: Achievable | None
    domains: tuple[DomainEstimate, ...]
    pairs: tuple[PairEstimate, ...]
    contents: tuple[Content, ...]
    copies: tuple[CopiesBand, ...]
    groups: tuple[GroupEstimate, ...]
    bounds: dict[str, Bounds] | None

    def to_dict(self) -> dict[str, Any]:
        """The estimate in plain dicts, lists, strings and numbers: what ``--json`` prints."""
        return {"schema": SCHEMA, "version": VERSION, **_plain(self)}

    def to_arrow(self) -> dict[str, Any]:
        """The parts that are lists, as Arrow tables: ``domains``, ``pairs``, ``contents``, ``copies``, ``groups``.

        A table has the keys of the JSON as columns, and a row for each object.

        :raises MemshrError: pyarrow is not installed.
        """
        try:
            import pyarrow  # type: ignore[import-untyped]  # noqa: PLC0415  # it has no types; it is large
        except ImportError as error:
            raise MemshrError("pyarrow is not installed", remedy="pip install 'memshr[arrow]'") from error
        plain = self.to_dict()
        return {
            name: pyarrow.table(
                {field.name: [row[field.name] for row in plain[name]] for field in dataclasses.fields(record)}
            )
            for name, record in _TABLES.items()
        }

    @classmethod
    def from_dict(cls, plain: object) -> Self:
        """The estimate that ``to_dict`` made ``plain`` of.

        :raises MemshrError: ``plain`` is of another schema or version; a key is missing; a value is of another type,
            negative, or names a domid that is in no domain. The message names the key.
        """
        if not isinstance(plain, dict) or plain.get("schema") != SCHEMA:
            raise MemshrError("this is no estimate of memshr", remedy=_REMEDY)
        if type(plain.get("version")) is not int or plain["version"] != VERSION:
            raise MemshrError(
                f"this estimate has version {_shown(plain.get('version'))} of the schema; this memshr reads {VERSION}",
                remedy="estimate again, or use the memshr that wrote it",
            )
        estimate: Self = _record(cls, plain, "")
        estimate._check_domids()
        return estimate

    def _check_domids(self) -> None:
        known = {domain.domid for domain in self.domains}
        if len(known) != len(self.domains):
            raise _wrong("domains", "has a domid twice")
        for key, named in (
            ("pairs", {domid for pair in self.pairs for domid in pair.domids}),
            ("contents", {content.first.domid for content in self.contents}),
            ("groups", {domid for group in self.groups for domid in group.domids}),
        ):
            if unknown := named - known:
                raise _wrong(key, f"names domid {min(unknown)}, which is in no domain")


_TABLES: dict[str, type] = {
    "domains": DomainEstimate,
    "pairs": PairEstimate,
    "contents": Content,
    "copies": CopiesBand,
    "groups": GroupEstimate,
}


def read_estimate(path: str | os.PathLike[str]) -> Estimate:
    """The estimate in a file that ``memshr estimate --json`` printed.

    :raises MemshrError: the file cannot be read, or ``Estimate.from_dict`` refuses what it holds; names the file.
    """
    name = os.fspath(path) if os.fspath(path).isprintable() else repr(os.fspath(path))
    try:
        with os.fdopen(opened.open_file(path), "rb") as file:
            status = os.fstat(file.fileno())
            if stat.S_ISREG(status.st_mode) and status.st_size > MAX_FILE_BYTES:
                raise MemshrError("too large for an estimate", remedy=_REMEDY)
            text = file.read(MAX_FILE_BYTES + 1)
        if len(text) > MAX_FILE_BYTES:
            raise MemshrError("too large for an estimate", remedy=_REMEDY)
        return Estimate.from_dict(json.loads(text))
    except OSError as error:
        raise MemshrError(f"{name}: cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise MemshrError(f"{name}: no JSON, so no estimate of memshr", remedy=_REMEDY) from error
    except MemshrError as error:
        raise MemshrError(f"{name}: {error.args[0]}", remedy=error.remedy) from error


def _plain(value: Any) -> Any:
    match value:
        case dict():
            return {key: _plain(each) for key, each in value.items()}
        case tuple():
            return [_plain(each) for each in value]
        case _ if dataclasses.is_dataclass(value):
            return {field.name: _plain(getattr(value, field.name)) for field in dataclasses.fields(value)}
    return value


def _shown(value: object) -> str:
    text = json.dumps(value, default=repr)
    return text if len(text) <= 40 else f"{text[:37]}..."


def _wrong(where: str, what: str) -> MemshrError:
    return MemshrError(f"this estimate is damaged: {where or 'it'} {what}", remedy=_REMEDY)


@functools.cache
def _fields(record: Any) -> dict[str, Any]:
    return typing.get_type_hints(record)


def _record(record: Any, value: object, where: str) -> Any:
    if not isinstance(value, dict):
        raise _wrong(where, f"is {_shown(value)}, not an object")
    values = {}
    for name, wanted in _fields(record).items():
        place = f"{where}.{name}" if where else name
        if name not in value:
            raise _wrong(place, "is missing")
        values[name] = _value(wanted, value[name], place)
    return record(**values)


def _list(value: object, where: str, length: int | None = None) -> list[Any]:
    if not isinstance(value, list) or (length is not None and len(value) != length):
        raise _wrong(where, f"is {_shown(value)}, not a list" + (f" of {length}" if length is not None else ""))
    return value


def _value(wanted: Any, value: object, where: str) -> Any:
    # What the annotation of a field promises, checked: the dataclasses above are the schema, there is no second one.
    wanted = getattr(wanted, "__supertype__", wanted)
    arguments = typing.get_args(wanted)
    if isinstance(wanted, types.UnionType):
        return None if value is None else _value(arguments[0], value, where)
    if typing.get_origin(wanted) is tuple:
        if arguments[-1] is Ellipsis:
            return tuple(_value(arguments[0], each, f"{where}[{i}]") for i, each in enumerate(_list(value, where)))
        each_of = zip(arguments, _list(value, where, len(arguments)), strict=True)
        return tuple(_value(type_, each, f"{where}[{i}]") for i, (type_, each) in enumerate(each_of))
    if typing.get_origin(wanted) is dict:
        if not isinstance(value, dict):
            raise _wrong(where, f"is {_shown(value)}, not an object")
        return {key: _value(arguments[1], each, f"{where}.{key}") for key, each in value.items()}
    if wanted is Bounds:
        bounds = Bounds(*(_value(int, each, where) for each in _list(value, where, 2)))
        if bounds.low > bounds.high:
            raise _wrong(where, "has its low end above its high end")
        return bounds
    if dataclasses.is_dataclass(wanted):
        return _record(wanted, value, where)
    if wanted is int:
        if type(value) is not int or not 0 <= value < _MAX_NUMBER:
            raise _wrong(where, f"is {_shown(value)}, not a number from 0 on")
    elif wanted is float:
        if not isinstance(value, int | float) or isinstance(value, bool) or not 0 <= value < _MAX_NUMBER:
            raise _wrong(where, f"is {_shown(value)}, not a number from 0 on")
        return float(value)
    elif type(value) is not wanted:
        raise _wrong(where, f"is {_shown(value)}, not {'text' if wanted is str else 'true or false'}")
    return value
