"""Who may change the states of pages and of guests: one class each, and this test fails on everything else."""

import ast
from pathlib import Path

import pytest

QEMU = Path(__file__).parents[1] / "src" / "memshr" / "qemu"

PAGE_STATES = {"_phase", "_handle"}
"""attributes that nobody but ``PageStates`` may so much as name"""

METHODS_OF = {"state": {"__init__", "_become"}, "session": {"__init__", "attach", "_give_up"}}
"""attribute of ``Attachment`` -> those of its methods that may set it"""

SOURCES = sorted(path for path in QEMU.parents[0].rglob("*.py"))


def assigned_attributes(tree: ast.AST) -> list[ast.Attribute]:
    """Every ``something.name`` that is set, also by ``del``, by ``+=`` and as one of several."""
    return [
        node
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, (ast.Store, ast.Del))
    ]


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: str(path.relative_to(QEMU.parent)))
def test_only_page_states_touches_the_states_of_pages(path: Path) -> None:
    if path == QEMU / "states.py":
        return
    named = {node.attr for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Attribute)}
    literal = {node.value for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.Constant)}
    if path.parent == QEMU:
        assert not PAGE_STATES & (named | literal)


@pytest.mark.parametrize("path", sorted(QEMU.glob("*.py")), ids=lambda path: path.name)
def test_only_an_attachment_changes_the_state_of_its_guest(path: Path) -> None:
    for function in ast.walk(ast.parse(path.read_text())):
        if not isinstance(function, ast.FunctionDef):
            continue
        for node in assigned_attributes(function):
            if node.attr in METHODS_OF:
                assert path.name == "attachment.py", f"{path.name}, line {node.lineno} sets {node.attr}"
                assert function.name in METHODS_OF[node.attr], f"line {node.lineno}: {function.name} sets {node.attr}"
