"""A machine's day: disks of five kinds that systemd serves and mounts, all of their servers killed,
pyublk upgraded, and the machine booted again.

`./run systemd` runs its two boots, in two virtual machines that have the same disk, a file in the
directory PYUBLK_MACHINE beside the wheels of pyublk and of what it needs.
"""

import hashlib
import json
import os
import socket
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from booted import PATIENCE, UNITS, Systemd, journal
from servers import until

MACHINE = Path(os.environ.get("PYUBLK_MACHINE", "/nonexistent"))
INSTALLED = Path("/opt/pyublk")
#: Of the wheels that the machine is upgraded by.
NEW_VERSION = "0.1.0.post1"

DISKS = """\
[disk.scratch]
target = "ram"
size = "16M"
id = 30
recovery = "resend"

[disk.images]
target = "file"
arguments = ["/var/lib/day/images"]
size = "16M"
id = 31
recovery = "resend"

[disk.pair]
target = "mirror"
arguments = ["/var/lib/day/left", "/var/lib/day/right"]
size = "16M"
id = 32
recovery = "resend"
after = ["images"]

[disk.secret]
target = "secret.py:Secret"
arguments = ["/var/lib/day/secret"]
size = "16M"
id = 33
recovery = "resend"

[disk.checked]
target = "integrity"
arguments = ["/var/lib/day/checked", "/var/lib/day/checked.pi"]
size = "16M"
id = 34
recovery = "resend"
"""
NAMES = {"scratch": 30, "images": 31, "pair": 32, "secret": 33, "checked": 34}

#: A class of the machine's own; reads of its last block fail once a file is there.
SECRET = """\
import os
import pyublk

class Secret(pyublk.Target):
    recoverable = True

    def __init__(self, path, *, size):
        super().__init__(size=size)
        self.path = path

    def open(self):
        self.file = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600)

    def close(self):
        os.close(self.file)

    def read(self, offset, buffer):
        if offset + len(buffer) == self.size and os.path.exists("/run/spoilt"):
            raise RuntimeError("the last block is spoilt")
        found = os.pread(self.file, len(buffer), offset)
        buffer[:] = found.ljust(len(buffer), bytes(1)).translate(KEY)

    def write(self, offset, buffer):
        os.pwrite(self.file, bytes(buffer).translate(KEY), offset)

    def flush(self):
        os.fsync(self.file)

KEY = bytes(byte ^ 0x5A for byte in range(256))
"""

#: A disk that no unit serves.
BY_HAND = """\
[disk.more]
target = "stripe"
arguments = ["/var/lib/day/one", "/var/lib/day/two"]
size = "2M"
id = 40
"""

DROP_IN = """\
[Unit]
Wants=pyublk@{0}.service
After=pyublk@{0}.service
"""

#: Five servers that start at once, on emulated processors.
PATIENT = """\
[Service]
TimeoutStartSec=600
TimeoutStopSec=600
WatchdogSec=600
"""


def unit(name: str) -> str:
    return f"pyublk@{name}.service"


def mount(name: str) -> str:
    return f"srv-{name}.mount"


@pytest.fixture
def booted(tmp_path: Path) -> Iterator[Callable[[str], Systemd]]:
    """Boots the machine, and ends it."""
    running: list[Systemd] = []

    def boot(target: str) -> Systemd:
        machine = Systemd(
            tmp_path, target=target, disk=MACHINE / "disk", programs=INSTALLED / "bin"
        )
        running.append(machine)
        return machine.__enter__()

    yield boot
    for machine in running:
        machine.__exit__(None, None, None)


def install(machine: Systemd, wheels: Path) -> None:
    """pyublk, from wheels alone."""
    machine.run(
        *(sys.executable, "-m", "pip", "-q", "--python", str(INSTALLED / "bin/python")),
        *("install", "--no-index", "--no-compile", "--upgrade"),
        *("--find-links", str(wheels), "pyublk"),
    )


