# SPDX-License-Identifier: MIT
"""Disks without ublk: nbdkit serves the target, and the kernel's nbd driver is its client.

`nbdN.json`, `.log`, `.spec` and `.socket` in the run directory belong to `/dev/nbdN`.
"""

import errno
import fcntl
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Self

from pyublk import errors
from pyublk.files import StrangeFile, read_record, write_record
from pyublk.nbdkit import PLUGIN
from pyublk.openers import start_time
from pyublk.service.inventory import size_of
from pyublk.service.plan import DiskSpec
from pyublk.service.processes import ProcessId
from pyublk.service.records import json_object, make_run_directory, run_directory
from pyublk.service.usage import uses

#: What a disk can be asked for that nbdkit, or the driver, has too.
OPTIONS = ("size", "block_size", "read_only", "queues")
#: What is missing without ublk, for whoever starts such a disk.
LOST = (
    "served by NBD, not ublk: no recovery when its server dies, no upgrade or resize while it is "
    "used, no faults, limits, traces or statistics, no zero copy; requests take longer"
)

#: Seconds for nbdkit to open the target, and for the driver to connect.
STARTS = 60.0
#: Seconds for nbdkit to close the target.
ENDS = 30.0
#: Connections, each of which has a hardware queue.
CONNECTIONS = 2

#: What the plugin prints once the target is open.
SERVES = r"pyublk: serves [0-9]+ bytes in blocks of ([0-9]+)\n"

_BLKFLSBUF = 0x1261
_NAME = re.compile(r"nbd(0|[1-9][0-9]{0,4})")


@dataclass(frozen=True, slots=True, kw_only=True)
class NBDDisk:
    """A disk by NBD: `name` is such as nbd0, `server` nbdkit's process."""

    name: str
    server: ProcessId
    plan: DiskSpec
    log: Path

    @property
    def path(self) -> str:
        """The block device."""
        return f"/dev/{self.name}"

    @property
    def size(self) -> int:
        """Bytes."""
        return size_of(self.name)

    @property
    def state(self) -> str:
        """ "live", or "dead" when nbdkit has ended or the driver has let go of it."""
        return "live" if self._server_runs() and is_connected(self.name) else "dead"

    def _server_runs(self) -> bool:
        return start_time(self.server.pid) == self.server.started

    def write(self) -> None:
        """Keeps it, readable for its owner only."""
        write_record(_place(self.name, "json"), json.dumps(asdict(self) | {"log": str(self.log)}))

    @classmethod
    def read(cls, name: str) -> Self | None:
        """None: there is none, or none that can be understood."""
        try:
            found = json_object(read_record(_place(name, "json"))) or {}
            return cls(
                name=name,
                server=ProcessId(**found["server"]),
                plan=DiskSpec.from_fields(found["plan"]),
                log=Path(found["log"]),
            )
        except (OSError, StrangeFile, KeyError, TypeError):
            return None

    def forget(self) -> None:
        """Removes what belongs to it."""
        for kind in ("json", "spec", "socket", "log"):
            _place(self.name, kind).unlink(missing_ok=True)

    def summary(self) -> dict[str, Any]:
        """As JSON."""
        return {
            "id": self.name,
            "path": self.path,
            "target": self.plan.target,
            "size": self.size,
            "state": self.state,
            "via": "nbd",
            "server_pid": self.server.pid,
            "used_by": [asdict(use) for use in uses(self.name)],
            "log": str(self.log),
            "plan": asdict(self.plan),
        }


def _place(name: str, kind: str) -> Path:
    return run_directory() / f"{name}.{kind}"


def is_connected(name: str, sys: Path = Path("/sys")) -> bool:
    """Whether the driver has a server for the device."""
    return (sys / "class/block" / name / "pid").exists()


def disks() -> list[NBDDisk]:
    """Those that were started here."""
    names = [path.stem for path in run_directory().glob("nbd*.json")]
    names = sorted((name for name in names if _NAME.fullmatch(name)), key=lambda one: int(one[3:]))
    return [disk for name in names if (disk := NBDDisk.read(name)) is not None]


