"""A real systemd, process 1 of a pid namespace of its own, and the machine that it has booted."""

import os
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Self

import pytest
from servers import until

import pyublk

SYSTEMD = Path("/lib/systemd/systemd")
UNITS = Path("/etc/systemd/system")
#: What process 1 knows besides what is installed: not what this machine would start.
SHIPPED = [
    "basic.target",
    "final.target",
    "local-fs.target",
    "modprobe@.service",
    "multi-user.target",
    "network.target",
    "network-online.target",
    "reboot.target",
    "remote-fs.target",
    "remote-fs-pre.target",
    "shutdown.target",
    "sysinit.target",
    "systemd-journald-dev-log.socket",
    "systemd-journald.service",
    "systemd-journald.socket",
    "systemd-reboot.service",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "umount.target",
]
#: What is started at every boot: udev tells systemd of disks.
WANTED = ["systemd-journald.service", "systemd-udevd.service"]
PATIENCE = 600.0

#: Where process 1 has its root when it has a disk for it.
_ROOT = "/run/machine"
#: All that is written goes to an ext4 file system in a file, over the files that are there.
_OVER = f"""
mkdir -p {_ROOT} && mount -o loop "$DISK" {_ROOT} && cd {_ROOT} && mkdir -p upper work root
mount -t overlay overlay -o lowerdir=/,upperdir=upper,workdir=work root && cd root
for place in dev proc sys; do mount --rbind /$place $place; done
mkdir -p .before && pivot_root . .before && umount -l /.before && cd /
"""
#: Emulated machines keep no time.
_PATIENT = f"""\
[Manager]
DefaultTimeoutStartSec={PATIENCE:g}
DefaultTimeoutStopSec={PATIENCE:g}
DefaultDeviceTimeoutSec={PATIENCE:g}
"""
_START = f"""
mkdir -p /etc/systemd/system.conf.d && echo "$CONFIGURED" >/etc/systemd/system.conf.d/patient.conf
mount -t tmpfs run /run && mount -t cgroup2 cgroup /sys/fs/cgroup
exec {SYSTEMD} --system --unit="$TARGET" --show-status=0 --log-target=console
"""


def journal(disk: Path, place: Path) -> str:
    """The end of the journal that a machine which is off has kept on its disk."""
    place.mkdir()
    subprocess.run(["mount", "-o", "loop", disk, place], check=True, timeout=PATIENCE)
    try:
        return subprocess.run(
            [
                "journalctl",
                "--lines=200",
                "-o",
                "short-monotonic",
                "-D",
                place / "upper/var/log/journal",
            ],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        ).stdout
    finally:
        subprocess.run(["umount", place], check=True, timeout=PATIENCE)


