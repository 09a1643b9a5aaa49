"""Every operation of the trace language, on a hypervisor.

An operation has named parameters and answers as libxenctrl would: ``rc``, and an errno when that is negative. The
sharing calls work on any mechanism; what surrounds them in a host (making domains, playing their guests, holding
mappings, grants) only on the embedded hypervisor, which is the only one that owns its guests.
"""

from __future__ import annotations

import contextlib
import enum
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from memshr.embedded import EmbeddedHypervisor, ForeignMapping
from memshr.errors import CallError, MemshrError, Status, UnsupportedError
from memshr.hypervisor import Hypervisor
from memshr.types import DOMID_SELF, MAX_GFN_BITS, PAGE_SIZE, DomainKind, DomId, Gfn, GrantRef, Handle, P2mType

MAX_WORD = (1 << 64) - 1


class ScriptError(MemshrError):
    """An operation that is not one, or parameters that do not fit it. ``column`` is 1-based, 0 if there is no line."""

    def __init__(self, message: str, *, column: int = 0, remedy: str = "") -> None:
        super().__init__(message, remedy=remedy)
        self.column = column


class Kind(enum.Enum):
    """What the value of a parameter is."""

    DOMAIN = "a domain: its name or number"
    NUMBER = "a number"
    WORD = "a number of 64 bits"
    TEXT = "a text"
    PROT = "r or rw"


@dataclass(frozen=True, slots=True)
class Answer:
    """What an operation answered.

    ``rc`` is what libxenctrl returns; ``status`` is 0 unless that is negative; ``handle`` is one that was handed out;
    ``values`` is whatever else the operation tells.
    """

    rc: int = 0
    status: int = Status.OK
    handle: Handle | None = None
    values: Mapping[str, Any] = field(default_factory=dict)
    error: str = ""

    @property
    def errno(self) -> int:
        """The errno that libxenctrl sets; 0 when rc is not negative."""
        return -self.status if self.rc < 0 else 0

    @property
    def handle_error(self) -> int | None:
        """-9 or -10 when it is about a handle."""
        wrong = self.status in (Status.C_HANDLE_INVALID, Status.S_HANDLE_INVALID)
        return int(self.status) if self.rc < 0 and wrong else None


_REQUIRED = object()


@dataclass(frozen=True, slots=True)
class Parameter:
    """A parameter of an operation; ``default`` is what it is when it is left out."""

    name: str
    kind: Kind
    default: object = _REQUIRED

    @property
    def required(self) -> bool:
        """True if it may not be left out."""
        return self.default is _REQUIRED


@dataclass(frozen=True, slots=True)
class Operation:
    """One operation of the language."""

    name: str
    parameters: tuple[Parameter, ...]
    run: Callable[..., Answer]
    help: str
    embedded_only: bool


OPERATIONS: dict[str, Operation] = {}
"""Every operation by its name."""


def _dom(name: str = "dom") -> Parameter:
    return Parameter(name, Kind.DOMAIN)


def _word(name: str, default: object = _REQUIRED) -> Parameter:
    return Parameter(name, Kind.WORD, default)


def _number(name: str, default: object = _REQUIRED) -> Parameter:
    return Parameter(name, Kind.NUMBER, default)


def _text(name: str, default: object = _REQUIRED) -> Parameter:
    return Parameter(name, Kind.TEXT, default)


