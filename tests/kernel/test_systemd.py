"""Disks as services of a real systemd, which is process 1 of a pid namespace of its own.

`./run systemd` has these tests, since they take minutes where processors are emulated.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from needs import in_any_pid_namespace, only_where
from servers import until

SYSTEMD = Path("/lib/systemd/systemd")
ETC = Path("/etc/pyublk")
UNITS = Path("/etc/systemd/system")
#: What process 1 knows besides what is installed: not what this machine would start.
SHIPPED = [
    "basic.target",
    "local-fs.target",
    "modprobe@.service",
    "multi-user.target",
    "network.target",
    "network-online.target",
    "remote-fs.target",
    "remote-fs-pre.target",
    "shutdown.target",
    "sysinit.target",
    "systemd-udevd-control.socket",
    "systemd-udevd-kernel.socket",
    "systemd-udevd.service",
    "umount.target",
]
MOUNT = "srv-images.mount"
PATIENCE = 120.0

#: Whose files, `# /etc/...`, are those of the tests.
PAGE = Path(__file__).parents[2] / "docs/services.md"

HANGING_DISK = """
[disk.hanging]
target = "hanging.py:Hanging"
id = 21
after = ["images"]
"""

#: Reads hang once a file is there.
HANGING = """\
import os
import threading
import pyublk

class Hanging(pyublk.Target):
    def __init__(self):
        super().__init__(size=1 << 20, read_only=True)

    def read(self, offset, buffer):
        if offset and os.path.exists("/run/hang"):
            threading.Event().wait()
        buffer[:] = bytes(len(buffer))