class Systemd:
    """A systemd, and this machine as what runs below it sees it.

    It reaches `target`. `disk` is a file with an ext4 file system, to which everything is written;
    whoever boots with it later has the same root. Commands are looked for in `programs` first.
    """

    def __init__(
        self,
        place: Path,
        *,
        target: str = "basic.target",
        disk: Path | None = None,
        programs: Path = Path(sys.executable).parent,
    ) -> None:
        shipped = place / "shipped"
        wanted = shipped / "sysinit.target.wants"
        wanted.mkdir(parents=True)
        for name in SHIPPED:
            shutil.copy(SYSTEMD.parent / "system" / name, shipped)
        for name in WANTED:
            (wanted / name).symlink_to(shipped / name)
        self.path = f"{programs}:{os.environ['PATH']}"
        self.log = place / "log"
        self._target = target
        # Shared, as on a machine: a service's own namespace unmounts what others unmount.
        over = f"mount --make-rprivate /\n{_OVER}" if disk else ""
        start = f"set -e\n{over}mount --make-rshared /\n{_START}"
        with self.log.open("w") as log:
            self._above = subprocess.Popen(
                ["unshare", "--pid", "--mount", "--fork", "--mount-proc", "sh", "-c", start],
                env={
                    "container": "test",  # it has no console
                    "PATH": os.environ["PATH"],
                    "SYSTEMD_UNIT_PATH": f"{UNITS}:/run/systemd/generator:{shipped}",
                    "CONFIGURED": _PATIENT,
                    "TARGET": target,
                    "DISK": str(disk),
                },
                stdout=log,
                stderr=log,
            )
        self.pid = 0

    def __enter__(self) -> Self:
        try:
            until(self._runs, PATIENCE, "systemd runs")
            self.run("systemctl", "start", self._target)
        except BaseException:
            print(self.log.read_text()[-4000:])
            self._end()
            raise
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is not None:
            print(self.log.read_text()[-4000:])
        self._end()

    def _runs(self) -> bool:
        assert self._above.poll() is None, self.log.read_text()
        place = Path(f"/proc/{self._above.pid}/task/{self._above.pid}/children")
        self.pid = int(place.read_text().split()[0]) if place.read_text().split() else 0
        return self.pid > 0 and (self.root / "run/systemd/private").exists()

    @property
    def root(self) -> Path:
        """Its root directory, as it is seen from outside."""
        return Path(f"/proc/{self.pid}/root")

    def run(self, *command: str, fails: bool = False) -> str:
        """What a command prints below it."""
        try:
            done = self._run(*command)
        except subprocess.TimeoutExpired as late:
            pytest.fail(f"{command} takes too long: {late.stdout!r}{late.stderr!r}{self._state()}")
        if done.returncode and not fails:
            pytest.fail(f"{command}: {done.stdout}{done.stderr}{self._state()}")
        return done.stdout.strip()

    def _run(self, *command: str, timeout: float = PATIENCE) -> "subprocess.CompletedProcess[str]":
        return subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-p", *command],
            env={**os.environ, "PATH": self.path},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=timeout,
            check=False,
        )

    def _state(self) -> str:
        """What systemd is doing, and what it and the services have said."""
        commands = ("systemctl list-jobs", "systemctl --failed", "journalctl -n 100 -o short")
        told = [self._run(*one.split(), timeout=30).stdout for one in commands]
        return "\n".join(["", *told, self.log.read_text()[-4000:]])

    def pyublk(self, *arguments: str) -> str:
        return self.run("pyublk", *arguments)

    def show(self, unit: str, *properties: str) -> list[str]:
        found = self.run("systemctl", "show", unit, *(f"-p{name}" for name in properties))
        values = dict(line.split("=", 1) for line in found.splitlines())
        return [values[name] for name in properties]

    def kill(self, *units: str) -> None:
        """All processes of units, by SIGKILL. That systemctl meets one that is just ending is no
        failure: its main process is gone then."""
        before = {unit: self.show(unit, "MainPID")[0] for unit in units}
        self.run("systemctl", "kill", "--signal=SIGKILL", *units, fails=True)
        for unit, pid in before.items():
            until(lambda unit=unit, pid=pid: self.show(unit, "MainPID") != [pid], PATIENCE, unit)

    def is_back(self, unit: str) -> None:
        """Waits until its server has been started again, once, by itself."""

        def active() -> bool:
            time.sleep(0.5)  # each look takes the emulated processors half a second
            return self.show(unit, "NRestarts", "ActiveState") == ["1", "active"]

        until(active, PATIENCE, f"{unit} is served again")

    def keep_journal(self) -> None:
        """On the disk, where `journal` reads it afterwards."""
        (self.root / "var/log/journal").mkdir(parents=True, exist_ok=True)
        self.run("journalctl", "--flush")

    def reboot(self) -> None:
        """Ends it as a reboot does; what is above it stays, and boots nothing."""
        self.run("systemctl", "reboot", fails=True)
        self._above.wait(PATIENCE)
        self.pid = 0

    def _end(self) -> None:
        if self.pid and self._above.poll() is None:
            os.kill(self.pid, signal.SIGKILL)  # the namespace ends with it
        else:
            self._above.kill()
        # What was mounted from a disk that waits for a server cannot be unmounted.
        with pyublk.Controller(deadline=30) as controller:
            for device in controller.devices():
                with suppress(pyublk.DeviceNotFound):
                    controller.delete(device.id)
        self._above.wait(PATIENCE)
