"""Root's rights are gone before bytes of strangers are looked into, and commands work all the same."""

import json
import os
import pwd
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path

import pytest

from image_writers import avml, cloud_hypervisor, firecracker, vmware, write_files
from memshr import opened, privilege
from memshr.errors import MemshrError
from memshr.images import keep_image_open, open_image
from memshr.render.files import FileWriter
from odd_cores import pattern, write
from odd_dumps import kdump, packed

as_root = pytest.mark.skipif(os.geteuid() != 0, reason="only root has rights to give up")
NOBODY = pwd.getpwnam("nobody").pw_uid

# Runs the command line with spies in what parses and what lays out, and in imports after the rights are gone, which
# fail where nobody can read Python: each writes a line of JSON with what the process is by then into descriptor 3.
_SPYING = """
import json, os, sys
from pathlib import Path
from memshr import privilege
from memshr.estimation import result
from memshr.render import html_page, matrix
import memshr.images

def tell(where):
    threads = []
    for task in Path('/proc/self/task').iterdir():
        try:
            threads.append(dict(line.split(':', 1) for line in (task / 'status').read_text().splitlines()))
        except (FileNotFoundError, ProcessLookupError):  # it has ended
            pass
    try:
        os.setuid(0)
        back = 'became root again'
    except PermissionError:
        back = ''
    try:
        Path('/etc/shadow').read_bytes()
        back += 'reads /etc/shadow'
    except PermissionError:
        pass
    os.write(3, json.dumps({'where': where, 'threads': threads, 'back': back}).encode() + b'\\n')

def spied(where, function):
    def told(*arguments, **named):
        tell(where)
        return function(*arguments, **named)
    return told

dropped = []
drop = privilege.drop
privilege.drop = lambda: dropped.append(drop())
sys.addaudithook(lambda event, found: tell('import ' + found[0]) if event == 'import' and dropped else None)

for row in memshr.images.FORMATS:
    for method in ('detect', 'layout'):
        setattr(type(row), method, spied('image', getattr(type(row), method)))
html_page.page = spied('html', html_page.page)
matrix.matrix_csv = spied('csv', matrix.matrix_csv)
result.json.loads = spied('json', json.loads)

from memshr.cli.main import main
main()
"""


