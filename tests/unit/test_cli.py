"""The commands as a user runs them: what they print, their JSON, their exit codes, and one line for bad input."""

import contextlib
import json
import logging
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from command_line import CommandLine
from memshr.embedded import EmbeddedHypervisor
from memshr.errors import InvariantError
from memshr.images import open_image
from memshr.types import DomId, Gfn, PageBytes
from memshr.xen import XenHypervisor
from standin.xen import StandIn, open_stand_in

PAGE_SIZE = 4096


def write_image(path: Path, fillings: list[int]) -> Path:
    """A raw image with a page for each filling; 0 is a zero page."""
    rng = np.random.default_rng(7)
    contents = {filling: rng.bytes(PAGE_SIZE) for filling in range(1, 256)} | {0: bytes(PAGE_SIZE)}
    path.write_bytes(b"".join(contents[filling] for filling in fillings))
    return path


@pytest.fixture
def images(tmp_path: Path) -> tuple[Path, Path]:
    """Two images: 2 + 1 zero pages; one has 3 copies of 1 and 2 of 2, the other 2 copies of 1 and one of 2."""
    first = write_image(tmp_path / "a.raw", [0, 1, 1, 1, 2, 2, 3, 0])
    second = write_image(tmp_path / "b.raw", [1, 0, 1, 2, 4])
    return first, second


