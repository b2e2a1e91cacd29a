"""Disks as services of a real systemd, which is process 1 of a pid namespace of its own.

`./run systemd` has these tests, since they take minutes where processors are emulated.
"""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from booted import PATIENCE, UNITS, Systemd
from needs import in_any_pid_namespace, only_where, python_for_everybody

sys.path.insert(0, str(Path(__file__).parents[1] / "docs"))

from commands import Command, File, steps

ETC = Path("/etc/pyublk")
MOUNT = "srv-images.mount"

DOCS = Path(__file__).parents[2] / "docs"
#: The first has the definitions and units that the tests use.
PAGES = [DOCS / "services.md", DOCS / "run-for-months.md"]

HANGING_DISK = """
[disk.hanging]
target = "hanging.py:Hanging"
id = 21
after = ["images"]

[disk.misspelt]
target = "hanging.py:Hangs"
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


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Systemd]:
    only_where(Path("/run/pyublk-vm").is_dir(), "this would change the machine's units")
    in_any_pid_namespace()
    for left in (ETC, *UNITS.glob("pyublk*")):  # by the test before
        shutil.rmtree(left) if left.is_dir() else left.unlink(missing_ok=True)
    with Systemd(tmp_path) as running:
        yield running


@pytest.fixture
def systemd(booted: Systemd, tmp_path: Path) -> Systemd:
    """With the disk of the page, and one that hangs."""
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
    for step in steps(PAGES[0]):
        if isinstance(step, File):
            write(step, step.text.replace("/var/lib/images.img", str(images)))
    with (ETC / "disks.toml").open("a") as file:
        file.write(HANGING_DISK)
    return booted


def write(step: File, text: str) -> None:
    step.path.parent.mkdir(parents=True, exist_ok=True)
    step.path.write_text(text)


def test_disks_as_services(systemd: Systemd) -> None:
    told = systemd.pyublk("service", "install")
    assert "write      /etc/systemd/system/pyublk@.service" in told
    assert "pyublk@hanging.service.d/after.conf" in told
    again = json.loads(systemd.pyublk("service", "install", "--json"))
    assert {one["change"] for one in again["files"]} == {"keep"}
    assert again["commands"] == []
    systemd.run("systemctl", "daemon-reload")

    # A mistake in a definition is told once, and not tried again.
    systemd.run("systemctl", "start", "pyublk@misspelt.service", fails=True)
    failed = systemd.show("pyublk@misspelt.service", "ActiveState", "ExecMainStatus", "NRestarts")
    assert failed == ["failed", "2", "0"]

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
    systemd.is_back(unit)
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
    systemd.is_back(unit)
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
    left = [path for path in UNITS.rglob("*pyublk*/*") if path.is_file()]
    assert sorted(left) == [drop_in, UNITS / "pyublk@images.service.d/rights.conf"]


def test_every_command_of_the_pages(booted: Systemd) -> None:
    """One page after the other, from top to bottom, as somebody would who follows them."""
    booted.run("useradd", "--user-group", "alice")
    with python_for_everybody():
        for page in PAGES:
            for step in steps(page):
                if isinstance(step, File):
                    write(step, step.text)
                else:
                    follow(booted, step)
    assert not list(Path("/dev").glob("ublkb*"))


def follow(machine: Systemd, step: Command) -> None:
    as_user = []
    if not step.by_root:
        machine.run("install", "-d", "-o", "alice", "-m", "700", "/run/alice")
        as_user = ["setpriv", "--reuid=alice", "--regid=alice", "--init-groups"]
        as_user += ["env", "XDG_RUNTIME_DIR=/run/alice"]
    printed = machine.run(*as_user, "sh", "-c", step.line)
    if step.output:
        assert printed == step.output, step.line