"""


class Systemd:
    """A systemd, and this machine as what runs below it sees it."""

    def __init__(self, units: Path) -> None:
        shipped = units / "shipped"
        shipped.mkdir()
        for name in SHIPPED:
            shutil.copy(SYSTEMD.parent / "system" / name, shipped)
        path = f"{UNITS}:/run/systemd/generator:{shipped}"
        start = (
            # Shared, as on a machine: a service's own namespace unmounts what others unmount.
            "mount --make-rshared / && "
            "mount -t tmpfs run /run && mount -t cgroup2 cgroup /sys/fs/cgroup && "
            f"exec {SYSTEMD} --system --unit=basic.target --show-status=0 --log-target=console"
        )
        self.log = units / "log"
        with self.log.open("w") as log:
            self._above = subprocess.Popen(
                ["unshare", "--pid", "--mount", "--fork", "--mount-proc", "sh", "-c", start],
                env={
                    "container": "test",  # it has no console
                    "PATH": os.environ["PATH"],
                    "SYSTEMD_UNIT_PATH": path,
                },
                stdout=log,
                stderr=log,
            )
        self.pid = 0
        until(self._runs, PATIENCE, "systemd runs")

    def _runs(self) -> bool:
        assert self._above.poll() is None, self.log.read_text()
        place = Path(f"/proc/{self._above.pid}/task/{self._above.pid}/children")
        self.pid = int(place.read_text().split()[0]) if place.read_text().split() else 0
        if not self.pid:
            return False
        return self.run("systemctl", "is-active", "basic.target", fails=True) == "active"

    def run(self, *command: str, fails: bool = False) -> str:
        """What a command prints below it."""
        done = subprocess.run(
            ["nsenter", "-t", str(self.pid), "-m", "-p", *command],
            capture_output=True,
            text=True,
            timeout=PATIENCE,
            check=False,
        )
        if done.returncode and not fails:
            pytest.fail(f"{command}: {done.stdout}{done.stderr}\n{self.log.read_text()[-4000:]}")
        return done.stdout.strip()

    def pyublk(self, *arguments: str) -> str:
        return self.run(sys.executable, "-m", "pyublk", *arguments)

    def show(self, unit: str, *properties: str) -> list[str]:
        found = self.run("systemctl", "show", unit, *(f"-p{name}" for name in properties))
        values = dict(line.split("=", 1) for line in found.splitlines())
        return [values[name] for name in properties]

    def end(self) -> None:
        if self.pid:
            os.kill(self.pid, signal.SIGKILL)  # the namespace ends with it
        self._above.wait(PATIENCE)


@pytest.fixture
def systemd(tmp_path: Path) -> Iterator[Systemd]:
    only_where(Path("/run/pyublk-vm").is_dir(), "this would change the machine's units")
    in_any_pid_namespace()
    place = tmp_path / "etc"
    place.mkdir()
    place.chmod(0o755)
    images = place / "images.img"
    with images.open("wb") as file:
        file.truncate(16 << 20)
    subprocess.run(["mkfs.ext4", "-q", images], check=True, timeout=PATIENCE)
    ETC.mkdir(exist_ok=True)
    (ETC / "hanging.py").write_text(HANGING)
    Path("/srv/images").mkdir(parents=True, exist_ok=True)
    for block in re.findall(r"^```\w+\n(# /etc/.*?)^```", PAGE.read_text(), re.M | re.S):
        file = Path(block.partition("\n")[0].removeprefix("# "))
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(block.replace("/var/lib/images.img", str(images)))
    with (ETC / "disks.toml").open("a") as file:
        file.write(HANGING_DISK)
    running = Systemd(tmp_path)
    running.run("systemctl", "start", "systemd-udevd.service")  # which tells it of disks
    yield running
    running.end()


def test_disks_as_services(systemd: Systemd) -> None:
    told = systemd.pyublk("service", "install")
    assert "write      /etc/systemd/system/pyublk@.service" in told
    assert "pyublk@hanging.service.d/after.conf" in told
    again = json.loads(systemd.pyublk("service", "install", "--json"))
    assert {one["change"] for one in again["files"]} == {"keep"}
    assert again["commands"] == []
    systemd.run("systemctl", "daemon-reload")

    # A mount that comes after it starts it.
    systemd.run("systemctl", "start", MOUNT)
    unit = "pyublk@images.service"
    state, main, restarts = systemd.show(unit, "ActiveState", "MainPID", "NRestarts")
    assert (state, restarts) == ("active", "0")
    root = Path(f"/proc/{systemd.pid}/root")
    kept = root / "srv/images/kept"
    kept.write_text("before")
    status = Path(f"/proc/{systemd.pid}/root/proc/{main}/status").read_text()
    assert "NoNewPrivs:\t1" in status
    (record,) = json.loads(systemd.pyublk("info", "20", "--json"))
    assert record["server_pid"] == int(main)

    # It is killed while it is used: another server, and the mount lives.
    systemd.run("kill", "-KILL", main)
    kept.write_text("after")
    os.sync()
    until(lambda: systemd.show(unit, "NRestarts", "ActiveState") == ["1", "active"], PATIENCE)
    assert systemd.show(MOUNT, "ActiveState") == ["active"]

    # A restart of the service exchanges the server under the mount.
    (main,) = systemd.show(unit, "MainPID")
    systemd.run("systemctl", "restart", unit)
    assert systemd.show(unit, "MainPID", "Result") != [main, "success"]
    assert systemd.show(MOUNT, "ActiveState") == ["active"]
    assert kept.read_text() == "after"

    # A stop of both unmounts first.
    systemd.run("systemctl", "stop", unit, MOUNT)
    assert systemd.show(MOUNT, "ActiveState", "Result") == ["inactive", "success"]
    assert systemd.show(unit, "ActiveState", "Result") == ["inactive", "success"]
    assert not Path("/dev/ublkb20").exists()
    assert not list((root / "run/pyublk").iterdir())
    assert b"after" in (record_file(root)).read_bytes()


def record_file(root: Path) -> Path:
    """The image that the definition names."""
    text = (ETC / "disks.toml").read_text()
    return Path(text.partition('["')[2].partition('"]')[0])


def test_the_watchdog_ends_a_server_that_hangs(systemd: Systemd) -> None:
    systemd.pyublk("service", "install")
    unit = "pyublk@hanging.service"
    drop_in = UNITS / f"{unit}.d" / "watchdog.conf"
    log = systemd.log.with_name("hanging.log")
    drop_in.write_text(f"[Service]\nWatchdogSec=6\nStandardError=append:{log}\n")
    systemd.run("systemctl", "daemon-reload")
    systemd.run("systemctl", "start", unit)
    assert systemd.show("pyublk@images.service", "ActiveState") == ["active"]
    root = Path(f"/proc/{systemd.pid}/root")
    read = ["dd", "if=/dev/ublkb21", "of=/dev/null", "bs=4k", "count=1", "skip=64", "iflag=direct"]
    assert subprocess.run(read, check=False, timeout=PATIENCE).returncode == 0
    (root / "run/hang").touch()
    hangs = subprocess.run(read, check=False, timeout=PATIENCE, capture_output=True)
    assert hangs.returncode == 1  # its request failed with the server
    (root / "run/hang").unlink()
    until(lambda: systemd.show(unit, "NRestarts", "ActiveState") == ["1", "active"], PATIENCE)
    assert "in read" in log.read_text()  # where it hung
    assert subprocess.run(read, check=False, timeout=PATIENCE).returncode == 0
    systemd.run("systemctl", "stop", unit, "pyublk@images.service")

    # All of them at once, by `pyublk up` and `down`.
    systemd.run("systemctl", "start", "pyublk.service")
    assert subprocess.run(read, check=False, timeout=PATIENCE).returncode == 0
    systemd.run("systemctl", "reload", "pyublk.service")
    systemd.run("systemctl", "stop", "pyublk.service")
    assert not Path("/dev/ublkb21").exists()
    told = systemd.pyublk("service", "uninstall")
    assert "remove     /etc/systemd/system/pyublk@.service" in told
    assert sorted(UNITS.glob("pyublk*")) == [drop_in.parent]
