"""A libvirt of our own, and Linux guests that it starts and whose QMP sockets it holds.

It and they end with the ``with`` that they were made in; guests outlive a test run that is killed.

The daemon runs in a mount namespace, where its folders of state and its settings are ours: a libvirt of this machine is
neither used nor disturbed. Guests run as another user, under the seccomp filter that libvirt gives them.
"""

import importlib.util
import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self
from xml.sax.saxutils import quoteattr

from guests.kit import LinuxKit, MissingPartError, find_program, need_root
from guests.linux import LinuxGuest
from guests.machine import GuestFailedError, wait_until

START_DEADLINE_S = 30.0
PACKAGES = "libvirt-daemon libvirt-daemon-driver-qemu libvirt-clients"
FOLDERS = {
    "etc": Path("/etc/libvirt"),
    "run": Path("/run/libvirt"),
    "lib": Path("/var/lib/libvirt"),
    "log": Path("/var/log/libvirt"),
    "cache": Path("/var/cache/libvirt"),
}
USER = "libvirt-qemu"
"""libvirt does not start without this user of its package, also where another one is set"""

DAEMON_SETTINGS = """
auth_unix_rw = "none"
log_outputs = "3:file:{folder}/log/daemon"
"""
QEMU_SETTINGS = """
user = "nobody"
group = "nogroup"
security_driver = "none"
cgroup_controllers = []
namespaces = []
stdio_handler = "file"
"""
DOMAIN = """
<domain type='qemu'>
  <name>{name}</name>
  <memory unit='MiB'>{memory_mib}</memory>
  {more}
  <os>
    <type arch='x86_64' machine='pc'>hvm</type>
    <kernel>{kernel}</kernel>
    <initrd>{initramfs}</initrd>
    <cmdline>console=ttyS0 quiet panic=-1 no_timer_check</cmdline>
  </os>
  <features><acpi/></features>
  <devices>
    <emulator>{qemu}</emulator>
    <serial type='file'><source path={console}/><target port='0'/></serial>
    <serial type='unix'><source mode='bind' path={port}/><target port='1'/></serial>
  </devices>
</domain>
"""


def find_libvirt() -> Path:
    """The daemon of libvirt; its QEMU driver, virsh and the Python bindings are there, too.

    :raises MissingPartError: they are not, or we may not run them.
    """
    need_root("a libvirt in a mount namespace")
    try:
        find_program("virsh", PACKAGES)
        daemon = find_program("libvirtd", PACKAGES)
        if not any(Path("/usr/lib").glob("*/libvirt/connection-driver/libvirt_driver_qemu.so")):
            raise MissingPartError(f"libvirt has no QEMU driver; apt-get install {PACKAGES}")
    except MissingPartError as missing:
        raise MissingPartError(str(missing), part="libvirt") from missing
    if importlib.util.find_spec("libvirt") is None:
        remedy = "apt-get install libvirt-dev pkg-config gcc, then pip install 'memshr[libvirt]'"
        raise MissingPartError(f"libvirt's Python bindings are not installed; {remedy}", part="libvirt")
    return daemon