def test_estimate_counts_each_domain_for_itself(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    outcome = memshr("estimate", *images, "--json")
    assert (outcome.code, outcome.err) == (0, "")
    report = json.loads(outcome.out)
    assert report["total_pages"] == 13
    assert report["zero_pages"] == 3
    assert report["intra_pages"] == 2 + 1 + 1
    assert report["inter_pages"] == 0
    assert report["saved_pages"] == 7
    assert report["absent_pages"] == 0
    assert report["between_groups_pages"] == 2
    assert (report["schema"], report["version"]) == ("memshr-estimate", 2)
    assert report["counters"] == {"freed_pages": 4, "used_frames": 3}
    assert [domain["name"] for domain in report["domains"]] == ["a.raw", "b.raw"]
    assert [(pair["group"], pair["contents"], pair["pages"]) for pair in report["pairs"]] == [(None, 2, 8)]


def test_estimate_of_one_trust_group(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    report = json.loads(memshr("estimate", *images, "--group", "all", "--json").out)
    assert (report["zero_pages"], report["intra_pages"], report["inter_pages"], report["saved_pages"]) == (3, 4, 2, 9)
    (pair,) = report["pairs"]
    assert (pair["names"], pair["contents"], pair["pages"]) == (["a.raw", "b.raw"], 2, 8)


def test_named_group(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    report = json.loads(memshr("share", *images, "--group", "web=a.raw,b.raw", "--json").out)
    assert report["saved_pages"] == 9
    assert {domain["group"] for domain in report["domains"]} == {"web"}


def test_estimate_agrees_with_a_count_of_its_own_kind(memshr: CommandLine, tmp_path: Path) -> None:
    # Real memory: two interpreters that did different things, captured while they wait.
    programs = ("rows = [str(i) * 9 for i in range(30_000)]", "import json, decimal; table = bytes(3_000_000)")
    cores = []
    for number, program in enumerate(programs):
        command = [sys.executable, "-c", f"{program}\nprint('ready', flush=True)\ninput()"]
        with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
            cores.append(tmp_path / f"{number}.core")
            outcome = memshr("capture", f"pid:{process.pid}", "-o", cores[-1], "--json")
            assert outcome.code == 0, outcome.err
            process.communicate("\n")
        assert json.loads(outcome.out)["pages"] > 1000
    counted = []
    for core in cores:
        with open_image(core) as image:
            counted.append(Counter(page.tobytes() for extent in image.extents for page in extent.pages))
    zero = sum(contents.pop(bytes(PAGE_SIZE), 0) for contents in counted)
    intra = sum(contents.total() - len(contents) for contents in counted)
    both = counted[0].keys() & counted[1].keys()
    report = json.loads(memshr("estimate", *cores, "--group", "all", "--json").out)
    assert report["zero_pages"] == zero
    assert report["intra_pages"] == intra
    assert report["inter_pages"] == len(both) > 500
    assert report["saved_pages"] == zero + intra + len(both)
    assert report["pairs"][0]["contents"] == len(both)


def test_text_names_domains_and_figures(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    outcome = memshr("estimate", *images)
    assert outcome.code == 0
    for words in ("can be saved", "7 of 13 pages", "a.raw", "b.raw", "zero pages", "try --group all"):
        assert words in outcome.out
    assert "given back" in memshr("share", *images).out


def test_names_are_shown_as_they_are_and_command_no_terminal(memshr: CommandLine, tmp_path: Path) -> None:
    image = write_image(tmp_path / "[b]x[\x1b[2J].raw", [0, 5, 5])
    for command in ("estimate", "share"):
        outcome = memshr(command, image)
        assert outcome.code == 0
        assert "[b]x[" in outcome.out
        assert "\x1b" not in outcome.out


def test_audit_proves_every_page(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    outcome = memshr("audit", *images, "--group", "all", "--json")
    assert outcome.code == 0
    assert json.loads(outcome.out) == {
        "findings": [],
        "xen_errors": 0,
        "counters": {"freed_pages": 6, "used_frames": 2},
        "saved_pages": 9,
        "checked_pages": 13,
        "wrong_pages": 0,
    }
    assert "0 of 13 pages differ" in memshr("audit", *images).out


def test_audit_sees_a_page_that_lost_its_contents(
    memshr: CommandLine, images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    # A mechanism that maps another frame than it read: the books agree with each other, the guest's memory is wrong.
    honest = EmbeddedHypervisor.read_range

    def lying(self: EmbeddedHypervisor, domid: DomId, first: Gfn, count: int, buffer: PageBytes) -> PageBytes:
        pages = honest(self, domid, first, count, buffer).copy()
        if count > 6:
            pages[6, 5] ^= 1
        return pages

    monkeypatch.setattr("memshr.cli.audit.EmbeddedHypervisor.read_range", lying)
    outcome = memshr("audit", images[0], "--json")
    assert outcome.code == 1
    assert json.loads(outcome.out)["wrong_pages"] == 1


def test_images_of_one_name_in_two_folders(memshr: CommandLine, tmp_path: Path) -> None:
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write_image(tmp_path / name / "mem", [1, 2])
    report = json.loads(memshr("estimate", tmp_path / "one/mem", tmp_path / "two/mem", "--group", "all", "--json").out)
    assert [domain["name"] for domain in report["domains"]] == ["one/mem", "two/mem"]
    assert report["inter_pages"] == 2


def test_max_sharers_costs_frames(memshr: CommandLine, tmp_path: Path) -> None:
    image = write_image(tmp_path / "same.raw", [5] * 10)
    report = json.loads(memshr("estimate", image, "--max-sharers", "4", "--json").out)
    assert (report["intra_pages"], report["saved_pages"], report["dropped"]["max_sharers"]) == (9, 7, 2)


BAD_INPUT = {
    "missing": (["estimate", "{tmp}/none.raw"], 2, "none.raw"),
    "directory": (["estimate", "{tmp}"], 2, "directory"),
    "empty": (["estimate", "{tmp}/empty"], 2, "empty"),
    "truncated": (["estimate", "{tmp}/odd"], 2, "4096"),
    "twice": (["estimate", "{a}", "{a}"], 2, "the same file as"),
    "hard link": (["estimate", "{a}", "{tmp}/link"], 2, "the same file as"),
    "format": (["estimate", "{a}", "--format", "tape"], 2, "'tape' is no image format"),
    "group": (["estimate", "{a}", "--group", "web=a.raw,c.raw"], 2, "c.raw"),
    "group without domains": (["estimate", "{a}", "--group", "web="], 2, "web"),
    "process gone": (["capture", "pid:999999999", "-o", "{tmp}/x.core"], 2, "999999999"),
    "no process": (["capture", "init", "-o", "{tmp}/x.core"], 2, "write pid:N"),
    "capture into nowhere": (["capture", "pid:{pid}", "-o", "{tmp}/none/x.core"], 2, "none/x.core"),
    "over the limit": (["capture", "pid:{pid}", "-o", "{tmp}/x.core", "--limit-mib", "1"], 2, "raise the limit"),
    "live process": (["share", "pid:1"], 3, "memshr capture pid:1 -o FILE"),
    "process that is gone": (["estimate", "pid:999999999"], 2, "999999999"),
    "process without a number": (["estimate", "pid:init"], 2, "write pid:N"),
    "guest that is none": (["detach", "xen:all"], 2, "names no QEMU guest"),
    "process twice": (["estimate", "pid:{pid}", "pid:{pid}"], 2, "named twice"),
    "missing file to compare": (["estimate", "{a}", "--against", "{tmp}/none"], 2, "none"),
    "host": (["ctl", "vmware:", "info"], 2, "'vmware:' is no host"),
    "call": (["ctl", "embedded:", "levitate"], 2, "unknown operation 'levitate'"),
    "unknown domain": (["ctl", "embedded:{a}", "nominate", "7", "0"], 1, ""),
    "trace": (["replay", "{a}"], 2, "no JSON"),
    "seed without a sample": (["estimate", "{a}", "--seed", "4"], 2, "--seed is for --sample 1/N"),
    "interval of images": (["estimate", "{a}", "--interval", "5"], 2, "--interval is for live memory"),
    "format of a process": (["estimate", "pid:{pid}", "--format", "raw"], 2, "--format is for image files"),
    "format of guests": (["share", "qemu:web1", "--format", "raw"], 2, "--format is for image files"),
    "format of audited guests": (["audit", "qemu:web1", "--format", "raw"], 2, "--format is for image files"),
    "sharers of audited guests": (["audit", "qemu:web1", "--max-sharers", "4"], 2, "--max-sharers is for image files"),
    "reserve of images": (["share", "{a}", "--reserve-mib", "5"], 2, "--reserve-mib is for running QEMU guests"),
    "huge pages of images": (["share", "{a}", "--huge-pages", "spare"], 2, "--huge-pages is for running QEMU guests"),
    "groups of Xen": (["audit", "xen:", "--group", "all"], 2, "--group is not for Xen"),
    "usage": (["estimate"], 2, "SOURCE"),
    "command": (["levitate"], 2, "levitate"),
}


@pytest.mark.parametrize("what", BAD_INPUT)
def test_bad_input_is_one_line_and_leaves_nothing(
    what: str, memshr: CommandLine, images: tuple[Path, Path], tmp_path: Path
) -> None:
    arguments, code, words = BAD_INPUT[what]
    (tmp_path / "empty").touch()
    (tmp_path / "odd").write_bytes(bytes(PAGE_SIZE + 7))
    os.link(images[0], tmp_path / "link")
    before = sorted(tmp_path.iterdir())
    places = {"tmp": tmp_path, "a": images[0], "pid": os.getpid()}
    outcome = memshr(*(argument.format_map(places) for argument in arguments))
    assert outcome.code == code
    assert words in outcome.err
    assert "Traceback" not in outcome.err
    if what not in ("usage", "command", "unknown domain"):
        assert outcome.err.startswith("memshr: ")
        assert outcome.err.count("\n") == 1
        assert outcome.out == ""
    assert sorted(tmp_path.iterdir()) == before


def test_headline_of_a_sample_is_what_is_certain(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    estimate = json.loads(memshr("estimate", *images, "--sample", "1/2", "--seed", "1", "--json").out)
    low, high = (f"{pages * PAGE_SIZE / 2**20:,.1f}" for pages in estimate["bounds"]["saved_pages"])
    first = memshr("estimate", *images, "--sample", "1/2", "--seed", "1").out.splitlines()[0]
    assert first.startswith(f"Between {low} and {high} MiB can be saved")


@pytest.mark.parametrize(
    ("uid", "words"), [(0, "o QEMU guest runs on this host"), (1000, "o QEMU guest runs that this user may see")]
)
def test_a_user_is_not_told_that_there_is_no_guest(
    memshr: CommandLine, monkeypatch: pytest.MonkeyPatch, uid: int, words: str
) -> None:
    monkeypatch.setattr("memshr.qemu.guests.find_guests", list)
    monkeypatch.setattr("memshr.opening.guests.os.geteuid", lambda: uid)
    status, share = memshr("status"), memshr("share", "qemu:all")
    assert (status.code, share.code) == (0, 2)
    for text in (status.out, share.err):
        assert words in text
        assert ("run memshr as root" in text) == (uid != 0)


def test_internal_error_is_one_line_too(
    memshr: CommandLine, images: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_arguments: object) -> None:
        raise ZeroDivisionError("a bug\nof two lines")

    monkeypatch.setattr("memshr.cli.estimate.estimate_sources", lambda *_arguments, **_options: broken())
    outcome = memshr("estimate", images[0])
    assert outcome.code == 1
    assert outcome.err == "memshr: internal error, please report it: ZeroDivisionError: a bug of two lines\n"


def contradiction(*_arguments: object, **_options: object) -> None:
    """A defect of ours: the books contradict themselves."""
    logging.getLogger("memshr.test").debug("what led to it, of guest %s", "a\nb")
    raise InvariantError("frame 7 has no gfn")


def test_invariant_error_says_where_the_record_is(
    memshr: CommandLine, images: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memshr.cli.estimate.estimate_sources", contradiction)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    outcome = memshr("estimate", images[0])
    assert (outcome.code, outcome.out) == (1, "")
    (path,) = tmp_path.glob("memshr-record-*")
    assert outcome.err == f"memshr: frame 7 has no gfn; what led to it is in {path}\n"
    assert path.stat().st_mode & 0o777 == 0o600
    heading, led, defect = path.read_text().splitlines()
    assert heading.endswith(f"memshr estimate {images[0]}")
    assert led.endswith("what led to it, of guest a\\nb")
    assert " CRITICAL memshr.cli.main " in defect
    assert defect.endswith("InvariantError: frame 7 has no gfn")


def test_invariant_error_with_a_log_names_it(
    memshr: CommandLine, images: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("memshr.cli.estimate.estimate_sources", contradiction)
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    log = tmp_path / "log"
    outcome = memshr("--log", log, "estimate", images[0])
    assert outcome.code == 1
    assert outcome.err == f"memshr: frame 7 has no gfn; what led to it is at the end of {log}\n"
    assert not list(tmp_path.glob("memshr-record-*"))
    _heading, led, defect, end = log.read_text().splitlines()
    assert led.endswith("what led to it, of guest a\\nb")
    assert defect.endswith("InvariantError: frame 7 has no gfn")
    assert end.endswith("exit code 1")


def test_log_tells_of_a_session_and_of_an_error(memshr: CommandLine, images: tuple[Path, Path], tmp_path: Path) -> None:
    log = tmp_path / "log"
    assert memshr("--log", log, "share", *images, "--group", "web=a.raw,b.raw").err == ""
    text = log.read_text()
    for words in (
        f"memshr.opening.images {os.getpid()} domain 1 is image {images[0]}, format raw",
        "group web: 2 domains",
        "group web: scan, 13 pages",
        "group web: share, 8 pages",
        "group web: done",
        "exit code 0",
    ):
        assert f"{words}\n" in text
    assert memshr("--log", log, "share", tmp_path / "nonsuch").code == 2
    assert f"ERROR memshr.cli.main {os.getpid()} {tmp_path / 'nonsuch'}: " in log.read_text().removeprefix(text)


def test_verbose_tells_of_a_session(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    outcome = memshr("-v", "share", *images, "--json")
    assert json.loads(outcome.out)["total_pages"] == 13
    assert " INFO memshr.sharing.session " in outcome.err
    assert memshr("share", *images).err == ""


def test_log_that_cannot_be_written_is_one_line_and_nothing_is_done(
    memshr: CommandLine, images: tuple[Path, Path], tmp_path: Path
) -> None:
    outcome = memshr("--log", tmp_path, "share", *images)
    assert (outcome.code, outcome.out) == (2, "")
    assert outcome.err == f"memshr: {tmp_path} is a directory; name a file of your own, or a new one, for --log\n"


def test_reader_that_has_seen_enough_is_no_error(images: tuple[Path, Path]) -> None:
    command = f"{sys.executable} -m memshr estimate {images[0]} --json | head -n 1"
    done = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, "{\n", "")


def test_terminated_capture_leaves_no_file(tmp_path: Path) -> None:
    target = [sys.executable, "-c", "held = bytearray(b'x') * 400_000_000\nprint('ready', flush=True)\ninput()"]
    with subprocess.Popen(target, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        command = [sys.executable, "-m", "memshr", "capture", f"pid:{process.pid}", "-o", str(tmp_path / "x.core")]
        with subprocess.Popen(command) as capture:
            while not list(tmp_path.iterdir()) and capture.poll() is None:
                pass  # until the temporary file is there
            capture.terminate()
        process.communicate("\n")
    assert capture.returncode in (0, 143)  # 0: it had finished before the signal came
    assert [path.name for path in tmp_path.iterdir()] == ["x.core"] * (capture.returncode == 0)


def test_help_reads_like_a_manual(memshr: CommandLine) -> None:
    outcome = memshr("--help")
    assert outcome.code == 0
    for words in ("Examples:", "Exit codes:", "trust group", "estimate", "replay"):
        assert words in outcome.out
    assert max(map(len, outcome.out.splitlines())) <= 110


def test_version(memshr: CommandLine) -> None:
    assert memshr("--version").out.startswith("memshr 0.")


def test_demo_tells_the_whole_story(memshr: CommandLine) -> None:
    outcome = memshr("demo")
    assert outcome.code == 0, outcome.err
    for words in (
        "Four programs",
        "shares within itself only",
        "The writer reads what it wrote",
        "Audit after the write: 0 findings.",
        "memshr estimate a.core b.core",
    ):
        assert words in outcome.out


def test_demo_in_json_adds_up(memshr: CommandLine) -> None:
    stories = json.loads(memshr("demo", "--json").out)
    together = stories["together"]
    assert len(together["domains"]) == 4
    assert together["inter_pages"] > 1000
    assert together["saved_pages"] == together["zero_pages"] + together["intra_pages"] + together["inter_pages"]
    assert stories["alone"]["saved_pages"] == stories["alone"]["zero_pages"] + stories["alone"]["intra_pages"]


# -- hosts -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments", [["share", "xen:all"], ["estimate", "xen:"], ["audit", "xen:"], ["status", "xen:"]]
)
def test_without_xen_one_line_says_what_is_missing(arguments: list[str], memshr: CommandLine) -> None:
    if Path("/proc/xen/capabilities").exists():
        pytest.skip("this is a Xen host")
    outcome = memshr(*arguments)
    assert (outcome.code, outcome.out) == (3, "")
    assert outcome.err.startswith("memshr: ")
    assert outcome.err.count("\n") == 1


def test_sources_of_two_kinds(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    outcome = memshr("share", images[0], "qemu:all")
    assert outcome.code == 2
    assert "cannot share with each other" in outcome.err


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> XenHypervisor:
    """A Xen host that is the stand-in, with two domains; what the commands open as ``xen:``."""
    played = StandIn()
    xen = open_stand_in(played)
    for name in ("one", "two"):
        domid = played.embedded.create_domain(name, 6)
        for gfn in range(4):
            played.embedded.write(domid, Gfn(gfn), bytes([gfn // 2]) * PAGE_SIZE)
    for module in ("cli.share", "cli.audit", "cli.status", "opening.hosts", "opening.xen"):
        monkeypatch.setattr(f"memshr.{module}.open_xen", lambda: contextlib.nullcontext(xen))
    return xen


def test_the_commands_on_a_stand_in_for_xen(memshr: CommandLine, stand_in: XenHypervisor) -> None:
    estimate = json.loads(memshr("estimate", "xen:all", "--group", "all", "--json").out)
    assert (estimate["zero_pages"], estimate["intra_pages"], estimate["inter_pages"]) == (8, 2, 1)
    assert stand_in.counters().used_frames == 0
    share = json.loads(memshr("share", "xen:1", "xen:2", "--group", "all", "--json").out)
    assert share["audit_findings"] == []
    assert share["saved_pages"] == 10  # Xen keeps a frame for the zero pages
    status = memshr("status", "xen:")
    assert status.code == 0
    for words in ("dom1", "dom2", "memory sharing is built in", "2 frames shared"):
        assert words in status.out
    assert json.loads(memshr("status", "xen:all", "--json").out)["counters"] == {"freed_pages": 10, "used_frames": 2}
    assert memshr("top", "xen:", "--count", "2", "--interval", "0.1").out.count("Xen ") == 2
    audit = memshr("audit", "xen:")
    assert (audit.code, audit.out) == (0, "0 findings; 2 frames are shared and save 10 pages.\n")


def test_an_estimate_names_the_domains_of_a_host_as_the_host_does(
    memshr: CommandLine, stand_in: XenHypervisor, images: tuple[Path, Path]
) -> None:
    alone = memshr("estimate", "xen:2")
    assert "domain 2, gfn" in alone.out
    together = json.loads(memshr("estimate", images[0], "xen:2", images[1], "xen:1", "--group", "all", "--json").out)
    assert [domain["domid"] for domain in together["domains"]] == [3, 2, 4, 1]
    assert together["groups"][0]["domids"] == [3, 2, 4, 1]
    assert {content["first"]["domid"] for content in together["contents"]} <= {1, 2, 3, 4}


# -- ctl -------------------------------------------------------------------------------------------------------------

SCRIPT = """
# the story of the calls
create_domain name=A pages=16
create_domain B 16
write dom=A gfn=3 data="same content" byte=0
write dom=B gfn=5 data="same content" byte=0
nominate dom=A gfn=3 save=ha
nominate B 5 save=hb
share A 3 $ha B 5 $hb
debug-gfn dom=B gfn=5
read dom=B gfn=5
audit
info
"""


def test_ctl_runs_a_script(memshr: CommandLine) -> None:
    outcome = memshr("ctl", "embedded:", stdin=SCRIPT)
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[4:8] == ["0 handle=2", "0 handle=3", "0", "2"]
    assert '"same content"' in lines[8]
    assert lines[9] == "0 findings=[]"
    assert "freed_pages=1 used_frames=1" in lines[10]


def test_ctl_script_in_json(memshr: CommandLine) -> None:
    answers = [json.loads(line) for line in memshr("ctl", "embedded:", "--json", stdin=SCRIPT).out.splitlines()]
    assert [answer["handle"] for answer in answers[4:6]] == [2, 3]
    assert answers[-1]["domains"]["A"] == {"domid": 1, "tot_pages": 15, "shr_pages": 1}


def test_ctl_on_images(memshr: CommandLine, images: tuple[Path, Path]) -> None:
    host = f"embedded:{images[0]},{images[1]}"
    assert memshr("ctl", host, "nominate", "1", "0x2").out == "0 handle=2\n"
    assert memshr("ctl", host, "nominate", "dom=b.raw", "gfn=1").out == "0 handle=2\n"
    assert memshr("ctl", host, "enable", "1").out == "0\n"
    assert memshr("ctl", host, "range", "1", "2", "0", "3").code == 0


def test_ctl_refused_call_says_what_it_means_for_that_call(memshr: CommandLine) -> None:
    script = "create_domain A 2\nnominate A 0 save=h\nshare A 0 99 A 1 $h\ndebug_gfn A 1\nnominate A 7\n"
    outcome = memshr("ctl", "embedded:", stdin=script)
    assert outcome.code == 1
    share, debug, nominate = outcome.out.splitlines()[2:]
    assert share.startswith("-1 client handle invalid (share_gfns: the client's handle")
    assert debug == "-1 EINVAL (debug_gfn: gfn 1 of domain 1 is not shared)"
    assert nominate == "-1 EINVAL (nominate_gfn: gfn 7 of domain 1 is not populated with plain RAM)"


@pytest.mark.parametrize(
    ("script", "where"),
    [
        ("create_domain A 2\nlevitate A", "line 2, column 1: "),
        ("create_domain A 2\n\nnominate A gfm=1", "line 3, column 12: "),
        ("nominate A 1", "line 1: nominate: no domain was ever named 'A'"),
        ("create_domain A 2\nnominate A -2", "line 2: nominate: gfn=-2"),
        ("create_domain A 2\nnominate A 0x10000000000000000", "line 2: nominate: gfn="),
        ("create_domain A two", "line 1: create_domain: pages='two' is not a number"),
        ("create_domain A -2", "line 1: create_domain: -2 pages from gfn 0 on exceed"),
        ("create_domain A 2\nsetmaxmem A -1", "line 2: setmaxmem: pages=-1 is negative"),
        ("create_domain A 2\nenable A 0", "line 2: enable gives enable itself"),
        ("create_domain A 2\nenable A domm=1", "line 2, column 10: control: no parameter 'domm'"),
        ("create_domain A 2\nnominate A " + "1" * 5000, "line 2, column 12: a number of 5000 digits"),
        ("create_domain A 2\nnominate A 1 save=$h", "line 2, column 14: '$h' is no name"),
    ],
)
def test_ctl_bad_script_names_line_and_column(script: str, where: str, memshr: CommandLine) -> None:
    outcome = memshr("ctl", "embedded:", stdin=script)
    assert outcome.code == 2
    assert outcome.err.startswith(f"memshr: {where}")
    assert outcome.err.count("\n") == 1


def test_ctl_takes_the_arguments_of_the_shell_as_they_are(memshr: CommandLine) -> None:
    for words in (["text=two words"], ['a "quoted" # text'], ["text="], [""], ["text=a\\"]):
        assert memshr("ctl", "embedded:", "note", *words).out == "0\n", words


def test_ctl_calls_by_their_other_names(memshr: CommandLine) -> None:
    outcome = memshr("ctl", "embedded:", stdin="create_domain A 2\n  enable A # a remark\ndisable dom=A\n")
    assert outcome.out.splitlines()[1:] == ["0", "0"]


def test_ctl_shows_two_domains_of_one_name(memshr: CommandLine) -> None:
    outcome = memshr("ctl", "embedded:", "--json", stdin="create_domain A 2\ncreate_domain A 3\ninfo\n")
    assert list(json.loads(outcome.out.splitlines()[-1])["domains"]) == ["A (1)", "A (2)"]


def test_ctl_asked_for_more_memory_than_there_is(memshr: CommandLine) -> None:
    outcome = memshr("ctl", "embedded:", stdin="create_domain A 60000000000\naudit\n")
    assert outcome.out.startswith("-1 ENOMEM (create_domain: this process cannot have 60000000000 pages")


def test_ctl_help_lists_every_call(memshr: CommandLine) -> None:
    text = memshr("ctl", "--help").out
    for call in ("nominate dom gfn", "share sdom sgfn sh cdom cgfn ch", "fork_reset dom [state] [memory]"):
        assert call in text


# -- replay ----------------------------------------------------------------------------------------------------------

TRACES = Path(__file__).parents[1] / "traces"


def test_replay_prints_a_line_a_scenario(memshr: CommandLine) -> None:
    files = [TRACES / "share_basic_lifecycle.json", TRACES / "oom_p2m_pool_add_to_physmap.json"]
    outcome = memshr("replay", *files)
    assert outcome.code == 0
    lines = outcome.out.splitlines()
    assert lines[0] == "ok share_basic_lifecycle (28 steps)"
    assert lines[1] == "ok oom_p2m_pool_add_to_physmap (146 steps; failed-plug-counted)"
    assert lines[2].startswith("(failed-plug-counted: ")


def test_replay_exits_with_1_on_a_difference(memshr: CommandLine, tmp_path: Path) -> None:
    trace = json.loads((TRACES / "nominate_twice.json").read_text())
    trace["steps"][6]["handle"] = 5
    changed = tmp_path / "changed.json"
    changed.write_text(json.dumps(trace))
    outcome = memshr("replay", changed)
    assert outcome.code == 1
    assert outcome.out == ("differs changed step 7: nominate dom=A gfn=2 save=h: handle: Xen 5, memshr 2\n")
    (result,) = json.loads(memshr("replay", changed, "--json").out).values()
    assert (result["ok"], result["differences"][0]["what"]) == (False, "handle")