def newer(wheels: Path) -> None:
    """Adds a wheel of the version NEW_VERSION, which differs by nothing else."""
    (old,) = wheels.glob("pyublk-*.whl")
    version = old.name.split("-")[1]
    with (
        zipfile.ZipFile(old) as source,
        zipfile.ZipFile(old.with_name(old.name.replace(version, NEW_VERSION)), "w") as made,
    ):
        for entry in source.infolist():
            content = source.read(entry)
            if entry.filename.endswith(".dist-info/METADATA"):
                content = content.replace(
                    f"\nVersion: {version}\n".encode(), f"\nVersion: {NEW_VERSION}\n".encode()
                )
            if entry.filename.endswith(".dist-info/RECORD"):
                content = content.replace(
                    f"pyublk-{version}.".encode(), f"pyublk-{NEW_VERSION}.".encode()
                )
            entry.filename = entry.filename.replace(
                f"pyublk-{version}.dist-info", f"pyublk-{NEW_VERSION}.dist-info"
            )
            made.writestr(entry, content)


def versions(machine: Systemd) -> dict[str, str]:
    """Of the servers, by which each greets its clients."""
    found = {}
    for name, number in NAMES.items():
        with socket.socket(socket.AF_UNIX) as client:
            client.settimeout(PATIENCE)
            client.connect(str(machine.root / f"run/pyublk/{number}.sock"))
            found[name] = json.loads(client.makefile().readline())["pyublk"]
    return found


def active(machine: Systemd, *units: str) -> bool:
    return all(machine.show(one, "ActiveState") == ["active"] for one in units)


def sums(machine: Systemd, name: str) -> dict[str, str]:
    """Of the files of a disk, as they are there, not in the page cache."""
    Path("/proc/sys/vm/drop_caches").write_text("3")
    return {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest()
        for file in (machine.root / "srv" / name).iterdir()
        if file.is_file()
    }


def set_up(machine: Systemd) -> None:
    """The definitions, and mounts that systemd formats when there is nothing."""
    root = machine.root
    for place in ("etc/pyublk", "var/lib/day"):
        (root / place).mkdir(parents=True, exist_ok=True)
    for name, mib in (("left", 16), ("right", 16), ("one", 1), ("two", 1)):
        with (root / "var/lib/day" / name).open("wb") as file:
            file.truncate(mib << 20)
    (root / "etc/pyublk/disks.toml").write_text(DISKS)
    (root / "etc/pyublk/secret.py").write_text(SECRET)
    (root / "srv/more.toml").write_text(BY_HAND)
    patient = root / f".{UNITS}/pyublk@.service.d/patient.conf"
    patient.parent.mkdir()
    patient.write_text(PATIENT)
    fstab = []
    for name, number in NAMES.items():
        fstab.append(f"/dev/ublkb{number} /srv/{name} ext4 _netdev,x-systemd.makefs 0 0\n")
        drop_in = root / f".{UNITS}/{mount(name)}.d/pyublk.conf"
        drop_in.parent.mkdir()
        drop_in.write_text(DROP_IN.format(name))
    (root / "etc/fstab").write_text("".join(fstab))
    machine.pyublk("service", "install")
    machine.run("systemctl", "enable", "remote-fs.target", *map(unit, NAMES))
    machine.run("systemctl", "start", "remote-fs.target")
    assert active(machine, *map(unit, NAMES), *map(mount, NAMES))


def fill(machine: Systemd, name: str, file: str) -> None:
    content = os.urandom(1 << 20)
    with (machine.root / "srv" / name / file).open("wb") as there:
        there.write(content)
        os.fsync(there.fileno())
    known = machine.root / "var/lib/day/sums.json"
    found = json.loads(known.read_text()) if known.exists() else {}
    found.setdefault(name, {})[file] = hashlib.sha256(content).hexdigest()
    known.write_text(json.dumps(found))


def whole(machine: Systemd, *names: str) -> None:
    """Every file has the content that was written to it."""
    known = json.loads((machine.root / "var/lib/day/sums.json").read_text())
    for name in names:
        assert sums(machine, name) == known[name], name


def test_morning(booted: Callable[[str], Systemd], tmp_path: Path) -> None:
    machine = booted("basic.target")
    machine.run("python3", "-m", "venv", "--without-pip", str(INSTALLED))
    wheels = machine.root / "var/lib/wheels"
    wheels.mkdir(parents=True)
    for wheel in MACHINE.glob("*.whl"):
        (wheels / wheel.name).write_bytes(wheel.read_bytes())
    install(machine, Path("/var/lib/wheels"))
    set_up(machine)
    for name in NAMES:
        fill(machine, name, "first")
    machine.pyublk("up", "/srv/more.toml")

    everything_is_killed(machine)
    memory_is_kept(machine)
    errors_are_in_the_journal(machine)
    the_package_is_upgraded(machine, wheels)

    goes_down(machine, tmp_path)


