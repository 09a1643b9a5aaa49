"""A thread that is borrowed gets everything back, whenever the injector dies; another program than the one that was
looked at never gets a register set. Programs that know all that they have stand for QEMU."""

import json
import os
import signal
import struct
from collections.abc import Iterator
from pathlib import Path

import pytest

from guests.machine import wait_until
from guests.victims import Victim, altered, ask_one, dying, programs
from live.parts import needed_parts
from memshr.errors import RefusedDomainError
from memshr.qemu import injection, syscalls
from memshr.qemu.control_area import MAPPED_CONTROL, ControlArea
from memshr.qemu.identity import identity_of
from memshr.qemu.injection import Action, Injector, forbidden_calls, install, uninstall

pytestmark = pytest.mark.skipif(os.geteuid() != 0, reason="only root may open /proc/PID/map_files; run as root")

MOST_PTRACE_CALLS = 40
ANSWERS_OF_ANOTHER = "it has ended, or runs another program now"


@pytest.fixture(scope="module")
def built() -> Iterator[tuple[Path, Path, Path]]:
    """The programs ``borrowed``, ``impostor`` and ``privileged``."""
    with needed_parts(), programs() as paths:
        yield paths


@pytest.fixture
def control() -> Iterator[ControlArea]:
    """A new control area."""
    area = ControlArea.create()
    yield area
    area.close()


@pytest.fixture
def injector() -> Iterator[Injector]:
    """An injector, ended for sure."""
    one = Injector()
    yield one
    one.close()


def is_mapped(pid: int) -> bool:
    return MAPPED_CONTROL in Path(f"/proc/{pid}/maps").read_text()


# -- as if nothing had been --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("call", ["ppoll", "poll", "nanosleep"])
def test_the_thread_has_all_that_it_had_after_attaching_and_detaching(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector, call: str
) -> None:
    with Victim(built[0], call, files=[control.file]) as victim:
        victim.rounds(1)
        identity = identity_of(victim.pid)
        installed = install(identity, "victim", control, control.file, injector)
        assert installed.code_address == control.code_address
        assert installed.forbidden == frozenset()
        assert control.thread_lives(victim.pid)
        victim.rounds()
    with Victim(built[0], call, str(control.file), files=[control.file]) as victim:
        control.code_address = int(victim.line(), 16)
        victim.rounds(1)
        uninstall(identity_of(victim.pid), "victim", control, injector)
        assert not is_mapped(victim.pid)
        victim.rounds()