class Libvirt:
    """A running libvirt with its guests; all of it ends with the ``with``.

    :raises MissingPartError: this machine has none.
    :raises GuestFailedError: it does not start.
    """

    def __init__(self, qemu: Path) -> None:
        self._daemon = find_libvirt()
        self.folder = Path(tempfile.mkdtemp(prefix="memshr-libvirt-"))
        self.folder.chmod(0o755)
        self.uri = f"qemu+unix:///system?socket={self.folder}/run/libvirt-sock"
        self._made = [folder for folder in FOLDERS.values() if not folder.exists()]
        self._process: subprocess.Popen[bytes] | None = None
        try:
            self._start(qemu)
        except BaseException:
            self.end()
            raise

    def _start(self, qemu: Path) -> None:
        for name in FOLDERS:
            (self.folder / name).mkdir()
        (self.folder / "etc/libvirtd.conf").write_text(DAEMON_SETTINGS.format(folder=self.folder))
        (self.folder / "etc/qemu.conf").write_text(QEMU_SETTINGS)
        covered = {self.folder / name: target for name, target in FOLDERS.items()}
        for name, entry in (
            ("passwd", f"{USER}:x:64055:64055::/nonexistent:/bin/false"),
            ("group", f"{USER}:x:64055:"),
        ):
            copy = self.folder / name
            copy.write_text(f"{Path('/etc', name).read_text().rstrip()}\n{entry}\n")
            covered[copy] = Path("/etc", name)
        if Path("/dev/kvm").exists():
            # Where root may use KVM and the user of the guests may not, libvirt looks at QEMU anew for every guest.
            no_kvm = self.folder / "no-kvm"
            no_kvm.touch(mode=0o600)
            covered[no_kvm] = Path("/dev/kvm")
        for target in FOLDERS.values():
            target.mkdir(parents=True, exist_ok=True)
        # No other emulator in the PATH: libvirt asks each that it finds what it can do.
        (self.folder / "bin").mkdir()
        (self.folder / "bin" / qemu.name).symlink_to(qemu)
        script = [f"mount --bind {source} {target}" for source, target in covered.items()]
        script.append(f"PATH={self.folder}/bin exec {self._daemon} --config /etc/libvirt/libvirtd.conf")
        with (self.folder / "output").open("wb") as output:
            self._process = subprocess.Popen(
                ["setpriv", "--pdeathsig=KILL", "unshare", "--mount", "sh", "-ec", "\n".join(script)],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
            )
        wait_until(self._answers, START_DEADLINE_S, "libvirtd starts")

    def _answers(self) -> bool:
        assert self._process is not None
        if self._process.poll() is not None:
            raise GuestFailedError(f"libvirtd ended: {(self.folder / 'output').read_text().strip()}")
        try:
            self.virsh("list")
        except GuestFailedError:
            return False
        return True

    def virsh(self, *arguments: str) -> str:
        """Run a command of virsh and return what it printed.

        :raises GuestFailedError: it failed; the text is libvirt's.
        """
        command = ["virsh", "--quiet", "--connect", self.uri, *arguments]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode != 0:
            raise GuestFailedError(f"virsh {arguments[0]}: {done.stderr.strip()}")
        return done.stdout

    def end(self) -> None:
        """End the daemon and remove its folders."""
        if self._process is not None:
            self._process.terminate()
            self._process.wait()
        for folder in self._made:
            if folder.exists():
                folder.rmdir()
        shutil.rmtree(self.folder)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.end()


class LibvirtGuest(LinuxGuest):
    """A Linux guest that libvirt starts, with two serial ports as every Machine has them, and no monitor of ours.

    :param more: elements that its description has besides.
    """

    def __init__(self, name: str, kit: LinuxKit, libvirt: Libvirt, *, memory_mib: int = 256, more: str = "") -> None:
        super().__init__(name, kit, memory_mib=memory_mib, user="nobody")
        self._more = more
        self.folder.chmod(0o755)
        self._libvirt = libvirt
        self._running_pid = 0

    def boot(self, arguments: Sequence[str] = (), *, accelerator: str = "tcg") -> Self:
        """Have libvirt start it; the kernel boots meanwhile. libvirt itself chooses QEMU's arguments."""
        assert not arguments
        assert accelerator == "tcg"
        # libvirt gives the files to the guest's user, and QEMU must come to them.
        kernel, initramfs = (Path(shutil.copy(file, self.folder)) for file in (self._kit.kernel, self._kit.initramfs))
        description = self.folder / "domain.xml"
        description.write_text(
            DOMAIN.format(
                name=self.name,
                memory_mib=self.memory_mib,
                more=self._more,
                kernel=kernel,
                initramfs=initramfs,
                qemu=self._kit.qemu,
                console=quoteattr(os.fspath(self._console_path)),
                port=quoteattr(os.fspath(self.port_path)),
            )
        )
        self._libvirt.virsh("create", os.fspath(description))
        self._running_pid = int((self._libvirt.folder / f"run/qemu/{self.name}.pid").read_text())
        return self

    @property
    def pid(self) -> int:
        """The process of QEMU."""
        return self._running_pid

    @property
    def alive(self) -> bool:
        """Is the process still there?"""
        return Path(f"/proc/{self._running_pid}/exe").exists()

    @property
    def stderr(self) -> str:
        """What QEMU itself said."""
        return (self._libvirt.folder / f"log/qemu/{self.name}.log").read_text(errors="replace")[-2000:]

    def kill(self) -> None:
        """Have libvirt end it, and remove its folder."""
        if self._running_pid and self.alive:
            self._libvirt.virsh("destroy", self.name)
        super().kill()