def everything_is_killed(machine: Systemd) -> None:
    """All servers and helpers at once, while the disks are written."""
    since = {name: machine.show(mount(name), "ActiveEnterTimestampMonotonic") for name in NAMES}
    machine.kill(*map(unit, NAMES))
    for name in NAMES:
        fill(machine, name, "while it was killed")
    for name in NAMES:
        machine.is_back(unit(name))
    for name, before in since.items():
        assert machine.show(mount(name), "ActiveEnterTimestampMonotonic") == before
    whole(machine, *NAMES)


def memory_is_kept(machine: Systemd) -> None:
    """By systemd: also over a restart of the disk that nobody uses, which is made anew."""
    device = Path("/dev/ublkb30")
    machine.run("systemctl", "restart", unit("scratch"))  # under the mount
    whole(machine, "scratch")
    assert machine.show(unit("scratch"), "NFileDescriptorStore") == ["1"]
    machine.run("systemctl", "stop", mount("scratch"))
    before = hashlib.sha256(device.read_bytes()).hexdigest()
    machine.run("systemctl", "restart", unit("scratch"))
    assert hashlib.sha256(device.read_bytes()).hexdigest() == before
    machine.kill(unit("scratch"))
    assert hashlib.sha256(device.read_bytes()).hexdigest() == before
    machine.run("systemctl", "start", mount("scratch"))
    whole(machine, "scratch")


def errors_are_in_the_journal(machine: Systemd) -> None:
    def told(name: str, priority: str) -> str:
        return machine.run("journalctl", "-q", "-o", "cat", "-u", unit(name), "-p", priority)

    assert told("secret", "err") == ""
    assert "serving secret.py:Secret as /dev/ublkb33" in told("secret", "info")
    (machine.root / "run/spoilt").touch()
    last = ["dd", "if=/dev/ublkb33", "of=/dev/null", "bs=4k", "skip=4095", "iflag=direct"]
    done = subprocess.run(last, capture_output=True, text=True, timeout=PATIENCE, check=False)
    (machine.root / "run/spoilt").unlink()
    assert "Input/output error" in done.stderr
    until(lambda: "the last block is spoilt" in told("secret", "err"), PATIENCE)
    assert "Traceback" in told("secret", "err")
    assert "serving" not in told("secret", "err")
    assert told("images", "err") == ""


def the_package_is_upgraded(machine: Systemd, wheels: Path) -> None:
    before = versions(machine)
    newer(wheels)
    install(machine, Path("/var/lib/wheels"))
    assert versions(machine) == before
    told = machine.run("pyublk", "upgrade", "all", fails=True)
    assert told.splitlines() == ["/dev/ublkb40"]
    for name in NAMES:
        machine.run("systemctl", "restart", unit(name))
    assert set(versions(machine).values()) == {NEW_VERSION}
    assert active(machine, *map(mount, NAMES))
    for name in NAMES:
        fill(machine, name, "upgraded")
    whole(machine, *NAMES)
    with open("/dev/ublkb40", "r+b", buffering=0) as disk:
        disk.write(b"by hand".ljust(4096))
        os.fsync(disk)
    machine.pyublk("stop", "40")


def goes_down(machine: Systemd, tmp_path: Path) -> None:
    """No disk outlives a reboot: they are unmounted first."""
    machine.keep_journal()
    machine.reboot()
    os.sync()
    left = list(Path("/dev").glob("ublkb*"))
    assert not left, journal(MACHINE / "disk", tmp_path / "off")


def test_evening(booted: Callable[[str], Systemd], tmp_path: Path) -> None:
    """Nobody does anything, and all is there."""
    machine = booted("multi-user.target")
    assert active(machine, *map(unit, NAMES), *map(mount, NAMES))
    assert set(versions(machine).values()) == {NEW_VERSION}
    whole(machine, *[name for name in NAMES if name != "scratch"])
    assert sums(machine, "scratch") == {}
    machine.pyublk("doctor")
    machine.pyublk("up", "/srv/more.toml")
    with open("/dev/ublkb40", "rb", buffering=0) as disk:
        assert disk.read(4096) == b"by hand".ljust(4096)
    machine.pyublk("stop", "40")
    goes_down(machine, tmp_path)
