"""The whole story on running guests: ``python -m guests.live_demo`` (needs root; about two minutes).

Boots three Linux guests that check their own memory without pause, and types the commands of memshr as an operator
would. What is shown below a command is what it printed.
"""

import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path

from guests.kit import MissingPartError, linux_kit, need_root
from guests.linux import LinuxGuest
from guests.machine import GuestFailedError

NAMES = ("shop", "mail", "wiki")
FILES = 32
CHECKER_PAGES = 8192
PROGRAMS = ("files", "checker")
NOTE = "/tmp/note"


class CommandFailedError(Exception):
    """A command of memshr ended with an exit code that is not 0."""


def tell(text: str) -> None:
    """One sentence of the story."""
    print(f"\n# {text}", flush=True)


def memshr(*arguments: str) -> None:
    """Type a command of memshr and show what it prints.

    :raises CommandFailedError: its exit code is not 0.
    """
    print(f"$ memshr {shlex.join(arguments)}", flush=True)
    code = subprocess.run([Path(sys.executable).with_name("memshr"), *arguments], check=False).returncode
    if code:
        raise CommandFailedError(f"memshr {arguments[0]}: exit code {code}")


def inside(guest: LinuxGuest, command: str) -> str:
    """Type a command in a guest; show and return what it prints."""
    print(f"{guest.name}# {command}")
    answer = guest.run(command).strip()
    if answer:
        print(answer, flush=True)
    return answer


def check(guests: Sequence[LinuxGuest]) -> None:
    """Wait until every program in every guest has checked its memory once more, and show what they found.

    :raises GuestFailedError: one found a byte that is wrong, or does not go on.
    """
    for guest in guests:
        guest.wait_rounds(1, PROGRAMS)
    for guest in guests:
        rounds, wrong = guest.rounds(), guest.mismatches()
        done = ", ".join(f"{program} has checked its memory {rounds[program]} times" for program in PROGRAMS)
        print(f"{guest.name}: {done}; {len(wrong)} mismatches", flush=True)
        if wrong:
            raise GuestFailedError(f"guest {guest.name}: {wrong[0]}")


def story(guests: Sequence[LinuxGuest]) -> None:
    """Share, look, write, audit, unshare, detach."""
    sources = [f"qemu:{guest.name}" for guest in guests]
    shop, mail, wiki = guests

    tell("Three ordinary QEMU guests run on this host. May memshr touch them?")
    memshr("status", *sources)

    tell("Share their equal pages. The guests go on running, and the host gets memory back.")
    memshr("share", *sources, "--group", "all")

    tell("The guests have noticed nothing: every one goes on checking its memory.")
    check(guests)

    tell("All three hold the same file in memory. One overwrites its own; the others must not see that.")
    before = inside(mail, f"md5sum {NOTE}")
    inside(shop, f"tr a-z A-Z <{NOTE} >/tmp/new && dd if=/tmp/new of={NOTE} bs=64k conv=notrunc 2>/dev/null")
    if inside(shop, f"md5sum {NOTE}") == before or inside(mail, f"md5sum {NOTE}") != before:
        raise GuestFailedError("a write in guest shop is not where it belongs")
    memshr("status", *sources)

    tell("Does what memshr believes agree with what the kernel says of each page?")
    memshr("audit", *sources)

    tell("One guest gets all its own pages back; the others go on sharing.")
    memshr("unshare", f"qemu:{wiki.name}")
    memshr("status", *sources)

    tell("Leave all of them as they were: no thread, no mapping, no descriptor of memshr stays.")
    memshr("detach", *sources)
    left = [guest.name for guest in guests if "/memfd:memshr" in Path(f"/proc/{guest.pid}/maps").read_text()]
    print(f"$ grep -l memfd:memshr /proc/{{{','.join(str(guest.pid) for guest in guests)}}}/maps")
    if left:
        raise GuestFailedError(f"something of memshr is left in {', '.join(left)}")
    check(guests)


def main() -> int:
    """Tell the story; 0 if every step went well."""
    begin = time.monotonic()
    try:
        need_root("frames of other users' guests")
        kit = linux_kit()
    except MissingPartError as missing:
        print(f"live-demo: {missing}", file=sys.stderr)
        return 2
    try:
        with ExitStack() as ending:
            print(f"# Booting three guests, {', '.join(NAMES)}, of 256 MiB each ...", flush=True)
            guests = [ending.enter_context(LinuxGuest(name, kit).boot()) for name in NAMES]
            for seed, guest in enumerate(guests, start=1):
                guest.wait_ready()
                guest.run(f"yes 'a note that every guest has' | head -c 4194304 >{NOTE}")
                guest.start_files(FILES)
                guest.start_checker(CHECKER_PAGES, seed=seed)
            check(guests)
            story(guests)
    except (GuestFailedError, CommandFailedError) as error:
        print(f"live-demo: {error}", file=sys.stderr)
        return 1
    print(f"\n# All went well, in {time.monotonic() - begin:.0f} s.")
    return 0


if __name__ == "__main__":
    sys.exit(main())