def find(name: str) -> NBDDisk:
    """The disk of that name. Raises OSError ENODEV."""
    disk = NBDDisk.read(name)
    if disk is None:
        others = ", ".join(one.name for one in disks()) or "none"
        raise OSError(errno.ENODEV, f"{name} is no disk of pyublk's by NBD; there are: {others}")
    return disk


# ---- starting ----


def start(spec: DiskSpec) -> NBDDisk:
    """Starts nbdkit and connects a device of the nbd driver with it; returns when that can be read.

    Raises what kept the disk from being made; then nothing is left of it.
    """
    for name in spec.disk:
        if name not in OPTIONS:
            raise ValueError(
                f"--{name.replace('_', '-')} is for disks by ublk: by NBD there are "
                f"{', '.join('--' + one.replace('_', '-') for one in OPTIONS)}"
            )
    spec.make_target()  # what is wrong with it is said here, before anything starts
    check()
    make_run_directory()
    name = _free_device()
    log, spec_file, socket = (_place(name, kind) for kind in ("log", "spec", "socket"))
    for path in (log, socket):
        path.unlink(missing_ok=True)
    write_record(spec_file, json.dumps(asdict(spec)))
    process = _start_nbdkit(log, spec_file, socket)
    try:
        started = start_time(process.pid)
        if started is None:
            raise _ended(process, log)
        disk = NBDDisk(name=name, server=ProcessId(process.pid, started), plan=spec, log=log)
        _connect(disk, process, _block_size(process, log))
        disk.write()
        _check_readable(disk)
    except BaseException:
        if is_connected(name):
            _run("nbd-client", "-d", f"/dev/{name}")
        process.terminate()
        with suppress(subprocess.TimeoutExpired):
            process.wait(ENDS)
        process.kill()
        process.wait()
        for kind in ("json", "spec", "socket", "log"):
            _place(name, kind).unlink(missing_ok=True)
        raise
    spec_file.unlink()
    return disk


def check() -> None:
    """Raises FeatureMissing for what is not installed, and PermissionError."""
    if os.geteuid() != 0:
        raise PermissionError(errno.EPERM, "only root may connect devices of the nbd driver")
    for program, package in (("nbdkit", "nbdkit"), ("nbd-client", "nbd-client")):
        if shutil.which(program) is None:
            raise errors.FeatureMissing(
                "--via nbd", f"{program}: install the package {package}", "no such program"
            )
    told = _run("nbdkit", "python", "--dump-plugin").stdout
    version = re.search(r"^python_version=(\d+\.\d+)", told, re.M)
    here = f"{sys.version_info[0]}.{sys.version_info[1]}"
    if version is None:
        raise errors.FeatureMissing(
            "--via nbd",
            "nbdkit's plugin for Python: install the package nbdkit-plugin-python",
            "none",
        )
    if version[1] != here:
        raise errors.FeatureMissing(
            "--via nbd",
            f"pyublk for Python {version[1]}, by which nbdkit runs plugins: install it for that",
            f"Python {here}",
        )


def _free_device(sys: Path = Path("/sys")) -> str:
    block = sys / "class/block"
    if not any(block.glob("nbd*")):
        done = _run("modprobe", "nbd") if shutil.which("modprobe") else None
        if not any(block.glob("nbd*")):
            said = done.stderr.strip().splitlines()[-1:] if done is not None else []
            raise errors.FeatureMissing(
                "--via nbd", "the nbd driver", said[0] if said else "a kernel without it"
            )
    names = [path.name for path in block.glob("nbd*") if _NAME.fullmatch(path.name)]
    for name in sorted(names, key=lambda one: int(one[3:])):
        if not is_connected(name, sys) and not size_of(name, sys) and NBDDisk.read(name) is None:
            return name
    raise OSError(
        errno.EBUSY, f"all of the {len(names)} devices of the nbd driver are in use: the module's "
        "parameter nbds_max makes more"
    )  # fmt: skip


def _start_nbdkit(log: Path, spec: Path, socket: Path) -> "subprocess.Popen[bytes]":
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC
    descriptor = os.open(log, flags, 0o600)
    try:
        return subprocess.Popen(
            ["nbdkit", "-f", "-U", str(socket), "python", str(PLUGIN), f"spec={spec}"],
            stdin=subprocess.DEVNULL,
            stdout=descriptor,
            stderr=descriptor,
            start_new_session=True,
        )
    finally:
        os.close(descriptor)