def spy(folder: Path, *arguments: object, stdin: str = "") -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a command; returns it, and where spies found it, each of which found no rights."""
    told = folder / "told"
    with told.open("wb") as file:
        done = subprocess.run(
            ["bash", "-c", f'exec 3>&{file.fileno()}; exec "$@"', "-", sys.executable, "-c", _SPYING]
            + [str(argument) for argument in arguments],
            capture_output=True,
            text=True,
            input=stdin,
            pass_fds=[file.fileno()],
            check=False,
        )
    found = [json.loads(line) for line in told.read_text().splitlines()]
    for each in found:
        assert not each["back"]
        for thread in each["threads"]:
            assert thread["Uid"].split() == [str(NOBODY)] * 4
            assert "0" not in thread["Gid"].split()
            assert not thread["Groups"].split()
            assert all(int(thread[name], 16) == 0 for name in ("CapPrm", "CapEff", "CapAmb"))
            assert thread["NoNewPrivs"].strip() == "1"
    return done, [each["where"] for each in found]


def root_only(path: Path) -> Path:
    """A folder that nobody but root may look into."""
    path.mkdir(mode=0o700)
    return path


def raw(path: Path) -> Path:
    """A raw image, which only root may read."""
    write(path, pattern(1, 4)).chmod(0o600)
    return path


@as_root
def test_estimate_and_its_reports(tmp_path: Path) -> None:
    folder = root_only(tmp_path / "dumps")
    one, two = raw(folder / "a.raw"), raw(folder / "b.raw")
    old = write(folder / "report.html", b"old")
    old.chmod(0o640)
    done, where = spy(
        tmp_path,
        *("--log", folder / "log", "estimate", one, two, "--group", "all", "--json", "--against", one),
        *("--html", old, "--csv", folder / "pairs.csv"),
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert set(where) == {"image", "html", "csv"}
    found = json.loads(done.stdout)
    assert found["saved_pages"] == 4
    assert "a.raw at page" in done.stdout
    assert old.read_text().startswith("<!doctype html>")
    assert [(old.stat().st_uid, old.stat().st_mode & 0o777)] == [(0, 0o640)]
    assert (folder / "pairs.csv").stat().st_uid == 0
    assert (folder / "pairs.csv").read_text().startswith("domid,")
    assert sorted(file.name for file in folder.iterdir()) == ["a.raw", "b.raw", "log", "pairs.csv", "report.html"]
    assert f"this process is user {NOBODY} now" in (folder / "log").read_text()


@as_root
def test_reports_into_a_pipe_and_onto_each_other(tmp_path: Path) -> None:
    image, both, pipe = raw(tmp_path / "a.raw"), tmp_path / "both", tmp_path / "pipe"
    os.mkfifo(pipe, mode=0o600)
    memshr = [sys.executable, "-m", "memshr", "estimate", str(image)]
    with subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True) as reader:
        subprocess.run([*memshr, "--html", pipe], check=True, stdout=subprocess.DEVNULL)
        assert reader.communicate()[0].startswith("<!doctype html>")
    subprocess.run([*memshr, "--html", both, "--csv", both], check=True, stdout=subprocess.DEVNULL)
    assert both.read_text().startswith("domid,domain,")


@as_root
@pytest.mark.parametrize("command", ["share", "audit"])
def test_images_in_the_embedded_hypervisor(tmp_path: Path, command: str) -> None:
    folder = root_only(tmp_path / "dumps")
    done, where = spy(tmp_path, command, raw(folder / "a.raw"), raw(folder / "b.raw"), "--group", "all", "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(where) == {"image"}
    assert json.loads(done.stdout)["counters"]["freed_pages"] == 4


@as_root
def test_calls_by_hand(tmp_path: Path) -> None:
    done, where = spy(tmp_path, "ctl", f"embedded:{raw(root_only(tmp_path / 'dumps') / 'a.raw')}", "nominate", "1", "0")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(where) == {"image"}


@as_root
def test_compare(tmp_path: Path) -> None:
    image = raw(tmp_path / "a.raw")
    estimate = subprocess.run(
        [sys.executable, "-m", "memshr", "estimate", image, "--json"], capture_output=True, text=True, check=True
    ).stdout
    before = write(root_only(tmp_path / "estimates") / "a.json", estimate.encode())
    before.chmod(0o600)
    done, where = spy(tmp_path, "compare", before, before)
    assert (done.returncode, done.stderr) == (0, "")
    done, where = spy(tmp_path, "compare", before, "/dev/stdin", stdin=estimate)
    assert (done.returncode, done.stderr) == (0, "")
    assert "The saving is the same" in done.stdout
    assert set(where) == {"json"}


@as_root
def test_live_memory_is_read_as_root_and_reports_are_not_made_as_root(tmp_path: Path) -> None:
    done, where = spy(
        tmp_path, "estimate", f"pid:{os.getpid()}", "--sample", "1/4096", "--html", tmp_path / "page.html"
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert where == ["html"]
    assert (tmp_path / "page.html").stat().st_uid == 0


RANGES = [(0, pattern(1, 3)), (0x100000, pattern(4, 2))]
LARGE = [(0, pattern(1, 2)), (1 << 32, pattern(3))]


def of_two(files: tuple[bytes, bytes], memory: str, state: str) -> Mapping[str, bytes]:
    return dict(zip((memory, state), files, strict=True))


COMPANY: dict[str, tuple[str, Mapping[str, bytes]]] = {
    "cloud-hypervisor folder": ("", cloud_hypervisor(RANGES)),
    "cloud-hypervisor file": ("memory-ranges", cloud_hypervisor(RANGES)),
    "vmware memory": ("guest.vmem", of_two(vmware(RANGES), "guest.vmem", "guest.vmss")),
    "vmware state": ("guest.vmsn", of_two(vmware(RANGES), "guest.vmem", "guest.vmsn")),
    "firecracker": ("mem_file", of_two(firecracker(LARGE, release="1.14"), "mem_file", "vmstate")),
}


@as_root
@pytest.mark.parametrize(("name", "files"), COMPANY.values(), ids=COMPANY)
def test_files_beside_an_image_in_a_folder_of_roots(tmp_path: Path, name: str, files: Mapping[str, bytes]) -> None:
    folder = tmp_path / "dumps"
    write_files(folder, files)
    for file in folder.iterdir():
        file.chmod(0o600)
    folder.chmod(0o700)
    image = folder / name if name else folder
    with open_image(image) as expected:
        wanted = {"format": expected.format, "pages": expected.total_pages}
    assert wanted["format"] != "raw"
    done, where = spy(tmp_path, "estimate", image, "--json")
    assert (done.returncode, done.stderr) == (0, "")
    assert set(where) >= {"image"}
    (domain,) = json.loads(done.stdout)["domains"]
    assert {"format": domain["format"], "pages": domain["total_pages"]} == wanted


PACKED = {"kdump": kdump({gfn: packed(pattern(gfn), "zlib") for gfn in range(1, 9)}), "avml": avml(RANGES)}


@as_root
@pytest.mark.parametrize("form", PACKED)
def test_unpacking(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, form: str) -> None:
    image = write(tmp_path / "image", PACKED[form])
    done, where = spy(tmp_path, "estimate", image, "--json")
    assert (done.returncode, done.stderr, set(where)) == (0, "", {"image"})
    monkeypatch.setenv("TMPDIR", str(root_only(tmp_path / "temporary")))
    done, _ = spy(tmp_path, "estimate", image, "--json")
    assert done.returncode == 3
    assert done.stderr == (
        f"memshr: {image}: no room to unpack it: Permission denied; "
        "set TMPDIR to a folder in which nobody may write, as everybody may in /tmp\n"
    )


@as_root
def test_memshr_that_only_root_can_read(tmp_path: Path) -> None:
    # What is imported after the rights are gone would not be found.
    hidden = root_only(tmp_path / "hidden")
    (hidden / "memshr").symlink_to(Path(privilege.__file__).parent)
    image = write(tmp_path / "image", kdump({1: packed(pattern(1), "zlib"), 2: packed(bytes(4096), "zlib")}))
    for arguments in (["estimate", image, "--html", tmp_path / "page.html"], ["audit", image], ["share", image]):
        done = subprocess.run(
            [sys.executable, "-P", "-m", "memshr", *map(str, arguments)],
            env=os.environ | {"PYTHONPATH": str(hidden)},
            capture_output=True,
            text=True,
            check=False,
        )
        assert (done.returncode, done.stderr) == (0, ""), arguments


@as_root
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("estimate", "{folder}/missing"), "{folder}/missing: cannot be opened: No such file or directory"),
        (("estimate", "{folder}/a.raw", "--against", "/dev/null"), "/dev/null: this is no regular file; name a file"),
        (("share", "{folder}"), "{folder}: this is a directory; name a regular file"),
        (("compare", "{folder}/missing", "/dev/null"), "{folder}/missing: cannot be read: No such file"),
        (("estimate", "{folder}/a.raw", "--csv", "{folder}/no/file"), "{folder}/no/file: cannot be written: No such"),
        (("estimate", "{folder}/a.raw", "{folder}/../dumps/a.raw"), "is the same file as"),
    ],
)
def test_errors_are_the_same_as_ever(tmp_path: Path, arguments: tuple[str, ...], message: str) -> None:
    folder = root_only(tmp_path / "dumps")
    raw(folder / "a.raw")
    done, _ = spy(tmp_path, *(argument.format(folder=folder) for argument in arguments))
    assert done.returncode == 2
    assert message.format(folder=folder) in done.stderr
    assert done.stderr.count("\n") == 1
    assert [file.name for file in folder.iterdir()] == ["a.raw"]


@as_root
def test_a_process_that_has_capabilities_without_being_root(tmp_path: Path) -> None:
    # Ambient ones, as systemd gives them.
    program = (
        "from memshr import privilege\n"
        "from pathlib import Path\n"
        "assert privilege.must_drop()\n"
        "privilege.drop()\n"
        "assert not privilege.must_drop()\n"
        "print(Path('/proc/self/status').read_text())\n"
    )
    setpriv = ["setpriv", "--reuid", "1234", "--regid", "1234", "--clear-groups"]
    setpriv += ["--inh-caps", "+sys_ptrace", "--ambient-caps", "+sys_ptrace"]
    command = [*setpriv, sys.executable, "-c", program]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    status = dict(line.split(":\t", 1) for line in done.stdout.splitlines() if ":\t" in line)
    assert status["Uid"].split() == ["1234"] * 4
    assert int(status["CapPrm"], 16) == int(status["CapEff"], 16) == int(status["CapAmb"], 16) == 0


@as_root
def test_rights_that_cannot_be_given_up_end_the_command(tmp_path: Path) -> None:
    # Root without the right to become somebody else.
    command = ["setpriv", "--bounding-set=-setuid,-setgid", "--inh-caps=-setuid,-setgid"]
    command += [sys.executable, "-m", "memshr", "estimate", str(raw(tmp_path / "a.raw"))]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (3, "")
    assert done.stderr == (
        "memshr: root's rights could not be given up before files of strangers are read: Operation not permitted; "
        "run as an ordinary user who may read the files\n"
    )


def test_a_library_gives_nothing_up(tmp_path: Path) -> None:
    program = (
        "import os, sys, memshr\nbefore = os.getresuid()\n"
        "assert memshr.estimate([sys.argv[1]]).total_pages == 4\nassert os.getresuid() == before\n"
    )
    subprocess.run([sys.executable, "-c", program, str(raw(tmp_path / "a.raw"))], check=True)


def test_a_writer_writes_all_or_nothing(tmp_path: Path) -> None:
    old = write(tmp_path / "old", b"old")
    with FileWriter(old):
        pass
    assert old.read_bytes() == b"old"
    with FileWriter(old) as writer:
        writer.write("new \udcff")
    assert old.read_text() == "new \\udcff"
    with (
        FileWriter(tmp_path / "missing" / "file") as writer,
        pytest.raises(MemshrError, match="cannot be written: No s"),
    ):
        writer.write("text")
    assert [file.name for file in tmp_path.iterdir()] == ["old"]


def test_a_writer_whose_starter_dies_in_the_middle_writes_nothing(tmp_path: Path) -> None:
    old = write(tmp_path / "old", b"old")
    with FileWriter(old) as writer:
        assert writer._process.stdin is not None
        writer._process.stdin.write((1000).to_bytes(8, "big") + b"half of it")
    assert old.read_bytes() == b"old"


def test_held_files_are_read_after_they_are_gone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opened, "_files", {})
    monkeypatch.setattr(opened, "_folders", {})
    folder = tmp_path / "snapshot"
    write_files(folder, cloud_hypervisor(RANGES))
    keep_image_open(folder)
    for file in folder.iterdir():
        file.unlink()
    folder.rmdir()
    for _ in range(2):
        with open_image(folder) as image:
            assert (image.format, image.total_pages) == ("cloud-hypervisor", 5)
    for descriptor in opened._files.values():
        os.close(descriptor)


def test_a_link_next_to_an_image_is_not_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Whoever can put a link next to an image would choose what root opens.
    monkeypatch.setattr(opened, "_files", {})
    monkeypatch.setattr(opened, "_folders", {})
    memory, state = vmware(RANGES)
    write_files(tmp_path / "dumps", {"guest.vmem": memory})
    (tmp_path / "dumps" / "guest.vmss").symlink_to(write(tmp_path / "secret", state))
    os.mkfifo(tmp_path / "dumps" / "guest.vmsn")
    keep_image_open(tmp_path / "dumps" / "guest.vmem")
    assert list(opened._files) == [str(tmp_path / "dumps" / "guest.vmem")]
    for descriptor in opened._files.values():
        os.close(descriptor)