def test_a_call_with_a_time_limit_goes_on_and_does_not_begin_anew(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    with Victim(built[0], "long", str(control.file), files=[control.file]) as victim:
        control.code_address = int(victim.line(), 16)
        call = Path(f"/proc/{victim.pid}/syscall")
        wait_until(lambda: call.read_text().startswith("35 "), 10, "it sleeps")
        uninstall(identity_of(victim.pid), "victim", control, injector)
        wait_until(lambda: call.read_text().startswith(f"{syscalls.NR_RESTART_SYSCALL} "), 10, "it sleeps on")


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("call", ["ppoll", "nanosleep"])
@pytest.mark.parametrize("action", ["attach", "detach"])
def test_killed_at_any_ptrace_call_it_leaves_the_thread_with_all_that_it_had(
    built: tuple[Path, Path, Path], action: str, call: str, after: bool
) -> None:
    mapped = set()
    for dies_at in range(MOST_PTRACE_CALLS):
        control = ControlArea.create()
        of_detach = [str(control.file)] if action == "detach" else []
        with Victim(built[0], call, *of_detach, files=[control.file]) as victim:
            number = int(victim.line(), 16) if action == "detach" else control.file
            victim.rounds(1)
            answer = ask_one(dying(dies_at, after=after), action, identity_of(victim.pid), number, control.file)
            victim.rounds()
            mapped.add(is_mapped(victim.pid))
        control.close()
        if answer:  # it made fewer calls
            break
    assert dies_at > 8
    assert answer
    assert "refused" not in json.loads(answer)
    assert mapped == {False, True}


@pytest.mark.parametrize("call", ["ppoll", "nanosleep"])
def test_a_signal_that_comes_in_between_is_delivered(
    built: tuple[Path, Path, Path], control: ControlArea, call: str
) -> None:
    signalling = altered("""
real = syscalls.ptrace_set_registers
def set_registers(tid, registers):
    syscalls.ptrace_set_registers = real
    os.kill(tid, signal.SIGUSR2)
    real(tid, registers)
syscalls.ptrace_set_registers = set_registers
""")
    with Victim(built[0], call, files=[control.file]) as victim:
        victim.rounds(1)
        answer = json.loads(ask_one(signalling, "attach", identity_of(victim.pid), control.file, control.file))
        assert "code_address" in answer
        assert control.thread_lives(victim.pid)
        wait_until(lambda: victim.checked_round()[1] == 1, 10, "the signal arrives, once")
        victim.rounds()


def test_a_stopped_process_stays_stopped(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    with Victim(built[0], "ppoll", files=[control.file]) as victim:
        victim.rounds(1)
        status = Path(f"/proc/{victim.pid}/status")
        os.kill(victim.pid, signal.SIGSTOP)
        wait_until(lambda: "\nState:\tT (stopped)" in status.read_text(), 10, "it is stopped")
        with pytest.raises(RefusedDomainError, match="it is stopped; is the process"):
            install(identity_of(victim.pid), "victim", control, control.file, injector)
        wait_until(lambda: "\nState:\tT (stopped)" in status.read_text(), 10, "it is stopped again")
        os.kill(victim.pid, signal.SIGCONT)
        victim.rounds()
        assert not is_mapped(victim.pid)


def test_a_thread_that_does_not_stop_is_let_go(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    with Victim(built[0], "vfork", files=[control.file]) as victim:
        assert victim.line() == "hangs"
        with pytest.raises(RefusedDomainError, match="does not stop"):
            install(identity_of(victim.pid), "victim", control, control.file, injector)
        assert "\nTracerPid:\t0\n" in Path(f"/proc/{victim.pid}/status").read_text()
        victim.hang_up()
        victim.rounds()
        # The next request gets a new injector.
        install(identity_of(victim.pid), "victim", control, control.file, injector)
        victim.rounds()


def test_a_thread_that_does_not_come_back_from_a_call_is_let_go(
    built: tuple[Path, Path, Path], control: ControlArea
) -> None:
    slow = altered("""
real = tracee.Tracee._resume
def resume(self, request, signal_number=0):
    if request == syscalls.PTRACE_SYSCALL:
        self._stands = False
        self._end = 0.0
        return
    real(self, request, signal_number)
tracee.Tracee._resume = resume
""")
    with Victim(built[0], "ppoll", files=[control.file]) as victim:
        victim.rounds(1)
        answer = json.loads(ask_one(slow, "attach", identity_of(victim.pid), control.file, control.file))
        assert answer["refused"] == "its main thread does not come back from a system call"
        assert answer["stuck"]
        victim.rounds()
        assert "\nTracerPid:\t0\n" in Path(f"/proc/{victim.pid}/status").read_text()


@pytest.mark.parametrize("place", ["tracee.Tracee.check", "tracee.Tracee._resume"])
def test_the_parent_of_a_process_that_is_killed_meanwhile_hears_of_it(
    built: tuple[Path, Path, Path],
    control: ControlArea,
    injector: Injector,
    monkeypatch: pytest.MonkeyPatch,
    place: str,
) -> None:
    killing_it = altered(f"""
real = {place}
def kill(self, *arguments):
    os.kill(self.pid, signal.SIGKILL)
    return real(self, *arguments)
{place} = kill
""")
    monkeypatch.setattr(injection, "command", lambda: killing_it)
    with Victim(built[0], "ppoll", files=[control.file]) as victim:
        victim.rounds(1)
        with pytest.raises(RefusedDomainError, match=ANSWERS_OF_ANOTHER):
            install(identity_of(victim.pid), "victim", control, control.file, injector)
        victim.wait()


# -- another program ---------------------------------------------------------------------------------------------------


def assert_untouched(victim: Victim, privileged: Path) -> None:
    """The program that the impostor has executed goes round, with other rights, and has nothing of ours."""
    victim.rounds()
    assert Path(f"/proc/{victim.pid}/exe").readlink() == privileged
    if not os.statvfs(privileged).f_flag & os.ST_NOSUID:
        assert identity_of(victim.pid).users == (65534, 0, 0, 0)
    assert not is_mapped(victim.pid)


@pytest.mark.parametrize("action", ["attach", "detach"])
def test_a_program_that_was_executed_since_the_look_is_not_touched(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector, action: Action
) -> None:
    _, impostor, privileged = built
    with Victim(impostor, str(privileged), "ppoll", files=[control.file], user="nobody") as victim:
        victim.line()
        identity = identity_of(victim.pid)
        victim.tell()
        victim.rounds(1)
        answer = injector.ask(action, identity, 0x10000000000 if action == "detach" else control.file, control.file)
        assert answer["refused"] == ANSWERS_OF_ANOTHER
        assert_untouched(victim, privileged)


def test_the_same_program_executed_again_is_another_program(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    _, impostor, _ = built
    with Victim(impostor, str(impostor), "/bin/false", files=[control.file]) as victim:
        victim.line()
        identity = identity_of(victim.pid)
        victim.tell()
        victim.line()
        with pytest.raises(RefusedDomainError, match=ANSWERS_OF_ANOTHER):
            install(identity, "victim", control, control.file, injector)
        assert not is_mapped(victim.pid)


@pytest.mark.parametrize(
    "place", ["Identity.still_holds", "tracee.Tracee.check", "tracee.Tracee._write", "syscalls.ptrace_set_registers"]
)
def test_a_program_that_another_thread_executes_meanwhile_is_not_touched(
    built: tuple[Path, Path, Path], control: ControlArea, place: str
) -> None:
    # While the identity is checked and after it, before the stack is written to, before the registers are set.
    _, impostor, privileged = built
    telling = altered(f"""
real = {place}
def told(one, *others):
    {place} = real
    before = "{place}" in ("Identity.still_holds", "tracee.Tracee.check")
    result = real(one, *others) if before else None
    folder = Path(f"/proc/{{getattr(one, 'pid', one)}}")
    program = os.readlink(folder / "exe")
    (folder / "fd" / "0").write_bytes(b"!")
    while os.readlink(folder / "exe") == program:
        time.sleep(0.001)
    return result if before else real(one, *others)
{place} = told
""")
    with Victim(impostor, str(privileged), "ppoll", files=[control.file], user="nobody") as victim:
        victim.line()
        answer = json.loads(ask_one(telling, "attach", identity_of(victim.pid), control.file, control.file))
        assert answer["refused"] == ANSWERS_OF_ANOTHER
        assert_untouched(victim, privileged)


@pytest.mark.parametrize("seen", [True, False])
def test_a_program_that_the_borrowed_thread_executes_is_not_touched(
    built: tuple[Path, Path, Path], control: ControlArea, seen: bool
) -> None:
    # The hostile has put other code where the instructions that we borrow were. It is seen at the first system call,
    # and if it were not, the exec would be.
    _, impostor, privileged = built
    with Victim(impostor, str(privileged), "ppoll", files=[control.file], user="nobody") as victim:
        misled = altered(f"""
place = {int(victim.line(), 16)}
look_at = injector.look_at
injector.look_at = lambda pid: look_at(pid)._replace(syscall_return=place)
get_registers = syscalls.ptrace_get_registers
def blind(tid):
    registers = get_registers(tid)
    registers.rip, registers.orig_rax = place + 2, syscalls.NR_MMAP
    return registers
set_registers = syscalls.ptrace_set_registers
def committing(tid, registers):
    set_registers(tid, registers)
    if not {seen}:
        syscalls.ptrace_get_registers = blind
syscalls.ptrace_set_registers = committing
""")
        answer = json.loads(ask_one(misled, "attach", identity_of(victim.pid), control.file, control.file))
        assert answer["refused"] == ("its program was changed while we were at it" if seen else ANSWERS_OF_ANOTHER)
        assert_untouched(victim, privileged)


# -- another file ------------------------------------------------------------------------------------------------------


def test_a_descriptor_that_is_another_file_is_not_mapped(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    other = ControlArea.create()
    with Victim(built[0], "ppoll", files=[control.file, other.file]) as victim:
        victim.rounds(1)
        for number in (other.file, 0, 999):
            with pytest.raises(RefusedDomainError, match="the descriptor that it names is not our file"):
                install(identity_of(victim.pid), "victim", control, number, injector)
        victim.rounds()
        assert not is_mapped(victim.pid)
    other.close()


@pytest.mark.parametrize("content", ["ours", "theirs"])
def test_a_file_that_was_put_in_its_place_meanwhile_is_not_run(
    built: tuple[Path, Path, Path], control: ControlArea, content: str
) -> None:
    other = ControlArea.create()
    trusting = altered(f"""
injector._is_descriptor = lambda *arguments: True
if {content == "theirs"}:  # what lies there is judged by itself too
    injector._is_mapped = lambda *arguments: True
""")
    if content == "theirs":
        os.pwrite(other.file, b"\x0f\x0b", 0)
    with Victim(built[0], "ppoll", files=[other.file]) as victim:
        victim.rounds(1)
        answer = json.loads(ask_one(trusting, "attach", identity_of(victim.pid), other.file, control.file))
        assert answer["refused"] == "what it has mapped is not our file"
        victim.rounds()
        assert not other.thread_lives(victim.pid)
    other.close()


def test_a_mapping_that_is_not_ours_is_not_taken_out(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    other = ControlArea.create()
    with Victim(built[0], "ppoll", str(other.file), files=[other.file]) as victim:
        control.code_address = int(victim.line(), 16)
        victim.rounds(1)
        with pytest.raises(RefusedDomainError, match="our mapping is not where it was"):
            uninstall(identity_of(victim.pid), "victim", control, injector)
        assert is_mapped(victim.pid)
        victim.rounds()
    other.close()


def test_what_lies_beside_our_mapping_is_not_taken_out(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    with Victim(built[0], "ppoll", str(control.file), "beside", files=[control.file]) as victim:
        control.code_address = int(victim.line(), 16)
        victim.rounds(1)
        maps = Path(f"/proc/{victim.pid}/maps").read_text()
        with pytest.raises(RefusedDomainError, match="our mapping is not where it was"):
            uninstall(identity_of(victim.pid), "victim", control, injector)
        assert Path(f"/proc/{victim.pid}/maps").read_text() == maps
        victim.rounds()


# -- seccomp -----------------------------------------------------------------------------------------------------------


def killing(number: int, first_argument: int) -> bytes:
    """A filter that kills for one system call with this first argument."""
    instructions = (
        *((0x20, 0, 0, 0), (0x15, 0, 3, number), (0x20, 0, 0, 16), (0x15, 0, 1, first_argument)),
        *((0x06, 0, 0, 0x80000000), (0x06, 0, 0, 0x7FFF0000)),
    )
    return b"".join(struct.pack("<HBBI", *each) for each in instructions)


def test_optional_calls_that_a_filter_forbids_are_told(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    memory_merge = killing(syscalls.NR_PRCTL, syscalls.PR_SET_MEMORY_MERGE)
    with Victim(built[0], "ppoll", files=[control.file], seccomp=memory_merge) as victim:
        victim.rounds(1)
        identity = identity_of(victim.pid)
        assert install(identity, "victim", control, control.file, injector).forbidden == {syscalls.NR_PRCTL}
        assert forbidden_calls(identity, "victim", control, injector) == {syscalls.NR_PRCTL}
        victim.rounds()


def test_a_filter_that_forbids_what_the_agent_needs_refuses_the_guest(
    built: tuple[Path, Path, Path], control: ControlArea, injector: Injector
) -> None:
    with Victim(built[0], "ppoll", files=[control.file], seccomp=killing(syscalls.NR_MREMAP, 0)) as victim:
        victim.rounds(1)
        with pytest.raises(RefusedDomainError, match="forbids system call 25; start QEMU without -sandbox"):
            install(identity_of(victim.pid), "victim", control, control.file, injector)
        assert not is_mapped(victim.pid)
        victim.rounds()


# -- the environment ---------------------------------------------------------------------------------------------------


def test_modules_of_the_user_do_not_reach_the_injector(
    built: tuple[Path, Path, Path],
    control: ControlArea,
    injector: Injector,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module in ("json", "memshr", "sitecustomize", "usercustomize"):
        (tmp_path / f"{module}.py").write_text("raise SystemExit('a module of the user')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    with Victim(built[0], "ppoll", files=[control.file]) as victim:
        victim.rounds(1)
        install(identity_of(victim.pid), "victim", control, control.file, injector)
        assert injector._process is not None
        assert Path(f"/proc/{injector._process.pid}/environ").read_bytes() == b""
        victim.rounds()
