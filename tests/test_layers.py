"""Who may import whom: the table below is the architecture, and this test fails on everything else."""

import ast
from pathlib import Path

import pytest

SRC = Path(__file__).parents[1] / "src" / "memshr"

FOUNDATION = {"types", "errors", "hypervisor", "runs", "closing", "indices"}
ALLOWED: dict[str, set[str]] = {
    "types": set(),
    "errors": set(),
    "runs": set(),
    "closing": set(),
    "indices": set(),
    "hypervisor": {"types", "errors"},
    "unsupported": {"types", "errors", "hypervisor"},
    "pagesource": {"types", "errors", "indices"},
    "trust": {"types", "errors"},
    "record": {"errors"},
    "opened": set(),
    "privilege": {"errors"},
    "procfs": {"types", "errors", "runs", "closing"},
    "content": {"types", "runs"},
    "embedded": FOUNDATION,
    "images": {"types", "errors", "runs", "closing", "indices", "pagesource", "procfs", "opened"},
    "qemu": FOUNDATION | {"procfs", "unsupported"},
    "xen": FOUNDATION | {"unsupported"},
    "opening": FOUNDATION | {"pagesource", "embedded", "images", "qemu", "xen"},
    "sharing": FOUNDATION | {"content", "trust"},
    "estimation": FOUNDATION | {"pagesource", "trust", "opened", "content", "qemu", "opening"},
    "render": FOUNDATION | {"sharing", "estimation"},
    "replay": FOUNDATION | {"embedded"},
    "testing": FOUNDATION | {"embedded"},
    "__init__": FOUNDATION | {"estimation"},
    "cli": FOUNDATION
    | {"trust", "record", "opened", "privilege", "content", "images", "qemu", "xen", "embedded"}
    | {"opening", "sharing", "estimation", "render", "replay", "__init__"},
    "__main__": {"cli"},
}
"""package or module directly below memshr -> what it may import besides itself, from the bottom up"""


def memshr_imports(path: Path) -> set[str]:
    """The names below ``memshr`` that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative imports hide who imports whom"
            names = [f"{node.module}.{alias.name}" for alias in node.names]
        for name in names:
            parts = name.split(".")
            if parts[0] == "memshr":
                below = parts[1] if len(parts) > 1 else "__init__"
                exists = (SRC / below).is_dir() or (SRC / f"{below}.py").exists()
                found.add(below if exists else "__init__")
    return found


@pytest.mark.parametrize("path", sorted(SRC.rglob("*.py")), ids=lambda path: str(path.relative_to(SRC)))
def test_file_imports_only_what_its_layer_may(path: Path) -> None:
    layer = path.relative_to(SRC).parts[0].removesuffix(".py")
    assert layer in ALLOWED, f"{path}: new layer; give it a row in the table"
    forbidden = memshr_imports(path) - ALLOWED[layer] - {layer}
    assert not forbidden, f"{path.relative_to(SRC)} may not import {sorted(forbidden)}"
