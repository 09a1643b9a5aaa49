"""Documents tell the truth: every example prints what it says, and the tables name what is there."""

import doctest
import importlib
import inspect
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from command_line import CommandLine
from examples import Example, examples, matches
from memshr.hypervisor import Hypervisor
from memshr.replay import DIFFERENCES, OPERATIONS

PROJECT = Path(__file__).parents[1]
INTERFACE = PROJECT / "docs" / "xen-interface.md"
DOCUMENTS = [path for path in (PROJECT / "README.md", *sorted((PROJECT / "docs").glob("*.md"))) if path.exists()]
HEADER = Path("/usr/include/xenctrl.h")

CTL = [example for path in DOCUMENTS for example in examples(path) if example.kind == "memshr-ctl"]
PYTHON = [path for path in DOCUMENTS if "```python\n>>> " in path.read_text()]
CONSOLE = [path for path in DOCUMENTS if any(example.kind == "console" for example in examples(path))]


@pytest.mark.parametrize("example", CTL, ids=str)
def test_ctl_example_prints_what_the_document_says(example: Example, memshr: CommandLine) -> None:
    outcome = memshr("ctl", "embedded:", stdin="".join(f"{line}\n" for line in example.session()))
    assert outcome.err == ""
    assert matches(example.session_printed(), outcome.out.splitlines()), f"{example} prints\n{outcome.out}"


@pytest.mark.parametrize("path", CONSOLE, ids=lambda path: path.name)
def test_console_examples_print_what_the_document_says(path: Path, tmp_path: Path) -> None:
    for entry in PROJECT.iterdir():
        (tmp_path / entry.name).symlink_to(entry)
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    for example in examples(path):
        if example.kind == "console":
            command = "\n".join(example.typed)
            done = subprocess.run(
                ["bash", "-c", command],
                cwd=tmp_path,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                timeout=300,
                check=False,
            )
            assert matches(example.printed, done.stdout.splitlines()), f"{example} prints\n{done.stdout}"


@pytest.mark.parametrize("path", PYTHON, ids=lambda path: path.name)
def test_python_examples_answer_what_the_document_says(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"^```python\n(>>> .*?)^```$", path.read_text(), re.M | re.S)
    session = doctest.DocTestParser().get_doctest("\n".join(blocks), {}, path.name, str(path), 0)
    complaints: list[str] = []
    outcome = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS).run(session, out=complaints.append)
    assert outcome.attempted >= len(blocks) > 0
    assert outcome.failed == 0, "".join(complaints)


@pytest.mark.parametrize(
    ("expected", "printed", "same"),
    [
        (("0 handle=2",), ["0 handle=2"], True),
        (("0 handle=2",), ["0 handle=3"], False),
        (("0 handle=2",), [], False),
        ((), ["more"], False),
        (("took ... s",), ["took 0.1 s"], True),
        (("took ... s",), ["took 0.1", "0 s"], False),
        (("first", "...", "last"), ["first", "a", "b", "last"], True),
        (("first", "...", "last"), ["first", "a", "b"], False),
    ],
)
def test_what_counts_as_the_same(expected: tuple[str, ...], printed: list[str], same: bool) -> None:
    assert matches(expected, printed) is same


def mapping() -> dict[str, str]:
    """The table libxc -> memshr of the document."""
    return dict(re.findall(r"^\| `(xc_\w+)` \| `(\w+)`", INTERFACE.read_text(), re.M))


def test_every_call_of_the_table_is_on_the_seam() -> None:
    assert len(mapping()) == 17
    assert {name for name in mapping().values() if not callable(getattr(Hypervisor, name, None))} == set()


def test_memshr_has_the_names_of_libxc() -> None:
    ours = {libxc: libxc.removeprefix("xc_memshr_") for libxc in mapping() if libxc.startswith("xc_memshr_")}
    assert ours.items() <= mapping().items()


@pytest.mark.skipif(
    not HEADER.exists() and "xen-headers" not in os.environ.get("MEMSHR_REQUIRE", "").split(","),
    reason="no /usr/include/xenctrl.h (package libxen-dev)",
)
def test_the_table_names_every_sharing_call_of_libxc() -> None:
    declared = re.findall(r"^(?:int|long) (xc_(?:memshr|sharing)_\w+)\(", HEADER.read_text(), re.M)
    assert set(mapping()) == set(declared)


def test_every_sharing_call_by_hand_is_explained() -> None:
    text = INTERFACE.read_text()
    by_hand = {"nominate_gfn": "nominate", "share_gfns": "share"}
    calls = {by_hand.get(name, name) for name in mapping().values()} - {"counters"} | {"freed_pages", "used_frames"}
    assert calls <= set(OPERATIONS)
    headings = set(re.findall(r"[a-z_]+", " ".join(re.findall(r"^### (.*)$", text, re.M))))
    assert calls - headings - {"nominate_gref", "share_grefs"} == set()


def test_the_document_lists_every_difference_of_replay() -> None:
    assert set(re.findall(r"^\| `([a-z-]+)` \|", INTERFACE.read_text(), re.M)) == set(DIFFERENCES)


def test_every_actor_of_the_table_has_its_test() -> None:
    table = (PROJECT / "docs" / "nominations.md").read_text()
    tests = re.findall(r"^def (test_\w+)", (PROJECT / "tests" / "live" / "test_kernel_actors.py").read_text(), re.M)
    named = set(re.findall(r"`(test_\w+)`", table))
    assert set(tests) <= named
    for name in named - set(tests):  # named with their file
        (file,) = re.findall(rf"`(tests/[\w/]+\.py)`: `{name}`", table)
        assert f"def {name}(" in (PROJECT / file).read_text()


def public_names() -> dict[str, set[str]]:
    """Module -> names, by the table of docs/python.md."""
    rows = re.findall(r"^\| `(memshr[\w.]*)` \| (.*) \|$", (PROJECT / "docs" / "python.md").read_text(), re.M)
    return {module: set(re.findall(r"`(\w+)`", names)) for module, names in rows}


@pytest.mark.parametrize("module", public_names())
def test_public_names_are_those_of_the_document(module: str) -> None:
    public = importlib.import_module(module)
    assert set(public.__all__) == public_names()[module]
    for name in public.__all__:
        value = getattr(public, name)
        assert inspect.getdoc(value) or not (inspect.isclass(value) or inspect.isfunction(value)), (
            f"{name}: no docstring"
        )
