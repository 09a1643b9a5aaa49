"""The prototypes and structures of memshr.xen.libxc, compared with the real library and with its own header."""

import ctypes
import re
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from memshr.xen import bulk, libxc, ring
from memshr.xen.libxc import PROTOTYPES, RELEASES, CreateFlag, DominfFlag, Prototype, Release
from xen_headers import INCLUDE, release_of_headers

C_TYPES = {
    ctypes.c_int: "i32",
    ctypes.c_uint: "u32",
    ctypes.c_long: "i64",
    ctypes.c_ulong: "u64",
    ctypes.c_bool: "bool",
}
"""What ctypes calls by several names is one type on x86-64 Linux: c_uint32 is c_uint, c_uint64 and c_size_t c_ulong."""
SPELLINGS = {
    "int": "i32",
    "xentoollog_level": "i32",
    "long": "i64",
    "unsigned": "u32",
    "unsigned int": "u32",
    "uint32_t": "u32",
    "grant_ref_t": "u32",
    "unsigned long": "u64",
    "uint64_t": "u64",
    "size_t": "u64",
    "xen_pfn_t": "u64",
    "bool": "bool",
}


@pytest.fixture(scope="module")
def header_release() -> Release:
    """The release whose headers are installed."""
    return release_of_headers()


def compiled(tmp_path: Path, body: str) -> str:
    """What a C program with the real headers prints."""
    source = tmp_path / "look.c"
    source.write_text(
        "#include <stdio.h>\n#include <stddef.h>\n#include <stdbool.h>\n#include <sys/mman.h>\n"
        "#define __XEN_TOOLS__ 1\n#include <xenctrl.h>\n#include <xenforeignmemory.h>\n#include <xentoollog.h>\n"
        "#include <xen/vm_event.h>\n#include <xen/sched.h>\n#include <xen/hvm/params.h>\n" + body
    )
    command = ["gcc", "-Wall", "-Werror", "-I", str(INCLUDE), "-o", str(tmp_path / "look"), str(source)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return subprocess.run([tmp_path / "look"], capture_output=True, text=True, check=True).stdout


def of_this_release(prototype: Prototype, release: Release) -> Prototype:
    return Prototype(
        prototype.name, prototype.library, prototype.restype, libxc.argtypes_of(prototype, release), prototype.header
    )


def declaration(name: str, header: str) -> tuple[str, list[str]]:
    """The result and the parameter types of a C function, as the header's text declares them."""
    text = re.sub(r"/\*.*?\*/", " ", (INCLUDE / header).read_text(), flags=re.DOTALL)
    found = re.search(rf"([\w \t*]+?[\s*]){name}\s*\(([^;]*)\)\s*;", text)
    assert found is not None, f"{header} does not declare {name}"
    parameters = [" ".join(parameter.split()) for parameter in found[2].split(",")]
    types = []
    for parameter in parameters:
        is_array = "[" in parameter
        bare = re.sub(r"\[.*\]", "", parameter).replace("*", " * ")
        words = [word for word in bare.split() if word not in ("const", "struct")]
        named = len(words) > 1 and words[-1] != "*" and words[-2:] not in (["unsigned", "int"], ["unsigned", "long"])
        words = words[:-1] if named else words
        types.append(" ".join(words) + (" *" if is_array else ""))
    return " ".join(found[1].replace("*", " * ").split()), types


def fits(c_type: str, python_type: Any) -> bool:
    """Whether the ctypes type is what C says there."""
    if python_type is None:
        return c_type == "void"
    if python_type is ctypes.c_void_p:
        return c_type.endswith("*")
    if issubclass(python_type, ctypes._Pointer):
        return c_type.endswith(" *") and SPELLINGS.get(c_type.removesuffix(" *")) == C_TYPES[python_type._type_]
    return SPELLINGS.get(c_type) == C_TYPES[python_type]


@pytest.mark.parametrize("prototype", PROTOTYPES, ids=lambda prototype: prototype.name)
def test_every_prototype_is_the_headers(prototype: Prototype, header_release: Release) -> None:
    if prototype.optional and prototype.name not in (INCLUDE / prototype.header).read_text():
        assert header_release < Release(4, 17)
        return
    result, parameters = declaration(prototype.name, prototype.header)
    expected = of_this_release(prototype, header_release)
    assert fits(result, prototype.restype), f"{prototype.name} gives {result}"
    assert len(parameters) == len(expected.argtypes), f"{prototype.name} takes {parameters}"
    for parameter, python_type in zip(parameters, expected.argtypes, strict=True):
        assert fits(parameter, python_type), f"{prototype.name} takes {parameter}, we pass {python_type}"


def test_every_symbol_is_in_the_real_library(header_release: Release) -> None:
    functions = libxc.load(header_release)
    assert functions is not None
    for prototype in PROTOTYPES:
        assert getattr(functions, prototype.name) is not None or header_release < Release(4, 17)


def test_the_structures_are_the_headers(tmp_path: Path, header_release: Release) -> None:
    tables = {
        "struct xen_domctl_getdomaininfo": libxc.domaininfo_dtype(header_release),
        "struct xen_domctl_createdomain": libxc.createdomain_dtype(header_release),
    }
    lines = []
    for struct, dtype in tables.items():
        assert dtype.names is not None
        lines.append(f'printf("%zu\\n", sizeof({struct}));')
        for name in dtype.names:
            member = name if not name.endswith("_flags") else f"arch.{name}"
            lines.append(f'printf("%zu %zu\\n", offsetof({struct}, {member}), sizeof((({struct} *)0)->{member}));')
    said = compiled(tmp_path, "int main(void) {\n" + "\n".join(lines) + "\nreturn 0; }\n").splitlines()
    expected = []
    for dtype in tables.values():
        assert dtype.fields is not None
        expected.append(str(dtype.itemsize))
        expected += [f"{dtype.fields[name][1]} {dtype.fields[name][0].itemsize}" for name in dtype.names or ()]
    assert said == expected


def test_the_constants_are_the_headers(tmp_path: Path, header_release: Release) -> None:
    constants = {
        "XEN_DOMINF_dying": DominfFlag.DYING,
        "XEN_DOMINF_hvm_guest": DominfFlag.HVM_GUEST,
        "XEN_DOMINF_paused": DominfFlag.PAUSED,
        "XEN_DOMINF_hap": DominfFlag.HAP,
        "XEN_DOMCTL_CDF_hvm": CreateFlag.HVM,
        "XEN_DOMCTL_CDF_hap": CreateFlag.HAP,
        "XEN_X86_EMU_LAPIC": libxc.X86_EMU_LAPIC,
        "XEN_DOMCTL_SHADOW_OP_SET_ALLOCATION": libxc.SHADOW_OP_SET_ALLOCATION,
        "XEN_DOMINF_shutdown": DominfFlag.SHUTDOWN,
        "XEN_DOMINF_shutdownmask": libxc.DOMINF_SHUTDOWN_MASK,
        "XEN_DOMINF_shutdownshift": libxc.DOMINF_SHUTDOWN_SHIFT,
        "SHUTDOWN_crash": libxc.SHUTDOWN_CRASH,
        "HVM_PARAM_SHARING_RING_PFN": libxc.HVM_PARAM_SHARING_RING_PFN,
        "VM_EVENT_FLAG_VCPU_PAUSED": libxc.VM_EVENT_VCPU_PAUSED,
        "VM_EVENT_REASON_MEM_SHARING": libxc.VM_EVENT_REASON_MEM_SHARING,
        "offsetof(vm_event_sring_t, ring)": libxc.RING_ENTRIES_OFFSET,
        "offsetof(vm_event_sring_t, __pad)": libxc.RING_PAD_OFFSET,
        "sizeof(((vm_event_sring_t *)0)->__pad)": libxc.RING_PAD_BYTES,
        "__HYPERVISOR_memory_op": libxc.HYPERVISOR_MEMORY_OP,
        "__HYPERVISOR_multicall": libxc.HYPERVISOR_MULTICALL,
        "XENMEM_sharing_op": libxc.XENMEM_SHARING_OP,
        "XENMEM_sharing_op_debug_gfn": libxc.SHARING_OP_DEBUG_GFN,
        "sizeof(multicall_entry_t)": bulk._ENTRY.itemsize,
        "offsetof(multicall_entry_t, result)": 8,
        "offsetof(multicall_entry_t, args)": 16,
        "sizeof(xen_mem_sharing_op_t)": bulk._SHARING_OP.itemsize,
        "offsetof(xen_mem_sharing_op_t, domain)": 2,
        "offsetof(xen_mem_sharing_op_t, u.debug.u.gfn)": 8,
        "XENVER_version": libxc.XENVER_VERSION,
        "XENVER_extraversion": libxc.XENVER_EXTRAVERSION,
        "XENVER_capabilities": libxc.XENVER_CAPABILITIES,
        "sizeof(xen_extraversion_t)": libxc.EXTRAVERSION_BYTES,
        "sizeof(xen_capabilities_info_t)": libxc.CAPABILITIES_BYTES,
        "sizeof(xen_pfn_t)": 8,
        "sizeof(xc_domaininfo_t)": RELEASES[header_release].domaininfo_bytes,
        "PROT_READ": libxc.PROT_READ,
        "PROT_WRITE": libxc.PROT_WRITE,
        "XTL_NUM_LEVELS": libxc.XTL_SILENT,
        "-XENMEM_SHARING_OP_S_HANDLE_INVALID": 10,
        "-XENMEM_SHARING_OP_C_HANDLE_INVALID": 9,
        "DOMID_FIRST_RESERVED": 0x7FF0,
    }
    version = re.search(r"VM_EVENT_INTERFACE_VERSION\s+(0x\w+)", (INCLUDE / "xen" / "vm_event.h").read_text())
    if version and int(version[1], 16) == libxc.VM_EVENT_VERSION:
        constants["sizeof(vm_event_request_t)"] = libxc.VM_EVENT_BYTES
        constants["offsetof(vm_event_request_t, u.mem_sharing.gfn)"] = libxc.VM_EVENT_GFN_OFFSET
        constants["__RING_SIZE((vm_event_sring_t *)0, 4096)"] = ring.ENTRIES
    if header_release >= Release(4, 16):
        constants["XEN_DOMCTL_GRANT_version(1)"] = libxc.GRANT_VERSION_1
    lines = "\n".join(f'printf("%ld\\n", (long)({name}));' for name in constants)
    said = compiled(tmp_path, "int main(void) {\n" + lines + "\nreturn 0; }\n").split()
    assert dict(zip(constants, map(int, said), strict=True)) == constants


def test_a_library_of_another_release_is_not_there() -> None:
    missing = [release for release in RELEASES if not libxc.load(release)]
    for release in missing:
        with pytest.raises(OSError, match=re.escape(f"libxenctrl.so.{release}")):
            ctypes.CDLL(f"libxenctrl.so.{release}")


def test_what_all_releases_have_in_common_lies_before_what_differs() -> None:
    for release, abi in RELEASES.items():
        fields = libxc.domaininfo_dtype(release).fields
        assert fields is not None
        assert max(offset + dtype.itemsize for dtype, offset, *_ in fields.values()) == 96 < abi.domaininfo_bytes
    assert np.dtype(libxc.createdomain_dtype(Release(4, 17))).itemsize == 64