def _operation(
    *parameters: Parameter, embedded_only: bool = False
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    def register(run: Callable[..., Answer]) -> Callable[..., Answer]:
        name = run.__name__
        text = (run.__doc__ or "").strip()
        OPERATIONS[name] = Operation(name, parameters, run, text, embedded_only)
        return run

    return register


def fnv1a(data: bytes) -> int:
    """The hash that the recordings give of page contents: 64-bit FNV-1a, with the offset basis that they used."""
    value = 1469598103934665603
    for byte in data:
        value = (value ^ byte) * 0x100000001B3 & MAX_WORD
    return value


def _page_values(data: bytes) -> dict[str, object]:
    first = data[:16]
    text = first.split(b"\0")[0]
    return {
        "hex": first.hex(),
        "text": text.decode() if text.isascii() and text.decode().isprintable() else "",
        "page_fnv1a": f"{fnv1a(data):016x}",
        "uniform": data == data[:1] * len(data),
    }


def _c_string(text: str | None) -> bytes:
    # Data is written as the recorder wrote it, with the zero that ends a string in C.
    return b"" if text is None else text.encode(errors="backslashreplace") + b"\0"


# Xen's HVMMEM_* numbers (public hvm/hvm_op.h). 3 is not used any more, 4 needs an ioreq server: both are refused.
_MEM_TYPES = {0: P2mType.RAM_RW, 1: P2mType.RAM_RO, 2: P2mType.MMIO_DM}
_READ_ONLY = (P2mType.RAM_RO, P2mType.RAM_SHARED, P2mType.RAM_LOGDIRTY)
_IS_GREF = 1 << 62
# Set in a gfn of the raw interface: it is a grant reference (XENMEM_SHARING_OP_FIELD_IS_GREF_FLAG of memory.h).


class Operations:
    """A session: the operations on one hypervisor, with the names that it gave to domains and mappings."""

    def __init__(self, hypervisor: Hypervisor) -> None:
        self.hypervisor = hypervisor
        self.domains: dict[str, DomId] = {}
        self._mappings: dict[str, ForeignMapping] = {}

    def run(self, name: str, arguments: Mapping[str, object]) -> Answer:
        """Do one operation.

        A call that is refused is an answer, not an error.

        :param arguments: values by parameter name: numbers, texts, names of domains.
        :raises ScriptError: there is no such operation, or the arguments do not fit it.
        :raises UnsupportedError: this mechanism cannot do it. :raises BackendError: the mechanism is out of order.
        """
        operation = OPERATIONS.get(name)
        if operation is None:
            raise ScriptError(f"unknown operation {name!r}", remedy="known are " + ", ".join(sorted(OPERATIONS)))
        if operation.embedded_only and not isinstance(self.hypervisor, EmbeddedHypervisor):
            raise UnsupportedError(f"{name} works on the embedded hypervisor only")
        values = self._values(operation, arguments)
        try:
            return operation.run(self, **values)
        except CallError as error:
            return Answer(-1, error.status, error=str(error))

    def _values(self, operation: Operation, arguments: Mapping[str, object]) -> dict[str, object]:
        known = {parameter.name for parameter in operation.parameters}
        for name in arguments:
            if name not in known:
                takes = " ".join(parameter.name for parameter in operation.parameters) or "no parameters"
                raise ScriptError(f"{operation.name}: no parameter {name!r}; it takes {takes}")
        values = {}
        for parameter in operation.parameters:
            if parameter.name in arguments:
                values[parameter.name] = self._value(operation.name, parameter, arguments[parameter.name])
            elif parameter.required:
                raise ScriptError(f"{operation.name}: the parameter {parameter.name} is missing")
            else:
                values[parameter.name] = parameter.default
        return values

    def _value(self, operation: str, parameter: Parameter, value: object) -> object:
        wrong = ScriptError(f"{operation}: {parameter.name}={reprlib.repr(value)} is not {parameter.kind.value}")
        match parameter.kind:
            case Kind.TEXT:
                return str(value)
            case Kind.PROT:
                if value not in ("r", "rw"):
                    raise wrong
                return value
            case Kind.DOMAIN if isinstance(value, str):
                if value == "self":
                    return DOMID_SELF
                if value not in self.domains:
                    raise ScriptError(f"{operation}: no domain was ever named {value!r}")
                return self.domains[value]
        if not isinstance(value, int):
            raise wrong
        if parameter.kind is Kind.DOMAIN and not 0 <= value < 1 << 16:
            raise ScriptError(f"{operation}: {parameter.name}={value} is no domid (16 bits)")
        if parameter.kind is Kind.WORD and not -1 <= value <= MAX_WORD:
            # -1 is the frame number of all ones, which Xen calls INVALID_GFN
            raise ScriptError(f"{operation}: {parameter.name}={value} is not a number of 64 bits")
        return value

    @property
    def embedded(self) -> EmbeddedHypervisor:
        """The embedded hypervisor; operations that use it are marked embedded_only."""
        assert isinstance(self.hypervisor, EmbeddedHypervisor)
        return self.hypervisor

    # -- the sharing calls -------------------------------------------------------------------------------------------

    @_operation(_dom(), _number("enable"))
    def control(self, dom: DomId, enable: int) -> Answer:
        """Enable (1) or disable (0) memory sharing on a domain."""
        self.hypervisor.control(dom, bool(enable))
        return Answer()

    @_operation(_dom(), _word("gfn"))
    def nominate(self, dom: DomId, gfn: Gfn) -> Answer:
        """Nominate a page and get the handle of its present version."""
        return Answer(handle=self.hypervisor.nominate_gfn(dom, gfn))

    @_operation(_dom(), _word("ref"))
    def nominate_gref(self, dom: DomId, ref: GrantRef) -> Answer:
        """Nominate the page behind a grant reference."""
        return Answer(handle=self.hypervisor.nominate_gref(dom, ref))

    @_operation(_dom("sdom"), _word("sgfn"), _word("sh"), _dom("cdom"), _word("cgfn"), _word("ch"))
    def share(self, sdom: DomId, sgfn: Gfn, sh: Handle, cdom: DomId, cgfn: Gfn, ch: Handle) -> Answer:
        """Put the client's page on the source's frame."""
        self.hypervisor.share_gfns(sdom, sgfn, sh, cdom, cgfn, ch)
        return Answer()

    @_operation(_dom("sdom"), _word("sref"), _word("sh"), _dom("cdom"), _word("cref"), _word("ch"))
    def share_grefs(self, sdom: DomId, sref: GrantRef, sh: Handle, cdom: DomId, cref: GrantRef, ch: Handle) -> Answer:
        """Put the client's page on the source's frame, both named by grant references."""
        self.hypervisor.share_grefs(sdom, sref, sh, cdom, cref, ch)
        return Answer()

    @_operation(_dom("sdom"), _word("sgfn"), _word("sh"), _dom("cdom"), _word("cgfn"))
    def add_to_physmap(self, sdom: DomId, sgfn: Gfn, sh: Handle, cdom: DomId, cgfn: Gfn) -> Answer:
        """Plug a hole of the client with the source's frame."""
        self.hypervisor.add_to_physmap(sdom, sgfn, sh, cdom, cgfn)
        return Answer()

    @_operation(_dom("sdom"), _dom("cdom"), _word("first"), _word("last"))
    def range_share(self, sdom: DomId, cdom: DomId, first: Gfn, last: Gfn) -> Answer:
        """Share the same gfns of two paused domains, contents not compared."""
        self.hypervisor.range_share(sdom, cdom, first, last)
        return Answer()

    @_operation(_dom(), _word("gfn"))
    def unshare(self, dom: DomId, gfn: Gfn) -> Answer:
        """Give a page its own frame, as a write would."""
        self.hypervisor.unshare_gfn(dom, gfn)
        return Answer()

    @_operation(_dom(), _word("gfn"))
    def debug_gfn(self, dom: DomId, gfn: Gfn) -> Answer:
        """How many gfns are on the frame of this one."""
        return Answer(self.hypervisor.debug_gfn(dom, gfn))

    @_operation(_dom(), _word("ref"))
    def debug_gref(self, dom: DomId, ref: GrantRef) -> Answer:
        """debug_gfn for the page behind a grant reference."""
        return Answer(self.hypervisor.debug_gref(dom, ref))

    @_operation()
    def audit(self) -> Answer:
        """Check the books; answers the number of errors that Xen's audit counts, and every finding of ours."""
        report = self.hypervisor.audit()
        values: dict[str, object] = {"findings": [str(finding) for finding in report.findings]}
        if report.unchecked:
            values["unchecked"] = list(report.unchecked)
        if report.xen_errors is None:
            return Answer(-1, Status.ENOSYS, values=values, error="audit: this Xen has none; this is our own")
        return Answer(report.xen_errors, values=values)

    @_operation()
    def freed_pages(self) -> Answer:
        """The number of pages that sharing has given back."""
        return Answer(self.hypervisor.counters().freed_pages)

    @_operation()
    def used_frames(self) -> Answer:
        """The number of frames that are shared, or nominated."""
        return Answer(self.hypervisor.counters().used_frames)

    @_operation(_dom())
    def ring_enable(self, dom: DomId) -> Answer:
        """Enable the ring on which a domain's failed unshares are posted."""
        try:
            return Answer(values={"port": self.hypervisor.ring_enable(dom)})
        except CallError as error:
            return Answer(-1, error.status, values={"port": 0}, error=str(error))

    @_operation(_dom())
    def ring_disable(self, dom: DomId) -> Answer:
        """Disable it."""
        self.hypervisor.ring_disable(dom)
        return Answer()

    @_operation(_dom())
    def ring_requests(self, dom: DomId) -> Answer:
        """What lies in the ring unanswered; rc is how many requests there are."""
        requests = [{"gfn": each.gfn, "vcpu": each.vcpu} for each in self.hypervisor.ring_requests(dom)]
        return Answer(len(requests), values={"requests": requests})

    @_operation(_dom(), _number("count", None))
    def ring_respond(self, dom: DomId, count: int | None) -> Answer:
        """Put responses to the oldest count requests into the ring; to all if count is left out."""
        self.hypervisor.ring_respond(dom, count)
        return Answer()

    @_operation(_dom())
    def domain_resume(self, dom: DomId) -> Answer:
        """Let vCPUs whose requests are answered in the ring try again."""
        self.hypervisor.domain_resume(dom)
        return Answer()

    @_operation(_dom("parent"), _dom("child"))
    def fork(self, parent: DomId, child: DomId) -> Answer:
        """Make a paused domain a fork of another."""
        self.hypervisor.fork(parent, child)
        return Answer()

    @_operation(_dom(), _number("state", 0), _number("memory", 0))
    def fork_reset(self, dom: DomId, state: int, memory: int) -> Answer:
        """Bring a fork back to its parent's state, memory, or both."""
        self.hypervisor.fork_reset(dom, state=bool(state), memory=bool(memory))
        return Answer()

    @_operation(_dom())
    def getinfo(self, dom: DomId) -> Answer:
        """The figures of the first domain from this domid on; rc is how many there are: 0 or 1."""
        for info in self.hypervisor.domains():
            if info.domid >= dom:
                values = {"domid": info.domid, "tot_pages": info.tot_pages}
                return Answer(1, values=values | {"shr_pages": info.shr_pages, "max_pages": info.max_pages})
        return Answer(0)

    @_operation(_text("text", ""))
    def note(self, text: str) -> Answer:
        """Nothing: a remark for whoever reads."""
        return Answer()

    # -- the host around them ----------------------------------------------------------------------------------------

    @_operation(
        _text("name"),
        _number("pages"),
        _number("first_gfn", 0),
        _number("slack", None),
        _number("vcpus", 1),
        _text("type", "hvm"),
        _text("emu", ""),
        _number("hap_mb", None),
        _number("maxmem_kb", None),
        embedded_only=True,
    )
    def create_domain(
        self,
        name: str,
        pages: int,
        first_gfn: int,
        slack: int | None,
        vcpus: int,
        type: str,
        emu: str,
        hap_mb: int | None,
        maxmem_kb: int | None,
    ) -> Answer:
        """Make a domain, paused once. max_pages is pages + slack (64), or maxmem_kb."""
        if type not in list(DomainKind):
            raise ScriptError(f"create_domain: type={type!r} is none of {', '.join(DomainKind)}")
        if pages < 0 or first_gfn < 0 or first_gfn + pages > 1 << MAX_GFN_BITS:
            raise ScriptError(f"create_domain: {pages} pages from gfn {first_gfn} on exceed {MAX_GFN_BITS} bits")
        if vcpus < 1:
            raise ScriptError(f"create_domain: vcpus={vcpus}: a domain has at least one")
        max_pages = maxmem_kb // (PAGE_SIZE // 1024) if maxmem_kb is not None else None
        if max_pages is None and slack is not None:
            max_pages = pages + slack
        hap_pages = hap_mb * 2**20 // PAGE_SIZE if hap_mb else None
        domid = self.embedded.create_domain(
            name,
            pages,
            first_gfn=first_gfn,
            max_pages=max_pages,
            kind=DomainKind(type),
            vcpus=vcpus,
            page_table_pages=hap_pages,
        )
        self.domains[name] = domid
        return Answer(values={"domid": domid})

    @_operation(_dom(), embedded_only=True)
    def destroy_domain(self, dom: DomId) -> Answer:
        """Take a domain apart."""
        self.embedded.destroy_domain(dom)
        return Answer()

    @_operation(_dom(), embedded_only=True)
    def pause(self, dom: DomId) -> Answer:
        """Pause a domain once more."""
        self.embedded.pause(dom)
        return Answer()

    @_operation(_dom(), embedded_only=True)
    def unpause(self, dom: DomId) -> Answer:
        """Take one pause back."""
        self.embedded.unpause(dom)
        return Answer()

    @_operation(_dom(), _number("pages"), embedded_only=True)
    def setmaxmem(self, dom: DomId, pages: int) -> Answer:
        """Change max_pages."""
        if pages < 0:
            raise ScriptError(f"setmaxmem: pages={pages} is negative")
        self.embedded.set_max_pages(dom, pages)
        return Answer()

    @_operation(
        _dom(),
        _word("gfn"),
        _number("count", 1),
        _number("byte", None),
        _text("data", None),
        _number("off", 0),
        embedded_only=True,
    )
    def write(self, dom: DomId, gfn: Gfn, count: int, byte: int | None, data: str | None, off: int) -> Answer:
        """Write count pages through a foreign mapping: fill each with byte, then put data at off."""
        text = _c_string(data)
        if not 0 <= (byte or 0) <= 255 or not 0 <= off <= PAGE_SIZE - len(text):
            raise ScriptError("write: byte must be 0 to 255, and data must end within the page")
        if count < 0:
            raise ScriptError(f"write: count={count} is negative")
        for page in range(gfn, gfn + count):
            self.embedded.unshare_gfn(dom, Gfn(page))  # a writable mapping is made, whatever is written then
            if byte is not None:
                self.embedded.write(dom, Gfn(page), bytes([byte]) * PAGE_SIZE)
            if data is not None:
                self.embedded.write(dom, Gfn(page), text, off)
        return Answer()

    @_operation(_dom(), _word("gfn"), Parameter("prot", Kind.PROT, "r"), embedded_only=True)
    def read(self, dom: DomId, gfn: Gfn, prot: str) -> Answer:
        """Read a page through a foreign mapping that is released at once; a writable one unshares the page."""
        mapping = self.embedded.map_foreign(dom, gfn, writable=prot == "rw")
        with contextlib.closing(mapping):
            return Answer(values=_page_values(mapping.read()))

    @_operation(_dom(), _word("gfn"), Parameter("prot", Kind.PROT, "r"), _text("name"), embedded_only=True)
    def hold(self, dom: DomId, gfn: Gfn, prot: str, name: str) -> Answer:
        """Make a foreign mapping and keep it, under a name."""
        self._keep(name, self.embedded.map_foreign(dom, gfn, writable=prot == "rw"))
        return Answer()

    def _keep(self, name: str, mapping: ForeignMapping) -> None:
        if name in self._mappings:
            mapping.close()
            raise ScriptError(f"a mapping named {name!r} is held already")
        self._mappings[name] = mapping

    def _mapping(self, name: str) -> ForeignMapping:
        if name not in self._mappings:
            raise ScriptError(f"no mapping named {name!r} is held")
        return self._mappings[name]

    @_operation(_text("name"), embedded_only=True)
    def release(self, name: str) -> Answer:
        """Release a mapping that is held."""
        self._mapping(name).close()
        del self._mappings[name]
        return Answer()

    @_operation(_text("name"), embedded_only=True)
    def held_read(self, name: str) -> Answer:
        """Read through a mapping that is held."""
        return Answer(values=_page_values(self._mapping(name).read()))

    @_operation(_text("name"), _text("data"), _number("off", 0), embedded_only=True)
    def held_write(self, name: str, data: str, off: int) -> Answer:
        """Write through a mapping that is held."""
        mapping = self._mapping(name)
        text = _c_string(data)
        if not mapping.writable or not 0 <= off <= PAGE_SIZE - len(text):
            raise ScriptError(f"held_write: {name!r} is not held writable, or data does not end within the page")
        mapping.write(text, off)
        return Answer()

    @_operation(_dom(), _word("gfn"), embedded_only=True)
    def populate(self, dom: DomId, gfn: Gfn) -> Answer:
        """Put fresh RAM at a gfn; rc is how many pages were populated."""
        try:
            self.embedded.populate(dom, gfn)
        except CallError as error:
            return Answer(0, error=str(error))
        return Answer(1)

    @_operation(_dom(), _word("gfn"), _number("order", 0), embedded_only=True)
    def populate_exact(self, dom: DomId, gfn: Gfn, order: int) -> Answer:
        """Put 2**order pages of fresh RAM at a gfn; all of them or an error."""
        if not 0 <= order <= 18:
            raise ScriptError(f"populate_exact: order={order} is not 0 to 18")
        info, free = self.embedded.domain_info(dom), self.embedded.memory.free_pages
        if info.tot_pages + (1 << order) > info.max_pages or (free is not None and free < 1 << order):
            return Answer(-1, Status.EBUSY, error=f"populate_exact: no room for {1 << order} pages in domain {dom}")
        try:
            for page in range(gfn, gfn + (1 << order)):
                self.embedded.populate(dom, Gfn(page))
        except CallError as error:
            return Answer(-1, Status.EBUSY, error=str(error))
        return Answer()

    @_operation(_dom(), _word("gfn"), embedded_only=True)
    def decrease_reservation(self, dom: DomId, gfn: Gfn) -> Answer:
        """Take the RAM at a gfn away; rc is how many pages went."""
        try:
            self.embedded.decrease_reservation(dom, gfn)
        except CallError as error:
            return Answer(0, error=str(error))
        return Answer(1)

    @_operation(_dom(), _word("gfn"), embedded_only=True)
    def remove_from_physmap(self, dom: DomId, gfn: Gfn) -> Answer:
        """Make a gfn a hole; its frame stays the domain's."""
        self.embedded.remove_from_physmap(dom, gfn)
        return Answer()

    @_operation(_dom(), embedded_only=True)
    def max_gpfn(self, dom: DomId) -> Answer:
        """The highest gfn that was ever populated."""
        return Answer(values={"max_gpfn": self.embedded.max_gpfn(dom)})

    @_operation(_dom(), _word("ref"), _word("gfn"), embedded_only=True)
    def grant(self, dom: DomId, ref: GrantRef, gfn: Gfn) -> Answer:
        """What a guest does: grant dom0 access to a page."""
        self.embedded.grant(dom, ref, gfn)
        return Answer()

    @_operation(_dom(), _word("ref"), embedded_only=True)
    def grant_read(self, dom: DomId, ref: GrantRef) -> Answer:
        """Look at a grant table entry."""
        gfn = self.embedded.granted_gfn(dom, ref)
        return Answer(values={"flags": 1, "gdom": 0, "frame": gfn})

    @_operation(_dom(), _word("ref"), Parameter("prot", Kind.PROT, "r"), _text("name"), embedded_only=True)
    def grant_map(self, dom: DomId, ref: GrantRef, prot: str, name: str) -> Answer:
        """Map a granted page and keep the mapping, under a name."""
        self._keep(name, self.embedded.map_grant(dom, ref, writable=prot == "rw"))
        return Answer()

    @_operation(_dom(), _word("gfn"), _number("type"), embedded_only=True)
    def set_mem_type(self, dom: DomId, gfn: Gfn, type: int) -> Answer:
        """Make a gfn writable (0) or read-only (1) RAM, or emulated MMIO (2)."""
        self.embedded.set_mem_type(dom, gfn, _MEM_TYPES.get(type, P2mType.HOLE))
        return Answer()

    @_operation(_dom(), _word("gfn"), embedded_only=True)
    def mem_type(self, dom: DomId, gfn: Gfn) -> Answer:
        """What a gfn is to the toolstack: ram_rw, ram_ro or mmio_dm."""
        kind = self.embedded.mem_type(dom, gfn)
        if kind in _READ_ONLY:
            return Answer(values={"mem_type": "ram_ro"})
        return Answer(values={"mem_type": "ram_rw" if kind in (P2mType.RAM_RW, P2mType.RAM_POD) else "mmio_dm"})

    @_operation(_dom(), _number("enable"), embedded_only=True)
    def logdirty(self, dom: DomId, enable: int) -> Answer:
        """Switch log-dirty mode on (1) or off (0)."""
        self.embedded.set_log_dirty(dom, bool(enable))
        return Answer()

    @_operation(_dom(), _number("param"), _word("value"), embedded_only=True)
    def hvm_param_set(self, dom: DomId, param: int, value: int) -> Answer:
        """Set a numbered parameter of a domain."""
        self.embedded.set_hvm_param(dom, param, value)
        return Answer()

    @_operation(_dom(), _word("gfn"), embedded_only=True)
    def modified_memory(self, dom: DomId, gfn: Gfn) -> Answer:
        """Say that a device model wrote a page."""
        self.embedded.modified_memory(dom, gfn)
        return Answer()

    @_operation(_dom(), _number("space"), _number("idx"), _word("gfn"), embedded_only=True)
    def add_to_physmap_space(self, dom: DomId, space: int, idx: int, gfn: Gfn) -> Answer:
        """Put a frame of the hypervisor's own at a gfn; space 1, index 0 is the grant table."""
        if (space, idx) != (1, 0):
            raise ScriptError("add_to_physmap_space: only space=1 idx=0, the grant table, is known")
        self.embedded.map_grant_frame(dom, gfn)
        return Answer()

    @_operation(embedded_only=True)
    def physinfo(self) -> Answer:
        """Machine memory; totals are the host's own, and are not compared."""
        return Answer()

    @_operation(
        _number("op"),
        _dom(),
        *(_word(f"w{index}", 0) for index in range(5)),
        embedded_only=True,
    )
    def raw_memop(self, op: int, dom: DomId, w0: int, w1: int, w2: int, w3: int, w4: int) -> Answer:
        """The hypercall behind the sharing calls, by the number of its sub-op and the five words of its union."""
        if op == _AUDIT:
            return self.audit()
        self.embedded.first_named(dom, "raw_memop")
        if op not in _RAW:
            return Answer(-1, Status.ENOSYS, error=f"raw_memop: there is no sub-op {op}")
        return _RAW[op](self, dom, w0, w1, w2, w3, w4)

    def _raw_share(self, dom: DomId, w0: int, w1: int, w2: int, w3: int, w4: int) -> Answer:
        cdom = DomId(w4 & 0xFFFF)
        self.embedded.second_named(cdom, "share_gfns")
        return self.share(dom, self._raw_gfn(dom, w0), Handle(w1), cdom, self._raw_gfn(cdom, w2), Handle(w3))

    def _raw_gfn(self, dom: DomId, word: int) -> Gfn:
        return self.embedded.granted_gfn(dom, GrantRef(word & ~_IS_GREF)) if word & _IS_GREF else Gfn(word)

    def _raw_add_physmap(self, dom: DomId, w0: int, w1: int, w2: int, _w3: int, w4: int) -> Answer:
        cdom = DomId(w4 & 0xFFFF)
        self.embedded.second_named(cdom, "add_to_physmap")
        if w0 & _IS_GREF:
            return Answer(-1, Status.EINVAL)
        return self.add_to_physmap(dom, Gfn(w0), Handle(w1), cdom, Gfn(w2))

    def _raw_range(self, dom: DomId, w0: int, w1: int, w2: int, w3: int, _w4: int) -> Answer:
        # w2 is how far an interrupted call had come: 0, or a gfn of the range; w3 has padding above the domid.
        if w3 >> 16 or (w2 and not w0 <= w2 <= w1):
            return Answer(-1, Status.EINVAL)
        return self.range_share(dom, DomId(w3 & 0xFFFF), Gfn(max(w0, w2)), Gfn(w1))

    def _raw_fork(self, dom: DomId, w0: int, _w1: int, _w2: int, _w3: int, _w4: int) -> Answer:
        parent, flags, padding = w0 & 0xFFFF, w0 >> 16 & 0xFFFF, w0 >> 32
        if padding or flags & ~_FORK_FLAGS:
            return Answer(-1, Status.EINVAL)
        return self.fork(DomId(parent), dom)

    def _raw_fork_reset(self, dom: DomId, w0: int, _w1: int, _w2: int, _w3: int, _w4: int) -> Answer:
        flags = w0 >> 16 & 0xFFFF
        if w0 >> 32 or flags & ~(_RESET_STATE | _RESET_MEMORY):
            return Answer(-1, Status.EINVAL)
        return self.fork_reset(dom, state=flags & _RESET_STATE, memory=flags & _RESET_MEMORY)


# Numbers of the sub-ops and flags of XENMEM_sharing_op (Xen's public memory.h, 4.17).
_AUDIT = 7
_FORK_FLAGS = 1 | 2
_RESET_STATE = 4
_RESET_MEMORY = 8
_RAW: dict[int, Callable[..., Answer]] = {
    0: lambda self, dom, w0, *_: self.nominate(dom, Gfn(w0)),
    1: lambda self, dom, w0, *_: self.nominate_gref(dom, GrantRef(w0 & 0xFFFFFFFF)),
    2: Operations._raw_share,
    3: lambda self, dom, w0, *_: self.debug_gfn(dom, Gfn(w0)),
    5: lambda self, dom, w0, *_: self.debug_gref(dom, GrantRef(w0 & 0xFFFFFFFF)),
    6: Operations._raw_add_physmap,
    8: Operations._raw_range,
    9: Operations._raw_fork,
    10: Operations._raw_fork_reset,
}