def _block_size(process: "subprocess.Popen[bytes]", log: Path) -> int:
    """That of the target, once nbdkit has opened it."""
    until = time.monotonic() + STARTS
    while (told := re.search(SERVES, log.read_text(errors="replace"))) is None:
        if process.poll() is not None:
            raise _ended(process, log)
        if time.monotonic() > until:
            raise TimeoutError(f"nbdkit did not open the target within {STARTS:g} s")
        time.sleep(0.02)
    return int(told[1])


def _connect(disk: NBDDisk, process: "subprocess.Popen[bytes]", block_size: int) -> None:
    words = ["-unix", str(_place(disk.name, "socket")), disk.path, "-block-size", str(block_size)]
    words += ["-connections", str(disk.plan.disk.get("queues") or CONNECTIONS)]
    if disk.plan.disk.get("read_only"):
        words.append("-readonly")
    done = _run("nbd-client", *words)
    until = time.monotonic() + STARTS
    while done.returncode == 0 and process.poll() is None and time.monotonic() < until:
        if is_connected(disk.name) and disk.size:
            return
        time.sleep(0.02)
    if process.poll() is not None:
        raise _ended(process, disk.log)
    said = [line for line in done.stderr.splitlines() if line.strip()] or ["it said nothing"]
    raise OSError(errno.EIO, f"nbd-client could not connect {disk.path}: {said[-1].strip()}")


def _ended(process: "subprocess.Popen[bytes]", log: Path) -> OSError:
    """What nbdkit said when it ended before there was a disk."""
    process.wait(ENDS)
    lines = log.read_text(errors="replace").splitlines()
    told = [line for line in lines if line.startswith("nbdkit: pyublk: ")]
    if told:
        return OSError(errno.EIO, told[-1].removeprefix("nbdkit: pyublk: "))
    error = OSError(errno.EIO, "nbdkit ended before the disk was there")
    for line in lines[-20:]:
        error.add_note(line)
    return error


def _check_readable(disk: NBDDisk) -> None:
    try:
        descriptor = os.open(disk.path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            os.pread(descriptor, 4096, 0)
        finally:
            os.close(descriptor)
    except OSError as error:
        raise OSError(
            error.errno, f"the first block of {disk.path} cannot be read: {error.strerror}"
        ) from None


def _run(*command: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run(
        command,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=STARTS,
        check=False,
    )


# ---- stopping ----


def stop(disk: NBDDisk, *, timeout: float, force: bool = False) -> None:
    """Flushes the disk, disconnects it, and ends its server.

    Unless `force`, raises DeviceBusy for one that is used, and OSError for one that cannot be
    flushed: it is left as it is. Raises HandlerTimeout when the server had to be killed.
    """
    if not force and (found := uses(disk.name)):
        raise errors.DeviceBusy("; ".join(str(use) for use in found))
    if is_connected(disk.name):
        try:
            _flush(disk)
        except OSError:
            if not force and disk.state == "live":
                raise
        done = _run("nbd-client", "-d", disk.path)
        if done.returncode and is_connected(disk.name):
            raise OSError(errno.EIO, f"nbd-client -d {disk.path} failed: {done.stderr.strip()}")
    killed = False
    if (server := disk.server.open()) is not None:
        with server:
            server.send(signal.SIGTERM)
            if not server.wait(timeout):
                server.send(signal.SIGKILL)
                server.wait(ENDS)
                killed = True
    disk.forget()
    if killed:
        raise errors.HandlerTimeout(
            f"the server of {disk.path} (process {disk.server.pid}) did not end within "
            f"{timeout:g} s and was killed: the disk is gone"
        )


def _flush(disk: NBDDisk) -> None:
    """Claims the disk, and makes durable what was written. Raises DeviceBusy, and OSError."""
    try:
        descriptor = os.open(disk.path, os.O_RDONLY | os.O_EXCL | os.O_CLOEXEC)
    except OSError as error:
        if error.errno != errno.EBUSY:
            raise
        raise errors.DeviceBusy(f"{disk.path} is in use") from None
    try:
        os.fsync(descriptor)
        fcntl.ioctl(descriptor, _BLKFLSBUF, 0)
    finally:
        os.close(descriptor)
